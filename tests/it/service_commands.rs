//! CloudStack's commands over HTTP, with the JSON that its agents get.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::support::chains::write_truth;
use super::support::service::{Served, configure, same};
use super::support::world::{World, listing};

/// The names in the commands.
const NAMES: [&str; 3] = [
    "0b7c1c52-5a0e-4f2e-9a57-3f1b0d9e2a01",
    "1f0a9e0d-8c3b-4f65-a1d4-6c2f7e5b3b02",
    "2c4d6e8f-1a3b-4c5d-8e7f-9a0b1c2d3e03",
];
const VHD: &str = "snapshots/2/8/4a5b6c7d-0000-4000-8000-000000000104.vhd";
const VMWARE: &str = "snapshots/2/9/5b6c7d8e-0000-4000-8000-000000000105";

fn command(name: &str) -> Value {
    let path =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/commands").join(format!("{name}.json"));
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn paths(at: usize) -> (String, String) {
    (format!("snapshots/2/7/{}", NAMES[at]), format!("checkpoints/2/7/{}", NAMES[at]))
}

/// base <- middle <- newest with checkpoint files, and what other hypervisors left beside them; served.
fn served() -> (World, Served) {
    let world = World::new();
    let writes = ["write -P 1 0 3M", "write -P 2 1M 128k", "write -P 3 5M 192k"];
    fs::create_dir_all(world.root().join("checkpoints/2/7")).unwrap();
    for (at, name) in NAMES.iter().enumerate() {
        let backing = if at == 0 { "" } else { NAMES[at - 1] };
        world.make(name, backing, &[writes[at]]);
        let parent = if at == 0 { String::new() } else { format!("<parent><name>{backing}</name></parent>") };
        let checkpoint = format!("<domaincheckpoint><name>{name}</name>{parent}</domaincheckpoint>\n");
        fs::write(world.root().join(paths(at).1), checkpoint).unwrap();
        write_truth(&world.member(name), &world.directory.path().join(name));
    }
    for path in [VHD.to_owned(), format!("{VMWARE}/disk.vmdk")] {
        let path = world.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "conectix").unwrap();
    }
    assert_eq!(world.run(&["init"]).0, 0);
    configure(&world, "");
    let served = Served::start(&world);
    (world, served)
}

fn is_true(world: &World, at: usize) {
    same(&world.member(NAMES[at]), &world.directory.path().join(NAMES[at]));
}

#[test]
fn a_delete_merges_and_says_what_changes_in_the_rows() {
    let (world, served) = served();
    let answer = served.post("/v1/cloudstack/DeleteCommand", &command("delete-middle")).is(200);
    assert_eq!((&answer["result"], &answer["handled"]), (&json!(true), &json!(true)), "{answer}");
    assert_eq!(answer["removed"], json!([{"install_path": paths(1).0, "checkpoint_path": paths(1).1}]));
    let length = fs::metadata(world.member(NAMES[2])).unwrap().len();
    let survivor = &answer["survivors"][0];
    assert_eq!((&survivor["install_path"], &survivor["physical_size"]), (&json!(paths(2).0), &json!(length)));
    assert_eq!((&survivor["checkpoint_path"], &survivor["parent"]), (&json!(paths(2).1), &json!(paths(0).0)));
    assert_eq!(survivor["virtual_size"], 10 << 20);
    let checkpoint = fs::read_to_string(world.root().join(paths(2).1)).unwrap();
    assert!(checkpoint.contains(&format!("<parent><name>{}</name></parent>", NAMES[0])), "{checkpoint}");
    is_true(&world, 0);
    is_true(&world, 2);
    // Asked again, as CloudStack does when an answer was lost.
    let again = served.post("/v1/cloudstack/DeleteCommand", &command("delete-middle")).is(200);
    assert_eq!(
        (&again["result"], &again["handled"], &again["code"]),
        (&json!(false), &json!(true), &json!("not-found"))
    );
    let newest = served.post("/v1/cloudstack/DeleteCommand", &command("delete-newest")).is(200);
    assert_eq!((&newest["result"], &newest["survivors"]), (&json!(true), &json!([])), "{newest}");
    assert!(!world.member(NAMES[2]).exists() && !world.root().join(paths(2).1).exists());
    is_true(&world, 0);
}

#[test]
fn a_conversion_leaves_the_image_that_cloudstack_expects() {
    let (world, served) = served();
    let temporary = format!("{}_temp", paths(2).0);
    for _ in 0..2 {
        let answer = served.post("/v1/cloudstack/ConvertSnapshotCommand", &command("convert")).is(200);
        assert_eq!((&answer["result"], &answer["code"]), (&json!(true), &Value::Null), "{answer}");
        assert_eq!(
            (&answer["snapshot"]["install_path"], &answer["snapshot"]["parent"]),
            (&json!(temporary), &Value::Null)
        );
        let file = world.root().join(&temporary);
        assert_eq!(answer["snapshot"]["physical_size"], fs::metadata(&file).unwrap().len());
        same(&file, &world.directory.path().join(NAMES[2]));
    }
    is_true(&world, 2);
}

#[test]
fn a_query_for_copy_names_the_whole_chain_if_it_is_sound() {
    let (world, served) = served();
    let ask = || served.post("/v1/cloudstack/QuerySnapshotZoneCopyCommand", &command("query-copy")).is(200);
    assert_eq!(ask()["files"], json!([paths(0).0, paths(1).0, paths(2).0]));
    // The reference counts of the base are overwritten.
    let base = world.member(NAMES[0]);
    let mut bytes = fs::read(&base).unwrap();
    bytes[2 << 16..(2 << 16) + 64].fill(0);
    fs::write(&base, bytes).unwrap();
    let answer = ask();
    assert_eq!(
        (&answer["result"], &answer["handled"], &answer["files"]),
        (&json!(false), &json!(true), &json!([]))
    );
    assert!(answer["code"].is_string(), "{answer}");
}

#[test]
fn what_is_not_qchains_is_left_alone() {
    let (world, served) = served();
    let snapshots = world.root().join("snapshots");
    let before = listing(&snapshots);
    for (class, name, code, handled) in [
        ("DeleteCommand", "delete-xenserver", "other-hypervisor", false),
        ("DeleteCommand", "delete-vhd", "other-hypervisor", false),
        ("DeleteCommand", "delete-vmware", "other-hypervisor", false),
        ("DeleteCommand", "delete-template", "not-a-snapshot", false),
        ("DeleteCommand", "delete-other-checkpoint", "checkpoint-path", true),
        ("CopyCommand", "copy", "unknown-command", false),
    ] {
        let answer = served.post(&format!("/v1/cloudstack/{class}"), &command(name)).is(200);
        let found = (&answer["result"], &answer["handled"], &answer["code"]);
        assert_eq!(found, (&json!(false), &json!(handled), &json!(code)), "{name}: {answer}");
    }
    let text = command("delete-middle").to_string();
    let elsewhere = serde_json::from_str(&text.replace("192.0.2.10", "192.0.2.11")).unwrap();
    assert_eq!(served.post("/v1/cloudstack/DeleteCommand", &elsewhere).is(200)["code"], "store-absent");
    for (class, body) in [
        ("ConvertSnapshotCommand", command("delete-middle")),
        ("DeleteCommand", json!([])),
        ("DeleteCommand", json!({"a": 1})),
        ("DeleteCommand", json!({"a.DeleteCommand": {}})),
    ] {
        assert_eq!(served.post(&format!("/v1/cloudstack/{class}"), &body).is(400)["code"], "usage", "{body}");
    }
    assert!(listing(&snapshots) == before);
    assert_eq!(served.get("/v1/jobs").is(200)["jobs"], json!([]));
}

#[test]
fn whoever_does_not_want_to_wait_gets_the_job() {
    let (world, served) = served();
    // Nothing moves at that rate for a while.
    served.limit(1);
    served.do_job(&json!({"kind": "recover"}));
    let ask = || served.post("/v1/cloudstack/ConvertSnapshotCommand?wait_seconds=0", &command("convert"));
    let first = ask().is(202);
    assert_eq!(first["kind"], "flatten");
    served.limit(0);
    let job = served.wait(first["id"].as_str().unwrap());
    assert_eq!(job["state"], "done", "{job}");
    same(&world.root().join(format!("{}_temp", paths(2).0)), &world.directory.path().join(NAMES[2]));
}
