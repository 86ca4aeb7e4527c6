//! Moving runs by reading and writing, whatever the stores are: what has to be there first, one copy, and several at a time where
//! waiting is what they cost.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::runs::{Batch, parts};
use super::{BackendError, Move, Result, StoreFile, read_padded};

/// The buffer of a copying thread, in bytes, and the most that it copies in one go.
const COPY_BYTES: u64 = 1 << 20;
/// Copies in flight. Each has a buffer of its own.
const IN_FLIGHT: usize = 16;

/// How long the sources are, and what moving these runs comes to.
pub(super) fn batch(
    target: &dyn StoreFile,
    sources: &[Arc<dyn StoreFile>],
    runs: &[Move],
) -> Result<(Vec<u64>, Batch)> {
    let lengths = sources.iter().map(|source| Ok(source.stat()?.length)).collect::<Result<Vec<u64>>>()?;
    let batch = Batch::new(&lengths, runs)
        .map_err(|error| BackendError::from_io("move runs into", target.path(), error))?;
    Ok((lengths, batch))
}

/// Makes the target long enough for all runs, and zeros what no source has bytes for.
pub(super) fn make_room(target: &dyn StoreFile, batch: &Batch) -> Result<()> {
    let before = target.stat()?.length;
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

fn zero(target: &dyn StoreFile, start: u64, length: u64) -> Result<()> {
    if target.punch(start, length)? {
        return Ok(());
    }
    let zeros = vec![0; usize::try_from(COPY_BYTES.min(length)).unwrap_or_default()];
    parts(start, length, COPY_BYTES).try_for_each(|(at, count)| {
        let count = usize::try_from(count).unwrap_or_default().min(zeros.len());
        target.write_at(at, &zeros[..count])
    })
}

/// Copies one share through a buffer. What a source loses meanwhile (it got shorter) becomes zeros.
pub(super) fn copy(
    target: &dyn StoreFile,
    sources: &[Arc<dyn StoreFile>],
    share: &Move,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    let Some(source) = sources.get(share.source) else { return Ok(()) };
    let count = usize::try_from(share.length).unwrap_or_default();
    if buffer.len() < count {
        buffer.resize(count, 0);
    }
    let part = &mut buffer[..count];
    read_padded(source.as_ref(), share.from, part)?;
    target.write_at(share.to, part)
}

/// Does all of them, about in order, several at a time; ends with the first that fails.
pub(super) fn in_flight(
    shares: &[Move],
    copy: impl Fn(&Move, &mut Vec<u8>) -> Result<()> + Sync,
) -> Result<()> {
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
pub(super) fn shares(piece: &Move) -> impl Iterator<Item = Move> + use<> {
    let piece = *piece;
    parts(piece.from, piece.length, COPY_BYTES).map(move |(from, length)| Move {
        from,
        to: piece.to + (from - piece.from),
        length,
        ..piece
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::{IN_FLIGHT, in_flight, shares};
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
}
