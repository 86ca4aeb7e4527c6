//! All that the crate `fs2` is used for: qchain's own lock files, and free space. In one file, so that it
//! can be swapped.
//!
//! `flock` is not seen by QEMU, nor by other hosts on many network mounts: a local hint only.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::backend::Space;

/// Takes the lock of an open file, `None` if another open file has it. Dropping the box frees it.
pub(super) fn try_lock(file: File) -> io::Result<Option<Box<dyn Send + Sync>>> {
    match fs2::FileExt::try_lock_exclusive(&file) {
        Ok(()) => Ok(Some(Box::new(file))),
        Err(error) if error.raw_os_error() == fs2::lock_contended_error().raw_os_error() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The room on the file system of a directory.
pub(super) fn space(directory: &Path) -> io::Result<Space> {
    let figures = fs2::statvfs(directory)?;
    Ok(Space { free_bytes: figures.available_space(), total_bytes: figures.total_space() })
}
