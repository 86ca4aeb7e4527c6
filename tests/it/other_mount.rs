//! A store whose `.qchain` is a mount of its own: what is made and kept lies beside the members, is found there by
//! whoever counts, takes back, sweeps or ends it, and nothing of it stays.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::support::mounts::Bound;
use super::support::qemu::text;
use super::support::store::files;
use super::support::world::{World, listing};

const OPERATION: &str = "00000000000000000000000000000002";

/// a <- b <- {c, d}, opted in, with its records on another mount of the same file system.
struct Apart {
    // Unmounted before the directory goes.
    _bound: Bound,
    world: World,
}

impl Apart {
    fn new() -> Self {
        let world = World::forked();
        let bound = Bound::new(&world.directory.path().join("own"), &world.root().join(".qchain"));
        assert_eq!(world.run(&["init"]).0, 0);
        Self { _bound: bound, world }
    }

    fn does(&self, arguments: &[&str]) -> Value {
        let (exit, document) = self.world.run(arguments);
        assert_eq!(exit, 0, "{arguments:?}: {document}");
        document
    }

    fn deletes(&self, more: &[&str]) -> Value {
        self.does(&[&["delete", "b", "--assume-deleted", "--now", "--yes"], more].concat())
    }

    fn beside(&self) -> PathBuf {
        self.world.member(".qchain-tmp")
    }

    fn notes(&self) -> Vec<PathBuf> {
        files(&self.world.root().join(".qchain/beside"))
    }
}

fn held(history: &Value) -> u64 {
    history["operations"][0]["bytes_held"].as_u64().unwrap()
}

#[test]
fn what_is_kept_beside_members_is_counted_brought_back_and_ended() {
    let store = Apart::new();
    let before = listing(&store.world.root().join("snapshots"));
    let deleted = store.deletes(&[]);
    let operation = deleted["results"][0]["operation"].as_str().unwrap().to_owned();
    let trash = store.beside().join("trash");
    let kept = files(&trash);
    assert_eq!(kept.len(), 3, "b, and what c and d were: {kept:?}");
    assert_eq!(fs::metadata(store.beside()).unwrap().mode() & 0o777, 0o700);
    assert_eq!((files(&store.beside().join("tmp")).len(), store.notes().len()), (0, 1));
    let allocated: u64 = kept.iter().map(|name| fs::metadata(trash.join(name)).unwrap().blocks() * 512).sum();
    assert_eq!(held(&store.does(&["history"])), allocated);
    // With the records there is only the note that readers were looked for twice.
    let note = PathBuf::from(format!("{operation}.looked-again"));
    assert_eq!(files(&store.world.root().join(".qchain/trash")), [note]);
    // No member, and nothing that a look at the store minds.
    let listed = store.does(&["list"]);
    assert_eq!(listed["findings"], json!([]), "{listed}");
    store.does(&["undo", &operation, "--yes"]);
    store.does(&["purge", "--all", "--yes"]);
    // The very files; their directory was written to.
    let members = |all: &std::collections::BTreeMap<PathBuf, (u64, u64, i64, i64)>| -> Vec<_> {
        all.iter().map(|(path, facts)| (path.clone(), facts.0)).collect()
    };
    assert_eq!(members(&listing(&store.world.root().join("snapshots"))), members(&before));
    assert_eq!(store.notes(), Vec::<PathBuf>::new());
    assert_eq!(files(&store.world.root().join(".qchain/trash")), Vec::<PathBuf>::new());
    let freed = store.deletes(&["--retention", "0s"]);
    assert_eq!(freed["results"][0]["status"], "done", "{freed}");
    assert!(!store.beside().exists() && store.notes().is_empty() && !store.world.member("b").exists());
}

#[test]
fn what_no_operation_knows_is_swept_beside_members_too() {
    let store = Apart::new();
    let deleted = store.deletes(&[]);
    let operation = deleted["results"][0]["operation"].as_str().unwrap();
    let strays = ["tmp", "trash"].map(|name| store.beside().join(name).join(format!("{OPERATION}.0.image")));
    for path in &strays {
        fs::write(path, "left").unwrap();
    }
    store.does(&["recover"]);
    assert!(!strays.iter().any(|path| path.exists()), "what is of no operation goes");
    assert!(files(&store.beside()).iter().all(|path| text(path).contains(operation)), "what is kept stays");
    assert_eq!(files(&store.beside()).len(), 3);
    store.does(&["purge", "--all", "--yes"]);
    assert!(!store.beside().exists() && store.notes().is_empty());
}

#[test]
fn nothing_is_merged_in_place_where_no_locks_were_proved() {
    let store = Apart::new();
    // One child is left.
    store.does(&["delete", "d", "--assume-deleted", "--end-of-chain", "--now", "--yes", "--retention", "0s"]);
    let delete = ["delete", "b", "--assume-deleted", "--now", "--yes", "--mode", "in-place"];
    assert_eq!(store.world.fails(&delete), (3, "mode-impossible".to_owned()));
    store.does(&["recover"]);
    assert!(!store.beside().exists() && store.notes().is_empty());
}
