//! A new image that grows out of an old file: what of it stays, and the few bytes of its header that make
//! the old image the new one.
//!
//! Everything new lies behind the old file's end, and nothing that the old header refers to is overwritten,
//! so the file *is* the old image until its header is switched, and the new one from then on.

use crate::failure::Code;
use crate::qcow2::error::Result;
use crate::qcow2::format;
use crate::qcow2::header::Header;
use crate::qcow2::image::Image;
use crate::qcow2::layout::geometry::Geometry;
use crate::qcow2::layout::{ImageOptions, bad};

/// A sector: what a disk writes whole or not at all.
pub type Sector = [u8; 512];

/// The layer in whose file the new image is to be laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Which layer.
    pub layer: usize,
    /// Its header.
    pub header: Header,
    /// Its file's first sector, which the fixed fields of the header lie in.
    pub sector: Sector,
    /// Where the new image's own bytes begin: a cluster boundary at or behind the old file's end.
    pub base: u64,
}

impl Kept {
    /// Takes the facts from an open image, which is `layer` of the map.
    ///
    /// `base` is that of the plan which the file was grown by already, in bytes; `None` for a file that
    /// nothing was added to, whose length it is then, rounded up to a cluster. Errors: the store's.
    pub fn of(layer: usize, image: &Image, base: Option<u64>) -> Result<Self> {
        let header = image.header().clone();
        let base = base.unwrap_or_else(|| header.cluster_bits.round_up(image.file_length()));
        let mut sector = [0; 512];
        image.read_file(0, &mut sector)?;
        Ok(Self { layer, header, sector, base })
    }

    /// Refuses what cannot be: another kind of image, bytes that are not the header's, tables behind the base.
    pub(super) fn check(&self, options: &ImageOptions) -> Result<()> {
        let header = &self.header;
        let refuse = |code, detail: String| Err(bad(code, detail));
        if let Err(unfit) = in_place_possible(header, &[], options) {
            return refuse(Code::ModeImpossible, unfit.to_string());
        }
        let said = |at: usize| self.sector.get(at..).and_then(|rest| rest.first_chunk()).copied();
        let fields = [
            (format::AT_L1_OFFSET, header.l1_offset.0),
            (format::AT_REFCOUNT_TABLE_OFFSET, header.refcount_table_offset.0),
        ];
        if fields.into_iter().any(|(at, value)| said(at).map(u64::from_be_bytes) != Some(value)) {
            return refuse(Code::ChangedMeanwhile, "the header was changed since it was read".to_owned());
        }
        if header.l1_offset.0.max(header.refcount_table_offset.0) >= self.base {
            let detail =
                format!("its tables lie behind {:#x}: it was switched, or is another file", self.base);
            return refuse(Code::ChangedMeanwhile, detail);
        }
        let tables = [
            header.l1_offset.plus(header.l1_bytes()),
            header.refcount_table_offset.plus(header.refcount_table_bytes()),
        ];
        if header.cluster_bits.within(self.base) != 0 || tables.iter().any(|end| end.0 > self.base) {
            return refuse(Code::Truncated, format!("its tables do not end before {:#x}", self.base));
        }
        Ok(())
    }
}

/// Why a file cannot become the new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// Virtual sizes.
    #[error("the members concerned have different virtual sizes")]
    VirtualSize,
    /// Cluster sizes.
    #[error("the members concerned have different cluster sizes")]
    ClusterSize,
    /// Refcount widths.
    #[error("the members concerned have refcounts of different widths")]
    RefcountWidth,
    /// Extended L2 entries.
    #[error("some of the members concerned have extended L2 entries and some have not")]
    Entries,
    /// Compression types.
    #[error("the members concerned have different compression types")]
    Compression,
    /// Version 2.
    #[error("not all members concerned have version 3")]
    Version,
    /// Internal snapshots.
    #[error("a member concerned has internal snapshots")]
    Snapshots,
    /// Bitmaps.
    #[error("a member concerned has bitmaps")]
    Bitmaps,
    /// The dirty bit.
    #[error("a member concerned was not closed cleanly")]
    Dirty,
    /// The backing name or format would change.
    #[error("the lowest of them names its backing file in another way than the result has to")]
    Backing,
}

/// Whether the image of header `kept` can become the one wanted, with what the images of the headers `above`
/// say over it. Pure; an image that is marked corrupt, encrypted, or has its data elsewhere has no [`Header`].
///
/// The bit for late refcounts is the one thing wanted that may differ: the result has what `kept` has.
pub fn in_place_possible(
    kept: &Header,
    above: &[&Header],
    wanted: &ImageOptions,
) -> std::result::Result<(), Unfit> {
    let all = || above.iter().copied().chain([kept]);
    let same = |is: &dyn Fn(&Header) -> bool| all().all(is);
    let backing = kept.backing.as_ref().map(|backing| (backing.name.as_slice(), backing.format.as_deref()));
    let wanted_backing =
        wanted.backing.as_ref().map(|backing| (backing.name.as_slice(), Some(backing.format.as_str())));
    let conditions = [
        (same(&|header| header.version == 3) && wanted.version == 3, Unfit::Version),
        (same(&|header| header.virtual_size == wanted.virtual_size), Unfit::VirtualSize),
        (same(&|header| header.cluster_bits == wanted.cluster_bits), Unfit::ClusterSize),
        (same(&|header| header.refcount_order == wanted.refcount_order), Unfit::RefcountWidth),
        (same(&|header| header.extended_l2 == wanted.extended_l2), Unfit::Entries),
        (same(&|header| header.compression == wanted.compression), Unfit::Compression),
        (same(&|header| header.snapshot_count == 0), Unfit::Snapshots),
        (same(&|header| header.bitmaps.is_none()), Unfit::Bitmaps),
        (same(&|header| !header.dirty), Unfit::Dirty),
        (backing == wanted_backing, Unfit::Backing),
    ];
    conditions.into_iter().find_map(|(holds, unfit)| (!holds).then_some(unfit)).map_or(Ok(()), Err)
}

/// The one write that makes the old image the new one: in the first sector, at most 60 bytes.
///
/// Small enough to be recorded with an intent: [`Switch::state`] then tells after a crash what is the case.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Switch {
    /// Where in the file, in bytes.
    pub at: u64,
    /// What is there before.
    pub old: Vec<u8>,
    /// What is there afterwards.
    pub new: Vec<u8>,
}

/// Which image a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switched {
    /// The old one.
    Not,
    /// The new one.
    Done,
    /// Part of the write was done, which no disk with whole sectors leaves behind. To be finished.
    Torn,
    /// Neither: somebody else has changed its header.
    Foreign,
}

impl Switch {
    /// Which image a file is that has these bytes at [`Switch::at`].
    #[must_use]
    pub fn state(&self, bytes: &[u8]) -> Switched {
        if bytes == self.new {
            Switched::Done
        } else if bytes == self.old {
            Switched::Not
        } else if bytes.len() == self.new.len()
            && bytes.iter().zip(self.old.iter().zip(&self.new)).all(|(is, (old, new))| is == old || is == new)
        {
            Switched::Torn
        } else {
            Switched::Foreign
        }
    }

    /// Lays the new bytes over what was read of the file at `offset`.
    pub fn lay_over(&self, offset: u64, bytes: &mut [u8]) {
        for (at, byte) in (self.at..).zip(&self.new) {
            let index = at.checked_sub(offset).and_then(|index| usize::try_from(index).ok());
            if let Some(place) = index.and_then(|index| bytes.get_mut(index)) {
                *place = *byte;
            }
        }
    }

    /// The switch from the kept image to tables at their new places.
    ///
    /// The number of L1 entries stays what it was (`l1_entries` is no less): whoever reads the header while
    /// it is being written then sees the old or the new L1 table, both whole, since its offset is one aligned
    /// word. The autoclear bits, which say of extensions that they are true, are cleared.
    pub(super) fn plan(kept: &Kept, l1_entries: u64, geometry: &Geometry) -> Self {
        let mut sector = kept.sector;
        let l1 = if l1_entries == 0 { 0 } else { geometry.l1 };
        let words = [
            (format::AT_L1_ENTRIES, 4, l1_entries),
            (format::AT_L1_OFFSET, 8, l1),
            (format::AT_REFCOUNT_TABLE_OFFSET, 8, geometry.refcount_table),
            (format::AT_REFCOUNT_TABLE_CLUSTERS, 4, geometry.refcount_table_clusters),
            (format::AT_AUTOCLEAR, 8, 0),
        ];
        for (at, width, value) in words {
            let value = value.to_be_bytes();
            if let (Some(place), Some(low)) = (sector.get_mut(at..at + width), value.get(8 - width..)) {
                place.copy_from_slice(low);
            }
        }
        let differ = |at: &usize| sector.get(*at) != kept.sector.get(*at);
        // From the first of the fields to the last that changes: the refcount table's, or the autoclear bits.
        let start = format::AT_L1_ENTRIES;
        let end = (format::AT_SNAPSHOT_COUNT..sector.len()).rev().find(differ);
        let end = end.map_or(format::AT_SNAPSHOT_COUNT, |last| last + 1);
        let cut = |bytes: &Sector| bytes.get(start..end).unwrap_or_default().to_vec();
        Self { at: start as u64, old: cut(&kept.sector), new: cut(&sector) }
    }
}
