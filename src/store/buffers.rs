//! Buffers that were given back, to be filled again: a fresh one of a MiB costs as much in page faults, or in zeroing, as
//! reading into it does.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Buffers that nobody needs now. Holds as many as were in use at once, of the longest length that was asked of each.
#[derive(Debug, Default)]
pub struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// None yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many bytes, of whatever content.
    pub fn take(&self, length: usize) -> Vec<u8> {
        let mut buffer = self.lock().pop().unwrap_or_default();
        buffer.resize(length, 0);
        buffer
    }

    /// Does something with a buffer, of whatever length and content, and keeps it for the next.
    pub fn with<T>(&self, work: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let mut buffer = self.lock().pop().unwrap_or_default();
        let done = work(&mut buffer);
        self.put(buffer);
        done
    }

    /// Gives a buffer back.
    pub fn put(&self, buffer: Vec<u8>) {
        self.lock().push(buffer);
    }

    /// Keeps no more than so many.
    pub fn shrink(&self, count: usize) {
        self.lock().truncate(count);
    }
}

#[cfg(test)]
mod tests {
    use super::Buffers;

    #[test]
    fn what_was_given_back_is_taken_again() {
        let buffers = Buffers::default();
        let (mut a, b) = (buffers.take(100), buffers.take(5));
        assert_eq!((a.len(), b.len()), (100, 5));
        a.fill(7);
        let place = a.as_ptr();
        buffers.put(b);
        buffers.put(a);
        let again = buffers.take(50);
        assert_eq!((again.as_ptr(), again.as_slice()), (place, [7; 50].as_slice()));
        buffers.put(again);
        assert_eq!(buffers.with(|buffer| buffer.as_ptr()), place);
        buffers.shrink(0);
        assert_eq!(buffers.take(3), [0; 3]);
    }
}
