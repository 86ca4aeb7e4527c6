//! `copy` between two services: what crosses the line, tokens, certificates, jobs, kills of either side, merges meanwhile.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::json;

use super::support::chains::write_truth;
use super::support::service::{LONG, OPERATE, READ, Served};
use super::support::tls::certificate;
use super::support::world::World;
use super::support::zones::{
    Line, PEER, Then, adopt, giving, know, path, pull, pull_command, random, same_as, serve, taking,
    temporaries, truth,
};

const MIB: u64 = 1 << 20;

#[test]
fn only_what_is_missing_crosses() {
    let east = random(64);
    let served = serve(&east, "");
    let line = Line::plain(&served.address);
    let west = taking();
    know(&west, &line.url(), PEER, "");
    let (exit, first) = pull(&west, &[&path("base")]);
    assert_eq!(exit, 0, "{first}");
    let base = line.came();
    assert!(base * 100 <= 64 * MIB * 102, "{base} bytes came for 64 MiB");
    let (exit, second) = pull(&west, &[&path("inc")]);
    assert_eq!(exit, 0, "{second}");
    let inc = line.came() - base;
    // 10 of 1,024 blocks, and 32 bytes each of leaves.
    assert!(inc <= 10 * 65536 * 102 / 100 + 20_000, "{inc} bytes came for 10 blocks");
    assert_eq!(second["copied"][0]["blocks_sent"], 10);
    let before = line.came();
    let (exit, third) = pull(&west, &[&path("inc")]);
    assert_eq!((exit, &third["copied"][0]["outcome"]), (0, &json!("present")), "{third}");
    assert!(line.came() - before < 64 << 10);
    same_as(&west, &east, &["base", "inc"]);
    // Compressed where that helps, and the line is long enough for it to pay.
    let slow = Line::to(&served.address, Duration::from_millis(5), |_, _| Then::More);
    east.make("zeros", "", &["write -P 3 0 8M"]);
    write_truth(&east.member("zeros"), &truth(&east, "zeros"));
    adopt(&east);
    know(&west, &slow.url(), PEER, "");
    let (exit, packed) = pull(&west, &[&path("zeros")]);
    assert_eq!(exit, 0, "{packed}");
    assert!(slow.came() < MIB, "{} bytes came", slow.came());
    same_as(&west, &east, &["base", "inc", "zeros"]);
}

#[test]
fn tokens_reach_as_far_as_they_say() {
    let east = giving(World::forked(), &["a", "b", "c", "d"]);
    let served = serve(&east, "");
    let west = taking();
    let url = format!("http://{}", served.address);
    let of_account = format!("{PEER}-of-account-9");
    let edited = PEER.replace('0', "1");
    for (token, code) in
        [(READ, "forbidden"), (of_account.as_str(), "forbidden"), (edited.as_str(), "unauthorized")]
    {
        know(&west, &url, token, "");
        let (exit, report) = pull(&west, &[&path("c")]);
        assert_eq!((exit, &report["error"]["code"]), (3, &json!(code)), "{report}");
        assert_eq!(temporaries(&west), Vec::<String>::new());
    }
    // The peer's token copies and does nothing else.
    for route in ["/v1/chains", "/v1/jobs", "/metrics"] {
        assert_eq!(served.send("GET", route, PEER, None).status, 403, "{route}");
    }
    // A prefix, a bare name, other digests: nothing is learnt.
    let digest = served.send("GET", "/v1/peer/chain?member=snapshots/2/7/c", PEER, None).is(200);
    let own = &digest["members"][2];
    assert_eq!(own["member"], path("c"));
    let ask = |member: &str, digest: &str, ranges: serde_json::Value| {
        let request = json!({"member": member, "digest": digest, "ranges": ranges, "plain": true});
        served.send("POST", "/v1/peer/blocks", PEER, Some(&request)).status
    };
    let right = own["view_digest"].as_str().unwrap();
    let wrong = own["table_blake3"].as_str().unwrap();
    assert_eq!(ask(&path("c"), right, json!([[0, 1]])), 200);
    assert_eq!(ask(&path("c"), wrong, json!([[0, 1]])), 409);
    assert_eq!(ask("snapshots/2/", right, json!([[0, 1]])), 400);
    for bad in [json!([[0, 65]]), json!([[0, 0]]), json!([[u64::MAX, 2]]), json!([[160, 1]])] {
        assert_eq!(ask(&path("c"), right, bad.clone()), 400, "{bad}");
    }
    know(&west, &url, OPERATE, "");
    assert_eq!(pull(&west, &[&path("c")]).0, 0);
    same_as(&west, &east, &["a", "b", "c"]);
}

#[test]
fn certificates_are_those_that_were_named() {
    let east = giving(World::forked(), &["a", "b", "c", "d"]);
    let directory = east.directory.path();
    let ((file, key), (other, _)) = (certificate(directory, "c"), certificate(directory, "o"));
    let served = serve(&east, &format!("certificate = {file:?}\nkey = {key:?}\n"));
    let west = taking();
    let url = format!("https://{}", served.address);
    know(&west, &url, PEER, &format!("certificate = {other:?}\n"));
    let (exit, report) = pull(&west, &[&path("c")]);
    assert_eq!((exit, &report["error"]["code"]), (3, &json!("peer-wrong")), "{report}");
    assert_eq!(temporaries(&west), Vec::<String>::new());
    know(&west, &url, PEER, "");
    assert_eq!(pull(&west, &[&path("c")]).0, 2, "https needs a certificate to trust");
    know(&west, &url, PEER, &format!("certificate = {file:?}\n"));
    let (exit, report) = pull(&west, &[&path("c")]);
    assert_eq!(exit, 0, "{report}");
    same_as(&west, &east, &["a", "b", "c"]);
}

#[test]
fn a_service_copies_as_a_job() {
    let east = giving(World::forked(), &["a", "b", "c", "d"]);
    let giver = serve(&east, "");
    let west = taking();
    know(&west, &format!("http://{}", giver.address), PEER, "");
    let taker = Served::start(&west);
    let copied = taker.do_job(&json!({"kind": "copy", "from": "east", "members": [path("c"), path("d")]}));
    assert_eq!(copied["copied"].as_array().unwrap().len(), 4, "{copied}");
    same_as(&west, &east, &["a", "b", "c", "d"]);
    let unknown =
        taker.wait(&taker.job(&json!({"kind": "copy", "from": "http://127.0.0.1", "members": ["x"]})));
    assert_eq!(
        (&unknown["state"], &unknown["error"]["code"]),
        (&json!("failed"), &json!("usage")),
        "{unknown}"
    );
}

#[test]
fn a_job_is_continued_by_the_next_service() {
    let east = random(32);
    let giver = serve(&east, "");
    let line = Line::to(&giver.address, Duration::from_millis(5), |_, _| Then::More);
    let west = taking();
    know(&west, &line.url(), PEER, "");
    let taker = Served::start(&west);
    let job = taker.job(&json!({"kind": "copy", "from": "east", "members": [path("inc")]}));
    let begun = Instant::now();
    while line.came() < 8 * MIB {
        assert!(begun.elapsed() < LONG, "{} bytes came", line.came());
        std::thread::sleep(Duration::from_millis(5));
    }
    taker.kill();
    assert!(!west.member("base").exists());
    let taker = Served::start(&west);
    let done = taker.wait(&job);
    assert_eq!(done["state"], "done", "{done}");
    assert!(done["result"]["copied"][0]["blocks_present"].as_u64().unwrap() > 50, "{done}");
    same_as(&west, &east, &["base", "inc"]);
}

#[test]
fn a_job_that_is_killed_at_any_time_is_brought_to_its_end() {
    // Small, so that the kills fall on all of it: also on the proof, and between the names.
    let east = giving(World::forked(), &["a", "b", "c", "d"]);
    let giver = serve(&east, "");
    for pause in [0, 10, 20, 30, 40, 60, 80, 100, 150, 200] {
        let west = taking();
        know(&west, &format!("http://{}", giver.address), PEER, "");
        let taker = Served::start(&west);
        let job = taker.job(&json!({"kind": "copy", "from": "east", "members": [path("c"), path("d")]}));
        std::thread::sleep(Duration::from_millis(pause));
        taker.kill();
        let taker = Served::start(&west);
        let done = taker.wait(&job);
        assert_eq!(done["state"], "done", "{pause}: {done}");
        same_as(&west, &east, &["a", "b", "c", "d"]);
    }
}

#[test]
fn a_killed_copy_goes_on_where_it_was() {
    let east = random(64);
    let mut served = Some(serve(&east, ""));
    let west = taking();
    let mut sum = 0;
    for round in 0..3 {
        // Its port is another one each time: the zone is known anew.
        let giver = served.take().unwrap_or_else(|| serve(&east, ""));
        let line = Line::to(&giver.address, Duration::from_millis(3), |_, _| Then::More);
        know(&west, &line.url(), PEER, "");
        let mut child = pull_command(&west, &[&path("inc")]).stdout(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        while line.came() < 12 * MIB && child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < LONG, "round {round}: {} bytes came", line.came());
            std::thread::sleep(Duration::from_millis(5));
        }
        if round == 1 {
            giver.kill();
            let _ = child.wait().unwrap();
        } else {
            child.kill().unwrap();
            child.wait().unwrap();
            served = Some(giver);
        }
        sum += line.came();
        assert!(!west.member("inc").exists());
    }
    let giver = served.take().unwrap_or_else(|| serve(&east, ""));
    let line = Line::plain(&giver.address);
    know(&west, &line.url(), PEER, "");
    let (exit, report) = pull(&west, &[&path("inc")]);
    assert_eq!(exit, 0, "{report}");
    sum += line.came();
    let needed = 64 * MIB + 10 * 65536;
    // What was on its way when a side was killed comes again: some requests of 4 MiB each.
    assert!(sum <= needed + 3 * 16 * MIB, "{sum} bytes came of {needed}");
    assert!(report["copied"][0]["blocks_present"].as_u64().unwrap() > 300, "{report}");
    same_as(&west, &east, &["base", "inc"]);
}

#[test]
fn a_merge_there_meanwhile_neither_breaks_nor_mixes() {
    let east = random(32);
    east.make("top", "inc", &["write -P 5 1M 64k"]);
    write_truth(&east.member("top"), &truth(&east, "top"));
    adopt(&east);
    let served = serve(&east, "");
    let line = Line::to(&served.address, Duration::from_millis(5), |_, _| Then::More);
    let west = taking();
    know(&west, &line.url(), PEER, "");
    let child = pull_command(&west, &[&path("top")]).stdout(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while line.came() < 4 * MIB {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(5));
    }
    let (exit, report) = east.run(&[
        "delete",
        "inc",
        "--yes",
        "--assume-deleted",
        "--now",
        "--grace",
        "0s",
        "--retention",
        "0s",
    ]);
    assert_eq!(exit, 0, "{report}");
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    // As the line was when it was asked for, or as it is now; the views are the same.
    let names: Vec<&str> =
        ["base", "inc", "top"].into_iter().filter(|name| west.member(name).exists()).collect();
    assert!(names.contains(&"base") && names.contains(&"top"), "{text}");
    same_as(&west, &east, &names);
}
