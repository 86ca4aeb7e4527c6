//! Connections: many that do nothing, those that are slow on purpose, and those over TLS.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

use super::support::qemu::text;
use super::support::service::{LONG, Served, configure};
use super::support::tls::certificate;
use super::support::world::World;

/// How many connections do nothing.
const IDLE: usize = 10_000;

/// The store a <- b <- {c, d}, opted in.
fn world(more: &str) -> World {
    let world = World::forked();
    assert_eq!(world.run(&["init"]).0, 0);
    configure(&world, more);
    world
}

/// This process, and what it starts, may have so many files open.
fn allow_files(count: u64) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    assert!(maximum.is_none_or(|most| most >= count), "at most {maximum:?} files may be open here");
    if current.is_some_and(|current| current < count) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(count), maximum }).unwrap();
    }
}

#[test]
fn idle_and_slow_clients_do_not_stop_others_and_are_sent_away() {
    // The service is a process of its own, with as many.
    allow_files(IDLE as u64 + 2000);
    let world = world("");
    let served = Served::start(&world);
    let mut idle: Vec<TcpStream> = (0..IDLE).map(|_| served.connect()).collect();
    for stream in idle.iter_mut().step_by(2) {
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: te").unwrap();
    }
    assert_eq!(served.send_raw("GET", "/healthz", "", b"").is(200)["status"], "ok");
    assert_eq!(served.get("/v1/members/c").is(200)["member"], "snapshots/2/7/c");
    // One more byte now and then does not make a head that is in time.
    let begun = Instant::now();
    let slow = &mut idle[0];
    while slow.write_all(b"s").is_ok() {
        assert!(begun.elapsed() < LONG, "a slow head is waited for without end");
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    for stream in &mut idle[1..20] {
        let mut said = Vec::new();
        // Closed, with or without a word; a time-out is none of both.
        if let Err(error) = stream.read_to_end(&mut said) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        assert!(!String::from_utf8_lossy(&said).contains("200 OK"));
    }
    assert_eq!(served.send_raw("GET", "/healthz", "", b"").is(200)["status"], "ok");
}

#[test]
fn connections_beyond_the_limit_are_closed_at_once() {
    let world = world("connections = 4\n");
    let served = Served::start(&world);
    let held: Vec<TcpStream> = (0..4).map(|_| served.connect()).collect();
    // Those before are accepted in their order.
    let mut more = served.connect();
    let mut said = Vec::new();
    if let Err(error) = more.read_to_end(&mut said) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    assert!(said.is_empty());
    drop(held);
    let begun = Instant::now();
    loop {
        let mut stream = served.connect();
        let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        let mut said = Vec::new();
        if stream.read_to_end(&mut said).is_ok() && said.starts_with(b"HTTP/1.1 200") {
            break;
        }
        assert!(begun.elapsed() < LONG, "places are not given back");
    }
}

/// Whether a client that knows that root takes the service's certificate.
fn trusts(served: &Served, root: &Path) -> bool {
    let url = format!("https://{}/healthz", served.address);
    let options = ["--fail", "--silent", "--noproxy", "*", "--cacert", text(root), &url];
    let output = Command::new("curl").args(options).output().unwrap();
    assert!(output.status.success() || output.status.code() == Some(60), "{output:?}");
    output.status.success()
}

#[test]
fn the_certificate_is_changed_while_the_service_runs() {
    let world = World::forked();
    assert_eq!(world.run(&["init"]).0, 0);
    let directory = world.directory.path();
    let (pem, key, old) = (directory.join("tls.pem"), directory.join("tls.key"), directory.join("old.pem"));
    certificate(directory, "tls");
    configure(&world, &format!("certificate = {pem:?}\nkey = {key:?}\n"));
    let served = Served::start(&world);
    assert!(trusts(&served, &pem));
    fs::copy(&pem, &old).unwrap();
    // One that is no good changes nothing.
    fs::write(&key, "nonsense").unwrap();
    served.signal(Signal::HUP);
    assert!(trusts(&served, &old));
    certificate(directory, "tls");
    assert!(!trusts(&served, &pem), "it was read without being asked to");
    served.signal(Signal::HUP);
    let begun = Instant::now();
    while !trusts(&served, &pem) {
        assert!(begun.elapsed() < LONG, "the new certificate is not shown");
    }
    assert!(!trusts(&served, &old));
}
