//! The service on a store that is an NFSv3 export without a mount: every kind of job, in place by the operator's word alone,
//! killed and continued, and beside an instance on the directory itself.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

use serde_json::{Value, json};

use super::support::chains::write_truth;
use super::support::nfs::Ganesha;
use super::support::service::{Served, configure, configure_store, same};
use super::support::world::World;
use super::support::zones::{PEER, giving, path, same_as, serve, taking, truth};

/// a <- b <- {c, d}, opted in, and exported; the truth of each beside the store.
fn exported() -> (World, Arc<Ganesha>) {
    let world = World::forked();
    for name in ["a", "b", "c", "d"] {
        write_truth(&world.member(name), &truth(&world, name));
    }
    let server = Ganesha::start(&world.root());
    assert_eq!(world.run_on(&format!("{},id=s1", server.url("")), &["init"]).0, 0);
    (world, server)
}

fn configure_export(world: &World, server: &Ganesha, more: &str) {
    configure_store(world, &format!("id = \"s1\"\nurl = \"{}\"", server.url("")), more);
}

fn are_true(world: &World, names: &[&str]) {
    for name in names {
        same(&world.member(name), &truth(world, name));
    }
}

fn delete(member: &str, mode: &str, exclusive: bool) -> Value {
    json!({"kind": "delete", "members": [member], "assume_deleted": true, "mode": mode, "exclusive": exclusive,
        "retention_seconds": 0})
}

#[test]
fn every_kind_of_job_works_on_an_export() {
    let (world, ganesha) = exported();
    let exports = world.directory.path().join("exports");
    fs::create_dir(&exports).unwrap();
    configure_export(&world, &ganesha, &format!("exports = \"{}\"\n", exports.display()));
    let served = Served::start(&world);
    let adopted = served.do_job(&json!({"kind": "adopt", "now": true}));
    assert_eq!(adopted["adopted"].as_array().unwrap().len(), 4, "{adopted}");
    let checked = served.do_job(&json!({"kind": "verify", "level": "data"}));
    let sound = checked["checked"].as_array().unwrap().iter().filter(|one| one["verdict"] == "sound").count();
    assert_eq!(sound, 4, "{checked}");
    assert!(served.do_job(&json!({"kind": "audit"}))["totals"]["accounts"].is_array());
    served.do_job(&json!({"kind": "flatten", "member": "c", "format": "raw", "to": {"export": "c.raw"}}));
    assert!(fs::read(exports.join("c.raw")).unwrap() == fs::read(truth(&world, "c")).unwrap());
    served.do_job(&json!({"kind": "flatten", "member": "d", "to": {"volume": "2/9/made"}}));
    same(&world.root().join("volumes/2/9/made.qcow2"), &truth(&world, "d"));
    let removed = served.do_job(&delete("b", "copy", false));
    assert_eq!(removed["results"][0]["mode"], "copy", "{removed}");
    assert!(!world.member("b").exists());
    assert_eq!(served.do_job(&json!({"kind": "recover"}))["recovered"], json!([]));
    are_true(&world, &["a", "c", "d"]);
    assert_eq!(world.run(&["verify", "--level", "data"]).0, 0);
}

#[test]
fn in_place_is_for_who_vouches_in_the_request() {
    let (world, ganesha) = exported();
    configure_export(&world, &ganesha, "");
    let served = Served::start(&world);
    served.do_job(&json!({"kind": "adopt", "now": true}));
    let refused = served.post("/v1/plans", &delete("a", "in-place", false)).is(409);
    assert_eq!(refused["code"], "mode-impossible", "{refused}");
    assert!(refused["detail"].as_str().unwrap().contains("exclusive"), "{refused}");
    let job = served.wait(&served.job(&delete("a", "in-place", false)));
    assert_eq!(
        (&job["state"], &job["error"]["code"]),
        (&json!("failed"), &json!("mode-impossible")),
        "{job}"
    );
    let plan = served.post("/v1/plans", &delete("a", "in-place", true)).is(200);
    assert_eq!(plan["plan"][0]["mode"], "in-place", "{plan}");
    assert!(world.member("a").exists());
    let done = served.do_job(&delete("a", "in-place", true));
    assert_eq!(
        (&done["results"][0]["mode"], &done["results"][0]["status"]),
        (&json!("in-place"), &json!("done"))
    );
    assert!(!world.member("a").exists());
    are_true(&world, &["b", "c", "d"]);
    // Nor by itself without the word.
    let plan = served.post("/v1/plans", &delete("b", "auto", false)).is(200);
    assert_eq!(plan["plan"][0]["mode"], "copy", "{plan}");
}

#[test]
fn a_zone_is_copied_to_an_export() {
    let east = giving(World::forked(), &["a", "b", "c", "d"]);
    let giver = serve(&east, "");
    let west = taking();
    let ganesha = Ganesha::start(&west.root());
    let token = west.directory.path().join("east.token");
    fs::write(&token, format!("{PEER}\n")).unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    let zone =
        format!("[zones.east]\nurl = \"http://{}\"\ntoken_file = \"{}\"\n", giver.address, token.display());
    configure_export(&west, &ganesha, &zone);
    let taker = Served::start(&west);
    let copied = taker.do_job(&json!({"kind": "copy", "from": "east", "members": [path("c"), path("d")]}));
    assert_eq!(copied["copied"].as_array().unwrap().len(), 4, "{copied}");
    drop(taker);
    same_as(&west, &east, &["a", "b", "c", "d"]);
}

/// Killed at any time, and continued by an instance that has the directory itself; and the other way round.
#[test]
fn a_job_is_continued_by_an_instance_on_the_directory() {
    for (turn, pause) in [0, 20, 60, 120, 250, 500].into_iter().enumerate() {
        let (world, ganesha) = exported();
        let by = |export: bool| {
            if export {
                configure_export(&world, &ganesha, "");
            } else {
                configure(&world, "");
            }
            Served::start(&world)
        };
        let first = by(turn % 2 == 0);
        let job = first.job(&delete("b", "copy", false));
        std::thread::sleep(std::time::Duration::from_millis(pause));
        first.kill();
        let done = by(turn % 2 == 1).wait(&job);
        assert_eq!(done["state"], "done", "{pause}: {done}");
        assert!(!world.member("b").exists(), "{pause}");
        are_true(&world, &["a", "c", "d"]);
    }
}
