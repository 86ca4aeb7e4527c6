//! Whether QEMU has an image open, and keeping it from writing: its locks on single bytes of the file.
//!
//! They are open-file-description locks (`fcntl`), which `flock` does not see. QEMU takes shared locks at
//! byte 100 + n for each permission n that it holds, and at 200 + n for each that it does not grant to
//! others (`RAW_LOCK_PERM_BASE`, `RAW_LOCK_SHARED_BASE` in its `block/file-posix.c`); asking for an
//! exclusive lock therefore finds all of them.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::backend::ImageLocks;

/// The permissions that mean a writer: `BLK_PERM_WRITE` (1) and `BLK_PERM_RESIZE` (3).
const WRITER_BYTES: [i64; 2] = [101, 103];
/// "Does not share the permission to write, or to resize". Readers share both or want neither, so that they
/// still open the file; 100, 101 and 200 would keep them out.
const NO_WRITER_BYTES: [i64; 2] = [201, 203];
/// "Reads, and what it reads has to be consistent" (`BLK_PERM_CONSISTENT_READ`): what every reader holds, and all others
/// share (measured: reading, writing, committing, resizing, snapshots and bitmaps go on).
const READER_BYTES: [i64; 1] = [100];
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

/// How many hold some locks of one open file: those that keep writers out, or those that show a reader. The locks belong to
/// the open file and do not add up: the first holder takes them, the last gives them back.
pub(super) type Holders = Arc<Mutex<usize>>;

/// One holder. Its end frees the locks, not just closes the file: that lives on.
#[derive(Debug)]
pub(super) struct Held {
    file: File,
    holders: Holders,
    bytes: &'static [i64],
}

impl Drop for Held {
    fn drop(&mut self) {
        // To the end of the call: another one must not take them before they are given back.
        let mut holders = count(&self.holders);
        *holders -= 1;
        if *holders == 0 {
            release(&self.file, self.bytes);
        }
    }
}

/// Keeps QEMU's writers out; `None` if one is in. QEMU takes its locks first and looks for those of others
/// then, as is done here: of two that come at once, at least one gives way.
pub(super) fn hold(file: &File, holders: &Holders) -> io::Result<Option<Held>> {
    let held = file.try_clone()?;
    let mut count = count(holders);
    if *count == 0 {
        match take(file) {
            Ok(true) => {}
            refused => {
                release(file, &NO_WRITER_BYTES);
                return refused.map(|_| None);
            }
        }
    }
    *count += 1;
    Ok(Some(Held { file: held, holders: Arc::clone(holders), bytes: &NO_WRITER_BYTES }))
}

/// Shows others that the file is read, and keeps nobody out.
pub(super) fn hold_reader(file: &File, holders: &Holders) -> io::Result<Held> {
    let held = file.try_clone()?;
    let mut count = count(holders);
    if *count == 0 {
        READER_BYTES.iter().try_for_each(|byte| take_shared(file, *byte, 1))?;
    }
    *count += 1;
    Ok(Held { file: held, holders: Arc::clone(holders), bytes: &READER_BYTES })
}

fn count(holders: &Holders) -> MutexGuard<'_, usize> {
    holders.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the locks; whether no writer is there. On an error or a refusal some may have been taken.
fn take(file: &File) -> io::Result<bool> {
    for byte in NO_WRITER_BYTES {
        match take_shared(file, byte, 1) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Ok(false);
            }
            done => done?,
        }
    }
    for byte in WRITER_BYTES {
        if held(file, byte, 1)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn release(file: &File, bytes: &[i64]) {
    for byte in bytes {
        // Nothing to be done about an error; closing the file frees them too.
        let _ = set(file, libc::F_UNLCK, *byte, 1);
    }
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
