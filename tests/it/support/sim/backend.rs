//! The store as one instance sees it: every call waits for its turn, and may fail.

use std::any::Any;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use qchain::backend::memory::MemoryStore;
use qchain::backend::{
    Backend, BackendError, Capabilities, DirEntry, Identity, ImageLocks, LockKind, Means, Move, Moved,
    Result, Space, Stat, StoreFile, WalkEntry,
};
use qchain::ids::StorePath;

use super::world::{Call, How, Life, Verdict, World};

/// A life's handle on the store.
#[derive(Clone)]
pub struct Shared {
    world: Arc<World>,
    life: Life,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Shared").field(&self.life).finish()
    }
}

impl Shared {
    pub fn new(world: &Arc<World>, life: Life) -> Self {
        Self { world: Arc::clone(world), life }
    }

    fn memory(&self) -> &MemoryStore {
        &self.world.memory
    }

    fn act<T>(
        &self,
        call: &Call,
        whole: impl FnOnce() -> Result<T>,
        half: impl FnOnce() -> Result<()>,
    ) -> Result<T> {
        let verdict = self.world.step(self.life, call.clone());
        let (how, errno) = match verdict {
            Verdict::Go => {
                let done = whole();
                self.world.after(call, done.is_ok());
                return done;
            }
            Verdict::Fail(how, errno) => (how, errno),
            Verdict::Crash(how) => (how, super::EIO),
        };
        let done = match how {
            How::Nothing => Ok(()),
            How::Half => half(),
            How::All => whole().map(drop),
        };
        self.world.after(call, false);
        if matches!(verdict, Verdict::Crash(_)) {
            self.world.die(self.life);
        }
        done.and(Err(BackendError::from_io(call.name, &call.path, io::Error::from_raw_os_error(errno))))
    }

    fn read<T>(&self, name: &'static str, path: &StorePath, call: impl FnOnce() -> Result<T>) -> Result<T> {
        self.act(&Call { name, path: path.clone(), from: None, mutates: false }, call, || Ok(()))
    }

    fn change<T>(&self, name: &'static str, path: &StorePath, call: impl FnOnce() -> Result<T>) -> Result<T> {
        self.act(&Call { name, path: path.clone(), from: None, mutates: true }, call, || Ok(()))
    }

    fn pair(
        &self,
        name: &'static str,
        from: &StorePath,
        to: &StorePath,
        call: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.act(&Call { name, path: to.clone(), from: Some(from.clone()), mutates: true }, call, || Ok(()))
    }

    fn wrap(&self, inner: Arc<dyn StoreFile>) -> Arc<dyn StoreFile> {
        Arc::new(SimFile { inner, shared: self.clone() })
    }
}

/// A lock of one host; it goes with its guard, or with its holder.
struct Local {
    world: Arc<World>,
    number: u64,
}

impl Drop for Local {
    fn drop(&mut self) {
        self.world.unlock_local(self.number);
    }
}

impl Backend for Shared {
    fn describe(&self) -> String {
        "simulated".to_owned()
    }

    fn open(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        self.read("open", path, || self.memory().open(path)).map(|file| self.wrap(file))
    }

    fn open_writable(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        self.read("open_writable", path, || self.memory().open_writable(path)).map(|file| self.wrap(file))
    }

    fn create(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        self.change("create", path, || self.memory().create(path)).map(|file| self.wrap(file))
    }

    fn stat(&self, path: &StorePath) -> Result<Stat> {
        self.read("stat", path, || self.memory().stat(path))
    }

    fn read_dir(&self, path: &StorePath) -> Result<Vec<DirEntry>> {
        self.read("read_dir", path, || self.memory().read_dir(path))
    }

    fn walk(
        &self,
        path: &StorePath,
        max_depth: usize,
        skip: &dyn Fn(&StorePath) -> bool,
    ) -> Vec<Result<WalkEntry>> {
        match self.read("walk", path, || Ok(self.memory().walk(path, max_depth, skip))) {
            Ok(found) => found,
            Err(error) => vec![Err(error)],
        }
    }

    fn create_dir(&self, path: &StorePath, private: bool) -> Result<()> {
        self.change("create_dir", path, || self.memory().create_dir(path, private))
    }

    fn remove_file(&self, path: &StorePath) -> Result<()> {
        self.change("remove_file", path, || self.memory().remove_file(path))
    }

    fn remove_dir(&self, path: &StorePath) -> Result<()> {
        self.change("remove_dir", path, || self.memory().remove_dir(path))
    }

    fn rename(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.pair("rename", from, to, || self.memory().rename(from, to))
    }

    fn rename_dir(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.pair("rename_dir", from, to, || self.memory().rename_dir(from, to))
    }

    fn exchange(&self, a: &StorePath, b: &StorePath) -> Result<()> {
        self.pair("exchange", a, b, || self.memory().exchange(a, b))
    }

    fn hard_link(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.pair("hard_link", from, to, || self.memory().hard_link(from, to))
    }

    fn sync_dir(&self, path: &StorePath) -> Result<()> {
        self.change("sync_dir", path, || self.memory().sync_dir(path))
    }

    fn space(&self) -> Result<Space> {
        self.read("space", &StorePath::root(), || self.memory().space())
    }

    fn try_lock(&self, path: &StorePath, kind: LockKind) -> Result<Option<Box<dyn Send + Sync>>> {
        self.change("try_lock", path, || {
            match self.memory().create(path) {
                Ok(_) | Err(BackendError::AlreadyExists { .. }) => {}
                Err(error) => return Err(error),
            }
            let number = self.world.lock_local(self.life, path, kind);
            let guard = |number| Local { world: Arc::clone(&self.world), number };
            Ok(number.map(|number| Box::new(guard(number)) as Box<dyn Send + Sync>))
        })
    }

    fn local_path(&self, _path: &StorePath) -> Option<PathBuf> {
        None
    }

    fn probe(&self, scratch: &StorePath) -> Result<Capabilities> {
        self.read("probe", scratch, || self.memory().probe(scratch))
    }
}

/// An open file of a life.
#[derive(Debug)]
struct SimFile {
    inner: Arc<dyn StoreFile>,
    shared: Shared,
}

impl SimFile {
    fn read<T>(&self, name: &'static str, call: impl FnOnce() -> Result<T>) -> Result<T> {
        self.shared.read(name, self.inner.path(), call)
    }

    fn change<T>(&self, name: &'static str, call: impl FnOnce() -> Result<T>) -> Result<T> {
        self.shared.change(name, self.inner.path(), call)
    }

    fn halves<T>(
        &self,
        name: &'static str,
        whole: impl FnOnce() -> Result<T>,
        half: impl FnOnce() -> Result<()>,
    ) -> Result<T> {
        let call = Call { name, path: self.inner.path().clone(), from: None, mutates: true };
        self.shared.act(&call, whole, half)
    }
}

impl StoreFile for SimFile {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn path(&self) -> &StorePath {
        self.inner.path()
    }

    fn stat(&self) -> Result<Stat> {
        self.read("file_stat", || self.inner.stat())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        self.read("read_at", || self.inner.read_at(offset, buffer))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let half = || self.inner.write_at(offset, &data[..data.len() / 2]);
        self.halves("write_at", || self.inner.write_at(offset, data), half)
    }

    fn set_length(&self, length: u64) -> Result<()> {
        self.change("set_length", || self.inner.set_length(length))
    }

    fn reserve(&self, offset: u64, length: u64) -> Result<bool> {
        self.change("reserve", || self.inner.reserve(offset, length))
    }

    fn punch(&self, offset: u64, length: u64) -> Result<bool> {
        let half = || self.inner.punch(offset, length / 2).map(drop);
        self.halves("punch", || self.inner.punch(offset, length), half)
    }

    fn move_runs(&self, sources: &[Arc<dyn StoreFile>], runs: &[Move], means: Means) -> Result<Moved> {
        // The store knows its own files only.
        let bare = |source: &Arc<dyn StoreFile>| match source.as_any().downcast_ref::<Self>() {
            Some(wrapped) => Arc::clone(&wrapped.inner),
            None => Arc::clone(source),
        };
        let sources: Vec<_> = sources.iter().map(bare).collect();
        let half = || self.inner.move_runs(&sources, &runs[..runs.len() / 2], means).map(drop);
        self.halves("move_runs", || self.inner.move_runs(&sources, runs, means), half)
    }

    fn sync(&self) -> Result<()> {
        self.change("sync", || self.inner.sync())
    }

    fn drop_cache(&self) -> Result<()> {
        self.read("drop_cache", || self.inner.drop_cache())
    }

    fn identity(&self) -> Result<Identity> {
        self.read("identity", || self.inner.identity())
    }

    fn set_identity(&self, identity: &Identity) -> Result<()> {
        self.change("set_identity", || self.inner.set_identity(identity))
    }

    fn image_locks(&self) -> Result<ImageLocks> {
        self.read("image_locks", || self.inner.image_locks())
    }

    fn hold_image_locks(&self) -> Result<Option<Box<dyn Send + Sync>>> {
        self.read("hold_image_locks", || self.inner.hold_image_locks())
    }
}
