//! The changing verbs of the real program do on an export without a mount what they do on the directory.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::support::chains::{assert_true, write_truth};
use super::support::crash::{checkpoint, left_inside, outside};
use super::support::nfs::Ganesha;
use super::support::qemu::text;
use super::support::world::{COLUMNS, World};
use super::support::zones::{path, same_as, truth};

/// a <- b <- {c, d} with checkpoint files, not opted in.
fn world() -> World {
    let world = World::forked();
    let directory = world.root().join("checkpoints/2/7");
    fs::create_dir_all(&directory).unwrap();
    for (name, parent) in [("a", None), ("b", Some("a")), ("c", Some("b")), ("d", Some("b"))] {
        fs::write(directory.join(name), checkpoint(name, parent)).unwrap();
    }
    for name in ["a", "b", "c", "d"] {
        write_truth(&world.member(name), &truth(&world, name));
    }
    world
}

/// The same store twice: one is called by its directory, the other as an export.
struct Twice {
    local: World,
    remote: World,
    server: Arc<Ganesha>,
}

impl Twice {
    fn new() -> Self {
        let (local, remote) = (world(), world());
        let server = Ganesha::start(&remote.root());
        Self { local, remote, server }
    }

    fn url(&self) -> String {
        format!("{},id=s1", self.server.url(""))
    }

    /// Both must end so; what the export said.
    fn does(&self, arguments: &[&str], exit: i32) -> [Value; 2] {
        let documents = [self.local.run(arguments), self.remote.run_on(&self.url(), arguments)];
        documents.map(|(found, document)| {
            assert_eq!(found, exit, "{arguments:?}: {document}");
            document
        })
    }

    /// All that is not qchain's own is the same, byte by byte.
    fn same(&self, context: &str) {
        assert!(outside(&self.local.root()) == outside(&self.remote.root()), "{context}");
    }

    fn last_operation(&self) -> [String; 2] {
        self.does(&["history"], 0).map(|history| {
            let last = history["operations"].as_array().unwrap().last().unwrap().clone();
            last["operation"].as_str().unwrap().to_owned()
        })
    }
}

const MERGE: &[&str] = &["--assume-deleted", "--now", "--yes", "--mode", "copy", "--grace", "0s"];

#[test]
fn a_store_lives_its_life_as_an_export() {
    let twice = Twice::new();
    let made = twice.does(&["init"], 0);
    assert_eq!(made[1]["capabilities"]["network"], true, "{}", made[1]);
    assert_eq!(made[1]["capabilities"]["hard_links"], true, "{}", made[1]);
    assert_eq!(made[1]["capabilities"]["byte_range_locks"], false, "{}", made[1]);
    twice.does(&["adopt", "--now"], 0);
    twice.does(&["verify", "--level", "data"], 0);
    let delete = [&["delete", "b"][..], MERGE].concat();
    let planned = twice.does(&[&delete[..], &["--dry-run"]].concat(), 0);
    assert_eq!(planned[1]["plan"][0]["mode"], "copy", "{}", planned[1]);
    twice.does(&[&delete[..], &["--rehearse"]].concat(), 0);
    twice.same("rehearsed");
    let done = twice.does(&delete, 0);
    for key in ["status", "mode", "bytes_written", "view_digest", "members", "into"] {
        assert_eq!(done[0]["results"][0][key], done[1]["results"][0][key], "{key}");
    }
    twice.same("deleted");
    let [local, remote] = twice.last_operation();
    assert_eq!(twice.local.run(&["undo", &local, "--yes"]).0, 0);
    let (exit, undone) = twice.remote.run_on(&twice.url(), &["undo", &remote, "--yes"]);
    assert_eq!(exit, 0, "{undone}");
    twice.same("undone");
    twice.does(&["verify", "--level", "data"], 0);
    twice.does(&delete, 0);
    twice.does(&["purge", "--all", "--yes"], 0);
    twice.does(&["recover"], 0);
    twice.same("purged");
    twice.does(
        &["consolidate", "c", "--now", "--yes", "--mode", "copy", "--retention", "0s", "--grace", "0s"],
        0,
    );
    twice.same("consolidated");
    twice.does(&["purge", "--all", "--yes"], 0);
    twice.does(&["verify", "--level", "data"], 0);
    for name in ["a", "c", "d"] {
        assert_true(&twice.remote.member(name), &truth(&twice.remote, name), name);
    }
    assert_eq!(left_inside(&twice.remote.root()), Vec::<String>::new());
    twice.does(&["audit", "--min-age", "0s", "--strict"], 0);
    twice.does(&["deinit", "--yes"], 0);
    twice.same("opted out");
    assert!(!twice.remote.root().join(".qchain").exists());
}

#[test]
fn images_are_flattened_from_an_export_and_into_it() {
    let twice = Twice::new();
    twice.does(&["init"], 0);
    twice.does(&["adopt", "--now"], 0);
    for format in ["raw", "qcow2"] {
        let flat = |world: &World| world.directory.path().join(format!("flat.{format}"));
        for (world, store) in
            [(&twice.local, text(&twice.local.root()).to_owned()), (&twice.remote, twice.url())]
        {
            let dest = flat(world);
            let arguments = ["flatten", "c", text(&dest), "-O", format, "--layout", "canonical"];
            let (exit, report) = world.run_on(&store, &arguments);
            assert_eq!(exit, 0, "{report}");
        }
        assert!(fs::read(flat(&twice.local)).unwrap() == fs::read(flat(&twice.remote)).unwrap(), "{format}");
    }
    twice.does(&["flatten", "c", "--template", "2/201/t", "--layout", "canonical"], 0);
    twice.does(&["flatten", "d", "--volume", "2/9/v", "--layout", "canonical"], 0);
    let flattened = |world: &World| {
        let mut files = outside(&world.root());
        files.retain(|name, _| !name.ends_with(".properties"));
        files
    };
    assert!(flattened(&twice.local) == flattened(&twice.remote));
    for (directory, properties) in
        [("template/tmpl/2/201", "template.properties"), ("volumes/2/9", "volume.properties")]
    {
        says_its_sizes(&twice.remote.root().join(directory), properties);
    }
}

/// A place has two files, one of which says how large the other one is.
fn says_its_sizes(directory: &Path, properties: &str) {
    assert_eq!(fs::read_dir(directory).unwrap().count(), 2, "{}", directory.display());
    let text = fs::read_to_string(directory.join(properties)).unwrap();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key}=")));
        line.unwrap_or_else(|| panic!("no {key}: {text}")).to_owned()
    };
    let length = fs::metadata(directory.join(value("filename"))).unwrap().len().to_string();
    for key in ["size", "physicalSize", "qcow2.size"] {
        assert_eq!(value(key), length, "{key}");
    }
    for key in ["virtualsize", "qcow2.virtualsize"] {
        assert_eq!(value(key), (10 << 20).to_string(), "{key}");
    }
}

/// From a store of its own, whatever becomes of the process.
#[test]
fn templates_appear_whole_on_an_export() {
    let (local, remote) = (world(), super::support::zones::taking());
    let server = Ganesha::start(&remote.root());
    let far = format!("{},id=far", server.url(""));
    let near = format!("{},id=near", text(&local.root()));
    assert_eq!(local.run_on(&near, &["init"]).0, 0);
    let flatten = |kind: &str, place: &str, more: &[&str]| {
        let arguments =
            [&["--store", &far, "flatten", "near:snapshots/2/7/c", kind, place][..], more].concat();
        local.run_on(&near, &arguments)
    };
    for (kind, place, directory, properties) in [
        ("--template", "far:2/201/t", "template/tmpl/2/201", "template.properties"),
        ("--volume", "far:2/9/v", "volumes/2/9", "volume.properties"),
    ] {
        for compress in ["none", "zstd"] {
            let (exit, report) = flatten(kind, place, &["--compress", compress]);
            assert_eq!(exit, 0, "{report}");
            let directory = remote.root().join(directory);
            says_its_sizes(&directory, properties);
            let image = directory.join(if kind == "--template" { "t.qcow2" } else { "v.qcow2" });
            assert_true(&image, &truth(&local, "c"), kind);
            let (exit, refused) = flatten(kind, place, &[]);
            assert_eq!((exit, refused["error"]["code"].as_str()), (3, Some("target-exists")), "{refused}");
            // As CloudStack does it; behind the server's back it would keep what it knows.
            clear_below(&server, &directory, &remote.root());
        }
    }
    let directory = remote.root().join("template/tmpl/2/201");
    let (mut whole, mut none) = (0, 0);
    for step in 0..200_u64 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_qchain"))
            .args(["--store", &near, "--store", &far, "flatten", "near:snapshots/2/7/c"])
            .args(["--template", "far:2/201/t"])
            .env("XDG_CACHE_HOME", local.directory.path().join("caches"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(step * 7));
        let _ = child.kill();
        child.wait().unwrap();
        if directory.exists() {
            whole += 1;
            says_its_sizes(&directory, "template.properties");
            assert_true(&directory.join("t.qcow2"), &truth(&local, "c"), "killed");
            clear_below(&server, &directory, &remote.root());
        } else {
            none += 1;
        }
        if whole > 2 {
            break;
        }
    }
    assert!(whole > 2 && none > 2, "{whole} {none}");
}

/// Removes a directory of the export by its server.
fn clear_below(server: &Ganesha, directory: &Path, root: &Path) {
    let below = directory.strip_prefix(root).unwrap();
    super::support::nfs::clear(&server.url_of(text(below), ""));
    fs::remove_dir(directory).unwrap();
}

#[test]
fn members_are_copied_from_and_to_an_export() {
    let twice = Twice::new();
    twice.does(&["init"], 0);
    twice.does(&["adopt", "--now"], 0);
    for to_export in [true, false] {
        let taken = super::support::zones::taking();
        let server = Ganesha::start(&taken.root());
        let (from, to) = if to_export {
            (text(&twice.local.root()).to_owned(), format!("{},id=taken", server.url("")))
        } else {
            (twice.server.url(""), text(&taken.root()).to_owned())
        };
        let (exit, report) = taken.run_on(&to, &["copy", "--from", &from, &path("c"), &path("d")]);
        assert_eq!(exit, 0, "{report}");
        same_as(&taken, &twice.local, &["a", "b", "c", "d"]);
    }
}

#[test]
fn what_cloudstack_hides_is_reclaimed_on_an_export() {
    let twice = Twice::new();
    twice.does(&["init"], 0);
    let rows = |directory: &Path| {
        let state = |name: &str| if name == "b" { "Hidden" } else { "Ready" };
        let row = |(index, name): (usize, &&str)| {
            format!(
                "u\tnfs://host/export\tImage\t{}\tx\tn\t2\t7\tKVM\tDestroyed\t{}\tsnapshots/2/7/{name}\t0\t0\t\
                 10485760\t0\tNULL\t2026-01-01 00:00:00\n",
                index + 1,
                state(name)
            )
        };
        let rows: String = ["a", "b", "c", "d"].iter().enumerate().map(row).collect();
        let path = directory.join("records.tsv");
        fs::write(&path, format!("{COLUMNS}\n{rows}")).unwrap();
        path
    };
    let file = rows(twice.local.directory.path());
    let arguments = [
        "reclaim",
        "--records",
        text(&file),
        "--now",
        "--yes",
        "--mode",
        "copy",
        "--grace",
        "0s",
        "--retention",
        "0s",
    ];
    let done = twice.does(&arguments, 0);
    assert_eq!(done[0]["results"][0]["status"], done[1]["results"][0]["status"]);
    twice.does(&["purge", "--all", "--yes"], 0);
    twice.same("reclaimed");
    for name in ["a", "c", "d"] {
        assert_true(&twice.remote.member(name), &truth(&twice.remote, name), name);
    }
}

/// Into the deleted member's own file, by the operator's word that nobody else reads it.
#[test]
fn in_place_is_for_who_vouches_that_nobody_else_reads() {
    let twice = Twice::new();
    twice.does(&["init"], 0);
    let in_place =
        ["delete", "a", "--assume-deleted", "--now", "--yes", "--mode", "in-place", "--grace", "0s"];
    let url = twice.url();
    let (exit, refused) = twice.remote.run_on(&url, &in_place);
    assert_eq!((exit, refused["error"]["code"].as_str()), (3, Some("mode-impossible")), "{refused}");
    assert!(refused["error"]["message"].as_str().unwrap().contains("--exclusive"), "{refused}");
    twice.same("refused");
    let (exit, done) =
        twice.remote.run_on(&url, &[&in_place[..], &["--exclusive", "--retention", "0s"]].concat());
    assert_eq!(exit, 0, "{done}");
    assert_eq!(
        (&done["results"][0]["mode"], &done["results"][0]["status"]),
        (&"in-place".into(), &"done".into())
    );
    for name in ["b", "c", "d"] {
        assert_true(&twice.remote.member(name), &truth(&twice.remote, name), name);
    }
    assert!(!twice.remote.member("a").exists());
    assert_eq!(left_inside(&twice.remote.root()), Vec::<String>::new());
}
