//! The refcounts that an image stores, by cluster.

use std::collections::HashMap;
use std::ops::Range;

use crate::qcow2::error::Result;
use crate::qcow2::format::{MAX_HOST_OFFSET, REFCOUNT_OFFSET_MASK, REFCOUNT_RESERVED_MASK};
use crate::qcow2::image::{Holes, Image};
use crate::qcow2::refcount::RefcountWidth;
use crate::qcow2::tables::word;
use crate::units::{ClusterBits, HostOffset};

/// How much of a block is read at once, in bytes; a smaller block is read whole.
const PAGE_BYTES: u64 = 4096;

/// How many pages are kept: 4 MiB.
const PAGES: usize = 1024;

/// The refcount table, and the pages of its blocks that were used last.
#[derive(Debug)]
pub(in crate::qcow2) struct Stored<'a> {
    image: &'a Image,
    bits: ClusterBits,
    width: RefcountWidth,
    table: Vec<u8>,
    pages: HashMap<u64, Vec<u8>>,
    holes: Holes,
}

impl<'a> Stored<'a> {
    /// Reads the refcount table, at most 8 MiB; what lies behind the file's end is zero.
    pub(in crate::qcow2) fn read(image: &'a Image) -> Result<Self> {
        let header = image.header();
        let mut table = vec![0; usize::try_from(header.refcount_table_bytes()).unwrap_or_default()];
        image.read_data(header.refcount_table_offset, &mut table)?;
        Ok(Self {
            image,
            bits: header.cluster_bits,
            // The header's parser has refused wider ones.
            width: RefcountWidth::new(header.refcount_order).unwrap_or(RefcountWidth::DEFAULT),
            table,
            pages: HashMap::new(),
            holes: Holes::default(),
        })
    }

    /// Entries of the refcount table.
    pub(super) fn blocks(&self) -> u64 {
        self.table.len() as u64 / 8
    }

    /// Where block `index` lies, or an entry that says nothing valid.
    pub(super) fn block(&self, index: u64) -> std::result::Result<Option<HostOffset>, u64> {
        let raw = usize::try_from(index).ok().and_then(|index| word(&self.table, index)).unwrap_or_default();
        let host = raw & REFCOUNT_OFFSET_MASK;
        if raw & REFCOUNT_RESERVED_MASK != 0 || self.bits.within(host) != 0 || host >= MAX_HOST_OFFSET {
            return Err(raw);
        }
        Ok((host != 0).then_some(HostOffset(host)))
    }

    /// The stored count of a cluster; 0 where there is no (valid) block.
    pub(in crate::qcow2) fn get(&mut self, cluster: u64) -> Result<u64> {
        let width = self.width;
        let slot = usize::try_from(cluster % self.entries_per_page()).unwrap_or(usize::MAX);
        Ok(self.page(cluster)?.and_then(|page| width.get(page, slot)).unwrap_or_default())
    }

    /// The next clusters from `from` on, below `end`, of which some may have a count above 0.
    pub(super) fn next_counted(&mut self, from: u64, end: u64) -> Result<Option<Range<u64>>> {
        let per_page = self.entries_per_page();
        let per_block = self.width.entries_per_block(self.bits);
        let mut at = from;
        while at < end && at / per_block < self.blocks() {
            if !matches!(self.block(at / per_block), Ok(Some(_))) {
                at = (at / per_block + 1).saturating_mul(per_block);
                continue;
            }
            let block_end = (at / per_block + 1).saturating_mul(per_block);
            let page_end = (at / per_page + 1).saturating_mul(per_page);
            if self.page(at)?.is_some_and(|page| page.iter().any(|byte| *byte != 0)) {
                return Ok(Some(at..page_end.min(end)));
            }
            at = if self.is_hole(at / per_block) { block_end } else { page_end };
        }
        Ok(None)
    }

    /// Whether a block is known to be a hole as a whole.
    fn is_hole(&self, index: u64) -> bool {
        let block = self.block(index).ok().flatten();
        block.is_some_and(|host| self.holes.is_known(&(host.0..host.0.saturating_add(self.bits.bytes()))))
    }

    fn page_bytes(&self) -> u64 {
        PAGE_BYTES.min(self.bits.bytes())
    }

    fn entries_per_page(&self) -> u64 {
        self.width.entries_in(self.page_bytes())
    }

    /// The page that a cluster's count is in; `None` if all of it is 0 for want of one.
    fn page(&mut self, cluster: u64) -> Result<Option<&[u8]>> {
        let per_block = self.width.entries_per_block(self.bits);
        let Ok(Some(host)) = self.block(cluster / per_block) else { return Ok(None) };
        let key = cluster / self.entries_per_page();
        if !self.pages.contains_key(&key) {
            if self.pages.len() >= PAGES {
                self.pages.clear();
            }
            let offset = cluster % per_block / self.entries_per_page() * self.page_bytes();
            if self.holes.absent(self.image, host.plus(offset), self.page_bytes())? {
                return Ok(None);
            }
            let mut page = vec![0; usize::try_from(self.page_bytes()).unwrap_or_default()];
            self.image.read_data(host.plus(offset), &mut page)?;
            self.pages.insert(key, page);
        }
        Ok(self.pages.get(&key).map(Vec::as_slice))
    }
}
