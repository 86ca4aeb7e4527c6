//! Whether QEMU has an image open, and keeping it from writing: its locks on single bytes of the file.
//!
//! They are open-file-description locks (`fcntl`), which `flock` does not see. QEMU takes shared locks at
//! byte 100 + n for each permission n that it holds, and at 200 + n for each that it does not grant to
//! others (`RAW_LOCK_PERM_BASE`, `RAW_LOCK_SHARED_BASE` in its `block/file-posix.c`); asking for an
//! exclusive lock therefore finds all of them.

use std::fs::File;
use std::io;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::backend::ImageLocks;

/// The permissions that mean a writer: `BLK_PERM_WRITE` (1) and `BLK_PERM_RESIZE` (3).
const WRITER_BYTES: [i64; 2] = [101, 103];
/// "Does not share the permission to write, or to resize". Readers share both or want neither, so that they
/// still open the file; 100, 101 and 200 would keep them out.
const NO_WRITER_BYTES: [i64; 2] = [201, 203];
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

/// The locks that keep writers out; freed when dropped. Not just closed: the open file lives on.
#[derive(Debug)]
pub(super) struct Held(File);

impl Drop for Held {
    fn drop(&mut self) {
        for byte in NO_WRITER_BYTES {
            // Nothing to be done about an error; closing the file frees them too.
            let _ = set(&self.0, libc::F_UNLCK, byte, 1);
        }
    }
}

/// Keeps QEMU's writers out; `None` if one is in. QEMU takes its locks first and looks for those of others
/// then, as is done here: of two that come at once, at least one gives way.
pub(super) fn hold(file: &File) -> io::Result<Option<Arc<Held>>> {
    // What was taken before an error goes with this.
    let held = Held(file.try_clone()?);
    for byte in NO_WRITER_BYTES {
        match take_shared(file, byte, 1) {
            Ok(()) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
    }
    for byte in WRITER_BYTES {
        if self::held(file, byte, 1)? {
            return Ok(None);
        }
    }
    Ok(Some(Arc::new(held)))
}

/// Whether anybody else has a lock on any of these bytes.
pub(super) fn held(file: &File, start: i64, length: i64) -> io::Result<bool> {
    let mut question = range(libc::F_WRLCK, start, length);
    while let Err(errno) = fcntl(file, FcntlArg::F_OFD_GETLK(&mut question)) {
        if errno != Errno::EINTR {
            return Err(errno.into());
        }
    }
    Ok(i32::from(question.l_type) != libc::F_UNLCK)
}

/// Takes a shared lock, as QEMU does, without waiting. It goes with the open file.
pub(super) fn take_shared(file: &File, start: i64, length: i64) -> io::Result<()> {
    set(file, libc::F_RDLCK, start, length)
}

fn set(file: &File, kind: i32, start: i64, length: i64) -> io::Result<()> {
    let wanted = range(kind, start, length);
    while let Err(errno) = fcntl(file, FcntlArg::F_OFD_SETLK(&wanted)) {
        if errno != Errno::EINTR {
            return Err(errno.into());
        }
    }
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
