//! The refcounts that an image stores, by cluster.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::qcow2::error::Result;
use crate::qcow2::format::{MAX_HOST_OFFSET, REFCOUNT_OFFSET_MASK, REFCOUNT_RESERVED_MASK};
use crate::qcow2::image::{Holes, Image};
use crate::qcow2::refcount::RefcountWidth;
use crate::qcow2::tables::word;
use crate::units::{ClusterBits, HostOffset};

/// How much of a block is read at once, in bytes; a smaller block is read whole.
const PAGE_BYTES: u64 = 4096;
/// The same where all blocks are kept, so that none is read twice: on a mount each read waits for the server.
const LARGE_PAGE_BYTES: u64 = 64 << 10;

/// How much of the blocks is kept, in bytes.
const KEPT_BYTES: u64 = 4 << 20;

/// The refcount table, and the pages of its blocks that were used last.
#[derive(Debug)]
pub(in crate::qcow2) struct Stored<'a> {
    image: &'a Image,
    bits: ClusterBits,
    width: RefcountWidth,
    table: Vec<u8>,
    /// How many entries a page and a block have: powers of two.
    per_page: u64,
    per_block: u64,
    page_bytes: u64,
    pages: HashMap<u64, Arc<[u8]>>,
    /// The page that was used last: mostly the next one is the same.
    last: Option<(u64, Arc<[u8]>)>,
    holes: Holes,
}

impl<'a> Stored<'a> {
    /// Reads the refcount table, at most 8 MiB; what lies behind the file's end is zero.
    pub(in crate::qcow2) fn read(image: &'a Image) -> Result<Self> {
        let header = image.header();
        let mut table = vec![0; usize::try_from(header.refcount_table_bytes()).unwrap_or_default()];
        image.read_data(header.refcount_table_offset, &mut table)?;
        // The header's parser has refused wider ones.
        let width = RefcountWidth::new(header.refcount_order).unwrap_or(RefcountWidth::DEFAULT);
        let bits = header.cluster_bits;
        let blocks = table.as_chunks::<8>().0.iter().filter(|entry| **entry != [0; 8]).count() as u64;
        let all_kept = blocks.saturating_mul(bits.bytes()) <= KEPT_BYTES;
        let page_bytes = if all_kept { LARGE_PAGE_BYTES } else { PAGE_BYTES }.min(bits.bytes());
        Ok(Self {
            image,
            bits,
            width,
            table,
            per_page: width.entries_in(page_bytes),
            per_block: width.entries_per_block(bits),
            page_bytes,
            last: None,
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
        let slot = usize::try_from(cluster % self.per_page).unwrap_or(usize::MAX);
        Ok(self.page(cluster)?.and_then(|page| width.get(page, slot)).unwrap_or_default())
    }

    /// The next clusters from `from` on, below `end`, of which some may have a count above 0.
    pub(super) fn next_counted(&mut self, from: u64, end: u64) -> Result<Option<Range<u64>>> {
        let Self { per_page, per_block, .. } = *self;
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

    /// The page that a cluster's count is in; `None` if all of it is 0 for want of one.
    fn page(&mut self, cluster: u64) -> Result<Option<&[u8]>> {
        let key = cluster / self.per_page;
        if self.last.as_ref().is_none_or(|(last, _)| *last != key) {
            let Some(page) = self.other_page(key)? else { return Ok(None) };
            self.last = Some((key, page));
        }
        Ok(self.last.as_ref().map(|(_, page)| &**page))
    }

    /// A page of that number.
    fn other_page(&mut self, key: u64) -> Result<Option<Arc<[u8]>>> {
        if let Some(page) = self.pages.get(&key) {
            return Ok(Some(page.clone()));
        }
        let cluster = key.saturating_mul(self.per_page);
        let Ok(Some(host)) = self.block(cluster / self.per_block) else { return Ok(None) };
        let offset = cluster % self.per_block / self.per_page * self.page_bytes;
        if self.holes.absent(self.image, host.plus(offset), self.page_bytes)? {
            return Ok(None);
        }
        let mut page = vec![0; usize::try_from(self.page_bytes).unwrap_or_default()];
        self.image.read_data(host.plus(offset), &mut page)?;
        if self.pages.len() as u64 * self.page_bytes >= KEPT_BYTES {
            self.pages.clear();
        }
        let page: Arc<[u8]> = page.into();
        self.pages.insert(key, page.clone());
        Ok(Some(page))
    }
}
