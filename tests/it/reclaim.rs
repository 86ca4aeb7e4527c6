//! `reclaim` with a real database and real chains: what CloudStack keeps as Hidden comes back, rows and files tell
//! the same story afterwards, and so they do when it is killed.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::support::chains::{assert_true, copy, write_truth};
use super::support::mariadb::MariaDb;
use super::support::mounts::Bound;
use super::support::qemu::{io, must, text};

/// What CloudStack calls the stores.
const URLS: [&str; 2] = ["nfs://10.11.12.13/export/qchain-test-1", "nfs://10.11.12.13/export/qchain-test-2"];
/// No reader holds an old survivor here.
const AT_ONCE: [&str; 6] = ["--now", "--yes", "--grace", "0s", "--retention", "0s"];

/// One snapshot: its number is its place in the list, from 1.
#[derive(Clone, Debug)]
struct Snapshot {
    path: String,
    store: usize,
    parent: usize,
    state: &'static str,
}

/// Two stores, a database, and the truth of every member.
struct Zone {
    directory: TempDir,
    snapshots: Vec<Snapshot>,
}

impl Zone {
    /// 1 <- 2 <- 3 <- 4 <- 5 on the first store as libvirt makes them, 6 over 3 beside 4 (as after a revert), and 7
    /// over 5 on the second store.
    fn new(states: [&'static str; 7], url: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut zone = Self { directory, snapshots: Vec::new() };
        let mut arguments =
            vec!["--members", "5", "--size", "32M", "--base-bytes", "6M", "--delta-bytes", "4M,256K,4M,8M"];
        arguments.extend(["--checkpoint-form", "cloudstack", "--pattern", "scattered"]);
        if url {
            arguments.extend(["--backing", "absolute", "--url", URLS[0]]);
        }
        let (store, truth) = (zone.root(0), zone.directory.path().join("truth"));
        arguments.extend(["--store", text(&store), "--truth", text(&truth)]);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/make-chain");
        let made: Value = serde_json::from_str(&must(text(&script), &arguments)).unwrap();
        for (index, member) in made["members"].as_array().unwrap().iter().enumerate() {
            let path = member["member"].as_str().unwrap().to_owned();
            zone.snapshots.push(Snapshot { path, store: 0, parent: index, state: states[index] });
        }
        fs::create_dir_all(zone.root(1).join("snapshots/2/7")).unwrap();
        zone
    }

    fn root(&self, store: usize) -> PathBuf {
        self.directory.path().join(format!("s{}", store + 1))
    }

    fn file(&self, snapshot: usize) -> PathBuf {
        let Snapshot { path, store, .. } = &self.snapshots[snapshot - 1];
        self.root(*store).join(path)
    }

    fn truth(&self, snapshot: usize) -> PathBuf {
        let name = Path::new(&self.snapshots[snapshot - 1].path).file_name().unwrap().to_owned();
        self.directory.path().join("truth").join(format!("{}.raw", name.to_str().unwrap()))
    }

    /// One more increment, made by hand; needs its parent to be readable as its header names it.
    fn increment(&mut self, store: usize, parent: usize, name: &str, backing: &str, state: &'static str) {
        let path = format!("snapshots/2/7/{name}");
        self.snapshots.push(Snapshot { path: path.clone(), store, parent, state });
        let file = self.root(store).join(&path);
        must("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, text(&file)]);
        io(&file, &["write -P 77 1M 300k", "write -z 3M 128k"]);
        let number = self.snapshots.len();
        write_truth(&file, &self.truth(number));
        let parent = Path::new(&self.snapshots[parent - 1].path).file_name().unwrap().to_str().unwrap();
        let checkpoint = self.root(store).join(format!("checkpoints/2/7/{name}"));
        fs::create_dir_all(checkpoint.parent().unwrap()).unwrap();
        let xml = format!(
            "<domaincheckpoint><name>{name}</name><parent><name>{parent}</name></parent></domaincheckpoint>"
        );
        fs::write(checkpoint, xml).unwrap();
    }

    fn init(&self) {
        self.run(&["init"]);
    }

    /// Fills the tables.
    fn fill(&self, database: &MariaDb) {
        database.reset();
        let mut sql = String::from("USE cloud;");
        for (index, url) in URLS.iter().enumerate() {
            write!(
                sql,
                "INSERT INTO image_store VALUES ({}, 'store-{index}', 's', '{url}', 'Image');",
                index + 1
            )
            .unwrap();
        }
        for (index, snapshot) in self.snapshots.iter().enumerate() {
            let number = index + 1;
            let Snapshot { path, store, parent, state } = snapshot;
            let length = fs::metadata(self.file(number)).unwrap().len();
            let status = if *state == "Ready" { "BackedUp" } else { "Destroyed" };
            write!(
                sql,
                "INSERT INTO snapshots VALUES ({number}, 'api-{number}', 'it''s\\tone', 2, 7, 'KVM', '{status}', NULL);
                 INSERT INTO snapshot_store_ref (store_id, snapshot_id, created, store_role, size, physical_size,
                 parent_snapshot_id, install_path, state, kvm_checkpoint_path, end_of_chain) VALUES ({}, {number},
                 NOW(), 'Image', 33554432, {length}, {parent}, '{path}', '{state}', '/mnt/x/checkpoints/2/7/y', 0);",
                store + 1,
            )
            .unwrap();
        }
        database.run(&sql);
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qchain"));
        self.adorn(&mut command, arguments);
        command
    }

    fn adorn(&self, command: &mut Command, arguments: &[&str]) {
        command.arg("--json");
        for (index, url) in URLS.iter().enumerate() {
            if self.root(index).exists() {
                command.arg("--store").arg(format!("{},url={url}", self.root(index).display()));
            }
        }
        command.args(arguments).env("XDG_CACHE_HOME", self.directory.path().join("cache"));
        command.env_remove("QCHAIN_DATABASE").env_remove("QCHAIN_STORE").env_remove("QCHAIN_CONFIG");
    }

    fn call(&self, arguments: &[&str]) -> (i32, Value) {
        let output = self.command(arguments).output().unwrap();
        let document = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {output:?}"));
        (output.status.code().unwrap(), document)
    }

    fn run(&self, arguments: &[&str]) -> Value {
        let (exit, document) = self.call(arguments);
        assert_eq!(exit, 0, "{arguments:?}: {document}");
        document
    }

    fn reclaim(&self, database: &MariaDb, more: &[&str]) -> Value {
        let url = database.url();
        let mut arguments = vec!["reclaim", "--database", &url];
        arguments.extend(AT_ONCE);
        arguments.extend(more);
        self.run(&arguments)
    }

    /// The view of every snapshot that CloudStack can still be asked for.
    fn assert_views(&self, context: &str) {
        for (index, snapshot) in self.snapshots.iter().enumerate() {
            if snapshot.state == "Ready" {
                assert_true(&self.file(index + 1), &self.truth(index + 1), context);
            }
        }
    }

    fn allocated(&self) -> u64 {
        let files = (1..=self.snapshots.len()).map(|number| fs::metadata(self.file(number)));
        files.filter_map(Result::ok).map(|file| file.blocks() * 512).sum()
    }
}

fn rows(database: &MariaDb) -> Vec<String> {
    database.ask("SELECT snapshot_id, state, parent_snapshot_id FROM snapshot_store_ref ORDER BY snapshot_id")
}

/// The host prefix of a store, as a KVM agent computes it.
fn prefix(url: &str) -> PathBuf {
    qchain::cloudstack::prefix::StoreUrl::parse(url).unwrap().host_prefix().into()
}

/// A chain with a branch that hangs together by plain names, on one store.
fn branched(states: [&'static str; 7]) -> Zone {
    let mut zone = Zone::new(states, false);
    fs::remove_dir_all(zone.root(1)).unwrap();
    let third = zone.file(3).file_name().unwrap().to_str().unwrap().to_owned();
    zone.increment(0, 3, "branch", &third, states[5]);
    zone
}

const STATES: [&str; 7] = ["Hidden", "Ready", "Hidden", "Hidden", "Ready", "Ready", "Ready"];

#[test]
fn hidden_space_comes_back_and_rows_are_right_in_all_three_modes() {
    let database = MariaDb::start();
    for mode in ["untouched", "print", "apply"] {
        let zone = branched(STATES);
        zone.init();
        zone.fill(&database);
        let before = rows(&database);
        let plan =
            zone.run(&["reclaim", "--database", &database.url(), "--rows", mode, "--dry-run", "--now"]);
        let entries = plan["plan"].as_array().unwrap();
        let sum = |key: &str| entries.iter().map(|entry| entry[key].as_u64().unwrap()).sum::<u64>();
        let announced = sum("bytes_to_free") - sum("bytes_to_take");
        assert_eq!(rows(&database), before, "a dry run changes nothing");
        let took = zone.allocated();
        let done = zone.reclaim(&database, &["--rows", mode]);
        zone.assert_views(mode);
        assert!(done["results"].as_array().unwrap().iter().all(|one| one["status"] == "done"), "{done}");
        let stubs = if mode == "untouched" { 3 * (256 << 10) } else { 0 };
        let freed = took - zone.allocated() + stubs;
        let slack = 64 << 10;
        assert!(
            freed + slack >= announced && freed <= announced + slack,
            "{mode}: {announced} announced, {freed} came"
        );
        for number in [1, 3, 4] {
            assert_eq!(zone.file(number).exists(), mode == "untouched", "{mode}: {number}");
        }
        let merged = [
            "1\tDestroyed\t0",
            "2\tReady\t0",
            "3\tDestroyed\t2",
            "4\tDestroyed\t3",
            "5\tReady\t2",
            "6\tReady\t2",
        ];
        match mode {
            "untouched" => {
                assert_eq!(rows(&database), before);
                stubs_are_of_no_harm(&zone);
                migrated_stores_read_the_same(&zone, &database, mode);
                what_stubs_stand_on_goes_too(&zone, &database);
            }
            "print" => {
                assert_eq!(rows(&database), before);
                let changes = done["rows"][0]["changes"].as_array().unwrap();
                let statements: Vec<&str> =
                    changes.iter().map(|change| change["statement"].as_str().unwrap()).collect();
                database.run(&format!("USE cloud; {}", statements.join(";")));
                assert_eq!(rows(&database), merged);
            }
            _ => {
                assert_eq!(rows(&database), merged);
                assert_eq!(done["rows"][0]["status"], "applied");
            }
        }
        if mode != "untouched" {
            migrated_stores_read_the_same(&zone, &database, mode);
            let lengths = database.ask(
                "SELECT physical_size FROM snapshot_store_ref WHERE snapshot_id IN (2, 5, 6) ORDER BY snapshot_id",
            );
            let files = [2, 5, 6].map(|number| fs::metadata(zone.file(number)).unwrap().len().to_string());
            assert_eq!(lengths, files, "{mode}");
        }
        let again = zone.reclaim(&database, &["--rows", mode]);
        assert_eq!((&again["plan"], &again["results"]), (&json!([]), &json!([])), "{mode}: once is enough");
    }
}

#[test]
fn rows_follow_members_that_become_bases_and_what_is_hidden_below_them() {
    let database = MariaDb::start();
    let zone = branched(["Hidden", "Hidden", "Ready", "Ready", "Ready", "Ready", "Ready"]);
    zone.init();
    zone.fill(&database);
    let (url, before) = (database.url(), rows(&database));
    let consolidate = |number: usize, rows: &str| {
        let call = ["consolidate", &zone.snapshots[number - 1].path, "--database", &url, "--rows", rows];
        zone.run(&[&call[..], &AT_ONCE[..]].concat())
    };
    consolidate(3, "untouched");
    assert_eq!(rows(&database), before);
    let done = consolidate(5, "apply");
    assert_eq!(done["rows"][0]["status"], "applied", "{done}");
    zone.assert_views("bases");
    let done = zone.reclaim(&database, &["--rows", "apply"]);
    assert_eq!((&done["rows"][0]["status"], &done["findings"]), (&json!("applied"), &json!([])), "{done}");
    zone.assert_views("what was below is gone");
    assert!(!zone.file(1).exists() && !zone.file(2).exists());
    let expected =
        ["1\tDestroyed\t0", "2\tDestroyed\t1", "3\tReady\t0", "4\tReady\t3", "5\tReady\t0", "6\tReady\t3"];
    assert_eq!(rows(&database), expected);
    let sizes =
        "SELECT physical_size FROM snapshot_store_ref WHERE snapshot_id IN (3, 5) ORDER BY snapshot_id";
    let lengths = [3, 5].map(|number| fs::metadata(zone.file(number)).unwrap().len().to_string());
    assert_eq!(database.ask(sizes), lengths);
}

/// Whoever is put on a stub, moves it, or removes it, reads and leaves what there was.
fn stubs_are_of_no_harm(zone: &Zone) {
    let listed = zone.run(&["list"]);
    let members: Vec<&Value> = listed["chains"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|chain| chain["members"].as_array().unwrap())
        .collect();
    let state = |number: usize| {
        let path = &zone.snapshots[number - 1].path;
        members.iter().find(|member| member["member"] == path.as_str()).unwrap()["state"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!([1, 3, 4].map(state), ["stub", "stub", "stub"]);
    // A store migration puts each member over its parent by the rows.
    let name = |number: usize| zone.file(number).file_name().unwrap().to_str().unwrap().to_owned();
    must("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &name(4), text(&zone.file(5))]);
    zone.assert_views("re-parented onto the stub");
    must("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &name(2), text(&zone.file(5))]);
    for number in [4, 3] {
        must("qemu-img", &["check", "-q", "-f", "qcow2", text(&zone.file(number))]);
    }
    zone.assert_views("back");
}

/// What CloudStack's migrations of a store make of a chain, by its rows: before PR #12086 a plain copy of each file,
/// after it a copy over its parent's copy.
fn migrated_stores_read_the_same(zone: &Zone, database: &MariaDb, context: &str) {
    let [copied, converted] = ["copied", "converted"].map(|name| zone.directory.path().join(name));
    for directory in [&copied, &converted] {
        fs::create_dir(directory).unwrap();
    }
    let kept = "SELECT snapshot_id, parent_snapshot_id FROM snapshot_store_ref WHERE state <> 'Destroyed' \
                ORDER BY snapshot_id";
    let name = |number: usize| zone.file(number).file_name().unwrap().to_str().unwrap().to_owned();
    for row in database.ask(kept) {
        let (number, parent) = row.split_once('\t').unwrap();
        let (number, parent): (usize, usize) = (number.parse().unwrap(), parent.parse().unwrap());
        let (from, to) = (zone.file(number), converted.join(name(number)));
        fs::copy(&from, copied.join(name(number))).unwrap();
        let mut call = vec!["convert", "-f", "qcow2", "-O", "qcow2"];
        let below = if parent == 0 { String::new() } else { name(parent) };
        if parent != 0 {
            call.extend(["-F", "qcow2", "-B", &below]);
        }
        must("qemu-img", &[&call[..], &[text(&from), text(&to)]].concat());
    }
    for (index, snapshot) in zone.snapshots.iter().enumerate() {
        if snapshot.state == "Ready" {
            for directory in [&copied, &converted] {
                assert_true(&directory.join(name(index + 1)), &zone.truth(index + 1), context);
            }
        }
    }
}

/// The member below the stubs is given up as well; then CloudStack removes by glob what it kept, survivors first.
fn what_stubs_stand_on_goes_too(zone: &Zone, database: &MariaDb) {
    database.run("USE cloud; UPDATE snapshot_store_ref SET state = 'Hidden' WHERE snapshot_id = 2");
    let done = zone.reclaim(database, &["--mode", "copy"]);
    let codes = done["findings"].to_string();
    assert!(done["results"] == json!([]) && codes.contains("no-gain"), "two copies take more: {done}");
    zone.run(&[
        "delete",
        "--assume-deleted",
        "--now",
        "--yes",
        "--grace",
        "0s",
        "--retention",
        "0s",
        &zone.snapshots[1].path,
    ]);
    for number in [5, 6] {
        assert_true(&zone.file(number), &zone.truth(number), "without what the stubs stood on");
    }
    for number in [2, 3, 4] {
        assert!(!zone.file(number).exists(), "{number}: a stub goes with what it stands on");
    }
    for number in [5, 6, 1] {
        let file = zone.file(number);
        let glob = format!(
            "rm -rf {}/*{}*",
            file.parent().unwrap().display(),
            file.file_name().unwrap().to_str().unwrap()
        );
        must("sh", &["-c", &glob]);
    }
    let left = zone.run(&["list"]);
    assert_eq!((&left["chains"], &left["findings"]), (&json!([]), &json!([])));
}

#[test]
fn a_child_that_came_before_the_second_look_gets_its_member_back() {
    let database = MariaDb::start();
    let zone = branched(STATES);
    zone.init();
    zone.fill(&database);
    let before = fs::metadata(zone.file(1)).unwrap().ino();
    zone.run(&[
        "reclaim",
        "--database",
        &database.url(),
        "--now",
        "--yes",
        "--grace",
        "0s",
        "--retention",
        "1h",
        "--mode",
        "copy",
    ]);
    assert_ne!(fs::metadata(zone.file(1)).unwrap().ino(), before, "the stub has the name");
    zone.run(&["recover"]);
    assert_ne!(fs::metadata(zone.file(1)).unwrap().ino(), before, "nobody reads it");
    // As if its maker had died before it: somebody came meanwhile, whose increment is one of the member.
    let trash = zone.root(0).join(".qchain/trash");
    let looked = |path: &PathBuf| text(path).ends_with(".looked-again");
    let notes: Vec<PathBuf> =
        fs::read_dir(trash).unwrap().map(|entry| entry.unwrap().path()).filter(looked).collect();
    assert_eq!(notes.len(), 1);
    fs::remove_file(&notes[0]).unwrap();
    let name = zone.file(1).file_name().unwrap().to_str().unwrap().to_owned();
    let late = zone.file(1).with_file_name("late");
    must("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &name, text(&late)]);
    zone.run(&["recover"]);
    assert_eq!(fs::metadata(zone.file(1)).unwrap().ino(), before);
    assert_true(&late, &zone.truth(1), "through the member");
    zone.assert_views("the member is back");
}

#[test]
fn rows_that_changed_stop_their_merge() {
    let database = MariaDb::start();
    let zone = branched(STATES);
    zone.init();
    zone.fill(&database);
    let export = zone.directory.path().join("rows.tsv");
    // A restore, a migration, a child that only rows know, a store that nobody has.
    for (change, expected) in [
        ("UPDATE snapshot_store_ref SET state = 'Migrating' WHERE snapshot_id = 5", "rows-disagree"),
        (
            "INSERT INTO snapshots VALUES (8, 'n', 'n', 2, 7, 'KVM', 'BackedUp', NULL);
             INSERT INTO snapshot_store_ref (store_id, snapshot_id, store_role, parent_snapshot_id, install_path, state)
             VALUES (1, 8, 'Image', 4, 'snapshots/2/7/new', 'Allocated')",
            "rows-disagree",
        ),
        ("UPDATE image_store SET url = 'nfs://elsewhere/x' WHERE id = 1", "unknown-store"),
    ] {
        zone.fill(&database);
        database.run(&format!("USE cloud; {change}"));
        database.export(&export);
        for source in [["--database", &database.url()], ["--records", text(&export)]] {
            let mut arguments = vec!["reclaim", "--dry-run", "--now"];
            arguments.extend(source);
            let document = zone.run(&arguments);
            let codes: Vec<&str> =
                document["findings"].as_array().unwrap().iter().map(|one| one["code"].as_str().unwrap()).collect();
            assert!(codes.contains(&expected), "{change}: {document}");
            let entries = document["plan"].as_array().unwrap();
            let planned: Vec<&Value> =
                entries.iter().flat_map(|entry| entry["members"].as_array().unwrap()).collect();
            assert!(!planned.contains(&&json!(zone.snapshots[3].path)), "{change}: {planned:?}");
            assert!(planned.is_empty() || change.contains("Allocated"), "{change}: {planned:?}");
        }
    }
    // A Destroyed one is CloudStack's own, another account's not asked for, too much is left for later.
    zone.fill(&database);
    let nothing = zone.run(&["reclaim", "--database", &database.url(), "--account", "3", "--dry-run"]);
    assert_eq!(nothing["plan"], json!([]));
    let little =
        zone.run(&["reclaim", "--database", &database.url(), "--limit-bytes", "1KiB", "--dry-run", "--now"]);
    assert_eq!((&little["plan"], &little["findings"][0]["code"]), (&json!([]), &json!("left-for-later")));
    let late = zone.reclaim(&database, &["--max-duration", "0s"]);
    assert_eq!((&late["results"], &late["findings"][0]["code"]), (&json!([]), &json!("left-for-later")));
    zone.assert_views("bounded");
    for wrong in ["mysql://root@localhost/cloud?socket=/nowhere", "postgres://x", "mysql://:::@"] {
        let (exit, document) = zone.call(&["reclaim", "--database", wrong]);
        assert!(matches!(exit, 2 | 8), "{wrong}: {document}");
        assert!(!document.to_string().contains("secret"));
    }
    assert_eq!(zone.call(&["reclaim", "--records", text(&export), "--rows", "apply"]).0, 2);
}

/// Calls after which a process is killed, each in turn.
const CALLS: [&str; 7] = ["linkat", "renameat2", "unlinkat", "fsync", "fdatasync", "pwrite64", "sendto"];

#[test]
fn killed_anywhere_and_run_again_it_ends_the_same() {
    let database = MariaDb::start();
    let origin = branched(STATES);
    origin.init();
    let every = if std::env::var_os("QCHAIN_FULL").is_some() { 1 } else { 4 };
    let mut points = 0;
    for mode in ["untouched", "apply"] {
        let kept = origin.directory.path().join("kept");
        copy(&origin.root(0), &kept);
        let mut reference = None;
        let mut turn = 0;
        for call in std::iter::once("none").chain(CALLS) {
            for number in 1.. {
                turn += 1;
                if call != "none" && turn % every != 0 && number > 1 {
                    if number > 60 {
                        break;
                    }
                    continue;
                }
                fs::remove_dir_all(origin.root(0)).unwrap();
                copy(&kept, &origin.root(0));
                origin.fill(&database);
                let url = database.url();
                let mut arguments = vec!["reclaim", "--database", &url, "--rows", mode, "--jobs", "1"];
                arguments.extend(AT_ONCE);
                let survived = if call == "none" {
                    origin.run(&arguments);
                    true
                } else {
                    let mut strace = Command::new("strace");
                    let inject = format!("inject={call}:signal=SIGKILL:when={number}");
                    strace.args(["-f", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e", &inject]);
                    strace.arg(env!("CARGO_BIN_EXE_qchain"));
                    origin.adorn(&mut strace, &arguments);
                    strace.output().unwrap().status.success()
                };
                let context = format!("{mode}: killed at {call} {number}");
                origin.assert_views(&context);
                if !survived {
                    points += 1;
                    origin.reclaim(&database, &["--rows", mode]);
                    let recovered = origin.run(&["recover", "--database", &url]);
                    assert_eq!(recovered["findings"], json!([]), "{context}");
                    origin.assert_views(&format!("{context}, done"));
                }
                let end = (rows(&database), names(&origin.root(0)));
                assert_eq!(*reference.get_or_insert(end.clone()), end, "{context}");
                if survived {
                    break;
                }
            }
        }
        fs::remove_dir_all(&kept).unwrap();
    }
    eprintln!("{points} points");
    assert!(points >= 16, "{points}");
}

/// All names of a store that last: qchain's own records of finished changes have random names.
fn names(root: &Path) -> Vec<String> {
    let listed = must("find", &[text(root), "-type", "f", "-not", "-path", "*/.qchain/generations/*"]);
    let lasting = |line: &&str| {
        ![".qchain/locks/", ".qchain/manifests/", ".qchain/generations/", ".qchain/log/"]
            .iter()
            .any(|part| line.contains(part))
    };
    let mut names: Vec<String> = listed.lines().filter(lasting).map(str::to_owned).collect();
    names.sort();
    names
}

#[test]
fn hosts_read_every_chain_before_during_and_after_over_two_stores() {
    let database = MariaDb::start();
    let mut zone = Zone::new(STATES, true);
    let mounts = [0, 1].map(|store| Bound::new(&zone.root(store), &prefix(URLS[store])));
    let fifth = prefix(URLS[0]).join(&zone.snapshots[4].path);
    // The fifth is Hidden, too, and its only child lies on the other store.
    zone.snapshots[4].state = "Hidden";
    zone.increment(1, 5, "other", text(&fifth), "Ready");
    zone.init();
    zone.fill(&database);
    zone.assert_views("before");
    let ended = std::sync::atomic::AtomicBool::new(false);
    let looks = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut looks = 0;
            while !ended.load(std::sync::atomic::Ordering::Relaxed) || looks == 0 {
                for number in [2, 6] {
                    let (file, truth) = (zone.file(number), zone.truth(number));
                    let arguments = ["compare", "-f", "qcow2", "-F", "raw", text(&file), text(&truth)];
                    let output = super::support::qemu::run("qemu-img", &arguments);
                    let error = String::from_utf8_lossy(&output.stderr);
                    // Between opening a survivor and what was below it the name may go: an error, never other bytes.
                    assert!(
                        output.status.success() || error.contains("No such file"),
                        "{}{error}",
                        String::from_utf8_lossy(&output.stdout)
                    );
                    looks += 1;
                }
            }
            looks
        });
        let done = zone.reclaim(&database, &["--rows", "print"]);
        assert!(done["results"].as_array().unwrap().iter().all(|one| one["status"] == "done"), "{done}");
        ended.store(true, std::sync::atomic::Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(looks > 0);
    zone.assert_views("after");
    for number in [1, 3, 4, 5] {
        assert!(!zone.file(number).exists(), "{number}");
    }
    let info = must("qemu-img", &["info", "--output=json", text(&zone.file(6))]);
    let info: Value = serde_json::from_str(&info).unwrap();
    let parent = prefix(URLS[0]).join(&zone.snapshots[1].path);
    assert_eq!(info["backing-filename"].as_str().unwrap(), text(&parent), "a name that hosts follow");
    drop(mounts);
    for url in URLS {
        fs::remove_dir(prefix(url)).unwrap();
    }
}
