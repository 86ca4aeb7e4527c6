//! The canonical image of a view: a pure function of its size, of which of its blocks hold something, and of the
//! form wanted; never of how a chain keeps it. So the same view has the same bytes wherever the image is made, its
//! length is known before the first byte, and any range of it can be told without the rest.
//!
//! Layout version 1 ([`VERSION`]); whatever changes a byte of it gets another number. A *unit* is 64 KiB of the view,
//! aligned, or a cluster where that is larger. A unit that holds nothing but zeros is not stored; one that holds
//! something is stored whole, up to the view's end. qcow2: version 3, refcounts of 16 bits, no backing file, no
//! extensions but the names of features, compression type zlib (nothing is compressed). One behind the other, without
//! gaps, each in whole clusters: header, L1 table, refcount table, refcount blocks, those L2 tables that have an entry,
//! units in the order of the guest; behind the view's end the last cluster is zeros. Raw: the view itself.
//!
//! A *delta* ([`Canonical::over`]) is laid out the same way over a backing file: units that hold something else than what
//! lies below are stored whole, those that hold zeros where something lies below have entries that say so, all others
//! have none. It is a function of both sets, the size, the cluster size and the backing name.
//!
//! Memory: a bit a unit stored, in chunks (see [`hostset`](super::hostset)): 2.4 MiB a TiB stored, at most 36 MiB for
//! 16 TiB of which every 256th MiB holds something; besides a bit an L2 table.

use crate::failure::Code;
use crate::qcow2::error::Result;
use crate::qcow2::format;
use crate::qcow2::header::CompressionType;
use crate::qcow2::layout::geometry::{Amounts, Geometry};
use crate::qcow2::layout::hostset::{Collecting, HostSet};
use crate::qcow2::layout::{Backing, ImageOptions, bad, header};
use crate::qcow2::refcount::RefcountWidth;
use crate::units::{BLOCK_BYTES, ClusterBits};

/// The version of the layout.
pub const VERSION: u32 = 1;

/// The form of an image that stands alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// qcow2, version 3, with clusters of that size.
    Qcow2(ClusterBits),
    /// The bytes of the view.
    Raw,
}

impl Form {
    /// The word on the command line.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Qcow2(_) => "qcow2",
            Self::Raw => "raw",
        }
    }

    /// The unit in bytes, of which all or nothing is stored.
    #[must_use]
    pub fn unit_bytes(self) -> u64 {
        match self {
            Self::Qcow2(bits) => bits.bytes().max(BLOCK_BYTES),
            Self::Raw => BLOCK_BYTES,
        }
    }

    /// The options of such a qcow2 image; of a raw one those of one with clusters of 64 KiB.
    #[must_use]
    pub fn options(self, virtual_size: u64, compression: CompressionType) -> ImageOptions {
        let cluster_bits = match self {
            Self::Qcow2(bits) => bits,
            Self::Raw => ClusterBits::DEFAULT,
        };
        ImageOptions {
            version: 3,
            cluster_bits,
            refcount_order: format::DEFAULT_REFCOUNT_ORDER,
            extended_l2: false,
            compression,
            lazy_refcounts: false,
            virtual_size,
            backing: None,
            opaque: false,
            stub: None,
        }
    }
}

/// Which units of a view hold something, while it is found out.
#[derive(Debug)]
pub struct Filled {
    virtual_size: u64,
    unit: u64,
    /// The first unit that was not told of yet.
    next: u64,
    set: Collecting,
}

impl Filled {
    /// Nothing yet.
    #[must_use]
    pub fn new(virtual_size: u64, form: Form) -> Self {
        Self { virtual_size, unit: form.unit_bytes(), next: 0, set: Collecting::default() }
    }

    /// Bytes `[start, end)` of the view hold something. Ranges come in ascending order.
    pub fn add(&mut self, start: u64, end: u64) {
        let first = (start / self.unit).max(self.next);
        let behind = end.min(self.virtual_size).div_ceil(self.unit);
        if first < behind {
            // Each unit comes once, by `next`.
            let _ = self.set.insert(first, behind - first);
            self.next = behind;
        }
    }

    /// Ends collecting.
    #[must_use]
    pub fn finish(self) -> HostSet {
        self.set.finish()
    }
}

/// A planned image.
#[derive(Debug)]
pub struct Canonical {
    virtual_size: u64,
    form: Form,
    units: HostSet,
    /// Units that are zeros where something lies below; disjoint from `units`.
    zeros: HostSet,
    tables: Option<Tables>,
    length: u64,
}

/// What a qcow2 image has before its data.
#[derive(Debug)]
struct Tables {
    bits: ClusterBits,
    geometry: Geometry,
    l1_entries: u64,
    /// The L2 tables that there are, by their place in the L1 table.
    present: HostSet,
    head: Vec<u8>,
}

/// What a range of an image is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Tables: [`Canonical::metadata`] has them.
    Metadata,
    /// Zeros.
    Zeros,
    /// Bytes of the view; zeros behind its end.
    Data {
        /// The first of them.
        guest: u64,
    },
}

impl Canonical {
    /// Plans the image of a view of which `units` hold something.
    ///
    /// Fails if the format's limits do not allow it (`huge-table`).
    pub fn new(virtual_size: u64, form: Form, units: HostSet) -> Result<Self> {
        let Form::Qcow2(bits) = form else {
            let zeros = HostSet::default();
            return Ok(Self { virtual_size, form, units, zeros, tables: None, length: virtual_size });
        };
        Self::tables(virtual_size, bits, units, HostSet::default(), None)
    }

    /// Plans the delta over `backing` that holds `units`, and zeros in the units `zeros`, which are others.
    ///
    /// Fails if the format's limits do not allow it (`huge-table`), or the name has no room in the header's cluster.
    pub fn over(
        virtual_size: u64,
        bits: ClusterBits,
        units: HostSet,
        zeros: HostSet,
        backing: Backing,
    ) -> Result<Self> {
        Self::tables(virtual_size, bits, units, zeros, Some(backing))
    }

    fn tables(
        virtual_size: u64,
        bits: ClusterBits,
        units: HostSet,
        zeros: HostSet,
        backing: Option<Backing>,
    ) -> Result<Self> {
        let form = Form::Qcow2(bits);
        let unit = form.unit_bytes();
        let options = ImageOptions { backing, ..form.options(virtual_size, CompressionType::Zlib) };
        let covered = bits.bytes() * (bits.bytes() / 8);
        let l1_entries = virtual_size.div_ceil(covered);
        if l1_entries * 8 > format::MAX_L1_BYTES {
            return Err(super::geometry::too_large("its L1 table would pass 32 MiB"));
        }
        let present = tables_of(virtual_size, [&units, &zeros], unit, covered);
        let stored = stored_bytes(virtual_size, &units, unit, bits);
        let amounts = Amounts {
            l1_entries,
            l2_tables: present.len(),
            moved: Vec::new(),
            composed: stored / bits.bytes(),
            compressed: 0,
        };
        let width = RefcountWidth::new(format::DEFAULT_REFCOUNT_ORDER)
            .ok_or_else(|| bad(Code::BadHeader, "there are no such refcounts".to_owned()))?;
        let geometry = Geometry::new(&amounts, bits.bytes(), bits, width)?;
        let head = header::encode(&options, 3, l1_entries, &geometry)?;
        let length = geometry.end;
        let tables = Some(Tables { bits, geometry, l1_entries, present, head });
        Ok(Self { virtual_size, form, units, zeros, tables, length })
    }

    /// The length of the file in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The form.
    #[must_use]
    pub fn form(&self) -> Form {
        self.form
    }

    /// The size of the view in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// Which units hold something.
    #[must_use]
    pub fn units(&self) -> &HostSet {
        &self.units
    }

    /// Which units are zeros where something lies below.
    #[must_use]
    pub fn zeros(&self) -> &HostSet {
        &self.zeros
    }

    /// How many L2 tables it has.
    #[must_use]
    pub fn table_count(&self) -> u64 {
        self.tables.as_ref().map_or(0, |tables| tables.present.len())
    }

    /// Bytes of the file that are stored: all but the gaps of a raw image.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        match &self.tables {
            Some(_) => self.length,
            None => self.units.len().saturating_mul(BLOCK_BYTES).min(self.length),
        }
    }

    /// Bytes of header and tables, which come first.
    #[must_use]
    pub fn metadata_bytes(&self) -> u64 {
        self.tables.as_ref().map_or(0, |tables| tables.geometry.composed)
    }

    /// What the image has at `offset`, and for how many bytes (above 0): neighbouring units that follow each other
    /// in the view are one part. `None` at and behind its end.
    #[must_use]
    pub fn part(&self, offset: u64) -> Option<(Part, u64)> {
        if offset >= self.length {
            return None;
        }
        let unit = self.form.unit_bytes();
        let clip = |part, length: u64| Some((part, length.min(self.length - offset)));
        let metadata = self.metadata_bytes();
        if offset < metadata {
            return clip(Part::Metadata, metadata - offset);
        }
        if self.tables.is_none() {
            let at = offset / unit;
            return match self.units.run_from(at) {
                0 => clip(Part::Zeros, self.units.gap_from(at).saturating_mul(unit) - offset % unit),
                count => clip(Part::Data { guest: offset }, count * unit - offset % unit),
            };
        }
        let (rank, within) = ((offset - metadata) / unit, (offset - metadata) % unit);
        let found = self.units.select(rank)?;
        let length = self.units.run_from(found) * unit - within;
        clip(Part::Data { guest: found * unit + within }, length)
    }

    /// Where in the file the unit of the view at `guest` is; `None` if it is not stored.
    #[must_use]
    pub fn place(&self, guest: u64) -> Option<u64> {
        let unit = self.form.unit_bytes();
        let rank = self.units.rank(guest / unit)?;
        Some(match self.tables {
            None => guest,
            Some(_) => self.metadata_bytes() + rank * unit + guest % unit,
        })
    }

    /// Bytes of header and tables from `offset` on; `buffer` ends before the data begins. Nothing is read.
    pub fn metadata(&self, offset: u64, buffer: &mut [u8]) {
        let Some(tables) = &self.tables else { return };
        let size = tables.bits.bytes();
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset + done as u64;
            let within = at % size;
            let length = usize::try_from(size - within).unwrap_or(usize::MAX).min(rest.len());
            let (part, _) = rest.split_at_mut(length);
            part.fill(0);
            self.cluster(tables, at - within, within, part);
            done += length;
        }
    }

    /// A part of one metadata cluster, from `within` on, over zeros.
    fn cluster(&self, tables: &Tables, cluster: u64, within: u64, part: &mut [u8]) {
        let (geometry, size) = (&tables.geometry, tables.bits.bytes());
        if cluster == 0 {
            let from = usize::try_from(within).unwrap_or(usize::MAX);
            part.iter_mut()
                .zip(tables.head.get(from..).unwrap_or_default())
                .for_each(|(to, from)| *to = *from);
        } else if cluster < geometry.refcount_table {
            let first = cluster - geometry.l1;
            words(part, within, |index| {
                let at = first / 8 + index;
                let rank = tables.present.rank(at).filter(|_| at < tables.l1_entries)?;
                Some((geometry.l2_tables + rank * size) | format::ENTRY_COPIED)
            });
        } else if cluster < geometry.refcount_blocks {
            let first = (cluster - geometry.refcount_table) / 8;
            words(part, within, |index| {
                let block = first + index;
                (block < geometry.refcount_block_count).then(|| geometry.refcount_blocks + block * size)
            });
        } else if cluster < geometry.l2_tables {
            // Entries of two bytes; every cluster of the file is used once.
            let first = (cluster - geometry.refcount_blocks) / 2;
            let total = geometry.end / size;
            for (index, byte) in part.iter_mut().enumerate() {
                let at = within + index as u64;
                *byte = u8::from(at % 2 == 1 && first + at / 2 < total);
            }
        } else {
            let Some(table) = tables.present.select((cluster - geometry.l2_tables) / size) else { return };
            self.l2_table(tables, table, within, part);
        }
    }

    fn l2_table(&self, tables: &Tables, table: u64, within: u64, part: &mut [u8]) {
        let (size, unit) = (tables.bits.bytes(), self.form.unit_bytes());
        let first = table * (size / 8);
        let clusters = self.virtual_size.div_ceil(size);
        // The rank is looked up once a unit, and neighbours follow each other.
        let mut known: Option<(u64, u64)> = None;
        words(part, within, |index| {
            let guest = (first + index) * size;
            let found = guest / unit;
            let seen = known.filter(|(seen, _)| *seen == found).map(|(_, rank)| rank);
            let Some(rank) = seen.or_else(|| self.units.rank(found)) else {
                let zero = first + index < clusters && self.zeros.contains(found);
                return zero.then_some(format::ENTRY_ZERO);
            };
            known = Some((found, rank));
            let host = tables.geometry.composed + rank * unit + guest % unit;
            (first + index < clusters).then_some(host | format::ENTRY_COPIED)
        });
    }
}

/// The L2 tables in which units of two disjoint sets have entries.
fn tables_of(virtual_size: u64, [units, zeros]: [&HostSet; 2], unit: u64, covered: u64) -> HostSet {
    let mut set = Collecting::default();
    let mut next = 0;
    let (mut units, mut zeros) = (units.runs().peekable(), zeros.runs().peekable());
    let ascending = std::iter::from_fn(|| match (units.peek(), zeros.peek()) {
        (Some(unit), Some(zero)) if zero.0 < unit.0 => zeros.next(),
        (Some(_), _) => units.next(),
        (None, _) => zeros.next(),
    });
    for (first, count) in ascending {
        let from = (first * unit / covered).max(next);
        let behind = ((first + count) * unit).min(virtual_size).div_ceil(covered);
        if from < behind {
            // Each comes once, by `next`.
            let _ = set.insert(from, behind - from);
            next = behind;
        }
    }
    set.finish()
}

/// The bytes that units take in a qcow2 file: whole units, but the last one of the view up to its last cluster.
fn stored_bytes(virtual_size: u64, units: &HostSet, unit: u64, bits: ClusterBits) -> u64 {
    let whole = units.len() * unit;
    let last = virtual_size / unit;
    if units.contains(last) { whole - unit + bits.round_up(virtual_size % unit) } else { whole }
}

/// Fills big-endian words of 8 bytes of a table of which `part` begins `within` bytes into its cluster; `word` gives
/// each by its number in the cluster.
fn words(part: &mut [u8], within: u64, mut word: impl FnMut(u64) -> Option<u64>) {
    let mut done = 0;
    while let Some(rest) = part.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let at = within + done as u64;
        let skip = usize::try_from(at % 8).unwrap_or_default();
        let length = (8 - skip).min(rest.len());
        if let Some(value) = word(at / 8) {
            let bytes = value.to_be_bytes();
            rest.iter_mut().zip(bytes.iter().skip(skip)).for_each(|(to, from)| *to = *from);
        }
        done += length;
    }
}

#[cfg(test)]
#[path = "canonical_tests.rs"]
mod tests;
