//! `history`, `undo`, `purge`, `recover` and what surrounds them, as they are called: documents, exit codes, what
//! comes back and what goes.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::support::qemu::{must, run, text};
use super::support::world::{World, listing};

/// A dead instance's.
const TREE: &str = "00000000000000000000000000000001";
const OPERATION: &str = "00000000000000000000000000000002";

impl World {
    /// a <- b <- {c, d}, opted in.
    fn changeable() -> Self {
        let world = Self::forked();
        assert_eq!(world.run(&["init"]).0, 0);
        world
    }

    /// Runs what must end well.
    fn does(&self, arguments: &[&str]) -> Value {
        let (exit, document) = self.run(arguments);
        assert_eq!(exit, 0, "{arguments:?}: {document}");
        document
    }

    /// Deletes a member; gives the operation.
    fn deletes(&self, member: &str, more: &[&str]) -> String {
        let mut arguments = vec!["delete", member, "--assume-deleted", "--now", "--yes"];
        arguments.extend(more);
        let document = self.does(&arguments);
        document["results"][0]["operation"].as_str().unwrap().to_owned()
    }

    /// Runs without `--json`; what it prints.
    fn prints(&self, arguments: &[&str]) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_qchain"))
            .args(["--store", text(&self.root())])
            .args(arguments)
            .env("XDG_CACHE_HOME", self.directory.path().join("caches"))
            .env_remove("QCHAIN_STORE")
            .env_remove("QCHAIN_CONFIG")
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn own(&self, path: &str) -> PathBuf {
        self.root().join(".qchain").join(path)
    }

    fn names_in(&self, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(self.own(directory)).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn digests(&self, names: &[&str]) -> Vec<String> {
        let digest = |name: &&str| self.does(&["digest", name])["digest"].as_str().unwrap().to_owned();
        names.iter().map(digest).collect()
    }
}

/// Bytes; inode, owner, group, mode; seconds and nanoseconds of the last change; attributes and ACL.
type Whole = (Vec<u8>, [u64; 4], i64, i64, String);

/// All of the files in a directory that is to be as it was.
fn whole(directory: &Path) -> BTreeMap<PathBuf, Whole> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let data = fs::metadata(&path).unwrap();
        let facts = [data.ino(), data.uid().into(), data.gid().into(), data.mode().into()];
        let attributes = run("getfattr", &["-d", "-m", "-", "-e", "hex", text(&path)]);
        let acl = run("getfacl", &["-n", "-c", "-p", text(&path)]);
        let words = [attributes.stdout, acl.stdout].concat();
        let words = String::from_utf8_lossy(&words).into_owned();
        let bytes = fs::read(&path).unwrap();
        found.insert(path, (bytes, facts, data.mtime(), data.mtime_nsec(), words));
    }
    found
}

fn operations(document: &Value) -> &Vec<Value> {
    document["operations"].as_array().unwrap()
}

#[test]
fn what_is_deleted_can_be_undone_once_to_the_last_attribute() {
    let world = World::changeable();
    for name in ["b", "c"] {
        std::os::unix::fs::chown(world.member(name), Some(12_345), Some(23_456)).unwrap();
        fs::set_permissions(world.member(name), fs::Permissions::from_mode(0o640)).unwrap();
        // The file system of temporary files may have no attributes; then there are none to be kept.
        run("setfacl", &["-m", "u:1234:r,g:77:rw,m:r", text(&world.member(name))]);
        run("setfattr", &["-n", "user.cloud", "-v", "0x00ff73", text(&world.member(name))]);
    }
    let directory = world.root().join("snapshots/2/7");
    let (before, digests) = (whole(&directory), world.digests(&["a", "b", "c", "d"]));
    let operation = world.deletes("b", &[]);
    assert!(!world.member("b").exists());
    assert_eq!(world.digests(&["a", "c", "d"]), [&digests[0], &digests[2], &digests[3]].map(String::clone));

    let document = world.does(&["history"]);
    let [done] = &operations(&document)[..] else { panic!("{document}") };
    assert_eq!(done["operation"], operation.as_str(), "{done}");
    assert_eq!(done["member"], "snapshots/2/7/b");
    assert_eq!(done["members"], json!(["snapshots/2/7/b"]));
    assert_eq!(done["survivors"], json!(["snapshots/2/7/c", "snapshots/2/7/d"]));
    assert_eq!(
        (&done["undone"], &done["ended"], &done["undoes"]),
        (&json!(false), &json!(false), &Value::Null)
    );
    assert!(done["bytes_held"].as_u64() > Some(0), "{done}");
    let (time, until) = (done["time"].as_str().unwrap(), done["undo_until"].as_str().unwrap());
    assert!(time < until && time.ends_with('Z'), "{done}");

    // Asks, and there is nobody to answer.
    assert_eq!(world.fails(&["undo", &operation]), (3, "not-confirmed".to_owned()));
    let document = world.does(&["undo", &operation[..8], "--yes"]);
    assert_eq!(document["status"], "done", "{document}");
    assert_eq!(document["operations"][0]["operation"], operation.as_str());
    assert_eq!((&document["action"], &document["error"]), (&json!("finished"), &Value::Null));
    assert_eq!(whole(&directory), before, "the very files are back");
    assert_eq!(world.digests(&["a", "b", "c", "d"]), digests);
    assert_eq!(
        (world.names_in("trash"), world.names_in("tmp"), world.names_in("intents")),
        Default::default()
    );

    assert_eq!(world.fails(&["undo", &operation, "--yes"]), (3, "not-undoable".to_owned()));
    let undo = document["operation"].as_str().unwrap();
    assert_eq!(
        world.fails(&["undo", undo, "--yes"]),
        (3, "not-undoable".to_owned()),
        "an undo is not undone"
    );
    let document = world.does(&["history"]);
    let [done, undone] = &operations(&document)[..] else { panic!("{document}") };
    assert_eq!(
        (&done["undone"], &done["ended"], &done["bytes_held"]),
        (&json!(true), &json!(true), &json!(0))
    );
    assert_eq!((&undone["undoes"], &undone["operation"]), (&json!(operation), &json!(undo)));
    assert_eq!(undone["members"], json!(["snapshots/2/7/b"]));
    // And once more, from what came back.
    world.deletes("b", &["--retention", "0s"]);
    assert_eq!(world.digests(&["a", "c", "d"]), [&digests[0], &digests[2], &digests[3]].map(String::clone));
}

#[test]
fn checkpoint_files_come_back_as_they_were() {
    let world = World::changeable();
    let directory = world.root().join("checkpoints/2/7");
    fs::create_dir_all(&directory).unwrap();
    for (name, parent) in [("a", ""), ("b", "a"), ("c", "b"), ("d", "b")] {
        let parent =
            if parent.is_empty() { String::new() } else { format!("<parent><name>{parent}</name></parent>") };
        let xml =
            format!("<domaincheckpoint>\n <name>{name}</name>{parent}<!-- {name} -->\n</domaincheckpoint>\n");
        fs::write(directory.join(name), xml).unwrap();
    }
    let before = whole(&directory);
    let operation = world.deletes("b", &[]);
    assert!(!directory.join("b").exists());
    assert!(fs::read_to_string(directory.join("c")).unwrap().contains("<name>a</name>"));
    let undone = world.does(&["undo", &operation, "--yes"]);
    assert_eq!(
        undone["operations"][0]["members"],
        json!(["snapshots/2/7/b"]),
        "no checkpoint files: {undone}"
    );
    assert_eq!(whole(&directory), before);
    let document = world.does(&["history"]);
    assert_eq!(operations(&document)[1]["members"], json!(["snapshots/2/7/b"]), "{document}");
}

#[test]
fn purge_ends_what_is_due_and_with_all_what_is_not() {
    let world = World::changeable();
    let operation = world.deletes("b", &[]);
    let held = operations(&world.does(&["history"]))[0]["bytes_held"].as_u64().unwrap();
    let document = world.does(&["purge"]);
    let [waits] = &operations(&document)[..] else { panic!("{document}") };
    assert_eq!((&waits["action"], &waits["operation"]), (&json!("retention"), &json!(operation)));
    assert_eq!((&waits["bytes_held"], &waits["bytes_freed"]), (&json!(held), &json!(0)));
    assert!(waits["until"].is_string() && waits["undo_until"].is_string(), "{waits}");
    // It says what would be lost, and asks.
    assert_eq!(world.fails(&["purge", "--all"]), (3, "not-confirmed".to_owned()));
    // Three files, and a note that readers were looked for twice.
    assert_eq!(world.names_in("trash").len(), 4);
    let document = world.does(&["purge", "--all", "--yes"]);
    let [ended] = &operations(&document)[..] else { panic!("{document}") };
    assert_eq!((&ended["action"], &ended["member"]), (&json!("finished"), &json!("snapshots/2/7/b")));
    assert_eq!((&ended["bytes_freed"], &document["bytes_freed"]), (&json!(held), &json!(held)));
    assert_eq!((&ended["bytes_held"], &ended["undo_until"]), (&json!(0), &Value::Null));
    assert_eq!((world.names_in("trash"), world.names_in("intents")), Default::default());
    assert_eq!(world.fails(&["undo", &operation, "--yes"]), (3, "not-undoable".to_owned()));
    let document = world.does(&["purge", "--all", "--yes"]);
    assert_eq!(document["operations"], json!([]));
    // One whose time is over by then goes with the next change.
    world.deletes("d", &["--end-of-chain", "--retention", "1s"]);
    std::thread::sleep(std::time::Duration::from_millis(1200));
    let document = world.does(&["purge"]);
    assert_eq!(operations(&document)[0]["action"], "finished", "{document}");
    assert_eq!(world.names_in("trash"), Vec::<String>::new());
}

#[test]
fn a_deleted_member_keeps_its_name_for_the_grace() {
    let world = World::changeable();
    let operation = world.deletes("b", &["--grace", "1h"]);
    assert!(world.member("b").exists());
    let state = |name: &str| {
        let document = world.does(&["list", name]);
        let members = document["chains"][0]["members"].as_array().unwrap().clone();
        let found =
            members.into_iter().find(|member| member["member"] == format!("snapshots/2/7/{name}").as_str());
        found.unwrap()["state"].clone()
    };
    assert_eq!(state("b"), "leaving");
    assert_eq!(state("c"), "incoming", "it was written a moment ago");
    let again = ["delete", "b", "--assume-deleted", "--now", "--yes"];
    assert_eq!(world.fails(&again), (3, "leaving".to_owned()));
    // The grace is for readers; nobody may cut it short.
    let document = world.does(&["purge", "--all", "--yes"]);
    assert_eq!(operations(&document)[0]["action"], "grace", "{document}");
    assert!(world.member("b").exists());
    // A reader that came after the delete is told, and its chain is a chain like any other.
    world.make("e", "b", &[]);
    let document = world.does(&["list", "e"]);
    let findings = document["findings"].as_array().unwrap();
    assert!(
        findings.iter().any(|one| one["code"] == "kept" && one["member"] == "snapshots/2/7/b"),
        "{document}"
    );
    fs::remove_file(world.member("e")).unwrap();
    let document = world.does(&["undo", &operation, "--yes"]);
    assert_eq!(
        (&document["status"], &document["action"]),
        (&json!("done"), &json!("retention")),
        "{document}"
    );
    assert_ne!(state("b"), "leaving", "what was undone was not deleted");
    let document = world.does(&["purge", "--all", "--yes"]);
    let [done, undo] = &operations(&document)[..] else { panic!("{document}") };
    assert_eq!((&done["action"], &undo["action"]), (&json!("finished"), &json!("finished")));
    assert_eq!((world.names_in("trash"), world.names_in("intents")), Default::default());
}

#[test]
fn what_reads_through_a_member_that_was_merged_in_place_since_does_not_come_back() {
    let world = World::changeable();
    fs::remove_file(world.member("d")).unwrap();
    let truth = world.digests(&["c"]);
    let operation = world.deletes("b", &["--grace", "0s", "--retention", "1h"]);
    world.deletes("a", &["--mode", "in-place", "--grace", "1h"]);
    assert!(world.member("a").exists());
    assert_eq!(world.fails(&["undo", &operation, "--yes"]), (3, "not-undoable".to_owned()));
    assert!(!world.member("b").exists());
    assert_eq!(world.digests(&["c"]), truth);
}

#[test]
fn a_deleted_member_that_got_a_reader_stays() {
    let world = World::changeable();
    world.deletes("b", &["--grace", "1s"]);
    world.make("e", "b", &["write -P 7 0 64k"]);
    let digests = world.digests(&["b", "c", "d", "e"]);
    std::thread::sleep(std::time::Duration::from_millis(1200));
    let document = world.does(&["recover"]);
    let kept = document["recovered"][0]["kept"][0].as_str().unwrap();
    assert!(kept.contains("snapshots/2/7/b") && kept.contains("snapshots/2/7/e"), "{kept}");
    assert_eq!(world.digests(&["b", "c", "d", "e"]), digests);
    let finding = &world.does(&["list", "b"])["findings"][0];
    assert_eq!((&finding["code"], &finding["member"]), (&json!("kept"), &json!("snapshots/2/7/b")));
    // It is a member like any other, and can be deleted anew.
    world.deletes("b", &["--grace", "0s"]);
    assert!(!world.member("b").exists());
    assert_eq!(world.digests(&["c", "d", "e"]), digests[1..]);
    world.does(&["purge", "--all", "--yes"]);
    assert_eq!((world.names_in("trash"), world.names_in("intents")), Default::default());
}

#[test]
fn recover_takes_back_what_a_dead_instance_left() {
    let world = World::changeable();
    assert_eq!(
        world.does(&["recover"]),
        json!({"schema": 1, "recovered": [], "findings": [], "thawed": null})
    );
    let intent = format!("{TREE}.0000000001.{OPERATION}");
    let place = json!({"store": "unknown", "path": "snapshots/2/7/b"});
    let said = json!({"schema": 1, "tree": TREE, "generation": 1, "operation": OPERATION, "owner": "9 on elsewhere",
        "begun_ns": 5, "members": [place]});
    fs::write(world.own("intents").join(&intent), said.to_string()).unwrap();
    fs::write(world.own("tmp").join(format!("{OPERATION}.0.image")), "half of an image").unwrap();
    let before = listing(&world.root().join("snapshots"));
    let document = world.does(&["recover"]);
    let [recovered] = &document["recovered"].as_array().unwrap()[..] else { panic!("{document}") };
    assert_eq!((&recovered["intent"], &recovered["action"]), (&json!(intent), &json!("taken-back")));
    assert_eq!((&recovered["operation"], &recovered["store"]), (&json!(OPERATION), &json!("s1")));
    assert_eq!(recovered["members"], json!(["unknown:snapshots/2/7/b"]), "its store is not at hand");
    assert_eq!(
        (&recovered["until"], &recovered["error"], &recovered["kept"]),
        (&Value::Null, &Value::Null, &json!([]))
    );
    assert_eq!((world.names_in("intents"), world.names_in("tmp")), Default::default());
    assert_eq!(listing(&world.root().join("snapshots")), before);
    assert_eq!(world.does(&["recover"])["recovered"], json!([]));
    assert_eq!(world.does(&["history"])["operations"], json!([]), "it was never done");
    world.deletes("b", &[]);
}

#[test]
fn a_rehearsal_leaves_no_trace() {
    let world = World::changeable();
    let before = listing(&world.root());
    let metrics = world.directory.path().join("qchain.prom");
    let rehearse = ["delete", "b", "--assume-deleted", "--now", "--yes", "--rehearse", "--metrics-file"];
    let document = world.does(&[&rehearse[..], &[text(&metrics)]].concat());
    assert_eq!(document["rehearsed"], true);
    let results = document["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    for result in results {
        assert_eq!(result["status"], "done", "{result}");
        assert!(result["note"].as_str().unwrap().contains("nothing was changed"), "{result}");
        assert_eq!((&result["bytes_held_until_purge"], &result["undo_until"]), (&json!(0), &Value::Null));
        assert_eq!(result["claims"][0]["bytes"], 10 << 20, "it was built and proved");
    }
    assert!(!metrics.exists(), "no success that a monitor may rely on");
    let own = |path: &Path| {
        ["generations", "locks", "manifests", "leaves", "log"]
            .iter()
            .any(|name| path.starts_with(world.own(name)))
    };
    let files = |listing: BTreeMap<PathBuf, (u64, u64, i64, i64)>| -> Vec<_> {
        listing.into_iter().filter(|(path, _)| path.is_file() && !own(path)).collect()
    };
    assert_eq!(files(listing(&world.root())), files(before));
    assert_eq!(world.does(&["history"])["operations"], json!([]));
    let text = world.prints(&rehearse[..6]);
    assert!(text.contains("rehearsed: snapshots/2/7/c: wrote"), "{text}");
    assert!(text.contains("nothing was changed"), "{text}");
}

#[test]
fn a_frozen_tree_is_left_alone_until_somebody_thaws_it() {
    let world = World::changeable();
    let operation = world.deletes("b", &[]);
    let [tree] = &world.names_in("generations")[..] else { panic!("one tree") };
    let freeze = json!({"schema": 1, "operation": operation, "time_ns": 5, "reason": "somebody should look"});
    fs::write(world.own("generations").join(tree).join("frozen"), freeze.to_string()).unwrap();
    let found = &world.does(&["list"])["findings"][0];
    assert_eq!((&found["code"], &found["member"]), (&json!("frozen"), &json!("snapshots/2/7/a")), "{found}");
    for verb in ["recover", "purge"] {
        let (exit, document) = world.run(&[verb]);
        let list = if verb == "recover" { "recovered" } else { "operations" };
        let entry = &document[list][0];
        assert_eq!(
            (exit, &entry["action"], &entry["error"]["code"]),
            (3, &json!("frozen"), &json!("frozen"))
        );
    }
    assert_eq!(world.fails(&["undo", &operation, "--yes"]), (3, "frozen".to_owned()));
    let (exit, document) =
        world.run(&["delete", "c", "--assume-deleted", "--end-of-chain", "--now", "--yes"]);
    assert_eq!((exit, &document["results"][0]["error"]["code"]), (3, &json!("frozen")), "{document}");
    let document = world.does(&["recover", "--thaw", &operation[..6]]);
    assert_eq!(document["thawed"], tree.as_str());
    assert_eq!(document["recovered"][0]["action"], "retention");
    assert_eq!(
        world.fails(&["recover", "--thaw", &operation]),
        (4, "not-found".to_owned()),
        "it is not frozen"
    );
    world.does(&["undo", &operation, "--yes"]);
}

#[test]
fn a_tree_that_somebody_else_works_on_is_busy() {
    let world = World::changeable();
    let operation = world.deletes("b", &[]);
    let [tree] = &world.names_in("generations")[..] else { panic!("one tree") };
    let lease = world.own("locks").join(tree);
    let write = |counter: u64| {
        let content =
            json!({"host": "elsewhere", "process": "1", "nonce": "n", "counter": counter, "free": false});
        // Always as long: whoever reads meanwhile finds the old text or the new one.
        let file = fs::OpenOptions::new().write(true).open(&lease).unwrap();
        std::os::unix::fs::FileExt::write_all_at(
            &file,
            format!("{:<300}", content.to_string()).as_bytes(),
            0,
        )
        .unwrap();
    };
    write(1_000_000);
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for counter in 1_000_001.. {
                if over.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
                write(counter);
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
        // One after the other, and the end told before anything is judged: a panic would wait for the thread.
        let runs = [&["recover"][..], &["purge", "--all", "--yes"], &["undo", &operation, "--yes"]];
        let found = runs.map(|arguments| world.run(arguments));
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        let codes = ["/recovered/0/error/code", "/operations/0/error/code", "/error/code"];
        for ((exit, document), code) in found.iter().zip(codes) {
            assert_eq!((*exit, document.pointer(code)), (5, Some(&json!("store-busy"))), "{document}");
        }
    });
    fs::remove_file(&lease).unwrap();
    world.does(&["undo", &operation, "--yes"]);
}

#[test]
fn wrong_input_is_refused_by_kind() {
    let world = World::forked();
    // Reading verbs need nothing.
    assert_eq!(world.does(&["history"])["operations"], json!([]));
    for arguments in [&["undo", "1", "--yes"][..], &["purge"], &["recover"], &["purge", "--all", "--yes"]] {
        assert_eq!(world.fails(arguments), (3, "not-initialised".to_owned()), "{arguments:?}");
    }
    world.does(&["init"]);
    let before = listing(&world.root());
    for arguments in [&["undo", "1", "--yes"][..], &["purge"], &["recover"]] {
        let call = [&["--read-only"], arguments].concat();
        assert_eq!(world.fails(&call), (3, "read-only".to_owned()), "{arguments:?}");
    }
    assert_eq!(world.fails(&["undo", OPERATION, "--yes"]), (4, "not-found".to_owned()));
    assert_eq!(world.fails(&["undo", "", "--yes"]), (4, "not-found".to_owned()));
    assert_eq!(world.fails(&["undo", "../../etc", "--yes"]), (4, "not-found".to_owned()));
    assert_eq!(world.fails(&["undo", "--yes"]), (2, "usage".to_owned()));
    assert_eq!(world.fails(&["undo", "1", "2", "--yes"]), (2, "usage".to_owned()));
    assert_eq!(world.fails(&["recover", "--thaw", OPERATION]), (4, "not-found".to_owned()));
    let elsewhere = world.directory.path().join("notes");
    fs::write(&elsewhere, "not written by qchain").unwrap();
    for path in ["/no/such/directory/x.prom", text(world.directory.path()), text(&elsewhere)] {
        assert_eq!(world.fails(&["purge", "--metrics-file", path]), (2, "usage".to_owned()), "{path}");
    }
    assert_eq!(fs::read_to_string(&elsewhere).unwrap(), "not written by qchain");
    let own = |path: &Path| path.starts_with(world.own("locks"));
    let outside = |listing: BTreeMap<PathBuf, _>| -> Vec<_> {
        listing.into_iter().filter(|(path, _): &(PathBuf, (u64, u64, i64, i64))| !own(path)).collect()
    };
    assert_eq!(outside(listing(&world.root())), outside(before));
}

#[test]
fn reading_needs_no_right_to_the_records() {
    let world = World::changeable();
    world.deletes("b", &["--grace", "1h"]);
    let program = world.directory.path().join("qchain");
    fs::copy(env!("CARGO_BIN_EXE_qchain"), &program).unwrap();
    for path in [world.directory.path(), &program] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let as_nobody = |arguments: &[&str]| {
        let user = ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", text(&program)];
        let output =
            run("setpriv", &[&user[..], &["--json", "--store", text(&world.root())], arguments].concat());
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), document)
    };
    let (exit, document) = as_nobody(&["list"]);
    assert_eq!(
        (exit, document["chains"][0]["members"].as_array().map(Vec::len)),
        (Some(0), Some(4)),
        "{document}"
    );
    assert_eq!(as_nobody(&["verify"]).0, Some(0));
    for arguments in [&["history"][..], &["recover"], &["deinit", "--yes"], &["init"]] {
        let (exit, document) = as_nobody(arguments);
        assert_eq!((exit, &document["error"]["code"]), (Some(8), &json!("io")), "{arguments:?}: {document}");
    }
}

#[test]
fn one_beginning_of_two_ids_is_ambiguous() {
    let world = World::changeable();
    // Two of seventeen begin with the same digit.
    let ids: Vec<String> = (0..17)
        .map(|_| {
            let id = world.deletes("b", &["--grace", "0s", "--retention", "1h"]);
            world.does(&["undo", &id, "--yes"])["operation"].as_str().unwrap().to_owned()
        })
        .collect();
    let twice = ids.iter().find(|id| ids.iter().filter(|other| other[..1] == id[..1]).count() > 1).unwrap();
    let (exit, document) = world.run(&["undo", &twice[..1], "--yes"]);
    assert_eq!((exit, &document["error"]["code"]), (2, &json!("ambiguous")), "{document}");
    assert!(document["error"]["message"].as_str().unwrap().contains(&twice[..1]), "{document}");
}

#[test]
fn a_store_is_not_opted_out_while_something_is_kept() {
    let world = World::changeable();
    let operation = world.deletes("b", &[]);
    let before = listing(&world.root());
    let (exit, document) = world.run(&["deinit", "--yes"]);
    assert_eq!((exit, &document["error"]["code"]), (3, &json!("open-operations")), "{document}");
    let message = document["error"]["message"].as_str().unwrap();
    assert!(message.contains(&operation) && message.contains("purge --all"), "{message}");
    assert_eq!(listing(&world.root()), before);
    world.does(&["purge", "--all", "--yes"]);
    world.does(&["deinit", "--yes"]);
    assert!(!world.root().join(".qchain").exists());
    // What is half done counts, too; nobody could finish it.
    world.does(&["init"]);
    fs::write(world.own("intents").join(format!("{TREE}.0000000001.{OPERATION}")), "").unwrap();
    assert_eq!(world.fails(&["deinit", "--yes"]), (3, "open-operations".to_owned()));
    world.does(&["recover"]);
    world.does(&["deinit", "--yes"]);
}

#[test]
fn init_proves_that_locks_are_seen_across_processes() {
    let world = World::forked();
    let document = world.does(&["init"]);
    assert_eq!(document["capabilities"]["byte_range_locks"], true, "{document}");
    assert_eq!(world.names_in("tmp"), Vec::<String>::new());
    // The other process holds what it was given until its input ends, and says so.
    let mut holder = Command::new(env!("CARGO_BIN_EXE_qchain"))
        .arg("__hold-lock")
        .arg(world.member("a"))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 5];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut said).unwrap();
    assert_eq!(&said, b"held\n");
    let refused = run("qemu-io", &["-f", "qcow2", "-c", "write 0 512", text(&world.member("a"))]);
    assert!(String::from_utf8_lossy(&[refused.stdout, refused.stderr].concat()).contains("lock"));
    drop(holder.stdin.take());
    assert!(holder.wait().unwrap().success());
    // What was not proved is not believed: an init of a store where locks are hidden says no.
    let record = world.own("store.json");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace("\"byte_range_locks\": true", "\"byte_range_locks\": false")).unwrap();
    let call = ["delete", "c", "--assume-deleted", "--now", "--mode", "in-place", "--yes"];
    world.make("e", "c", &[]);
    let (exit, document) = world.run(&call);
    assert_eq!((exit, &document["error"]["code"]), (3, &json!("mode-impossible")), "{document}");
    assert!(document["error"]["message"].as_str().unwrap().contains("locks"), "{document}");
    assert!(
        must("qemu-img", &["check", super::support::qemu::text(&world.member("e"))]).contains("No errors")
    );
}

/// The samples of a text in Prometheus' form; each family has its head, right before its samples.
fn samples(text: &str) -> BTreeMap<String, u64> {
    let mut samples = BTreeMap::new();
    let mut family = String::new();
    let mut helped = String::new();
    assert!(text.ends_with('\n') && !text.contains('\r'), "{text}");
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(
                help.ends_with('.') && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
            );
            name.clone_into(&mut helped);
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            assert_eq!(rest, format!("{helped} gauge"));
            family.clone_from(&helped);
        } else {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let labels = name.strip_prefix(&family).unwrap_or_else(|| panic!("{line} stands in {family}"));
            let label = labels.strip_prefix('{').and_then(|rest| rest.strip_suffix("\"}")).unwrap();
            let (key, of) = label.split_once("=\"").unwrap();
            assert!(["verb", "store"].contains(&key) && !of.contains(['"', '\\', '\n']), "{line}");
            assert!(samples.insert(name.to_owned(), value.parse().unwrap()).is_none(), "{line} stands twice");
        }
    }
    samples
}

#[test]
fn the_metrics_file_tells_a_monitor_how_it_went() {
    let world = World::changeable();
    let file = world.directory.path().join("qchain.prom");
    let metrics = ["--metrics-file", text(&file)];
    let read = || samples(&fs::read_to_string(&file).unwrap());
    let get = |found: &BTreeMap<String, u64>, name: &str| found.get(&format!("qchain_{name}")).copied();
    let operation = world.deletes("b", &metrics);
    let first = read();
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o644, "collectors are other users");
    let success = get(&first, "last_success_timestamp_seconds{verb=\"delete\"}").unwrap();
    assert!(
        success > 1_700_000_000 && get(&first, "last_run_exit_code{verb=\"delete\"}") == Some(0),
        "{first:?}"
    );
    assert_eq!(get(&first, "open_operations{store=\"s1\"}"), Some(1));
    assert_eq!(get(&first, "frozen_trees{store=\"s1\"}"), Some(0));
    assert!(get(&first, "oldest_intent_timestamp_seconds{store=\"s1\"}") <= Some(success), "{first:?}");
    let held = get(&first, "trash_bytes{store=\"s1\"}").unwrap();
    assert_eq!(Some(held), operations(&world.does(&["history"]))[0]["bytes_held"].as_u64());
    // A run that fails is told; the last success stays.
    let failing = [&["delete", "nobody", "--yes"][..], &metrics].concat();
    assert_eq!(world.fails(&failing), (4, "not-found".to_owned()));
    let second = read();
    assert_eq!(get(&second, "last_run_exit_code{verb=\"delete\"}"), Some(4));
    assert_eq!(get(&second, "last_success_timestamp_seconds{verb=\"delete\"}"), Some(success));
    world.does(&[&["purge", "--all", "--yes"][..], &metrics].concat());
    let third = read();
    assert_eq!(get(&third, "last_run_freed_bytes{verb=\"purge\"}"), Some(held));
    assert_eq!(get(&third, "last_run_exit_code{verb=\"delete\"}"), Some(4));
    assert_eq!(get(&third, "trash_bytes{store=\"s1\"}"), Some(0));
    assert_eq!(get(&third, "oldest_intent_timestamp_seconds{store=\"s1\"}"), None);
    assert_eq!(world.run(&[&["undo", &operation, "--yes"][..], &metrics].concat()).0, 3);
    world.does(&[&["recover"][..], &metrics].concat());
    let fourth = read();
    assert_eq!(get(&fourth, "last_success_timestamp_seconds{verb=\"undo\"}"), None);
    assert!(get(&fourth, "last_success_timestamp_seconds{verb=\"recover\"}").is_some());
    // A store that is not there has no figures; the failure has.
    let gone = world.run_on("/no/such/store", &[&["purge"][..], &metrics].concat());
    assert_eq!(gone.0, 4, "{gone:?}");
    let fifth = read();
    assert_eq!(
        (get(&fifth, "last_run_exit_code{verb=\"purge\"}"), get(&fifth, "trash_bytes{store=\"s1\"}")),
        (Some(4), None)
    );
    // Nothing but the file is left in its directory.
    let left = fs::read_dir(world.directory.path()).unwrap();
    assert!(
        left.map(|entry| entry.unwrap().file_name())
            .all(|name| !text(Path::new(&name)).starts_with(".qchain"))
    );
}

#[test]
fn a_delete_says_what_it_keeps_and_how_it_is_undone() {
    let world = World::changeable();
    let plan = world.prints(&["delete", "b", "--assume-deleted", "--now", "--dry-run", "--grace", "2h"]);
    assert!(plan.contains("old files are kept, and it can be undone, for 1day 2h"), "{plan}");
    assert!(plan.contains("for 2h"), "{plan}");
    let dry = ["delete", "b", "--assume-deleted", "--now", "--dry-run", "--retention", "0s"];
    assert!(world.prints(&dry).contains("this cannot be undone"));
    assert_eq!(world.does(&dry)["plan"][0]["undoable"], false);
    let done = world.prints(&["delete", "b", "--assume-deleted", "--now", "--yes"]);
    let history = world.does(&["history"]);
    let operation = operations(&history)[0]["operation"].as_str().unwrap();
    let until = operations(&history)[0]["undo_until"].as_str().unwrap();
    let command = format!("kept until {until}; until then qchain undo {} takes it back", &operation[..12]);
    assert!(done.contains(&command), "{done}");
    let shown = world.prints(&["history"]);
    assert!(
        shown.contains(&operation[..12]) && shown.contains("snapshots/2/7/b") && shown.contains(until),
        "{shown}"
    );
    let undone = world.prints(&["undo", &operation[..12], "--yes"]);
    assert!(undone.contains("snapshots/2/7/b is back"), "{undone}");
    assert!(world.prints(&["history"]).contains("undone"));
    // In place, which nothing takes back: said before.
    world.make("e", "c", &["write -P 9 0 64k"]);
    let plan = world.prints(&["delete", "c", "--assume-deleted", "--now", "--dry-run", "--mode", "in-place"]);
    assert!(plan.contains("this cannot be undone"), "{plan}");
    assert!(world.prints(&["recover"]).contains("nothing was left undone"));
    assert!(world.prints(&["purge"]).contains("nothing is kept"));
}
