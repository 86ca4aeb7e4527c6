//! The service over HTTP: each route, each refusal, who may do what.

use std::fs;
use std::io::Write as _;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::support::service::{ADMIN, OPERATE, READ, Served, configure};
use super::support::world::{World, listing};

/// a <- b <- {c, d}, opted in, served.
fn served() -> (World, Served) {
    let world = World::forked();
    assert_eq!(world.run(&["init"]).0, 0);
    configure(&world, "");
    let served = Served::start(&world);
    (world, served)
}

fn path(name: &str) -> String {
    format!("snapshots/2/7/{name}")
}

#[test]
fn chains_and_members_are_those_of_the_command_line() {
    let (world, served) = served();
    let config = world.directory.path().join("qchain.toml");
    let (_, listed) = world.run(&["list", "--config", config.to_str().unwrap()]);
    let chains = served.get("/v1/chains").is(200);
    assert_eq!(chains["schema"], 1);
    assert_eq!((&chains["chains"], &chains["next"]), (&listed["chains"], &Value::Null));
    assert_eq!(served.get("/v1/chains?prefix=snapshots/3/").is(200)["chains"], json!([]));
    let first = served.get("/v1/members?limit=3").is(200);
    let names = |page: &Value| -> Vec<String> {
        let members = page["members"].as_array().unwrap();
        members.iter().map(|member| member["member"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&first), ["a", "b", "c"].map(path));
    let next = first["next"].as_str().unwrap();
    let second = served.get(&format!("/v1/members?limit=3&after={next}")).is(200);
    assert_eq!((names(&second), &second["next"]), (vec![path("d")], &Value::Null));
    assert_eq!(names(&served.get("/v1/members?state=damaged").is(200)), Vec::<String>::new());
    // One member, in CloudStack's words too.
    for name in [path("c"), "c".to_owned(), path("c").replace('/', "%2F")] {
        let member = served.get(&format!("/v1/members/{name}")).is(200);
        let length = fs::metadata(world.member("c")).unwrap().len();
        assert_eq!(member["row"]["physical_size"], length);
        assert_eq!(member["row"]["virtual_size"], 10 << 20);
        assert_eq!(member["row"]["install_path"], path("c"));
        assert_eq!((&member["parent"], &member["row"]["parent"]), (&path("b").into(), &path("b").into()));
    }
    assert_eq!(served.get("/v1/members/nobody").is(404)["code"], "not-found");
}

#[test]
fn a_plan_is_that_of_a_dry_run_and_changes_nothing() {
    let (world, served) = served();
    let before = listing(&world.root().join("snapshots"));
    let request = json!({"kind": "delete", "members": ["b"], "assume_deleted": true});
    let plan = served.post("/v1/plans", &request).is(200);
    let (_, dry) = world.run(&["delete", "b", "--dry-run", "--assume-deleted", "--now", "--grace", "0"]);
    assert_eq!((&plan["plan"], &plan["results"]), (&dry["plan"], &json!([])));
    assert!(listing(&world.root().join("snapshots")) == before);
    assert_eq!(served.post("/v1/plans", &json!({"kind": "audit"})).is(400)["code"], "unsupported");
    let nobody = json!({"kind": "delete", "members": ["nobody"]});
    assert_eq!(served.post("/v1/plans", &nobody).is(404)["code"], "not-found");
}

#[test]
fn every_request_needs_a_token_that_reaches_far_enough() {
    let (world, served) = served();
    for path in
        ["/v1/chains", "/v1/members", "/v1/members/a", "/v1/jobs", "/v1/limits", "/metrics", "/openapi.json"]
    {
        let answer = served.send_raw("GET", path, "", b"");
        assert_eq!(
            (answer.is(401)["code"].as_str(), answer.header("www-authenticate")),
            (Some("unauthorized"), Some("Bearer"))
        );
        assert_eq!(served.send("GET", path, "wrong-token-0123456789", None).status, 401, "{path}");
        assert_eq!(served.send("GET", path, READ, None).status, 200, "{path}");
    }
    assert_eq!(served.send_raw("GET", "/v1/jobs", "Authorization: Basic cm9vdDo=\r\n", b"").status, 401);
    let verify = json!({"kind": "verify"});
    for path in [
        "/v1/jobs",
        "/v1/plans",
        "/v1/jobs/0123456789abcdef0123456789abcdef/cancel",
        "/v1/cloudstack/DeleteCommand",
    ] {
        let answer = served.send("POST", path, READ, Some(&verify)).is(403);
        assert_eq!(answer["code"], "forbidden", "{path}");
        assert_eq!(served.send_raw("POST", path, "", b"").status, 401);
    }
    let limit = json!({"rate_bytes_per_second": 1_000_000});
    assert_eq!(served.send("PUT", "/v1/limits", OPERATE, Some(&limit)).status, 403);
    assert_eq!(
        served.send("PUT", "/v1/limits", ADMIN, Some(&limit)).is(200)["rate_bytes_per_second"],
        1_000_000
    );
    assert_eq!(served.get("/v1/limits").is(200)["rate_bytes_per_second"], 1_000_000);
    for path in ["/healthz", "/readyz"] {
        assert_eq!(served.send_raw("GET", path, "", b"").is(200)["status"], "ok", "{path}");
    }
    // A token that is taken away is not known any more; a file that is no good changes nothing.
    let tokens = world.directory.path().join("tokens");
    fs::write(&tokens, "nonsense").unwrap();
    served.signal(Signal::HUP);
    assert_eq!(served.get("/v1/limits").status, 200);
    fs::write(&tokens, format!("root admin {ADMIN}\n")).unwrap();
    served.signal(Signal::HUP);
    let begun = std::time::Instant::now();
    while served.get("/v1/limits").status != 401 {
        assert!(begun.elapsed() < super::support::service::LONG);
    }
    let log = fs::read_to_string(world.directory.path().join("log")).unwrap();
    for secret in [READ, OPERATE, ADMIN] {
        assert!(!log.contains(secret), "a token is in the log");
    }
    assert!(log.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{log}");
}

/// Method, path, head, body; the status and the code of the answer.
type Case<'a> = (&'a str, &'a str, &'a str, Vec<u8>, u16, &'a str);

#[test]
fn what_is_no_request_is_a_problem() {
    let (_world, served) = served();
    let auth = format!("Authorization: Bearer {OPERATE}\r\n");
    let json = format!("{auth}Content-Type: application/json\r\n");
    let cases: [Case<'_>; 12] = [
        ("GET", "/nothing", &auth, vec![], 404, "not-found"),
        ("DELETE", "/v1/jobs", &auth, vec![], 405, "usage"),
        ("GET", "/v1/jobs?limit=0", &auth, vec![], 400, "usage"),
        ("GET", "/v1/jobs?colour=red", &auth, vec![], 400, "usage"),
        ("GET", "/v1/jobs?state=sleepy", &auth, vec![], 400, "usage"),
        ("GET", "/v1/jobs/..%2f..%2fetc", &auth, vec![], 404, "not-found"),
        ("GET", "/v1/jobs/0123456789abcdef0123456789abcdef", &auth, vec![], 404, "not-found"),
        ("GET", "/v1/jobs/0123456789abcdef0123456789abcdef/events", &auth, vec![], 404, "not-found"),
        ("POST", "/v1/jobs", &auth, b"{}".to_vec(), 415, "usage"),
        ("POST", "/v1/jobs", &json, b"{".to_vec(), 400, "usage"),
        ("POST", "/v1/jobs", &json, b"{\"kind\": \"delete\", \"members\": []}".to_vec(), 400, "usage"),
        ("POST", "/v1/jobs", &json, vec![b' '; (1 << 20) + 1], 413, "too-large"),
    ];
    for (method, path, head, body, status, code) in cases {
        let answer = served.send_raw(method, path, head, &body);
        let problem = answer.is(status);
        assert_eq!(problem["code"], code, "{method} {path}: {problem}");
        assert_eq!(problem["status"], status);
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
        assert!(answer.header("x-request-id").is_some());
    }
    let named = served.send_raw("GET", "/healthz", "X-Request-Id: mine-1\r\n", b"");
    assert_eq!(named.header("x-request-id"), Some("mine-1"));
    // A head without end, and one that is too long.
    let mut stream = served.connect();
    let _ = stream.write_all(format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(1 << 20)).as_bytes());
    assert_eq!(super::support::service::read(stream).status, 431);
}

#[test]
fn the_description_is_the_one_checked_in() {
    let (_world, served) = served();
    let found = served.get("/openapi.json").is(200);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/src/service/openapi.json");
    let text = format!("{}\n", serde_json::to_string_pretty(&found).unwrap());
    if std::env::var_os("QCHAIN_WRITE_OPENAPI").is_some() {
        fs::write(file, &text).unwrap();
    }
    assert!(
        fs::read_to_string(file).unwrap_or_default() == text,
        "the service describes itself otherwise: run this test with QCHAIN_WRITE_OPENAPI=1 and look at the difference"
    );
    for (path, item) in found["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            assert!(
                operation["responses"]["200"].is_object() || operation["responses"]["202"].is_object(),
                "{method} {path}"
            );
            assert!(
                operation["summary"].is_string() || operation["description"].is_string(),
                "{method} {path}"
            );
        }
    }
}

#[test]
fn health_fails_without_the_store_and_comes_back_with_it() {
    let (world, served) = served();
    assert_eq!(served.get("/readyz").is(200)["stores"][0]["ready"], true);
    let (root, away) = (world.root(), world.directory.path().join("away"));
    let wait = |path: &str, status: u16| {
        let begun = std::time::Instant::now();
        loop {
            let answer = served.send_raw("GET", path, "", b"");
            if answer.status == status {
                return answer.json();
            }
            assert!(begun.elapsed() < super::support::service::LONG, "{path}");
        }
    };
    // As when it is unmounted: the directory is there, and empty.
    fs::rename(&root, &away).unwrap();
    fs::create_dir(&root).unwrap();
    for path in ["/healthz", "/readyz"] {
        let report = wait(path, 503);
        assert_eq!(report["status"], "stores");
        assert!(report["stores"][0]["detail"].as_str().unwrap().contains("store.json"), "{report}");
    }
    let refused = served.post("/v1/jobs", &json!({"kind": "verify"})).is(409);
    assert_eq!(refused["code"], "not-initialised");
    fs::remove_dir(&root).unwrap();
    fs::rename(&away, &root).unwrap();
    wait("/readyz", 200);
    let text = String::from_utf8(served.get("/metrics").body).unwrap();
    for line in [
        "qchain_store_up{store=\"s1\"} 1",
        "qchain_jobs{kind=\"delete\",state=\"queued\"} 0",
        "qchain_errors_total{code=\"not-initialised\"} 1",
        "# EOF",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}
