//! All that the crate `fs2` is used for: qchain's own lock files, and free space. In one file, so that it
//! can be swapped.
//!
//! `flock` is not seen by QEMU, nor by other hosts on many network mounts: a local hint only.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::backend::{LockKind, Space};

/// A locked file. Unlocked when dropped, and not just closed: a process that another thread is starting at
/// that moment has copies of all open files until it runs its program, and would keep the lock for so long.
struct Locked(File);

impl Drop for Locked {
    fn drop(&mut self) {
        // Closing unlocks as well, only later perhaps.
        let _ = fs2::FileExt::unlock(&self.0);
    }
}

/// Takes the lock of an open file, `None` if another open file has it. Dropping the box frees it.
pub(super) fn try_lock(file: File, kind: LockKind) -> io::Result<Option<Box<dyn Send + Sync>>> {
    let take = match kind {
        LockKind::Shared => <File as fs2::FileExt>::try_lock_shared,
        LockKind::Exclusive => <File as fs2::FileExt>::try_lock_exclusive,
    };
    loop {
        return match take(&file) {
            Ok(()) => Ok(Some(Box::new(Locked(file)))),
            Err(error) if error.raw_os_error() == fs2::lock_contended_error().raw_os_error() => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => Err(error),
        };
    }
}

/// The room on the file system of a directory.
pub(super) fn space(directory: &Path) -> io::Result<Space> {
    let figures = fs2::statvfs(directory)?;
    Ok(Space { free_bytes: figures.available_space(), total_bytes: figures.total_space() })
}

#[cfg(test)]
mod tests {
    use super::try_lock;
    use crate::backend::LockKind;

    #[test]
    fn a_copy_of_the_open_file_does_not_keep_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let open = || std::fs::File::create(folder.path().join("lock")).unwrap();
        let first = open();
        let inherited = first.try_clone().unwrap();
        let held = try_lock(first, LockKind::Exclusive).unwrap();
        assert!(try_lock(open(), LockKind::Shared).unwrap().is_none());
        drop(held);
        assert!(try_lock(open(), LockKind::Exclusive).unwrap().is_some());
        drop(inherited);
    }
}
