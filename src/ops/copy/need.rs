//! Which blocks of a member differ from what it is to stand on, and where they may be had here.
//!
//! Both sides are leaf tables: nothing but what differs gets a place in the new file, so a member whose view equals that
//! of its parent has none, however the other side keeps it.
//!
//! Memory: some bits a block that differs; 48 bytes a block for at most [`MOST_INDEXED`] of them.

use std::collections::BTreeMap;

use crate::digest::view::{Leaves as _, Seen, view_digest, walk};
use crate::digest::{block_count, zero_leaf};
use crate::ids::Digest;
use crate::qcow2::layout::hostset::{Collecting, HostSet};
use crate::store::manifest::leaves::{LeafError, LeafFile};
use crate::units::{BLOCK_BYTES, ClusterBits};

/// Of how many blocks it is looked up whether they are here already; of the rest of a very large member it is not.
const MOST_INDEXED: usize = 2 << 20;

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

/// Where a block may be had without asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Here {
    /// That block of the view of a member below, counted from the base.
    Below(usize, u64),
    /// That block of the new member itself.
    Itself(u64),
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

    /// Where blocks that are wanted and not there yet may be had here: by their leaves in the tables below, or a second
    /// time in the member itself.
    pub fn here(&mut self, wanted: &HostSet, there: &HostSet) -> Result<BTreeMap<u64, Here>> {
        let mut index: Vec<(u128, u64)> = Vec::new();
        for (first, count) in wanted.runs() {
            let end = first + count;
            let mut at = first;
            while at < end && index.len() < MOST_INDEXED {
                let step = STEP_BLOCKS.min(end - at);
                let leaves = self.leaves(at, step)?;
                let missing = (at..).zip(&leaves).filter(|(block, _)| !there.contains(*block));
                index.extend(missing.map(|(block, leaf)| (key(leaf), block)));
                at += step;
            }
        }
        index.sort_unstable();
        let mut found = BTreeMap::new();
        for (layer, table) in self.below.iter_mut().enumerate().filter(|_| !index.is_empty()) {
            table.rewind();
            while let Some(run) = table.next_run()? {
                if run.zero {
                    continue;
                }
                for block in run.first..run.end() {
                    let wanted = key(&table.leaf(block)?);
                    let from = index.partition_point(|(key, _)| *key < wanted);
                    let same = index.iter().skip(from).take_while(|(key, _)| *key == wanted);
                    for (_, wanted) in same {
                        found.entry(*wanted).or_insert(Here::Below(layer, block));
                    }
                }
            }
        }
        for pair in index.chunk_by(|one, other| one.0 == other.0) {
            if let Some(((_, first), rest)) = pair.split_first()
                && !found.contains_key(first)
            {
                found.extend(rest.iter().map(|(_, block)| (*block, Here::Itself(*first))));
            }
        }
        Ok(found)
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

/// Enough of a leaf to look it up by: what is found is hashed before it is used.
fn key(leaf: &Digest) -> u128 {
    let mut bytes = [0; 16];
    bytes.iter_mut().zip(leaf.0).for_each(|(to, from)| *to = from);
    u128::from_be_bytes(bytes)
}
