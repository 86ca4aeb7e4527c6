//! Where each part of the new file lies: header, L1, refcounts, L2 tables, data, one after the other; in a file
//! that is kept, behind its old end instead of behind the header.

use crate::failure::Code;
use crate::qcow2::error::{ImageError, Result};
use crate::qcow2::format;
use crate::qcow2::refcount::RefcountWidth;
use crate::units::ClusterBits;

/// How much of everything there is to place.
#[derive(Clone, Debug, Default)]
pub struct Amounts {
    pub l1_entries: u64,
    pub l2_tables: u64,
    /// Whole clusters moved from each source, in clusters of the target.
    pub moved: Vec<u64>,
    pub composed: u64,
    /// Host clusters of the area of compressed clusters.
    pub compressed: u64,
}

/// The parts, as host offsets in bytes; each begins where the one before ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Where the parts begin: behind the header, or behind all of a file that is kept.
    pub l1: u64,
    pub refcount_table: u64,
    pub refcount_table_clusters: u64,
    pub refcount_blocks: u64,
    pub refcount_block_count: u64,
    pub l2_tables: u64,
    pub moved: Vec<u64>,
    pub composed: u64,
    pub compressed: u64,
    pub end: u64,
}

impl Geometry {
    /// Places the parts from `base` on, a cluster boundary, not 0. The refcounts count themselves, so their number is a fixed point: it is found by
    /// growing from 0, which ends since each step adds less than the one before.
    pub fn new(amounts: &Amounts, base: u64, bits: ClusterBits, refcounts: RefcountWidth) -> Result<Self> {
        let size = bits.bytes();
        // None for an empty disk: a cluster that no entry refers to would be a leak.
        let l1_clusters = bits.clusters_in(amounts.l1_entries.saturating_mul(8));
        let data = amounts
            .moved
            .iter()
            .try_fold(amounts.composed, |sum, moved| sum.checked_add(*moved))
            .and_then(|sum| sum.checked_add(amounts.compressed));
        let fixed = data
            .and_then(|data| data.checked_add(base / size)?.checked_add(l1_clusters))
            .and_then(|sum| sum.checked_add(amounts.l2_tables))
            .filter(|total| *total < 1 << (55 - bits.bits()))
            .ok_or_else(|| too_large("the image would pass 2^55 bytes"))?;
        let per_block = refcounts.entries_per_block(bits);
        let (mut blocks, mut table) = (0, 0);
        loop {
            let total = fixed + blocks + table;
            let needed_blocks = total.div_ceil(per_block);
            let needed_table = bits.clusters_in(needed_blocks * 8);
            if (needed_blocks, needed_table) == (blocks, table) {
                break;
            }
            (blocks, table) = (needed_blocks.max(blocks), needed_table.max(table));
        }
        if table * size > format::MAX_REFCOUNT_TABLE_BYTES {
            return Err(too_large("its refcount table would pass 8 MiB"));
        }
        let l1 = base;
        let refcount_table = l1 + l1_clusters * size;
        let refcount_blocks = refcount_table + table * size;
        let l2_tables = refcount_blocks + blocks * size;
        let mut next = l2_tables + amounts.l2_tables * size;
        let mut moved = Vec::with_capacity(amounts.moved.len());
        for clusters in &amounts.moved {
            moved.push(next);
            next += clusters * size;
        }
        let composed = next;
        let compressed = composed + amounts.composed * size;
        let end = compressed + amounts.compressed * size;
        Ok(Self {
            l1,
            refcount_table,
            refcount_table_clusters: table,
            refcount_blocks,
            refcount_block_count: blocks,
            l2_tables,
            moved,
            composed,
            compressed,
            end,
        })
    }
}

/// An image that cannot be laid out within the format's limits.
pub fn too_large(why: &str) -> ImageError {
    ImageError::Bad { image: "the new image".to_owned(), code: Code::HugeTable, detail: why.to_owned() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Amounts, Geometry, RefcountWidth};
    use crate::units::ClusterBits;

    proptest! {
        #[test]
        fn refcounts_cover_themselves_and_everything_else(
            bits in 9u32..=21, order in 0u32..=6, l1_entries in 0u64..5000, l2_tables in 0u64..5000,
            moved in prop::collection::vec(0u64..100_000, 0..4), composed in 0u64..1000, compressed in 0u64..1000,
            base in prop_oneof![Just(1u64), 1u64..1_000_000],
        ) {
            let bits = ClusterBits::new(bits).unwrap();
            let amounts = Amounts { l1_entries, l2_tables, moved, composed, compressed };
            let width = RefcountWidth::new(order).unwrap();
            let Ok(geometry) = Geometry::new(&amounts, base * bits.bytes(), bits, width) else { return Ok(()) };
            let total = geometry.end / bits.bytes();
            let per_block = (bits.bytes() * 8) >> order;
            prop_assert!(geometry.refcount_block_count * per_block >= total);
            prop_assert!(geometry.refcount_table_clusters * bits.bytes() >= geometry.refcount_block_count * 8);
            prop_assert_eq!(
                total,
                base + bits.clusters_in(l1_entries * 8) + geometry.refcount_table_clusters
                    + geometry.refcount_block_count + l2_tables
                    + amounts.moved.iter().sum::<u64>() + composed + compressed
            );
            // No block too many: one less would not cover the file without it.
            prop_assert!((geometry.refcount_block_count - 1) * per_block < total);
        }
    }
}
