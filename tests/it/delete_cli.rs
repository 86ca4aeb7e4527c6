//! `qchain delete` as it is called: documents, exit codes, what is refused, and that a refusal changes nothing.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde_json::Value;

use super::support::chains::{assert_true, write_truth};
use super::support::qemu::{Writer, must, text};
use super::support::world::{World, listing};

/// The columns of `scripts/export-records.sql`.
const COLUMNS: &str = "store_uuid\tstore_url\tstore_role\tsnapshot_id\tsnapshot_uuid\tsnapshot_name\taccount_id\t\
    volume_id\thypervisor_type\tsnapshot_status\tref_state\tinstall_path\tparent_snapshot_id\tend_of_chain\t\
    size\tphysical_size\tkvm_checkpoint_path\tcreated";

impl World {
    /// a <- b <- {c, d}, opted in, settled or not.
    fn opted_in() -> Self {
        let world = Self::forked();
        let (exit, document) = world.run(&["init"]);
        assert_eq!((exit, document["kind"].as_str()), (0, Some("cloudstack")));
        world
    }

    /// The deletion must fail with that exit code and reason, and change no file of the store's own.
    fn refuses(&self, arguments: &[&str], exit: i32, code: &str) -> String {
        let before = listing(&self.root().join("snapshots"));
        let mut call = vec!["delete", "--yes", "--now"];
        call.extend(arguments);
        let (found_exit, document) = self.run(&call);
        let error = &document["error"];
        assert_eq!((found_exit, error["code"].as_str()), (exit, Some(code)), "{arguments:?}: {document}");
        assert_eq!(listing(&self.root().join("snapshots")), before, "{arguments:?}");
        error["message"].as_str().unwrap().to_owned()
    }

    /// Checkpoint files as libvirt writes them, `(member, parent)`.
    fn checkpoints(&self, of: &[(&str, &str)]) {
        let directory = self.root().join("checkpoints/2/7");
        fs::create_dir_all(&directory).unwrap();
        for (name, parent) in of {
            let parent = match *parent {
                "" => String::new(),
                parent => format!("\n  <parent>\n    <name>{parent}</name>\n  </parent>"),
            };
            let xml = format!("<domaincheckpoint>\n  <name>{name}</name>{parent}\n</domaincheckpoint>\n");
            fs::write(directory.join(name), xml).unwrap();
        }
    }

    /// A row for each member with that state.
    fn records(&self, states: &[(&str, &str)]) -> String {
        let rows = states.iter().enumerate().map(|(index, (name, state))| {
            format!(
                "u\tnfs://host/export\tImage\t{}\tx\tn\t2\t7\tKVM\tDestroyed\t{state}\tsnapshots/2/7/{name}\t0\t0\t\
                 10485760\t0\tNULL\t2026-01-01 00:00:00\n",
                index + 1
            )
        });
        let path = self.directory.path().join("records.tsv");
        fs::write(&path, format!("{COLUMNS}\n{}", rows.collect::<String>())).unwrap();
        text(&path).to_owned()
    }
}

fn first<'a>(document: &'a Value, list: &str) -> &'a Value {
    &document[list][0]
}

#[test]
fn a_middle_member_with_two_children_goes_into_both() {
    let world = World::opted_in();
    let truth = world.directory.path().join("truth");
    fs::create_dir(&truth).unwrap();
    for name in ["a", "c", "d"] {
        write_truth(&world.member(name), &truth.join(name));
    }
    let dry = ["delete", "b", "--assume-deleted", "--now", "--dry-run"];
    let before = listing(&world.root().join("snapshots"));
    let (exit, planned) = world.run(&dry);
    assert_eq!((exit, planned["results"].as_array().map(Vec::len)), (0, Some(0)), "{planned}");
    assert_eq!(listing(&world.root().join("snapshots")), before);
    // What b takes comes back with its first child; each child's old file against its new one.
    let takes = |name: &str| fs::metadata(world.member(name)).unwrap().blocks() * 512;
    let entries = planned["plan"].as_array().unwrap();
    for (entry, before) in entries.iter().zip([takes("b") + takes("c"), takes("d")]) {
        let frees = before.saturating_sub(entry["bytes_to_write"].as_u64().unwrap());
        assert_eq!(entry["bytes_to_free"], frees, "{entry}");
        assert_eq!(entry["bytes_needed"], entry["bytes_to_write"], "{entry}");
        assert_eq!(entry["members"], serde_json::json!(["snapshots/2/7/b"]), "{entry}");
    }
    assert!(entries[0]["bytes_to_free"].as_u64() > Some(0), "{planned}");
    let (exit, done) = world.run(&["delete", "b", "--assume-deleted", "--now", "--yes"]);
    assert_eq!(exit, 0, "{done}");
    assert_eq!(done["plan"], planned["plan"], "the run uses the plan that was shown");
    let results = done["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    for (result, child) in results.iter().zip(["c", "d"]) {
        assert_eq!(result["status"], "done", "{result}");
        assert_eq!(result["into"], format!("snapshots/2/7/{child}"));
        assert_eq!(result["members"][0], "snapshots/2/7/b");
        assert_eq!(result["claims"][0]["claim"], "plan");
        assert_eq!(result["claims"][0]["bytes"], 10 << 20);
        let planned =
            done["plan"].as_array().unwrap().iter().find(|entry| entry["into"] == result["into"]).unwrap();
        let written =
            result["bytes_written"].as_u64().unwrap() + result["metadata_bytes_written"].as_u64().unwrap();
        assert_eq!(planned["bytes_to_write"], written, "{result}");
    }
    assert!(!world.member("b").exists());
    for name in ["a", "c", "d"] {
        assert_true(&world.member(name), &truth.join(name), "after b went");
    }
    assert_eq!(fs::read_dir(world.root().join(".qchain/tmp")).unwrap().count(), 0);
}

#[test]
fn what_is_not_given_up_stays() {
    let world = World::opted_in();
    let message = world.refuses(&["b"], 3, "not-deletable");
    assert!(message.starts_with("snapshots/2/7/b: "), "{message}");
    let records = world.records(&[("b", "Ready"), ("a", "Hidden")]);
    let message = world.refuses(&["b", "--records", &records], 3, "not-deletable");
    assert!(message.contains("Ready"), "{message}");
    world.refuses(&["c", "--records", &records], 3, "not-deletable");
    world.refuses(&["c", "--assume-deleted"], 3, "end-of-chain");
    world.refuses(&["b", "--assume-deleted", "--mode", "in-place"], 3, "mode-impossible");
    world.refuses(&["nobody", "--assume-deleted"], 4, "not-found");
    let rubbish = world.directory.path().join("rubbish");
    fs::write(&rubbish, "no\tsuch\tcolumns\n").unwrap();
    world.refuses(&["a", "--records", text(&rubbish)], 2, "bad-records");
    let (exit, document) = world.run(&["delete", "a", "--records", &records, "--now", "--yes"]);
    assert_eq!((exit, &first(&document, "results")["status"]), (0, &Value::from("done")), "{document}");
    assert!(!world.member("a").exists());
}

#[test]
fn without_consent_nothing_happens() {
    let world = World::opted_in();
    let before = listing(&world.root().join("snapshots"));
    assert_eq!(world.fails(&["delete", "b", "--assume-deleted", "--now"]), (3, "not-confirmed".to_owned()));
    assert_eq!(
        world.fails(&["--read-only", "delete", "b", "--assume-deleted", "--yes"]),
        (3, "read-only".to_owned())
    );
    assert_eq!(listing(&world.root().join("snapshots")), before);
}

#[test]
fn a_directory_that_was_not_opted_in_is_left_alone() {
    let world = World::forked();
    world.refuses(&["b", "--assume-deleted"], 3, "not-initialised");
    let (exit, document) = world.run_on("/no/such/directory", &["delete", "b", "--assume-deleted", "--yes"]);
    assert_eq!((exit, document["error"]["code"].as_str()), (4, Some("not-found")), "{document}");
}

#[test]
fn what_is_being_made_is_left_alone() {
    let world = World::opted_in();
    let before = listing(&world.root().join("snapshots"));
    let settle = world.fails(&["delete", "b", "--assume-deleted", "--yes"]);
    assert_eq!(settle, (5, "incoming".to_owned()), "it changed a moment ago");
    assert_eq!(listing(&world.root().join("snapshots")), before);
    // libvirt has written d and not said whose child it is; --now does not help.
    world.checkpoints(&[("a", ""), ("b", "a"), ("c", "b")]);
    let message = world.refuses(&["b", "--assume-deleted"], 5, "incoming");
    assert!(message.contains("checkpoint"), "{message}");
    world.refuses(&["c", "--assume-deleted", "--end-of-chain"], 5, "incoming");
    world.checkpoints(&[("d", "c")]);
    world.refuses(&["b", "--assume-deleted"], 5, "incoming");
    world.checkpoints(&[("d", "b")]);
    let (exit, document) = world.run(&["delete", "b", "--assume-deleted", "--yes"]);
    assert_eq!(exit, 0, "checkpoints say that all is there: {document}");
    let left = fs::read_to_string(world.root().join("checkpoints/2/7/d")).unwrap();
    assert!(left.contains("<name>a</name>"), "{left}");
    assert!(!world.root().join("checkpoints/2/7/b").exists());
}

#[test]
fn a_checkpoint_file_that_cannot_be_edited_stops_the_delete() {
    let world = World::opted_in();
    world.checkpoints(&[("a", ""), ("b", "a"), ("c", "b"), ("d", "b")]);
    fs::write(world.root().join("checkpoints/2/7/c"), "<domaincheckpoint><name>c").unwrap();
    world.refuses(&["b", "--assume-deleted"], 3, "checkpoint-unreadable");
}

#[test]
fn members_that_a_merge_would_spoil_are_refused() {
    let world = World::opted_in();
    must("qemu-img", &["bitmap", "--add", text(&world.member("b")), "dirty"]);
    world.refuses(&["b", "--assume-deleted"], 3, "has-bitmaps");
    must("qemu-img", &["bitmap", "--remove", text(&world.member("b")), "dirty"]);
    must("qemu-img", &["snapshot", "-c", "inside", text(&world.member("c"))]);
    world.refuses(&["b", "--assume-deleted"], 3, "has-internal-snapshots");
    must("qemu-img", &["snapshot", "-d", "inside", text(&world.member("c"))]);
    fs::hard_link(world.member("c"), world.directory.path().join("other")).unwrap();
    world.refuses(&["b", "--assume-deleted"], 3, "hard-linked");
}

fn cut(path: &Path, length: u64) {
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(length).unwrap();
}

#[test]
fn broken_chains_are_refused_by_name() {
    let world = World::opted_in();
    // A child that cannot be read may be anybody's.
    world.make("e", "a", &[]);
    cut(&world.member("e"), 70);
    world.refuses(&["b", "--assume-deleted"], 6, "bad-header");
    fs::remove_file(world.member("e")).unwrap();
    // A child under a name that leads nowhere, but ends in the member's.
    world.make("e", "/mnt/elsewhere/snapshots/9/9/b", &[]);
    world.refuses(&["b", "--assume-deleted"], 6, "missing-parent");
    fs::remove_file(world.member("e")).unwrap();
    // Data past the end of a file is lost data.
    let length = fs::metadata(world.member("b")).unwrap().len();
    cut(&world.member("b"), length - 131_072);
    world.refuses(&["b", "--assume-deleted"], 6, "truncated");
    fs::remove_file(world.member("a")).unwrap();
    world.refuses(&["b", "--assume-deleted"], 6, "missing-parent");
    // a backs onto b, which backs onto a.
    world.make("a", "b", &[]);
    let message = world.refuses(&["b", "--assume-deleted"], 6, "cycle");
    assert!(message.contains("snapshots/2/7/b"), "{message}");
}

/// An unset variable of somebody's script is no prefix of all members.
#[test]
fn an_empty_name_stands_for_nothing() {
    let world = World::opted_in();
    world.refuses(&["", "--assume-deleted"], 2, "usage");
    world.refuses(&["b", "", "--assume-deleted"], 2, "usage");
    for verb in ["list", "verify", "adopt", "map", "digest"] {
        let (exit, document) = world.run(&[verb, ""]);
        assert_eq!((exit, document["error"]["code"].as_str()), (2, Some("usage")), "{verb}: {document}");
    }
}

#[test]
fn a_member_that_qemu_writes_is_busy() {
    let world = World::opted_in();
    let writer = Writer::of(&world.member("c"));
    world.refuses(&["b", "--assume-deleted"], 5, "locked");
    drop(writer);
    let (exit, document) = world.run(&["delete", "b", "--assume-deleted", "--now", "--yes"]);
    assert_eq!(exit, 0, "{document}");
}

#[test]
fn list_tells_what_deleted_members_hold() {
    let world = World::opted_in();
    let records = world.records(&[("a", "Ready"), ("b", "Hidden"), ("c", "Ready"), ("d", "Ready")]);
    let (exit, document) = world.run(&["list", "--records", &records]);
    assert_eq!(exit, 0, "{document}");
    let chain = first(&document, "chains");
    let member = &chain["members"][1];
    assert_eq!(
        (member["member"].as_str(), member["record"].as_str()),
        (Some("snapshots/2/7/b"), Some("Hidden"))
    );
    assert_eq!(chain["pinned_bytes"], member["allocated_bytes"], "{chain}");
    let (_, planned) = world.run(&["delete", "b", "--records", &records, "--now", "--dry-run"]);
    let planned: u64 =
        planned["plan"].as_array().unwrap().iter().map(|e| e["bytes_to_free"].as_u64().unwrap()).sum();
    assert!(chain["merge_frees_bytes"].as_u64().unwrap() <= planned, "{chain}");
}

#[test]
fn a_plain_store_asks_for_no_word_of_cloudstack() {
    let world = World::forked();
    let (exit, document) = world.run(&["init", "--kind", "plain"]);
    assert_eq!((exit, document["kind"].as_str()), (0, Some("plain")));
    let (exit, document) = world.run(&["delete", "d", "a", "--now", "--yes"]);
    assert_eq!(exit, 0, "{document}");
    let statuses: Vec<&str> = document["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|result| result["status"].as_str().unwrap())
        .collect();
    assert_eq!(statuses, ["done", "done"]);
    assert!(!world.member("a").exists() && !world.member("d").exists());
}
