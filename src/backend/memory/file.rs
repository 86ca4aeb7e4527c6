//! Files of a store in memory.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::dice::Dice;
use super::{DEVICE, Shared, failed, lock};
use crate::backend::runs::{Batch, parts};
use crate::backend::{
    BackendError, FileId, FileKind, Identity, ImageLocks, Means, Move, Moved, Result, Stat, StoreFile,
    read_padded,
};
use crate::ids::StorePath;

/// Bytes are kept in pieces of this size; also what clones are aligned to.
pub(super) const CHUNK: u64 = 4096;
const CHUNK_BYTES: usize = 4096;

/// What a power cut writes of a piece, if not all of it.
const SECTOR_BYTES: usize = 512;

/// A file whatever its names: contents, live and durable.
#[derive(Debug)]
pub(super) struct Inode {
    number: u64,
    state: Mutex<State>,
    locks: Mutex<Locks>,
}

/// QEMU's image locks on a file.
#[derive(Debug, Default)]
struct Locks {
    /// Of others than this store's users.
    foreign: ImageLocks,
    /// Open files that keep writers out, and how often each was asked to.
    holders: BTreeMap<u64, u64>,
}

#[derive(Debug)]
struct State {
    live: Content,
    durable: Content,
    links: u64,
}

#[derive(Clone, Debug)]
struct Content {
    chunks: BTreeMap<u64, Arc<Vec<u8>>>,
    length: u64,
    identity: Identity,
    modified_ns: i128,
    changed_ns: i128,
}

impl Inode {
    pub(super) fn new(number: u64, now: i128) -> Self {
        let identity = Identity { uid: 0, gid: 0, mode: 0o600, attributes: Vec::new() };
        let empty =
            Content { chunks: BTreeMap::new(), length: 0, identity, modified_ns: now, changed_ns: now };
        let state = State { live: empty.clone(), durable: empty, links: 1 };
        Self { number, state: Mutex::new(state), locks: Mutex::default() }
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn set_locks(&self, locks: ImageLocks) {
        lock(&self.locks).foreign = locks;
    }

    pub(super) fn change_links(&self, by: i64, now: i128) {
        let mut state = lock(&self.state);
        state.links = state.links.saturating_add_signed(by);
        state.live.changed_ns = now;
    }

    pub(super) fn links(&self) -> u64 {
        lock(&self.state).links
    }

    pub(super) fn set_links(&self, links: u64) {
        lock(&self.state).links = links;
    }

    /// How many of these chunks there are.
    pub(super) fn chunks(&self, first: u64, end: u64) -> u64 {
        lock(&self.state).live.chunks.range(first..end).count() as u64
    }

    /// Only what was synced is left, or, with dice, parts of the rest too.
    pub(super) fn crash(&self, dice: Option<&mut Dice>) {
        let mut state = lock(&self.state);
        let left = match dice {
            Some(dice) => state.durable.partly(&state.live, dice),
            None => state.durable.clone(),
        };
        state.live = left.clone();
        state.durable = left;
        *lock(&self.locks) = Locks::default();
    }

    pub(super) fn stat(&self) -> Stat {
        let state = lock(&self.state);
        let live = &state.live;
        Stat {
            kind: FileKind::File,
            id: FileId { device: DEVICE, inode: self.number },
            length: live.length,
            allocated_bytes: CHUNK.saturating_mul(live.chunks.len() as u64),
            modified_ns: live.modified_ns,
            changed_ns: live.changed_ns,
            links: state.links,
            uid: live.identity.uid,
            gid: live.identity.gid,
            mode: live.identity.mode,
        }
    }
}

/// The chunks that a range touches: number, first byte inside, count.
fn touched(offset: u64, length: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut at = offset;
    let end = offset.saturating_add(length);
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let within = at % CHUNK;
        let count = (CHUNK - within).min(end - at);
        let chunk = at / CHUNK;
        at += count;
        Some((chunk, small(within), small(count)))
    })
}

/// A number that is at most [`CHUNK`].
fn small(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(CHUNK_BYTES)
}

impl Content {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> usize {
        let there = self.length.saturating_sub(offset).min(buffer.len() as u64);
        let mut rest = buffer;
        let mut done = 0;
        for (chunk, within, count) in touched(offset, there) {
            let (part, next) = rest.split_at_mut(count);
            match self.chunks.get(&chunk) {
                Some(bytes) => part.copy_from_slice(&bytes[within..within + count]),
                None => part.fill(0),
            }
            rest = next;
            done += count;
        }
        done
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut rest = data;
        for (chunk, within, count) in touched(offset, data.len() as u64) {
            let (part, next) = rest.split_at(count);
            let bytes = self.chunks.entry(chunk).or_insert_with(|| Arc::new(vec![0; CHUNK_BYTES]));
            Arc::make_mut(bytes)[within..within + count].copy_from_slice(part);
            rest = next;
        }
        if !data.is_empty() {
            self.length = self.length.max(offset + data.len() as u64);
        }
    }

    fn zero(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length);
        let (first, last) = (offset.div_ceil(CHUNK), end / CHUNK);
        if first < last {
            let whole: Vec<u64> = self.chunks.range(first..last).map(|(&chunk, _)| chunk).collect();
            for chunk in whole {
                self.chunks.remove(&chunk);
            }
        }
        let edges = [(offset, (first * CHUNK).min(end)), ((last * CHUNK).max(offset), end)];
        for (start, stop) in edges {
            for (chunk, within, count) in touched(start, stop.saturating_sub(start)) {
                if let Some(bytes) = self.chunks.get_mut(&chunk) {
                    Arc::make_mut(bytes)[within..within + count].fill(0);
                }
            }
        }
    }

    /// This content with some of the changes that `live` has: of a piece that differs all, nothing, or
    /// single sectors; of length and attributes all or nothing.
    fn partly(&self, live: &Self, dice: &mut Dice) -> Self {
        let mut left = self.clone();
        if dice.keeps() {
            (left.modified_ns, left.changed_ns) = (live.modified_ns, live.changed_ns);
            left.identity.clone_from(&live.identity);
        }
        let length = if dice.keeps() { live.length } else { self.length };
        let numbers: BTreeSet<u64> = self.chunks.keys().chain(live.chunks.keys()).copied().collect();
        for number in numbers {
            let (old, new) = (self.chunks.get(&number), live.chunks.get(&number));
            if matches!((old, new), (Some(old), Some(new)) if Arc::ptr_eq(old, new)) || !dice.keeps() {
                continue;
            }
            let torn = dice.roll().is_multiple_of(4);
            match new {
                Some(new) if !torn => drop(left.chunks.insert(number, Arc::clone(new))),
                Some(new) => {
                    let empty = || Arc::new(vec![0; CHUNK_BYTES]);
                    let bytes = Arc::make_mut(left.chunks.entry(number).or_insert_with(empty));
                    let sectors = bytes.chunks_mut(SECTOR_BYTES).zip(new.chunks(SECTOR_BYTES));
                    let kept = sectors.filter(|_| dice.roll().is_multiple_of(2));
                    kept.for_each(|(into, from)| into.copy_from_slice(from));
                }
                None => drop(left.chunks.remove(&number)),
            }
        }
        // What lies past the end is gone, and zeros if the file ever grows again.
        left.length = left.length.max(live.length);
        left.set_length(length);
        left
    }

    fn set_length(&mut self, length: u64) {
        if length < self.length {
            self.zero(length, self.length - length);
            self.chunks.split_off(&length.div_ceil(CHUNK));
        }
        self.length = length;
    }
}

#[derive(Debug)]
pub(super) struct MemoryFile {
    shared: Arc<Shared>,
    inode: Arc<Inode>,
    path: StorePath,
    writable: bool,
    clones: bool,
    crashes: u64,
    /// Which open file it is.
    number: u64,
}

impl MemoryFile {
    pub(super) fn new(
        shared: Arc<Shared>,
        inode: Arc<Inode>,
        path: StorePath,
        writable: bool,
        clones: bool,
    ) -> Self {
        let crashes = shared.crashes.load(Ordering::Relaxed);
        let number = shared.opens.fetch_add(1, Ordering::Relaxed);
        Self { shared, inode, path, writable, clones, crashes, number }
    }

    fn alive(&self, action: &'static str) -> Result<()> {
        if self.shared.crashes.load(Ordering::Relaxed) == self.crashes {
            return Ok(());
        }
        Err(failed(action, &self.path, Errno::STALE))
    }

    /// Checks that bytes up to `end` may be written.
    fn may_write(&self, action: &'static str, end: Option<u64>) -> Result<()> {
        self.alive(action)?;
        if !self.writable {
            return Err(failed(action, &self.path, Errno::BADF));
        }
        match end {
            Some(end) if i64::try_from(end).is_ok() => Ok(()),
            _ => Err(failed(action, &self.path, Errno::FBIG)),
        }
    }

    fn change(&self, change: impl FnOnce(&mut Content)) {
        let now = self.shared.now();
        let mut state = lock(&self.inode.state);
        change(&mut state.live);
        (state.live.modified_ns, state.live.changed_ns) = (now, now);
    }

    fn cannot_clone(&self, why: &'static str) -> BackendError {
        let source = io::Error::new(io::ErrorKind::Unsupported, why);
        BackendError::CannotClone { path: self.path.to_string(), source }
    }

    /// Refuses what a file system that clones would refuse.
    fn check_clones(&self, sources: &[Arc<dyn StoreFile>], lengths: &[u64], batch: &Batch) -> Result<()> {
        if !self.clones {
            return Err(self.cannot_clone("this store does not clone"));
        }
        let own = |source: &Arc<dyn StoreFile>| {
            let file = source.as_any().downcast_ref::<Self>();
            file.is_some_and(|file| Arc::ptr_eq(&file.shared, &self.shared))
        };
        if !sources.iter().all(own) {
            return Err(self.cannot_clone("the source is in another store"));
        }
        let aligned = |piece: &Move| {
            let at_end = lengths.get(piece.source) == Some(&(piece.from + piece.length));
            [piece.from, piece.to].iter().all(|at| at.is_multiple_of(CHUNK))
                && (piece.length.is_multiple_of(CHUNK) || at_end)
        };
        if batch.pieces.iter().all(aligned) {
            Ok(())
        } else {
            Err(self.cannot_clone("not aligned to 4096 bytes"))
        }
    }

    /// Shares the whole chunks of one piece with its source.
    fn share(&self, sources: &[Arc<dyn StoreFile>], piece: &Move) {
        let source = sources.get(piece.source).and_then(|source| source.as_any().downcast_ref::<Self>());
        let Some(source) = source else { return };
        let (first, count) = (piece.from / CHUNK, piece.length / CHUNK);
        let chunks: Vec<_> = {
            let state = lock(&source.inode.state);
            let range = state.live.chunks.range(first..first + count);
            range.map(|(&chunk, bytes)| (chunk, Arc::clone(bytes))).collect()
        };
        self.change(|content| {
            content.zero(piece.to, count * CHUNK);
            content
                .chunks
                .extend(chunks.into_iter().map(|(chunk, bytes)| (chunk - first + piece.to / CHUNK, bytes)));
        });
    }

    fn copy(&self, sources: &[Arc<dyn StoreFile>], piece: &Move) -> Result<()> {
        let Some(source) = sources.get(piece.source) else { return Ok(()) };
        for (from, length) in parts(piece.from, piece.length, 1 << 20) {
            let mut buffer = vec![0; usize::try_from(length).unwrap_or_default()];
            read_padded(source.as_ref(), from, &mut buffer)?;
            self.write_at(piece.to + (from - piece.from), &buffer)?;
        }
        Ok(())
    }
}

impl StoreFile for MemoryFile {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn path(&self) -> &StorePath {
        &self.path
    }

    fn stat(&self) -> Result<Stat> {
        self.alive("look at")?;
        Ok(self.inode.stat())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        self.alive("read")?;
        Ok(lock(&self.inode.state).live.read(offset, buffer))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.may_write("write", offset.checked_add(data.len() as u64))?;
        self.change(|content| content.write(offset, data));
        Ok(())
    }

    fn set_length(&self, length: u64) -> Result<()> {
        self.may_write("set the length of", Some(length))?;
        self.change(|content| content.set_length(length));
        Ok(())
    }

    fn reserve(&self, offset: u64, length: u64) -> Result<bool> {
        let action = "reserve space for";
        let end = offset.checked_add(length);
        self.may_write(action, end)?;
        let end = end.unwrap_or(offset).div_ceil(CHUNK);
        if length == 0 || lock(&self.shared.room).reserve(&self.inode, offset / CHUNK, end) {
            return Ok(true);
        }
        Err(failed(action, &self.path, Errno::NOSPC))
    }

    fn punch(&self, offset: u64, length: u64) -> Result<bool> {
        self.may_write("punch a hole into", offset.checked_add(length))?;
        self.change(|content| content.zero(offset, length));
        Ok(true)
    }

    fn move_runs(&self, sources: &[Arc<dyn StoreFile>], runs: &[Move], means: Means) -> Result<Moved> {
        let action = "move runs into";
        self.may_write(action, Some(0))?;
        let lengths = sources.iter().map(|source| Ok(source.stat()?.length)).collect::<Result<Vec<u64>>>()?;
        let batch =
            Batch::new(&lengths, runs).map_err(|error| BackendError::from_io(action, &self.path, error))?;
        if means == Means::Clone {
            self.check_clones(sources, &lengths, &batch)?;
        }
        self.change(|content| {
            content.length = content.length.max(batch.end);
            batch.zeros.iter().for_each(|&(start, length)| content.zero(start, length));
        });
        let mut moved = Moved::default();
        for piece in &batch.pieces {
            let shared = if means == Means::Clone { piece.length - piece.length % CHUNK } else { 0 };
            if shared > 0 {
                self.share(sources, piece);
            }
            let rest = Move {
                from: piece.from + shared,
                to: piece.to + shared,
                length: piece.length - shared,
                ..*piece
            };
            self.copy(sources, &rest)?;
            moved += Moved { cloned_bytes: shared, copied_bytes: rest.length };
        }
        Ok(moved)
    }

    fn sync(&self) -> Result<()> {
        self.alive("sync")?;
        let mut state = lock(&self.inode.state);
        state.durable = state.live.clone();
        Ok(())
    }

    fn drop_cache(&self) -> Result<()> {
        self.alive("drop the cache of")
    }

    fn identity(&self) -> Result<Identity> {
        self.alive("read the attributes of")?;
        Ok(lock(&self.inode.state).live.identity.clone())
    }

    fn set_identity(&self, identity: &Identity) -> Result<()> {
        self.alive("give its owner and attributes to")?;
        let now = self.shared.now();
        let mut state = lock(&self.inode.state);
        state.live.identity = identity.clone();
        state.live.identity.attributes.sort();
        state.live.changed_ns = now;
        Ok(())
    }

    fn image_locks(&self) -> Result<ImageLocks> {
        self.alive("ask the locks of")?;
        let locks = lock(&self.inode.locks);
        let held = locks.holders.keys().any(|&number| number != self.number);
        Ok(ImageLocks { any: locks.foreign.any || held, ..locks.foreign })
    }

    fn hold_image_locks(&self) -> Result<Option<Box<dyn Send + Sync>>> {
        self.alive("take the image locks of")?;
        let mut locks = lock(&self.inode.locks);
        if locks.foreign.writer {
            return Ok(None);
        }
        *locks.holders.entry(self.number).or_default() += 1;
        Ok(Some(Box::new(Held { inode: Arc::clone(&self.inode), number: self.number })))
    }
}

/// Image locks held through one open file.
struct Held {
    inode: Arc<Inode>,
    number: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut locks = lock(&self.inode.locks);
        // Gone already after a crash.
        if let Some(count) = locks.holders.get_mut(&self.number) {
            *count -= 1;
            if *count == 0 {
                locks.holders.remove(&self.number);
            }
        }
    }
}
