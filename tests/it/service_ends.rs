//! The service ends, in good order or by a power cut, in the middle of each kind of job: the next one brings it to its end.

use std::fs;
use std::io::Write as _;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::support::chains::write_truth;
use super::support::service::{LONG, READ, Served, configure, read, same};
use super::support::world::World;

/// a <- b <- {c, d} with something in it, opted in, adopted, served; nothing is in the way of a deletion.
fn served() -> (World, Served) {
    let world = World::forked();
    super::support::qemu::io(&world.member("b"), &["write -P 9 3M 4M"]);
    for name in ["a", "b", "c", "d"] {
        write_truth(&world.member(name), &world.directory.path().join(name));
    }
    assert_eq!(world.run(&["init"]).0, 0);
    assert_eq!(world.run(&["adopt", "--now"]).0, 0);
    configure(&world, "");
    let served = Served::start(&world);
    (world, served)
}

fn requests() -> [Value; 3] {
    [
        json!({"kind": "delete", "members": ["b"], "assume_deleted": true, "mode": "copy"}),
        json!({"kind": "verify", "level": "data"}),
        json!({"kind": "flatten", "member": "c", "to": {"template": "2/201/made"}}),
    ]
}

/// What a job of [`requests`] must have come to.
fn holds(world: &World, job: &Value) {
    assert_eq!(job["state"], "done", "{job}");
    let truth = |name: &str| world.directory.path().join(name);
    let gone = job["kind"] == "delete";
    assert_eq!(world.member("b").exists(), !gone);
    for name in ["a", "c", "d"] {
        same(&world.member(name), &truth(name));
    }
    match job["kind"].as_str().unwrap() {
        "delete" => assert_eq!(job["result"]["survivors"].as_array().unwrap().len(), 2, "{job}"),
        "flatten" => same(&world.root().join("template/tmpl/2/201/made.qcow2"), &truth("c")),
        _ => {
            let checked = job["result"]["checked"].as_array().unwrap();
            assert!(checked.len() == 4 && checked.iter().all(|one| one["verdict"] == "sound"), "{job}");
        }
    }
    let (exit, audited) = world.run(&["verify", "--level", "data"]);
    assert_eq!(exit, 0, "{audited}");
    let left = fs::read_dir(world.root().join(".qchain/tmp")).unwrap().count();
    assert!(gone || left <= 1, "a temporary may be left where a flatten was cut off, no more: {left}");
}

#[test]
fn a_kill_in_the_middle_of_a_job_is_made_good_by_the_next_service() {
    for request in requests() {
        for pause in [0, 40, 300] {
            let (world, served) = served();
            let id = served.running(&request);
            std::thread::sleep(Duration::from_millis(pause));
            served.kill();
            let next = Served::start(&world);
            let job = next.wait(&id);
            assert!(job["attempts"].as_u64() >= Some(1), "{job}");
            holds(&world, &job);
            assert!(next.terminate() < Duration::from_secs(30));
        }
    }
}

#[test]
fn a_kill_in_the_middle_of_an_adopt_audit_or_recover_is_made_good_by_the_next_service() {
    for kind in ["adopt", "audit", "recover"] {
        for pause in [0, 3, 10, 30, 100] {
            let (world, served) = served();
            let request = if kind == "adopt" {
                for kept in ["manifests", "leaves"] {
                    for file in fs::read_dir(world.root().join(".qchain").join(kept)).unwrap() {
                        fs::remove_file(file.unwrap().path()).unwrap();
                    }
                }
                served.limit(2_000_000);
                json!({"kind": kind, "now": true})
            } else {
                json!({"kind": kind})
            };
            let id = served.job(&request);
            std::thread::sleep(Duration::from_millis(pause));
            served.kill();
            let next = Served::start(&world);
            let job = next.wait(&id);
            assert_eq!(job["state"], "done", "{job}");
            let (exit, verified) = world.run(&["verify", "--level", "data"]);
            assert_eq!(exit, 0, "{verified}");
            let checked = verified["checked"].as_array().unwrap();
            assert!(checked.len() == 4 && checked.iter().all(|one| one["verdict"] == "sound"), "{verified}");
            for name in ["a", "b", "c", "d"] {
                same(&world.member(name), &world.directory.path().join(name));
            }
            assert_eq!(fs::read_dir(world.root().join(".qchain/tmp")).unwrap().count(), 0, "{kind} {pause}");
        }
    }
}

#[test]
fn a_kill_after_the_decision_of_a_delete_counts_as_done() {
    // Without a limit the kill falls anywhere, before or behind the decision and the record of the job's end.
    for pause in [5, 15, 25, 35, 50, 70, 100, 150] {
        let (world, served) = served();
        let [request, ..] = requests();
        let id = served.job(&request);
        std::thread::sleep(Duration::from_millis(pause));
        served.kill();
        let next = Served::start(&world);
        holds(&world, &next.wait(&id));
    }
}

#[test]
fn a_service_that_is_told_to_end_does_so_soon_and_the_next_continues() {
    for request in requests() {
        let (world, served) = served();
        let id = served.running(&request);
        // One that watches, and one connection that does nothing, do not hold it up.
        let mut watcher = served.connect();
        let head =
            format!("GET /v1/jobs/{id}/events HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {READ}\r\n\r\n");
        watcher.write_all(head.as_bytes()).unwrap();
        // It watches once it has been told something.
        assert_eq!(watcher.peek(&mut [0]).unwrap(), 1);
        let _idle = served.connect();
        let took = served.terminate();
        assert!(took < Duration::from_secs(30), "{took:?}");
        assert_eq!(read(watcher).status, 200);
        let next = Served::start(&world);
        let job = next.wait(&id);
        assert_eq!(job["attempts"], 1, "a stop in good order is no failed attempt: {job}");
        holds(&world, &job);
    }
}

#[test]
fn two_services_on_one_store_do_each_job_once() {
    let (world, first) = served();
    let second = Served::start(&world);
    first.limit(1 << 20);
    second.limit(1 << 20);
    let ids: Vec<String> = (0..6)
        .map(|at| {
            let at_whom = if at % 2 == 0 { &first } else { &second };
            at_whom
                .job(&json!({"kind": "flatten", "member": "c", "to": {"template": format!("2/30{at}/made")}}))
        })
        .collect();
    for id in &ids {
        for served in [&first, &second] {
            let job = served.wait(id);
            assert_eq!((&job["state"], &job["attempts"]), (&json!("done"), &json!(1)), "{job}");
        }
    }
    // What one is asked to stop the other stops.
    first.limit(1000);
    let id = first.job(&json!({"kind": "verify", "level": "data"}));
    first.wait_for(&id, |job| job["state"] == "running");
    second.post(&format!("/v1/jobs/{id}/cancel"), &json!({})).is(202);
    assert_eq!(first.wait(&id)["state"], "cancelled");
    // One that dies is stood in for by the other.
    first.limit(1000);
    second.limit(0);
    let id = first.job(&json!({"kind": "verify", "level": "data"}));
    first.kill();
    let job = second.wait(&id);
    assert_eq!(job["state"], "done", "{job}");
}

#[test]
fn records_that_are_none_harm_nobody() {
    let (world, served) = served();
    let id = served.job(&json!({"kind": "audit"}));
    served.wait(&id);
    drop(served);
    let jobs = world.root().join(".qchain/jobs");
    let good = fs::read_to_string(jobs.join(format!("{id}.json"))).unwrap();
    let other = "0123456789abcdef0123456789abcdef";
    for (name, text) in [
        (format!("{other}.json"), good.clone()),
        ("1123456789abcdef0123456789abcdef.json".to_owned(), "[".repeat(100_000)),
        ("2123456789abcdef0123456789abcdef.json".to_owned(), "\0".repeat(2 << 20)),
        ("3123456789abcdef0123456789abcdef.lease".to_owned(), "x".to_owned()),
        ("nonsense".to_owned(), String::new()),
    ] {
        fs::write(jobs.join(name), text).unwrap();
    }
    // A kind of a later version's, and a request that is none.
    for (number, from, to) in [
        (4, "\"kind\":\"audit\",\"request\"", "\"kind\":\"dig\",\"request\""),
        (5, "{\"kind\":\"audit\"}", "{\"kind\":\"dig\"}"),
    ] {
        let id_of = format!("{number}123456789abcdef0123456789abcdef");
        let text = good.replace(&id, &id_of).replace("\"state\":\"done\"", "\"state\":\"queued\"");
        assert!(text.contains(from), "{text}");
        fs::write(jobs.join(format!("{id_of}.json")), text.replace(from, to)).unwrap();
    }
    let served = Served::start(&world);
    let job = served.wait("5123456789abcdef0123456789abcdef");
    assert_eq!((&job["state"], &job["error"]["kind"]), (&json!("failed"), &json!("usage")), "{job}");
    assert_eq!(served.get(&format!("/v1/jobs/{id}")).is(200)["state"], "done");
    assert_eq!(served.get(&format!("/v1/jobs/{other}")).status, 404);
    let begun = Instant::now();
    while jobs.join("3123456789abcdef0123456789abcdef.lease").exists() {
        assert!(begun.elapsed() < LONG, "what belongs to no job was not swept");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(jobs.join("nonsense").exists() && jobs.join(format!("{other}.json")).exists());
}
