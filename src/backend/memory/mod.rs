//! A store in memory, for tests and for simulating a power cut.
//!
//! Everything exists twice: *live*, as calls see it, and *durable*, as a crash leaves it. A file's bytes
//! and attributes become durable by its `sync`, a directory's names by its `sync_dir`, and by nothing else:
//! more forgetful than most file systems, and just what the contract of [`Backend`] allows.
//! [`MemoryStore::crash`] makes the durable state the live one, [`MemoryStore::crash_seeded`] one of the
//! many between the two; files that were open then answer ESTALE.
//!
//! Bytes are kept in chunks of 4 KiB where something was written, so that a file of 60 TiB with little in
//! it costs little. Clones share chunks.

mod dice;
mod file;
mod names;
mod room;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;

use self::dice::Dice;
use self::file::{Inode, MemoryFile};
use self::names::{Entry, Names};
use self::room::Room;
use super::error::{NO_EXCHANGE, NO_LINKS};
use super::{
    Backend, BackendError, Capabilities, DirEntry, FileId, FileKind, ImageLocks, LockKind, Result, Space,
    Stat, StoreFile, WalkEntry,
};
use crate::ids::StorePath;

/// The device number of all memory stores; several stores in one test differ by inode ranges.
const DEVICE: u64 = 0x6d65_6d00;

/// A store in memory. Cloning the handle is by `Arc`.
#[derive(Debug)]
pub struct MemoryStore {
    shared: Arc<Shared>,
    clones: bool,
    hard_links: bool,
    exchanges: bool,
}

/// What the store and its open files share.
#[derive(Debug)]
struct Shared {
    names: Mutex<Names>,
    /// By file: of which kind, and how many.
    flocks: Mutex<BTreeMap<u64, (LockKind, u64)>>,
    /// Counts crashes: a file opened before one is dead.
    crashes: AtomicU64,
    clock: AtomicU64,
    inodes: AtomicU64,
    opens: AtomicU64,
    room: Mutex<Room>,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// An empty store on which clones work, with a root directory.
    #[must_use]
    pub fn new() -> Self {
        static STORES: AtomicU64 = AtomicU64::new(0);
        // Each store numbers its inodes from a start of its own: files of two stores never look the same.
        Self::numbered(STORES.fetch_add(1, Ordering::Relaxed))
    }

    /// As [`MemoryStore::new`], with the inode numbers of that store: the same each time. Two stores of one
    /// number have files that look the same.
    #[must_use]
    pub fn numbered(number: u64) -> Self {
        let first = number.wrapping_mul(1 << 32).wrapping_add(2);
        let shared = Shared {
            names: Mutex::new(Names::new(first - 1)),
            flocks: Mutex::default(),
            crashes: AtomicU64::new(0),
            clock: AtomicU64::new(0),
            inodes: AtomicU64::new(first),
            opens: AtomicU64::new(0),
            room: Mutex::new(Room::new(1 << 50)),
        };
        Self { shared: Arc::new(shared), clones: true, hard_links: true, exchanges: true }
    }

    /// The same store, with clones working or not.
    #[must_use]
    pub fn with_clone(self, works: bool) -> Self {
        Self { clones: works, ..self }
    }

    /// The same store, with hard links working or not, as on some network mounts.
    #[must_use]
    pub fn with_hard_links(self, work: bool) -> Self {
        Self { hard_links: work, ..self }
    }

    /// The same store, with [`Backend::exchange`] working or not, as on most network mounts.
    #[must_use]
    pub fn with_exchange(self, works: bool) -> Self {
        Self { exchanges: works, ..self }
    }

    /// A power cut: all that was not synced is gone. Open files and locks are dead.
    pub fn crash(&self) {
        self.restart(Names::crash, None);
    }

    /// A power cut after which all names are as they were last, but only synced bytes: what a file system
    /// may do that writes names out by itself, and why bytes are synced before a name is given.
    pub fn crash_keeping_names(&self) {
        self.restart(Names::crash_keeping_all, None);
    }

    /// A power cut after which the seed decides, for each change that was not synced, whether it is left.
    ///
    /// Of names: each call's change is left or lost as a whole, and none without the earlier ones of the
    /// same name; other changes may overtake each other. A change is left for sure if the directory of
    /// one of its names was synced since. Of bytes: a piece of 4 KiB is
    /// as it was synced or as it was last, or some of its sectors are; length and attributes likewise, each
    /// for itself. Different seeds also keep more or less of it all, some of them everything or nothing.
    pub fn crash_seeded(&self, seed: u64) {
        let mut dice = Dice::new(seed);
        let mut names = Dice::new(dice.roll());
        self.restart(|store| store.crash_by(&mut names), Some(&mut dice));
    }

    fn restart(&self, cut: impl FnOnce(&mut Names) -> Vec<Arc<Inode>>, mut dice: Option<&mut Dice>) {
        let mut names = lock(&self.shared.names);
        self.shared.crashes.fetch_add(1, Ordering::Relaxed);
        for inode in cut(&mut names) {
            inode.crash(dice.as_deref_mut());
        }
        lock(&self.shared.flocks).clear();
        lock(&self.shared.room).crash();
    }

    /// Sets what [`Backend::space`] tells, less what is reserved. Only [`StoreFile::reserve`] heeds it:
    /// writes succeed all the same.
    pub fn set_free_bytes(&self, bytes: u64) {
        lock(&self.shared.room).free = bytes;
    }

    /// Sets which image locks others seem to hold on a file.
    pub fn set_image_locks(&self, path: &StorePath, locks: ImageLocks) -> Result<()> {
        self.file(path)?.set_locks(locks);
        Ok(())
    }

    /// Puts a symbolic link (to nowhere) or special file at a free name.
    pub fn add_special(&self, path: &StorePath, kind: FileKind) -> Result<()> {
        let number = self.shared.inode();
        lock(&self.shared.names).add(path, Entry::Other(kind, number))
    }

    fn file(&self, path: &StorePath) -> Result<Arc<Inode>> {
        match lock(&self.shared.names).get(path)? {
            Entry::File(inode) => Ok(inode),
            _ => Err(BackendError::NotPlain { path: path.to_string() }),
        }
    }

    fn opened(&self, inode: Arc<Inode>, path: &StorePath, writable: bool) -> Arc<dyn StoreFile> {
        Arc::new(MemoryFile::new(Arc::clone(&self.shared), inode, path.clone(), writable, self.clones))
    }
}

impl Shared {
    /// Nanoseconds since 1970, later than ever before: every change can be told from the one before it.
    fn now(&self) -> i128 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let wall = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        let last = self.clock.fetch_max(wall, Ordering::Relaxed);
        if last < wall {
            return wall.into();
        }
        i128::from(self.clock.fetch_add(1, Ordering::Relaxed)) + 1
    }

    fn inode(&self) -> u64 {
        self.inodes.fetch_add(1, Ordering::Relaxed)
    }
}

/// A lock whose holder panicked guards values that are whole all the same.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(action: &'static str, path: &StorePath, errno: Errno) -> BackendError {
    BackendError::from_io(action, path, io::Error::from(errno))
}

impl Backend for MemoryStore {
    fn describe(&self) -> String {
        "memory".to_owned()
    }

    fn open(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        Ok(self.opened(self.file(path)?, path, false))
    }

    fn open_writable(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        Ok(self.opened(self.file(path)?, path, true))
    }

    fn create(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        let inode = Arc::new(Inode::new(self.shared.inode(), self.shared.now()));
        lock(&self.shared.names).add(path, Entry::File(Arc::clone(&inode)))?;
        Ok(self.opened(inode, path, true))
    }

    fn stat(&self, path: &StorePath) -> Result<Stat> {
        let entry = lock(&self.shared.names).get(path)?;
        let (kind, inode, mode) = match &entry {
            Entry::File(inode) => return Ok(inode.stat()),
            Entry::Directory(number, mode) => (FileKind::Directory, *number, *mode),
            Entry::Other(kind, number) => (*kind, *number, 0o777),
        };
        Ok(Stat {
            kind,
            id: FileId { device: DEVICE, inode },
            length: 0,
            allocated_bytes: 0,
            modified_ns: 0,
            changed_ns: 0,
            links: 1,
            uid: 0,
            gid: 0,
            mode,
        })
    }

    fn read_dir(&self, path: &StorePath) -> Result<Vec<DirEntry>> {
        let names = lock(&self.shared.names);
        let entries = names.list(path)?.iter();
        Ok(entries.map(|(name, entry)| DirEntry { name: Ok(name.clone()), kind: entry.kind() }).collect())
    }

    fn walk(
        &self,
        path: &StorePath,
        max_depth: usize,
        skip: &dyn Fn(&StorePath) -> bool,
    ) -> Vec<Result<WalkEntry>> {
        let found = match lock(&self.shared.names).walk(path, max_depth) {
            Ok(found) => found,
            Err(error) => return vec![Err(error)],
        };
        // The caller's function runs without the lock: it may well ask the store.
        let mut skipped: Option<String> = None;
        let mut entries = Vec::new();
        for (path, kind) in found {
            if skipped.as_ref().is_some_and(|prefix| path.as_str().starts_with(prefix)) {
                continue;
            }
            if kind == FileKind::Directory && skip(&path) {
                skipped = Some(format!("{path}/"));
            }
            entries.push(Ok(WalkEntry { path: Ok(path), kind }));
        }
        entries
    }

    fn create_dir(&self, path: &StorePath, private: bool) -> Result<()> {
        let number = self.shared.inode();
        let mode = if private { 0o700 } else { 0o755 };
        lock(&self.shared.names).add(path, Entry::Directory(number, mode))
    }

    fn remove_file(&self, path: &StorePath) -> Result<()> {
        let now = self.shared.now();
        lock(&self.shared.names).remove_file(path, now)
    }

    fn remove_dir(&self, path: &StorePath) -> Result<()> {
        lock(&self.shared.names).remove_dir(path)
    }

    fn rename(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        let now = self.shared.now();
        lock(&self.shared.names).rename(from, to, now)
    }

    fn exchange(&self, a: &StorePath, b: &StorePath) -> Result<()> {
        if !self.exchanges {
            return Err(BackendError::from_io_of(NO_EXCHANGE, "exchange", a, Errno::INVAL.into()));
        }
        let now = self.shared.now();
        lock(&self.shared.names).exchange(a, b, now)
    }

    fn rename_dir(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        lock(&self.shared.names).rename_dir(from, to)
    }

    fn hard_link(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        let inode = self.file(from)?;
        if !self.hard_links {
            return Err(BackendError::from_io_of(NO_LINKS, "link", to, Errno::PERM.into()));
        }
        lock(&self.shared.names).add(to, Entry::File(Arc::clone(&inode)))?;
        inode.change_links(1, self.shared.now());
        Ok(())
    }

    fn sync_dir(&self, path: &StorePath) -> Result<()> {
        lock(&self.shared.names).sync(path)
    }

    fn space(&self) -> Result<Space> {
        Ok(Space { free_bytes: lock(&self.shared.room).left(), total_bytes: 1 << 50 })
    }

    fn try_lock(&self, path: &StorePath, kind: LockKind) -> Result<Option<Box<dyn Send + Sync>>> {
        let number = match self.create(path) {
            Ok(file) => file.stat()?.id.inode,
            Err(BackendError::AlreadyExists { .. }) => self.file(path)?.stat().id.inode,
            Err(error) => return Err(error),
        };
        let mut flocks = lock(&self.shared.flocks);
        let (has, count) = flocks.entry(number).or_insert((kind, 0));
        if *count > 0 && (kind, *has) != (LockKind::Shared, LockKind::Shared) {
            return Ok(None);
        }
        *count += 1;
        let crashes = self.shared.crashes.load(Ordering::Relaxed);
        Ok(Some(Box::new(Flock { shared: Arc::clone(&self.shared), number, crashes })))
    }

    fn local_path(&self, _path: &StorePath) -> Option<PathBuf> {
        None
    }

    fn probe(&self, scratch: &StorePath) -> Result<Capabilities> {
        lock(&self.shared.names).list(scratch)?;
        Ok(Capabilities {
            clone: self.clones,
            clone_alignment: if self.clones { file::CHUNK } else { 0 },
            hard_links: self.hard_links,
            byte_range_locks: true,
            rename_exchange: self.exchanges,
            direct_io: false,
            network: false,
        })
    }
}

/// A lock held.
struct Flock {
    shared: Arc<Shared>,
    number: u64,
    crashes: u64,
}

impl Drop for Flock {
    fn drop(&mut self) {
        // A lock from before a crash is gone, and may be somebody else's by now.
        let mut flocks = lock(&self.shared.flocks);
        if self.shared.crashes.load(Ordering::Relaxed) != self.crashes {
            return;
        }
        if let Some((_, count)) = flocks.get_mut(&self.number) {
            *count -= 1;
            if *count == 0 {
                flocks.remove(&self.number);
            }
        }
    }
}

#[cfg(test)]
mod tests;
