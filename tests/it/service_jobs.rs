//! Jobs: each kind does what the command line does; keys, lists, watching, stopping.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::support::chains::write_truth;
use super::support::service::{ADMIN, LONG, OPERATE, READ, Served, configure, same};
use super::support::world::World;

fn path(name: &str) -> String {
    format!("snapshots/2/7/{name}")
}

/// a <- b <- {c, d}, opted in, served; the truth of each beside the store.
fn served(more: &str) -> (World, Served) {
    let world = World::forked();
    assert_eq!(world.run(&["init"]).0, 0);
    for name in ["a", "b", "c", "d"] {
        write_truth(&world.member(name), &world.directory.path().join(name));
    }
    configure(&world, more);
    let served = Served::start(&world);
    (world, served)
}

fn is_true(world: &World, names: &[&str]) {
    for name in names {
        same(&world.member(name), &world.directory.path().join(name));
    }
}

fn delete(member: &str) -> Value {
    json!({"kind": "delete", "members": [member], "assume_deleted": true, "end_of_chain": true})
}

#[test]
fn each_kind_ends_with_the_document_of_the_command_line() {
    let (world, served) = served("exports = \"EXPORTS\"\n");
    let verified = served.do_job(&json!({"kind": "verify", "level": "structure"}));
    let (_, by_hand) = world.run(&["verify"]);
    assert_eq!(verified["checked"], by_hand["checked"]);
    let adopted = served.do_job(&json!({"kind": "adopt", "now": true}));
    assert_eq!(adopted["adopted"].as_array().unwrap().len(), 4, "{adopted}");
    let data = served.do_job(&json!({"kind": "verify", "level": "data", "members": ["c"]}));
    assert_eq!(
        (&data["checked"][0]["verdict"], &data["checked"][0]["member"]),
        (&json!("sound"), &path("c").into())
    );
    let audited = served.do_job(&json!({"kind": "audit"}));
    assert!(audited["totals"]["accounts"].is_array());
    assert_eq!(served.do_job(&json!({"kind": "recover"}))["recovered"], json!([]));
    let flat = served.do_job(&json!({"kind": "flatten", "member": "d", "to": {"template": "2/201/made"}}));
    assert_eq!(flat["output"], "template/tmpl/2/201/made.qcow2", "{flat}");
    same(&world.root().join("template/tmpl/2/201/made.qcow2"), &world.directory.path().join("d"));
    let removed = served.do_job(&delete("b"));
    assert_eq!(removed["schema"], 1);
    assert!(!world.member("b").exists());
    is_true(&world, &["a", "c", "d"]);
    let survivors: Vec<&str> = removed["survivors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["install_path"].as_str().unwrap())
        .collect();
    assert_eq!(survivors, [path("c"), path("d")], "{removed}");
    let length = fs::metadata(world.member("c")).unwrap().len();
    assert_eq!(
        (&removed["survivors"][0]["physical_size"], &removed["survivors"][0]["parent"]),
        (&length.into(), &path("a").into())
    );
    let all = served.get("/v1/jobs").is(200);
    assert_eq!(all["jobs"].as_array().unwrap().len(), 7);
    assert!(
        all["jobs"]
            .as_array()
            .unwrap()
            .iter()
            .all(|job| job["state"] == "done" && job.get("result").is_none())
    );
    let page = served.get("/v1/jobs?limit=1&kind=verify&state=done").is(200);
    assert_eq!(page["jobs"][0]["request"]["level"], "structure");
    let next = served.get(&format!("/v1/jobs?kind=verify&after={}", page["next"].as_str().unwrap())).is(200);
    assert_eq!((next["jobs"].as_array().unwrap().len(), &next["next"]), (1, &Value::Null));
    let text = String::from_utf8(served.get("/metrics").body).unwrap();
    assert!(text.contains("qchain_jobs_finished_total{kind=\"delete\",state=\"done\"} 1"), "{text}");
}

#[test]
fn images_leave_the_stores_only_for_the_directory_of_exports() {
    let (world, served) = served("");
    let export = json!({"kind": "flatten", "member": "c", "format": "raw", "to": {"export": "c.raw"}});
    let job = served.wait(&served.job(&export));
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("unsupported")), "{job}");
    drop(served);
    let exports = world.directory.path().join("exports");
    fs::create_dir(&exports).unwrap();
    configure(&world, &format!("exports = \"{}\"\n", exports.display()));
    let served = Served::start(&world);
    served.do_job(&export);
    let raw = fs::read(world.directory.path().join("c")).unwrap();
    assert!(fs::read(exports.join("c.raw")).unwrap() == raw);
    let again = served.wait(&served.job(&export));
    assert_eq!(again["error"]["code"], "target-exists");
    for name in ["../outside", ".hidden", "a/b", ""] {
        let job =
            served.wait(&served.job(&json!({"kind": "flatten", "member": "c", "to": {"export": name}})));
        assert_eq!(
            (&job["state"], &job["error"]["kind"]),
            (&json!("failed"), &json!("usage")),
            "{name}: {job}"
        );
    }
    assert_eq!(fs::read_dir(&exports).unwrap().count(), 1);
}

#[test]
fn failures_have_the_codes_of_the_command_line() {
    let (world, served) = served("");
    for (request, status, code) in [
        (delete("nobody"), 404, "not-found"),
        (delete(""), 400, "usage"),
        (json!({"kind": "flatten", "member": "snapshots/", "to": "temporary"}), 400, "usage"),
        (
            json!({"kind": "delete", "members": [{"store_url": "nfs://192.0.2.99/x", "install_path": path("b")}]}),
            404,
            "not-found",
        ),
        (json!({"kind": "delete", "members": [{"store_url": "x", "install_path": path("b")}]}), 400, "usage"),
    ] {
        assert_eq!(served.post("/v1/jobs", &request).is(status)["code"], code, "{request}");
    }
    for (request, code) in [
        (json!({"kind": "delete", "members": ["b"]}), "not-deletable"),
        (json!({"kind": "delete", "members": ["c"], "assume_deleted": true}), "end-of-chain"),
        (json!({"kind": "verify", "fraction": 0.5}), "usage"),
        (json!({"kind": "verify", "level": "data", "fraction": 0.0}), "usage"),
        (json!({"kind": "flatten", "member": "c", "to": {"template": "nonsense"}}), "usage"),
        (
            json!({"kind": "flatten", "member": "c", "to": {"volume": "2/9/x"}, "format": "raw", "compress": "zstd"}),
            "usage",
        ),
        (
            json!({"kind": "flatten", "member": "c", "to": {"volume": "2/9/x"}, "cluster_bytes": 1000}),
            "usage",
        ),
        (json!({"kind": "recover", "thaw": "0123"}), "not-found"),
    ] {
        let job = served.wait(&served.job(&request));
        let error =
            if job["error"].is_null() { &job["result"]["refused"][0]["error"] } else { &job["error"] };
        assert_eq!((&job["state"], &error["code"]), (&json!("failed"), &json!(code)), "{job}");
    }
    is_true(&world, &["a", "b", "c", "d"]);
    drop(served);
    let served = Served::start_with(&world, &["--read-only"]);
    assert_eq!(served.post("/v1/jobs", &delete("b")).is(409)["code"], "read-only");
    served.do_job(&json!({"kind": "verify"}));
}

#[test]
fn a_key_makes_one_job() {
    let (world, served) = served("");
    let head = |token: &str| {
        format!(
            "Authorization: Bearer {token}\r\nContent-Type: application/json\r\nIdempotency-Key: delete-b\r\n"
        )
    };
    let named = json!({"kind": "delete", "assume_deleted": true, "members": [{
        "store_url": super::support::service::URL, "install_path": path("b"), "checkpoint_path": ""}]});
    let send = |token: &str, body: &Value| {
        served.send_raw("POST", "/v1/jobs", &head(token), body.to_string().as_bytes())
    };
    let first = send(OPERATE, &named);
    let made = first.is(202);
    let id = made["id"].as_str().unwrap();
    assert_eq!(first.header("location"), Some(format!("/v1/jobs/{id}").as_str()));
    assert_eq!(made["request"]["members"], json!([path("b")]));
    assert_eq!(send(OPERATE, &named).is(200)["id"], id);
    served.wait(id);
    // Long after, when the member is gone; the answer is still the job.
    let again = send(OPERATE, &named).is(200);
    assert_eq!((&again["id"], &again["state"]), (&json!(id), &json!("done")));
    assert_eq!(send(OPERATE, &json!({"kind": "audit"})).is(422)["code"], "key-reused");
    assert_ne!(send(ADMIN, &json!({"kind": "audit"})).is(202)["id"], id, "a key is its token's own");
    assert_eq!(
        served
            .send_raw(
                "POST",
                "/v1/jobs",
                &head(OPERATE).replace("delete-b", &"x".repeat(300)),
                b"{\"kind\":\"audit\"}"
            )
            .status,
        400
    );
    is_true(&world, &["a", "c", "d"]);
}

/// Watches a job to its end; the events as (name, job).
fn watch(served: &Served, id: &str) -> Vec<(String, Value)> {
    watch_until(served, id, |_| false)
}

/// The same until an event is as wanted, which is the last one then.
fn watch_until(served: &Served, id: &str, wanted: impl Fn(&Value) -> bool) -> Vec<(String, Value)> {
    let mut stream = served.connect();
    let head = format!(
        "GET /v1/jobs/{id}/events HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {READ}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    let (mut events, mut name) = (Vec::new(), String::new());
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        if let Some(text) = line.strip_prefix("event: ") {
            text.clone_into(&mut name);
        } else if let Some(text) = line.strip_prefix("data: ") {
            let job = serde_json::from_str(text).unwrap();
            let last = wanted(&job);
            events.push((name.clone(), job));
            if last {
                break;
            }
        }
    }
    events
}

#[test]
fn a_job_is_watched_to_its_end() {
    let (_world, served) = served("");
    served.do_job(&json!({"kind": "adopt", "now": true}));
    // So slow that there is something to be seen.
    served.limit(4 << 20);
    let id = served.job(&json!({"kind": "verify", "level": "data"}));
    let events = watch(&served, &id);
    let (name, last) = events.last().unwrap();
    assert_eq!((name.as_str(), &last["state"]), ("end", &json!("done")), "{events:?}");
    assert!(last["result"]["checked"].is_array());
    let pulse =
        events.iter().map(|(_, job)| &job["progress"]).find(|progress| progress["total"].as_u64() > Some(0));
    let pulse = pulse.unwrap_or_else(|| panic!("no progress: {events:?}"));
    assert!(pulse["phase"].is_string() && pulse["rate_per_second"].is_u64(), "{pulse}");
    // One that is over tells that at once.
    assert_eq!(watch(&served, &id).len(), 1);
}

#[test]
fn a_job_is_watched_at_another_instance() {
    let (world, first) = served("");
    first.do_job(&json!({"kind": "adopt", "now": true}));
    first.send("PUT", "/v1/limits", ADMIN, Some(&json!({"rate_bytes_per_second": 10_000}))).is(200);
    let id = first.job(&json!({"kind": "verify", "level": "data"}));
    let moves = |job: &Value| job["state"] == "running" && job["progress"]["total"].as_u64() > Some(0);
    first.wait_for(&id, moves);
    let second = Served::start(&world);
    let events = watch_until(&second, &id, moves);
    let (name, heard) = events.last().unwrap();
    assert!(name == "job" && moves(heard), "{events:?}");
    assert_eq!(
        second.get(&format!("/v1/jobs/{id}")).is(200)["progress"]["phase"],
        heard["progress"]["phase"]
    );
    let note = world.root().join(format!(".qchain/jobs/{id}.progress"));
    assert!(note.exists());
    second.post(&format!("/v1/jobs/{id}/cancel"), &json!({})).is(202);
    let ended = watch(&second, &id);
    assert_eq!(ended.last().unwrap().1["state"], "cancelled", "{ended:?}");
    assert_eq!(ended.last().unwrap().1["progress"], Value::Null);
    let begun = Instant::now();
    while note.exists() {
        assert!(begun.elapsed() < LONG, "the note of its progress stays");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_job_is_stopped_while_it_waits_and_while_it_runs() {
    let (world, served) = served("[limits]\njobs = 1\n");
    served.do_job(&json!({"kind": "adopt", "now": true}));
    served.limit(1000);
    let runs = served.job(&json!({"kind": "verify", "level": "data"}));
    served.wait_for(&runs, |job| job["state"] == "running");
    let waits = served.job(&delete("b"));
    let cancel = |id: &str| served.post(&format!("/v1/jobs/{id}/cancel"), &json!({})).is(202);
    assert_eq!(cancel(&waits)["state"], "cancelled");
    assert_eq!(served.get(&format!("/v1/jobs/{runs}")).is(200)["state"], "running");
    cancel(&runs);
    assert_eq!(served.wait(&runs)["state"], "cancelled");
    // What is over stays as it is.
    assert_eq!(cancel(&runs)["state"], "cancelled");
    served.limit(0);
    served.do_job(&delete("b"));
    assert_eq!(served.post("/v1/jobs/0123456789abcdef0123456789abcdef/cancel", &json!({})).status, 404);
    is_true(&world, &["a", "c", "d"]);
}
