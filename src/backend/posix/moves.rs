//! Moving runs between files: by sharing extents, or by copying.
//!
//! Measured for 1 GiB of warm source on a busy machine of 2 cores, seconds before the sync that follows
//! (which adds 0.5 to 0.7 to each), two rounds:
//!
//! | ext4, copying | 64 KiB runs | 2 MiB runs | one run |
//! |---|---|---|---|
//! | read and write, 1 MiB buffer, one thread | 0.31 0.44 | 0.34 0.29 | 0.27 0.34 |
//! | the same, two threads | 0.37 0.55 | 0.36 0.46 | 0.30 0.50 |
//! | `copy_file_range`, one thread | 0.36 0.59 | 0.47 0.45 | 0.40 0.40 |
//! | `copy_file_range`, two threads | 0.34 0.46 | 0.48 0.59 | 0.46 0.56 |
//!
//! With a cold source the rounds differ more than the means do (64 KiB runs, one thread: 3.0 and 0.6).
//! So a local target gets one thread, reads and writes: the target's inode lock lets no two writes in at
//! once. Cloning gains nothing from threads either (64 KiB runs, one and two threads: XFS 0.25 0.68 and
//! 0.66 0.57, btrfs 0.36 0.37 and 0.44 0.35; 2 MiB runs: below 0.06 everywhere). Where the cost is waiting, on a
//! network mount or wherever the first copies are seen to take their time, several are in flight.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reflink_copy::ReflinkBlockBuilder;
use rustix::io::Errno;

use super::failed;
use super::file::PosixFile;
use crate::backend::copying::{self, copy, in_flight, make_room, shares};
use crate::backend::runs::{Batch, parts};
use crate::backend::{BackendError, Means, Move, Moved, Result, StoreFile};

/// The most that one clone call takes: it holds both inodes' locks and cannot be interrupted.
const CLONE_BYTES: u64 = 1 << 30;
/// So many copies are made one after the other before it is known what they wait for.
const WATCHED: u32 = 8;
/// What a read and a write may take besides a nanosecond a byte, on average, without anybody waiting: a local file system
/// with its data in the cache takes some 10 us.
const PATIENCE: Duration = Duration::from_micros(500);

/// [`StoreFile::move_runs`] for a file of a mount.
pub(super) fn move_runs(
    target: &PosixFile,
    sources: &[Arc<dyn StoreFile>],
    runs: &[Move],
    means: Means,
) -> Result<Moved> {
    let (lengths, batch) = copying::batch(target, sources, runs)?;
    match means {
        Means::Clone => {
            // All that can be known to be impossible is refused before anything is done.
            let files = own_files(target, sources)?;
            let (clones, tails) = split(target, &lengths, &batch)?;
            make_room(target, &batch)?;
            clones.iter().try_for_each(|piece| clone(target, &files, piece))?;
            copy_all(target, sources, &tails)?;
            let cloned_bytes = clones.iter().map(|piece| piece.length).sum();
            Ok(Moved { cloned_bytes, copied_bytes: batch.bytes() - cloned_bytes })
        }
        Means::Copy => {
            make_room(target, &batch)?;
            copy_all(target, sources, &batch.pieces)?;
            Ok(Moved { cloned_bytes: 0, copied_bytes: batch.bytes() })
        }
    }
}

/// The sources as files of a mount; only those can share extents.
fn own_files<'s>(target: &PosixFile, sources: &'s [Arc<dyn StoreFile>]) -> Result<Vec<&'s File>> {
    let own = |source: &'s Arc<dyn StoreFile>| {
        let foreign = || io::Error::new(io::ErrorKind::Unsupported, "the source is of another kind of store");
        let file = source.as_any().downcast_ref::<PosixFile>().map(PosixFile::file);
        file.ok_or_else(|| cannot_clone(target, foreign()))
    };
    sources.iter().map(own).collect()
}

/// The parts to clone, whole file-system blocks, and those to copy: a source's last block if it is not full.
/// The kernel takes such a block too, but only if it lands at the very end of the target.
fn split(target: &PosixFile, lengths: &[u64], batch: &Batch) -> Result<(Vec<Move>, Vec<Move>)> {
    let alignment = target.clone_alignment()?;
    let mut clones = Vec::with_capacity(batch.pieces.len());
    let mut tails = Vec::new();
    for piece in &batch.pieces {
        let tail = piece.length % alignment;
        let at_end = lengths.get(piece.source) == Some(&(piece.from + piece.length));
        if piece.from % alignment != 0 || piece.to % alignment != 0 || (tail != 0 && !at_end) {
            let why = format!("{piece:?} is not aligned to {alignment} bytes");
            return Err(cannot_clone(target, io::Error::new(io::ErrorKind::InvalidInput, why)));
        }
        let whole = piece.length - tail;
        if whole > 0 {
            clones.push(Move { length: whole, ..*piece });
        }
        if tail > 0 {
            let (from, to) = (piece.from + whole, piece.to + whole);
            tails.push(Move { from, to, length: tail, ..*piece });
        }
    }
    Ok((clones, tails))
}

fn clone(target: &PosixFile, files: &[&File], piece: &Move) -> Result<()> {
    let Some(source) = files.get(piece.source) else {
        return Ok(());
    };
    for (from, length) in parts(piece.from, piece.length, CLONE_BYTES) {
        // A length of 0 would mean "to the end of the source".
        let Some(length) = NonZeroU64::new(length) else { continue };
        let to = piece.to + (from - piece.from);
        let call = || {
            ReflinkBlockBuilder::new(source, target.file(), length)
                .from_offset(from)
                .to_offset(to)
                .reflink_block()
        };
        retry(call).map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::INVAL | Errno::NOTSUP | Errno::XDEV | Errno::NOTTY | Errno::NOSYS) => {
                cannot_clone(target, error)
            }
            _ => failed("clone into", target.path(), error),
        })?;
    }
    Ok(())
}

fn retry(mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// Copies all pieces; several at once only where waiting is the cost.
fn copy_all(target: &PosixFile, sources: &[Arc<dyn StoreFile>], pieces: &[Move]) -> Result<()> {
    let mut shares = pieces.iter().flat_map(shares);
    if !target.is_on_network()? {
        let (mut buffer, mut watch) = (Vec::new(), Watch::default());
        while !watch.waits() {
            let Some(share) = shares.next() else { return Ok(()) };
            let begun = Instant::now();
            copy(target, sources, &share, &mut buffer)?;
            watch.note(begun.elapsed(), share.length);
        }
    }
    let rest: Vec<Move> = shares.collect();
    in_flight(&rest, |share, buffer| copy(target, sources, share, buffer))
}

/// How long copies took.
#[derive(Debug, Default)]
struct Watch {
    copies: u32,
    took: Duration,
    allowed: Duration,
}

impl Watch {
    fn note(&mut self, took: Duration, bytes: u64) {
        self.copies += 1;
        self.took += took;
        self.allowed += PATIENCE + Duration::from_nanos(bytes);
    }

    /// Whether they rather waited than worked, so far.
    fn waits(&self) -> bool {
        self.copies >= WATCHED && self.took > self.allowed
    }
}

fn cannot_clone(target: &PosixFile, source: io::Error) -> BackendError {
    BackendError::CannotClone { path: target.path().to_string(), source }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{WATCHED, Watch};

    #[test]
    fn waiting_is_told_from_working() {
        let told = |each: Duration, bytes| {
            let mut watch = Watch::default();
            (0..WATCHED).for_each(|_| watch.note(each, bytes));
            watch.waits()
        };
        assert!(!told(Duration::from_micros(500), 1 << 20), "a MiB at 2 GiB/s");
        assert!(told(Duration::from_micros(2400), 1 << 20), "a MiB with a millisecond for each call");
        assert!(!told(Duration::from_micros(60), 1 << 16), "a cluster from the cache");
        assert!(told(Duration::from_millis(2), 1 << 16), "a cluster from a server");
        assert!(!Watch::default().waits(), "nothing is known yet");
    }
}
