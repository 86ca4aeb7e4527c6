//! A store that is a directory of a mounted file system.
//!
//! Owns: resolution below the root without following links, opening, naming, durability. Does not own: the
//! root directory's own place, which the operator chose and which may be reached over symbolic links.
//!
//! The crash rule is the kernel's: `fsync` of a file, `fsync` of a directory. Every call blocks, on a
//! network mount for as long as the server takes. A call that a signal interrupted is made again.

mod file;
mod flock;
mod identity;
mod locks;
mod moves;
mod output;
mod probe;
mod resolve;
mod walk;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RenameFlags, StatxFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Resource, getrlimit, setrlimit};

use self::file::PosixFile;
pub use self::output::StandardOutput;
use self::resolve::Resolver;
use super::error::{NO_EXCHANGE, NO_LINKS};
use super::{
    Backend, BackendError, Capabilities, DirEntry, FileId, FileKind, LockKind, Result, Space, Stat,
    StoreFile, WalkEntry,
};
use crate::ids::StorePath;

/// How files are opened: a link is not followed, a pipe does not block, a terminal does not become ours.
const PLAIN: OFlags = OFlags::NONBLOCK.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NOCTTY);

/// How what a name stands for is looked at, be it a link, without opening it.
const NAMED: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A directory of a mount, as a store.
#[derive(Debug)]
pub struct PosixStore {
    shown: PathBuf,
    resolver: Resolver,
    mounts: Mutex<HashMap<StorePath, (Instant, Mount)>>,
}

/// A file system, and which mount of it, as far as the kernel tells.
type Mount = (u64, Option<u64>);

/// How long a look at a mount holds.
const MOUNT_KNOWN: Duration = Duration::from_secs(5);

impl PosixStore {
    /// Opens the store at an existing directory. The directory is held open: if it is renamed or something
    /// is mounted over it, the store stays the one that was opened. Blocks.
    pub fn open(root: &Path) -> Result<Self> {
        Self::with_resolver(root, Resolver::new)
    }

    /// As [`PosixStore::open`], but never asks the kernel to resolve a path in one call (`openat2`); every
    /// component is opened by itself. Older kernels and some sandboxes leave no other way, which `open`
    /// finds out by itself; this is for testing that way.
    pub fn open_by_components(root: &Path) -> Result<Self> {
        Self::with_resolver(root, Resolver::by_components)
    }

    fn with_resolver(root: &Path, resolver: fn(OwnedFd) -> Resolver) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            fs::open(root, flags, Mode::empty()).map_err(|errno| failed("open", root.display(), errno))?;
        Ok(Self { shown: root.to_owned(), resolver: resolver(directory), mounts: Mutex::default() })
    }

    fn parent<'p>(&self, action: &'static str, path: &'p StorePath) -> Result<(OwnedFd, &'p str)> {
        self.resolver.parent(path).map_err(|errno| failed(action, path, errno))
    }

    fn directory(&self, action: &'static str, path: &StorePath) -> Result<OwnedFd> {
        self.resolver.directory(path, OFlags::RDONLY).map_err(|errno| failed(action, path, errno))
    }

    /// The mount that leads to a directory. One look holds for a moment: who is wrong about it after that finds that nothing
    /// can be linked or moved there, and nothing else.
    fn mount(&self, path: &StorePath) -> Result<Mount> {
        let known = || self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        {
            let mut known = known();
            known.retain(|_, (since, _)| now.duration_since(*since) < MOUNT_KNOWN);
            if let Some((_, mount)) = known.get(path) {
                return Ok(*mount);
            }
        }
        let directory = self.directory("look at", path)?;
        let mount = mount_of(&directory).map_err(|errno| failed("look at", path, errno))?;
        known().insert(path.clone(), (now, mount));
        Ok(mount)
    }

    fn open_as(&self, action: &'static str, path: &StorePath, flags: OFlags) -> Result<PosixFile> {
        let (flags, mode) = (flags | PLAIN, Mode::RUSR | Mode::WUSR);
        let opened = if let Some(opened) = self.resolver.file(path, flags, mode) {
            opened
        } else {
            let (directory, name) = self.parent(action, path)?;
            when_lease_is_back(|| fs::openat(&directory, name, flags, mode))
        };
        let opened = opened.map_err(|errno| failed(action, path, errno))?;
        let kind = retry_on_intr(|| fs::fstat(&opened)).map_err(|errno| failed(action, path, errno))?;
        if FileType::from_raw_mode(kind.st_mode) != FileType::RegularFile {
            return Err(BackendError::NotPlain { path: path.to_string() });
        }
        Ok(PosixFile::new(File::from(opened), path.clone()))
    }

    /// The parent and name of something that must be a regular file, or, with `or_nothing`, may be missing.
    /// Only tells mistakes early: the calls that follow act on the name itself and follow nothing.
    fn plain<'p>(
        &self,
        action: &'static str,
        path: &'p StorePath,
        or_nothing: bool,
    ) -> Result<(OwnedFd, &'p str)> {
        let (directory, name) = self.parent(action, path)?;
        match stat_name(&directory, name) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {}
            Ok(_) => return Err(BackendError::NotPlain { path: path.to_string() }),
            Err(Errno::NOENT) if or_nothing => {}
            Err(errno) => return Err(failed(action, path, errno)),
        }
        Ok((directory, name))
    }
}

impl Backend for PosixStore {
    fn describe(&self) -> String {
        self.shown.display().to_string()
    }

    fn open(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        Ok(Arc::new(self.open_as("open", path, OFlags::RDONLY)?))
    }

    fn open_writable(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        Ok(Arc::new(self.open_as("open", path, OFlags::RDWR)?))
    }

    fn create(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        Ok(Arc::new(self.open_as("create", path, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?))
    }

    fn stat(&self, path: &StorePath) -> Result<Stat> {
        let action = "look at";
        let found = if path.is_root() {
            let root = self.directory(action, path)?;
            retry_on_intr(|| fs::fstat(&root))
        } else if let Some(opened) = self.resolver.file(path, NAMED, Mode::empty()) {
            opened.and_then(|named| retry_on_intr(|| fs::fstat(&named)))
        } else {
            let (directory, name) = self.parent(action, path)?;
            stat_name(&directory, name)
        };
        found.map(|stat| stat_of(&stat)).map_err(|errno| failed(action, path, errno))
    }

    fn read_dir(&self, path: &StorePath) -> Result<Vec<DirEntry>> {
        let action = "list";
        let directory = self.directory(action, path)?;
        let mut names = fs::Dir::new(directory).map_err(|errno| failed(action, path, errno))?;
        let mut entries = Vec::new();
        while let Some(entry) = names.next() {
            let entry = entry.map_err(|errno| failed(action, path, errno))?;
            let raw = entry.file_name();
            if raw == c"." || raw == c".." {
                continue;
            }
            let kind = match entry.file_type() {
                // Some file systems do not tell the kind with the name.
                FileType::Unknown => {
                    let stat = names.fd().and_then(|fd| fs::statat(fd, raw, AtFlags::SYMLINK_NOFOLLOW));
                    match stat {
                        Ok(stat) => kind_of(FileType::from_raw_mode(stat.st_mode)),
                        Err(Errno::NOENT) => continue,
                        Err(errno) => return Err(failed(action, path, errno)),
                    }
                }
                told => kind_of(told),
            };
            let lossy = raw.to_string_lossy().into_owned();
            let valid = raw.to_str().is_ok_and(|name| StorePath::root().join(name).is_ok());
            entries.push(DirEntry { name: if valid { Ok(lossy) } else { Err(lossy) }, kind });
        }
        Ok(entries)
    }

    fn walk(
        &self,
        path: &StorePath,
        max_depth: usize,
        skip: &dyn Fn(&StorePath) -> bool,
    ) -> Vec<Result<WalkEntry>> {
        walk::walk(|path| self.read_dir(path), path, max_depth, skip)
    }

    fn create_dir(&self, path: &StorePath, private: bool) -> Result<()> {
        let action = "create";
        if path.is_root() {
            return Err(BackendError::AlreadyExists { path: path.to_string() });
        }
        let bits = if private { 0o700 } else { 0o755 };
        let (directory, name) = self.parent(action, path)?;
        retry_on_intr(|| fs::mkdirat(&directory, name, Mode::from_raw_mode(bits)))
            .and_then(|()| open_up(&directory, name, bits))
            .map_err(|errno| failed(action, path, errno))
    }

    fn remove_file(&self, path: &StorePath) -> Result<()> {
        let (directory, name) = self.plain("remove", path, false)?;
        retry_on_intr(|| fs::unlinkat(&directory, name, AtFlags::empty()))
            .map_err(|errno| failed("remove", path, errno))
    }

    fn remove_dir(&self, path: &StorePath) -> Result<()> {
        let (directory, name) = self.parent("remove", path)?;
        retry_on_intr(|| fs::unlinkat(&directory, name, AtFlags::REMOVEDIR))
            .map_err(|errno| failed("remove", path, errno))
    }

    fn rename(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        let (old_directory, old) = self.plain("rename", from, false)?;
        let (new_directory, new) = self.plain("replace", to, true)?;
        retry_on_intr(|| fs::renameat(&old_directory, old, &new_directory, new)).map_err(
            |errno| match errno {
                Errno::NOENT => failed("rename", from, errno),
                _ => failed("replace", to, errno),
            },
        )
    }

    fn exchange(&self, a: &StorePath, b: &StorePath) -> Result<()> {
        let action = "exchange";
        let first = self.plain(action, a, false)?;
        let second = self.plain(action, b, false)?;
        swap(&first, &second).map_err(|errno| {
            // The file that went in this moment.
            let gone = errno == Errno::NOENT && matches!(stat_name(&second.0, second.1), Err(Errno::NOENT));
            let path = if gone { b } else { a };
            match failed(action, path, errno) {
                BackendError::Io { source, .. } => {
                    BackendError::from_io_of(NO_EXCHANGE, action, path, source)
                }
                error => error,
            }
        })
    }

    fn rename_dir(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        let (old_directory, old) = self.parent("rename", from)?;
        let (new_directory, new) = self.parent("replace", to)?;
        for (directory, name, path) in [(&old_directory, old, from), (&new_directory, new, to)] {
            match stat_name(directory, name) {
                Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {}
                Err(Errno::NOENT) if path == to => {}
                Ok(_) if path == to => return Err(BackendError::AlreadyExists { path: to.to_string() }),
                Ok(_) => return Err(BackendError::NotPlain { path: path.to_string() }),
                Err(errno) => return Err(failed("rename", path, errno)),
            }
        }
        match retry_on_intr(|| fs::renameat(&old_directory, old, &new_directory, new)) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => Err(BackendError::AlreadyExists { path: to.to_string() }),
            done => done.map_err(|errno| failed("replace", to, errno)),
        }
    }

    fn hard_link(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        let (old_directory, old) = self.plain("link", from, false)?;
        let (new_directory, new) = self.parent("create", to)?;
        let linked = retry_on_intr(|| fs::linkat(&old_directory, old, &new_directory, new, AtFlags::empty()));
        linked.map_err(|errno| match errno {
            Errno::NOENT => failed("link", from, errno),
            errno if NO_LINKS.contains(&errno) => {
                BackendError::from_io_of(NO_LINKS, "link", to, errno.into())
            }
            _ => failed("create", to, errno),
        })
    }

    fn same_mount(&self, a: &StorePath, b: &StorePath) -> Result<bool> {
        Ok(self.mount(a)? == self.mount(b)?)
    }

    fn sync_dir(&self, path: &StorePath) -> Result<()> {
        let directory = self.directory("sync", path)?;
        retry_on_intr(|| fs::fsync(&directory)).map_err(|errno| failed("sync", path, errno))
    }

    fn space(&self) -> Result<Space> {
        flock::space(&self.shown).map_err(|error| failed("ask the space of", self.shown.display(), error))
    }

    fn try_lock(&self, path: &StorePath, kind: LockKind) -> Result<Option<Box<dyn Send + Sync>>> {
        let file = self.open_as("lock", path, OFlags::RDWR | OFlags::CREATE)?;
        flock::try_lock(file.into_file(), kind).map_err(|error| failed("lock", path, error))
    }

    fn local_path(&self, path: &StorePath) -> Option<PathBuf> {
        let root = self.directory("look at", &StorePath::root()).ok()?;
        let (is, by_name) = (fs::fstat(&root).ok()?, fs::stat(&self.shown).ok()?);
        // Renamed or mounted over: another program would find other files there.
        if (is.st_dev, is.st_ino) != (by_name.st_dev, by_name.st_ino) {
            return None;
        }
        // Also keeps a name with a colon from being taken for a protocol's.
        let shown = std::path::absolute(&self.shown).ok()?;
        Some(if path.is_root() { shown } else { shown.join(path.as_str()) })
    }

    fn probe(&self, scratch: &StorePath) -> Result<Capabilities> {
        probe::probe(self, scratch)
    }
}

/// The file system of a directory, and which mount of it leads there, as far as the kernel tells (5.8).
fn mount_of(directory: &OwnedFd) -> rustix::io::Result<Mount> {
    let device = retry_on_intr(|| fs::fstat(directory))?.st_dev;
    let asked = StatxFlags::MNT_ID;
    let told = retry_on_intr(|| fs::statx(directory, c"", AtFlags::EMPTY_PATH, asked));
    let told = told.ok().filter(|told| told.stx_mask & asked.bits() != 0);
    Ok((device, told.map(|told| told.stx_mnt_id)))
}

fn stat_name(directory: &OwnedFd, name: &str) -> rustix::io::Result<fs::Stat> {
    retry_on_intr(|| fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW))
}

/// Swaps two names. Made again after an interruption only if it did not happen: twice would be not at all.
fn swap(a: &(OwnedFd, &str), b: &(OwnedFd, &str)) -> rustix::io::Result<()> {
    let id = || stat_name(&a.0, a.1).map(|stat| (stat.st_dev, stat.st_ino));
    let before = id()?;
    loop {
        match fs::renameat_with(&a.0, a.1, &b.0, b.1, RenameFlags::EXCHANGE) {
            Err(Errno::INTR) if id()? == before => {}
            Err(Errno::INTR) => return Ok(()),
            done => return done,
        }
    }
}

/// Raises the number of files that this process may have open to the most it is allowed, and returns that
/// number (`u64::MAX` without a limit). A store with long chains needs many; the default is often 1,024.
/// If the system refuses, the limit stays what it was. Does not block.
#[expect(clippy::must_use_candidate, reason = "called for what it does")]
pub fn raise_file_limit() -> u64 {
    let mut limit = getrlimit(Resource::Nofile);
    let before = limit.current;
    limit.current = limit.maximum;
    let now = if setrlimit(Resource::Nofile, limit).is_ok() { limit.maximum } else { before };
    now.unwrap_or(u64::MAX)
}

/// A directory's mode bits that the process's file mode mask took away are given back; bits that the file
/// system added (an inherited set-group-id) stay.
fn open_up(parent: &OwnedFd, name: &str, bits: u32) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = match fs::openat(parent, name, flags, Mode::empty()) {
        // A mask that takes the owner's own right to read also takes the means to mend it.
        Err(Errno::ACCESS) => return Ok(()),
        other => other?,
    };
    let has = fs::fstat(&made)?.st_mode & 0o7777;
    if has & 0o777 == bits {
        return Ok(());
    }
    fs::fchmod(&made, Mode::from_raw_mode((has & 0o7000) | bits))
}

/// Tries to open until whoever has a lease on the file gave it back: with `O_NONBLOCK`, which keeps pipes
/// from blocking us, the kernel answers EAGAIN meanwhile (an NFS server's delegation, a Samba oplock). It
/// takes the lease away after `/proc/sys/fs/lease-break-time`, 45 s by default.
fn when_lease_is_back(mut open: impl FnMut() -> rustix::io::Result<OwnedFd>) -> rustix::io::Result<OwnedFd> {
    let pause = Duration::from_millis(50);
    for _ in 0..1200 {
        match open() {
            Err(Errno::AGAIN) => thread::sleep(pause),
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
    open()
}

/// A system error as the store's own: what stands in the way of plain files is told apart.
fn failed(action: &'static str, path: impl ToString, error: impl Into<io::Error>) -> BackendError {
    let source: io::Error = error.into();
    // ELOOP: a symbolic link that was not followed. EISDIR, ENXIO, ENODEV: a directory, a pipe without
    // reader or a socket, a device without driver where a file was wanted.
    match Errno::from_io_error(&source) {
        Some(Errno::LOOP | Errno::ISDIR | Errno::NXIO | Errno::NODEV) => {
            BackendError::NotPlain { path: path.to_string() }
        }
        _ => BackendError::from_io(action, path, source),
    }
}

fn kind_of(kind: FileType) -> FileKind {
    match kind {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        _ => FileKind::Special,
    }
}

fn stat_of(stat: &fs::Stat) -> Stat {
    let at = |seconds: i64, nanoseconds: i128| i128::from(seconds) * 1_000_000_000 + nanoseconds;
    Stat {
        kind: kind_of(FileType::from_raw_mode(stat.st_mode)),
        id: FileId { device: stat.st_dev, inode: stat.st_ino },
        length: u64::try_from(stat.st_size).unwrap_or(0),
        allocated_bytes: u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512),
        modified_ns: at(stat.st_mtime, i128::from(stat.st_mtime_nsec)),
        changed_ns: at(stat.st_ctime, i128::from(stat.st_ctime_nsec)),
        links: stat.st_nlink,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mode: stat.st_mode & 0o7777,
    }
}
