//! Places compressed clusters in their area, one after the other on sector boundaries.
//!
//! A pure replay: fed the same pieces in the same order it gives the same places, so the counting pass and
//! the writing pass need not remember them.

use crate::units::{ClusterBits, SECTOR_BYTES};

/// The state of the area while it fills.
#[derive(Clone, Debug)]
pub struct Packing {
    bits: ClusterBits,
    /// How many compressed clusters may touch one host cluster: what a refcount of this width can say.
    limit: u64,
    /// Offset in the area of the first free sector.
    next: u64,
    /// Host cluster of the area that `next` lies in, and how many pieces touch it.
    open: (u64, u64),
}

/// One placed piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Offset in the area, in bytes.
    pub offset: u64,
    /// Sectors taken.
    pub sectors: u64,
}

impl Packing {
    pub fn new(bits: ClusterBits, refcount_max: u64) -> Self {
        Self { bits, limit: refcount_max, next: 0, open: (0, 0) }
    }

    /// Places `stored_bytes` (at least 1). `touch` is told each host cluster of the area that the piece
    /// touches.
    pub fn place(&mut self, stored_bytes: u64, mut touch: impl FnMut(u64)) -> Place {
        let sectors = stored_bytes.div_ceil(SECTOR_BYTES).max(1);
        let size = self.bits.bytes();
        if self.open.1 >= self.limit && self.bits.within(self.next) != 0 {
            self.next = self.bits.round_up(self.next);
        }
        let offset = self.next;
        let end = offset + sectors * SECTOR_BYTES;
        let (first, last) = (offset / size, (end - 1) / size);
        (first..=last).for_each(&mut touch);
        let already = if self.open.0 == last { self.open.1 } else { 0 };
        self.open = (last, already + 1);
        self.next = end;
        Place { offset, sectors }
    }

    /// How many host clusters the area has so far.
    pub fn clusters(&self) -> u64 {
        self.bits.clusters_in(self.next)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Packing;
    use crate::units::ClusterBits;

    proptest! {
        #[test]
        fn pieces_neither_overlap_nor_pass_the_refcount_limit(
            bits in 9u32..=16, limit in prop::sample::select(vec![1u64, 3, 15, 255, 65_535]),
            sizes in prop::collection::vec(1u64..70_000, 0..60),
        ) {
            let bits = ClusterBits::new(bits).unwrap();
            let mut packing = Packing::new(bits, limit);
            let mut counts = std::collections::BTreeMap::new();
            let mut end = 0;
            for stored in sizes {
                let stored = stored.min(2 * bits.bytes());
                let place = packing.place(stored, |cluster| *counts.entry(cluster).or_insert(0u64) += 1);
                prop_assert!(place.offset >= end);
                prop_assert!(place.sectors * 512 >= stored && place.sectors <= 1 << (bits.bits() - 8));
                end = place.offset + place.sectors * 512;
            }
            prop_assert!(counts.values().all(|count| (1..=limit).contains(count)));
            prop_assert_eq!(counts.len() as u64, packing.clusters());
        }
    }
}
