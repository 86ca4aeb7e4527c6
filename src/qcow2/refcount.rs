//! Entries of refcount blocks, 1 to 64 bits wide. Pure.
//!
//! Entries below a byte fill it from its low bits up; wider ones are big-endian.

use crate::qcow2::format::{DEFAULT_REFCOUNT_ORDER, MAX_REFCOUNT_ORDER};
use crate::units::ClusterBits;

/// The width of an image's refcounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountWidth(u32);

impl RefcountWidth {
    /// 16 bits: what version 2 has, and what QEMU writes unless told otherwise.
    pub const DEFAULT: Self = Self(DEFAULT_REFCOUNT_ORDER);

    /// Takes the logarithm of the width in bits; `None` above 6.
    #[must_use]
    pub fn new(order: u32) -> Option<Self> {
        (order <= MAX_REFCOUNT_ORDER).then_some(Self(order))
    }

    /// The width in bits: 1, 2, 4, ... 64.
    #[must_use]
    pub fn bits(self) -> u32 {
        1 << self.0
    }

    /// The largest count.
    #[must_use]
    pub fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// How many clusters one refcount block (one cluster) counts: 64 to 2^24.
    #[must_use]
    pub fn entries_per_block(self, cluster_bits: ClusterBits) -> u64 {
        self.entries_in(cluster_bits.bytes())
    }

    /// How many entries fit into `bytes`, below 2^60, of a block.
    #[must_use]
    pub fn entries_in(self, bytes: u64) -> u64 {
        bytes.saturating_mul(8) >> self.0
    }

    /// Entry `index` of a block; `None` past its end.
    #[must_use]
    pub fn get(self, block: &[u8], index: usize) -> Option<u64> {
        let bits = self.bits() as usize;
        let at_bit = index.checked_mul(bits)?;
        if bits < 8 {
            let byte = u64::from(*block.get(at_bit / 8)?);
            return Some(byte >> (at_bit % 8) & self.max());
        }
        let bytes = block.get(at_bit / 8..)?.get(..bits / 8)?;
        Some(bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    /// Sets entry `index` of a block; `None`, and nothing done, past its end or if `value` is too large.
    #[must_use]
    pub fn set(self, block: &mut [u8], index: usize, value: u64) -> Option<()> {
        if value > self.max() {
            return None;
        }
        let bits = self.bits() as usize;
        let at_bit = index.checked_mul(bits)?;
        if bits < 8 {
            let byte = block.get_mut(at_bit / 8)?;
            let shift = at_bit % 8;
            let [.., value] = value.to_be_bytes();
            let [.., mask] = self.max().to_be_bytes();
            *byte = *byte & !(mask << shift) | value << shift;
            return Some(());
        }
        let bytes = block.get_mut(at_bit / 8..)?.get_mut(..bits / 8)?;
        let value = value.to_be_bytes();
        bytes.copy_from_slice(value.get(8 - bits / 8..)?);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::RefcountWidth;
    use crate::units::ClusterBits;

    fn width(order: u32) -> RefcountWidth {
        RefcountWidth::new(order).unwrap()
    }

    #[test]
    fn widths() {
        assert!(RefcountWidth::new(7).is_none());
        assert_eq!([0, 1, 4, 6].map(|order| width(order).max()), [1, 3, 65_535, u64::MAX]);
        assert_eq!(width(4).entries_per_block(ClusterBits::DEFAULT), 32_768);
        assert_eq!(width(0).entries_per_block(ClusterBits::DEFAULT), 524_288);
        assert_eq!(width(6).entries_per_block(ClusterBits::new(9).unwrap()), 64);
    }

    #[test]
    fn narrow_entries_begin_at_the_low_bits() {
        let block = [0b1001_0110, 0b0000_0001];
        let ones: Vec<_> = (0..9).map(|index| width(0).get(&block, index).unwrap()).collect();
        assert_eq!(ones, [0, 1, 1, 0, 1, 0, 0, 1, 1]);
        let twos: Vec<_> = (0..5).map(|index| width(1).get(&block, index).unwrap()).collect();
        assert_eq!(twos, [2, 1, 1, 2, 1]);
        assert_eq!(width(2).get(&block, 1), Some(9));
        assert_eq!(width(0).get(&block, 16), None);
    }

    #[test]
    fn wide_entries_are_big_endian() {
        let block = [0, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(width(3).get(&block, 8), Some(8));
        assert_eq!(width(4).get(&block, 1), Some(0x0203));
        assert_eq!(width(5).get(&block, 1), Some(0x0405_0607));
        assert_eq!(width(6).get(&block, 0), Some(0x0001_0203_0405_0607));
        assert_eq!(width(4).get(&block, 4), None);
        assert_eq!(width(6).get(&block, usize::MAX), None);
    }

    proptest! {
        #[test]
        fn setting_changes_one_entry(
            order in 0_u32..=6,
            mut block in proptest::collection::vec(any::<u8>(), 64),
            at in any::<u16>(),
            value in any::<u64>(),
        ) {
            let width = width(order);
            let entries = usize::try_from(width.entries_in(64)).unwrap();
            let at = usize::from(at) % entries;
            let value = value & width.max();
            let before: Vec<_> = (0..entries).map(|index| width.get(&block, index).unwrap()).collect();
            prop_assert_eq!(width.set(&mut block, at, value), Some(()));
            for (index, old) in before.into_iter().enumerate() {
                prop_assert_eq!(width.get(&block, index), Some(if index == at { value } else { old }));
            }
            prop_assert_eq!(width.set(&mut block, entries, 0), None);
            if order < 6 {
                prop_assert_eq!(width.set(&mut block, at, width.max() + 1), None);
            }
        }
    }
}
