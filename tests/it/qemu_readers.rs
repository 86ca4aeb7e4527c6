//! QEMU has members open while they are deleted, as the program is called.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::support::chains::{Kind, Numbers, Spec, assert_true, build, folders};
use super::support::forked::Running;
use super::support::mounts::{FsKind, LoopMount};
use super::support::qemu::{must, run, text};
use super::support::store::{files, left, open, scan};
use super::support::world::World;

/// base <- a <- b on XFS, opted in by the program.
struct Place {
    mount: LoopMount,
    store: PathBuf,
    truth: PathBuf,
    world: World,
}

impl Place {
    fn new() -> Self {
        let mount = LoopMount::in_memory(FsKind::Xfs, 512 << 20);
        let (store, truth) = folders(&mount.path(), "store");
        let mut numbers = Numbers(11);
        let specs: Vec<Spec> = (0..3).map(|_| Kind::PLAIN.member(4 << 20, 12, &mut numbers)).collect();
        build(&store, &truth, &specs);
        let place = Self { mount, store, truth, world: World::new() };
        assert_eq!(place.call(&["init", "--kind", "plain"]).0, 0);
        place
    }

    fn call(&self, arguments: &[&str]) -> (i32, Value) {
        self.world.run_on(text(&self.store), arguments)
    }

    fn delete(&self, member: &str, mode: &str) -> (i32, Value) {
        let terms = ["--mode", mode, "--grace", "0s", "--retention", "0s"];
        let call = ["delete", "--yes", "--now", member].into_iter().chain(terms).collect::<Vec<_>>();
        self.call(&call)
    }

    /// QEMU's server of one member, once it answers.
    fn serve(&self, member: &str, options: &[&str]) -> Server {
        let socket = self.mount.path().parent().unwrap().join(format!("socket-{member}"));
        let _ = fs::remove_file(&socket);
        let mut command = Command::new("qemu-nbd");
        command.args(options).args(["-t", "-f", "qcow2", "-k", text(&socket)]).arg(self.store.join(member));
        let server = Server {
            uri: format!("nbd+unix:///?socket={}", text(&socket)),
            truth: self.truth.join(member),
            _running: Running::start(command),
        };
        let begun = Instant::now();
        while !(socket.exists() && server.is_same()) {
            assert!(begun.elapsed() < Duration::from_secs(30), "qemu-nbd did not come");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// Bytes and inodes of all members.
    fn state(&self) -> Vec<(PathBuf, u64, Vec<u8>)> {
        let all = files(&self.store).into_iter().filter(|path| !path.starts_with(".qchain"));
        let look = |path: PathBuf| {
            let full = self.store.join(&path);
            (path, fs::metadata(&full).unwrap().ino(), fs::read(full).unwrap())
        };
        all.map(look).collect()
    }

    fn is_true(&self, member: &str) {
        assert_true(&self.store.join(member), &self.truth.join(member), "at the end");
    }
}

/// A member that is served.
struct Server {
    uri: String,
    truth: PathBuf,
    _running: Running,
}

impl Server {
    /// Whether what it serves is the truth, all of it.
    fn is_same(&self) -> bool {
        same(&self.uri, &self.truth)
    }
}

fn same(uri: &str, truth: &Path) -> bool {
    let output = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", uri, text(truth)]);
    output.status.success()
}

#[test]
fn what_qemu_reads_stays_until_it_closes() {
    for member in ["base", "a", "b"] {
        let place = Place::new();
        let server = place.serve(member, &["-r"]);
        for deleted in ["a", "base"] {
            let (exit, document) = place.delete(deleted, "clone");
            assert_eq!((exit, document["results"][0]["mode"].as_str()), (0, Some("clone")), "{document}");
            assert!(!place.store.join(deleted).exists());
            assert!(server.is_same(), "{member} after {deleted} went");
            // A client that comes later, too.
            let read = must("qemu-io", &["-r", "-f", "raw", "-c", "read 0 4M", &server.uri]);
            assert!(read.contains("read 4194304/4194304 bytes"), "{read}");
        }
        place.is_true("b");
        drop(server);
        place.is_true("b");
        assert_eq!(left(&place.store), ["b"]);
    }
}

#[test]
fn what_qemu_writes_is_busy() {
    for member in ["a", "b"] {
        let place = Place::new();
        let server = place.serve(member, &[]);
        assert!(scan(&open(&place.store)).members.iter().any(|found| found.locks.writer));
        let before = place.state();
        for mode in ["auto", "clone", "copy", "in-place"] {
            let (exit, document) = place.delete("a", mode);
            let error = &document["error"];
            let said = (exit, error["kind"].as_str(), error["code"].as_str());
            assert_eq!(said, (5, Some("busy"), Some("locked")), "{member} {mode}: {document}");
            assert!(place.state() == before, "{member} {mode}");
        }
        drop(server);
        let (exit, document) = place.delete("a", "clone");
        assert_eq!(exit, 0, "{document}");
        place.is_true("b");
        assert_eq!(left(&place.store), ["b", "base"]);
    }
}
