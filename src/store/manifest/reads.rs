//! When which blocks of a member were last read and found right: what makes a scrub resumable, and its debt known.
//!
//! Kept beside the manifest as `<stem>.<inode>.read`, replaced whole and not made durable: whoever loses it reads
//! once more. Block numbers are those of the member's view; only blocks of its own table count.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::backend::publish::{offer, temporary_in};
use crate::backend::{Backend, BackendError};
use crate::ids::StorePath;
use crate::store::facts::read_whole;
use crate::store::manifest::stem;
use crate::store::record::own;

/// The version of its form.
const SCHEMA: u32 = 1;
/// The longest one that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// How many spans are kept apart; the ones closest in age are joined beyond, as old as the older one.
const MAX_SPANS: usize = 2048;

/// Blocks that were read at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// The first block.
    pub first: u64,
    /// The block behind the last.
    pub end: u64,
    /// When the reading of them began, nanoseconds since 1970.
    pub read_ns: i64,
}

/// Spans in order of their blocks, apart from each other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reads {
    schema: u32,
    spans: Vec<Span>,
}

impl Reads {
    /// All blocks of a view of so many, read at one time.
    #[must_use]
    pub fn whole(blocks: u64, read_ns: i64) -> Self {
        let mut reads = Self { schema: SCHEMA, spans: Vec::new() };
        reads.mark(0..blocks, read_ns);
        reads
    }

    /// Notes that blocks were read.
    pub fn mark(&mut self, blocks: Range<u64>, read_ns: i64) {
        if blocks.is_empty() {
            return;
        }
        let mut spans = Vec::with_capacity(self.spans.len() + 2);
        let new = Span { first: blocks.start, end: blocks.end, read_ns };
        for span in std::mem::take(&mut self.spans) {
            let before = Span { end: span.end.min(new.first), ..span };
            let behind = Span { first: span.first.max(new.end), ..span };
            spans.extend([before, behind].into_iter().filter(|span| span.first < span.end));
        }
        spans.push(new);
        spans.sort_by_key(|span| span.first);
        self.spans = spans;
        self.join();
    }

    fn join(&mut self) {
        self.spans.dedup_by(|next, last| {
            let one = last.end == next.first && last.read_ns == next.read_ns;
            if one {
                last.end = next.end;
            }
            one
        });
        while self.spans.len() > MAX_SPANS {
            let gap = |pair: &[Span]| match pair {
                [a, b] if a.end == b.first => a.read_ns.abs_diff(b.read_ns),
                _ => u64::MAX,
            };
            let closest =
                self.spans.windows(2).enumerate().min_by_key(|(_, pair)| gap(pair)).map(|(at, _)| at);
            let Some((at, next)) = closest.and_then(|at| Some((at, self.spans.get(at + 1).copied()?))) else {
                return;
            };
            if let Some(span) = self.spans.get_mut(at) {
                // What lies between them was never read.
                if span.end != next.first {
                    self.spans.truncate(MAX_SPANS);
                    return;
                }
                span.end = next.end;
                span.read_ns = span.read_ns.min(next.read_ns);
            }
            self.spans.remove(at + 1);
        }
    }

    /// When the block that was left alone for longest was read; `None` if one of the view's `blocks` never was.
    #[must_use]
    pub fn oldest_ns(&self, blocks: u64) -> Option<i64> {
        let mut covered = 0;
        let mut oldest = i64::MAX;
        for span in self.spans.iter().filter(|span| span.first < blocks) {
            if span.first > covered {
                return None;
            }
            covered = covered.max(span.end);
            oldest = oldest.min(span.read_ns);
        }
        (covered >= blocks).then_some(oldest)
    }

    /// All of a view's `blocks`, those that were left alone for longest first.
    #[must_use]
    pub fn by_age(&self, blocks: u64) -> Vec<Range<u64>> {
        let mut parts: Vec<(i64, Range<u64>)> = Vec::new();
        let mut at = 0;
        for span in &self.spans {
            let (first, end) = (span.first.min(blocks), span.end.min(blocks));
            if at < first {
                parts.push((i64::MIN, at..first));
            }
            if first < end {
                parts.push((span.read_ns, first.max(at)..end));
            }
            at = at.max(end);
        }
        if at < blocks {
            parts.push((i64::MIN, at..blocks));
        }
        parts.sort_by_key(|(read_ns, range)| (*read_ns, range.start));
        parts.into_iter().map(|(_, range)| range).filter(|range| !range.is_empty()).collect()
    }
}

fn path(member: &StorePath, inode: u64) -> StorePath {
    own(&["manifests", &format!("{}.{inode}.read", stem(member))])
}

/// Reads what was noted of a file; nothing if it cannot be understood.
pub fn load(
    backend: &std::sync::Arc<dyn Backend>,
    member: &StorePath,
    inode: u64,
) -> Result<Reads, BackendError> {
    match read_whole(backend, &path(member, inode), MAX_BYTES) {
        Ok(bytes) => {
            let reads: Option<Reads> = serde_json::from_slice(&bytes).ok();
            let sane = |reads: &Reads| {
                reads.schema == SCHEMA
                    && reads.spans.iter().all(|span| span.first < span.end)
                    && reads.spans.windows(2).all(|pair| matches!(pair, [a, b] if a.end <= b.first))
            };
            Ok(reads.filter(sane).unwrap_or_default())
        }
        Err(BackendError::NotFound { .. }) => Ok(Reads::default()),
        Err(error) => Err(error),
    }
}

/// Writes it. Not durable; two who write at the same time leave one of both.
pub fn save(
    backend: &dyn Backend,
    member: &StorePath,
    inode: u64,
    reads: &Reads,
) -> Result<(), BackendError> {
    let reads = Reads { schema: SCHEMA, spans: reads.spans.clone() };
    let bytes = serde_json::to_vec(&reads).unwrap_or_default();
    let path = path(member, inode);
    match backend.remove_file(&path) {
        Ok(()) | Err(BackendError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    match offer(backend, &temporary_in(&own(&["tmp"]))?, &path, &bytes) {
        Err(BackendError::AlreadyExists { .. }) => Ok(()),
        done => done,
    }
}

/// Forgets it.
pub fn forget(backend: &dyn Backend, member: &StorePath, inode: u64) -> Result<(), BackendError> {
    match backend.remove_file(&path(member, inode)) {
        Ok(()) | Err(BackendError::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{MAX_SPANS, Reads};

    #[test]
    fn the_oldest_comes_first() {
        let mut reads = Reads::whole(100, 10);
        reads.mark(20..30, 50);
        reads.mark(90..100, 5);
        assert_eq!(reads.oldest_ns(100), Some(5));
        assert_eq!(reads.oldest_ns(101), None);
        assert_eq!(reads.by_age(110), [100..110, 90..100, 0..20, 30..90, 20..30]);
        assert_eq!(Reads::default().by_age(3), vec![0..3]);
        assert!(Reads::default().by_age(0).is_empty());
    }

    #[test]
    fn what_lies_behind_the_view_does_not_count() {
        let mut reads = Reads::whole(300, 1);
        reads.mark(200..300, 0);
        assert_eq!(reads.oldest_ns(200), Some(1));
    }

    #[test]
    fn they_stay_bounded() {
        let mut reads = Reads::whole(1 << 20, 1);
        for at in 0..3 * MAX_SPANS as u64 {
            reads.mark(at * 7..at * 7 + 3, i64::try_from(at).unwrap() + 2);
        }
        assert!(reads.spans.len() <= MAX_SPANS);
        assert_eq!(reads.oldest_ns(1 << 20), Some(1));
    }

    proptest! {
        #[test]
        fn every_block_is_at_most_as_new_as_its_last_reading(
            marks in prop::collection::vec((0_u64..200, 1_u64..80, 0_i64..50), 0..40)
        ) {
            let mut reads = Reads::default();
            let mut plain = vec![None; 300];
            for (first, count, when) in marks {
                reads.mark(first..first + count, when);
                for at in first..first + count {
                    plain[usize::try_from(at).unwrap()] = Some(when);
                }
            }
            let expected = plain[..200].iter().copied().min().flatten();
            prop_assert_eq!(reads.oldest_ns(200), expected);
            let parts = reads.by_age(300);
            let total: u64 = parts.iter().map(|part| part.end - part.start).sum();
            prop_assert_eq!(total, 300);
            let ages: Vec<Option<i64>> =
                parts.iter().map(|part| plain[usize::try_from(part.start).unwrap()]).collect();
            prop_assert!(ages.is_sorted());
        }
    }
}
