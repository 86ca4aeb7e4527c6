//! Leaf tables as files: written once, read upwards.

use std::sync::Arc;

use crate::backend::publish::{publish, temporary_in};
use crate::backend::{Backend, BackendError, StoreFile};
use crate::digest::block_count;
use crate::digest::table::{
    BlockRun, FOOT_BYTES, FOOT_LENGTH, HEAD_BYTES, HEAD_LENGTH, LEAF_BYTES, RUN_BYTES, RUN_LENGTH, Shape,
    TableFault, TableWriter,
};
use crate::digest::view::{Leaves, Says, Stretch};
use crate::ids::{Digest, StorePath};
use crate::store::manifest::TableMark;
use crate::store::record::own;
use crate::store::{Store, StoreError};

/// How much of a table is written at once, in bytes.
const FLUSH_BYTES: usize = 1 << 20;
/// How much of a table is hashed at once, in bytes.
const CHECK_BYTES: usize = 1 << 20;
/// The window on the leaves, in bytes: 512 of them.
const LEAVES_WINDOW: u64 = 16 << 10;
/// The window on the runs, in bytes: 256 of them.
const RUNS_WINDOW: u64 = 4 << 10;

/// Why a leaf table cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LeafError {
    /// The store failed.
    #[error("failed to read or write leaf table {name}")]
    Store {
        /// The table.
        name: String,
        /// The cause.
        #[source]
        source: BackendError,
    },
    /// It is not what was written.
    #[error("leaf table {name} is damaged")]
    Fault {
        /// The table.
        name: String,
        /// What is wrong.
        #[source]
        source: TableFault,
    },
}

type Result<T> = std::result::Result<T, LeafError>;

/// Opens the leaf table that a member's manifest names.
pub fn open(store: &Store, member: &str, mark: &TableMark) -> std::result::Result<LeafFile, StoreError> {
    LeafFile::open(store.backend().as_ref(), mark)
        .map_err(|source| StoreError::Leaves { member: member.to_owned(), source })
}

/// As [`open`]; of a table that is damaged, so that it cannot be built on, that is said.
pub fn usable(
    store: &Store,
    member: &str,
    mark: &TableMark,
) -> std::result::Result<std::result::Result<LeafFile, String>, StoreError> {
    match open(store, member, mark) {
        Ok(table) => Ok(Ok(table)),
        Err(StoreError::Leaves { source: LeafError::Fault { .. }, .. }) => {
            Ok(Err(format!("the leaf table of {member} is damaged")))
        }
        Err(error) => Err(error),
    }
}

/// Where a table lies.
#[must_use]
pub fn path(name: &str) -> StorePath {
    own(&["leaves", name])
}

/// A table being written, under a temporary name in `leaves/`. Dropped unfinished it removes its file.
#[derive(Debug)]
pub struct LeafSink<'a> {
    backend: &'a dyn Backend,
    temporary: StorePath,
    file: Arc<dyn StoreFile>,
    writer: Option<TableWriter>,
    pending: Vec<u8>,
    written: u64,
    done: bool,
}

impl<'a> LeafSink<'a> {
    /// Begins the table of a view of that size.
    pub fn create(backend: &'a dyn Backend, virtual_size: u64) -> Result<Self> {
        let directory = own(&["leaves"]);
        let failed = |source| LeafError::Store { name: directory.to_string(), source };
        let temporary = temporary_in(&directory).map_err(failed)?;
        let file = match backend.create(&temporary) {
            // A store that was opted in before there were leaves.
            Err(BackendError::NotFound { .. }) => {
                match backend.create_dir(&directory, true) {
                    Ok(()) | Err(BackendError::AlreadyExists { .. }) => {}
                    Err(source) => return Err(failed(source)),
                }
                backend.create(&temporary)
            }
            made => made,
        };
        let file = file.map_err(failed)?;
        let writer = Some(TableWriter::new(virtual_size));
        Ok(Self { backend, temporary, file, writer, pending: Vec::new(), written: 0, done: false })
    }

    /// Adds blocks of zeros.
    pub fn zeros(&mut self, first: u64, count: u64) -> Result<()> {
        if let Some(writer) = &mut self.writer {
            writer.zeros(first, count, &mut self.pending);
        }
        self.flush(FLUSH_BYTES)
    }

    /// Adds the leaves of neighbouring blocks.
    pub fn leaves(&mut self, first: u64, leaves: &[Digest]) -> Result<()> {
        if let Some(writer) = &mut self.writer {
            writer.leaves(first, leaves, &mut self.pending);
        }
        self.flush(FLUSH_BYTES)
    }

    /// Ends the table and gives it its name, durably: `<stem>.<some digits of its BLAKE3>`. One of the same name
    /// has the same bytes, and is replaced.
    pub fn finish(mut self, stem: &str) -> Result<TableMark> {
        let Some(writer) = self.writer.take() else { return Err(self.failed_as(TableFault::Checksum)) };
        let (shape, blake3) = writer.finish(&mut self.pending);
        self.flush(0)?;
        let name = format!("{stem}.{}", blake3.to_string().get(..16).unwrap_or_default());
        let target = path(&name);
        publish(self.backend, &self.temporary, &target).map_err(|source| self.failed(source))?;
        self.done = true;
        Ok(TableMark { name, blake3, leaves: shape.leaves, runs: shape.runs })
    }

    fn flush(&mut self, above: usize) -> Result<()> {
        if self.pending.len() > above {
            self.file.write_at(self.written, &self.pending).map_err(|source| self.failed(source))?;
            self.written += self.pending.len() as u64;
            self.pending.clear();
        }
        Ok(())
    }

    fn failed(&self, source: BackendError) -> LeafError {
        LeafError::Store { name: self.temporary.to_string(), source }
    }

    fn failed_as(&self, source: TableFault) -> LeafError {
        LeafError::Fault { name: self.temporary.to_string(), source }
    }
}

impl Drop for LeafSink<'_> {
    fn drop(&mut self) {
        if !self.done {
            // Best effort: what is left is swept by its name.
            let _ = self.backend.remove_file(&self.temporary);
        }
    }
}

/// A table open for reading: it was read whole and its checksum is right. Memory: two windows of 20 KiB in all.
#[derive(Debug)]
pub struct LeafFile {
    name: String,
    file: Arc<dyn StoreFile>,
    shape: Shape,
    cursor: Cursor,
    leaves: Window,
    runs: Window,
}

/// Where in the runs a walk is.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    /// The number of the next run to be decoded.
    next: u64,
    /// The last one decoded.
    run: Option<BlockRun>,
    /// Where the one before that ends.
    before_end: u64,
    /// How many leaves come before that run's.
    leaves_before: u64,
}

#[derive(Debug, Default)]
struct Window {
    at: u64,
    bytes: Vec<u8>,
}

impl LeafFile {
    /// Opens a table and reads all of it once: what it says from then on is what was written.
    pub fn open(backend: &dyn Backend, mark: &TableMark) -> Result<Self> {
        Self::open_at(backend, &path(&mark.name), mark)
    }

    /// As [`LeafFile::open`], of one that lies elsewhere: it came from somebody else.
    pub fn open_at(backend: &dyn Backend, path: &StorePath, mark: &TableMark) -> Result<Self> {
        let name = mark.name.clone();
        let failed = |source| LeafError::Store { name: name.clone(), source };
        let fault = |source| LeafError::Fault { name: name.clone(), source };
        let file = backend.open(path).map_err(failed)?;
        let length = file.stat().map_err(failed)?.length;
        if length < HEAD_BYTES + FOOT_BYTES {
            return Err(fault(TableFault::Length { found: length }));
        }
        let mut head = [0; HEAD_LENGTH];
        let mut foot = [0; FOOT_LENGTH];
        file.read_at(0, &mut head).map_err(failed)?;
        file.read_at(length - FOOT_BYTES, &mut foot).map_err(failed)?;
        let (shape, _) = Shape::decode(length, &head, &foot).map_err(fault)?;
        if (shape.leaves, shape.runs) != (mark.leaves, mark.runs)
            || hash(&*file, length).map_err(failed)? != mark.blake3
        {
            return Err(fault(TableFault::Checksum));
        }
        let (leaves, runs) = (Window::default(), Window::default());
        Ok(Self { name, file, shape, cursor: Cursor::default(), leaves, runs })
    }

    /// Its numbers.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Begins a new walk from the first block.
    pub fn rewind(&mut self) {
        self.cursor = Cursor::default();
    }

    /// The next run; `None` behind the last.
    pub fn next_run(&mut self) -> Result<Option<BlockRun>> {
        if self.cursor.next >= self.shape.runs {
            return Ok(None);
        }
        let at = self.shape.runs_at() + self.cursor.next * RUN_BYTES;
        let end = self.shape.runs_at() + self.shape.runs * RUN_BYTES;
        let mut raw = [0; RUN_LENGTH];
        self.runs
            .copy(&*self.file, at, end.min(at + RUNS_WINDOW), &mut raw)
            .map_err(|source| self.failed(source))?;
        let Cursor { next, run: before, leaves_before, .. } = self.cursor;
        let run = BlockRun::decode(&raw, next, before.as_ref(), block_count(self.shape.virtual_size))
            .map_err(|source| LeafError::Fault { name: self.name.clone(), source })?;
        let leaves_before = leaves_before + before.filter(|run| !run.zero).map_or(0, |run| run.count);
        // No more leaves than are stored: a walk takes a step for each.
        if !run.zero && run.count > self.shape.leaves.saturating_sub(leaves_before) {
            return Err(LeafError::Fault { name: self.name.clone(), source: TableFault::Run(next) });
        }
        let before_end = before.as_ref().map_or(0, BlockRun::end);
        self.cursor = Cursor { next: next + 1, run: Some(run), before_end, leaves_before };
        Ok(Some(run))
    }

    fn failed(&self, source: BackendError) -> LeafError {
        LeafError::Store { name: self.name.clone(), source }
    }
}

impl Leaves for LeafFile {
    type Error = LeafError;

    fn virtual_size(&self) -> u64 {
        self.shape.virtual_size
    }

    fn stretch(&mut self, block: u64) -> Result<Stretch> {
        if self.cursor.run.is_some_and(|run| run.first > block) && block < self.cursor.before_end {
            // A walk that went back. In the gap before the run it is at the right place.
            self.rewind();
        }
        loop {
            match self.cursor.run {
                Some(run) if block < run.first => {
                    return Ok(Stretch { end: run.first, says: Says::Nothing });
                }
                Some(run) if block < run.end() => {
                    let says = if run.zero { Says::Zeros } else { Says::Leaf };
                    return Ok(Stretch { end: run.end(), says });
                }
                _ => {}
            }
            if self.next_run()?.is_none() {
                return Ok(Stretch { end: u64::MAX, says: Says::Nothing });
            }
        }
    }

    fn leaf(&mut self, block: u64) -> Result<Digest> {
        let rank = match self.cursor.run {
            Some(run) if !run.zero && run.first <= block && block < run.end() => {
                self.cursor.leaves_before + (block - run.first)
            }
            _ => {
                let source = TableFault::Run(self.cursor.next);
                return Err(LeafError::Fault { name: self.name.clone(), source });
            }
        };
        let at = HEAD_BYTES + rank * LEAF_BYTES;
        let mut leaf = [0; 32];
        let end = self.shape.runs_at().min(at + LEAVES_WINDOW);
        self.leaves.copy(&*self.file, at, end, &mut leaf).map_err(|source| self.failed(source))?;
        Ok(Digest(leaf))
    }
}

impl Window {
    /// Copies what lies at `at`, which ends before `end`: up to there it is read ahead.
    fn copy(
        &mut self,
        file: &dyn StoreFile,
        at: u64,
        end: u64,
        to: &mut [u8],
    ) -> std::result::Result<(), BackendError> {
        let inside = at >= self.at && at + to.len() as u64 <= self.at + self.bytes.len() as u64;
        if !inside {
            self.at = at;
            self.bytes.resize(usize::try_from(end.saturating_sub(at)).unwrap_or_default().max(to.len()), 0);
            crate::backend::read_padded(file, at, &mut self.bytes)?;
        }
        let from = usize::try_from(at - self.at).unwrap_or_default();
        if let Some(bytes) = self.bytes.get(from..from + to.len()) {
            to.copy_from_slice(bytes);
        }
        Ok(())
    }
}

/// The BLAKE3 of a file's first `length` bytes.
fn hash(file: &dyn StoreFile, length: u64) -> std::result::Result<Digest, BackendError> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; usize::try_from(length).unwrap_or(CHECK_BYTES).min(CHECK_BYTES)];
    let mut at = 0;
    while at < length {
        let step = usize::try_from(length - at).unwrap_or(CHECK_BYTES).min(CHECK_BYTES);
        let Some(part) = buffer.get_mut(..step) else { break };
        crate::backend::read_padded(file, at, part)?;
        hasher.update(part);
        at += step as u64;
    }
    Ok(Digest(*hasher.finalize().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::{LeafError, LeafFile, LeafSink, path};
    use crate::backend::Backend;
    use crate::backend::memory::MemoryStore;
    use crate::digest::table::TableFault;
    use crate::digest::view::{Leaves, Says, Stretch, view_digest};
    use crate::digest::{TreeBuilder, leaf};
    use crate::ids::Digest;
    use crate::store::manifest::TableMark;
    use crate::store::record::own;

    fn store() -> MemoryStore {
        let store = MemoryStore::new();
        store.create_dir(&own(&[]), true).unwrap();
        store
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let store = store();
        let leaves: Vec<Digest> = (0..3000_u32).map(|value| leaf(&value.to_le_bytes())).collect();
        let mut sink = LeafSink::create(&store, 1 << 30).unwrap();
        sink.leaves(10, &leaves[10..2000]).unwrap();
        sink.zeros(2000, 100).unwrap();
        sink.leaves(2500, &leaves[2500..2600]).unwrap();
        let mark = sink.finish("stem").unwrap();
        let mut file = LeafFile::open(&store, &mark).unwrap();
        for _ in 0..2 {
            assert_eq!(file.stretch(0).unwrap(), Stretch { end: 10, says: Says::Nothing });
            for block in 10..2000_u64 {
                assert_eq!(file.stretch(block).unwrap(), Stretch { end: 2000, says: Says::Leaf });
                assert_eq!(file.leaf(block).unwrap(), leaves[usize::try_from(block).unwrap()]);
            }
            assert_eq!(file.stretch(2050).unwrap(), Stretch { end: 2100, says: Says::Zeros });
            assert_eq!(file.stretch(2599).unwrap(), Stretch { end: 2600, says: Says::Leaf });
            assert_eq!(file.leaf(2599).unwrap(), leaves[2599]);
            assert_eq!(file.stretch(2600).unwrap(), Stretch { end: u64::MAX, says: Says::Nothing });
        }
        let mut tree = TreeBuilder::new();
        tree.push_zero_blocks(10);
        leaves[10..2000].iter().for_each(|leaf| tree.push_leaf(*leaf));
        tree.push_zero_blocks(500);
        leaves[2500..2600].iter().for_each(|leaf| tree.push_leaf(*leaf));
        tree.push_zero_blocks((1 << 14) - 2600);
        assert_eq!(view_digest(&mut [file]).unwrap(), tree.finish(1 << 30));
    }

    #[test]
    fn runs_of_more_leaves_than_are_stored_are_refused() {
        // Found by fuzzing: one leaf, and a run of four million million.
        let bytes = include_bytes!("../../../tests/fuzz/seeds/leaves/overlong");
        let body = &bytes[..bytes.len() - 32];
        let bytes = [body, blake3::hash(body).as_bytes()].concat();
        let store = store();
        store.create_dir(&own(&["leaves"]), true).unwrap();
        store.create(&path("table")).unwrap().write_at(0, &bytes).unwrap();
        let blake3 = Digest(*blake3::hash(&bytes).as_bytes());
        let mark = TableMark { name: "table".to_owned(), blake3, leaves: 1, runs: 2 };
        let mut table = LeafFile::open(&store, &mark).unwrap();
        assert!(matches!(table.stretch(5), Err(LeafError::Fault { source: TableFault::Run(0), .. })));
        assert!(view_digest(&mut [table]).is_err());
    }

    #[test]
    fn a_damaged_table_is_refused_and_an_unfinished_one_goes() {
        let store = store();
        let mut sink = LeafSink::create(&store, 1 << 20).unwrap();
        sink.leaves(0, &[leaf(b"a"), leaf(b"b")]).unwrap();
        let mark = sink.finish("stem").unwrap();
        drop(LeafSink::create(&store, 1 << 20).unwrap());
        assert_eq!(store.read_dir(&own(&["leaves"])).unwrap().len(), 1);
        let file = store.open_writable(&path(&mark.name)).unwrap();
        let mut byte = [0];
        file.read_at(20, &mut byte).unwrap();
        file.write_at(20, &[byte[0] ^ 1]).unwrap();
        assert!(matches!(LeafFile::open(&store, &mark), Err(LeafError::Fault { .. })));
    }
}
