//! `scripts/ssvm-client` answers commands of CloudStack as handlers of it would, through the real program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::support::chains::{assert_true, write_truth};
use super::support::qemu::Writer;
use super::support::volume::is_base;
use super::support::world::{World, listing};

const URL: &str = "nfs://192.0.2.10/export/secondary";
/// The names in the commands.
const NAMES: [&str; 3] = [
    "0b7c1c52-5a0e-4f2e-9a57-3f1b0d9e2a01",
    "1f0a9e0d-8c3b-4f65-a1d4-6c2f7e5b3b02",
    "2c4d6e8f-1a3b-4c5d-8e7f-9a0b1c2d3e03",
];
const VHD: &str = "snapshots/2/8/4a5b6c7d-0000-4000-8000-000000000104.vhd";
const VMWARE: &str = "snapshots/2/9/5b6c7d8e-0000-4000-8000-000000000105";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The install path of a snapshot, and of its checkpoint file.
fn paths(at: usize) -> (String, String) {
    (format!("snapshots/2/7/{}", NAMES[at]), format!("checkpoints/2/7/{}", NAMES[at]))
}

/// base <- middle <- newest with checkpoint files, and what other hypervisors left beside them; opted in.
fn store() -> World {
    let world = World::new();
    let writes = ["write -P 1 0 3M", "write -P 2 1M 128k", "write -P 3 5M 192k"];
    fs::create_dir_all(world.root().join("checkpoints/2/7")).unwrap();
    for (at, name) in NAMES.iter().enumerate() {
        let backing = if at == 0 { "" } else { NAMES[at - 1] };
        world.make(name, backing, &[writes[at]]);
        let parent = format!("<parent><name>{backing}</name></parent>");
        let parent = if at == 0 { "" } else { &parent };
        let checkpoint = format!("<domaincheckpoint><name>{name}</name>{parent}</domaincheckpoint>\n");
        fs::write(world.root().join(paths(at).1), checkpoint).unwrap();
        write_truth(&world.member(name), &world.directory.path().join(name));
    }
    for path in [VHD.to_owned(), format!("{VMWARE}/disk.vmdk"), format!("{VMWARE}/disk.ovf")] {
        let path = world.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "conectix").unwrap();
    }
    assert_eq!(world.run(&["init"]).0, 0);
    let settings = "[safety]\nsettle = \"0s\"\n";
    fs::write(world.directory.path().join("qchain.toml"), settings).unwrap();
    world
}

/// Gives a command to the client; its exit code and answer.
fn ask(world: &World, command: &Path) -> (i32, Value) {
    let output = Command::new("python3")
        .arg(root().join("scripts/ssvm-client"))
        .args(["--qchain", env!("CARGO_BIN_EXE_qchain"), "--grace", "0s"])
        .arg(format!("--store={},url={URL}", world.root().display()))
        .stdin(Stdio::from(fs::File::open(command).unwrap()))
        .env("XDG_CACHE_HOME", world.directory.path().join("caches"))
        .env("QCHAIN_CONFIG", world.directory.path().join("qchain.toml"))
        .env_remove("QCHAIN_STORE")
        .output()
        .unwrap_or_else(|error| panic!("python3 is needed for this test: {error}"));
    let answer = serde_json::from_slice(&output.stdout);
    (output.status.code().unwrap(), answer.unwrap_or_else(|error| panic!("{error}: {output:?}")))
}

fn ask_fixture(world: &World, name: &str) -> (i32, Value) {
    ask(world, &root().join("fixtures/commands").join(format!("{name}.json")))
}

fn is_true(world: &World, at: usize) {
    assert_true(&world.member(NAMES[at]), &world.directory.path().join(NAMES[at]), "after the command");
}

#[test]
fn a_delete_merges_and_answers_with_the_rows_to_change() {
    let world = store();
    let (exit, answer) = ask_fixture(&world, "delete-middle");
    assert_eq!((exit, &answer["result"], &answer["handled"]), (0, &json!(true), &json!(true)), "{answer}");
    let ((base, _), (middle, middle_checkpoint), (newest, checkpoint)) = (paths(0), paths(1), paths(2));
    let removed = json!([{"install_path": middle, "checkpoint_path": middle_checkpoint}]);
    assert_eq!(answer["removed"], removed);
    let size = fs::metadata(world.root().join(&newest)).unwrap().len();
    let survivor = json!({
        "install_path": newest, "physical_size": size, "checkpoint_path": checkpoint, "parent": base
    });
    assert_eq!(answer["survivors"], json!([survivor]));
    // What it answers is so.
    assert!(!world.root().join(&middle).exists() && !world.root().join(middle_checkpoint).exists());
    let xml = fs::read_to_string(world.root().join(checkpoint)).unwrap();
    assert!(xml.contains(&format!("<parent><name>{}</name></parent>", NAMES[0])), "{xml}");
    is_true(&world, 2);

    // Asked again, as CloudStack does when an answer was lost.
    let (exit, answer) = ask_fixture(&world, "delete-middle");
    assert_eq!((exit, &answer["result"], &answer["code"]), (4, &json!(false), &json!("not-found")));
}

#[test]
fn a_delete_of_the_newest_leaves_no_survivor() {
    let world = store();
    let (exit, answer) = ask_fixture(&world, "delete-newest");
    assert_eq!((exit, &answer["result"], &answer["survivors"]), (0, &json!(true), &json!([])), "{answer}");
    assert!(!world.member(NAMES[2]).exists() && !world.root().join(paths(2).1).exists());
    is_true(&world, 1);
}

#[test]
fn a_query_for_copy_names_the_whole_chain() {
    let world = store();
    let before = listing(&world.root());
    let (exit, answer) = ask_fixture(&world, "query-copy");
    assert_eq!(exit, 0, "{answer}");
    assert_eq!(answer["files"], json!([paths(0).0, paths(1).0, paths(2).0]));
    // A chain that does not hold is not offered: here the reference counts of the base are overwritten.
    let base = world.member(NAMES[0]);
    let mut bytes = fs::read(&base).unwrap();
    bytes[2 << 16..(2 << 16) + 64].fill(0);
    fs::write(&base, bytes).unwrap();
    let (exit, answer) = ask_fixture(&world, "query-copy");
    assert_eq!((exit, &answer["result"]), (1, &json!(false)), "{answer}");
    assert_eq!(listing(&world.root()).keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
}

#[test]
fn a_conversion_makes_cloudstacks_flattened_copy() {
    let world = store();
    let path = format!("{}_temp", paths(2).0);
    let copy = world.root().join(&path);
    // Once more over what an earlier try left, and over what somebody is writing.
    for _ in 0..2 {
        let (exit, answer) = ask_fixture(&world, "convert");
        assert_eq!((exit, &answer["result"], &answer["path"]), (0, &json!(true), &json!(path)), "{answer}");
        let file_bytes = fs::metadata(&copy).unwrap().len();
        assert_eq!(
            (answer["physical_size"].as_u64(), answer["size"].as_u64()),
            (Some(file_bytes), Some(10 << 20))
        );
        assert_true(&copy, &world.directory.path().join(NAMES[2]), "flattened");
        assert!(is_base(&copy));
    }
    let _writer = Writer::of(&copy);
    let (exit, answer) = ask_fixture(&world, "convert");
    assert_eq!((exit, &answer["code"], &answer["result"]), (5, &json!("locked"), &json!(false)), "{answer}");
}

#[test]
fn a_copy_to_a_template_or_a_volume_lands_in_cloudstacks_place() {
    let world = store();
    let names = ["8e9f0a1b-0000-4000-8000-000000000107", "9f0a1b2c-0000-4000-8000-000000000108"];
    for (command, place, name, properties) in [
        ("copy-to-template", "template/tmpl/2/203", names[0], "template.properties"),
        ("copy-to-volume", "volumes/2/9", names[1], "volume.properties"),
    ] {
        let (exit, answer) = ask_fixture(&world, command);
        let path = format!("{place}/{name}.qcow2");
        assert_eq!(
            (exit, &answer["path"], &answer["format"]),
            (0, &json!(path), &json!("QCOW2")),
            "{answer}"
        );
        assert!(world.root().join(place).join(properties).exists(), "{command}");
        assert_true(&world.root().join(&path), &world.directory.path().join(NAMES[2]), command);
        // The place is taken now.
        let (exit, answer) = ask_fixture(&world, command);
        assert_eq!((exit, &answer["code"]), (3, &json!("target-exists")), "{answer}");
    }
}

#[test]
fn what_is_not_qchains_is_told_why_and_left_alone() {
    let world = store();
    let before = listing(&world.root());
    for (name, code, handled, says) in [
        ("delete-xenserver", "other-hypervisor", false, "a snapshot of XenServer"),
        ("delete-vhd", "other-hypervisor", false, "(.vhd)"),
        ("delete-vmware", "other-hypervisor", false, "a directory"),
        ("delete-template", "not-a-snapshot", false, "TemplateObjectTO is not a snapshot"),
        ("delete-other-checkpoint", "checkpoint-path", true, "is not the checkpoint file of"),
        ("copy", "unknown-command", false, "CopyCommand is not qchain's"),
    ] {
        let (exit, answer) = ask_fixture(&world, name);
        let found = (exit, &answer["result"], &answer["handled"], &answer["code"]);
        assert_eq!(found, (3, &json!(false), &json!(handled), &json!(code)), "{name}: {answer}");
        assert!(answer["details"].as_str().unwrap().contains(says), "{name}: {answer}");
        assert_eq!(answer["calls"], json!([]), "{name}");
        assert!(listing(&world.root()) == before, "{name}");
    }
}

#[test]
fn what_is_no_command_or_of_no_store_is_refused() {
    let world = store();
    let before = listing(&world.root());
    let text = fs::read_to_string(root().join("fixtures/commands/delete-middle.json")).unwrap();
    let copy = fs::read_to_string(root().join("fixtures/commands/copy-to-template.json")).unwrap();
    let outside = text.replace(&paths(1).0, "snapshots/2/7/..");
    for (command, exit, code) in [
        ("", 2, "usage"),
        ("[]", 2, "usage"),
        ("{\"a.DeleteCommand\": {}}", 2, "usage"),
        (&text.replace("192.0.2.10", "192.0.2.11"), 3, "store-absent"),
        (&outside, 3, "not-a-snapshot"),
        (&copy.replace("template/tmpl/2/203", "template/tmpl/2/203/../204"), 3, "not-a-place"),
    ] {
        let path = world.directory.path().join("command.json");
        fs::write(&path, command).unwrap();
        let (found, answer) = ask(&world, &path);
        assert_eq!((found, &answer["code"]), (exit, &json!(code)), "{command}: {answer}");
        assert!(listing(&world.root()) == before, "{command}");
    }
}

#[test]
fn the_example_of_a_configuration_is_understood() {
    let example = root().join("scripts/qchain.toml.example");
    let checked = Command::new(env!("CARGO_BIN_EXE_qchain"))
        .args(["config", "check"])
        .env("QCHAIN_CONFIG", example)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{checked:?}");
}
