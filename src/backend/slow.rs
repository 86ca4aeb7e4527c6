//! A store that is as slow as a network mount, for measuring.
//!
//! Wraps any other store. Every call waits for the latency first; bytes then take their time on one line
//! that all calls share, so that two transfers at once take twice as long, while latencies overlap. That is
//! the mount as a whole: what a client's cache or its read-ahead would save is not in it.

use std::any::Any;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{
    Backend, BackendError, Capabilities, DirEntry, Identity, ImageLocks, LockKind, Means, Move, Moved,
    Result, Space, Stat, StoreFile, WalkEntry,
};
use crate::ids::StorePath;

/// A store that wraps another and delays its calls. It does not clone, whatever the other one can.
#[derive(Debug)]
pub struct Slow {
    inner: Arc<dyn Backend>,
    line: Arc<Line>,
}

#[derive(Debug)]
struct Line {
    latency: Duration,
    bytes_per_second: u64,
    /// When the line is free again.
    free: Mutex<Instant>,
}

impl Line {
    /// Waits for a call that moves so many bytes.
    fn wait(&self, bytes: u64) {
        let now = Instant::now();
        let mut sent = now;
        if bytes > 0 && self.bytes_per_second > 0 {
            let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
            let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            sent = (*free).max(now) + takes;
            *free = sent;
        }
        thread::sleep(self.latency + sent.duration_since(now));
    }
}

impl Slow {
    /// Wraps a store. A rate of 0 is no limit.
    #[must_use]
    pub fn new(inner: Arc<dyn Backend>, latency: Duration, bytes_per_second: u64) -> Self {
        let line = Line { latency, bytes_per_second, free: Mutex::new(Instant::now()) };
        Self { inner, line: Arc::new(line) }
    }

    /// The other store, after the time of one call.
    fn inner(&self) -> &dyn Backend {
        self.line.wait(0);
        self.inner.as_ref()
    }

    fn wrap(&self, file: Arc<dyn StoreFile>) -> Arc<dyn StoreFile> {
        Arc::new(SlowFile { inner: file, line: Arc::clone(&self.line) })
    }
}

impl Backend for Slow {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn open(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        self.inner().open(path).map(|file| self.wrap(file))
    }

    fn open_writable(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        self.inner().open_writable(path).map(|file| self.wrap(file))
    }

    fn create(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        self.inner().create(path).map(|file| self.wrap(file))
    }

    fn stat(&self, path: &StorePath) -> Result<Stat> {
        self.inner().stat(path)
    }

    fn read_dir(&self, path: &StorePath) -> Result<Vec<DirEntry>> {
        self.inner().read_dir(path)
    }

    /// One call for each directory.
    fn walk(
        &self,
        path: &StorePath,
        max_depth: usize,
        skip: &dyn Fn(&StorePath) -> bool,
    ) -> Vec<Result<WalkEntry>> {
        self.inner().walk(path, max_depth, &|path| {
            let skipped = skip(path);
            if !skipped {
                self.line.wait(0);
            }
            skipped
        })
    }

    fn create_dir(&self, path: &StorePath, private: bool) -> Result<()> {
        self.inner().create_dir(path, private)
    }

    fn remove_file(&self, path: &StorePath) -> Result<()> {
        self.inner().remove_file(path)
    }

    fn remove_dir(&self, path: &StorePath) -> Result<()> {
        self.inner().remove_dir(path)
    }

    fn rename(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.inner().rename(from, to)
    }

    fn exchange(&self, a: &StorePath, b: &StorePath) -> Result<()> {
        self.inner().exchange(a, b)
    }

    fn rename_dir(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.inner().rename_dir(from, to)
    }

    fn hard_link(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.inner().hard_link(from, to)
    }

    fn same_mount(&self, a: &StorePath, b: &StorePath) -> Result<bool> {
        self.inner().same_mount(a, b)
    }

    fn sync_dir(&self, path: &StorePath) -> Result<()> {
        self.inner().sync_dir(path)
    }

    fn space(&self) -> Result<Space> {
        self.inner().space()
    }

    fn try_lock(&self, path: &StorePath, kind: LockKind) -> Result<Option<Box<dyn Send + Sync>>> {
        self.inner().try_lock(path, kind)
    }

    /// Another program that opens it there is not slowed down.
    fn local_path(&self, path: &StorePath) -> Option<PathBuf> {
        self.inner.local_path(path)
    }

    fn seen_from(&self, host: &str) -> String {
        self.inner().seen_from(host)
    }

    fn of_known(&self, found: Capabilities) -> Capabilities {
        self.inner().of_known(found)
    }

    fn probe(&self, scratch: &StorePath) -> Result<Capabilities> {
        let found = self.inner().probe(scratch)?;
        Ok(Capabilities { network: true, clone: false, clone_alignment: 0, ..found })
    }
}

/// An open file of a [`Slow`] store.
#[derive(Debug)]
struct SlowFile {
    inner: Arc<dyn StoreFile>,
    line: Arc<Line>,
}

impl SlowFile {
    /// The other store's file, after the time of one call.
    fn inner(&self) -> &dyn StoreFile {
        self.line.wait(0);
        self.inner.as_ref()
    }

    fn cannot_clone(&self) -> BackendError {
        let source = io::Error::new(io::ErrorKind::Unsupported, "this store does not clone");
        BackendError::CannotClone { path: self.path().to_string(), source }
    }
}

impl StoreFile for SlowFile {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn path(&self) -> &StorePath {
        self.inner.path()
    }

    fn stat(&self) -> Result<Stat> {
        self.inner().stat()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let count = self.inner.read_at(offset, buffer)?;
        self.line.wait(count as u64);
        Ok(count)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.line.wait(data.len() as u64);
        self.inner.write_at(offset, data)
    }

    fn set_length(&self, length: u64) -> Result<()> {
        self.inner().set_length(length)
    }

    fn reserve(&self, offset: u64, length: u64) -> Result<bool> {
        self.inner().reserve(offset, length)
    }

    fn punch(&self, offset: u64, length: u64) -> Result<bool> {
        self.inner().punch(offset, length)
    }

    /// One call's latency for the batch, whose requests would be in flight together; each byte goes over
    /// the line when it is written, and when it is read from a slow store as well.
    fn move_runs(&self, sources: &[Arc<dyn StoreFile>], runs: &[Move], means: Means) -> Result<Moved> {
        if means == Means::Clone {
            self.line.wait(0);
            return Err(self.cannot_clone());
        }
        let slow = |source: &Arc<dyn StoreFile>| source.as_any().downcast_ref::<Self>().is_some();
        let bare = |source: &Arc<dyn StoreFile>| match source.as_any().downcast_ref::<Self>() {
            Some(wrapped) => Arc::clone(&wrapped.inner),
            None => Arc::clone(source),
        };
        let read_here = |run: &&Move| sources.get(run.source).is_some_and(slow);
        let read: u64 = runs.iter().filter(read_here).map(|run| run.length).sum();
        let sources: Vec<_> = sources.iter().map(bare).collect();
        let moved = self.inner.move_runs(&sources, runs, means)?;
        // Bytes past a source's end were not read.
        self.line.wait(moved.copied_bytes + read.min(moved.copied_bytes));
        Ok(moved)
    }

    fn sync(&self) -> Result<()> {
        self.inner().sync()
    }

    fn drop_cache(&self) -> Result<()> {
        self.inner().drop_cache()
    }

    fn identity(&self) -> Result<Identity> {
        self.inner().identity()
    }

    fn set_identity(&self, identity: &Identity) -> Result<()> {
        self.inner().set_identity(identity)
    }

    fn image_locks(&self) -> Result<ImageLocks> {
        self.inner().image_locks()
    }

    fn hold_image_locks(&self) -> Result<Option<Box<dyn Send + Sync>>> {
        self.inner().hold_image_locks()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::Slow;
    use crate::backend::memory::MemoryStore;
    use crate::backend::{Backend, Means, Move};
    use crate::ids::StorePath;

    fn path(text: &str) -> StorePath {
        StorePath::parse(text).unwrap()
    }

    #[test]
    fn calls_take_their_latency_and_bytes_their_time() {
        let store = Slow::new(Arc::new(MemoryStore::new()), Duration::from_millis(10), 10_000_000);
        let begun = Instant::now();
        let source = store.create(&path("a")).unwrap();
        let target = store.create(&path("b")).unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(20));
        let begun = Instant::now();
        source.write_at(0, &vec![1; 1_000_000]).unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(110));
        let begun = Instant::now();
        let run = [Move { source: 0, from: 0, to: 0, length: 1_000_000 }];
        assert_eq!(target.move_runs(&[source], &run, Means::Copy).unwrap().copied_bytes, 1_000_000);
        assert!(begun.elapsed() >= Duration::from_millis(210), "read and written");
    }

    #[test]
    fn transfers_share_the_line() {
        let store = Slow::new(Arc::new(MemoryStore::new()), Duration::ZERO, 10_000_000);
        let files = [store.create(&path("a")).unwrap(), store.create(&path("b")).unwrap()];
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for file in &files {
                scope.spawn(move || file.write_at(0, &vec![1; 1_000_000]).unwrap());
            }
        });
        assert!(begun.elapsed() >= Duration::from_millis(200));
    }
}
