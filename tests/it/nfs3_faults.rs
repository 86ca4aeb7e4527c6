//! Servers that are slow, cut off, silent, killed and started again: reading goes on, or ends with an error in time.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use qchain::backend::Backend as _;
use qchain::failure::{Code, Failure as _, Kind};
use qchain::ids::StorePath;
use serde_json::Value;

use super::support::crash::full;
use super::support::nfs::{Ganesha, open};
use super::support::proxy::{Fate, Proxy};
use super::support::world::World;

const VERBS: &[&[&str]] =
    &[&["list"], &["map", "c"], &["digest", "c"], &["verify"], &["audit", "--min-age", "0s"]];

/// Runs a verb with nothing known from before.
fn run(world: &World, store: &str, verb: &[&str]) -> (i32, Value) {
    let caches = world.directory.path().join("caches");
    // There need not be any.
    let _ = fs::remove_dir_all(caches);
    world.run_on(store, verb)
}

/// What the verbs say if nothing is wrong.
fn wanted(world: &World, server: &Ganesha) -> Vec<(i32, Value)> {
    VERBS.iter().map(|verb| run(world, &server.url(""), verb)).collect()
}

#[test]
fn a_connection_may_break_at_any_call() {
    let world = World::forked();
    let server = Ganesha::start(&world.root());
    let wanted = wanted(&world, &server);
    let proxy = Proxy::start(server.port());
    // Two connections have calls enough that each breaks under some.
    let url = server.url_by(proxy.port(), "&connections=2&timeout=20");
    for (verb, wanted) in VERBS.iter().zip(&wanted) {
        proxy.choose(|_| Fate::Pass);
        assert_eq!(run(&world, &url, verb), *wanted, "{verb:?}");
        let calls = proxy.requests();
        assert!(calls > 5, "{verb:?}: {calls} calls");
        for at in 0..calls {
            for fate in [Fate::CutBefore, Fate::CutAfter] {
                proxy.choose(move |number| if number == at { fate } else { Fate::Pass });
                assert_eq!(run(&world, &url, verb), *wanted, "{verb:?}, {fate:?} at {at}");
            }
        }
    }
    // Every fifth call breaks.
    proxy.choose(|number| if number % 5 == 4 { Fate::CutAfter } else { Fate::Pass });
    assert_eq!(run(&world, &url, VERBS[2]), wanted[2]);
}

#[test]
fn a_lost_call_is_made_again() {
    let world = World::forked();
    let server = Ganesha::start(&world.root());
    let wanted = wanted(&world, &server);
    let proxy = Proxy::start(server.port());
    let url = server.url_by(proxy.port(), "&timeout=8");
    let step = if full() { 1 } else { 7 };
    for (verb, wanted) in VERBS.iter().zip(&wanted).take(3) {
        for at in (0..30).step_by(step) {
            proxy.choose(move |number| if number == at { Fate::Lose } else { Fate::Pass });
            assert_eq!(run(&world, &url, verb), *wanted, "{verb:?}, lost at {at}");
        }
    }
}

const STALE: u32 = 70;
const LATER: u32 = 10_008;

/// Also each call of those made again.
#[test]
fn a_server_may_ask_to_be_asked_later_and_forget_a_handle() {
    let world = World::forked();
    let server = Ganesha::start(&world.root());
    let wanted = wanted(&world, &server);
    let proxy = Proxy::start(server.port());
    let url = server.url_by(proxy.port(), "&timeout=20");
    for (verb, wanted) in VERBS.iter().zip(&wanted) {
        proxy.choose(|_| Fate::Pass);
        assert_eq!(run(&world, &url, verb), *wanted, "{verb:?}");
        let calls = proxy.requests();
        for at in 0..calls {
            proxy.choose(move |number| if number == at { Fate::Answer(LATER) } else { Fate::Pass });
            assert_eq!(run(&world, &url, verb), *wanted, "{verb:?}, later at {at}");
            // The first call is about the root, whose handle is a moment old.
            if at > 0 {
                proxy.choose(move |number| if number == at { Fate::Answer(STALE) } else { Fate::Pass });
                assert_eq!(run(&world, &url, verb), *wanted, "{verb:?}, stale at {at}");
            }
        }
    }
    let store = open(&server.url_by(proxy.port(), "&timeout=2"));
    proxy.choose(|_| Fate::Answer(LATER));
    let begun = Instant::now();
    let error = store.stat(&StorePath::parse("snapshots").unwrap()).unwrap_err();
    assert_eq!((error.kind(), error.code()), (Kind::Io, Code::Io), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[test]
fn slow_is_not_broken() {
    let world = World::forked();
    let server = Ganesha::start(&world.root());
    let proxy = Proxy::start(server.port());
    let url = server.url_by(proxy.port(), "");
    proxy.delay(Duration::from_millis(20));
    for (verb, wanted) in VERBS.iter().zip(wanted(&world, &server)) {
        assert_eq!(run(&world, &url, verb), wanted, "{verb:?}");
    }
}

#[test]
fn a_server_killed_at_a_call_and_started_again_is_waited_for() {
    let world = World::forked();
    let server = Arc::new(Mutex::new(Ganesha::start_alone(&world.root())));
    let (wanted, proxy, url) = {
        let server = server.lock().unwrap();
        let proxy = Proxy::start(server.port());
        let url = server.url_by(proxy.port(), "&timeout=40");
        (wanted(&world, &server), proxy, url)
    };
    let (kill, killed) = mpsc::channel();
    let restarted = server.clone();
    // One thread for all: a server ends with the thread that started it.
    let starter = std::thread::spawn(move || {
        for () in killed {
            std::thread::sleep(Duration::from_millis(300));
            restarted.lock().unwrap().restart();
        }
    });
    let step = if full() { 1 } else { 6 };
    for (verb, wanted) in VERBS.iter().zip(&wanted) {
        for at in (0..16).step_by(step) {
            let (server_then, kill) = (server.clone(), kill.clone());
            proxy.choose(move |number| {
                if number == at {
                    server_then.lock().unwrap().kill();
                    kill.send(()).unwrap();
                }
                Fate::Pass
            });
            assert_eq!(run(&world, &url, verb), *wanted, "{verb:?}, killed at {at}");
            // Also after the last call.
            while std::net::TcpStream::connect(("127.0.0.1", server.lock().unwrap().port())).is_err() {
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
    proxy.choose(|_| Fate::Pass);
    drop(kill);
    starter.join().unwrap();
}

#[test]
fn a_server_that_stays_away_is_an_error_in_time() {
    let world = World::forked();
    for index in 0..40 {
        fs::copy(world.member("a"), world.member(&format!("more{index}"))).unwrap();
    }
    let cases: &[(&[&str], usize, bool)] = &[
        (&["list"], 2, true),
        (&["list"], 40, true),
        (&["list"], 9, false),
        (&["list"], 120, false),
        (&["verify"], 200, true),
        (&["verify"], 180, false),
        (&["digest", "a"], 137, true),
    ];
    for &(verb, at, kill) in cases {
        let server = Arc::new(Mutex::new(Ganesha::start_alone(&world.root())));
        let (proxy, url) = {
            let server = server.lock().unwrap();
            let proxy = Proxy::start(server.port());
            let url = server.url_by(proxy.port(), "&timeout=4");
            (proxy, url)
        };
        let ended = server.clone();
        proxy.choose(move |number| {
            if number == at {
                if kill { ended.lock().unwrap().kill() } else { ended.lock().unwrap().stop() }
            }
            Fate::Pass
        });
        let begun = Instant::now();
        let (exit, document) = run(&world, &url, verb);
        let took = begun.elapsed();
        let error = &document["error"];
        assert_eq!(
            (exit, error["code"].as_str()),
            (8, Some("unreachable")),
            "{verb:?} {at} {kill}: {document}"
        );
        assert!(error["message"].as_str().unwrap().contains("no answer within 4 s"), "{document}");
        // One wait, whatever number of files is left.
        assert!(
            took > Duration::from_secs(3) && took < Duration::from_secs(12),
            "{verb:?} {at} {kill}: {took:?}"
        );
    }
}

#[test]
fn a_server_that_stops_for_a_while_is_waited_for() {
    let world = World::forked();
    let server = Ganesha::start(&world.root());
    let (seconds, timeout) = if full() { (30, 60) } else { (6, 12) };
    let url = server.url(&format!("&timeout={timeout}"));
    let store = open(&url);
    let path = StorePath::parse("snapshots/2/7/a").unwrap();
    let file = store.open(&path).unwrap();
    server.stop();
    let goes_on = server.clone();
    let begun = Instant::now();
    let waker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(seconds));
        goes_on.go_on();
    });
    let mut bytes = vec![0; usize::try_from(fs::metadata(world.member("a")).unwrap().len()).unwrap()];
    assert_eq!(file.read_at(0, &mut bytes).unwrap(), bytes.len());
    assert!(begun.elapsed() >= Duration::from_secs(seconds), "it was not stopped: {:?}", begun.elapsed());
    assert_eq!(bytes, fs::read(world.member("a")).unwrap());
    waker.join().unwrap();
    // The mount, too.
    server.stop();
    let goes_on = server.clone();
    let waker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(2));
        goes_on.go_on();
    });
    assert_eq!(run(&world, &url, &["list"]).0, 0);
    waker.join().unwrap();
}

#[test]
fn after_the_time_is_up_others_fail_at_once_and_later_it_is_tried_again() {
    let world = World::forked();
    let mut server = Ganesha::start_alone(&world.root());
    let store = server.open("&timeout=2");
    let path = StorePath::parse("snapshots/2/7/a").unwrap();
    let inode = fs::metadata(world.member("a")).unwrap().ino();
    assert_eq!(store.stat(&path).unwrap().id.inode, inode);
    server.kill();
    let begun = Instant::now();
    for _ in 0..50 {
        let error = store.stat(&path).unwrap_err();
        assert_eq!((error.kind(), error.code()), (Kind::Io, Code::Unreachable), "{error}");
    }
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    server.restart();
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(store.stat(&path).unwrap().id.inode, inode);
}

/// Answers every connection with the same bytes, after the request if `wait`.
fn liar(bytes: Vec<u8>, wait: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let bytes = bytes.clone();
            std::thread::spawn(move || {
                // Whoever hangs up does so.
                let mut request = [0; 1024];
                if wait && client.read(&mut request).is_err() {
                    return;
                }
                let mut answer = bytes;
                if answer.len() > 8 {
                    answer[4..8].copy_from_slice(&request[4..8]);
                }
                let _ = client.write_all(&answer);
                std::thread::sleep(Duration::from_secs(if answer.is_empty() { 0 } else { 20 }));
            });
        }
    });
    port
}

#[test]
fn servers_that_talk_nonsense_are_errors() {
    let world = World::new();
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<u8>>();
    // A record of these words in one fragment.
    let record = |inner: &[u32]| {
        let head = (1_u32 << 31) + u32::try_from(4 * inner.len()).unwrap();
        words(&[&[head], inner].concat())
    };
    let cases = [
        ("closes", Vec::new(), "unreachable"),
        ("another protocol", b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), "io"),
        ("endless record", words(&[u32::MAX]), "io"),
        ("endless fragments", words(&[1 << 20, 0]), "unreachable"),
        ("empty record", record(&[]), "io"),
        ("huge handle", record(&[0, 1, 0, 0, 0, 0, 0, u32::MAX]), "io"),
        ("handle cut short", record(&[0, 1, 0, 0, 0, 0, 0, 64, 1]), "io"),
        ("huge list", record(&[0, 1, 0, 0, 0, 0, 0, 4, 1, u32::MAX]), "io"),
        ("a status of nobody's", record(&[0, 1, 0, 0, 0, 0, 77]), "io"),
        ("says nothing", words(&[(1 << 31) + 28, 0, 1]), "unreachable"),
    ];
    for (what, bytes, code) in cases {
        let port = liar(bytes, true);
        let begun = Instant::now();
        let url = format!("nfs://127.0.0.1:{port}/export?mountport={port}&timeout=2");
        let (exit, document) = world.run_on(&url, &["list"]);
        assert_eq!((exit, document["error"]["code"].as_str()), (8, Some(code)), "{what}: {document}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{what}: {:?}", begun.elapsed());
    }
}
