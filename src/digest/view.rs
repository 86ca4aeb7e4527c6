//! The leaves of a view, from the leaf tables of a chain's members.
//!
//! To find block `i` of a view: go down from its newest member; at a member whose view ends before the block it is
//! zeros; if the member's table tells of it, that is it; below the lowest member it is zeros.

use crate::digest::{TreeBuilder, block_count};
use crate::ids::Digest;

/// What a table says from a block on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// The first block for which it says something else, or might.
    pub end: u64,
    /// What it says.
    pub says: Says,
}

/// What a table says of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    /// Nothing: see below.
    Nothing,
    /// Zeros.
    Zeros,
    /// Its leaf is stored.
    Leaf,
}

/// One member's table, read upwards.
pub trait Leaves {
    /// What reading it fails with.
    type Error;

    /// The virtual size of its member in bytes.
    fn virtual_size(&self) -> u64;

    /// What it says from `block` on. Blocks asked for never go down, within one walk.
    fn stretch(&mut self, block: u64) -> Result<Stretch, Self::Error>;

    /// The leaf of a block for which [`Leaves::stretch`] has just said that there is one.
    fn leaf(&mut self, block: u64) -> Result<Digest, Self::Error>;
}

impl<L: Leaves> Leaves for &mut L {
    type Error = L::Error;

    fn virtual_size(&self) -> u64 {
        (**self).virtual_size()
    }

    fn stretch(&mut self, block: u64) -> Result<Stretch, Self::Error> {
        (**self).stretch(block)
    }

    fn leaf(&mut self, block: u64) -> Result<Digest, Self::Error> {
        (**self).leaf(block)
    }
}

/// Neighbouring blocks of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// So many blocks of zeros.
    Zeros(u64),
    /// One block, with its leaf.
    Leaf(Digest),
}

/// Gives the blocks `[from, to)` of the view of `layers` (newest first), in order; `to` is at most the number of
/// blocks of the newest one's view. Time: a step for each layer at each boundary; zeros cost nothing.
pub fn walk<L: Leaves>(
    layers: &mut [L],
    from: u64,
    to: u64,
    mut give: impl FnMut(u64, Seen) -> Result<(), L::Error>,
) -> Result<(), L::Error> {
    let mut block = from;
    while block < to {
        let (stretch, layer) = look(layers, block, to)?;
        match (stretch.says, layer) {
            (Says::Leaf, Some(layer)) => {
                for at in block..stretch.end {
                    if let Some(table) = layers.get_mut(layer) {
                        give(at, Seen::Leaf(table.leaf(at)?))?;
                    }
                }
            }
            _ => give(block, Seen::Zeros(stretch.end - block))?,
        }
        block = stretch.end;
    }
    Ok(())
}

/// Which of the layers (newest first) decides a block of their view, until where at most, and what it says. Zeros if
/// none does.
pub fn look<L: Leaves>(layers: &mut [L], block: u64, to: u64) -> Result<(Stretch, Option<usize>), L::Error> {
    let mut end = to;
    for (index, table) in layers.iter_mut().enumerate() {
        if block >= block_count(table.virtual_size()) {
            return Ok((Stretch { end, says: Says::Zeros }, None));
        }
        // Behind its end the next look finds zeros.
        end = end.min(block_count(table.virtual_size()));
        let stretch = table.stretch(block)?;
        end = end.min(stretch.end).max(block + 1);
        if stretch.says != Says::Nothing {
            return Ok((Stretch { end, says: stretch.says }, Some(index)));
        }
    }
    Ok((Stretch { end, says: Says::Zeros }, None))
}

/// The digest of the view of `layers` (newest first); of an empty view without any.
pub fn view_digest<L: Leaves>(layers: &mut [L]) -> Result<Digest, L::Error> {
    let size = layers.first().map_or(0, Leaves::virtual_size);
    let mut tree = TreeBuilder::new();
    walk(layers, 0, block_count(size), |_, seen| {
        match seen {
            Seen::Zeros(count) => tree.push_zero_blocks(count),
            Seen::Leaf(leaf) => tree.push_leaf(leaf),
        }
        Ok(())
    })?;
    Ok(tree.finish(size))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::{Leaves, Says, Stretch, view_digest};
    use crate::digest::{TreeBuilder, block_count, leaf, zero_leaf};
    use crate::ids::Digest;

    /// A table as a map; `None` is zeros.
    struct Table {
        size: u64,
        blocks: BTreeMap<u64, Option<Digest>>,
    }

    impl Leaves for Table {
        type Error = Infallible;

        fn virtual_size(&self) -> u64 {
            self.size
        }

        fn stretch(&mut self, block: u64) -> Result<Stretch, Infallible> {
            Ok(match self.blocks.range(block..).next() {
                Some((at, None)) if *at == block => Stretch { end: block + 1, says: Says::Zeros },
                Some((at, Some(_))) if *at == block => Stretch { end: block + 1, says: Says::Leaf },
                Some((at, _)) => Stretch { end: *at, says: Says::Nothing },
                None => Stretch { end: u64::MAX, says: Says::Nothing },
            })
        }

        fn leaf(&mut self, block: u64) -> Result<Digest, Infallible> {
            Ok(self.blocks[&block].unwrap())
        }
    }

    proptest! {
        #[test]
        fn equals_the_rule_block_by_block(
            layers in prop::collection::vec(
                (0_u64..12_000_000, prop::collection::btree_map(0_u64..180, prop::option::weighted(0.7, any::<u8>()), 0..60)), 1..5)
        ) {
            let mut tables: Vec<Table> = layers
                .into_iter()
                .map(|(size, blocks)| Table {
                    size,
                    blocks: blocks
                        .into_iter()
                        .filter(|(block, _)| *block < block_count(size))
                        .map(|(block, value)| (block, value.map(|value| leaf(&[value, 1]))))
                        .collect(),
                })
                .collect();
            let size = tables[0].size;
            let mut tree = TreeBuilder::new();
            for block in 0..block_count(size) {
                let mut found = zero_leaf();
                for table in &tables {
                    if block >= block_count(table.size) {
                        break;
                    }
                    if let Some(seen) = table.blocks.get(&block) {
                        found = seen.unwrap_or(zero_leaf());
                        break;
                    }
                }
                tree.push_leaf(found);
            }
            prop_assert_eq!(view_digest(&mut tables).unwrap(), tree.finish(size));
        }
    }

    #[test]
    fn no_layers_are_an_empty_view() {
        assert_eq!(view_digest::<Table>(&mut []).unwrap(), TreeBuilder::new().finish(0));
    }
}
