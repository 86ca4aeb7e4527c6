//! `qchain flatten` as it is called: documents, exit codes, what is refused, places of CloudStack's.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::support::chains::{assert_true, write_truth};
use super::support::qemu::{must, run, text};
use super::support::world::World;

/// The program on that store.
fn command(world: &World, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qchain"));
    command.env("XDG_CACHE_HOME", world.directory.path().join("cache")).env("HOME", world.directory.path());
    command.env_remove("QCHAIN_STORE").env_remove("QCHAIN_CONFIG");
    command.args(["--store", text(&world.root()), "--json"]).args(arguments);
    command
}

fn call(world: &World, arguments: &[&str]) -> Output {
    command(world, arguments).output().unwrap()
}

fn document(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(bytes)))
}

/// Opted in and adopted.
fn adopted() -> World {
    let world = World::forked();
    assert_eq!(world.run(&["init"]).0, 0);
    assert_eq!(world.run(&["adopt", "--now"]).0, 0);
    world
}

fn refuses(world: &World, arguments: &[&str], exit: i32, code: &str) {
    let (found, document) = world.run(arguments);
    assert_eq!((found, document["error"]["code"].as_str()), (exit, Some(code)), "{arguments:?}: {document}");
}

#[test]
fn a_file_is_made_once_and_said_what_it_is() {
    let world = adopted();
    let dest = world.directory.path().join("out.qcow2");
    let (exit, report) = world.run(&["flatten", "c", text(&dest)]);
    assert_eq!(exit, 0, "{report}");
    let (_, digest) = world.run(&["digest", "c"]);
    for (key, value) in [
        ("member", Value::from("snapshots/2/7/c")),
        ("output", Value::from(text(&dest))),
        ("format", Value::from("qcow2")),
        ("virtual_bytes", Value::from(10 << 20)),
        ("file_bytes", Value::from(fs::metadata(&dest).unwrap().len())),
        ("digest", digest["digest"].clone()),
        ("forced", Value::from(false)),
    ] {
        assert_eq!(report[key], value, "{key}: {report}");
    }
    assert_eq!(fs::metadata(&dest).unwrap().mode() & 0o777, 0o644);
    let before = fs::read(&dest).unwrap();
    refuses(&world, &["flatten", "a", text(&dest)], 3, "target-exists");
    assert!(fs::read(&dest).unwrap() == before);
    refuses(&world, &["flatten", "nobody", text(&dest)], 4, "not-found");
    refuses(&world, &["flatten", "c", "/no/such/directory/x"], 4, "not-found");
    refuses(&world, &["flatten", "c"], 2, "usage");
    refuses(&world, &["flatten", "c", text(&dest), "--compress", "zstd", "-O", "raw"], 2, "usage");
    refuses(&world, &["flatten", "c", text(&dest), "--cluster-size", "3000"], 2, "usage");
    // Nothing was left beside it.
    let names: Vec<_> =
        fs::read_dir(world.directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!names.iter().any(|name| name.to_str().unwrap().contains(".tmp")), "{names:?}");
}

#[test]
fn a_file_is_replaced_on_request_and_a_member_never() {
    let world = adopted();
    let volume = world.directory.path().join("volume");
    fs::write(&volume, "old").unwrap();
    let old = fs::metadata(&volume).unwrap();
    must("chmod", &["600", text(&volume)]);
    for format in ["qcow2", "raw"] {
        let (exit, report) = world.run(&["flatten", "c", text(&volume), "--overwrite", "-O", format]);
        assert_eq!(exit, 0, "{report}");
        must("qemu-img", &["compare", "-f", "qcow2", "-F", format, text(&world.member("c")), text(&volume)]);
        let new = fs::metadata(&volume).unwrap();
        assert_eq!((new.mode() & 0o777, new.uid()), (0o600, old.uid()));
    }
    let before = fs::read(world.member("d")).unwrap();
    refuses(&world, &["flatten", "c", text(&world.member("d")), "--overwrite"], 3, "target-exists");
    assert!(fs::read(world.member("d")).unwrap() == before);
}

#[test]
fn standard_output_has_the_canonical_image_and_nothing_else() {
    let world = adopted();
    for format in ["qcow2", "raw"] {
        let dest = world.directory.path().join(format);
        let (exit, _) = world.run(&["flatten", "c", text(&dest), "-O", format, "--layout", "canonical"]);
        assert_eq!(exit, 0);
        let file = fs::read(&dest).unwrap();
        let piped = call(&world, &["flatten", "c", "-", "-O", format]);
        let report = document(&piped.stderr);
        assert!(piped.status.success() && piped.stdout == file, "{report}");
        assert_eq!(report["file_bytes"], Value::from(file.len()));
        assert!(report["validator"].is_string() && report["how"] == "stream", "{report}");
        let mut parts = Vec::new();
        for range in ["0-1", "1-70000", "70000-70000", "70000-1000000", "1000000-"] {
            let part = call(&world, &["flatten", "c", "-", "-O", format, "--range", range]);
            assert_eq!(document(&part.stderr)["validator"], report["validator"]);
            parts.extend(part.stdout);
        }
        assert!(parts == file, "{format}: ranges");
    }
    for (arguments, exit, code) in [
        (&["flatten", "c", "-", "--compress", "zstd"][..], 2, "usage"),
        (&["flatten", "c", "--range", "0-9", "--compress", "zlib"], 2, "usage"),
        (&["flatten", "nobody", "-"], 4, "not-found"),
        (&["flatten", "c", "--range", "99999999999-"], 2, "usage"),
    ] {
        let failed = call(&world, arguments);
        assert!(failed.stdout.is_empty(), "{arguments:?}");
        let error = &document(&failed.stderr)["error"];
        assert_eq!((failed.status.code(), error["code"].as_str()), (Some(exit), Some(code)), "{arguments:?}");
    }
    // Whoever reads goes away.
    let mut child =
        command(&world, &["flatten", "c", "-", "-O", "raw"]).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(8));
}

/// Blocks that are zeros, which only their reader knows, take no space; the bytes are those of a pipe.
#[test]
fn zeros_that_were_written_are_holes() {
    let world = World::new();
    world.make("z", "", &["write -P 1 0 64k", "write -P 0 1M 4M", "write -P 2 6M 64k"]);
    for format in ["qcow2", "raw"] {
        let dest = world.directory.path().join(format);
        let (exit, report) = world.run(&["flatten", "z", text(&dest), "-O", format, "--layout", "canonical"]);
        assert_eq!((exit, &report["bytes_written"]), (0, &Value::from(128 << 10)), "{report}");
        must("qemu-img", &["compare", "-f", "qcow2", "-F", format, text(&world.member("z")), text(&dest)]);
        let found = fs::metadata(&dest).unwrap();
        assert!(found.len() > 4 << 20 && found.blocks() * 512 < 1 << 20, "{format}: {found:?}");
        assert!(call(&world, &["flatten", "z", "-", "-O", format]).stdout == fs::read(&dest).unwrap());
    }
    must("qemu-img", &["check", text(&world.directory.path().join("qcow2"))]);
}

#[test]
fn nothing_is_merged_into_a_member_while_it_is_streamed() {
    let world = adopted();
    let truth = call(&world, &["flatten", "c", "-", "-O", "raw"]).stdout;
    let mut reading =
        command(&world, &["flatten", "c", "-", "-O", "raw"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut pipe = reading.stdout.take().unwrap();
    let mut bytes = vec![0];
    pipe.read_exact(&mut bytes).unwrap();
    let merge = ["delete", "a", "--assume-deleted", "--now", "--yes", "--mode", "in-place", "--grace", "0s"];
    let (exit, refused) = world.run(&merge);
    assert_eq!((exit, refused["error"]["code"].as_str()), (3, Some("mode-impossible")), "{refused}");
    assert!(refused["error"]["message"].as_str().unwrap().contains("open"), "{refused}");
    // Whoever reads and whoever gives names to other files is not in the way.
    must("qemu-img", &["check", text(&world.member("c"))]);
    let (exit, done) = world.run(&["delete", "d", "--assume-deleted", "--end-of-chain", "--now", "--yes"]);
    assert_eq!(exit, 0, "{done}");
    pipe.read_to_end(&mut bytes).unwrap();
    assert!(reading.wait().unwrap().success() && bytes == truth);
    let (exit, done) = world.run(&merge);
    assert_eq!((exit, done["results"][0]["mode"].as_str()), (0, Some("in-place")), "{done}");
    assert!(call(&world, &["flatten", "c", "-", "-O", "raw"]).stdout == truth);
}

/// `key=value` of a properties file.
fn property(path: &Path, key: &str) -> String {
    let text = fs::read_to_string(path).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key}=")).map(str::to_owned));
    line.unwrap_or_else(|| panic!("no {key}: {text}"))
}

#[test]
fn templates_and_volumes_are_cloudstacks() {
    let world = adopted();
    let truth = world.directory.path().join("truth");
    write_truth(&world.member("c"), &truth);
    for (flag, directory, file, properties) in [
        ("--template", "template/tmpl/2/203", "web.qcow2", "template.properties"),
        ("--volume", "volumes/2/44", "web.qcow2", "volume.properties"),
    ] {
        let place = if flag == "--template" { "2/203/web" } else { "2/44/web.qcow2" };
        let (exit, report) = world.run(&["flatten", "c", flag, place, "--compress", "zstd"]);
        assert_eq!(exit, 0, "{report}");
        let directory = world.root().join(directory);
        let (image, properties) = (directory.join(file), directory.join(properties));
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 2);
        assert_true(&image, &truth, flag);
        let length = fs::metadata(&image).unwrap().len().to_string();
        assert_eq!(property(&properties, "filename"), file);
        assert_eq!(property(&properties, "qcow2.filename"), file);
        assert_eq!(property(&properties, "uniquename"), "web");
        assert_eq!(
            (property(&properties, "size"), property(&properties, "qcow2.size")),
            (length.clone(), length)
        );
        assert_eq!(property(&properties, "virtualsize"), (10_u64 << 20).to_string());
        for file in [&image, &properties] {
            assert_eq!(fs::metadata(file).unwrap().mode() & 0o777, 0o644, "{}", file.display());
        }
        refuses(&world, &["flatten", "b", flag, place], 3, "target-exists");
    }
    for bad in ["2/203", "2/x/web", "2/203/../web", "2/203/.web", "02/203/web", "2/203/a/b"] {
        refuses(&world, &["flatten", "c", "--template", bad], 2, "usage");
    }
    refuses(&world, &["--read-only", "flatten", "c", "--template", "2/204/web"], 3, "read-only");
    assert!(!world.root().join("template/tmpl/2/204").exists());
    assert_eq!(fs::read_dir(world.root().join(".qchain/tmp")).unwrap().count(), 0);
}

#[test]
fn a_template_is_whole_or_not_there_whenever_the_process_dies() {
    let world = adopted();
    let truth = world.directory.path().join("truth");
    write_truth(&world.member("c"), &truth);
    let directory = world.root().join("template/tmpl/2/203");
    let (mut whole, mut none) = (0, 0);
    for step in 0..200_u64 {
        let mut child = command(&world, &["flatten", "c", "--template", "2/203/web"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(step * 3));
        let _ = child.kill();
        child.wait().unwrap();
        if directory.exists() {
            whole += 1;
            assert_true(&directory.join("web.qcow2"), &truth, "killed");
            assert_eq!(property(&directory.join("template.properties"), "filename"), "web.qcow2");
            fs::remove_dir_all(&directory).unwrap();
        } else {
            none += 1;
        }
        if whole > 2 {
            break;
        }
    }
    assert!(whole > 2 && none > 2, "{whole} {none}");
    // What was left is swept by whoever changes the store next.
    assert_eq!(world.run(&["recover"]).0, 0);
    assert_eq!(fs::read_dir(world.root().join(".qchain/tmp")).unwrap().count(), 0);
}

#[test]
fn without_qchains_own_directory_a_file_can_be_made_and_a_template_not() {
    let world = World::forked();
    let dest = world.directory.path().join("out.raw");
    let (exit, report) = world.run(&["flatten", "c", text(&dest), "-O", "raw"]);
    assert_eq!(exit, 0, "{report}");
    assert!(report["note"].as_str().unwrap().contains("not adopted"), "{report}");
    let same =
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&world.member("c")), text(&dest)]);
    assert!(same.status.success());
    refuses(&world, &["flatten", "c", "--template", "2/203/web"], 3, "not-initialised");
}
