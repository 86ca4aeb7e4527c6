//! Which blocks of a member differ from what it is to stand on, and where they may be had here.
//!
//! Both sides are leaf tables: nothing but what differs gets a place in the new file, so a member whose view equals that
//! of its parent has none, however the other side keeps it.
//!
//! Memory: some bits a block that differs; 56 bytes a block for at most [`WINDOW_BLOCKS`] of them at a time: 56 MiB. The index
//! is of what is wanted, and tables are gone through: so it does not matter how much is here.

use std::ops::Range;

use crate::digest::view::{Leaves as _, Seen, view_digest, walk};
use crate::digest::{block_count, zero_leaf};
use crate::ids::Digest;
use crate::qcow2::layout::hostset::{Collecting, HostSet};
use crate::store::manifest::leaves::{LeafError, LeafFile};
use crate::units::{BLOCK_BYTES, ClusterBits};

/// Of how many blocks that are wanted it is looked up at once whether they are here already.
const WINDOW_BLOCKS: usize = 1 << 20;

/// How many leaves are read in one go.
const STEP_BLOCKS: u64 = 4096;

type Result<T> = std::result::Result<T, LeafError>;

/// What a new member holds.
#[derive(Debug)]
pub struct Need {
    /// Units with data, and such that are zeros where something lies below.
    pub units: HostSet,
    pub zeros: HostSet,
    /// Blocks that differ from what lies below, and are not zeros.
    pub wanted: HostSet,
    /// Blocks that are as below, in units of which others differ.
    pub filled: HostSet,
}

impl Need {
    /// The blocks that are wanted, in windows.
    pub fn windows(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let ranks = (0..self.wanted.len()).step_by(WINDOW_BLOCKS);
        ranks.filter_map(|rank| {
            let end = self.wanted.select(rank.saturating_add(WINDOW_BLOCKS as u64));
            Some(self.wanted.select(rank)?..end.unwrap_or(u64::MAX))
        })
    }

    /// The blocks of a window.
    pub fn blocks(&self, window: &Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let Range { start, end } = *window;
        let runs = self.wanted.runs().map(move |(first, count)| first.max(start)..(first + count).min(end));
        runs.flatten()
    }
}

/// Where a block may be had without asking: by the order in which they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Here {
    /// That block of the view of a member below, counted from the base.
    Below(u32, u64),
    /// That block of the view of another member of the account, by its number.
    Other(u32, u64),
    /// That block of the new member itself.
    Itself(u64),
}

/// A block that is here: its number, what it hashes to, and where it is.
pub type Found = (u64, Digest, Here);

/// Which blocks of a window are looked for, by what they hash to, and where they were found.
#[derive(Debug)]
pub struct Index(Vec<Entry>);

#[derive(Debug)]
struct Entry {
    leaf: Digest,
    block: u64,
    here: Option<Here>,
}

impl Index {
    fn new(mut entries: Vec<Entry>) -> Self {
        entries.sort_unstable_by_key(|entry| (entry.leaf, entry.block));
        Self(entries)
    }

    /// Whether there is nothing left to be found.
    pub fn is_complete(&self) -> bool {
        self.0.iter().all(|entry| entry.here.is_some())
    }

    /// Goes through a leaf table; `place` says what a block of its member is.
    pub fn look_through(&mut self, table: &mut LeafFile, place: impl Fn(u64) -> Here) -> Result<()> {
        table.rewind();
        while let Some(run) = table.next_run()? {
            for block in (run.first..run.end()).filter(|_| !run.zero) {
                self.note(table.leaf(block)?, place(block));
            }
        }
        Ok(())
    }

    fn note(&mut self, leaf: Digest, here: Here) {
        let from = self.0.partition_point(|entry| entry.leaf < leaf);
        for entry in self.0.iter_mut().skip(from).take_while(|entry| entry.leaf == leaf) {
            entry.here.get_or_insert(here);
        }
    }

    /// What was found, in the order in which it is best read. A block that is wanted several times is taken once.
    pub fn finish(mut self) -> Vec<Found> {
        for same in self.0.chunk_by_mut(|one, other| one.leaf == other.leaf) {
            if let Some((Entry { block, here: None, .. }, rest)) = same.split_first_mut() {
                for entry in rest {
                    entry.here = Some(Here::Itself(*block));
                }
            }
        }
        let found = self.0.into_iter().filter_map(|entry| Some((entry.block, entry.leaf, entry.here?)));
        let mut found: Vec<Found> = found.collect();
        found.sort_unstable_by_key(|(block, _, here)| (*here, *block));
        found
    }
}

/// The leaf tables of a line, base first, and that of the member on it.
pub struct Tables<'a> {
    pub own: &'a mut LeafFile,
    pub below: &'a mut [LeafFile],
}

impl Tables<'_> {
    /// The digest of the member's view.
    pub fn digest(&mut self) -> Result<Digest> {
        view_digest(&mut self.layers())
    }

    /// Newest first.
    fn layers(&mut self) -> Vec<&mut LeafFile> {
        std::iter::once(&mut *self.own).chain(self.below.iter_mut().rev()).collect()
    }

    /// The leaves of neighbouring blocks of the member's view.
    pub fn leaves(&mut self, first: u64, count: u64) -> Result<Vec<Digest>> {
        let mut leaves = Vec::with_capacity(usize::try_from(count).unwrap_or_default());
        walk(&mut self.layers(), first, first.saturating_add(count), |_, seen| {
            match seen {
                Seen::Leaf(leaf) => leaves.push(leaf),
                Seen::Zeros(count) => {
                    let count = usize::try_from(count).unwrap_or_default();
                    leaves.extend(std::iter::repeat_n(zero_leaf(), count));
                }
            }
            Ok(())
        })?;
        Ok(leaves)
    }

    /// What the member holds in clusters of that size. With `alone` it stands on nothing.
    pub fn need(&mut self, bits: ClusterBits, alone: bool) -> Result<Need> {
        let (wanted, changed) = if alone { self.all()? } else { self.differing()? };
        let unit_blocks = (bits.bytes() / BLOCK_BYTES).max(1);
        let blocks = block_count(self.own.virtual_size());
        let (mut units, mut zeros) = (Collecting::default(), Collecting::default());
        let mut filled = Collecting::default();
        let mut next = 0;
        let changed = changed.finish();
        let wanted = wanted.finish();
        for (first, count) in changed.runs().filter(|_| unit_blocks == 1) {
            for block in first..first + count {
                let set = if wanted.contains(block) { &mut units } else { &mut zeros };
                let _ = set.insert(block, 1);
            }
        }
        for (first, count) in changed.runs().filter(|_| unit_blocks > 1) {
            let mut unit = (first / unit_blocks).max(next);
            next = (first + count).div_ceil(unit_blocks);
            while unit < next {
                let from = unit * unit_blocks;
                let to = blocks.min(from + unit_blocks);
                let held = self.leaves(from, to - from)?;
                if held.iter().all(|leaf| *leaf == zero_leaf()) {
                    let _ = zeros.insert(unit, 1);
                } else {
                    let _ = units.insert(unit, 1);
                    for (block, _) in (from..to).zip(&held).filter(|(_, leaf)| **leaf != zero_leaf()) {
                        if !wanted.contains(block) {
                            let _ = filled.insert(block, 1);
                        }
                    }
                }
                unit += 1;
            }
        }
        Ok(Need { units: units.finish(), zeros: zeros.finish(), wanted, filled: filled.finish() })
    }

    /// All blocks that are not zeros: as those wanted, and as those that differ.
    fn all(&mut self) -> Result<(Collecting, Collecting)> {
        let (mut wanted, mut changed) = (Collecting::default(), Collecting::default());
        let blocks = block_count(self.own.virtual_size());
        walk(&mut self.layers(), 0, blocks, |block, seen| {
            if let Seen::Leaf(leaf) = seen
                && leaf != zero_leaf()
            {
                let _ = wanted.insert(block, 1);
                let _ = changed.insert(block, 1);
            }
            Ok(())
        })?;
        Ok((wanted, changed))
    }

    /// Blocks that differ from the view below: such that are not zeros, and all.
    fn differing(&mut self) -> Result<(Collecting, Collecting)> {
        let (mut wanted, mut changed) = (Collecting::default(), Collecting::default());
        let own = &mut *self.own;
        let mut below: Vec<&mut LeafFile> = self.below.iter_mut().rev().collect();
        own.rewind();
        while let Some(run) = own.next_run()? {
            let mut differs = |block: u64, is: Digest, was: Digest| {
                if is != was {
                    let _ = changed.insert(block, 1);
                    if is != zero_leaf() {
                        let _ = wanted.insert(block, 1);
                    }
                }
            };
            walk(&mut below, run.first, run.end(), |block, seen| {
                match (run.zero, seen) {
                    (true, Seen::Zeros(_)) => {}
                    (true, Seen::Leaf(was)) => differs(block, zero_leaf(), was),
                    (false, Seen::Leaf(was)) => differs(block, own.leaf(block)?, was),
                    (false, Seen::Zeros(count)) => {
                        for block in block..block + count {
                            differs(block, own.leaf(block)?, zero_leaf());
                        }
                    }
                }
                Ok(())
            })?;
        }
        Ok((wanted, changed))
    }

    /// An index of a window's blocks that are not there yet; of those that lie below, where, unless that is elsewhere.
    pub fn index(
        &mut self,
        need: &Need,
        window: &Range<u64>,
        there: &HostSet,
        elsewhere: bool,
    ) -> Result<Index> {
        let mut entries: Vec<Entry> = Vec::new();
        for (first, count) in need.wanted.runs() {
            let end = (first + count).min(window.end);
            let mut at = first.max(window.start);
            while at < end {
                let step = STEP_BLOCKS.min(end - at);
                let leaves = self.leaves(at, step)?;
                let missing = (at..).zip(&leaves).filter(|(block, _)| !there.contains(*block));
                entries.extend(missing.map(|(block, leaf)| Entry { leaf: *leaf, block, here: None }));
                at += step;
            }
        }
        let mut index = Index::new(entries);
        let looked = !elsewhere && !index.is_complete();
        let tables = self.below.iter_mut().filter(|_| looked);
        for (layer, table) in (0..).zip(tables) {
            index.look_through(table, |block| Here::Below(layer, block))?;
        }
        Ok(index)
    }

    /// The leaves that a file of the member decides, run by run: as its own table would have them.
    pub fn decided(
        &mut self,
        first: u64,
        count: u64,
        mut give: impl FnMut(u64, Seen) -> Result<()>,
    ) -> Result<()> {
        walk(&mut self.layers(), first, first + count, &mut give)
    }
}

#[cfg(test)]
mod tests {
    use super::{Entry, Here, Index};
    use crate::ids::Digest;

    #[test]
    fn what_is_found_is_read_in_order_and_taken_once() {
        let entry = |leaf: u8, block| Entry { leaf: Digest([leaf; 32]), block, here: None };
        let mut index =
            Index::new(vec![entry(1, 9), entry(2, 3), entry(1, 4), entry(3, 5), entry(3, 6), entry(4, 7)]);
        assert!(!index.is_complete());
        index.note(Digest([2; 32]), Here::Below(1, 70));
        index.note(Digest([2; 32]), Here::Other(0, 1));
        index.note(Digest([5; 32]), Here::Below(0, 0));
        index.note(Digest([1; 32]), Here::Other(0, 8));
        let found: Vec<(u64, Here)> =
            index.finish().into_iter().map(|(block, _, here)| (block, here)).collect();
        let same = Here::Other(0, 8);
        assert_eq!(found, [(3, Here::Below(1, 70)), (4, same), (9, same), (6, Here::Itself(5))]);
    }
}
