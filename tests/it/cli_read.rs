//! The reading verbs of the real program, over stores that QEMU made: documents, exit codes, bad input.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use serde_json::Value;

use super::support::digest::plain_digest;
use super::support::qemu::{must, text};
use super::support::world::{World, listing};

fn names(values: &Value, key: &str) -> Vec<String> {
    values.as_array().unwrap().iter().map(|value| value[key].as_str().unwrap().to_owned()).collect()
}

#[test]
fn list_shows_a_forked_tree_base_first() {
    let world = World::forked();
    let (exit, document) = world.run(&["list"]);
    assert_eq!(exit, 0);
    let members = &document["chains"][0]["members"];
    assert_eq!(names(members, "member"), ["a", "b", "c", "d"].map(|name| format!("snapshots/2/7/{name}")));
    assert_eq!(members[1]["parent"], "snapshots/2/7/a");
    assert_eq!(members[1]["children"], serde_json::json!(["snapshots/2/7/c", "snapshots/2/7/d"]));
    assert_eq!(members[0]["virtual_bytes"], 10 << 20);
    assert_eq!(members[0]["store"], "s1");
    assert_eq!(document["chains"].as_array().unwrap().len(), 1);
    assert_eq!(document["findings"], serde_json::json!([]));
}

#[test]
fn map_is_that_of_qemu() {
    let world = World::forked();
    for name in ["a", "b", "c", "d"] {
        let (exit, document) = world.run(&["map", name]);
        assert_eq!(exit, 0);
        let mut end = 0;
        let mut ours = Vec::new();
        for run in document["runs"].as_array().unwrap() {
            let (start, length) = (run["start"].as_u64().unwrap(), run["length"].as_u64().unwrap());
            assert_eq!(start, end);
            end = start + length;
            if run["kind"] == "data" {
                let member = run["member"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
                ours.push((start, length, member, run["offset"].as_u64().unwrap()));
            }
        }
        assert_eq!(end, 10 << 20);
        // QEMU's human form lists just the plain data; compressed clusters it refuses to show.
        let json = must("qemu-img", &["map", "--output=json", "-f", "qcow2", text(&world.member(name))]);
        let theirs: Value = serde_json::from_str(&json).unwrap();
        let depth: Vec<&str> = match name {
            "a" => vec!["a"],
            "b" => vec!["b", "a"],
            "c" => vec!["c", "b", "a"],
            _ => vec!["d", "b", "a"],
        };
        let plain = |run: &&Value| run["data"] == true && run["offset"].is_u64();
        let expected: Vec<_> = theirs
            .as_array()
            .unwrap()
            .iter()
            .filter(plain)
            .map(|run| {
                let number = |key: &str| run[key].as_u64().unwrap();
                let member = depth[usize::try_from(number("depth")).unwrap()].to_owned();
                (number("start"), number("length"), member, number("offset"))
            })
            .collect();
        assert_eq!(ours, expected, "{name}");
    }
}

#[test]
fn digest_is_that_of_the_raw_view() {
    let world = World::forked();
    for name in ["a", "b", "c", "d"] {
        let raw = world.directory.path().join(format!("{name}.raw"));
        must("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&world.member(name)), text(&raw)]);
        let expected = plain_digest(&fs::read(&raw).unwrap());
        for argument in [name, text(&raw)] {
            let (exit, document) = world.run(&["digest", argument]);
            assert_eq!((exit, document["digest"].as_str().unwrap()), (0, expected.as_str()), "{argument}");
            assert_eq!(document["virtual_bytes"], 10 << 20);
        }
        // A file of no store, with what lies below it beside it.
        let elsewhere = world.directory.path().join("empty");
        fs::create_dir_all(&elsewhere).unwrap();
        let (_, document) = world.run_on(text(&elsewhere), &["digest", text(&world.member(name))]);
        assert_eq!(document["digest"].as_str().unwrap(), expected);
    }
}

#[test]
fn bad_members_are_findings_or_refusals_with_their_code() {
    let world = World::forked();
    world.make("gone", "nobody", &[]);
    world.make("x", "y", &[]);
    world.make("y", "x", &[]);
    fs::copy(world.member("a"), world.member("cut")).unwrap();
    fs::File::options().write(true).open(world.member("cut")).unwrap().set_len(100_000).unwrap();
    must(
        "qemu-img",
        &["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "a", text(&world.member("raw")), "1M"],
    );
    let mut huge = fs::read(world.member("d")).unwrap();
    huge[36..40].copy_from_slice(&u32::MAX.to_be_bytes());
    fs::write(world.member("huge"), huge).unwrap();
    fs::write(world.member("text"), "hello").unwrap();
    symlink("a", world.member("link")).unwrap();
    let before = listing(&world.root());
    let bad = [
        ("gone", "missing-parent"),
        ("x", "cycle"),
        ("y", "cycle"),
        ("cut", "truncated"),
        ("raw", "wrong-format"),
        ("huge", "huge-table"),
        ("text", "not-qcow2"),
    ];
    for (name, code) in bad {
        for verb in ["map", "digest"] {
            assert_eq!(world.fails(&[verb, name]), (6, code.to_owned()), "{verb} {name}");
        }
        for level in ["links", "structure"] {
            let (exit, document) = world.run(&["verify", name, "--level", level]);
            assert_eq!((exit, document["checked"][0]["verdict"].as_str()), (1, Some("damaged")), "{name}");
            assert!(names(&document["findings"], "code").contains(&code.to_owned()), "{name}: {document}");
        }
    }
    assert_eq!(world.run(&["verify", "a", "b", "c", "d"]).0, 0);
    let (exit, document) = world.run(&["list"]);
    assert_eq!(exit, 0);
    let codes = names(&document["findings"], "code");
    for (_, code) in bad.into_iter().chain([("link", "special-file")]) {
        assert!(codes.contains(&code.to_owned()), "{code}: {codes:?}");
    }
    assert_eq!(world.fails(&["map", "link"]).0, 4);
    assert_eq!(listing(&world.root()), before, "a reading verb wrote to the store");
}

#[test]
fn bad_calls() {
    let world = World::forked();
    fs::create_dir_all(world.root().join("snapshots/2/8")).unwrap();
    fs::copy(world.member("a"), world.root().join("snapshots/2/8/a")).unwrap();
    for (arguments, exit, code) in [
        (&["map", "nobody"][..], 4, "not-found"),
        (&["map", "a"], 2, "ambiguous"),
        (&["map", "snapshots/2/7/"], 2, "ambiguous"),
        (&["map"], 2, "usage"),
        (&["frobnicate"], 2, "usage"),
        (&["verify", "--fraction", "0.5"], 2, "usage"),
        (&["explain", "no-such-code"], 2, "usage"),
        (&["list", "--store", "nfs://nas/export"], 2, "usage"),
        (&["list", "@/nowhere/list"], 4, "not-found"),
        (&["list", "--records", "/nowhere/rows"], 4, "not-found"),
        (&["--read-only", "init"], 3, "read-only"),
        (&["deinit"], 3, "not-confirmed"),
        (&["deinit", "--yes"], 3, "not-initialised"),
    ] {
        assert_eq!(world.fails(arguments), (exit, code.to_owned()), "{arguments:?}");
    }
    let (exit, document) = world.run_on("/nowhere/at/all", &["list"]);
    assert_eq!((exit, &document["error"]["code"]), (4, &Value::from("not-found")));
    let (exit, document) = world.run_on("nfs://nas", &["list"]);
    assert_eq!((exit, &document["error"]["code"]), (2, &Value::from("usage")));
    assert_eq!(world.run(&["explain", "cycle"]).1["severity"], "error");
}

#[test]
fn init_is_repeatable_and_deinit_leaves_nothing() {
    let world = World::forked();
    let before: Vec<_> = listing(&world.root()).into_keys().collect();
    let (exit, first) = world.run(&["init"]);
    assert_eq!((exit, &first["kind"]), (0, &Value::from("cloudstack")));
    assert!(first["capabilities"]["hard_links"].is_boolean());
    let own = world.root().join(".qchain");
    assert_eq!(fs::metadata(&own).unwrap().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(own.join("store.json")).unwrap().mode() & 0o777, 0o600);
    let (_, second) = world.run(&["init"]);
    assert_eq!((&second["id"], &second["changed"]), (&first["id"], &Value::from(false)));
    let other = world.directory.path().join("s2");
    fs::create_dir(&other).unwrap();
    let (_, both) = world.run(&["--store", text(&other), "init"]);
    assert_eq!((&both["id"], both["stores"].as_array().unwrap().len()), (&first["id"], 2));
    for root in [world.root(), other] {
        let record = fs::read(root.join(".qchain/store.json")).unwrap();
        let record: Value = serde_json::from_slice(&record).unwrap();
        assert_eq!(names(&record["zone"], "name"), ["s1", "s2"]);
    }
    assert_eq!(world.fails(&["init", "--kind", "plain"]), (2, "usage".to_owned()));
    assert_eq!(world.run(&["list"]).1["chains"].as_array().unwrap().len(), 1);
    assert_eq!(world.run(&["deinit", "--yes"]).0, 0);
    assert_eq!(listing(&world.root()).into_keys().collect::<Vec<_>>(), before);
}
