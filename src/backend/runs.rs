//! What a batch of moves comes to, whoever carries it out. Pure.
//!
//! Costs are per call, so neighbours are joined; disks like order, so runs are sorted by source; and a run
//! that goes past its source's end is cut there, the rest becoming zeros of the target.

use std::io;

use super::types::Move;

/// A batch, ready to be carried out.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Batch {
    /// Runs of bytes that the sources have, by source and source offset, neighbours joined.
    pub pieces: Vec<Move>,
    /// Ranges of the target that must read as zeros: where, and how many bytes.
    pub zeros: Vec<(u64, u64)>,
    /// The length that the target has at least, afterwards.
    pub end: u64,
}

impl Batch {
    /// Prepares `runs` from sources of these lengths. Fails with `InvalidInput` for a run that names no
    /// source or ends past 2^63, where files end.
    pub(super) fn new(lengths: &[u64], runs: &[Move]) -> io::Result<Self> {
        let mut batch = Self::default();
        for run in join(runs.to_vec()) {
            let (Some(&length), Some(_), Some(to_end)) =
                (lengths.get(run.source), end(run.from, run.length), end(run.to, run.length))
            else {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("impossible run {run:?}")));
            };
            batch.end = batch.end.max(to_end);
            let there = length.saturating_sub(run.from).min(run.length);
            if there > 0 {
                batch.pieces.push(Move { length: there, ..run });
            }
            if there < run.length {
                batch.zeros.push((run.to + there, run.length - there));
            }
        }
        Ok(batch)
    }

    /// The bytes in all pieces.
    pub(super) fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.length).sum()
    }
}

/// The end of a range, if files can be that long.
fn end(start: u64, length: u64) -> Option<u64> {
    start.checked_add(length).filter(|&end| i64::try_from(end).is_ok())
}

fn join(mut runs: Vec<Move>) -> Vec<Move> {
    runs.sort_unstable_by_key(|run| (run.source, run.from, run.to));
    let mut joined: Vec<Move> = Vec::with_capacity(runs.len());
    for run in runs {
        if run.length == 0 {
            continue;
        }
        match joined.last_mut() {
            Some(last) if last.source == run.source && follows(last, &run) => last.length += run.length,
            _ => joined.push(run),
        }
    }
    joined
}

fn follows(last: &Move, next: &Move) -> bool {
    last.from.checked_add(last.length) == Some(next.from)
        && last.to.checked_add(last.length) == Some(next.to)
        && last.length.checked_add(next.length).is_some()
}

/// `length` bytes from `start`, cut into parts of at most `most` bytes.
pub(super) fn parts(start: u64, length: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    let most = most.max(1);
    (0..length.div_ceil(most)).map(move |index| {
        let done = index * most;
        (start + done, most.min(length - done))
    })
}

#[cfg(test)]
mod tests {
    use super::{Batch, parts};
    use crate::backend::Move;

    fn run(source: usize, from: u64, to: u64, length: u64) -> Move {
        Move { source, from, to, length }
    }

    #[test]
    fn neighbours_are_joined_and_sorted() {
        let batch =
            Batch::new(&[100, 100], &[run(1, 0, 0, 5), run(0, 20, 60, 5), run(0, 10, 50, 10)]).unwrap();
        assert_eq!(batch.pieces, [run(0, 10, 50, 15), run(1, 0, 0, 5)]);
        assert_eq!((batch.end, batch.bytes()), (65, 20));
        assert!(batch.zeros.is_empty());
    }

    #[test]
    fn what_is_past_the_source_is_zeros() {
        let batch = Batch::new(&[12], &[run(0, 10, 50, 10), run(0, 30, 0, 4)]).unwrap();
        assert_eq!(batch.pieces, [run(0, 10, 50, 2)]);
        assert_eq!(batch.zeros, [(52, 8), (0, 4)]);
        assert_eq!(batch.end, 60);
    }

    #[test]
    fn impossible_runs_are_refused() {
        assert!(Batch::new(&[1], &[run(1, 0, 0, 1)]).is_err());
        assert!(Batch::new(&[1], &[run(0, u64::MAX, 0, 2)]).is_err());
        assert!(Batch::new(&[1], &[run(0, 0, u64::MAX / 2, 2)]).is_err());
    }

    #[test]
    fn parts_cover_the_whole() {
        assert_eq!(parts(10, 5, 2).collect::<Vec<_>>(), [(10, 2), (12, 2), (14, 1)]);
        assert_eq!(parts(10, 0, 2).count(), 0);
    }
}
