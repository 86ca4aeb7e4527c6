//! One image's allocation as an iterator of maximal runs.

use crate::failure::Code;
use crate::qcow2::compressed::least_stored_bytes;
use crate::qcow2::error::{ImageError, Result};
use crate::qcow2::image::{Holes, Image, Window};
use crate::qcow2::map::{CompressedCluster, Extent, ExtentKind};
use crate::qcow2::tables::{EntryFormat, L1_ENTRY_BYTES, L1Entry, L2Entry, Subcluster, Subclusters, word};
use crate::units::{GuestOffset, HostOffset};

/// The iterator of [`Image::extents`].
///
/// Bounds: memory is two table windows. An L1 entry without a table is one step. An image whose entries
/// refer to more tables or data than its file can hold is `shared-cluster` before much of it is walked:
/// of clusters that lie within the file, each can be referred to but once.
#[derive(Debug)]
pub struct Extents {
    image: Image,
    format: EntryFormat,
    /// The first guest byte not yet looked up.
    at: u64,
    l1: Window,
    l2: Window,
    holes: Holes,
    /// The L2 table in use: the L1 index it belongs to, and where it lies.
    table: Option<(u64, Option<HostOffset>)>,
    held: Option<Extent>,
    failed: Option<ImageError>,
    /// Bytes of tables and of data within the file that were referred to.
    tables_seen: u64,
    data_seen: u64,
    /// The least that the compressed clusters take which were referred to, in bytes.
    streams_seen: u64,
}

impl Extents {
    pub(super) fn new(image: Image, from: GuestOffset, window_bytes: usize) -> Self {
        Self {
            format: image.header().entry_format(),
            image,
            at: from.0,
            l1: Window::new(window_bytes),
            l2: Window::new(window_bytes),
            holes: Holes::default(),
            table: None,
            held: None,
            failed: None,
            tables_seen: 0,
            data_seen: 0,
            streams_seen: 0,
        }
    }

    /// Goes on at `to`, as a new walk from there would, but keeps the windows: who steps over small gaps
    /// reads no table twice.
    pub fn seek(&mut self, to: GuestOffset) {
        self.at = to.0;
        self.held = None;
        self.failed = None;
        self.tables_seen = 0;
        self.data_seen = 0;
        self.streams_seen = 0;
    }

    /// What is at `self.at`, up to the end of that subcluster run, cluster or L2 table's range.
    fn piece(&mut self) -> Result<Extent> {
        let start = GuestOffset(self.at);
        // A power of two: no division for each entry.
        let per_table = self.format.bytes_per_table();
        let l1_index = self.at >> per_table.trailing_zeros();
        let Some(table) = self.table_of(l1_index)? else {
            let end = (l1_index + 1).saturating_mul(per_table);
            return Ok(self.clip(start, end - self.at, ExtentKind::Below));
        };
        let bits = self.format.cluster_bits;
        let index = (self.at & (per_table - 1)) >> bits.bits();
        let entry = self.entry(table, index)?;
        let within = bits.within(self.at);
        let rest = bits.bytes() - within;
        let (length, kind) = match entry {
            L2Entry::Unallocated => {
                let after = self.unallocated_after(table, index)?;
                (rest.saturating_add(after << bits.bits()), ExtentKind::Below)
            }
            L2Entry::Zero { .. } => (rest, ExtentKind::Zero),
            L2Entry::Data { host, .. } => (rest, ExtentKind::Data { host: host.plus(within) }),
            L2Entry::Extended { host, subclusters, .. } => self.subclusters(host, subclusters, within),
            L2Entry::Compressed { host, stored_bytes } => {
                let guest = GuestOffset(self.at - within);
                (rest, ExtentKind::Compressed(CompressedCluster { guest, host, stored_bytes }))
            }
        };
        let piece = self.clip(start, length, kind);
        self.account(&piece)?;
        Ok(piece)
    }

    /// Where the L2 table of an L1 entry lies, if it has one.
    fn table_of(&mut self, l1_index: u64) -> Result<Option<HostOffset>> {
        if let Some((index, table)) = self.table
            && index == l1_index
        {
            return Ok(table);
        }
        let header = self.image.header();
        let (l1_offset, l1_bytes) = (header.l1_offset, header.l1_bytes());
        let bytes =
            self.l1.from(&self.image, l1_offset, l1_bytes, l1_index.saturating_mul(L1_ENTRY_BYTES))?;
        // The header's check saw to it that the table covers the virtual size.
        let raw = word(bytes, 0).unwrap_or_default();
        let table = match L1Entry::decode(raw, self.format.cluster_bits) {
            Ok(L1Entry::Unallocated) => None,
            Ok(L1Entry::Table { host, .. }) => {
                if host.0 >= self.image.file_length() {
                    return Err(self.fail(
                        Code::Truncated,
                        &format!("the L2 table at {host} lies behind the file's end"),
                    ));
                }
                self.tables_seen = self.tables_seen.saturating_add(self.format.cluster_bits.bytes());
                self.within_file(self.tables_seen, "L2 tables")?;
                // A table of zeros is as good as none.
                let absent = self.holes.absent(&self.image, host, self.format.cluster_bits.bytes())?;
                (!absent).then_some(host)
            }
            Err(fault) => return Err(self.fail(Code::BadEntry, &format!("the L1 entry {raw:#018x} {fault}"))),
        };
        self.table = Some((l1_index, table));
        Ok(table)
    }

    fn entry(&mut self, table: HostOffset, index: u64) -> Result<L2Entry> {
        let bytes = self.entries(table, index)?;
        let (raw, bitmap) = (word(bytes, 0).unwrap_or_default(), word(bytes, 1).unwrap_or_default());
        let bitmap = if self.format.extended { bitmap } else { 0 };
        self.format.decode(raw, bitmap).map_err(|fault| {
            self.fail(
                Code::BadEntry,
                &format!("the L2 entry {raw:#018x} (subclusters {bitmap:#018x}) {fault}"),
            )
        })
    }

    /// What the window holds of a table, from an entry on.
    fn entries(&mut self, table: HostOffset, index: u64) -> Result<&[u8]> {
        let table_bytes = self.format.cluster_bits.bytes();
        self.l2.from(&self.image, table, table_bytes, index * self.format.entry_bytes())
    }

    /// How many entries behind one that is all zeros are so too, as far as the window goes: most of what a small
    /// increment's tables hold, stepped over without a look at each.
    fn unallocated_after(&mut self, table: HostOffset, index: u64) -> Result<u64> {
        let bytes = self.entries(table, index)?;
        Ok((leading_zero_words(bytes) * 8 / self.format.entry_bytes()).saturating_sub(1))
    }

    /// The run of like subclusters at `within` of their cluster.
    fn subclusters(
        &self,
        host: Option<HostOffset>,
        subclusters: Subclusters,
        within: u64,
    ) -> (u64, ExtentKind) {
        let size = self.format.subcluster_bytes();
        let index = u32::try_from(within / size).unwrap_or_default();
        let end = (u64::from(index) + u64::from(subclusters.run_from(index))) * size;
        let kind = match (subclusters.state(index), host) {
            (Subcluster::Allocated, Some(host)) => ExtentKind::Data { host: host.plus(within) },
            (Subcluster::Zero, _) => ExtentKind::Zero,
            // Allocated nowhere: the decoder has refused it.
            (Subcluster::Unallocated | Subcluster::Allocated, _) => ExtentKind::Below,
        };
        (end - within, kind)
    }

    fn clip(&self, start: GuestOffset, length: u64, kind: ExtentKind) -> Extent {
        let room = self.image.header().virtual_size.saturating_sub(start.0);
        Extent { start, length: length.min(room), kind }
    }

    /// Counts a piece of data within the file, and the least that a compressed cluster takes.
    fn account(&mut self, piece: &Extent) -> Result<()> {
        if let ExtentKind::Data { host } = piece.kind
            && host.0 < self.image.file_length()
        {
            self.data_seen = self.data_seen.saturating_add(piece.length);
            self.within_file(self.data_seen, "data clusters")?;
        }
        if let ExtentKind::Compressed(_) = piece.kind {
            let least = least_stored_bytes(self.image.header().compression, self.format.cluster_bits);
            self.streams_seen = self.streams_seen.saturating_add(least);
            self.within_file(self.streams_seen, "compressed clusters")?;
        }
        Ok(())
    }

    fn within_file(&self, seen: u64, what: &str) -> Result<()> {
        if seen > self.format.cluster_bits.round_up(self.image.file_length()) {
            let detail = format!("more {what} are referred to than the file holds: some are shared");
            return Err(self.fail(Code::SharedCluster, &detail));
        }
        Ok(())
    }

    fn fail(&self, code: Code, detail: &str) -> ImageError {
        self.image.bad(code, format!("{}: {detail}", GuestOffset(self.at)))
    }
}

/// How many words of 8 bytes at the beginning are all zeros.
fn leading_zero_words(bytes: &[u8]) -> u64 {
    let (words, _) = bytes.as_chunks::<8>();
    // Wide steps for the compiler to vectorise.
    let (steps, _) = words.as_chunks::<32>();
    let zero = |step: &&[[u8; 8]; 32]| step.as_flattened().iter().fold(0, |seen, byte| seen | byte) == 0;
    let stepped = steps.iter().take_while(zero).count() * 32;
    let rest = words.iter().skip(stepped).take_while(|word| **word == [0; 8]).count();
    (stepped + rest) as u64
}

/// Whether `next` goes on where `held` ends, in the guest and, for data, in the file.
fn continues(held: &Extent, next: &Extent) -> bool {
    match (held.kind, next.kind) {
        (ExtentKind::Data { host: from }, ExtentKind::Data { host: to }) => from.plus(held.length) == to,
        (ExtentKind::Zero, ExtentKind::Zero) | (ExtentKind::Below, ExtentKind::Below) => true,
        _ => false,
    }
}

impl Iterator for Extents {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        let size = self.image.header().virtual_size;
        while self.at < size && self.failed.is_none() {
            match self.piece() {
                Ok(piece) => {
                    self.at = piece.end().0;
                    match self.held {
                        Some(ref mut held) if continues(held, &piece) => held.length += piece.length,
                        Some(_) => return self.held.replace(piece).map(Ok),
                        None => self.held = Some(piece),
                    }
                }
                Err(error) => {
                    self.at = size;
                    self.failed = Some(error);
                }
            }
        }
        match self.held.take() {
            Some(held) => Some(Ok(held)),
            None => self.failed.take().map(Err),
        }
    }
}

impl std::iter::FusedIterator for Extents {}

#[cfg(test)]
mod tests {
    use super::leading_zero_words;

    #[test]
    fn zeros_are_counted_up_to_the_first_word_that_is_none() {
        for words in [0, 1, 31, 32, 33, 100] {
            let mut bytes = vec![0; words * 8];
            assert_eq!(leading_zero_words(&bytes), words as u64);
            for at in 0..words {
                bytes[at * 8 + at % 8] = 1;
                assert_eq!(leading_zero_words(&bytes), at as u64, "{words}");
                bytes[at * 8 + at % 8] = 0;
            }
        }
        assert_eq!(leading_zero_words(&[0; 7]), 0);
    }
}
