//! What CloudStack's rows say of a member that became a full base, and what becomes of those below it: `audit` tells,
//! `reclaim` gives the space back, and an increment that is being made keeps its parent.

use std::fs;

use serde_json::{Value, json};

use super::support::mounts::FsKind;
use super::support::volume::{Volume, findings};

/// a <- b <- c <- d
const CHAIN: &[(&str, &str)] = &[("a", ""), ("b", "a"), ("c", "b"), ("d", "c")];

fn rows(volume: &Volume, states: [&str; 4]) -> String {
    let row = |index: usize| (CHAIN[index].0, states[index], "NULL");
    volume.export(&[row(0), row(1), row(2), row(3)])
}

/// The deleted a and b below the base c.
fn hidden() -> (Volume, String, String) {
    let volume = Volume::new(FsKind::Xfs, CHAIN);
    volume.does(&["init"]);
    let rows = rows(&volume, ["Hidden", "Hidden", "Ready", "Ready"]);
    let done = volume.consolidates(&["c"]);
    let operation = done["results"][0]["operation"].as_str().unwrap().to_owned();
    (volume, rows, operation)
}

fn reclaim(volume: &Volume, rows: &str, more: &[&str]) -> Value {
    let call = ["reclaim", "--records", rows, "--now", "--yes", "--grace", "0s", "--retention", "1h"];
    volume.does(&[&call[..], more].concat())
}

fn pairs(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter().map(|(code, member)| ((*code).to_owned(), (*member).to_owned())).collect()
}

#[test]
fn an_audit_says_what_it_is_and_a_reclaim_gives_the_old_chain_back() {
    let (volume, rows, operation) = hidden();
    let audit = volume.does(&["audit", "--records", &rows, "--min-age", "0s"]);
    let mut told = findings(&audit);
    told.retain(|(code, _)| code != "file-size-disagrees");
    assert_eq!(told, pairs(&[("hidden-bytes", "a"), ("hidden-tip", "b"), ("stands-alone", "c")]), "{audit}");
    let done = reclaim(&volume, &rows, &[]);
    assert_eq!(findings(&done), [], "{done}");
    let results = done["results"].as_array().unwrap();
    assert!(results.len() == 2 && results.iter().all(|one| one["status"] == "done"), "{done}");
    volume.assert_views(&["c", "d"], "without what they stood on");
    let listed = volume.does(&["list"]);
    let states = |name: &str| {
        let chains = listed["chains"].as_array().unwrap().iter();
        let mut members = chains.flat_map(|chain| chain["members"].as_array().unwrap());
        members.find(|one| one["member"] == Volume::member(name).as_str()).unwrap()["state"].clone()
    };
    assert_eq!(
        ["a", "b", "c", "d"].map(states),
        ["stub", "stub", "settled", "settled"].map(|word| json!(word))
    );
    let again = reclaim(&volume, &rows, &[]);
    assert_eq!((&again["plan"], findings(&again)), (&json!([]), Vec::new()), "once is enough");

    // The old c would read through the stand-in of b: first that has to come back.
    volume.refuses(&["undo", &operation, "--yes"], (3, "not-undoable"));
    volume.refuses(&["consolidate", "b", "--now", "--yes"], (3, "not-consolidable"));
    volume.does(&["undo", results[0]["operation"].as_str().unwrap(), "--yes"]);
    volume.assert_all_views("a and b are back");
    volume.does(&["undo", &operation, "--yes"]);
    volume.assert_all_views("c stands on them again");
    assert!(volume.does(&["list"])["chains"].as_array().unwrap().len() == 1);
}

#[test]
fn rows_that_are_to_change_are_told() {
    let (volume, rows, _) = hidden();
    // c's row was left as it was: it is freed of its parent with it.
    let done = reclaim(&volume, &rows, &["--rows", "print"]);
    let length = fs::metadata(volume.file("c")).unwrap().len();
    let set = |change: &Value| (change["planned"]["snapshot_id"].as_u64().unwrap(), change["set"].clone());
    let changes: Vec<_> = done["rows"][0]["changes"].as_array().unwrap().iter().map(set).collect();
    let destroyed = json!({"state": "Destroyed"});
    let alone = |length: u64| json!({"parent": {"parent_snapshot_id": null, "physical_bytes": length}});
    assert_eq!(changes, [(3, alone(length)), (1, destroyed.clone()), (2, destroyed)], "{done}");
    assert!(!volume.file("a").exists() && !volume.file("b").exists());
    volume.assert_views(&["c", "d"], "without stubs");

    let volume = Volume::new(FsKind::Ext4, CHAIN);
    volume.does(&["init"]);
    let rows = self::rows(&volume, ["Hidden", "Hidden", "Ready", "Ready"]);
    let dry = volume.does(&["consolidate", "c", "--now", "--dry-run", "--records", &rows, "--rows", "print"]);
    assert_eq!(dry["rows"][0]["status"], "planned");
    let done = volume.consolidates(&["c", "--records", &rows, "--rows", "print"]);
    let length = fs::metadata(volume.file("c")).unwrap().len();
    let changes: Vec<_> = done["rows"][0]["changes"].as_array().unwrap().iter().map(set).collect();
    assert_eq!(
        (&done["rows"][0]["status"], changes),
        (&json!("printed"), vec![(3, alone(length))]),
        "{done}"
    );
    let statement = done["rows"][0]["changes"][0]["statement"].as_str().unwrap();
    assert!(
        statement.contains("SET ref.parent_snapshot_id = 0")
            && statement.contains("COALESCE(ref.parent_snapshot_id, 0) = 2"),
        "{statement}"
    );
}

#[test]
fn a_hidden_member_below_other_readers_is_merged_as_usual() {
    // a <- b <- {c, d}; only c becomes a base.
    let volume = Volume::new(FsKind::Xfs, &[("a", ""), ("b", "a"), ("c", "b"), ("d", "b")]);
    volume.does(&["init"]);
    let rows = rows(&volume, ["Ready", "Hidden", "Ready", "Ready"]);
    volume.consolidates(&["c"]);
    let done = reclaim(&volume, &rows, &[]);
    assert_eq!(done["results"][0]["into"], Volume::member("d").as_str(), "{done}");
    volume.assert_views(&["a", "c", "d"], "b is gone");
}

#[test]
fn an_increment_that_is_being_made_keeps_its_parent() {
    let volume = Volume::new(FsKind::Xfs, CHAIN);
    volume.does(&["init"]);
    // Over: else the recovery that everything begins with would write its checkpoint file again.
    volume.does(&["consolidate", "c", "--now", "--yes", "--grace", "0s", "--retention", "0s"]);
    let rows = rows(&volume, ["Ready", "Hidden", "Ready", "Ready"]);
    let disagrees = |said: &str| {
        let done = reclaim(&volume, &rows, &[]);
        assert_eq!(done["results"], json!([]), "{said}: {done}");
        let found = findings(&done);
        assert!(
            found.iter().any(|(code, member)| code == "rows-disagree" && member == "b"),
            "{said}: {done}"
        );
    };
    // As libvirt leaves it: written, not rebased yet. No checkpoint file, or one that names the parent.
    fs::remove_file(volume.checkpoint_file("c")).unwrap();
    disagrees("no checkpoint file");
    volume.checkpoint("c", Some("b"));
    disagrees("a parent by its checkpoint");
    fs::write(volume.checkpoint_file("c"), "<nothing/>").unwrap();
    disagrees("nobody knows");
    volume.checkpoint("c", None);
    let moving = self::rows(&volume, ["Ready", "Hidden", "Copying", "Ready"]);
    let done = reclaim(&volume, &moving, &[]);
    assert!(done["results"] == json!([]) && !findings(&done).is_empty(), "{done}");
    let rows = self::rows(&volume, ["Ready", "Hidden", "Ready", "Ready"]);
    // Another one is on its way in the volume: who knows on whom it will stand?
    fs::remove_file(volume.checkpoint_file("d")).unwrap();
    let done = reclaim(&volume, &rows, &[]);
    assert!(
        done["results"] == json!([]) && findings(&done).iter().any(|(code, _)| code == "incoming"),
        "{done}"
    );
    // Without checkpoint files nothing is sure.
    fs::remove_dir_all(volume.root().join("checkpoints")).unwrap();
    let done = reclaim(&volume, &rows, &[]);
    assert_eq!(done["results"], json!([]));
    assert!(findings(&done).contains(&("rows-disagree".to_owned(), "b".to_owned())), "{done}");
    volume.assert_all_views("nothing was touched");
}
