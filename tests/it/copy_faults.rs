//! `copy` over lines that cut, corrupt and shorten, and from peers that lie: never a wrong byte, nothing left behind.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::support::chains::assert_true;
use super::support::rot::rot;
use super::support::world::World;
use super::support::zones::{
    Line, PEER, Then, copy, giving, know, path, pull, random, same_as, serve, taking, temporaries, truth,
};

const MIB: u64 = 1 << 20;
/// Bytes that have to come of [`noisy`]: 6 MiB of `a`, what is elsewhere in `b`, and little else.
const NEEDED: u64 = 7 * MIB;

/// A zone with some MiB of data that cannot be compressed, in a chain of three.
fn noisy() -> World {
    let world = World::new();
    let mut bytes = vec![0; 6 << 20];
    blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut bytes);
    let data = world.directory.path().join("data");
    std::fs::write(&data, &bytes).unwrap();
    let write = |from: u64, length: u64| format!("write -q -s {} {from}M {length}M", data.display());
    world.make("a", "", &[&write(0, 6)]);
    world.make("b", "a", &["write -P 2 1M 128k", "write -z 2M 64k", &write(3, 1)]);
    world.make("c", "b", &["write -P 3 5M 128k", "write -c -P 4 6M 64k"]);
    giving(world, &["a", "b", "c"])
}

/// What a line does to some bytes now and then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The connection ends in the middle of them.
    Cut,
    /// One bit is another.
    Corrupt,
    /// They come twice.
    Repeat,
    /// Half of them is lost, and the connection stays.
    Lose,
}

/// A line with a fault whenever so many bytes came.
fn faulty(target: &str, fault: Fault, every: u64) -> Line {
    Line::to(target, Duration::ZERO, move |before, bytes| {
        if (before + bytes.len() as u64) / every == before / every || bytes.is_empty() {
            return Then::More;
        }
        let half = bytes.len() / 2;
        match fault {
            Fault::Cut => {
                bytes.truncate(half);
                return Then::Cut;
            }
            Fault::Corrupt => bytes[half] ^= 1,
            Fault::Repeat => bytes.extend_from_within(..),
            Fault::Lose => bytes.truncate(half),
        }
        Then::More
    })
}

#[test]
fn lines_with_faults_delay_and_nothing_else() {
    let east = noisy();
    let served = serve(&east, "");
    let often = [90_000, 200_000, 700_000]
        .map(|every| [Fault::Cut, Fault::Corrupt, Fault::Repeat].map(|fault| (fault, every)));
    // What is lost is waited for.
    for (fault, every) in often.into_iter().flatten().chain([(Fault::Lose, 5_000_000)]) {
        let line = faulty(&served.address, fault, every);
        let west = taking();
        know(&west, &line.url(), PEER, "");
        let mut last = json!(null);
        for _ in 0..if fault == Fault::Repeat && every < 100_000 { 2 } else { 20 } {
            let (exit, report) = pull(&west, &[&path("c")]);
            last = report;
            if exit == 0 {
                break;
            }
            let code = last["error"]["code"].as_str().unwrap();
            assert!(matches!(code, "peer-unreachable" | "peer-wrong"), "{fault:?} {every}: {last}");
        }
        if fault == Fault::Repeat && every < 100_000 {
            // Hardly a block comes whole: it is refused, or comes right.
            for name in ["a", "b", "c"].iter().filter(|name| west.member(name).exists()) {
                assert_true(&west.member(name), &truth(&east, name), name);
            }
            continue;
        }
        assert!(last["copied"].is_array(), "{fault:?} {every}: {last}");
        same_as(&west, &east, &["a", "b", "c"]);
        if every >= 700_000 && fault != Fault::Repeat {
            assert!(line.came() < NEEDED + NEEDED / 4, "{fault:?} {every}: {} bytes came", line.came());
        }
    }
}

#[test]
fn what_faults_cost_is_a_twentieth_at_most() {
    let east = random(64);
    let served = serve(&east, "");
    let bring = |line: &Line| {
        let west = taking();
        know(&west, &line.url(), PEER, "");
        let (exit, report) = pull(&west, &[&path("inc")]);
        assert_eq!(exit, 0, "{report}");
        same_as(&west, &east, &["base", "inc"]);
        line.came()
    };
    let needed = bring(&Line::plain(&served.address));
    // A block that is not what it should be is sent again whole, so a wrong bit in every MiB costs a sixteenth whatever is done; a cut
    // half a block, and here half of what the line held. Behind what came twice nothing of an answer of 4 blocks can be told apart.
    let cases = [(Fault::Cut, 2 * MIB), (Fault::Corrupt, 2 * MIB), (Fault::Repeat, 8 * MIB)];
    for (fault, every) in cases {
        let sent = bring(&faulty(&served.address, fault, every));
        println!("{fault:?} every {every} bytes: {sent} bytes came, {needed} are needed");
        assert!(
            sent * 100 <= needed * 105,
            "{fault:?} every {every}: {sent} bytes came, {needed} are needed"
        );
    }
}

/// Changes a bit; twice, and it is as it was.
fn flip(path: &Path, at: u64) {
    let mut byte = [0];
    File::open(path).unwrap().read_exact_at(&mut byte, at).unwrap();
    rot(path, at, &[byte[0] ^ 1]);
}

#[test]
fn damage_at_the_giving_side_does_not_cross() {
    let east = noisy();
    let served = serve(&east, "");
    let member = east.member("a");
    let length = std::fs::metadata(&member).unwrap().len();
    // Of the header, of its tables, of data here and there.
    let table = 65_536 * 3;
    let places = [5, 30, table + 3, length / 3, length / 2, length - 70_000];
    for (by_service, at) in [false, true].into_iter().flat_map(|by| places.map(|at| (by, at))) {
        let west = taking();
        know(&west, &format!("http://{}", served.address), PEER, "");
        let bring = || {
            if by_service { pull(&west, &[&path("c")]) } else { copy(&west, &east.root(), &[&path("c")]) }
        };
        flip(&member, at);
        let (exit, report) = bring();
        if exit == 0 {
            // Bytes that say where data are, or how much, are proved by what is found there.
            assert!(at < length / 3, "{at}: {report}");
            for name in ["c", "b", "a"] {
                assert_true(&west.member(name), &truth(&east, name), name);
                std::fs::remove_file(west.member(name)).unwrap();
            }
        } else {
            let code = report["error"]["code"].as_str().unwrap();
            assert!(at < length / 3 || code == "data-damaged", "{at}: {report}");
        }
        assert_eq!(east.run(&["verify", "--level", "data"]).0, 1, "{at}");
        let (exit, report) = bring();
        assert_ne!(exit, 0, "{at}: {report}");
        assert!(at < length / 3 || report["error"]["code"] == "quarantined", "{at}: {report}");
        for name in ["a", "b", "c"] {
            assert!(!west.member(name).exists(), "{at}: {name} came");
        }
        flip(&member, at);
        assert_eq!(east.run(&["verify", "--level", "data"]).0, 0, "{at}");
        assert_eq!(bring().0, 0);
        same_as(&west, &east, &["a", "b", "c"]);
    }
}

#[test]
fn what_was_cut_is_not_sent_again() {
    let east = random(64);
    let served = serve(&east, "");
    let line = Line::to(&served.address, Duration::ZERO, |before, bytes| {
        if (before + bytes.len() as u64) / MIB > before / MIB { Then::Cut } else { Then::More }
    });
    let west = taking();
    know(&west, &line.url(), PEER, "");
    let (exit, report) = pull(&west, &[&path("inc")]);
    assert_eq!(exit, 0, "{report}");
    same_as(&west, &east, &["base", "inc"]);
    let sent: u64 =
        report["copied"].as_array().unwrap().iter().map(|one| one["blocks_sent"].as_u64().unwrap()).sum();
    // Each MiB the half of a block is lost, and what the line held: more than a twentieth, whatever is done.
    assert!(line.came() <= sent * 65536 * 108 / 100, "{} bytes came for {sent} blocks", line.came());
}

#[test]
fn a_limit_on_bytes_a_second_is_kept_to() {
    let east = noisy();
    let served = serve(&east, "");
    let west = taking();
    know(&west, &format!("http://{}", served.address), PEER, "");
    let begun = std::time::Instant::now();
    let (exit, report) = pull(&west, &["--rate", "3MiB/s", &path("a")]);
    assert_eq!(exit, 0, "{report}");
    assert!(begun.elapsed() > Duration::from_millis(1200), "{:?} for 6 MiB", begun.elapsed());
}

#[test]
fn what_was_abandoned_goes_after_a_day() {
    let east = noisy();
    let served = serve(&east, "");
    let line =
        Line::to(
            &served.address,
            Duration::ZERO,
            |before, _| {
                if before > 3 * MIB { Then::Cut } else { Then::More }
            },
        );
    let west = taking();
    know(&west, &line.url(), PEER, "");
    let (exit, report) = pull(&west, &[&path("a")]);
    assert_eq!((exit, &report["error"]["code"]), (8, &json!("peer-unreachable")), "{report}");
    assert_eq!(west.run(&["recover"]).0, 0);
    let kept = temporaries(&west);
    assert_eq!(kept.len(), 2, "image and leaves: {kept:?}");
    for name in &kept {
        let file = west.root().join(".qchain/tmp").join(name);
        super::support::qemu::must("touch", &["-d", "2 days ago", super::support::qemu::text(&file)]);
    }
    assert_eq!(west.run(&["recover"]).0, 0);
    assert_eq!(temporaries(&west), Vec::<String>::new());
}

#[test]
fn two_copies_of_one_member_do_not_disturb_each_other() {
    let east = noisy();
    let served = serve(&east, "");
    let line = Line::to(&served.address, Duration::from_millis(2), |_, _| Then::More);
    let west = taking();
    know(&west, &line.url(), PEER, "");
    let (one, other) = std::thread::scope(|scope| {
        let one = scope.spawn(|| pull(&west, &[&path("c")]));
        let other = scope.spawn(|| pull(&west, &[&path("c")]));
        (one.join().unwrap(), other.join().unwrap())
    });
    // Who comes second finds the first at work, or all of it there.
    assert!([&one, &other].iter().any(|(exit, _)| *exit == 0), "{one:?} {other:?}");
    assert!([&one, &other].iter().all(|(exit, _)| matches!(exit, 0 | 3 | 5)), "{one:?} {other:?}");
    same_as(&west, &east, &["a", "b", "c"]);
}

/// Gives all of an answer to a request's line and body.
type Answer = Box<dyn Fn(&str, &[u8]) -> Vec<u8> + Send + Sync>;

/// A server that answers each request as it is told.
struct Liar {
    port: u16,
    ended: Arc<AtomicBool>,
}

impl Liar {
    /// `answer` gets the request's line and the body, and gives all of the answer.
    fn new(answer: impl Fn(&str, &[u8]) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let ended = Arc::new(AtomicBool::new(false));
        let (answer, stop) = (Arc::new(answer), ended.clone());
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let (client, answer) = (client.unwrap(), answer.clone());
                std::thread::spawn(move || {
                    let mut lines = BufReader::new(client.try_clone().unwrap());
                    let mut client = client;
                    loop {
                        let (mut first, mut length) = (String::new(), 0);
                        if lines.read_line(&mut first).unwrap_or(0) == 0 {
                            return;
                        }
                        let mut line = String::new();
                        while lines.read_line(&mut line).unwrap_or(0) > 2 {
                            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                                length = value.trim().parse().unwrap();
                            }
                            line.clear();
                        }
                        let mut body = vec![0; length];
                        if lines.read_exact(&mut body).is_err()
                            || client.write_all(&sealed(&first, answer(&first, &body))).is_err()
                        {
                            return;
                        }
                    }
                });
            }
        });
        Self { port, ended }
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        let _ = std::net::TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// Stands for the seal of an answer until it is known to what it is one.
const SEAL: &str = "----------------------------the-seal----------------------------";

fn ok(body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\nqchain-seal: {SEAL}\r\nContent-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// An answer to that request, with its seal: who lies does that well.
fn sealed(line: &str, mut answer: Vec<u8>) -> Vec<u8> {
    let place = answer.windows(SEAL.len()).position(|window| window == SEAL.as_bytes());
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    if let (Some(place), Some(end)) = (place, end) {
        let target = line.split(' ').nth(1).unwrap();
        let mut hasher = blake3::Hasher::new();
        hasher.update(target.as_bytes()).update(b"\n").update(&answer[end + 4..]);
        answer[place..place + SEAL.len()].copy_from_slice(hasher.finalize().to_hex().as_bytes());
    }
    answer
}

#[test]
fn peers_that_lie_are_refused_and_leave_nothing() {
    let east = noisy();
    let served = serve(&east, "");
    let honest = served.send("GET", &format!("/v1/peer/chain?member={}", path("a")), PEER, None).is(200);
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut chain = honest.clone();
        edit(&mut chain["members"][0]);
        ok(chain.to_string().as_bytes())
    };
    let bytes_of = |path: &str| served.send("GET", path, PEER, None).body;
    let one = &honest["members"][0];
    let table = bytes_of(&format!(
        "/v1/peer/table?member={}&digest={}&table={}&offset=0&length={}",
        path("a"),
        one["view_digest"].as_str().unwrap(),
        one["table_blake3"].as_str().unwrap(),
        one["table_bytes"]
    ));
    let right = edited(&|_| {});
    let zeros = "0".repeat(64);
    let deep = vec![b'['; 100_000];
    let chain_only = |chain: Vec<u8>| -> Answer { Box::new(move |_, _| chain.clone()) };
    let with_blocks = |blocks: Vec<u8>| -> Answer {
        let (chain, table) = (right.clone(), ok(&table));
        Box::new(move |line, _| match line {
            line if line.contains("/chain") => chain.clone(),
            line if line.contains("/table") => table.clone(),
            _ => blocks.clone(),
        })
    };
    let endless = |head: &str| [head.as_bytes(), &vec![b'x'; 24 << 20]].concat();
    let mut bad_table = table.clone();
    bad_table[40] ^= 1;
    let (chain, bad_table) = (right.clone(), ok(&bad_table));
    let cases: Vec<(&str, Answer)> = vec![
        (
            "another view digest",
            with_blocks_of(&edited(&|one| one["view_digest"] = zeros.clone().into()), &table),
        ),
        (
            "another table",
            Box::new(move |line, _| if line.contains("/chain") { chain.clone() } else { bad_table.clone() }),
        ),
        ("a huge disk", chain_only(edited(&|one| one["virtual_bytes"] = (1_u64 << 62).into()))),
        ("many leaves", chain_only(edited(&|one| one["leaves"] = (1_u64 << 40).into()))),
        ("odd clusters", chain_only(edited(&|one| one["cluster_bits"] = 63.into()))),
        ("no chain", chain_only(ok(&deep))),
        ("no members", chain_only(ok(br#"{"schema":1,"members":[]}"#))),
        (
            "a redirect",
            chain_only(
                b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n".to_vec(),
            ),
        ),
        ("no length", chain_only(endless("HTTP/1.1 200 OK\r\n\r\n"))),
        ("endless", chain_only(endless("HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551615\r\n\r\n"))),
        ("wrong blocks", with_blocks(ok(&vec![7; 200_000]))),
        ("no blocks", with_blocks(ok(b""))),
        ("too many blocks", with_blocks(endless("HTTP/1.1 200 OK\r\nContent-Length: 25165824\r\n\r\n"))),
        ("noise", chain_only(vec![0xff; 100_000])),
    ];
    for (what, answer) in cases {
        refused(what, "a", answer);
    }
}

#[test]
fn lines_of_something_else_and_without_their_seal_are_refused() {
    let east = noisy();
    let served = serve(&east, "");
    let line_of =
        |name: &str| served.send("GET", &format!("/v1/peer/chain?member={}", path(name)), PEER, None).is(200);
    let (right, longer) = (ok(line_of("a").to_string().as_bytes()), line_of("b"));
    // What it stands on lies somewhere else.
    let above = |place: &str| {
        let mut chain = longer.clone();
        chain["members"][0]["member"] = place.into();
        ok(chain.to_string().as_bytes())
    };
    let answer = |chain: Vec<u8>| -> Answer { Box::new(move |_, _| chain.clone()) };
    for place in [".qchain/store.json", "template/tmpl/2/7/a", "../../etc/passwd"] {
        refused(place, "b", answer(above(place)));
    }
    refused("another member", "a", answer(ok(longer.to_string().as_bytes())));
    refused("no seal", "a", answer(unsealed(&right)));
    let text = String::from_utf8(right).unwrap();
    refused("another seal", "a", answer(text.replace(SEAL, &"0".repeat(64)).into_bytes()));
}

fn unsealed(answer: &[u8]) -> Vec<u8> {
    let text = String::from_utf8(answer.to_vec()).unwrap();
    text.replace(&format!("qchain-seal: {SEAL}\r\n"), "").into_bytes()
}

/// A copy of a member from that peer is refused, and leaves nothing.
fn refused(what: &str, asked: &str, answer: Answer) {
    let liar = Liar::new(answer);
    let west = taking();
    know(&west, &format!("http://127.0.0.1:{}", liar.port), PEER, "");
    let (exit, report) = pull(&west, &[&path(asked)]);
    assert_eq!(exit, 3, "{what}: {report}");
    let code = report["error"]["code"].as_str().unwrap();
    assert_eq!(
        code,
        if asked == "a" || what.starts_with("..") { "peer-wrong" } else { "bad-name" },
        "{what}: {report}"
    );
    assert!(!west.member("a").exists(), "{what}");
    assert_eq!(temporaries(&west), Vec::<String>::new(), "{what}");
    assert!(!west.root().join("snapshots/2").exists(), "{what}");
}

/// A peer with another chain than its table belongs to.
fn with_blocks_of(chain: &[u8], table: &[u8]) -> Answer {
    let (chain, table) = (chain.to_vec(), ok(table));
    Box::new(move |line, _| if line.contains("/chain") { chain.clone() } else { table.clone() })
}
