//! The free space of a store in memory: a number, less what was reserved.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use super::file::{CHUNK, Inode};

#[derive(Debug)]
pub(super) struct Room {
    /// Without reservations.
    pub(super) free: u64,
    reserved: BTreeMap<u64, Reservation>,
}

/// What was reserved for one file.
#[derive(Debug)]
struct Reservation {
    inode: Weak<Inode>,
    /// Chunks, first and end, without overlaps.
    ranges: BTreeMap<u64, u64>,
    /// What it costs: chunks that were there already cost nothing.
    bytes: u64,
}

impl Room {
    pub(super) fn new(free: u64) -> Self {
        Self { free, reserved: BTreeMap::new() }
    }

    /// What is left; the space of files without a name is free.
    pub(super) fn left(&mut self) -> u64 {
        self.reserved.retain(|_, reserved| reserved.inode.upgrade().is_some_and(|inode| inode.links() > 0));
        let taken: u64 = self.reserved.values().map(|reserved| reserved.bytes).sum();
        self.free.saturating_sub(taken)
    }

    /// Takes what chunks `first..end` of a file still need, or nothing if that is too much.
    pub(super) fn reserve(&mut self, inode: &Arc<Inode>, first: u64, end: u64) -> bool {
        let left = self.left();
        let number = inode.number();
        let new = || Reservation { inode: Arc::downgrade(inode), ranges: BTreeMap::new(), bytes: 0 };
        let gaps = self.reserved.get(&number).map_or(vec![(first, end)], |had| had.gaps(first, end));
        let chunks: u64 = gaps.iter().map(|&(first, end)| (end - first) - inode.chunks(first, end)).sum();
        let bytes = chunks.saturating_mul(CHUNK);
        if bytes > left {
            return false;
        }
        let reserved = self.reserved.entry(number).or_insert_with(new);
        reserved.ranges.extend(gaps);
        reserved.bytes += bytes;
        true
    }

    /// A power cut, after which nothing is reserved.
    pub(super) fn crash(&mut self) {
        self.reserved.clear();
    }
}

impl Reservation {
    /// What of `first..end` is not reserved yet.
    fn gaps(&self, first: u64, end: u64) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        let mut at = first;
        for (&start, &stop) in self.ranges.range(..end) {
            if start > at {
                gaps.push((at, start));
            }
            at = at.max(stop);
        }
        if at < end {
            gaps.push((at, end));
        }
        gaps
    }
}
