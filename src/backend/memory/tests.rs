use std::collections::BTreeSet;

use super::MemoryStore;
use crate::backend::{Backend, BackendError, ImageLocks, StoreFile};
use crate::ids::StorePath;

fn path(text: &str) -> StorePath {
    StorePath::parse(text).unwrap()
}

fn bytes(file: &dyn StoreFile) -> Vec<u8> {
    let mut buffer = vec![0; usize::try_from(file.stat().unwrap().length).unwrap()];
    file.read_at(0, &mut buffer).unwrap();
    buffer
}

#[test]
fn a_crash_takes_what_was_not_synced() {
    let store = MemoryStore::new();
    let kept = store.create(&path("kept")).unwrap();
    kept.write_at(0, b"old").unwrap();
    kept.sync().unwrap();
    store.create(&path("empty")).unwrap().write_at(0, b"never synced").unwrap();
    store.sync_dir(&StorePath::root()).unwrap();
    kept.write_at(0, b"new").unwrap();
    store.create(&path("unnamed")).unwrap().sync().unwrap();
    store.crash();
    assert_eq!(bytes(store.open(&path("kept")).unwrap().as_ref()), b"old");
    assert_eq!(store.stat(&path("empty")).unwrap().length, 0);
    assert!(matches!(store.stat(&path("unnamed")), Err(BackendError::NotFound { .. })));
    assert!(kept.stat().is_err(), "a file open over a crash is dead");
}

#[test]
fn a_rename_is_durable_with_its_directory() {
    let store = MemoryStore::new();
    for name in ["a", "b"] {
        let file = store.create(&path(name)).unwrap();
        file.write_at(0, name.as_bytes()).unwrap();
        file.sync().unwrap();
    }
    store.sync_dir(&StorePath::root()).unwrap();
    store.rename(&path("a"), &path("b")).unwrap();
    store.crash();
    assert_eq!(bytes(store.open(&path("b")).unwrap().as_ref()), b"b");
    store.rename(&path("a"), &path("b")).unwrap();
    store.sync_dir(&StorePath::root()).unwrap();
    store.crash();
    assert_eq!(bytes(store.open(&path("b")).unwrap().as_ref()), b"a");
    assert!(store.stat(&path("a")).is_err());
    assert_eq!(store.stat(&path("b")).unwrap().links, 1);
}

#[test]
fn names_may_outlive_bytes() {
    let store = MemoryStore::new();
    store.create(&path("a")).unwrap().write_at(0, b"x").unwrap();
    store.crash_keeping_names();
    assert_eq!(store.stat(&path("a")).unwrap().length, 0);
}

#[test]
fn a_huge_sparse_file_costs_little() {
    let store = MemoryStore::new();
    let file = store.create(&path("a")).unwrap();
    file.set_length(60 << 40).unwrap();
    file.write_at((60 << 40) - 1, b"x").unwrap();
    assert_eq!(file.stat().unwrap().allocated_bytes, 4096);
}

/// Two directories with a synced file each: `d/a` and `e/b`, whose bytes are their names.
fn two() -> MemoryStore {
    let store = MemoryStore::new();
    for (directory, name) in [("d", "a"), ("e", "b")] {
        store.create_dir(&path(directory), true).unwrap();
        add(&store, &format!("{directory}/{name}"), name.as_bytes());
        store.sync_dir(&path(directory)).unwrap();
    }
    store.sync_dir(&StorePath::root()).unwrap();
    store
}

/// A file whose bytes are durable and whose name is not.
fn add(store: &MemoryStore, name: &str, content: &[u8]) {
    let file = store.create(&path(name)).unwrap();
    file.write_at(0, content).unwrap();
    file.sync().unwrap();
}

/// What a name stands for; nothing if it is free.
fn content(store: &MemoryStore, name: &str) -> String {
    match store.open(&path(name)) {
        Ok(file) => String::from_utf8(bytes(file.as_ref())).unwrap(),
        Err(BackendError::NotFound { .. }) => String::new(),
        Err(error) => panic!("{error}"),
    }
}

fn contents(store: &MemoryStore, names: &[&str]) -> Vec<String> {
    names.iter().map(|name| content(store, name)).collect()
}

/// All that the names can stand for after a crash, over many seeds.
fn outcomes(names: &[&str], change: impl Fn(&MemoryStore)) -> BTreeSet<Vec<String>> {
    let after = |seed| {
        let store = two();
        change(&store);
        store.crash_seeded(seed);
        contents(&store, names)
    };
    (0..400).map(after).collect()
}

fn expected(states: &[&[&str]]) -> BTreeSet<Vec<String>> {
    states.iter().map(|state| state.iter().map(|&text| text.to_owned()).collect()).collect()
}

#[test]
fn an_exchange_is_durable_with_either_directory() {
    let names = ["d/a", "e/b"];
    for synced in [&[][..], &["d"], &["e"], &["d", "e"], &["e", "d"]] {
        let store = two();
        store.exchange(&path("d/a"), &path("e/b")).unwrap();
        assert_eq!(contents(&store, &names), ["b", "a"]);
        for directory in synced {
            store.sync_dir(&path(directory)).unwrap();
        }
        store.crash();
        let wanted = if synced.is_empty() { ["a", "b"] } else { ["b", "a"] };
        assert_eq!(contents(&store, &names), wanted, "{synced:?}");
        let links = names.map(|name| store.stat(&path(name)).unwrap().links);
        assert_eq!(links, [1, 1]);
    }
    let store = two();
    store.exchange(&path("d/a"), &path("e/b")).unwrap();
    store.crash_keeping_names();
    assert_eq!(contents(&store, &names), ["b", "a"]);
}

#[test]
fn what_follows_an_exchange_does_not_overtake_it() {
    let store = two();
    add(&store, "e/t", b"t");
    store.exchange(&path("d/a"), &path("e/b")).unwrap();
    store.rename(&path("e/t"), &path("e/b")).unwrap();
    store.sync_dir(&path("e")).unwrap();
    assert_eq!(contents(&store, &["d/a", "e/b"]), ["b", "t"]);
    store.crash();
    // One sync made both last, in their order.
    assert_eq!(contents(&store, &["d/a", "e/b", "e/t"]), ["b", "t", ""]);
}

#[test]
fn a_seeded_crash_finds_every_outcome_and_no_half() {
    let swapped = outcomes(&["d/a", "e/b"], |store| store.exchange(&path("d/a"), &path("e/b")).unwrap());
    assert_eq!(swapped, expected(&[&["a", "b"], &["b", "a"]]));
    let moved = outcomes(&["d/a", "e/b"], |store| store.rename(&path("d/a"), &path("e/b")).unwrap());
    assert_eq!(moved, expected(&[&["a", "b"], &["", "a"]]));
    // Two changes of names that have nothing to do with each other overtake one another.
    let apart = outcomes(&["d/x", "e/y"], |store| {
        add(store, "d/x", b"x");
        add(store, "e/y", b"y");
    });
    assert_eq!(apart, expected(&[&["", ""], &["x", ""], &["", "y"], &["x", "y"]]));
    // Those of one name do not: the file is never lost between its old name and its new one.
    let kept = outcomes(&["d/a", "d/old"], |store| {
        add(store, "d/t", b"t");
        store.rename(&path("d/a"), &path("d/old")).unwrap();
        store.rename(&path("d/t"), &path("d/a")).unwrap();
    });
    assert_eq!(kept, expected(&[&["a", ""], &["", "a"], &["t", "a"]]));
}

#[test]
fn a_seeded_crash_keeps_what_was_promised() {
    let synced = outcomes(&["d/a", "e/b"], |store| {
        store.rename(&path("d/a"), &path("e/b")).unwrap();
        store.sync_dir(&path("e")).unwrap();
    });
    assert_eq!(synced, expected(&[&["", "a"]]));
    let both = outcomes(&["d/a", "e/b"], |store| {
        store.exchange(&path("d/a"), &path("e/b")).unwrap();
        store.sync_dir(&path("d")).unwrap();
        store.sync_dir(&path("e")).unwrap();
    });
    assert_eq!(both, expected(&[&["b", "a"]]));
    let linked = outcomes(&["d/a", "e/c"], |store| {
        store.hard_link(&path("d/a"), &path("e/c")).unwrap();
        store.sync_dir(&path("e")).unwrap();
        store.remove_file(&path("d/a")).unwrap();
    });
    assert_eq!(linked, expected(&[&["a", "a"], &["", "a"]]));
}

#[test]
fn a_seeded_crash_loses_and_tears_bytes() {
    let mut lengths = BTreeSet::new();
    let mut firsts = BTreeSet::new();
    let mut torn = 0;
    for seed in 0..400 {
        let store = MemoryStore::new();
        let file = store.create(&path("a")).unwrap();
        file.write_at(0, &[1; 8192]).unwrap();
        file.sync().unwrap();
        store.sync_dir(&StorePath::root()).unwrap();
        file.write_at(0, &[2; 4096]).unwrap();
        file.write_at(8192, &[3; 4096]).unwrap();
        store.crash_seeded(seed);
        let left = bytes(store.open(&path("a")).unwrap().as_ref());
        assert!(left[4096..8192].iter().all(|&byte| byte == 1), "what was synced and not written since");
        assert!(left.iter().skip(8192).all(|&byte| byte == 0 || byte == 3));
        let sectors: BTreeSet<u8> = left[..4096].iter().copied().collect();
        torn += usize::from(sectors.len() == 2);
        firsts.extend(sectors);
        lengths.insert(left.len());
    }
    assert_eq!((lengths, firsts), (BTreeSet::from([8192, 12_288]), BTreeSet::from([1, 2])));
    assert!(torn > 5, "{torn}");
}

#[test]
fn a_seed_always_decides_alike() {
    let after = |seed| {
        let store = two();
        for n in 0..20 {
            store.create(&path(&format!("d/{n}"))).unwrap().write_at(0, b"unsynced").unwrap();
        }
        store.crash_seeded(seed);
        let names: Vec<String> = (0..20).map(|n| format!("d/{n}")).collect();
        contents(&store, &names.iter().map(String::as_str).collect::<Vec<_>>())
    };
    assert!((0..20).all(|seed| after(seed) == after(seed)));
    assert!((0..20).map(after).collect::<BTreeSet<_>>().len() > 10);
}

#[test]
fn reserved_space_is_counted_once_and_given_back() {
    let store = MemoryStore::new();
    store.set_free_bytes(100 * 4096);
    let free = || store.space().unwrap().free_bytes / 4096;
    let file = store.create(&path("a")).unwrap();
    file.write_at(4096, b"there already").unwrap();
    assert!(file.reserve(0, 10 * 4096).unwrap());
    assert_eq!(free(), 91);
    assert!(file.reserve(5 * 4096 + 1, 10 * 4096).unwrap());
    assert_eq!(free(), 85);
    assert!(file.reserve(0, 16 * 4096).unwrap());
    assert_eq!(free(), 85);
    let other = store.create(&path("b")).unwrap();
    assert!(matches!(other.reserve(0, 86 * 4096), Err(BackendError::NoSpace { .. })));
    assert!(other.reserve(0, 85 * 4096).unwrap());
    assert_eq!(free(), 0);
    store.rename(&path("b"), &path("a")).unwrap();
    assert_eq!(free(), 15, "that of the replaced file");
    store.remove_file(&path("a")).unwrap();
    assert_eq!(free(), 100);
}

#[test]
fn image_locks_of_others_keep_ours_away() {
    let store = MemoryStore::new();
    let file = store.create(&path("a")).unwrap();
    store.set_image_locks(&path("a"), ImageLocks { writer: true, any: true }).unwrap();
    assert!(file.hold_image_locks().unwrap().is_none());
    store.set_image_locks(&path("a"), ImageLocks { writer: false, any: true }).unwrap();
    assert!(file.hold_image_locks().unwrap().is_some());
}
