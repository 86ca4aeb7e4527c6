//! A store that records every call and fails where it is told to.
//!
//! Wraps any other store. Calls are numbered from 0 in the order in which they begin, mutating ones a
//! second time among themselves: "fail the n-th mutating call" with n from 0 up to
//! [`Faulty::mutations`] visits every place where a verb can be cut off.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::error::{NO_EXCHANGE, NO_FALLOCATE, NO_LINKS};
use super::{
    Backend, BackendError, Capabilities, DirEntry, Identity, ImageLocks, LockKind, Means, Move, Moved,
    Result, Space, Stat, StoreFile, WalkEntry,
};
use crate::ids::StorePath;

/// One call as it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The method's name.
    pub name: &'static str,
    /// The path it is about: of two, the new name.
    pub path: StorePath,
    /// The other path of a `rename`, `hard_link` or `exchange`: the one given first.
    pub from: Option<StorePath>,
    /// Its number among the mutating calls, if it is one.
    pub mutation: Option<u64>,
}

/// How long a fault lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasting {
    /// That call only.
    Once,
    /// That call and every mutating one after it: a disk that went bad or full.
    Onwards,
    /// That call and every call after it, reads too: the process is dead, as far as the store sees.
    Dead,
}

/// A fault to come.
#[derive(Clone, Copy, Debug)]
struct Fault {
    at: u64,
    errno: i32,
    lasting: Lasting,
    /// Whether the failing call does half its work first.
    half: bool,
}

type Hook = Box<dyn FnOnce() + Send>;

/// Changes what is about to be written to a file at an offset.
type Tamper = Arc<dyn Fn(&StorePath, u64, &mut Vec<u8>) + Send + Sync>;

#[derive(Default)]
struct Plan {
    calls: Vec<Call>,
    mutations: u64,
    fault: Option<Fault>,
    hooks: BTreeMap<u64, Hook>,
    before: BTreeMap<u64, Hook>,
    after: BTreeMap<u64, Hook>,
    tamper: Option<Tamper>,
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plan")
            .field("calls", &self.calls.len())
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

/// What a call is to do.
enum Verdict {
    Go,
    Fail(BackendError),
    /// Half of the work, then this.
    Half(BackendError),
}

/// A call that is about to be made.
#[derive(Clone, Copy)]
struct Planned<'c> {
    name: &'static str,
    path: &'c StorePath,
    from: Option<&'c StorePath>,
    mutates: bool,
}

/// A store that wraps another, counts, records and fails calls. Clones share everything.
#[derive(Clone, Debug)]
pub struct Faulty {
    inner: Arc<dyn Backend>,
    plan: Arc<Mutex<Plan>>,
}

impl Faulty {
    /// Wraps a store; nothing fails yet.
    #[must_use]
    pub fn new(inner: Arc<dyn Backend>) -> Self {
        Self { inner, plan: Arc::default() }
    }

    /// Makes the `n`-th mutating call (from 0, counting those already made) fail with a system error
    /// number, before it does anything. Replaces an earlier order.
    pub fn fail_at(&self, n: u64, errno: i32, lasting: Lasting) {
        self.plan().fault = Some(Fault { at: n, errno, lasting, half: false });
    }

    /// As [`Faulty::fail_at`], but a write or a batch of moves does half of its work first.
    pub fn fail_halfway_at(&self, n: u64, errno: i32, lasting: Lasting) {
        self.plan().fault = Some(Fault { at: n, errno, lasting, half: true });
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        self.plan().fault = None;
    }

    /// Runs `hook` right before the `n`-th call of any kind (from 0): what another process does meanwhile.
    /// It may use the wrapped store, and this one (then its calls count too).
    pub fn before(&self, n: u64, hook: impl FnOnce() + Send + 'static) {
        self.plan().hooks.insert(n, Box::new(hook));
    }

    /// As [`Faulty::before`], right before the `n`-th mutating call (from 0).
    pub fn before_mutation(&self, n: u64, hook: impl FnOnce() + Send + 'static) {
        self.plan().before.insert(n, Box::new(hook));
    }

    /// Runs `hook` right after the `n`-th mutating call (from 0), failed or not, before its caller goes on.
    pub fn after_mutation(&self, n: u64, hook: impl FnOnce() + Send + 'static) {
        self.plan().after.insert(n, Box::new(hook));
    }

    /// Shows the bytes of every `write_at` from now on to `tamper`, which may change them: a store that
    /// writes something else than it was told, and says nothing. Replaces an earlier one.
    pub fn tamper(&self, tamper: impl Fn(&StorePath, u64, &mut Vec<u8>) + Send + Sync + 'static) {
        self.plan().tamper = Some(Arc::new(tamper));
    }

    /// All calls so far.
    #[must_use]
    pub fn trace(&self) -> Vec<Call> {
        self.plan().calls.clone()
    }

    /// How many calls were made.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.plan().calls.len() as u64
    }

    /// How many mutating calls were made, failed ones included.
    #[must_use]
    pub fn mutations(&self) -> u64 {
        self.plan().mutations
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the call and says what it is to do, and its number among the mutating ones.
    fn begin(&self, call: Planned<'_>) -> (Verdict, Option<u64>) {
        let (hooks, fault, mutation) = {
            let mut plan = self.plan();
            let number = plan.calls.len() as u64;
            let mutation = call.mutates.then_some(plan.mutations);
            plan.mutations += u64::from(call.mutates);
            let (path, from) = (call.path.clone(), call.from.cloned());
            plan.calls.push(Call { name: call.name, path, from, mutation });
            let next = plan.mutations;
            let fault = plan.fault.filter(|fault| match (fault.lasting, mutation) {
                (Lasting::Once, Some(n)) => n == fault.at,
                (Lasting::Onwards | Lasting::Dead, Some(n)) => n >= fault.at,
                // A read is dead once the failing call was made.
                (Lasting::Dead, None) => next > fault.at,
                (_, None) => false,
            });
            let own = mutation.and_then(|n| plan.before.remove(&n));
            ([plan.hooks.remove(&number), own], fault, mutation)
        };
        // Without the lock: the hooks may call this store.
        hooks.into_iter().flatten().for_each(|hook| hook());
        let verdict = match fault {
            None => Verdict::Go,
            Some(fault) => {
                let error = injected(call.name, call.path, fault.errno);
                let half = fault.half && mutation == Some(fault.at);
                if half { Verdict::Half(error) } else { Verdict::Fail(error) }
            }
        };
        (verdict, mutation)
    }

    /// Counts a call and lets it happen, by half, or not at all.
    fn act<T>(
        &self,
        call: Planned<'_>,
        whole: impl FnOnce() -> Result<T>,
        half: impl FnOnce() -> Result<()>,
    ) -> Result<T> {
        let (verdict, mutation) = self.begin(call);
        let done = match verdict {
            Verdict::Go => whole(),
            Verdict::Fail(error) => Err(error),
            Verdict::Half(error) => half().and(Err(error)),
        };
        let after = mutation.and_then(|n| self.plan().after.remove(&n));
        if let Some(hook) = after {
            hook();
        }
        done
    }

    /// Half of this call is none of it.
    fn call<T>(
        &self,
        name: &'static str,
        path: &StorePath,
        mutates: bool,
        call: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        self.act(Planned { name, path, from: None, mutates }, call, || Ok(()))
    }

    /// A mutating call about two names.
    fn pair(
        &self,
        name: &'static str,
        from: &StorePath,
        to: &StorePath,
        call: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.act(Planned { name, path: to, from: Some(from), mutates: true }, call, || Ok(()))
    }

    fn wrap(&self, file: Arc<dyn StoreFile>) -> Arc<dyn StoreFile> {
        Arc::new(FaultyFile { inner: file, store: self.clone() })
    }
}

fn injected(name: &'static str, path: &StorePath, errno: i32) -> BackendError {
    let source = io::Error::from_raw_os_error(errno);
    let unsupported = matches!(
        Errno::from_io_error(&source),
        Some(Errno::NOTSUP | Errno::INVAL | Errno::XDEV | Errno::NOTTY)
    );
    if name == CLONE && unsupported {
        return BackendError::CannotClone { path: path.to_string(), source };
    }
    let lacking = match name {
        EXCHANGE => NO_EXCHANGE,
        HARD_LINK => NO_LINKS,
        _ => &[],
    };
    BackendError::from_io_of(lacking, name, path, source)
}

/// How a batch of clones appears in the trace; one of copies is `move_runs`.
const CLONE: &str = "clone_runs";
const EXCHANGE: &str = "exchange";
const HARD_LINK: &str = "hard_link";

impl Backend for Faulty {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn open(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        self.call("open", path, false, || self.inner.open(path)).map(|file| self.wrap(file))
    }

    fn open_writable(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        self.call("open_writable", path, false, || self.inner.open_writable(path)).map(|file| self.wrap(file))
    }

    fn create(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        self.call("create", path, true, || self.inner.create(path)).map(|file| self.wrap(file))
    }

    fn stat(&self, path: &StorePath) -> Result<Stat> {
        self.call("stat", path, false, || self.inner.stat(path))
    }

    fn read_dir(&self, path: &StorePath) -> Result<Vec<DirEntry>> {
        self.call("read_dir", path, false, || self.inner.read_dir(path))
    }

    fn walk(
        &self,
        path: &StorePath,
        max_depth: usize,
        skip: &dyn Fn(&StorePath) -> bool,
    ) -> Vec<Result<WalkEntry>> {
        match self.call("walk", path, false, || Ok(self.inner.walk(path, max_depth, skip))) {
            Ok(found) => found,
            Err(error) => vec![Err(error)],
        }
    }

    fn create_dir(&self, path: &StorePath, private: bool) -> Result<()> {
        self.call("create_dir", path, true, || self.inner.create_dir(path, private))
    }

    fn remove_file(&self, path: &StorePath) -> Result<()> {
        self.call("remove_file", path, true, || self.inner.remove_file(path))
    }

    fn remove_dir(&self, path: &StorePath) -> Result<()> {
        self.call("remove_dir", path, true, || self.inner.remove_dir(path))
    }

    fn rename(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.pair("rename", from, to, || self.inner.rename(from, to))
    }

    fn exchange(&self, a: &StorePath, b: &StorePath) -> Result<()> {
        self.pair(EXCHANGE, a, b, || self.inner.exchange(a, b))
    }

    fn rename_dir(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.pair("rename_dir", from, to, || self.inner.rename_dir(from, to))
    }

    fn hard_link(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.pair(HARD_LINK, from, to, || self.inner.hard_link(from, to))
    }

    fn same_mount(&self, a: &StorePath, b: &StorePath) -> Result<bool> {
        self.call("same_mount", a, false, || self.inner.same_mount(a, b))
    }

    fn sync_dir(&self, path: &StorePath) -> Result<()> {
        self.call("sync_dir", path, true, || self.inner.sync_dir(path))
    }

    fn space(&self) -> Result<Space> {
        self.call("space", &StorePath::root(), false, || self.inner.space())
    }

    fn try_lock(&self, path: &StorePath, kind: LockKind) -> Result<Option<Box<dyn Send + Sync>>> {
        self.call("try_lock", path, true, || self.inner.try_lock(path, kind))
    }

    /// Not counted: it is no call to the store.
    fn local_path(&self, path: &StorePath) -> Option<PathBuf> {
        self.inner.local_path(path)
    }

    fn seen_from(&self, host: &str) -> String {
        self.inner.seen_from(host)
    }

    fn of_known(&self, found: Capabilities) -> Capabilities {
        self.inner.of_known(found)
    }

    fn probe(&self, scratch: &StorePath) -> Result<Capabilities> {
        self.call("probe", scratch, true, || self.inner.probe(scratch))
    }
}

/// An open file of a [`Faulty`] store.
#[derive(Debug)]
struct FaultyFile {
    inner: Arc<dyn StoreFile>,
    store: Faulty,
}

impl FaultyFile {
    fn call<T>(&self, name: &'static str, mutates: bool, call: impl FnOnce() -> Result<T>) -> Result<T> {
        self.store.call(name, self.inner.path(), mutates, call)
    }

    /// A mutating call that can happen by half.
    fn halves<T>(
        &self,
        name: &'static str,
        whole: impl FnOnce() -> Result<T>,
        half: impl FnOnce() -> Result<()>,
    ) -> Result<T> {
        let call = Planned { name, path: self.inner.path(), from: None, mutates: true };
        self.store.act(call, whole, half)
    }
}

/// An injected "cannot" is what a store answers that cannot.
fn or_cannot(done: Result<bool>) -> Result<bool> {
    match done {
        Err(BackendError::Io { source, .. })
            if Errno::from_io_error(&source).is_some_and(|errno| NO_FALLOCATE.contains(&errno)) =>
        {
            Ok(false)
        }
        done => done,
    }
}

impl StoreFile for FaultyFile {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn path(&self) -> &StorePath {
        self.inner.path()
    }

    fn stat(&self) -> Result<Stat> {
        self.call("file_stat", false, || self.inner.stat())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        self.call("read_at", false, || self.inner.read_at(offset, buffer))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let tamper = self.store.plan().tamper.clone();
        let tampered = tamper.map(|tamper| {
            let mut data = data.to_vec();
            tamper(self.inner.path(), offset, &mut data);
            data
        });
        let data = tampered.as_deref().unwrap_or(data);
        self.halves(
            "write_at",
            || self.inner.write_at(offset, data),
            || self.inner.write_at(offset, &data[..data.len() / 2]),
        )
    }

    fn set_length(&self, length: u64) -> Result<()> {
        self.call("set_length", true, || self.inner.set_length(length))
    }

    fn reserve(&self, offset: u64, length: u64) -> Result<bool> {
        or_cannot(self.call("reserve", true, || self.inner.reserve(offset, length)))
    }

    fn punch(&self, offset: u64, length: u64) -> Result<bool> {
        or_cannot(self.halves(
            "punch",
            || self.inner.punch(offset, length),
            || self.inner.punch(offset, length / 2).map(drop),
        ))
    }

    fn move_runs(&self, sources: &[Arc<dyn StoreFile>], runs: &[Move], means: Means) -> Result<Moved> {
        // The wrapped store knows its own files only.
        let bare = |source: &Arc<dyn StoreFile>| match source.as_any().downcast_ref::<Self>() {
            Some(wrapped) => Arc::clone(&wrapped.inner),
            None => Arc::clone(source),
        };
        let sources: Vec<_> = sources.iter().map(bare).collect();
        let name = if means == Means::Clone { CLONE } else { "move_runs" };
        self.halves(
            name,
            || self.inner.move_runs(&sources, runs, means),
            || self.inner.move_runs(&sources, &runs[..runs.len() / 2], means).map(drop),
        )
    }

    fn sync(&self) -> Result<()> {
        self.call("sync", true, || self.inner.sync())
    }

    fn drop_cache(&self) -> Result<()> {
        self.call("drop_cache", false, || self.inner.drop_cache())
    }

    fn identity(&self) -> Result<Identity> {
        self.call("identity", false, || self.inner.identity())
    }

    fn set_identity(&self, identity: &Identity) -> Result<()> {
        self.call("set_identity", true, || self.inner.set_identity(identity))
    }

    fn image_locks(&self) -> Result<ImageLocks> {
        self.call("image_locks", false, || self.inner.image_locks())
    }

    fn hold_image_locks(&self) -> Result<Option<Box<dyn Send + Sync>>> {
        self.call("hold_image_locks", false, || self.inner.hold_image_locks())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Faulty, Lasting};
    use crate::backend::memory::MemoryStore;
    use crate::backend::{Backend, BackendError, Result};
    use crate::ids::StorePath;

    const EPERM: i32 = 1;
    const EINTR: i32 = 4;
    const EIO: i32 = 5;
    const EINVAL: i32 = 22;
    const ENOSPC: i32 = 28;
    const EOPNOTSUPP: i32 = 95;
    const ESTALE: i32 = 116;
    const EDQUOT: i32 = 122;

    fn path(text: &str) -> StorePath {
        StorePath::parse(text).unwrap()
    }

    #[test]
    fn faults_last_as_long_as_ordered() {
        for (lasting, third, read) in
            [(Lasting::Once, true, true), (Lasting::Onwards, false, true), (Lasting::Dead, false, false)]
        {
            let store = Faulty::new(Arc::new(MemoryStore::new()));
            store.fail_at(1, ENOSPC, lasting);
            assert!(store.create(&path("a")).is_ok());
            assert!(matches!(store.create(&path("b")), Err(BackendError::NoSpace { .. })));
            assert_eq!(store.create(&path("c")).is_ok(), third, "{lasting:?}");
            assert_eq!(store.stat(&path("a")).is_ok(), read, "{lasting:?}");
            assert_eq!((store.calls(), store.mutations()), (4, 3));
        }
    }

    #[test]
    fn a_short_write_leaves_half() {
        let store = Faulty::new(Arc::new(MemoryStore::new()));
        store.fail_halfway_at(1, ENOSPC, Lasting::Once);
        let file = store.create(&path("a")).unwrap();
        assert!(file.write_at(0, b"abcd").is_err());
        assert_eq!(file.stat().unwrap().length, 2);
        assert_eq!(store.trace()[1].name, "write_at");
    }

    #[test]
    fn what_is_written_can_be_tampered_with() {
        let store = Faulty::new(Arc::new(MemoryStore::new()));
        store.tamper(|path, offset, bytes| {
            if path.as_str() == "a" && offset == 4 {
                bytes[0] = b'X';
            }
        });
        for name in ["a", "b"] {
            let file = store.create(&path(name)).unwrap();
            file.write_at(0, b"abcd").unwrap();
            file.write_at(4, b"efgh").unwrap();
            let mut bytes = [0; 8];
            file.read_at(0, &mut bytes).unwrap();
            assert_eq!(&bytes, if name == "a" { b"abcdXfgh" } else { b"abcdefgh" });
        }
    }

    #[test]
    fn hooks_run_before_their_call() {
        let store = Faulty::new(Arc::new(MemoryStore::new()));
        let other = store.clone();
        store.before(0, move || drop(other.create(&path("a"))));
        assert!(matches!(store.create(&path("a")), Err(BackendError::AlreadyExists { .. })));
    }

    #[test]
    fn hooks_run_around_their_mutating_call() {
        let memory = Arc::new(MemoryStore::new());
        let store = Faulty::new(Arc::clone(&memory) as Arc<dyn Backend>);
        let (first, second) = (Arc::clone(&memory), Arc::clone(&memory));
        store.before_mutation(1, move || {
            assert!(first.stat(&path("b")).is_err());
            first.remove_file(&path("a")).unwrap();
        });
        store.after_mutation(1, move || second.rename(&path("b"), &path("c")).unwrap());
        store.create(&path("a")).unwrap();
        // Reads are not counted.
        assert!(store.stat(&path("a")).is_ok());
        store.create(&path("b")).unwrap();
        assert!(store.stat(&path("a")).is_err() && store.stat(&path("b")).is_err());
        assert!(store.stat(&path("c")).is_ok());
        // After a failed call, too.
        store.fail_at(2, EIO, Lasting::Once);
        store.after_mutation(2, move || memory.remove_file(&path("c")).unwrap());
        assert!(store.create(&path("d")).is_err());
        assert!(store.stat(&path("c")).is_err());
    }

    #[test]
    fn every_error_number_comes_out_as_what_it_means() {
        let fails = |errno, call: fn(&dyn Backend) -> Result<()>| {
            let memory = Arc::new(MemoryStore::new());
            memory.create(&path("a")).unwrap();
            memory.create(&path("b")).unwrap();
            let store = Faulty::new(memory);
            store.fail_at(0, errno, Lasting::Once);
            call(&store).unwrap_err()
        };
        for errno in [ENOSPC, EDQUOT] {
            for call in [
                (|store| store.rename(&path("a"), &path("c"))) as fn(&dyn Backend) -> Result<()>,
                |store| store.open_writable(&path("a"))?.write_at(0, b"x"),
                |store| store.open_writable(&path("a"))?.reserve(0, 1).map(drop),
                |store| store.sync_dir(&StorePath::root()),
            ] {
                assert!(matches!(fails(errno, call), BackendError::NoSpace { .. }), "{errno}");
            }
        }
        for errno in [EIO, ESTALE, EINTR] {
            let error = fails(errno, |store| store.exchange(&path("a"), &path("b")));
            assert!(!error.is_unsupported());
            let BackendError::Io { source, .. } = error else { panic!("{errno}: {error:?}") };
            assert_eq!(source.raw_os_error(), Some(errno));
        }
        assert!(fails(EINVAL, |store| store.exchange(&path("a"), &path("b"))).is_unsupported());
        assert!(fails(EPERM, |store| store.hard_link(&path("a"), &path("c"))).is_unsupported());
        assert!(!fails(EPERM, |store| store.rename(&path("a"), &path("b"))).is_unsupported());
    }

    #[test]
    fn space_that_cannot_be_reserved_is_no_error() {
        let store = Faulty::new(Arc::new(MemoryStore::new()));
        let file = store.create(&path("a")).unwrap();
        store.fail_at(1, EOPNOTSUPP, Lasting::Onwards);
        assert!(!file.reserve(0, 4096).unwrap());
        assert!(!file.punch(0, 4096).unwrap());
        assert_eq!(store.mutations(), 3);
    }

    #[test]
    fn both_names_are_recorded() {
        let store = Faulty::new(Arc::new(MemoryStore::new()));
        store.create(&path("a")).unwrap();
        store.hard_link(&path("a"), &path("b")).unwrap();
        store.exchange(&path("a"), &path("b")).unwrap();
        store.rename(&path("b"), &path("c")).unwrap();
        let pairs: Vec<_> = store.trace().into_iter().map(|call| (call.name, call.from, call.path)).collect();
        let pair = |name, from: Option<&str>, to| (name, from.map(path), path(to));
        assert_eq!(
            pairs,
            [
                pair("create", None, "a"),
                pair("hard_link", Some("a"), "b"),
                pair("exchange", Some("a"), "b"),
                pair("rename", Some("b"), "c"),
            ]
        );
    }
}
