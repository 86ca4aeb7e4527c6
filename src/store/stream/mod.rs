//! A view as one image, served from any offset: its length is known before the first byte, no file is needed for it.
//!
//! - [`Source`]: a member's chain, opened, with what is known of it; which of its blocks hold something.
//! - [`Stream`]: the canonical image of that ([`crate::qcow2::layout::canonical`]): exact length, any range, a strong
//!   validator. Safe to read from many threads at once; each reading has a position and buffers of its own.
//!
//! Tables of the image come from the plan, its data from the members. Where those are adopted, each block is held
//! against its leaf before a byte of it is given away: one that does not fit ends the reading with `data-damaged`.
//!
//! The members' files stay open as long as the source, so a change that gives their names to other files meanwhile is
//! no concern; and nothing is merged into one of them (`pins`). [`Source::unchanged`] tells whether somebody wrote to
//! one all the same.
//!
//! Memory: what the plan takes, two small windows a member, some 20 MiB a reading.

mod pins;
mod read;
mod source;

use std::ops::Range;

pub use read::{Cursor, Held, Piece, Taken, Wanted};
pub use source::Source;

use crate::ids::Digest;
use crate::qcow2::layout::canonical::{Canonical, Form, VERSION};
use crate::store::error::{Result, StoreError};
use crate::store::measure::Job;

/// A view as an image in the canonical layout.
#[derive(Debug)]
pub struct Stream {
    source: Source,
    layout: Canonical,
    validator: Option<Digest>,
}

impl Stream {
    /// Plans the image. Reads nothing more where the members are adopted, else the tables of all of them.
    ///
    /// # Errors
    ///
    /// `huge-table` if the format's limits do not allow the image; what reading the chain's map fails with.
    pub fn new(source: Source, form: Form) -> Result<Self> {
        let units = source.units(form)?;
        let layout = Canonical::new(source.virtual_size(), form, units)
            .map_err(|error| StoreError::Image { member: source.member().to_owned(), source: error })?;
        let validator = source.digest().map(|digest| validator(&layout, digest));
        Ok(Self { source, layout, validator })
    }

    /// What it is made of.
    #[must_use]
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Gives back what it is made of.
    #[must_use]
    pub fn into_source(self) -> Source {
        self.source
    }

    /// The plan.
    #[must_use]
    pub fn layout(&self) -> &Canonical {
        &self.layout
    }

    /// The exact length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.layout.length()
    }

    /// What two images have in common only if all their bytes are the same: BLAKE3 of the view digest, the layout's
    /// version, the form, and all that the tables are computed from. `None` while a member is not adopted.
    #[must_use]
    pub fn validator(&self) -> Option<Digest> {
        self.validator
    }

    /// Gives the bytes `range` of the image, in order, in pieces of at most some hundred KiB, each with its offset.
    /// Blocks for as long as `give` and the stores do.
    ///
    /// If the range has all of the image's data, `wanted` may ask for the digest of the view that was read.
    ///
    /// # Errors
    ///
    /// [`StoreError::Damaged`] (`data-damaged`, naming the member) before a block that is not what it was is given;
    /// `cancelled`; what the stores or `give` fail with. All before the failing piece was given.
    pub fn read<E: From<StoreError> + Send>(
        &self,
        range: Range<u64>,
        wanted: Wanted,
        job: &Job<'_>,
        give: impl FnMut(u64, Piece<'_>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<Digest>, E> {
        let range = range.start..range.end.min(self.length());
        read::read(&self.source, &self.layout, range, wanted, job, give)
    }

    /// A range of the image, to be read step by step.
    #[must_use]
    pub fn cursor(&self, range: Range<u64>) -> Cursor {
        Cursor::new(range.start..range.end.min(self.length()))
    }

    /// The next bytes at a cursor of this image, about `most` of them beside zeros that are not stored; none at its
    /// end. Blocks. Errors as those of [`Stream::read`]; the cursor is of no use after one.
    pub fn next(&self, cursor: &mut Cursor, most: u64, job: &Job<'_>) -> Result<Vec<Taken>> {
        cursor.next(&self.source, &self.layout, most, job)
    }
}

fn validator(layout: &Canonical, view: Digest) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"qchain image");
    hasher.update(&VERSION.to_le_bytes());
    hasher.update(&view.0);
    hasher.update(&layout.virtual_size().to_le_bytes());
    match layout.form() {
        Form::Raw => hasher.update(&[0; 4]),
        Form::Qcow2(bits) => hasher.update(&bits.bits().to_le_bytes()),
    };
    // All tables of the image follow from these.
    for (first, count) in layout.units().runs() {
        hasher.update(&first.to_le_bytes());
        hasher.update(&count.to_le_bytes());
    }
    Digest(*hasher.finalize().as_bytes())
}
