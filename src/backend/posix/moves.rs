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
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reflink_copy::ReflinkBlockBuilder;
use rustix::io::Errno;

use super::failed;
use super::file::PosixFile;
use crate::backend::runs::{Batch, parts};
use crate::backend::{BackendError, Means, Move, Moved, Result, StoreFile, read_padded};

/// The most that one clone call takes: it holds both inodes' locks and cannot be interrupted.
const CLONE_BYTES: u64 = 1 << 30;
/// The buffer of a copying thread.
const COPY_BYTES: u64 = 1 << 20;
/// Copies in flight where the cost is waiting. Each has a buffer of its own.
const IN_FLIGHT: usize = 16;
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
    let lengths = sources.iter().map(|source| Ok(source.stat()?.length)).collect::<Result<Vec<u64>>>()?;
    let batch = Batch::new(&lengths, runs).map_err(|error| failed("move runs into", target.path(), error))?;
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

/// Makes the target long enough for all runs, and zeros what no source has bytes for.
fn make_room(target: &PosixFile, batch: &Batch) -> Result<()> {
    let before = target.length()?;
    if before < batch.end {
        target.set_length(batch.end)?;
    }
    for &(start, length) in &batch.zeros {
        // What lies past the old end is a hole already.
        let old = length.min(before.saturating_sub(start));
        if old > 0 {
            zero(target, start, old)?;
        }
    }
    Ok(())
}

fn zero(target: &PosixFile, start: u64, length: u64) -> Result<()> {
    if target.punch(start, length)? {
        return Ok(());
    }
    let zeros = vec![0; usize::try_from(COPY_BYTES.min(length)).unwrap_or_default()];
    parts(start, length, COPY_BYTES).try_for_each(|(at, count)| {
        let count = usize::try_from(count).unwrap_or_default().min(zeros.len());
        target.write_at(at, &zeros[..count])
    })
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

/// Does all of them, about in order, several at a time; ends with the first that fails.
fn in_flight(shares: &[Move], copy: impl Fn(&Move, &mut Vec<u8>) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<BackendError>> = Mutex::new(None);
    let failure = || failed.lock().unwrap_or_else(PoisonError::into_inner);
    let work = || {
        let mut buffer = Vec::new();
        while let Some(share) = shares.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = copy(share, &mut buffer) {
                next.store(shares.len(), Ordering::Relaxed);
                failure().get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..IN_FLIGHT.min(shares.len()) {
            scope.spawn(work);
        }
        work();
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// A piece, cut into what is copied in one go.
fn shares(piece: &Move) -> impl Iterator<Item = Move> + use<> {
    let piece = *piece;
    parts(piece.from, piece.length, COPY_BYTES).map(move |(from, length)| Move {
        from,
        to: piece.to + (from - piece.from),
        length,
        ..piece
    })
}

/// Copies one piece through a buffer. What a source loses meanwhile (it got shorter) becomes zeros.
fn copy(
    target: &PosixFile,
    sources: &[Arc<dyn StoreFile>],
    piece: &Move,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    let Some(source) = sources.get(piece.source) else {
        return Ok(());
    };
    for (from, length) in parts(piece.from, piece.length, COPY_BYTES) {
        let count = usize::try_from(length).unwrap_or_default();
        if buffer.len() < count {
            buffer.resize(count, 0);
        }
        let part = &mut buffer[..count];
        read_padded(source.as_ref(), from, part)?;
        target.write_at(piece.to + (from - piece.from), part)?;
    }
    Ok(())
}

fn cannot_clone(target: &PosixFile, source: io::Error) -> BackendError {
    BackendError::CannotClone { path: target.path().to_string(), source }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use super::{IN_FLIGHT, WATCHED, Watch, in_flight, shares};
    use crate::backend::{BackendError, Move};

    fn moves(count: u64) -> Vec<Move> {
        shares(&Move { source: 0, from: 0, to: 1 << 30, length: count << 20 }).collect()
    }

    #[test]
    fn each_share_is_copied_once() {
        for count in [0, 1, 3, 100] {
            let done = Mutex::new(Vec::new());
            in_flight(&moves(count), |share, _| {
                done.lock().unwrap().push(*share);
                Ok(())
            })
            .unwrap();
            let mut done = done.into_inner().unwrap();
            done.sort_by_key(|share| share.from);
            assert_eq!(done, moves(count));
        }
    }

    #[test]
    fn the_first_failure_ends_it() {
        let begun = Mutex::new(0);
        let failed = in_flight(&moves(1000), |share, _| {
            *begun.lock().unwrap() += 1;
            let path = format!("{}", share.from >> 20);
            if share.from >= 10 << 20 { Err(BackendError::NotPlain { path }) } else { Ok(()) }
        });
        assert!(matches!(failed, Err(BackendError::NotPlain { .. })), "{failed:?}");
        assert!(begun.into_inner().unwrap() <= 10 + IN_FLIGHT);
    }

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
