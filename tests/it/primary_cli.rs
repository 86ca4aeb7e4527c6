//! Pools of primary storage: read, and never changed.

use std::fs;

use serde_json::{Value, json};

use super::support::qemu::text;
use super::support::world::{MOUNT, World, listing};

#[test]
fn primary_storage_is_read_and_never_changed() {
    let world = World::new();
    let pool = world.pool();
    let store = format!("{},layout=primary,alias={MOUNT}", text(&pool));
    let before = listing(&pool);

    let (exit, listed) = world.run_on(&store, &["list"]);
    assert_eq!((exit, &listed["stores"][0]["kind"]), (0, &json!("primary")), "{listed}");
    let names: Vec<&Value> = listed["chains"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|chain| chain["members"].as_array().unwrap())
        .map(|member| &member["member"])
        .collect();
    assert_eq!(names, ["snapshots/a", "snapshots/b", "snapshots/alone"]);
    assert_eq!(listed["findings"], json!([]));
    // A member without a checkpoint file is none in the making: others' lie in the same directory.
    assert_eq!(listed["chains"][1]["members"][0]["incoming"], "it changed less than the settle time ago");
    let (exit, map) = world.run_on(&store, &["map", "b"]);
    assert_eq!((exit, &map["virtual_bytes"]), (0, &json!(10 << 20)));
    assert_eq!(world.run_on(&store, &["verify"]).0, 0);

    let rows = world.directory.path().join("rows.tsv");
    fs::write(&rows, "").unwrap();
    for call in [
        &["init"][..],
        &["deinit", "--yes"],
        &["delete", "a", "--assume-deleted", "--yes"],
        &["delete", "a", "--assume-deleted", "--dry-run"],
        &["reclaim", "--records", text(&rows), "--yes"],
        &["undo", "00", "--yes"],
        &["purge", "--yes"],
        &["recover"],
    ] {
        let (exit, document) = world.run_on(&store, call);
        let code = &document["error"]["code"];
        assert_eq!((exit, code), (3, &json!("primary-storage")), "{call:?}: {document}");
    }
    assert_eq!(listing(&pool), before);
}
