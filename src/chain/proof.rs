//! The claim *plan*: a sealed image, parsed again from the store, resolves to the same sources as the chain
//! that it replaces.
//!
//! Both maps are walked side by side. Where the new image's data was moved, the place it was moved from must
//! be the very place that the old chain resolves to; zeros must meet zeros, and "below" must meet "below";
//! what was composed or compressed anew cannot be told by places, so its bytes are read and compared. What
//! this does not prove is that the storage kept the bytes: that is the claim *data*.

use crate::qcow2::layout::{Layout, Origin};
use crate::qcow2::map::{Content, Run};
use crate::units::{GuestOffset, HostOffset};

/// Guest ranges that are compared by reading, at most, in one call of the reader.
const BATCH: usize = 256;

/// What was proved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Proof {
    /// Guest bytes whose sources are the same.
    pub planned_bytes: u64,
    /// Guest bytes that were read on both sides and are the same.
    pub compared_bytes: u64,
}

impl std::ops::AddAssign for Proof {
    fn add_assign(&mut self, other: Self) {
        self.planned_bytes += other.planned_bytes;
        self.compared_bytes += other.compared_bytes;
    }
}

/// Why a new image does not replace the old chain.
#[derive(Debug, thiserror::Error)]
pub enum ProofError<E: std::error::Error + 'static> {
    /// The maps disagree.
    #[error("at {at}: the new image has {found:?}, the chain {expected:?}")]
    Map {
        /// Where in the guest.
        at: GuestOffset,
        /// What the old chain resolves to.
        expected: Option<Content>,
        /// What the new image resolves to.
        found: Option<Content>,
    },
    /// The bytes disagree.
    #[error("the new image reads other bytes than the chain at {at}")]
    Bytes {
        /// Where in the guest the range begins.
        at: GuestOffset,
    },
    /// The list of moves does not agree with the placement.
    #[error("the move to {to} is not what was planned")]
    Moves {
        /// Where in the new file.
        to: HostOffset,
    },
    /// Something could not be read.
    #[error("failed to read for the proof")]
    Read(#[source] E),
}

/// A guest range, `(start, length in bytes)`.
pub type Range = (GuestOffset, u64);

/// Proves that `new` (the sealed image alone) equals `old` (the merged members, newest first) above the image
/// that lies below both, over the part of the disk that both cover; parts are cut at cluster boundaries. All parts
/// together with [`prove_moves`] prove the whole. `below_end` is where that image ends: from there
/// on, "zero" and "below" are the same. `equal` reads ranges on both sides and gives the first that differs.
pub fn prove_part<E: std::error::Error>(
    layout: &Layout,
    old: impl Iterator<Item = Result<Run, E>>,
    new: impl Iterator<Item = Result<Run, E>>,
    below_end: u64,
    mut equal: impl FnMut(&[Range]) -> Result<Option<Range>, E>,
) -> Result<Proof, ProofError<E>> {
    let mut proof = Proof::default();
    let mut ranges = Vec::new();
    let mut pairs = Pairs { old, new, held: (None, None) };
    while let Some((old, new)) = pairs.next().map_err(ProofError::Read)? {
        let (Some(old), Some(new)) = (old, new) else {
            let at = old.or(new).map_or(GuestOffset(0), |run| run.start);
            return Err(mismatch(at, old, new));
        };
        let mut done = 0;
        while done < old.length {
            let at = old.start.plus(done);
            let (Some(rest), Some(fresh)) = (old.clip(at, old.end()), new.clip(at, new.end())) else { break };
            let (agreement, length) = agree(layout, &rest, &fresh, below_end);
            match agreement {
                Agreement::Same => proof.planned_bytes += length,
                Agreement::Compare => {
                    proof.compared_bytes += length;
                    ranges.push((at, length));
                }
                Agreement::Different => return Err(mismatch(at, Some(rest), Some(fresh))),
            }
            done += length;
        }
        if ranges.len() >= BATCH {
            compare(&mut ranges, &mut equal)?;
        }
    }
    compare(&mut ranges, &mut equal)?;
    Ok(proof)
}

fn mismatch<E: std::error::Error>(at: GuestOffset, old: Option<Run>, new: Option<Run>) -> ProofError<E> {
    ProofError::Map { at, expected: old.map(|run| run.content), found: new.map(|run| run.content) }
}

fn compare<E: std::error::Error>(
    ranges: &mut Vec<Range>,
    equal: &mut impl FnMut(&[Range]) -> Result<Option<Range>, E>,
) -> Result<(), ProofError<E>> {
    if ranges.is_empty() {
        return Ok(());
    }
    if let Some((at, _)) = equal(ranges).map_err(ProofError::Read)? {
        return Err(ProofError::Bytes { at });
    }
    ranges.clear();
    Ok(())
}

/// The moves come from walking a set, the entries from ranks in it, the proof from selecting in it: each
/// move's both ends must select to where it was moved from.
pub fn prove_moves<E: std::error::Error>(layout: &Layout) -> Result<(), ProofError<E>> {
    for moved in layout.moves() {
        for offset in [0, moved.length - 1] {
            let to = HostOffset(moved.to + offset);
            let expected = HostOffset(moved.from + offset);
            match layout.origin(to) {
                Origin::Moved { layer, host, .. } if layer == moved.source && host == expected => {}
                _ => return Err(ProofError::Moves { to }),
            }
        }
    }
    Ok(())
}

/// What two runs over the same range say of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Agreement {
    Same,
    Compare,
    Different,
}

/// What the beginnings of two runs over one range say, and for how many bytes (above 0) it holds.
fn agree(layout: &Layout, old: &Run, new: &Run, below_end: u64) -> (Agreement, u64) {
    let past_below = old.start.0 >= below_end;
    let verdict = match (new.content, old.content) {
        (Content::Zero, Content::Zero) | (Content::Below, Content::Below) => Agreement::Same,
        (Content::Zero | Content::Below, Content::Zero | Content::Below) if past_below => Agreement::Same,
        (Content::Compressed { .. }, _) => Agreement::Compare,
        (Content::Data { host, .. }, _) => return data_agrees(layout, host, new.length, old.content),
        _ => Agreement::Different,
    };
    (verdict, new.length)
}

/// Follows bytes of the new file back to where they came from.
fn data_agrees(layout: &Layout, host: HostOffset, length: u64, old: Content) -> (Agreement, u64) {
    let mut done = 0;
    while done < length {
        match (layout.origin(host.plus(done)), old) {
            (
                Origin::Moved { layer, host: from, length: more },
                Content::Data { layer: old_layer, host: old_host },
            ) if layer == old_layer && from == old_host.plus(done) => done += more,
            // What was written anew lies behind all that was moved.
            (Origin::Written, _) if done == 0 => return (Agreement::Compare, length),
            (Origin::Written, _) => return (Agreement::Same, done),
            _ => return (Agreement::Different, length),
        }
    }
    (Agreement::Same, length)
}

/// Walks two maps side by side, in ranges over which both are one run; old zeros and "below" are cut where
/// the new map cuts them and the other way round.
struct Pairs<A, B> {
    old: A,
    new: B,
    held: (Option<Run>, Option<Run>),
}

impl<A, B> Pairs<A, B> {
    #[expect(clippy::type_complexity, reason = "a pair of optional runs, or the end")]
    fn next<E>(&mut self) -> Result<Option<(Option<Run>, Option<Run>)>, E>
    where
        A: Iterator<Item = Result<Run, E>>,
        B: Iterator<Item = Result<Run, E>>,
    {
        let old = match self.held.0.take() {
            Some(run) => Some(run),
            None => self.old.next().transpose()?,
        };
        let new = match self.held.1.take() {
            Some(run) => Some(run),
            None => self.new.next().transpose()?,
        };
        match (old, new) {
            (None, None) => Ok(None),
            (Some(a), Some(b)) if a.start == b.start => {
                let end = a.end().min(b.end());
                self.held = (a.clip(end, a.end()), b.clip(end, b.end()));
                Ok(Some((a.clip(a.start, end), b.clip(b.start, end))))
            }
            (old, new) => Ok(Some((old, new.filter(|_| old.is_none())))),
        }
    }
}
