//! The reading verbs of the real program on an export without a mount say what they say on the directory itself; on one
//! that is read-only the others refuse.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::Value;

use super::delete_oracle::chains;
use super::support::chains::{build, folders};
use super::support::crash::full;
use super::support::digest::plain_digest;
use super::support::nfs::{Ganesha, Terms, free_port};
use super::support::qemu::{must, text};
use super::support::rot::rot;
use super::support::world::{World, listing};

/// Runs the program with `--json` and a home for its caches; its exit code and what it printed.
fn run(store: &str, home: &Path, arguments: &[&str]) -> (i32, Vec<u8>) {
    let output = Command::new(env!("CARGO_BIN_EXE_qchain"))
        .args(["--json", "--store", store])
        .args(arguments)
        .env("XDG_CACHE_HOME", home)
        .env_remove("QCHAIN_STORE")
        .env_remove("QCHAIN_CONFIG")
        .output()
        .unwrap();
    (output.status.code().unwrap(), output.stdout)
}

/// Asserts that both say the same, also when they know the headers already.
fn same(directory: &Path, url: &str, verbs: &[&[&str]], context: &str) {
    let homes = tempfile::tempdir().unwrap();
    let id = directory.file_name().unwrap().to_str().unwrap();
    let export = format!("{url},id={id}");
    for verb in verbs {
        let local = run(text(directory), &homes.path().join("local"), verb);
        for round in ["first", "second"] {
            let remote = run(&export, &homes.path().join("remote"), verb);
            let shown = |(exit, out): &(i32, Vec<u8>)| format!("{exit}: {}", String::from_utf8_lossy(out));
            assert!(local == remote, "{context}, {verb:?}, {round}:\n{}\n{}", shown(&local), shown(&remote));
        }
    }
}

#[test]
fn every_kind_of_chain_reads_as_on_the_directory() {
    let place = tempfile::tempdir().unwrap();
    let server = Ganesha::start(place.path());
    let step = if full() { 1 } else { 5 };
    for (index, (name, specs)) in chains().iter().enumerate().step_by(step) {
        let (store, truth) = folders(place.path(), &format!("s{index}"));
        build(&store, &truth, specs);
        // An export is a directory below it, too.
        let url = server.url_of(&format!("s{index}"), "");
        let maps: Vec<[&str; 2]> = ["base", "a", "b", "c"].map(|member| ["map", member]).into();
        let digests: Vec<[&str; 2]> = ["base", "a", "b", "c"].map(|member| ["digest", member]).into();
        let mut verbs: Vec<&[&str]> =
            vec![&["list"], &["verify"], &["verify", "--level", "links"], &["audit", "--min-age", "0s"]];
        verbs.extend(maps.iter().chain(&digests).map(|verb| &verb[..]));
        same(&store, &url, &verbs, name);
        let (_, out) = run(&url, place.path(), &["digest", "c"]);
        let document: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(document["digest"], plain_digest(&fs::read(truth.join("c")).unwrap()), "{name}");
        fs::remove_dir_all(&store).unwrap();
        fs::remove_dir_all(&truth).unwrap();
    }
}

/// Checkpoint files, damage, links, pipes, foreign files, names that are none.
fn littered() -> World {
    let world = World::forked();
    world.make("gone", "nobody", &[]);
    fs::copy(world.member("a"), world.member("cut")).unwrap();
    fs::File::options().write(true).open(world.member("cut")).unwrap().set_len(100_000).unwrap();
    fs::write(world.member("text"), "hello").unwrap();
    fs::write(world.member("other.vhd"), "hello").unwrap();
    fs::write(world.member("bad\nname"), "hello").unwrap();
    symlink("a", world.member("link")).unwrap();
    symlink("/etc", world.root().join("snapshots/3")).unwrap();
    must("mkfifo", &[text(&world.member("pipe"))]);
    fs::create_dir_all(world.root().join("checkpoints/2/7")).unwrap();
    for (name, parent) in [("a", ""), ("b", "<parent><name>a</name></parent>"), ("lost", "")] {
        let xml = format!("<domaincheckpoint><name>{name}</name>{parent}</domaincheckpoint>");
        fs::write(world.root().join("checkpoints/2/7").join(name), xml).unwrap();
    }
    fs::create_dir_all(world.root().join("template/tmpl/2/201")).unwrap();
    fs::write(world.root().join("template/tmpl/2/201/template.properties"), "x=1").unwrap();
    world
}

#[test]
fn bytes_are_held_against_manifests_as_on_the_directory() {
    let world = World::forked();
    let server = Ganesha::start(&world.root());
    assert_eq!(world.run(&["init"]).0, 0);
    assert_eq!(world.run(&["adopt", "--now"]).0, 0);
    let before = listing(&world.root().join(".qchain/manifests"));
    let url = server.url("");
    let (exit, out) = run(&url, world.directory.path(), &["--read-only", "verify", "--level", "data"]);
    let document: Value = serde_json::from_slice(&out).unwrap();
    let sound = document["checked"].as_array().unwrap().iter().all(|one| one["verdict"] == "sound");
    assert!(exit == 0 && sound, "{document}");
    assert_eq!(listing(&world.root().join(".qchain/manifests")), before, "--read-only");
    same(&world.root(), &url, &[&["verify"]], "sound");
    rot(&world.member("b"), 5 * 65_536 + 1000, &[9; 100]);
    let (exit, _) = run(&url, world.directory.path(), &["verify", "--level", "data"]);
    assert_eq!(exit, 1);
    same(&world.root(), &url, &[&["verify", "--level", "data"]], "damaged");
}

const READING: &[&[&str]] = &[
    &["list"],
    &["list", "b"],
    &["verify"],
    &["audit", "--min-age", "0s"],
    &["map", "c"],
    &["digest", "d"],
    &["digest", "cut"],
    &["map", "gone"],
    &["map", "nothing"],
    &["history"],
];

#[test]
fn a_littered_store_reads_as_on_the_directory() {
    let world = littered();
    let server = Ganesha::start(&world.root());
    let before = listing(&world.root());
    same(&world.root(), &server.url(""), READING, "not opted in");
    assert_eq!(listing(&world.root()), before);
    assert_eq!(world.run(&["init"]).0, 0);
    same(&world.root(), &server.url("&connections=2"), READING, "opted in");
}

#[test]
fn who_may_not_read_what_is_qchains_reads_members_all_the_same() {
    let world = World::forked();
    assert_eq!(world.run(&["init"]).0, 0);
    fs::set_permissions(world.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let server = Ganesha::start(&world.root());
    let (exit, document) = world.run_on(&server.url("&uid=1000&gid=1000"), &["list"]);
    assert_eq!(exit, 0, "{document}");
    assert_eq!(document["stores"][0]["initialised"], false);
    assert_eq!(document["chains"][0]["members"].as_array().unwrap().len(), 4);
    fs::set_permissions(world.member("a"), fs::Permissions::from_mode(0o600)).unwrap();
    let (exit, document) = world.run_on(&server.url("&uid=1000&gid=1000"), &["digest", "a"]);
    assert_eq!((exit, document["error"]["code"].as_str()), (6, Some("io")), "{document}");
    assert!(document["error"]["message"].as_str().unwrap().contains("NFS3ERR_ACCES"), "{document}");
}

#[test]
fn what_would_change_a_read_only_export_is_refused() {
    let world = World::forked();
    assert_eq!(world.run(&["init"]).0, 0);
    let server = Ganesha::start_on(&world.root(), Terms { access: "RO", ..Terms::default() });
    let before = listing(&world.root());
    let verbs: &[&[&str]] = &[
        &["init"],
        &["deinit", "--yes"],
        &["delete", "a", "--assume-deleted", "--yes"],
        &["delete", "a", "--assume-deleted", "--dry-run"],
        &["undo", "1234", "--yes"],
        &["purge", "--yes"],
        &["recover"],
    ];
    for verb in verbs {
        let (exit, document) = world.run_on(&server.url(""), verb);
        let error = &document["error"];
        assert_eq!((exit, error["code"].as_str()), (3, Some("read-only")), "{verb:?}: {document}");
        assert!(error["message"].as_str().unwrap().contains("read-only"), "{document}");
    }
    assert_eq!(listing(&world.root()), before);
}

#[test]
fn the_configuration_names_exports() {
    let world = World::forked();
    let server = Ganesha::start(&world.root());
    let file = world.directory.path().join("qchain.toml");
    fs::write(&file, format!("[[stores]]\nid = \"s1\"\nurl = \"{}\"\n", server.url(""))).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_qchain"))
        .args(["--json", "--config", text(&file), "list"])
        .env("XDG_CACHE_HOME", world.directory.path().join("caches"))
        .env_remove("QCHAIN_STORE")
        .output()
        .unwrap();
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["chains"], world.run(&["list"]).1["chains"]);
    // By name, whatever addresses that has.
    let named = format!("{},id=s1", server.url("").replace("127.0.0.1", "localhost"));
    assert_eq!(world.run_on(&named, &["list"]).1["chains"], document["chains"]);
}

#[test]
fn who_is_not_root_reads_as_the_user_it_is() {
    let world = World::forked();
    fs::set_permissions(world.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(world.member("d"), fs::Permissions::from_mode(0o600)).unwrap();
    let server = Ganesha::start(&world.root());
    for (member, code) in [("c", 0), ("d", 6)] {
        let status = Command::new("setpriv")
            .args(["--reuid", "1000", "--regid", "1000", "--clear-groups", env!("CARGO_BIN_EXE_qchain")])
            .args(["--json", "--store", &server.url(""), "digest", member])
            .env_remove("HOME")
            .env_remove("XDG_CACHE_HOME")
            .env_remove("QCHAIN_CONFIG")
            .output()
            .unwrap();
        assert_eq!(status.status.code(), Some(code), "{member}: {status:?}");
    }
}

#[test]
fn what_is_not_there_is_named() {
    let world = World::forked();
    let server = Ganesha::start(&world.root());
    let (port, mount) = (server.port(), server.mount_port());
    let free = free_port();
    let cases = [
        (format!("nfs://127.0.0.1:{port}/wrong?mountport={mount}"), vec!["/wrong"], "io"),
        (
            format!("nfs://127.0.0.1:{free}/export?mountport={mount}"),
            vec!["NFS service", "refused"],
            "unreachable",
        ),
        (
            format!("nfs://127.0.0.1:{port}/export?mountport={free}"),
            vec!["mount service", "refused"],
            "unreachable",
        ),
        (format!("nfs://127.0.0.1:{mount}/export?mountport={mount}"), vec!["Program unavailable"], "io"),
        (format!("nfs://127.0.0.1:{port}/export?mountport={port}"), vec!["no mount service"], "unreachable"),
        (
            "nfs://no.such.host.invalid/export".to_owned(),
            vec!["no.such.host.invalid", "not known"],
            "unreachable",
        ),
    ];
    for (url, texts, code) in cases {
        let begun = Instant::now();
        let (exit, document) = world.run_on(&url, &["list"]);
        let error = &document["error"];
        assert_eq!((exit, error["code"].as_str()), (8, Some(code)), "{url}: {document}");
        let message = error["message"].as_str().unwrap();
        assert!(texts.iter().all(|text| message.contains(text)) && message.contains(&url), "{message}");
        assert!(begun.elapsed().as_secs() < 30, "{url}: {:?}", begun.elapsed());
    }
    for bad in ["nfs://127.0.0.1", "nfs://127.0.0.1/export?colour=red", "nfs://127.0.0.1/e,url=nfs://h/e"] {
        assert_eq!(world.run_on(bad, &["list"]).0, 2, "{bad}");
    }
}
