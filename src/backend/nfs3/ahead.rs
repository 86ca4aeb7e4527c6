//! What is going to be read, asked for before: so that many calls are under way while whoever reads goes from one piece to
//! the next.
//!
//! A range that was announced is read by calls of its own, and kept for a moment until it is asked for. What failed, or was
//! forgotten by then, is read as if nobody had announced it. Only files that this process does not write to are read ahead:
//! what is written lies over what the server gives afterwards, not over what it gave before.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::sleep;

use super::access::Access;
use super::pool::lock;

/// The most bytes that are kept of all files of a store.
const MOST_BYTES: usize = 64 << 20;
/// How long what nobody asked for is kept.
const KEPT: Duration = Duration::from_secs(3);

/// How many bytes are kept, or were asked for, of all files of a store.
pub(super) type Held = Arc<AtomicUsize>;

/// What is read ahead of one open file.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    parts: Mutex<VecDeque<Arc<Part>>>,
}

/// What one call reads.
#[derive(Debug)]
struct Part {
    offset: u64,
    length: usize,
    /// Who writes to files of the store had begun so often then.
    writers: usize,
    state: Mutex<State>,
    ended: Condvar,
    /// How much of it was taken.
    taken: AtomicUsize,
    held: Held,
}

#[derive(Debug)]
enum State {
    Asked,
    There(Vec<u8>),
    Lost,
}

impl Drop for Part {
    fn drop(&mut self) {
        self.held.fetch_sub(self.length, Ordering::Relaxed);
    }
}

impl Part {
    fn end(&self, state: State) {
        *lock(&self.state) = state;
        self.ended.notify_all();
    }

    fn covers(&self, offset: u64) -> bool {
        offset >= self.offset && offset - self.offset < self.length as u64
    }

    /// Waits for it, and copies what it has from an offset on; how much that was.
    fn copy(&self, offset: u64, buffer: &mut [u8]) -> usize {
        let mut state = lock(&self.state);
        while matches!(*state, State::Asked) {
            state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let State::There(data) = &*state else { return 0 };
        let skip = usize::try_from(offset - self.offset).unwrap_or(usize::MAX);
        let rest = data.get(skip..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        if let (Some(place), Some(rest)) = (buffer.get_mut(..count), rest.get(..count)) {
            place.copy_from_slice(rest);
        }
        count
    }
}

/// Whoever waits is woken, however a call ends.
struct Promise(Arc<Part>);

impl Drop for Promise {
    fn drop(&mut self) {
        if matches!(*lock(&self.0.state), State::Asked) {
            self.0.end(State::Lost);
        }
    }
}

impl Ahead {
    /// Announces a range of at most one call; the work that reads it, unless it is at hand already or there is no room.
    pub(super) fn announce(
        self: &Arc<Self>,
        access: Access,
        offset: u64,
        length: usize,
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        let part = self.begin(&access, offset, length)?;
        let (ahead, weak) = (Arc::downgrade(self), Arc::downgrade(&part));
        let promise = Promise(part);
        Some(async move {
            if let Ok(data) = access.read(offset, length).await {
                promise.0.end(State::There(data));
            }
            drop(promise);
            sleep(KEPT).await;
            if let (Some(ahead), Some(part)) = (ahead.upgrade(), weak.upgrade()) {
                ahead.forget(&part);
            }
        })
    }

    fn begin(&self, access: &Access, offset: u64, length: usize) -> Option<Arc<Part>> {
        let held = access.shared.ahead.clone();
        let mut parts = lock(&self.parts);
        if parts.iter().any(|part| part.covers(offset)) {
            return None;
        }
        let before = held.fetch_add(length, Ordering::Relaxed);
        let part = Arc::new(Part {
            offset,
            length,
            writers: access.shared.writers.begun(),
            state: Mutex::new(State::Asked),
            ended: Condvar::new(),
            taken: AtomicUsize::new(0),
            held,
        });
        if before.saturating_add(length) > MOST_BYTES {
            return None;
        }
        parts.push_back(part.clone());
        Some(part)
    }

    /// What is at hand, or was asked for, from an offset on without a gap; how many bytes. Parts of before this process began to
    /// write somewhere (`writers`) are forgotten. Blocks until they are there.
    pub(super) fn take(&self, writers: usize, offset: u64, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(done as u64);
            let found = lock(&self.parts).iter().find(|part| part.covers(at)).cloned();
            let Some(part) = found else { break };
            let count = if part.writers == writers { part.copy(at, rest) } else { 0 };
            let taken = part.taken.fetch_add(count, Ordering::Relaxed) + count;
            if count == 0 || taken >= part.length {
                self.forget(&part);
            }
            if count == 0 {
                break;
            }
            done += count;
        }
        done
    }

    fn forget(&self, part: &Arc<Part>) {
        lock(&self.parts).retain(|other| !Arc::ptr_eq(other, part));
    }
}
