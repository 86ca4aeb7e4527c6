//! From a path to an open directory, never over a symbolic link, never out of the root.
//!
//! The kernel does it in one call where it has `openat2`. It may cross into other mounts below the root:
//! an operator may have mounted parts of a store by themselves.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, Result, retry_on_intr};

use crate::ids::StorePath;

/// How often a path is tried again when a directory on it was renamed meanwhile (`openat2` says EAGAIN).
const RACES: usize = 16;

/// Nothing but names below the root.
const RULES: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

#[derive(Debug)]
pub(super) struct Resolver {
    root: OwnedFd,
    /// Whether `openat2` is worth a try.
    in_one_call: AtomicBool,
}

impl Resolver {
    pub(super) fn new(root: OwnedFd) -> Self {
        Self { root, in_one_call: AtomicBool::new(true) }
    }

    pub(super) fn by_components(root: OwnedFd) -> Self {
        Self { root, in_one_call: AtomicBool::new(false) }
    }

    /// Opens a directory with `access` (`RDONLY`, or `PATH` to name things in it). A symbolic link
    /// anywhere is ELOOP, something else that is no directory ENOTDIR.
    pub(super) fn directory(&self, path: &StorePath, access: OFlags) -> Result<OwnedFd> {
        let flags = access | OFlags::DIRECTORY | OFlags::CLOEXEC;
        if path.is_root() {
            return retry_on_intr(|| fs::openat(&self.root, ".", flags, Mode::empty()));
        }
        if !self.in_one_call.load(Ordering::Relaxed) {
            return self.walk(path, flags);
        }
        match self.one_call(path, flags) {
            // Not there (old kernel), forbidden (a sandbox), or a flag it does not know. Such an errno can
            // also be the path's own, so it counts as openat2's only if the other way works.
            Err(Errno::NOSYS | Errno::PERM | Errno::INVAL) => {
                let opened = self.walk(path, flags)?;
                self.in_one_call.store(false, Ordering::Relaxed);
                Ok(opened)
            }
            Err(Errno::AGAIN) => self.walk(path, flags),
            done => done,
        }
    }

    /// The directory that a path lies in, for naming things there, and the path's last component. A file
    /// on the way means that the path does not exist; the root itself lies nowhere (EISDIR).
    pub(super) fn parent<'p>(&self, path: &'p StorePath) -> Result<(OwnedFd, &'p str)> {
        if path.is_root() {
            return Err(Errno::ISDIR);
        }
        match self.directory(&path.parent(), OFlags::PATH) {
            Ok(directory) => Ok((directory, path.file_name())),
            Err(Errno::NOTDIR) => Err(Errno::NOENT),
            Err(errno) => Err(errno),
        }
    }

    /// Opens a file in one call, with flags that follow no link. `None` if that cannot be, or cannot be told from a mistake
    /// that is the path's own: [`Resolver::parent`] and a call of one's own say what it is.
    pub(super) fn file(&self, path: &StorePath, flags: OFlags, mode: Mode) -> Option<Result<OwnedFd>> {
        if path.is_root() || !self.in_one_call.load(Ordering::Relaxed) {
            return None;
        }
        // The kernel refuses a mode for a file that it is not asked to make.
        let mode = if flags.contains(OFlags::CREATE) { mode } else { Mode::empty() };
        match retry_on_intr(|| fs::openat2(&self.root, path.as_str(), flags, mode, RULES)) {
            done @ (Ok(_) | Err(Errno::NOENT | Errno::EXIST)) => Some(done),
            Err(_) => None,
        }
    }

    fn one_call(&self, path: &StorePath, flags: OFlags) -> Result<OwnedFd> {
        for _ in 0..RACES {
            match fs::openat2(&self.root, path.as_str(), flags, Mode::empty(), RULES) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                done => return done,
            }
        }
        Err(Errno::AGAIN)
    }

    fn walk(&self, path: &StorePath, last_flags: OFlags) -> Result<OwnedFd> {
        let mut at: Option<OwnedFd> = None;
        let mut components = path.components().peekable();
        while let Some(component) = components.next() {
            let here = at.as_ref().map_or(self.root.as_fd(), AsFd::as_fd);
            let flags = match components.peek() {
                Some(_) => OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                None => last_flags,
            };
            let open = || fs::openat(here, component, flags | OFlags::NOFOLLOW, Mode::empty());
            let opened = retry_on_intr(open).map_err(|errno| why(here, component, errno))?;
            at = Some(opened);
        }
        at.ok_or(Errno::NOENT)
    }
}

/// A link that is asked to be a directory and not to be followed is "not a directory": say what it is.
fn why(directory: BorrowedFd<'_>, component: &str, errno: Errno) -> Errno {
    if errno != Errno::NOTDIR {
        return errno;
    }
    match fs::statat(directory, component, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink => Errno::LOOP,
        _ => errno,
    }
}
