//! Whether QEMU has an image open: its locks on single bytes of the file, asked of the kernel.
//!
//! They are open-file-description locks (`fcntl`), which `flock` does not see. QEMU takes shared locks at
//! byte 100 + n for each permission n that it holds, and at 200 + n for each that it does not grant to
//! others (`RAW_LOCK_PERM_BASE`, `RAW_LOCK_SHARED_BASE` in its `block/file-posix.c`); asking for an
//! exclusive lock therefore finds all of them.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::backend::ImageLocks;

/// The permissions that mean a writer: `BLK_PERM_WRITE` (1) and `BLK_PERM_RESIZE` (3).
const WRITER_BYTES: [i64; 2] = [101, 103];
/// All bytes QEMU uses for permissions held, and for permissions not shared.
const ALL_BYTES: [(i64, i64); 2] = [(100, 65), (200, 65)];

/// What others hold. Locks of this very open file do not count.
pub(super) fn image_locks(file: &File) -> io::Result<ImageLocks> {
    let mut found = ImageLocks::default();
    for (start, length) in ALL_BYTES {
        found.any |= held(file, start, length)?;
    }
    for byte in WRITER_BYTES {
        found.writer |= found.any && held(file, byte, 1)?;
    }
    Ok(found)
}

/// Whether anybody else has a lock on any of these bytes.
pub(super) fn held(file: &File, start: i64, length: i64) -> io::Result<bool> {
    let mut question = range(libc::F_WRLCK, start, length);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut question))?;
    Ok(i32::from(question.l_type) != libc::F_UNLCK)
}

/// Takes a shared lock, as QEMU does, without waiting. It goes with the open file.
pub(super) fn take_shared(file: &File, start: i64, length: i64) -> io::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, start, length)))?;
    Ok(())
}

fn range(kind: i32, start: i64, length: i64) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}
