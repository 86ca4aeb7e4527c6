//! Units of the disk formats as types, so that a guest address cannot be taken for a host address.
//!
//! Arithmetic on numbers that came from a file is checked where it happens; these types only keep the
//! address spaces apart and carry the one conversion that every layer needs.

use std::fmt;

/// The size of a sector in bytes: the unit of a compressed cluster's stored length and of a disk's size.
pub const SECTOR_BYTES: u64 = 512;

/// The unit of digests: a block is 64 KiB of a view, aligned, whatever the cluster size (design, "block").
pub const BLOCK_BYTES: u64 = BLOCK_LENGTH as u64;
/// The same as an index.
pub const BLOCK_LENGTH: usize = 64 * 1024;

/// A byte offset in a guest disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// A byte offset in an image file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

impl GuestOffset {
    /// The offset `bytes` further on, saturating: guest ranges are bounded by a virtual size below 2^63.
    #[must_use]
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }
}

impl HostOffset {
    /// The offset `bytes` further on, saturating: a decoder has refused offsets of 2^56 and more before.
    #[must_use]
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }
}

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest offset {:#x}", self.0)
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host offset {:#x}", self.0)
    }
}

/// The base-two logarithm of a cluster size, 9 (512 bytes) to 21 (2 MiB): QEMU's limits
/// (`MIN_CLUSTER_BITS`, `MAX_CLUSTER_BITS` in its `block/qcow2.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterBits(u8);

impl ClusterBits {
    /// The default of `qemu-img create`: 64 KiB.
    pub const DEFAULT: Self = Self(16);

    /// Takes the logarithm found in a header; `None` outside 9 to 21.
    #[must_use]
    pub fn new(bits: u32) -> Option<Self> {
        match u8::try_from(bits) {
            Ok(bits @ 9..=21) => Some(Self(bits)),
            _ => None,
        }
    }

    /// The logarithm itself.
    #[must_use]
    pub fn bits(self) -> u32 {
        u32::from(self.0)
    }

    /// The cluster size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        1 << self.0
    }

    /// `offset` rounded down to a cluster's start.
    #[must_use]
    pub fn round_down(self, offset: u64) -> u64 {
        offset & !(self.bytes() - 1)
    }

    /// `offset` rounded up to a cluster's start, saturating at the largest one.
    #[must_use]
    pub fn round_up(self, offset: u64) -> u64 {
        self.round_down(offset.saturating_add(self.bytes() - 1))
    }

    /// How many clusters `length` bytes fill, the last one in part.
    #[must_use]
    pub fn clusters_in(self, length: u64) -> u64 {
        length.div_ceil(self.bytes())
    }

    /// The offset inside its cluster.
    #[must_use]
    pub fn within(self, offset: u64) -> u64 {
        offset & (self.bytes() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::ClusterBits;

    #[test]
    fn cluster_bits_are_qemus_range() {
        assert_eq!(ClusterBits::new(8), None);
        assert_eq!(ClusterBits::new(22), None);
        assert_eq!(ClusterBits::new(16), Some(ClusterBits::DEFAULT));
        assert_eq!(ClusterBits::new(9).map(ClusterBits::bytes), Some(512));
        assert_eq!(ClusterBits::new(21).map(ClusterBits::bytes), Some(2 << 20));
    }

    #[test]
    fn rounding() {
        let bits = ClusterBits::DEFAULT;
        assert_eq!(bits.round_down(65_537), 65_536);
        assert_eq!(bits.round_up(65_537), 131_072);
        assert_eq!(bits.round_up(65_536), 65_536);
        assert_eq!(bits.clusters_in(0), 0);
        assert_eq!(bits.clusters_in(1), 1);
        assert_eq!(bits.within(65_537), 1);
        assert_eq!(bits.round_up(u64::MAX), u64::MAX - 65_535);
    }
}
