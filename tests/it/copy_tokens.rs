//! Tokens of other zones: what they are good for, and that whatever else is shown or asked for is refused with its code and leaves
//! nothing.

use std::fs;
use std::time::Instant;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::support::qemu::must;
use super::support::service::{LONG, OPERATE, READ, Served};
use super::support::world::World;
use super::support::zones::{PEER, adopt, giving, know, path, pull, same_as, serve, taking, temporaries};

/// The token that is good for the members of account 2 alone.
const OF_TWO: &str = "peer-of-account-2-0123456789";
/// A member of account 7.
const OF_SEVEN: &str = "snapshots/7/1/x";

/// A zone with members of two accounts.
fn east() -> (World, Served) {
    let east = giving(World::forked(), &["a", "b", "c", "d"]);
    let seven = east.root().join("snapshots/7/1");
    fs::create_dir_all(&seven).unwrap();
    must("qemu-img", &["create", "-q", "-f", "qcow2", seven.join("x").to_str().unwrap(), "1M"]);
    adopt(&east);
    let served = serve(&east, "");
    let tokens = east.directory.path().join("tokens");
    let known = fs::read_to_string(&tokens).unwrap();
    fs::write(&tokens, format!("{known}two peer:2 {OF_TWO}\n")).unwrap();
    served.signal(Signal::HUP);
    let begun = Instant::now();
    while ask(&served, "c", OF_TWO).0 != 200 {
        assert!(begun.elapsed() < LONG, "the token is not known");
    }
    (east, served)
}

/// Asks for a line; the status, and the code of a refusal.
fn ask(served: &Served, member: &str, token: &str) -> (u16, Value) {
    let member = if member.contains('/') { member.to_owned() } else { path(member) };
    let answer = served.send("GET", &format!("/v1/peer/chain?member={member}"), token, None);
    (answer.status, answer.json()["code"].clone())
}

#[test]
fn a_token_is_good_for_what_it_says_and_nothing_else() {
    let (east, served) = east();
    let line = served.send("GET", &format!("/v1/peer/chain?member={}", path("a")), PEER, None).is(200);
    let digest = line["members"][0]["view_digest"].as_str().unwrap().to_owned();
    let table = line["members"][0]["table_blake3"].as_str().unwrap().to_owned();
    let other = served.send("GET", &format!("/v1/peer/chain?member={OF_SEVEN}"), PEER, None).is(200);
    let other_digest = other["members"][0]["view_digest"].as_str().unwrap().to_owned();
    let blocks = |member: &str, digest: &str| json!({"member": member, "digest": digest, "ranges": [[0, 1]], "plain": true});
    let table_of = |member: &str, digest: &str| {
        format!("GET /v1/peer/table?member={member}&digest={digest}&table={table}&offset=0&length=16")
    };
    let chain_of = |member: &str| format!("GET /v1/peer/chain?member={member}");
    let checkpoint_of =
        |member: &str| format!("GET /v1/peer/checkpoint?member={member}&digest={other_digest}");
    // What is asked with which token, and the status and the code of the refusal.
    let refused = |what: &str, token: &str, target: &str, body: Option<Value>, status: u16, code: &str| {
        let (method, target) = target.split_once(' ').unwrap();
        let answer = served.send(method, target, token, body.as_ref());
        assert_eq!((answer.status, &answer.json()["code"]), (status, &json!(code)), "{what}");
        let detail = answer.json()["detail"].to_string();
        assert!(!detail.contains(&digest) && !detail.contains(&other_digest), "{what}: {detail}");
    };
    let a = path("a");
    for (what, token, status, code) in [
        ("no token", "", 401, "unauthorized"),
        ("a token to read", READ, 403, "forbidden"),
        ("its name", "west", 401, "unauthorized"),
    ] {
        refused(what, token, &chain_of(&a), None, status, code);
    }
    for target in [
        chain_of(OF_SEVEN),
        chain_of(&format!("s1:{OF_SEVEN}")),
        chain_of("snapshots/7/1/nobody"),
        table_of(OF_SEVEN, &other_digest),
        checkpoint_of(OF_SEVEN),
    ] {
        refused("another account's", OF_TWO, &target, None, 403, "forbidden");
    }
    let post = "POST /v1/peer/blocks";
    refused("its blocks", OF_TWO, post, Some(blocks(OF_SEVEN, &other_digest)), 403, "forbidden");
    // By a member that may be asked for.
    refused("its digest", OF_TWO, post, Some(blocks(&a, &other_digest)), 409, "changed-meanwhile");
    for (target, body) in [
        ("GET /v1/chains", None),
        ("GET /v1/members", None),
        (&*format!("GET /v1/map?member={a}"), None),
        ("GET /v1/debt", None),
        ("GET /v1/jobs", None),
        ("GET /v1/limits", None),
        ("GET /metrics", None),
        ("GET /openapi.json", None),
        ("POST /v1/jobs", Some(json!({"kind": "verify", "members": [a]}))),
        ("POST /v1/plans", Some(json!({"members": [a]}))),
        ("POST /v1/downloads", Some(json!({"member": a}))),
        ("PUT /v1/limits", Some(json!({"rate_bytes_per_second": 1}))),
        ("POST /v1/cloudstack/DeleteCommand", Some(json!({}))),
    ] {
        refused(target, PEER, target, body, 403, "forbidden");
    }
    assert_eq!(ask(&served, "a", OF_TWO).0, 200);
    // None of that was done, and no token is in the log.
    let jobs = served.get("/v1/jobs").is(200);
    assert_eq!(jobs["jobs"], json!([]), "{jobs}");
    let log = fs::read_to_string(east.directory.path().join("log")).unwrap();
    assert!([PEER, OF_TWO, READ, OPERATE].iter().all(|token| !log.contains(token)), "{log}");
}

#[test]
fn an_edited_token_is_none() {
    let (_east, served) = east();
    for at in 0..PEER.len() {
        let mut edited = PEER.as_bytes().to_vec();
        for bit in [1, 4, 32] {
            edited[at] = PEER.as_bytes()[at] ^ bit;
            if edited[at].is_ascii_graphic() {
                let edited = String::from_utf8(edited.clone()).unwrap();
                assert_eq!(ask(&served, "a", &edited), (401, json!("unauthorized")), "{edited}");
            }
        }
    }
    for cut in 1..PEER.len() {
        assert_eq!(ask(&served, "a", &PEER[..cut]).0, 401, "{cut} characters");
        assert_eq!(ask(&served, "a", &PEER[cut..]).0, 401, "without {cut} characters");
    }
    assert_eq!(ask(&served, "a", &format!("{PEER}{PEER}")).0, 401);
    assert_eq!(ask(&served, "a", PEER).0, 200);
}

#[test]
fn refused_copies_leave_nothing() {
    let (east, served) = east();
    let west = taking();
    let url = format!("http://{}", served.address);
    let mut edited = PEER.to_owned();
    edited.replace_range(3..4, "x");
    let cases = [
        ("a token to read", READ, path("c"), "forbidden"),
        ("an edited one", edited.as_str(), path("c"), "unauthorized"),
        ("one of another account", OF_TWO, OF_SEVEN.to_owned(), "forbidden"),
        ("one with too much", &format!("{PEER}x"), path("c"), "unauthorized"),
    ];
    let refused = |what: &str, token: &str, member: &str, code: &str| {
        know(&west, &url, token, "");
        for more in [&["--dry-run"][..], &[], &["--flatten"]] {
            let (exit, report) = pull(&west, &[more, &[member]].concat());
            assert_eq!((exit, &report["error"]["code"]), (3, &json!(code)), "{what} {more:?}: {report}");
            assert_eq!(temporaries(&west), Vec::<String>::new(), "{what}");
            assert!(!west.root().join("snapshots/2").exists(), "{what}");
            assert!(!west.root().join("snapshots/7").exists(), "{what}");
        }
    };
    for (what, token, member, code) in cases {
        refused(what, token, &member, code);
    }
    // One that was good, until it was taken out of the file.
    know(&west, &url, PEER, "");
    assert_eq!(pull(&west, &["--dry-run", &path("c")]).0, 0);
    let tokens = east.directory.path().join("tokens");
    let known = fs::read_to_string(&tokens).unwrap();
    let other = format!("other peer:9 {PEER}-of-account-9\n");
    let left: Vec<&str> = known.lines().filter(|line| !line.contains(PEER)).chain([other.as_str()]).collect();
    assert!(left.iter().any(|line| line.contains(OF_TWO)));
    fs::write(&tokens, left.join("\n")).unwrap();
    served.signal(Signal::HUP);
    let begun = Instant::now();
    while ask(&served, "c", PEER).0 == 200 {
        assert!(begun.elapsed() < LONG, "the token is still good");
    }
    assert_eq!(ask(&served, "c", PEER), (401, json!("unauthorized")));
    refused("a revoked one", PEER, &path("c"), "unauthorized");
    // Another one goes on being good.
    know(&west, &url, OF_TWO, "");
    assert_eq!(pull(&west, &[&path("c")]).0, 0);
    same_as(&west, &east, &["a", "b", "c"]);
}
