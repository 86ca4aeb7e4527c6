//! Leaf tables: the leaves of the blocks that one member decides, as bytes.
//!
//! A member's table holds every block that its allocated or zero clusters touch, and the block that its virtual
//! end cuts, as they are seen in its view. Blocks of zeros have no leaf stored. All integers are little-endian.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `qcleaves` |
//! | 4 | version: 1 |
//! | 4 | 0 |
//! | 32 × leaves | the leaves, in the order of their blocks |
//! | 16 × runs | first block; count of blocks, bit 63 set: all zeros, no leaves stored |
//! | 8 | virtual size in bytes |
//! | 8 | number of leaves |
//! | 8 | number of runs |
//! | 32 | BLAKE3 of all before |
//!
//! Runs ascend, do not overlap, lie within the view, and neighbours of one kind are one run. So equal contents are
//! equal bytes, and one flipped bit anywhere is seen. A table takes 32 bytes for 64 KiB: 0.5 GiB for 1 TiB.

use crate::digest::{block_count, zero_leaf};
use crate::ids::Digest;

/// What a table begins with.
pub const MAGIC: [u8; 8] = *b"qcleaves";
/// The version of the format.
pub const VERSION: u32 = 1;
/// The length in bytes of what comes before the leaves.
pub const HEAD_BYTES: u64 = HEAD_LENGTH as u64;
/// The same as an index.
pub const HEAD_LENGTH: usize = 16;
/// The length of a leaf in bytes.
pub const LEAF_BYTES: u64 = 32;
/// The length of a run in bytes.
pub const RUN_BYTES: u64 = RUN_LENGTH as u64;
/// The same as an index.
pub const RUN_LENGTH: usize = 16;
/// The length of what comes behind the runs, in bytes.
pub const FOOT_BYTES: u64 = FOOT_LENGTH as u64;
/// The same as an index.
pub const FOOT_LENGTH: usize = 56;
/// In a run's count: blocks of zeros.
const ZERO_FLAG: u64 = 1 << 63;

/// Why bytes are no leaf table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableFault {
    /// It does not begin as one.
    #[error("it does not begin as a leaf table")]
    Magic,
    /// A version that this program does not know.
    #[error("its version is {0}, not {VERSION}")]
    Version(u32),
    /// Its length is not what its numbers say.
    #[error("it has {found} bytes; its numbers do not fit")]
    Length {
        /// The length found, in bytes.
        found: u64,
    },
    /// A run is empty, out of order, or outside the view.
    #[error("run {0} is not where it can be")]
    Run(u64),
    /// The bytes are not those that were written.
    #[error("its checksum is wrong")]
    Checksum,
}

/// Neighbouring blocks of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRun {
    /// The first block.
    pub first: u64,
    /// How many, above 0.
    pub count: u64,
    /// All zeros: no leaf is stored.
    pub zero: bool,
}

impl BlockRun {
    /// The block behind the last one.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// As it is stored.
    #[must_use]
    pub fn encode(&self) -> [u8; RUN_LENGTH] {
        let mut bytes = [0; RUN_LENGTH];
        let flag = if self.zero { ZERO_FLAG } else { 0 };
        let (first, count) = bytes.split_at_mut(8);
        first.copy_from_slice(&self.first.to_le_bytes());
        count.copy_from_slice(&(self.count | flag).to_le_bytes());
        bytes
    }

    /// Reads the run with number `index`; `before` is the one before it, `blocks` how many the view has.
    pub fn decode(bytes: &[u8], index: u64, before: Option<&Self>, blocks: u64) -> Result<Self, TableFault> {
        let (first, count) = word(bytes, 0).zip(word(bytes, 8)).ok_or(TableFault::Run(index))?;
        let run = Self { first, count: count & !ZERO_FLAG, zero: count & ZERO_FLAG != 0 };
        let apart = before.is_none_or(|before| {
            before.end() < run.first || before.end() == run.first && before.zero != run.zero
        });
        let inside = run.first.checked_add(run.count).is_some_and(|end| end <= blocks);
        if run.count == 0 || !apart || !inside {
            return Err(TableFault::Run(index));
        }
        Ok(run)
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The numbers of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The size of the view in bytes.
    pub virtual_size: u64,
    /// How many leaves are stored.
    pub leaves: u64,
    /// How many runs there are.
    pub runs: u64,
}

impl Shape {
    /// Reads the numbers of a table of `length` bytes from its first [`HEAD_BYTES`] and its last
    /// [`FOOT_BYTES`], with the checksum that it claims for itself.
    pub fn decode(length: u64, head: &[u8], foot: &[u8]) -> Result<(Self, Digest), TableFault> {
        if head.get(..8) != Some(&MAGIC) {
            return Err(TableFault::Magic);
        }
        let version = head.get(8..12).and_then(|bytes| Some(u32::from_le_bytes(bytes.try_into().ok()?)));
        match version {
            Some(VERSION) => {}
            other => return Err(TableFault::Version(other.unwrap_or_default())),
        }
        let fault = TableFault::Length { found: length };
        let (Some(virtual_size), Some(leaves), Some(runs)) = (word(foot, 0), word(foot, 8), word(foot, 16))
        else {
            return Err(fault);
        };
        let shape = Self { virtual_size, leaves, runs };
        let checksum: [u8; 32] = foot.get(24..56).and_then(|bytes| bytes.try_into().ok()).ok_or(fault)?;
        if shape.length() != Some(length)
            || leaves > block_count(virtual_size)
            || runs > block_count(virtual_size)
        {
            return Err(fault);
        }
        Ok((shape, Digest(checksum)))
    }

    /// Where the runs begin, in bytes.
    #[must_use]
    pub fn runs_at(&self) -> u64 {
        HEAD_BYTES.saturating_add(self.leaves.saturating_mul(LEAF_BYTES))
    }

    /// The length of the whole table in bytes; `None` if no file is as long.
    #[must_use]
    pub fn length(&self) -> Option<u64> {
        let leaves = self.leaves.checked_mul(LEAF_BYTES)?;
        let runs = self.runs.checked_mul(RUN_BYTES)?;
        HEAD_BYTES.checked_add(leaves)?.checked_add(runs)?.checked_add(FOOT_BYTES)
    }
}

/// Makes a table from leaves in the order of their blocks. What it has made so far is appended to a buffer of the
/// caller's, who writes that out as it fills. Memory: 16 bytes a run.
#[derive(Debug)]
pub struct TableWriter {
    hasher: blake3::Hasher,
    virtual_size: u64,
    leaves: u64,
    runs: Vec<BlockRun>,
    begun: bool,
}

impl TableWriter {
    /// A table of a view of that size.
    #[must_use]
    pub fn new(virtual_size: u64) -> Self {
        Self { hasher: blake3::Hasher::new(), virtual_size, leaves: 0, runs: Vec::new(), begun: false }
    }

    /// Adds `count` blocks of zeros.
    pub fn zeros(&mut self, first: u64, count: u64, out: &mut Vec<u8>) {
        self.begin(out);
        self.run(first, count, true);
    }

    /// Adds the leaves of neighbouring blocks; those of zeros become runs.
    pub fn leaves(&mut self, first: u64, leaves: &[Digest], out: &mut Vec<u8>) {
        self.begin(out);
        for (block, leaf) in (first..).zip(leaves) {
            let zero = *leaf == zero_leaf();
            self.run(block, 1, zero);
            if !zero {
                self.leaves += 1;
                out.extend_from_slice(&leaf.0);
                self.hasher.update(&leaf.0);
            }
        }
    }

    /// Ends the table; gives its numbers and the BLAKE3 of the whole file.
    #[must_use]
    pub fn finish(mut self, out: &mut Vec<u8>) -> (Shape, Digest) {
        self.begin(out);
        let shape =
            Shape { virtual_size: self.virtual_size, leaves: self.leaves, runs: self.runs.len() as u64 };
        for run in &std::mem::take(&mut self.runs) {
            self.append(&run.encode(), out);
        }
        for number in [shape.virtual_size, shape.leaves, shape.runs] {
            self.append(&number.to_le_bytes(), out);
        }
        let checksum = *self.hasher.finalize().as_bytes();
        self.append(&checksum, out);
        (shape, Digest(*self.hasher.finalize().as_bytes()))
    }

    fn begin(&mut self, out: &mut Vec<u8>) {
        if !self.begun {
            self.begun = true;
            self.append(&MAGIC, out);
            self.append(&VERSION.to_le_bytes(), out);
            self.append(&[0; 4], out);
        }
    }

    fn append(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        self.hasher.update(bytes);
        out.extend_from_slice(bytes);
    }

    fn run(&mut self, first: u64, count: u64, zero: bool) {
        debug_assert!(self.runs.last().is_none_or(|last| last.end() <= first), "blocks come in order");
        if count == 0 {
            return;
        }
        match self.runs.last_mut() {
            Some(last) if last.zero == zero && last.end() == first => last.count += count,
            _ => self.runs.push(BlockRun { first, count, zero }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{BlockRun, FOOT_LENGTH, HEAD_LENGTH, RUN_LENGTH, Shape, TableFault, TableWriter};
    use crate::digest::{block_count, zero_leaf};
    use crate::ids::Digest;

    fn leaf(seed: u64) -> Digest {
        Digest(*blake3::hash(&seed.to_le_bytes()).as_bytes())
    }

    /// Reads a whole table, as strictly as a reader does.
    fn parse(bytes: &[u8]) -> Result<(Shape, Vec<BlockRun>), TableFault> {
        let length = bytes.len() as u64;
        let head = bytes.get(..HEAD_LENGTH).ok_or(TableFault::Magic)?;
        let foot = bytes.len().checked_sub(FOOT_LENGTH);
        let foot = foot.and_then(|at| bytes.get(at..)).ok_or(TableFault::Length { found: length })?;
        let (shape, checksum) = Shape::decode(length, head, foot)?;
        if Digest(*blake3::hash(&bytes[..bytes.len() - 32]).as_bytes()) != checksum {
            return Err(TableFault::Checksum);
        }
        let at = usize::try_from(shape.runs_at()).unwrap();
        let mut runs: Vec<BlockRun> = Vec::new();
        for (index, raw) in
            bytes[at..].chunks(RUN_LENGTH).take(usize::try_from(shape.runs).unwrap()).enumerate()
        {
            let run = BlockRun::decode(raw, index as u64, runs.last(), block_count(shape.virtual_size))?;
            runs.push(run);
        }
        Ok((shape, runs))
    }

    fn table(virtual_size: u64, parts: &[(u64, u64, bool)]) -> Vec<u8> {
        let (mut writer, mut out) = (TableWriter::new(virtual_size), Vec::new());
        for (first, count, zero) in parts {
            if *zero {
                writer.zeros(*first, *count, &mut out);
            } else {
                let leaves: Vec<Digest> = (*first..first + count).map(leaf).collect();
                writer.leaves(*first, &leaves, &mut out);
            }
        }
        let (shape, digest) = writer.finish(&mut out);
        assert_eq!(shape.length(), Some(out.len() as u64));
        assert_eq!(digest, Digest(*blake3::hash(&out).as_bytes()));
        out
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = table(10 << 30, &[(3, 2, false), (5, 4, true), (9, 1, true), (100, 3, false)]);
        let (shape, runs) = parse(&bytes).unwrap();
        assert_eq!(shape, Shape { virtual_size: 10 << 30, leaves: 5, runs: 3 });
        let run = |first, count, zero| BlockRun { first, count, zero };
        assert_eq!(runs, [run(3, 2, false), run(5, 5, true), run(100, 3, false)]);
        assert_eq!(bytes.len(), 16 + 5 * 32 + 3 * 16 + 56);
    }

    #[test]
    fn zeros_are_runs_whoever_tells_of_them() {
        let (mut writer, mut out) = (TableWriter::new(1 << 20), Vec::new());
        writer.leaves(0, &[zero_leaf(), leaf(1), zero_leaf(), zero_leaf()], &mut out);
        let (shape, _) = writer.finish(&mut out);
        assert_eq!((shape.leaves, shape.runs), (1, 3));
        // An empty view, and a member that decides nothing.
        assert_eq!(parse(&table(0, &[])).unwrap().0, Shape { virtual_size: 0, leaves: 0, runs: 0 });
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let bytes = table(3 << 20, &[(1, 2, false), (3, 5, true), (40, 8, false)]);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(parse(&flipped).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(parse(&bytes[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn runs_must_be_in_order_and_inside() {
        let run = |first, count, zero| BlockRun { first, count, zero };
        let decode =
            |run: BlockRun, before: Option<&BlockRun>| BlockRun::decode(&run.encode(), 7, before, 100);
        assert_eq!(decode(run(3, 97, true), None), Ok(run(3, 97, true)));
        for (bad, before) in [
            (run(3, 98, false), None),
            (run(3, 0, false), None),
            (run(u64::MAX, 2, false), None),
            (run(3, 1, false), Some(run(2, 2, true))),
            (run(3, 1, false), Some(run(2, 1, false))),
        ] {
            assert_eq!(decode(bad, before.as_ref()), Err(TableFault::Run(7)), "{bad:?}");
        }
        assert_eq!(decode(run(3, 1, false), Some(&run(2, 1, true))), Ok(run(3, 1, false)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_table_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), valid in any::<bool>()) {
            let mut bytes = bytes;
            if valid {
                bytes.splice(0..0, [b"qcleaves".as_slice(), &1_u32.to_le_bytes(), &[0; 4]].concat());
            }
            let _ = parse(&bytes);
        }
    }
}
