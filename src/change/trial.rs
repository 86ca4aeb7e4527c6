//! A store in memory that was opted in, for the tests beside the code.

use std::sync::Arc;
use std::time::Duration;

use crate::backend::Backend;
use crate::backend::memory::MemoryStore;
use crate::change::clock::SystemClock;
use crate::change::record::{CheckpointEdit, Commit, Mark, Place, Purpose};
use crate::change::site::Site;
use crate::cloudstack::backing::Style;
use crate::cloudstack::paths::Layout;
use crate::ids::{StoreId, StorePath};
use crate::progress::Cancel;
use crate::store::record::{DIRECTORIES, StoreKind, StoreRecord, own};
use crate::store::{Store, StoreConfig, Stores};

/// The store's id in records.
pub const ID: &str = "here";

/// The kinds of stores that there are: all can be done; names cannot be exchanged; a file has one name only; neither.
pub const STORES: [fn() -> MemoryStore; 4] = [
    MemoryStore::new,
    || MemoryStore::new().with_exchange(false),
    || MemoryStore::new().with_hard_links(false),
    || MemoryStore::new().with_exchange(false).with_hard_links(false),
];

pub fn path(text: &str) -> StorePath {
    StorePath::parse(text).unwrap()
}

pub fn place(text: &str) -> Place {
    Place { store: ID.to_owned(), path: path(text) }
}

/// What decides that, and nothing else.
pub fn commit(purpose: Purpose, checkpoints: Vec<CheckpointEdit>) -> Commit {
    Commit {
        purpose,
        grace_ns: 0,
        retention_ns: 0,
        restores: Vec::new(),
        publications: Vec::new(),
        checkpoints,
        departures: Vec::new(),
        repairs: false,
    }
}

/// Opts a store in, for good.
pub fn opted_in(memory: MemoryStore) -> Arc<MemoryStore> {
    let names = DIRECTORIES.iter().map(|name| own(&[name]));
    for directory in std::iter::once(own(&[])).chain(names) {
        memory.create_dir(&directory, true).unwrap();
        memory.sync_dir(&directory.parent()).unwrap();
    }
    let record = StoreRecord {
        schema: 1,
        id: ID.to_owned(),
        format: 1,
        least_writer: 1,
        kind: StoreKind::Plain,
        zone: Vec::new(),
        capabilities: None,
    };
    write(&memory, own(&["store.json"]).as_str(), &record.encode());
    Arc::new(memory)
}

/// Makes a file for good.
pub fn write(store: &dyn Backend, name: &str, bytes: &[u8]) -> Mark {
    let file = store.create(&path(name)).unwrap();
    file.write_at(0, bytes).unwrap();
    file.sync().unwrap();
    store.sync_dir(&path(name).parent()).unwrap();
    Mark::from(&file.stat().unwrap())
}

/// What an instance does there.
pub fn on<T>(backend: &Arc<dyn Backend>, act: impl FnOnce(&Site<'_>) -> T) -> T {
    let config = StoreConfig {
        id: StoreId::parse("test").unwrap(),
        root: "/nowhere".to_owned(),
        url: None,
        aliases: Vec::new(),
        backing: Style::Relative,
        layout: Layout::Secondary,
    };
    let stores = Stores::new(vec![Store::open(config, Arc::clone(backend)).unwrap()]).unwrap();
    let (clock, cancel) = (SystemClock, Cancel::default());
    act(&Site::new(&stores, &clock, &cancel, Duration::from_mins(1)))
}
