//! Entries of L1 and L2 tables: a number in, a value out, and back. Pure.
//!
//! A decoder refuses what the format forbids, even where QEMU reads over it (reserved bits, a COPIED flag
//! on a compressed cluster): no writer sets these, and whoever relies on them reads something else.

use crate::qcow2::format::{
    ENTRY_COMPRESSED, ENTRY_COPIED, ENTRY_OFFSET_MASK, ENTRY_ZERO, L1_RESERVED_MASK, L2_RESERVED_MASK,
    MAX_HOST_OFFSET, SUBCLUSTERS,
};
use crate::units::{ClusterBits, HostOffset, SECTOR_BYTES};

/// Bytes of an L1 entry.
pub const L1_ENTRY_BYTES: u64 = 8;

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryFault {
    /// A bit is set that must be clear.
    #[error("has reserved bits set")]
    Reserved,
    /// An offset is no multiple of the cluster size.
    #[error("points between clusters")]
    Misaligned,
    /// A compressed cluster's offset is 2^56 or more.
    #[error("points further than any file reaches")]
    OutOfRange,
    /// The zero flag in a version 2 image.
    #[error("has the zero flag, which version 2 does not know")]
    ZeroInVersion2,
    /// A subcluster is allocated and zero.
    #[error("has a subcluster that is both allocated and zero")]
    SubclusterBoth,
    /// A subcluster is allocated, but there is no host cluster.
    #[error("has an allocated subcluster but no host cluster")]
    SubclusterNowhere,
    /// A compressed cluster with subclusters.
    #[error("is compressed and has subclusters")]
    CompressedSubclusters,
    /// A compressed cluster with the COPIED flag.
    #[error("is compressed and has the COPIED flag")]
    CompressedCopied,
}

/// What an L1 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1Entry {
    /// No L2 table: all of its range is unallocated.
    Unallocated,
    /// An L2 table.
    Table {
        /// Where it lies, cluster-aligned.
        host: HostOffset,
        /// The COPIED flag: its refcount is exactly one.
        copied: bool,
    },
}

impl L1Entry {
    /// Reads an entry.
    pub fn decode(raw: u64, cluster_bits: ClusterBits) -> Result<Self, EntryFault> {
        if raw & L1_RESERVED_MASK != 0 {
            return Err(EntryFault::Reserved);
        }
        let host = raw & ENTRY_OFFSET_MASK;
        if cluster_bits.within(host) != 0 {
            return Err(EntryFault::Misaligned);
        }
        if host == 0 {
            return Ok(Self::Unallocated);
        }
        Ok(Self::Table { host: HostOffset(host), copied: raw & ENTRY_COPIED != 0 })
    }

    /// The entry as it is stored. A table's offset is taken as it is: aligned and below 2^56.
    #[must_use]
    pub fn encode(self) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Table { host, copied } => flagged(host, copied),
        }
    }
}

/// Which of a cluster's 32 subclusters hold data and which read as zeros.
///
/// Invariant: no subcluster is both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subclusters {
    allocated: u32,
    zero: u32,
}

/// One subcluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subcluster {
    /// See the backing file.
    Unallocated,
    /// Data at its place in the host cluster.
    Allocated,
    /// Zeros.
    Zero,
}

impl Subclusters {
    /// All 32 hold data.
    pub const ALLOCATED: Self = Self { allocated: u32::MAX, zero: 0 };
    /// All 32 read as zeros.
    pub const ZERO: Self = Self { allocated: 0, zero: u32::MAX };

    /// Bit `i` of each word stands for subcluster `i`; `None` if one is in both.
    #[must_use]
    pub fn new(allocated: u32, zero: u32) -> Option<Self> {
        (allocated & zero == 0).then_some(Self { allocated, zero })
    }

    /// The allocated ones, bit `i` for subcluster `i`.
    #[must_use]
    pub fn allocated(self) -> u32 {
        self.allocated
    }

    /// The zero ones, bit `i` for subcluster `i`.
    #[must_use]
    pub fn zero(self) -> u32 {
        self.zero
    }

    /// What subcluster `index` is; unallocated from 32 on.
    #[must_use]
    pub fn state(self, index: u32) -> Subcluster {
        if index >= SUBCLUSTERS {
            Subcluster::Unallocated
        } else if self.zero >> index & 1 == 1 {
            Subcluster::Zero
        } else if self.allocated >> index & 1 == 1 {
            Subcluster::Allocated
        } else {
            Subcluster::Unallocated
        }
    }

    /// How many subclusters from `index` on are the same as that one, itself included; 0 from 32 on.
    #[must_use]
    pub fn run_from(self, index: u32) -> u32 {
        let state = self.state(index);
        (index..SUBCLUSTERS).take_while(|&next| self.state(next) == state).fold(0, |count, _| count + 1)
    }

    /// The second word of an extended entry.
    #[must_use]
    pub fn encode(self) -> u64 {
        u64::from(self.zero) << 32 | u64::from(self.allocated)
    }

    fn decode(raw: u64) -> Result<Self, EntryFault> {
        let low = u32::try_from(raw & u64::from(u32::MAX)).unwrap_or_default();
        let high = u32::try_from(raw >> 32).unwrap_or_default();
        Self::new(low, high).ok_or(EntryFault::SubclusterBoth)
    }
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Nothing: see the backing file.
    Unallocated,
    /// A plain cluster (standard entries).
    Data {
        /// Where it lies, cluster-aligned.
        host: HostOffset,
        /// The COPIED flag.
        copied: bool,
    },
    /// Zeros (standard entries of version 3).
    Zero {
        /// The cluster that is kept allocated for it, if any.
        host: Option<HostOffset>,
        /// The COPIED flag.
        copied: bool,
    },
    /// An uncompressed extended entry that is not wholly empty.
    Extended {
        /// The host cluster; there is one if any subcluster is allocated.
        host: Option<HostOffset>,
        /// The COPIED flag.
        copied: bool,
        /// What each subcluster is.
        subclusters: Subclusters,
    },
    /// A compressed cluster.
    Compressed {
        /// Where its bytes begin; any byte below 2^56.
        host: HostOffset,
        /// How many bytes to read: up to the end of the last sector counted, so at least 1 and at most two
        /// clusters.
        stored_bytes: u64,
    },
}

impl L2Entry {
    /// The plain host cluster that the entry holds a reference to, and its COPIED flag.
    #[must_use]
    pub fn cluster(self) -> Option<(HostOffset, bool)> {
        match self {
            Self::Data { host, copied } => Some((host, copied)),
            Self::Zero { host, copied } | Self::Extended { host, copied, .. } => {
                host.map(|host| (host, copied))
            }
            Self::Unallocated | Self::Compressed { .. } => None,
        }
    }
}

/// How an image's L2 entries are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryFormat {
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// Entries have 16 bytes, the second 8 for subclusters.
    pub extended: bool,
    /// The image's version is 3: the zero flag exists.
    pub zero_flag: bool,
}

impl EntryFormat {
    /// Bytes of an L2 entry: 8 or 16.
    #[must_use]
    pub fn entry_bytes(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Entries of one L2 table, which fills one cluster.
    #[must_use]
    pub fn entries_per_table(self) -> u64 {
        self.cluster_bits.bytes() / self.entry_bytes()
    }

    /// Guest bytes behind one L2 table: at most 2^39.
    #[must_use]
    pub fn bytes_per_table(self) -> u64 {
        self.entries_per_table() * self.cluster_bits.bytes()
    }

    /// Bytes of a subcluster: a cluster's 32nd part, or the cluster with standard entries.
    #[must_use]
    pub fn subcluster_bytes(self) -> u64 {
        if self.extended {
            self.cluster_bits.bytes() / u64::from(SUBCLUSTERS)
        } else {
            self.cluster_bits.bytes()
        }
    }

    /// Reads an L2 entry; `bitmap` is its second word, not looked at in standard entries.
    pub fn decode(self, raw: u64, bitmap: u64) -> Result<L2Entry, EntryFault> {
        if raw & ENTRY_COMPRESSED != 0 {
            return self.decode_compressed(raw, bitmap);
        }
        if raw & L2_RESERVED_MASK != 0 {
            return Err(EntryFault::Reserved);
        }
        let offset = raw & ENTRY_OFFSET_MASK;
        if self.cluster_bits.within(offset) != 0 {
            return Err(EntryFault::Misaligned);
        }
        let host = (offset != 0).then_some(HostOffset(offset));
        let copied = raw & ENTRY_COPIED != 0;
        let zero = raw & ENTRY_ZERO != 0;
        if self.extended {
            if zero {
                return Err(EntryFault::Reserved);
            }
            let subclusters = Subclusters::decode(bitmap)?;
            return match host {
                None if subclusters.allocated() != 0 => Err(EntryFault::SubclusterNowhere),
                None if bitmap == 0 => Ok(L2Entry::Unallocated),
                _ => Ok(L2Entry::Extended { host, copied, subclusters }),
            };
        }
        match (zero, host) {
            (true, _) if !self.zero_flag => Err(EntryFault::ZeroInVersion2),
            (true, host) => Ok(L2Entry::Zero { host, copied }),
            (false, Some(host)) => Ok(L2Entry::Data { host, copied }),
            // Only an image with an external data file has data at offset 0, and those are refused.
            (false, None) => Ok(L2Entry::Unallocated),
        }
    }

    fn decode_compressed(self, raw: u64, bitmap: u64) -> Result<L2Entry, EntryFault> {
        if raw & ENTRY_COPIED != 0 {
            return Err(EntryFault::CompressedCopied);
        }
        if self.extended && bitmap != 0 {
            return Err(EntryFault::CompressedSubclusters);
        }
        let shift = self.sector_shift();
        let host = raw & ((1 << shift) - 1);
        if host >= MAX_HOST_OFFSET {
            return Err(EntryFault::OutOfRange);
        }
        let sectors = (raw & !ENTRY_COMPRESSED) >> shift;
        let stored_bytes = (sectors + 1) * SECTOR_BYTES - host % SECTOR_BYTES;
        Ok(L2Entry::Compressed { host: HostOffset(host), stored_bytes })
    }

    /// The two words of an entry; the second is 0 and not stored in standard entries.
    ///
    /// `None` if the format cannot say it: a kind that belongs to the other width of entries, a zero flag in
    /// version 2, an offset that is misaligned or 2^56 and more, an allocated subcluster without a cluster,
    /// a compressed cluster that is empty, longer than two clusters or too far out for its field.
    #[must_use]
    pub fn encode(self, entry: L2Entry) -> Option<(u64, u64)> {
        let words = match entry {
            L2Entry::Unallocated => (0, 0),
            L2Entry::Data { host, copied } if !self.extended && host.0 != 0 => (flagged(host, copied), 0),
            L2Entry::Zero { host, copied } if !self.extended && self.zero_flag => {
                (flagged(host.unwrap_or_default(), copied) | ENTRY_ZERO, 0)
            }
            L2Entry::Extended { host, copied, subclusters } if self.extended => {
                (flagged(host.unwrap_or_default(), copied), subclusters.encode())
            }
            L2Entry::Compressed { host, stored_bytes } => (self.encode_compressed(host, stored_bytes)?, 0),
            L2Entry::Data { .. } | L2Entry::Zero { .. } | L2Entry::Extended { .. } => return None,
        };
        // The decoder knows what is valid; an offset with foreign bits shows there.
        self.decode(words.0, words.1).ok().map(|_| words)
    }

    fn encode_compressed(self, host: HostOffset, stored_bytes: u64) -> Option<u64> {
        let shift = self.sector_shift();
        let sectors = (host.0 % SECTOR_BYTES).checked_add(stored_bytes)?.div_ceil(SECTOR_BYTES);
        let field = sectors.checked_sub(1).filter(|field| field >> (62 - shift) == 0)?;
        if stored_bytes == 0 || host.0 >= MAX_HOST_OFFSET.min(1 << shift) {
            return None;
        }
        Some(ENTRY_COMPRESSED | field << shift | host.0)
    }

    /// Where a compressed descriptor's count of sectors begins: the bits below are the offset.
    fn sector_shift(self) -> u32 {
        62 - (self.cluster_bits.bits() - 8)
    }
}

fn flagged(host: HostOffset, copied: bool) -> u64 {
    if copied { host.0 | ENTRY_COPIED } else { host.0 }
}

/// The big-endian word at `index` of a table's bytes; `None` past its end.
#[must_use]
pub fn word(table: &[u8], index: usize) -> Option<u64> {
    let start = index.checked_mul(8)?;
    table.get(start..)?.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{EntryFault, EntryFormat, L1Entry, L2Entry, Subcluster, Subclusters, word};
    use crate::units::{ClusterBits, HostOffset};

    fn format(bits: u32, extended: bool, zero_flag: bool) -> EntryFormat {
        EntryFormat { cluster_bits: ClusterBits::new(bits).unwrap(), extended, zero_flag }
    }

    #[test]
    fn l1_entries() {
        let bits = ClusterBits::DEFAULT;
        assert_eq!(L1Entry::decode(0, bits), Ok(L1Entry::Unallocated));
        let table = L1Entry::Table { host: HostOffset(0x30000), copied: true };
        assert_eq!(L1Entry::decode(0x8000_0000_0003_0000, bits), Ok(table));
        assert_eq!(table.encode(), 0x8000_0000_0003_0000);
        assert_eq!(L1Entry::decode(0x8000_0000_0003_0200, bits), Err(EntryFault::Misaligned));
        assert_eq!(L1Entry::decode(0x4000_0000_0003_0000, bits), Err(EntryFault::Reserved));
        assert_eq!(L1Entry::decode(1, bits), Err(EntryFault::Reserved));
    }

    #[test]
    fn standard_entries() {
        let v3 = format(16, false, true);
        let data = L2Entry::Data { host: HostOffset(0x50000), copied: true };
        assert_eq!(v3.decode(0x8000_0000_0005_0000, u64::MAX), Ok(data));
        assert_eq!(v3.decode(0, 0), Ok(L2Entry::Unallocated));
        assert_eq!(v3.decode(1, 0), Ok(L2Entry::Zero { host: None, copied: false }));
        let kept = L2Entry::Zero { host: Some(HostOffset(0x50000)), copied: true };
        assert_eq!(v3.decode(0x8000_0000_0005_0001, 0), Ok(kept));
        assert_eq!(kept.cluster(), Some((HostOffset(0x50000), true)));
        assert_eq!(v3.decode(2, 0), Err(EntryFault::Reserved));
        assert_eq!(v3.decode(0x0100_0000_0005_0000, 0), Err(EntryFault::Reserved));
        assert_eq!(v3.decode(0x5_0200, 0), Err(EntryFault::Misaligned));
        assert_eq!(format(16, false, false).decode(1, 0), Err(EntryFault::ZeroInVersion2));
        assert_eq!(v3.encode(L2Entry::Data { host: HostOffset(0x5_0200), copied: true }), None);
        assert_eq!(v3.encode(L2Entry::Data { host: HostOffset(0), copied: true }), None);
        assert_eq!(v3.encode(L2Entry::Data { host: HostOffset(1 << 56), copied: false }), None);
    }

    #[test]
    fn extended_entries() {
        let extended = format(16, true, true);
        assert_eq!((extended.entries_per_table(), extended.subcluster_bytes()), (4096, 2048));
        let subclusters = Subclusters::new(0b0011, 0b0100).unwrap();
        let entry = L2Entry::Extended { host: Some(HostOffset(0x50000)), copied: true, subclusters };
        assert_eq!(extended.decode(0x8000_0000_0005_0000, 0x4_0000_0003), Ok(entry));
        assert_eq!(extended.encode(entry), Some((0x8000_0000_0005_0000, 0x4_0000_0003)));
        assert_eq!(extended.decode(0x5_0000, 0x1_0000_0001), Err(EntryFault::SubclusterBoth));
        assert_eq!(extended.decode(0, 1), Err(EntryFault::SubclusterNowhere));
        assert_eq!(extended.decode(0x5_0001, 0), Err(EntryFault::Reserved));
        assert_eq!(extended.decode(1 << 62, 1), Err(EntryFault::CompressedSubclusters));
        assert_eq!(extended.decode(0, 0), Ok(L2Entry::Unallocated));
        let states: Vec<_> = (0..5).map(|index| subclusters.state(index)).collect();
        let (yes, zero, no) = (Subcluster::Allocated, Subcluster::Zero, Subcluster::Unallocated);
        assert_eq!(states, [yes, yes, zero, no, no]);
        let runs: Vec<_> = [0, 1, 2, 3, 31, 32].map(|index| subclusters.run_from(index)).into();
        assert_eq!(runs, [2, 1, 1, 29, 1, 0]);
    }

    #[test]
    fn compressed_descriptors() {
        // 64 KiB: the count begins at bit 54. Two sectors from byte 0x50123 on.
        let v2 = format(16, false, false);
        let entry = L2Entry::Compressed { host: HostOffset(0x50123), stored_bytes: 1024 - 0x123 };
        assert_eq!(v2.decode(1 << 62 | 1 << 54 | 0x50123, 0), Ok(entry));
        assert_eq!(v2.encode(entry), Some((1 << 62 | 1 << 54 | 0x50123, 0)));
        assert_eq!(v2.decode(1 << 63 | 1 << 62, 0), Err(EntryFault::CompressedCopied));
        let longest = 2 * 65_536;
        assert!(v2.encode(L2Entry::Compressed { host: HostOffset(512), stored_bytes: longest }).is_some());
        assert!(
            v2.encode(L2Entry::Compressed { host: HostOffset(512), stored_bytes: longest + 1 }).is_none()
        );
        assert!(v2.encode(L2Entry::Compressed { host: HostOffset(513), stored_bytes: longest }).is_none());
        assert!(v2.encode(L2Entry::Compressed { host: HostOffset(512), stored_bytes: 0 }).is_none());
        // 2 MiB clusters reach 2^49; 512-byte clusters have room for more than 2^56, which stays clear.
        let large = format(21, false, true);
        assert!(large.encode(L2Entry::Compressed { host: HostOffset(1 << 49), stored_bytes: 1 }).is_none());
        assert_eq!(format(9, false, true).decode(1 << 62 | 1 << 57, 0), Err(EntryFault::OutOfRange));
    }

    #[test]
    fn words_end_with_the_table() {
        let table = [0, 0, 0, 0, 0, 0, 0, 7, 1];
        assert_eq!(word(&table, 0), Some(7));
        assert_eq!(word(&table, 1), None);
        assert_eq!(word(&table, usize::MAX), None);
    }

    proptest! {
        #[test]
        fn what_decodes_encodes_back(
            raw in any::<u64>(),
            keep in any::<u64>(),
            bitmap in any::<u64>(),
            bits in 9_u32..=21,
            extended in any::<bool>(),
            zero_flag in any::<bool>(),
        ) {
            let format = format(bits, extended, zero_flag);
            // Random words are hardly ever aligned; masking keeps some of them valid.
            for raw in [raw, raw & keep, raw & !0x1f_fffe & !(0x3f << 56), raw & !0x1f_ffff & !(0xff << 56)] {
                for bitmap in [0, bitmap, bitmap & 0xffff_0000_0000_ffff] {
                    if let Ok(entry) = format.decode(raw, bitmap) {
                        let (word, second) = format.encode(entry).unwrap();
                        prop_assert_eq!(format.decode(word, second), Ok(entry));
                        if entry != L2Entry::Unallocated {
                            prop_assert_eq!(word, raw);
                            prop_assert_eq!(second, if extended { bitmap } else { 0 });
                        }
                    }
                }
                if let Ok(entry) = L1Entry::decode(raw, format.cluster_bits)
                    && entry != L1Entry::Unallocated
                {
                    prop_assert_eq!(entry.encode(), raw);
                }
            }
        }

        #[test]
        fn compressed_lengths_cover_what_was_stored(
            host in 0_u64..1 << 49,
            stored in 1_u64..=65_536,
            bits in 9_u32..=21,
        ) {
            let format = format(bits, false, true);
            let stored = stored.min(format.cluster_bits.bytes());
            let entry = L2Entry::Compressed { host: HostOffset(host), stored_bytes: stored };
            if host >= 1 << (70 - bits).min(56) {
                return Ok(());
            }
            let (word, _) = format.encode(entry).unwrap();
            match format.decode(word, 0) {
                Ok(L2Entry::Compressed { host: found, stored_bytes }) => {
                    prop_assert_eq!(found, HostOffset(host));
                    prop_assert!(stored_bytes >= stored && stored_bytes < stored + 512);
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
