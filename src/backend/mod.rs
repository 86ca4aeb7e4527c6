//! Bytes and names on one store: the only file I/O of the crate.
//!
//! Owns: opening, reading, writing, moving, naming and locking files below one root. Does not own: what is
//! in them. [`Backend`] is a store, [`StoreFile`] one open file on it; [`posix`] is a directory of a mount, [`nfs3`]
//! an export without one,
//! [`memory`] a store for tests and simulation, [`faulty`] wraps either and fails, delays or counts calls,
//! [`slow`] makes either as slow as a network mount. All pass one conformance suite ([`conformance`]). Only [`publish`] gives a file the name of another.
//!
//! Crash rule: after a successful [`StoreFile::sync`] the file's bytes and length survive a power cut; after
//! a successful [`Backend::sync_dir`] so do the names in that directory. Nothing else is promised.
//!
//! All calls block. None of them follows a symbolic link or leaves the root, whatever the names say.

pub mod conformance;
mod copying;
mod error;
pub mod faulty;
pub mod memory;
pub mod nfs3;
pub mod posix;
pub mod publish;
mod runs;
pub mod slow;
mod types;

use std::any::Any;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;

pub use error::{BackendError, Result};
pub use types::{
    Capabilities, DirEntry, FileId, FileKind, Identity, ImageLocks, LockKind, Means, Move, Moved, Space, Stat,
};

use crate::ids::StorePath;

/// One store.
///
/// Contract of every implementation: a path is resolved below the root, component by component, and a
/// symbolic link in it (also as last component) is [`BackendError::NotPlain`]; errors name the path; no call
/// retries a failed `sync`.
pub trait Backend: Send + Sync + Debug {
    /// What messages call the store: the directory, or the URL.
    fn describe(&self) -> String;

    /// Whether the store is known to be one that can only be read, so that nothing need be tried.
    fn read_only(&self) -> bool {
        false
    }

    /// Opens a regular file for reading. Never blocks on a pipe or device: anything but a regular file is
    /// [`BackendError::NotPlain`].
    fn open(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>>;

    /// Opens a regular file for reading and writing.
    fn open_writable(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>>;

    /// Makes a new empty file of mode 0600, open for reading and writing;
    /// [`BackendError::AlreadyExists`] if the name is taken, decided atomically by the store.
    fn create(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>>;

    /// Facts about a name, without following a symbolic link in the last component.
    fn stat(&self, path: &StorePath) -> Result<Stat>;

    /// The names in a directory, without `.` and `..`, in no order. A name that is no valid component is
    /// given with `name: Err(lossy text)`.
    fn read_dir(&self, path: &StorePath) -> Result<Vec<DirEntry>>;

    /// All names below a directory down to `max_depth` levels (1: its own entries), parents before
    /// children, sorted by name within a directory, iterative; `skip` names directories (by their path)
    /// not to enter. What cannot be read is reported as an error item and passed over.
    fn walk(
        &self,
        path: &StorePath,
        max_depth: usize,
        skip: &dyn Fn(&StorePath) -> bool,
    ) -> Vec<Result<WalkEntry>>;

    /// Makes a directory of mode 0700 (`private`) or 0755; [`BackendError::AlreadyExists`] if it is there.
    fn create_dir(&self, path: &StorePath, private: bool) -> Result<()>;

    /// Removes a name of a file. The bytes go when the last name and the last open file are gone.
    fn remove_file(&self, path: &StorePath) -> Result<()>;

    /// Removes an empty directory.
    fn remove_dir(&self, path: &StorePath) -> Result<()>;

    /// Gives a file another name, replacing what had it, atomically. Only [`publish`] calls this. If both
    /// names are one file, POSIX does nothing and reports success: callers compare file ids first.
    fn rename(&self, from: &StorePath, to: &StorePath) -> Result<()>;

    /// Swaps the files of two names, atomically: nobody ever finds either name missing or both of one file.
    /// Both must be regular files; two names of one file stay as they are. [`BackendError::is_unsupported`]
    /// where the store cannot, and nothing was changed. Only [`publish`] calls this. After a crash both
    /// names are swapped or neither; so the sync of either one's directory makes it last.
    fn exchange(&self, a: &StorePath, b: &StorePath) -> Result<()>;

    /// Gives a directory another name, atomically, with all that is in it. The name is free or that of an empty
    /// directory; else [`BackendError::AlreadyExists`]. [`BackendError::is_unsupported`] where the store cannot. Only
    /// [`publish`] calls this.
    fn rename_dir(&self, _from: &StorePath, to: &StorePath) -> Result<()> {
        let source = std::io::Error::from(std::io::ErrorKind::Unsupported);
        Err(BackendError::Unsupported { action: "move a directory to", path: to.to_string(), source })
    }

    /// Gives a file one more name; [`BackendError::AlreadyExists`] if it is taken,
    /// [`BackendError::is_unsupported`] where a file can have one name only. Only [`publish`] calls this.
    fn hard_link(&self, from: &StorePath, to: &StorePath) -> Result<()>;

    /// Whether a rename can lead from one directory to the other: whether they are on one file system, and
    /// are reached by one mount of it.
    fn same_mount(&self, a: &StorePath, b: &StorePath) -> Result<bool> {
        Ok(self.stat(a)?.id.device == self.stat(b)?.id.device)
    }

    /// Makes the names of a directory durable.
    fn sync_dir(&self, path: &StorePath) -> Result<()>;

    /// Free and total bytes.
    fn space(&self) -> Result<Space>;

    /// Takes an advisory lock on a (created if missing) file of qchain's own, without waiting; `None` if
    /// somebody (this process, too) has one that excludes it: an exclusive lock excludes all others, a
    /// shared one the exclusive ones. Dropping the guard frees it, as the end of the process does. A local
    /// hint only.
    fn try_lock(&self, path: &StorePath, kind: LockKind) -> Result<Option<Box<dyn Send + Sync>>>;

    /// Where those are, on a host of that name, whom [`Backend::try_lock`] excludes: processes that reach the store by
    /// another way see other locks.
    fn seen_from(&self, host: &str) -> String {
        host.to_owned()
    }

    /// The absolute path by which other programs on this host reach that name, whether or not it exists;
    /// `None` if there is none (a store that is no directory here, or whose directory is not at its place
    /// any more). The name is not looked at: a program that opens it follows links. May block.
    fn local_path(&self, path: &StorePath) -> Option<PathBuf>;

    /// What of that, found out by [`Backend::probe`] perhaps by another way to the same files, this way can have.
    fn of_known(&self, found: Capabilities) -> Capabilities {
        found
    }

    /// Finds out, by trying in `scratch` (an existing directory of qchain's own), what the store can do.
    /// Leaves nothing behind.
    fn probe(&self, scratch: &StorePath) -> Result<Capabilities>;
}

/// One name found by [`Backend::walk`].
#[derive(Clone, Debug)]
pub struct WalkEntry {
    /// Its path, or the lossy text of one that is no valid path.
    pub path: std::result::Result<StorePath, String>,
    /// What it is.
    pub kind: FileKind,
}

/// One open file. Positions are absolute; there is no cursor. Safe to use from many threads.
pub trait StoreFile: Send + Sync + Debug {
    /// For an implementation to recognise its own files as sources of a move.
    fn as_any(&self) -> &dyn Any;

    /// The name it was opened by.
    fn path(&self) -> &StorePath;

    /// Facts about the open file, whatever its names are now.
    fn stat(&self) -> Result<Stat>;

    /// Reads at `offset` until `buffer` is full or the file ends; the count is short only at the end.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize>;

    /// Tells the store that a range is going to be read soon, so that it is at hand by then. Returns at once, as far as
    /// the store can; does what it can.
    fn will_read(&self, _offset: u64, _length: u64) {}

    /// How many reads the store answers at once with profit, if more than there are processors: those of a server, which
    /// take their time. Else 0.
    fn reads_at_once(&self) -> usize {
        0
    }

    /// Where the first bytes at or behind `offset` are that take space: `offset` if those there do, or if the store
    /// cannot tell; `u64::MAX` if none do. What lies in between is a hole, and reads as zeros.
    fn data_from(&self, offset: u64) -> Result<u64> {
        Ok(offset)
    }

    /// Writes all of `data` at `offset`, growing the file if need be; new bytes in between are zeros. A store may
    /// tell an error later: by another write, or by [`StoreFile::sync`], which tells all of them.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()>;

    /// Sets the length; new bytes are zeros and take no space.
    fn set_length(&self, length: u64) -> Result<()>;

    /// Takes space for a range, so that writes to it cannot fail for the lack of it later; neither bytes nor
    /// length change. `false` if the store cannot promise that; [`BackendError::NoSpace`] if there is too
    /// little, a part may be taken then. Not covered: extents shared with other files (a write to one
    /// takes new space), and stores that never write in place. The space is given back with the file.
    /// After a crash it may be taken still or not.
    fn reserve(&self, offset: u64, length: u64) -> Result<bool>;

    /// Makes a range zeros by giving its space back, as far as it is whole blocks; the length stays. `false`
    /// if the store cannot, and nothing was changed. As with a write, only a sync makes it durable.
    fn punch(&self, offset: u64, length: u64) -> Result<bool>;

    /// Moves runs from `sources` (each `Move::source` is an index) into this file by the means given:
    /// [`Means::Clone`] shares extents and fails with [`BackendError::CannotClone`] where the file system
    /// or the alignment forbids it (parts of a file-system block at a source's very end are copied);
    /// [`Means::Copy`] does whatever is fastest. Runs may come from files of another backend when copying.
    /// Bytes past a source's end are zeros and are left as a hole. Runs do not overlap in the target.
    /// On an error some runs may have been moved.
    fn move_runs(&self, sources: &[Arc<dyn StoreFile>], runs: &[Move], means: Means) -> Result<Moved>;

    /// Makes bytes and length durable. After an error the file must be given up, never synced again.
    fn sync(&self) -> Result<()>;

    /// Asks that the next read of what is durable come from the store and not from a cache; does what it can.
    fn drop_cache(&self) -> Result<()>;

    /// Owner, group, mode, ACL and extended attributes.
    fn identity(&self) -> Result<Identity>;

    /// Gives the file that identity and reads it back; [`BackendError::Squashed`] if it did not take.
    fn set_identity(&self, identity: &Identity) -> Result<()>;

    /// Which of QEMU's image locks other processes hold on the file, as far as this host can see.
    fn image_locks(&self) -> Result<ImageLocks>;

    /// Keeps QEMU from opening the file for writing, until the guard is dropped: takes the locks (bytes 201
    /// and 203) that stand for "does not share the permission to write, or to resize". Programs that only
    /// read it, also as backing file of another, still can. `None` if somebody has it open for writing.
    /// [`StoreFile::image_locks`] of this open file does not show it, that of others does (`any`). Does not
    /// wait. [`BackendError::is_unsupported`] where the store has no such locks. A process that ends or
    /// loses its mount has lost the locks, too.
    fn hold_image_locks(&self) -> Result<Option<Box<dyn Send + Sync>>>;

    /// Shows others that the file is read, as a reading QEMU does (byte 100), until the guard is dropped: their
    /// [`StoreFile::image_locks`] says `any`. Nobody is kept out. [`BackendError::is_unsupported`] where the store has no
    /// such locks.
    fn hold_reader_lock(&self) -> Result<Box<dyn Send + Sync>> {
        let source = std::io::Error::from(std::io::ErrorKind::Unsupported);
        let path = self.path().to_string();
        Err(BackendError::Unsupported { action: "take a reader's lock of", path, source })
    }
}

/// Reads exactly `buffer.len()` bytes, zeros past the end of the file: how QEMU reads an image file.
pub fn read_padded(file: &dyn StoreFile, offset: u64, buffer: &mut [u8]) -> Result<()> {
    let count = file.read_at(offset, buffer)?;
    if let Some(rest) = buffer.get_mut(count..) {
        rest.fill(0);
    }
    Ok(())
}
