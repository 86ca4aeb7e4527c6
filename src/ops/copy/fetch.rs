//! Asking a peer, many requests at once: each answer is checked as it comes, and what was taken stays taken however the
//! rest of it ends.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::offer::{LineMember, MOST_BLOCKS, MOST_TABLE_BYTES};
use super::peer::{Peer, wrong};
use crate::backend::StoreFile;
use crate::digest::leaf;
use crate::failure::Kind;
use crate::ids::Digest;
use crate::ops::{OpError, Result, Work};
use crate::store::manifest::Blocks;
use crate::units::BLOCK_BYTES;

/// How often the same is asked for, if nothing came.
const TRIES: u32 = 6;
/// The same if something came and was wrong: a bad line spoils most of it, and whoever lies does so of a few blocks each time.
const WRONG_TRIES: u32 = 24;
/// How long to wait before the second try, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How many ranges one request has at most.
const MOST_RANGES: usize = 128;

/// Whether the same may be asked for again: the line failed, or changed what was sent.
fn may_repeat(error: &OpError) -> bool {
    matches!(error, OpError::Peer { again: true, .. })
}

/// Does something until it is done, or fails for a reason that stays, or came to nothing several times in a row. What is
/// done says of each try whether it came any further.
pub fn stubbornly<T>(work: &Work<'_>, mut once: impl FnMut(&mut bool) -> Result<T>) -> Result<T> {
    let mut tries = 0;
    loop {
        work.cancel.check()?;
        let mut further = false;
        match once(&mut further) {
            Err(error) if may_repeat(&error) => {
                tries = if further { 0 } else { tries + 1 };
                let is_wrong = matches!(error, OpError::Peer { kind: Kind::Refused, .. });
                if tries >= if is_wrong { WRONG_TRIES } else { TRIES } {
                    return Err(error);
                }
                tracing::debug!("asked again: {error}");
                if !is_wrong {
                    std::thread::sleep((FIRST_PAUSE * (1 << tries.min(TRIES))).min(LONGEST_PAUSE));
                }
            }
            done => return done,
        }
    }
}

/// Works on items with so many threads, in their order; the first failure ends all.
pub fn at_once<I: Send>(
    count: usize,
    items: impl Iterator<Item = Result<I>> + Send,
    work: impl Fn(I) -> Result<()> + Sync,
) -> Result<()> {
    let items = Mutex::new(items);
    let failed: Mutex<Option<OpError>> = Mutex::new(None);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..count.max(1) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Some(item) = items.lock().unwrap_or_else(PoisonError::into_inner).next() else {
                        break;
                    };
                    if let Err(error) = item.and_then(&work) {
                        stop.store(true, Ordering::Relaxed);
                        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// How much of a leaf table one request asks for, in bytes: what is lost with an answer is all of it.
const TABLE_BYTES: u64 = MOST_TABLE_BYTES / 4;

/// Brings a member's leaf table into a file.
pub fn table(peer: &dyn Peer, of: &LineMember, file: &dyn StoreFile, work: &Work<'_>) -> Result<()> {
    let pieces = (0..of.table_bytes.div_ceil(TABLE_BYTES)).map(|number| {
        let offset = number * TABLE_BYTES;
        Ok((offset, TABLE_BYTES.min(of.table_bytes - offset)))
    });
    at_once(peer.at_once(), pieces, |(offset, length)| {
        work.pace.spend(length, work.cancel);
        stubbornly(work, |_| {
            let bytes = peer.table(of, offset, length)?;
            if bytes.len() as u64 != length {
                return Err(wrong(peer.name(), "it gave another length of a leaf table than was asked for"));
            }
            file.write_at(offset, &bytes).map_err(failed(file))
        })
    })
}

/// Neighbours that are asked for together, with what they hash to.
#[derive(Debug)]
pub struct Piece {
    most: usize,
    ranges: Vec<Blocks>,
    leaves: Vec<Digest>,
}

impl Piece {
    /// One with room for so many blocks.
    pub fn new(most: u64) -> Self {
        let most = usize::try_from(most.clamp(1, MOST_BLOCKS)).unwrap_or(1);
        Self { most, ranges: Vec::new(), leaves: Vec::new() }
    }

    /// Adds neighbours; gives how many of them it has no room for.
    pub fn add(&mut self, first: u64, leaves: &[Digest]) -> usize {
        if self.ranges.len() >= MOST_RANGES {
            return leaves.len();
        }
        let room = self.most.saturating_sub(self.leaves.len());
        let taken = leaves.get(..room.min(leaves.len())).unwrap_or_default();
        if !taken.is_empty() {
            self.ranges.push(Blocks { first, count: taken.len() as u64 });
            self.leaves.extend_from_slice(taken);
        }
        leaves.len() - taken.len()
    }

    /// Whether it has nothing.
    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// Its blocks with their leaves, but for those that are done, by their place in it.
    fn rest(&self, done: &[bool]) -> Vec<(usize, u64, Digest)> {
        let blocks = self.ranges.iter().flat_map(|range| range.first..range.first + range.count);
        let all = blocks.zip(&self.leaves).zip(done).enumerate();
        all.filter(|(_, (_, done))| !**done).map(|(at, ((block, leaf), _))| (at, block, *leaf)).collect()
    }
}

/// Neighbours as ranges.
fn ranges(rest: &[(usize, u64, Digest)]) -> Vec<Blocks> {
    let mut ranges: Vec<Blocks> = Vec::new();
    for (_, block, _) in rest {
        match ranges.last_mut() {
            Some(last) if last.first + last.count == *block => last.count += 1,
            _ => ranges.push(Blocks { first: *block, count: 1 }),
        }
    }
    ranges
}

/// How large answers are asked for. An answer may be lost when the line fails, all of it if that happens where its frames
/// cannot be told apart any more: so one is a small part of all that is wanted, and of what comes between two failures.
#[derive(Debug)]
pub struct Answers {
    most: u64,
    came: AtomicU64,
    failures: AtomicU64,
}

/// Of how many parts of what is wanted an answer is one at most, in blocks, and the least that is asked for together.
const PARTS: u64 = 64;
const LEAST_BLOCKS: u64 = 4;
/// The same of what comes between two failures.
const PARTS_BETWEEN: u64 = 32;

impl Answers {
    /// For so many blocks that are wanted.
    pub fn of(wanted: u64) -> Self {
        let most = (wanted / PARTS).clamp(LEAST_BLOCKS, MOST_BLOCKS);
        Self { most, came: AtomicU64::new(0), failures: AtomicU64::new(0) }
    }

    /// How many blocks are best asked for together.
    pub fn blocks(&self) -> u64 {
        match self.failures.load(Ordering::Relaxed) {
            0 => self.most,
            failures => {
                let between = self.came.load(Ordering::Relaxed) / failures;
                (between / PARTS_BETWEEN).clamp(LEAST_BLOCKS, self.most)
            }
        }
    }

    /// How many blocks came.
    pub fn came(&self) -> u64 {
        self.came.load(Ordering::Relaxed)
    }
}

/// Asks for blocks until all of them came; gives each on that hashes to what it should. What else comes is passed over,
/// and what did not come is asked for again, without what did.
pub fn blocks(
    peer: &dyn Peer,
    of: &LineMember,
    piece: &Piece,
    answers: &Answers,
    work: &Work<'_>,
    mut take: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut done = vec![false; piece.leaves.len()];
    let mut left = piece.leaves.len();
    while left > 0 {
        stubbornly(work, |further| {
            let mut rest = piece.rest(&done);
            rest.truncate(usize::try_from(answers.blocks()).unwrap_or(1));
            let mut wrong_block = None;
            work.pace.spend(rest.len() as u64 * BLOCK_BYTES, work.cancel);
            let (mut count, before) = (0, answers.came());
            let answer = peer.blocks(of, &ranges(&rest), &mut |block, bytes| {
                count += 1;
                if count > rest.len() {
                    return Err(wrong(
                        peer.name(),
                        format!("it gave more blocks of {} than were asked for", of.name),
                    ));
                }
                let found = rest.binary_search_by_key(&block, |(_, block, _)| *block).ok();
                let found =
                    found.and_then(|found| rest.get(found)).filter(|(_, _, wanted)| leaf(bytes) == *wanted);
                let place = found.and_then(|(at, _, _)| done.get_mut(*at));
                match place {
                    // It came twice.
                    Some(true) => {}
                    Some(place) => {
                        take(block, bytes)?;
                        *place = true;
                        left -= 1;
                        answers.came.fetch_add(1, Ordering::Relaxed);
                    }
                    None => wrong_block = Some(block),
                }
                Ok(work.cancel.check()?)
            });
            // As long as anything comes, by whatever request, it goes on.
            *further = answers.came() > before;
            if answer.as_ref().is_err_and(may_repeat) {
                answers.failures.fetch_add(1, Ordering::Relaxed);
            }
            answer?;
            let missing = rest.iter().find(|(at, _, _)| done.get(*at) == Some(&false));
            missing.map_or(Ok(()), |(_, block, _)| {
                let block = wrong_block.unwrap_or(*block);
                Err(wrong(peer.name(), format!("block {block} of {} is not what its leaf says", of.name)))
            })
        })?;
    }
    Ok(())
}

/// What a file of this side failed with.
pub fn failed(file: &dyn StoreFile) -> impl Fn(crate::backend::BackendError) -> OpError + use<> {
    let store = file.path().to_string();
    move |source| crate::store::StoreError::Backend { store: store.clone(), source }.into()
}

#[cfg(test)]
mod tests {
    use super::{Piece, ranges};
    use crate::ids::Digest;

    #[test]
    fn a_piece_knows_what_is_left_of_it() {
        let mut piece = Piece::new(u64::MAX);
        assert_eq!(piece.add(10, &[Digest([1; 32]); 3]), 0);
        assert_eq!(piece.add(20, &[Digest([2; 32]); 200]), 200 - 61);
        let mut done = [false; 64];
        let rest = |done: &[bool]| -> Vec<(u64, u64)> {
            ranges(&piece.rest(done)).iter().map(|one| (one.first, one.count)).collect()
        };
        assert_eq!(rest(&done), [(10, 3), (20, 61)]);
        done[..2].fill(true);
        assert_eq!(rest(&done), [(12, 1), (20, 61)]);
        done[4] = true;
        assert_eq!(rest(&done), [(12, 1), (20, 1), (22, 59)]);
        done[2..].fill(true);
        assert_eq!(rest(&done), []);
    }
}
