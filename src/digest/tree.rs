//! The tree above the leaves, built from left to right with one partial node a level.

use std::sync::LazyLock;

use crate::ids::Digest;

/// How many children a full node has.
pub const FAN_OUT: usize = 256;

/// Levels that a tree over 2^64 bytes can have: 2^48 leaves are six times [`FAN_OUT`], and the root's.
const LEVELS: usize = 7;

/// The digests of full subtrees of zeros: of one leaf, of 256 leaves, of 65,536 leaves, and so on.
static ZERO_SUBTREES: LazyLock<[Digest; LEVELS]> = LazyLock::new(|| {
    let mut level = Digest(*blake3::hash(&super::ZEROS).as_bytes());
    std::array::from_fn(|_| {
        let this = level;
        level = Digest(*blake3::hash(&this.0.repeat(FAN_OUT)).as_bytes());
        this
    })
});

/// The leaf of a block of zeros.
#[must_use]
pub fn zero_leaf() -> Digest {
    ZERO_SUBTREES[0]
}

/// Builds the digest of a view from its leaves in order.
///
/// Memory: one partial node a level, at most 8 KiB each, whatever the size of the view.
#[derive(Clone, Debug, Default)]
pub struct TreeBuilder {
    /// The digests of each level's unfinished node, concatenated; always fewer than [`FAN_OUT`].
    levels: Vec<Vec<u8>>,
    blocks: u64,
}

impl TreeBuilder {
    /// A tree without leaves.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many leaves were pushed so far.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Adds the leaf of the next block.
    pub fn push_leaf(&mut self, leaf: Digest) {
        self.blocks = self.blocks.saturating_add(1);
        self.push(0, leaf);
    }

    /// Adds the leaves of `count` blocks of zeros, in a number of steps that grows with the tree's height
    /// only: at most 2 * 255 nodes a level.
    pub fn push_zero_blocks(&mut self, count: u64) {
        self.blocks = self.blocks.saturating_add(count);
        let mut left = count;
        while left > 0 {
            let (level, leaves) = self.largest_zero_subtree(left);
            self.push(level, ZERO_SUBTREES[level]);
            left -= leaves;
        }
    }

    /// The level and number of leaves of the largest full subtree that may come next: everything below its
    /// level must be finished, and it must not hold more than `left` leaves.
    fn largest_zero_subtree(&self, left: u64) -> (usize, u64) {
        let (mut level, mut leaves) = (0, 1_u64);
        while level + 1 < LEVELS && self.is_empty(level) {
            let wider = leaves.saturating_mul(FAN_OUT as u64);
            if wider > left {
                break;
            }
            level += 1;
            leaves = wider;
        }
        (level, leaves)
    }

    /// The digest of the view, whose length in bytes is `virtual_size`.
    ///
    /// The leaves pushed must be those of all its blocks ([`super::block_count`]): a caller that pushed
    /// more or fewer has a bug, and gets the digest of another view.
    #[must_use]
    pub fn finish(mut self, virtual_size: u64) -> Digest {
        debug_assert_eq!(self.blocks, super::block_count(virtual_size), "one leaf for each block");
        let top = self.top();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&top.0);
        hasher.update(&virtual_size.to_le_bytes());
        Digest(*hasher.finalize().as_bytes())
    }

    /// Closes the last node of each level, and gives the one digest that is left.
    fn top(&mut self) -> Digest {
        let mut level = 0;
        while level < self.levels.len() {
            let alone = self.levels[level + 1..].iter().all(Vec::is_empty);
            if alone && let Ok(only) = <[u8; 32]>::try_from(self.levels[level].as_slice()) {
                return Digest(only);
            }
            if !self.levels[level].is_empty() {
                self.close(level);
            }
            level += 1;
        }
        Digest(*blake3::hash(&[]).as_bytes())
    }

    fn is_empty(&self, level: usize) -> bool {
        self.levels.get(level).is_none_or(Vec::is_empty)
    }

    /// Appends a digest to a level, and to the levels above what that completes.
    fn push(&mut self, level: usize, digest: Digest) {
        let (mut level, mut digest) = (level, digest);
        loop {
            if self.levels.len() <= level {
                self.levels.resize_with(level + 1, Vec::new);
            }
            let node = &mut self.levels[level];
            node.extend_from_slice(&digest.0);
            if node.len() < FAN_OUT * digest.0.len() {
                return;
            }
            digest = Digest(*blake3::hash(node).as_bytes());
            node.clear();
            level += 1;
        }
    }

    /// Turns a level's unfinished node into a child of the level above.
    fn close(&mut self, level: usize) {
        let digest = Digest(*blake3::hash(&self.levels[level]).as_bytes());
        self.levels[level].clear();
        self.push(level + 1, digest);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::{FAN_OUT, LEVELS, TreeBuilder, ZERO_SUBTREES, zero_leaf};
    use crate::digest::block_count;
    use crate::ids::Digest;

    /// The definition, word for word: level by level until one digest is left.
    fn plain(leaves: &[Digest], virtual_size: u64) -> Digest {
        fn top(level: &[Digest]) -> Digest {
            match level {
                [] => Digest(*blake3::hash(&[]).as_bytes()),
                [only] => *only,
                _ => {
                    let above: Vec<Digest> = level
                        .chunks(FAN_OUT)
                        .map(|node| {
                            let bytes: Vec<u8> = node.iter().flat_map(|digest| digest.0).collect();
                            Digest(*blake3::hash(&bytes).as_bytes())
                        })
                        .collect();
                    top(&above)
                }
            }
        }
        let mut bytes = top(leaves).0.to_vec();
        bytes.extend(virtual_size.to_le_bytes());
        Digest(*blake3::hash(&bytes).as_bytes())
    }

    fn leaf(seed: u64) -> Digest {
        Digest(*blake3::hash(&seed.to_le_bytes()).as_bytes())
    }

    /// Pushes runs: `Ok(n)` is n blocks of zeros, `Err(n)` n different leaves.
    fn both(runs: &[Result<u64, u64>]) -> (Digest, Digest) {
        let (mut tree, mut leaves) = (TreeBuilder::new(), Vec::new());
        for run in runs {
            match *run {
                Ok(zeros) => {
                    tree.push_zero_blocks(zeros);
                    leaves.extend((0..zeros).map(|_| zero_leaf()));
                }
                Err(data) => {
                    for _ in 0..data {
                        let next = leaf(leaves.len() as u64);
                        tree.push_leaf(next);
                        leaves.push(next);
                    }
                }
            }
        }
        let size = leaves.len() as u64 * 65536;
        assert_eq!(tree.blocks(), leaves.len() as u64);
        (tree.finish(size), plain(&leaves, size))
    }

    #[test]
    fn every_count_around_full_nodes() {
        for count in [0, 1, 2, 255, 256, 257, 511, 512, 513, 65535, 65536, 65537, 65792, 131_072, 131_073] {
            for runs in [vec![Ok(count)], vec![Err(count)], vec![Err(1), Ok(count)], vec![Ok(count), Err(1)]]
            {
                let (built, expected) = both(&runs);
                assert_eq!(built, expected, "{runs:?}");
            }
        }
    }

    #[test]
    fn zeros_cost_nothing_whatever_the_size() {
        for size in [60 << 40, (60 << 40) + 512, 1 << 62, u64::MAX] {
            let started = Instant::now();
            let mut tree = TreeBuilder::new();
            tree.push_leaf(leaf(1));
            tree.push_zero_blocks(block_count(size) - 2);
            tree.push_leaf(leaf(2));
            assert!(tree.levels.len() <= LEVELS);
            let _ = tree.finish(size);
            // Blocks one by one would take minutes; the bound is loose for a busy machine.
            assert!(started.elapsed() < Duration::from_secs(1));
        }
    }

    #[test]
    fn zero_constants_are_full_subtrees() {
        let mut tree = TreeBuilder::new();
        for _ in 0..65536 {
            tree.push_leaf(zero_leaf());
        }
        assert_eq!(tree.top(), ZERO_SUBTREES[2]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn equals_the_plain_computation(
            runs in prop::collection::vec(
                prop_oneof![
                    (0_u64..1000).prop_map(Ok),
                    (0_u64..600).prop_map(Err),
                    (65_000_u64..140_000).prop_map(Ok),
                ],
                0..6,
            )
        ) {
            let (built, expected) = both(&runs);
            prop_assert_eq!(built, expected);
        }
    }
}
