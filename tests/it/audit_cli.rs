//! `qchain audit`: each finding on a store that was made to have it, none on a clean one, and
//! that nothing is written.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::support::qemu::{must, text};
use super::support::world::{COLUMNS, MOUNT, World, listing};

const TEN_MIB: u64 = 10 << 20;
/// A file name of CloudStack's.
const UUID: &str = "908a9b1c-7c2f-4f0e-9a57-3d7d0a6c11ab";

/// What is wrong with some rows.
type Change = fn(&mut Vec<Row>);

/// One row, `Ready`, of account 2 and volume 7.
struct Row {
    store: &'static str,
    url: String,
    role: &'static str,
    id: u64,
    state: &'static str,
    path: String,
    parent: u64,
    size: u64,
    physical: u64,
    checkpoint: String,
    created: &'static str,
}

impl Row {
    fn new(id: u64, name: &str, parent: u64) -> Self {
        Self {
            store: "store",
            url: "nfs://nas/export".to_owned(),
            role: "Image",
            id,
            state: "Ready",
            path: format!("snapshots/2/7/{name}"),
            parent,
            size: TEN_MIB,
            physical: 0,
            checkpoint: "NULL".to_owned(),
            created: "2026-01-01 00:00:00",
        }
    }

    fn state(self, state: &'static str) -> Self {
        Self { state, ..self }
    }

    fn line(&self) -> String {
        let Self { store, url, role, id, state, path, parent, size, physical, checkpoint, created } = self;
        format!(
            "{store}\t{url}\t{role}\t{id}\tx\tn\t2\t7\tKVM\tx\t{state}\t{path}\t{parent}\t0\t{size}\t{physical}\t\
             {checkpoint}\t{created}\n"
        )
    }
}

impl World {
    /// An export of rows.
    fn export(&self, rows: &[Row]) -> String {
        let path = self.directory.path().join("rows.tsv");
        let lines: String = rows.iter().map(Row::line).collect();
        fs::write(&path, format!("{COLUMNS}\n{lines}")).unwrap();
        text(&path).to_owned()
    }

    /// As if all files had been left alone for a day.
    fn age(&self) {
        let yesterday = SystemTime::now() - Duration::from_hours(24);
        for path in listing(&self.root()).into_keys().filter(|path| path.is_file()) {
            fs::File::options().write(true).open(path).unwrap().set_modified(yesterday).unwrap();
        }
    }

    /// Checkpoint files as libvirt writes them, `(member, parent)`.
    fn checkpoint_files(&self, of: &[(&str, &str)]) {
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

    /// The findings as `(code, member)`, sorted, and the document; the audit must succeed and write nothing.
    fn audit(&self, arguments: &[&str]) -> (Vec<(String, String)>, Value) {
        let before = listing(&self.root());
        let call: Vec<&str> = ["audit"].iter().chain(arguments).copied().collect();
        let (exit, document) = self.run(&call);
        assert_eq!(exit, 0, "{document}");
        assert_eq!(listing(&self.root()), before, "an audit wrote to the store");
        (codes(&document), document)
    }
}

fn codes(document: &Value) -> Vec<(String, String)> {
    let findings = document["findings"].as_array().unwrap_or_else(|| panic!("{document}"));
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap().to_owned();
    let mut codes: Vec<_> =
        findings.iter().map(|finding| (text(finding, "code"), text(finding, "member"))).collect();
    codes.sort();
    codes
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    let member = |name: &str| match name {
        whole if whole.contains('/') || whole == "s1" || whole == "elsewhere" => whole.to_owned(),
        name => format!("snapshots/2/7/{name}"),
    };
    let mut pairs: Vec<_> = expected.iter().map(|(code, name)| ((*code).to_owned(), member(name))).collect();
    pairs.sort();
    pairs
}

fn finding<'a>(document: &'a Value, code: &str) -> &'a Value {
    let found = document["findings"].as_array().unwrap().iter().find(|finding| finding["code"] == code);
    found.unwrap_or_else(|| panic!("no {code}: {document}"))
}

fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_clean_store_has_no_findings() {
    let world = World::new();
    let truth = world.directory.path().join("truth");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/make-chain");
    let made = must(
        text(&script),
        &[
            "--store",
            text(&world.root()),
            "--truth",
            text(&truth),
            "--members",
            "4",
            "--size",
            "64M",
            "--base-bytes",
            "4M",
            "--delta-bytes",
            "1M",
            "--backing",
            "absolute",
            "--url",
            "nfs://nas/export",
        ],
    );
    let made: Value = serde_json::from_str(&made).unwrap();
    let members = made["members"].as_array().unwrap_or_else(|| made.as_array().unwrap());
    let mut rows = Vec::new();
    for (index, member) in members.iter().enumerate() {
        let path = member["member"].as_str().unwrap();
        rows.push(Row {
            path: path.to_owned(),
            size: 64 << 20,
            physical: fs::metadata(world.root().join(path)).unwrap().len(),
            checkpoint: format!("/mnt/x/{}", member["checkpoint"].as_str().unwrap()),
            ..Row::new(index as u64 + 1, "", index as u64)
        });
    }
    world.age();
    let store = format!("{},url=nfs://nas/export", text(&world.root()));
    let export = world.export(&rows);
    let before = listing(&world.root());
    let (exit, document) = world.run_on(&store, &["audit", "--strict", "--records", &export]);
    assert_eq!((exit, &document["findings"]), (0, &json!([])), "{document}");
    assert_eq!(world.run_on(&store, &["audit", "--strict"]).0, 0);
    assert_eq!(listing(&world.root()), before);
    // The sums are those of the files.
    let paths: Vec<PathBuf> = rows.iter().map(|row| world.root().join(&row.path)).collect();
    let file_bytes: u64 = paths.iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    let allocated_bytes: u64 = paths.iter().map(|path| allocated(path)).sum();
    let sum = json!({"members": 4, "file_bytes": file_bytes, "allocated_bytes": allocated_bytes, "hidden_bytes": 0});
    let with = |more: Value| {
        let mut sum = sum.clone();
        sum.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        sum
    };
    let totals = json!({
        "accounts": [with(json!({"account": 2}))],
        "volumes": [with(json!({"account": 2, "volume": 7}))],
        "chains": [with(json!({"member": rows[0].path, "length": 4}))],
    });
    assert_eq!(document["totals"], totals);
}

#[test]
fn files_without_rows_and_rows_without_files() {
    let world = World::new();
    for (name, below) in [("a", ""), ("b", "a"), ("c", "b"), ("stray", ""), ("destroyed", "")] {
        world.make(name, below, &["write -P 1 0 1M"]);
    }
    let temporary = format!("{UUID}_temp");
    world.make(&temporary, "", &["write -P 1 0 2M"]);
    let rows = [
        Row::new(1, "a", 0),
        Row::new(2, "b", 1).state("Hidden"),
        Row::new(3, "c", 2),
        Row::new(4, "gone", 3),
        Row::new(5, "destroyed", 0).state("Destroyed"),
        Row::new(6, "long-gone", 0).state("Destroyed"),
        Row { store: "elsewhere", url: "nfs://other/x".to_owned(), ..Row::new(7, "there", 0) },
    ];
    let export = world.export(&rows);
    // What is young may be about to get its row, or be in use.
    let young = world.audit(&["--records", &export]).0;
    assert!(young.iter().all(|(code, _)| code != "orphan-file" && code != "leaked-temporary"), "{young:?}");
    world.age();
    let (found, document) = world.audit(&["--records", &export]);
    let expected = [
        ("orphan-file", "stray"),
        ("leaked-temporary", temporary.as_str()),
        ("hidden-bytes", "b"),
        ("row-without-file", "gone"),
        ("destroyed-file", "destroyed"),
        ("unknown-store", "elsewhere"),
    ];
    assert_eq!(found, pairs(&expected), "{document}");
    for (code, name) in [("orphan-file", "stray"), ("leaked-temporary", &temporary), ("hidden-bytes", "b")] {
        assert_eq!(finding(&document, code)["bytes"], allocated(&world.member(name)), "{code}");
    }
    assert_eq!(finding(&document, "hidden-bytes")["severity"], "info");
    assert_eq!(finding(&document, "orphan-file")["severity"], "warning");
    assert_eq!(document["totals"]["accounts"][0]["hidden_bytes"], allocated(&world.member("b")));
    assert_eq!(world.run(&["audit", "--strict", "--records", &export]).0, 1);
    // Without rows nobody knows what is an orphan.
    let (found, document) = world.audit(&[]);
    assert_eq!(found, pairs(&[("leaked-temporary", &temporary)]));
    assert_eq!(document["totals"]["accounts"][0]["hidden_bytes"], Value::Null);
    // What is only worth knowing is nothing for --strict.
    fs::remove_file(world.member(&temporary)).unwrap();
    fs::remove_file(world.member("stray")).unwrap();
    fs::remove_file(world.member("destroyed")).unwrap();
    let export = world.export(&rows[..3]);
    let (exit, document) = world.run(&["audit", "--strict", "--records", &export]);
    assert_eq!((exit, codes(&document)), (0, pairs(&[("hidden-bytes", "b")])));
}

#[test]
fn rows_that_disagree_with_headers() {
    let world = World::new();
    for (name, below) in [("a", ""), ("b", "a"), ("c", "b"), ("tip", "")] {
        world.make(name, below, &["write -P 1 0 1M"]);
    }
    world.age();
    let length = |name: &str| fs::metadata(world.member(name)).unwrap().len();
    let agreeing = |id, name: &str, parent| Row { physical: length(name), ..Row::new(id, name, parent) };
    let clean = || vec![agreeing(1, "a", 0), agreeing(2, "b", 1), agreeing(3, "c", 2), agreeing(4, "tip", 0)];
    assert_eq!(world.audit(&["--records", &world.export(&clean())]).0, []);
    let cases: [(Change, &[(&str, &str)]); 7] = [
        (|rows| rows[1].parent = 0, &[("parent-disagrees", "b")]),
        (|rows| rows[2].parent = 1, &[("parent-disagrees", "c")]),
        (|rows| rows[3].parent = 3, &[("parent-disagrees", "tip")]),
        (|rows| rows[1].physical += 1, &[("file-size-disagrees", "b")]),
        (|rows| rows[2].size = TEN_MIB / 2, &[("disk-size-disagrees", "c")]),
        (|rows| rows[3].state = "Hidden", &[("hidden-tip", "tip")]),
        (|rows| rows[0].checkpoint = "/mnt/x/checkpoints/2/7/a".to_owned(), &[("checkpoint-missing", "a")]),
    ];
    for (change, expected) in cases {
        let mut rows = clean();
        change(&mut rows);
        let (found, document) = world.audit(&["--records", &world.export(&rows)]);
        assert_eq!(found, pairs(expected), "{document}");
    }
    // A snapshot that was merged away, whose row says so still, is no disagreement.
    assert_eq!(world.run(&["init"]).0, 0);
    let mut rows = clean();
    rows[1].state = "Hidden";
    let export = world.export(&rows);
    let call = ["delete", "b", "--records", &export, "--now", "--yes", "--grace", "0s", "--retention", "0s"];
    let (exit, done) = world.run(&call);
    assert_eq!(exit, 0, "{done}");
    rows[2].physical = length("c");
    let found = world.audit(&["--records", &world.export(&rows)]).0;
    assert_eq!(found, pairs(&[("row-without-file", "b")]));
}

#[test]
fn a_stub_for_a_deleted_member_is_no_finding() {
    let world = World::new();
    for (name, below) in [("a", ""), ("b", "a"), ("c", "b")] {
        world.make(name, below, &["write -P 1 0 1M"]);
    }
    assert_eq!(world.run(&["init"]).0, 0);
    let rows = [Row::new(1, "a", 0), Row::new(2, "b", 1).state("Hidden"), Row::new(3, "c", 2)];
    let rows =
        rows.map(|row| Row { physical: fs::metadata(world.root().join(&row.path)).unwrap().len(), ..row });
    let export = world.export(&rows);
    assert_eq!(world.audit(&["--records", &export]).0, pairs(&[("hidden-bytes", "b")]));
    let call = ["reclaim", "--records", &export, "--now", "--yes", "--grace", "0s", "--retention", "0s"];
    let (exit, done) = world.run(&call);
    assert_eq!(exit, 0, "{done}");
    world.age();
    // The survivor is a new file.
    let [a, b, c] = rows;
    let c = Row { physical: fs::metadata(world.member("c")).unwrap().len(), ..c };
    let (found, document) = world.audit(&["--records", &world.export(&[a, b, c])]);
    assert_eq!(found, [], "{document}");
    assert_eq!(document["totals"]["chains"][0]["hidden_bytes"], 0);
}

#[test]
fn checkpoint_files_that_libvirt_would_refuse() {
    let world = World::new();
    for (name, below) in [("a", ""), ("b", "a"), ("c", "b")] {
        world.make(name, below, &[]);
    }
    world.checkpoint_files(&[("a", ""), ("b", "a"), ("c", "b")]);
    world.age();
    assert_eq!(world.audit(&[]).0, []);
    let directory = world.root().join("checkpoints/2/7");
    fs::remove_file(directory.join("a")).unwrap();
    fs::write(directory.join("c"), "<domaincheckpoint>").unwrap();
    world.checkpoint_files(&[("nobody", "")]);
    world.age();
    let expected = [
        ("checkpoint-refused", "b"),
        ("checkpoint-unreadable", "c"),
        ("orphan-checkpoint", "checkpoints/2/7/nobody"),
    ];
    assert_eq!(world.audit(&[]).0, pairs(&expected));
    assert_eq!(world.run(&["audit", "--strict"]).0, 1);
}

#[test]
fn what_the_scan_finds_is_told_and_other_hypervisors_are_counted() {
    let world = World::new();
    world.make("lost", "nobody", &[]);
    world.make("x", "y", &[]);
    world.make("y", "x", &[]);
    world.make("a", "", &[]);
    world.make("guessed", "/mnt/unknown/snapshots/2/7/a", &[]);
    fs::write(world.member("text"), "hello").unwrap();
    for foreign in ["x.vhd", "y.VHD"] {
        fs::write(world.member(foreign), "no image of ours").unwrap();
    }
    fs::create_dir(world.member("vm-snapshot")).unwrap();
    fs::write(world.member("vm-snapshot/disk.vmdk"), "nor this").unwrap();
    fs::write(world.member("vm-snapshot/notes"), "nor this").unwrap();
    world.age();
    let (found, document) = world.audit(&[]);
    let expected = [
        ("missing-parent", "lost"),
        ("cycle", "x"),
        ("cycle", "y"),
        ("unknown-prefix", "guessed"),
        ("not-qcow2", "text"),
        ("foreign-files", "s1"),
        ("foreign-files", "s1"),
    ];
    assert_eq!(found, pairs(&expected), "{document}");
    let message = |finding: &Value| finding["message"].as_str().unwrap().to_owned();
    let foreign = document["findings"].as_array().unwrap();
    let foreign: Vec<String> =
        foreign.iter().filter(|one| one["code"] == "foreign-files").map(message).collect();
    assert!(foreign[0].starts_with("2 files are VMware's"), "{foreign:?}");
    assert!(foreign[1].starts_with("2 files are XenServer's"), "{foreign:?}");
}

#[test]
fn chains_against_the_policy() {
    let world = World::new();
    for (name, below) in [("a", ""), ("b", "a"), ("c", "b"), ("d", "b")] {
        world.make(name, below, &["write -P 1 0 1M"]);
    }
    world.age();
    let rows = [
        Row { created: "2025-06-01 00:00:00", ..Row::new(1, "a", 0) },
        Row::new(2, "b", 1).state("Hidden"),
        Row::new(3, "c", 2),
        Row::new(4, "d", 2),
    ];
    let export = world.export(&rows);
    let config = world.directory.path().join("qchain.toml");
    let audit = |policy: &str, records: bool| {
        fs::write(&config, format!("[policy]\n{policy}\n")).unwrap();
        let records: &[&str] = if records { &["--records", &export] } else { &[] };
        let call: Vec<&str> = ["--config", text(&config)].iter().chain(records).copied().collect();
        world.audit(&call)
    };
    let held = [("hidden-bytes", "b")];
    assert_eq!(audit("", true).0, pairs(&held));
    assert_eq!(audit("max_length = 3", false).0, []);
    assert_eq!(audit("max_length = 2", false).0, pairs(&[("chain-too-long", "c")]));
    // Without its row the base is as old as its file.
    assert_eq!(audit("max_base_age = \"7d\"", false).0, []);
    assert_eq!(audit("max_base_age = \"12h\"", false).0, pairs(&[("base-too-old", "a")]));
    assert_eq!(audit("max_base_age = \"7d\"", true).0, pairs(&[held[0], ("base-too-old", "a")]));
    assert_eq!(audit("max_pinned_bytes = \"64MiB\"", true).0, pairs(&held));
    let (found, document) = audit("max_pinned_bytes = \"64KiB\"", true);
    assert_eq!(found, pairs(&[held[0], ("pinned-bytes", "a")]));
    assert_eq!(finding(&document, "pinned-bytes")["bytes"], allocated(&world.member("b")));
    fs::write(&config, "[policy]\nmax_lenght = 3\n").unwrap();
    assert_eq!(world.fails(&["audit", "--config", text(&config)]), (2, "usage".to_owned()));
    // `config check` says what the policy is, and reads what it prints.
    fs::write(&config, "[policy]\nmax_length = 24\nmax_base_age = \"90d\"\nmax_pinned_bytes = \"2GiB\"\n")
        .unwrap();
    let said = must(env!("CARGO_BIN_EXE_qchain"), &["--config", text(&config), "config", "check"]);
    for part in ["more than 24 members", "older than 2months 29days", "more than 2.0 GiB"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    fs::write(&config, said).unwrap();
    let document = world.run(&["--config", text(&config), "config", "check"]).1;
    assert_eq!(document["config"]["policy"]["max_pinned_bytes"], format!("{}B", 2_u64 << 30), "{document}");
}

#[test]
fn rows_of_primary_storage() {
    let world = World::new();
    let pool = world.pool();
    let row = |id, name: &str, parent| Row {
        role: "Primary",
        path: format!("{MOUNT}/snapshots/{name}"),
        ..Row::new(id, name, parent)
    };
    let export = world.export(&[row(1, "a", 0), row(2, "b", 1), row(3, "gone", 0)]);
    let before = listing(&pool);
    let call = ["audit", "--min-age", "0", "--records", &export];
    let store = format!("{},layout=primary,alias={MOUNT}", text(&pool));
    let (exit, document) = world.run_on(&store, &call);
    let expected = [("orphan-file", "snapshots/alone"), ("row-without-file", "snapshots/gone")];
    assert_eq!((exit, codes(&document)), (0, pairs(&expected)), "{document}");
    assert_eq!(document["totals"]["volumes"][0]["members"], 2, "by the rows' accounts and volumes");
    // Without the alias the one pool that has the file is taken.
    let guessed = format!("{},layout=primary", text(&pool));
    let (_, document) = world.run_on(&guessed, &call);
    let expected = [expected[0], expected[1], ("unknown-prefix", "snapshots/b")];
    assert_eq!(codes(&document), pairs(&expected), "{document}");
    assert_eq!(listing(&pool), before);
    // They are nothing to secondary storage.
    assert_eq!(world.audit(&["--records", &export]).0, []);
}
