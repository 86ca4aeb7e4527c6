//! Small chains on a store in memory, and instances that act on them one after the other, or one within a call of another.
//! Time goes on only when somebody waits.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use qchain::backend::faulty::Faulty;
use qchain::backend::memory::MemoryStore;
use qchain::backend::{Backend, Identity};
use qchain::change::history::Done;
use qchain::change::recover::Recovered;
use qchain::change::witness::Witness;
use qchain::change::{Clock, Site, SystemClock};
use qchain::cloudstack::checkpoint::Checkpoint;
use qchain::ids::StorePath;
use qchain::ops;
use qchain::ops::delete::{ModeChoice, Report, Terms};
use qchain::ops::recover::{Undone, history, recover, undo};
use qchain::progress::Cancel;
use qchain::store::record::StoreKind;

use super::sim::image::{Layers, bytes, first_data, rename_backing};
use super::sim::stage::{CLUSTERS, Layout, build, image, put, templates, xml};
use super::store::{LEASE, delete_by, open_with};

pub const SECOND: i64 = 1_000_000_000;

const LAYOUT: Layout = Layout(StoreKind::Cloudstack);

/// What is kept for an hour, without a grace.
pub const KEPT: Terms =
    Terms { grace_ns: 0, retention_ns: 3600 * SECOND, rehearse: false, witness: Witness::None, stubs: false };

/// A kind of store, and how one is made.
pub type Kind = (&'static str, fn() -> MemoryStore);

/// Stores as there are: with hard links and exchange of names, or without.
pub fn kinds() -> [Kind; 4] {
    [
        ("links and exchange", || MemoryStore::numbered(1 << 20)),
        ("links", || MemoryStore::numbered(1 << 20).with_exchange(false)),
        ("exchange", || MemoryStore::numbered(1 << 20).with_hard_links(false)),
        ("neither", || MemoryStore::numbered(1 << 20).with_hard_links(false).with_exchange(false)),
    ]
}

/// A member's checkpoint file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckpointFile {
    Gone,
    /// The parent that it names.
    Names(Option<String>),
}

impl CheckpointFile {
    pub fn over(parent: &str) -> Self {
        Self::Names(Some(parent.to_owned()))
    }
}

/// The time of all instances.
#[derive(Debug)]
struct Watch {
    began_ns: i64,
    passed_ns: AtomicU64,
}

impl Clock for Watch {
    fn wall_ns(&self) -> i64 {
        self.began_ns + i64::try_from(self.passed_ns.load(Ordering::Relaxed)).unwrap()
    }

    fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.passed_ns.load(Ordering::Relaxed))
    }

    fn sleep(&self, duration: Duration) {
        self.passed_ns.fetch_add(u64::try_from(duration.as_nanos()).unwrap(), Ordering::Relaxed);
    }

    fn renews(&self) -> bool {
        false
    }
}

/// The store, its time, and what each member shows.
#[derive(Clone, Debug)]
pub struct Small {
    pub memory: Arc<MemoryStore>,
    watch: Arc<Watch>,
    views: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
}

impl Small {
    /// The chains of a template of the simulation: 0 is m0 <- m1 <- m2 <- m3; 1 is m0 <- m1 with m2 and m3 over it, and m4 over m2.
    pub fn new(store: MemoryStore, template: usize) -> Self {
        let template = &templates()[template];
        let views = template.members.iter().map(|made| (made.name.clone(), made.view.clone()));
        Self {
            memory: build(store, LAYOUT, template),
            watch: Arc::new(Watch { began_ns: SystemClock.wall_ns(), passed_ns: AtomicU64::new(0) }),
            views: Arc::new(Mutex::new(views.collect())),
        }
    }

    pub fn passes(&self, seconds: u64) {
        self.watch.sleep(Duration::from_secs(seconds));
    }

    /// An instance to which nothing happens.
    pub fn calm(&self) -> Arc<dyn Backend> {
        Arc::clone(&self.memory) as Arc<dyn Backend>
    }

    /// An instance to which something may.
    pub fn faulty(&self) -> Arc<Faulty> {
        Arc::new(Faulty::new(self.calm()))
    }

    pub fn on<T>(&self, backend: Arc<dyn Backend>, act: impl FnOnce(&Site<'_>) -> T) -> T {
        let stores = open_with(Path::new("/nowhere"), backend).with_readers(1);
        let cancel = Cancel::default();
        act(&Site::new(&stores, self.watch.as_ref(), &cancel, LEASE))
    }

    pub fn delete(
        &self,
        backend: Arc<dyn Backend>,
        members: &[&str],
        mode: ModeChoice,
        terms: Terms,
    ) -> ops::Result<Report> {
        self.on(backend, |site| delete_at(site, members, mode, terms))
    }

    /// As [`Small::delete`] by a calm instance; all of it must be done.
    pub fn delete_well(&self, members: &[&str], mode: ModeChoice, terms: Terms) {
        let report = self.delete(self.calm(), members, mode, terms).unwrap();
        assert!(report.first_failure().is_none(), "{members:?}: {:?}", report.first_failure());
        // No two of them are decided at one time.
        self.passes(1);
    }

    pub fn recover(&self) -> ops::Result<Vec<Recovered>> {
        self.recover_on(self.calm())
    }

    pub fn recover_on(&self, backend: Arc<dyn Backend>) -> ops::Result<Vec<Recovered>> {
        self.on(backend, |site| recover(site, Witness::None))
    }

    pub fn history(&self) -> Vec<Done> {
        self.on(self.calm(), |site| history(site).unwrap())
    }

    /// Takes the first operation back that can be; `None` if none can.
    pub fn undo_on(&self, backend: Arc<dyn Backend>) -> Option<ops::Result<Undone>> {
        let done = self.history().into_iter().find(|done| done.undo_until.is_some() && !done.undone)?;
        Some(self.on(backend, |site| undo(site, done.operation.as_str(), Witness::None)))
    }

    pub fn member(name: &str) -> StorePath {
        LAYOUT.member(name)
    }

    pub fn is_there(&self, name: &str) -> bool {
        self.memory.stat(&LAYOUT.member(name)).is_ok()
    }

    /// Somebody gives a member away, durably.
    pub fn give_to(&self, name: &str, uid: u32) {
        let file = self.memory.open_writable(&LAYOUT.member(name)).unwrap();
        let identity = Identity { uid, mode: 0o640, ..file.identity().unwrap() };
        file.set_identity(&identity).unwrap();
        file.sync().unwrap();
    }

    /// Whose a member is, and its mode.
    pub fn owner(&self, name: &str) -> (u32, u32) {
        let identity = self.memory.open(&LAYOUT.member(name)).unwrap().identity().unwrap();
        (identity.uid, identity.mode)
    }

    /// What a member says that it stands on.
    pub fn backing(&self, name: &str) -> Option<String> {
        Layers::default().layer(&self.memory, &LAYOUT.member(name)).unwrap().1.backing.clone()
    }

    /// What a member's checkpoint file says.
    pub fn checkpoint(&self, name: &str) -> CheckpointFile {
        match bytes(&self.memory, &LAYOUT.checkpoint(name).unwrap()) {
            Some(bytes) => CheckpointFile::Names(Checkpoint::parse(&bytes).unwrap().parent),
            None => CheckpointFile::Gone,
        }
    }

    /// Members never had checkpoint files.
    pub fn forget_checkpoints(&self) {
        for name in self.views.lock().unwrap().keys() {
            self.memory.remove_file(&LAYOUT.checkpoint(name).unwrap()).unwrap();
        }
    }

    /// A file of qchain's own whose name ends like that.
    pub fn own(&self, directory: &str, ending: &str) -> Option<StorePath> {
        let directory = qchain::store::record::own(&[directory]);
        let entries = self.memory.read_dir(&directory).unwrap_or_default();
        entries
            .iter()
            .filter_map(|entry| entry.path_in(&directory))
            .find(|path| path.as_str().ends_with(ending))
    }

    /// A hypervisor adds a member on another, which is there.
    pub fn add_child(&self, name: &str, parent: &str) {
        let mut views = self.views.lock().unwrap();
        let below = &views[parent];
        let spec = image((below.len() as u64 / CLUSTERS).trailing_zeros(), Some(parent), 7);
        let view = spec.view(below);
        put(&self.memory, &LAYOUT.checkpoint(name).unwrap(), &xml(name, Some(parent), 0));
        put(&self.memory, &LAYOUT.member(name), &spec.build());
        views.insert(name.to_owned(), view);
    }

    /// Somebody writes into the first cluster that a member holds, without asking.
    pub fn write_into(&self, name: &str) {
        let place = LAYOUT.member(name);
        let (guest, host) = first_data(&bytes(&self.memory, &place).unwrap()).unwrap();
        let file = self.memory.open_writable(&place).unwrap();
        file.write_at(host, EDIT).unwrap();
        file.sync().unwrap();
        let mut views = self.views.lock().unwrap();
        let view = views.get_mut(name).unwrap();
        let at = guest * (view.len() / usize::try_from(CLUSTERS).unwrap());
        view[at..at + EDIT.len()].copy_from_slice(EDIT);
    }

    /// Somebody gives a member another parent without looking at what they hold; the name is as long as the one before.
    pub fn rebase(&self, name: &str, onto: &str) {
        let place = LAYOUT.member(name);
        rename_backing(&self.memory, &place, onto).unwrap();
        let view = Layers::default().chain(&self.memory, &place).unwrap().view();
        self.views.lock().unwrap().insert(name.to_owned(), view);
    }

    /// What a member shows does not matter.
    pub fn nobody_reads(&self, name: &str) {
        self.views.lock().unwrap().remove(name);
    }

    /// Whether a member shows what it should; what is wrong else.
    pub fn shows(&self, name: &str) -> Result<(), String> {
        let shown = Layers::default().chain(&self.memory, &LAYOUT.member(name))?.view();
        let right = self.views.lock().unwrap()[name] == shown;
        right.then_some(()).ok_or_else(|| "it shows something else".to_owned())
    }

    /// Every member that is there shows what it should, and these are.
    pub fn check(&self, there: &[&str], context: &str) {
        for name in there {
            assert!(self.is_there(name), "{context}: {name} is gone");
        }
        let names: Vec<String> = self.views.lock().unwrap().keys().cloned().collect();
        for name in names.iter().filter(|name| self.is_there(name)) {
            if let Err(error) = self.shows(name) {
                panic!("{context}: {name}: {error}");
            }
        }
    }
}

/// What is written into a member.
const EDIT: &[u8] = b"written by others";

/// As `qchain delete` does it.
pub fn delete_at(site: &Site<'_>, members: &[&str], mode: ModeChoice, terms: Terms) -> ops::Result<Report> {
    let paths: Vec<String> = members.iter().map(|name| LAYOUT.member(name).to_string()).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    delete_by(site, &paths, mode, terms, 1)
}
