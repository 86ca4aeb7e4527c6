//! What the service begins by itself: once, however many instances there are, and only what is due.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::support::chains::write_truth;
use super::support::qemu::text;
use super::support::service::{LONG, Served, configure, same, write_rows};
use super::support::world::World;

/// a <- b <- c, opted in and adopted.
fn world() -> World {
    world_of("128k")
}

/// The same, with so much in b.
fn world_of(size: &str) -> World {
    let world = World::new();
    world.make("a", "", &["write -P 1 0 3M"]);
    world.make("b", "a", &[&format!("write -P 2 1M {size}")]);
    world.make("c", "b", &["write -P 3 5M 128k"]);
    assert_eq!(world.run(&["init"]).0, 0);
    assert_eq!(world.run(&["adopt", "--now"]).0, 0);
    world
}

fn jobs(served: &Served, kind: &str) -> Vec<Value> {
    let page = served.get(&format!("/v1/jobs?kind={kind}&limit=1000")).is(200);
    page["jobs"].as_array().unwrap().clone()
}

/// Waits until so many jobs of a kind are done; all of them.
fn done(served: &Served, kind: &str, count: usize) -> Vec<Value> {
    let begun = Instant::now();
    loop {
        let jobs = jobs(served, kind);
        if jobs.iter().filter(|job| job["state"] == "done").count() >= count {
            return jobs;
        }
        assert!(begun.elapsed() < LONG, "{jobs:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn each_period_has_one_job_whoever_looks() {
    let world = world();
    configure(&world, "[schedule]\nverify_within = \"1s\"\npurge_every = \"1s\"\n");
    let begun = Instant::now();
    let (one, other) = (Served::start(&world), Served::start(&world));
    for kind in ["verify", "recover"] {
        done(&one, kind, 4);
        let jobs = done(&other, kind, 4);
        let most = begun.elapsed().as_secs() + 2;
        assert!(jobs.len() as u64 <= most, "{} jobs of {kind} in {most} periods", jobs.len());
        assert!(jobs.iter().all(|job| job["made_by"] == "schedule"));
        let ids: BTreeSet<&str> = jobs.iter().map(|job| job["id"].as_str().unwrap()).collect();
        assert_eq!(ids.len(), jobs.len());
    }
    let job = &jobs(&one, "verify")[0];
    assert_eq!((&job["request"]["level"], &job["request"]["max_seconds"]), (&"data".into(), &1.into()));
}

#[test]
fn what_was_read_not_long_ago_is_left_alone() {
    let world = world();
    configure(&world, "");
    let served = Served::start(&world);
    let checked = |seconds: u32| {
        let request = json!({"kind": "verify", "level": "data", "older_than_seconds": seconds,
            "rate_bytes_per_second": 1_000_000_000});
        served.do_job(&request)["checked"].as_array().unwrap().len()
    };
    assert_eq!((checked(0), checked(1_000_000)), (3, 0));
    let wrong = served.wait(&served.job(&json!({"kind": "verify", "older_than_seconds": 1})));
    assert_eq!((&wrong["state"], &wrong["error"]["code"]), (&"failed".into(), &"usage".into()));
}

#[test]
fn trash_that_is_due_goes_by_itself() {
    let world = world();
    configure(&world, "[schedule]\npurge_every = \"1s\"\n");
    let served = Served::start(&world);
    served.do_job(&json!({"kind": "delete", "members": ["b"], "assume_deleted": true, "now": true,
        "retention_seconds": 1}));
    let begun = Instant::now();
    loop {
        let text = String::from_utf8(served.get("/metrics").body).unwrap();
        if text.contains("qchain_open_operations{store=\"s1\"} 0\n") {
            break;
        }
        assert!(begun.elapsed() < LONG, "{text}");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(fs::read_dir(world.root().join(".qchain/trash")).unwrap().next().is_none());
}

/// The rows of the chain; b in that state.
fn rows(world: &World, of_b: &str) -> String {
    text(&write_rows(world, &[("a", "Ready"), ("b", of_b), ("c", "Ready")])).to_owned()
}

#[test]
fn what_cloudstack_deleted_is_told_and_then_merged() {
    let world = world();
    let rows = rows(&world, "Hidden");
    let more = |reclaim: &str| {
        format!("[schedule]\nrecords = {rows:?}\nreclaim_every = \"1s\"\n[policy]\nreclaim = \"{reclaim}\"\n")
    };
    configure(&world, &more("report"));
    let served = Served::start(&world);
    let told = done(&served, "reclaim", 1);
    let job = served.get(&format!("/v1/jobs/{}", told[0]["id"].as_str().unwrap())).is(200);
    assert_eq!(job["request"]["dry_run"], true);
    assert_eq!(job["result"]["plan"].as_array().unwrap().len(), 1, "{job}");
    assert_eq!(job["result"]["results"], json!([]));
    let before = fs::metadata(world.member("b")).unwrap().len();
    drop(served);
    configure(&world, &more("auto"));
    let served = Served::start(&world);
    let begun = Instant::now();
    let merged = loop {
        let over = jobs(&served, "reclaim").into_iter().filter(|job| job["state"] == "done");
        let whole = over.map(|job| served.get(&format!("/v1/jobs/{}", job["id"].as_str().unwrap())).is(200));
        let merged = whole.into_iter().find(|job| job["result"]["results"].as_array().unwrap().len() == 1);
        if let Some(job) = merged {
            break job;
        }
        assert!(begun.elapsed() < LONG, "nothing was merged");
    };
    assert_eq!(merged["request"]["dry_run"], false);
    // The name stays, for CloudStack, as an empty image.
    assert!(fs::metadata(world.member("b")).unwrap().len() < before, "{merged}");
}

#[test]
fn a_kill_in_the_middle_of_a_reclaim_is_made_good_by_the_next_service() {
    // Without a pause it is killed once it moves, and does not come to its end.
    for pause in [Some(0), Some(5), Some(15), Some(30), Some(60), Some(120), None] {
        let world = world_of("6M");
        let truth = |name: &str| world.directory.path().join(name);
        for name in ["a", "c"] {
            write_truth(&world.member(name), &truth(name));
        }
        let before = fs::metadata(world.member("b")).unwrap().len();
        configure(&world, &format!("[schedule]\nrecords = {:?}\n", rows(&world, "Hidden")));
        let served = Served::start(&world);
        let request = json!({"kind": "reclaim", "now": true});
        let id = match pause {
            Some(pause) => {
                let id = served.job(&request);
                std::thread::sleep(Duration::from_millis(pause));
                id
            }
            None => served.running(&request),
        };
        served.kill();
        for name in ["a", "c"] {
            same(&world.member(name), &truth(name));
        }
        let next = Served::start(&world);
        let job = next.wait(&id);
        assert_eq!(job["state"], "done", "{job}");
        // The name stays, for CloudStack, as an empty image.
        assert!(fs::metadata(world.member("b")).unwrap().len() < before, "{pause:?}: {job}");
        for name in ["a", "c"] {
            same(&world.member(name), &truth(name));
        }
        let (exit, verified) = world.run(&["verify", "--level", "data"]);
        assert_eq!(exit, 0, "{verified}");
        assert_eq!(fs::read_dir(world.root().join(".qchain/tmp")).unwrap().count(), 0, "{pause:?}");
    }
}

#[test]
fn deletes_and_audits_ask_the_rows_of_the_configuration() {
    let world = world();
    let delete = json!({"kind": "delete", "members": ["b"], "now": true});
    let with_rows = |of_b: &str| {
        configure(&world, &format!("[schedule]\nrecords = {:?}\n", rows(&world, of_b)));
        Served::start(&world)
    };
    let served = with_rows("Ready");
    assert_eq!(served.do_job(&json!({"kind": "audit"}))["findings"], json!([]));
    let refused = served.wait(&served.job(&delete));
    let said = refused["error"]["message"].as_str().unwrap();
    assert_eq!((&refused["state"], &refused["error"]["code"]), (&"failed".into(), &"not-deletable".into()));
    assert!(said.contains("CloudStack's records show it as Ready"), "{said}");
    assert!(world.member("b").exists());
    drop(served);
    let served = with_rows("Hidden");
    served.do_job(&delete);
    assert!(!world.member("b").exists());
    drop(served);
    // A row that lost its file is what an audit is for; a file of rows that is gone is said, and nothing is guessed.
    let served = with_rows("Ready");
    let audit = served.do_job(&json!({"kind": "audit"}));
    let codes: Vec<&str> =
        audit["findings"].as_array().unwrap().iter().filter_map(|one| one["code"].as_str()).collect();
    assert!(codes.contains(&"row-without-file"), "{audit}");
    fs::remove_file(world.directory.path().join("rows.tsv")).unwrap();
    for request in [json!({"kind": "audit"}), json!({"kind": "delete", "members": ["a"]})] {
        let job = served.wait(&served.job(&request));
        let said = job["error"]["message"].as_str().unwrap_or_default();
        assert!(job["state"] == "failed" && said.contains("rows.tsv"), "{job}");
    }
}

#[test]
fn the_configuration_says_what_is_begun() {
    let world = world();
    let config = world.directory.path().join("qchain.toml");
    let check = |more: &str| {
        configure(&world, more);
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_qchain"))
            .args(["--config", text(&config), "config", "check"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(check("").contains("# schedule: none"));
    let all = check(
        "[schedule]\nverify_within = \"30d\"\nverify_rate = \"50MiB/s\"\npurge_every = \"1h\"\nwindow = \"01:00-05:00\"\n\
         [policy]\nreclaim = \"auto\"\n",
    );
    for part in ["within 30days", "50.0 MiB a second", "ends what is due every 1h", "from 01:00-05:00 UTC"] {
        assert!(all.contains(part), "{part}: {all}");
    }
    // Without rows nothing can be reclaimed: that is told at the start.
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_qchain"))
        .args(["--config", text(&config), "serve", "--listen", "127.0.0.1:0"])
        .env_remove("QCHAIN_DATABASE")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}
