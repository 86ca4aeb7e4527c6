//! QEMU's writers are kept out while its readers still work, and a QEMU that was there first is seen.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use qchain::backend::posix::PosixStore;
use qchain::backend::{Backend, ImageLocks, StoreFile};
use qchain::ids::StorePath;

use crate::support::qemu::{create, io, must, run, text};

const WRITER: ImageLocks = ImageLocks { writer: true, any: true };
const READER: ImageLocks = ImageLocks { writer: false, any: true };
const NOBODY: ImageLocks = ImageLocks { writer: false, any: false };

/// An image `a`, and `b` with `a` as its backing file.
struct Pair {
    directory: tempfile::TempDir,
    /// `a`, open for writing as a change in place has it.
    file: Arc<dyn StoreFile>,
}

impl Pair {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        create(&a, "", 1 << 20);
        io(&a, &["write -P 1 0 256k"]);
        must("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(&a), "-F", "qcow2", text(&b)]);
        io(&b, &["write -P 2 512k 64k"]);
        let store = PosixStore::open(directory.path()).unwrap();
        let file = store.open_writable(&StorePath::parse("a").unwrap()).unwrap();
        Self { directory, file }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn locks(&self) -> ImageLocks {
        self.file.image_locks().unwrap()
    }

    /// Waits for what is started or ended to be seen.
    fn wait_for(&self, wanted: ImageLocks) {
        let begun = Instant::now();
        while self.locks() != wanted {
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?}, not {wanted:?}", self.locks());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A qemu-io that has an image open until it is told to leave.
struct Open {
    child: Child,
    input: Option<ChildStdin>,
}

impl Open {
    fn new(pair: &Pair, name: &str, flags: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(flags)
            .arg(pair.path(name))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        // Its answer tells that the image is open.
        input.write_all(b"length\n").unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("MiB"), "{line:?}");
        Self { child, input: Some(input) }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// A qemu-nbd that serves an image until it is ended.
struct Served(Child);

impl Served {
    fn new(pair: &Pair, name: &str, flags: &[&str]) -> Self {
        let socket = format!("--socket={}", text(&pair.path("socket")));
        let child = Command::new("qemu-nbd")
            .args(flags)
            .args(["--persistent", "--format=qcow2", &socket])
            .arg(pair.path(name))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether qemu-io may write to an image.
fn can_write(pair: &Pair, name: &str) -> bool {
    let output = run("qemu-io", &["-f", "qcow2", "-c", "write -P 3 0 64k", text(&pair.path(name))]);
    let refused = String::from_utf8_lossy(&output.stderr).contains("lock");
    assert!(output.status.success() != refused, "{output:?}");
    output.status.success()
}

/// Every way in which a reader may come: both images converted, compared, read by qemu-io, served.
fn readers_work(pair: &Pair) {
    for name in ["a", "b"] {
        let (image, copy) = (pair.path(name), pair.path("copy"));
        must("qemu-img", &["convert", "-O", "qcow2", text(&image), text(&copy)]);
        must("qemu-img", &["compare", text(&image), text(&copy)]);
        must("qemu-img", &["check", text(&image)]);
        let read = must("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 1 64k 64k", text(&image)]);
        assert!(read.contains("read 65536/65536") && !read.contains("failed"), "{read}");
        let served = Served::new(pair, name, &["--read-only"]);
        let url = format!("nbd+unix:///?socket={}", text(&pair.path("socket")));
        let begun = Instant::now();
        while !run("qemu-img", &["compare", "-f", "raw", &url, text(&copy)]).status.success() {
            assert!(begun.elapsed() < Duration::from_secs(20), "{name} cannot be served");
            thread::sleep(Duration::from_millis(50));
        }
        drop(served);
    }
}

#[test]
fn writers_are_refused_and_readers_are_not() {
    let pair = Pair::new();
    let held = pair.file.hold_image_locks().unwrap();
    assert!(held.is_some());
    assert!(!can_write(&pair, "a"), "a writer came in");
    assert!(can_write(&pair, "b"), "a writer of the child only reads the file");
    io(&pair.path("b"), &["write -P 1 0 64k"]);
    readers_work(&pair);
    let commit = run("qemu-img", &["commit", text(&pair.path("b"))]);
    assert!(!commit.status.success(), "a commit writes to the backing file");
    drop(held);
    assert!(can_write(&pair, "a"), "the locks were not given back");
}

#[test]
fn a_writer_that_was_there_first_is_seen() {
    let pair = Pair::new();
    let writer = Open::new(&pair, "a", &["-f", "qcow2"]);
    assert_eq!(pair.locks(), WRITER);
    assert!(pair.file.hold_image_locks().unwrap().is_none());
    drop(writer);
    assert_eq!(pair.locks(), NOBODY, "what was refused left a lock, or the writer did");
    let served = Served::new(&pair, "a", &[]);
    pair.wait_for(WRITER);
    assert!(pair.file.hold_image_locks().unwrap().is_none());
    // Nothing of ours is in the writer's way.
    assert!(!can_write(&pair, "a"));
    drop(served);
    pair.wait_for(NOBODY);
    assert!(pair.file.hold_image_locks().unwrap().is_some());
    assert!(can_write(&pair, "a"));
}

#[test]
fn a_reader_that_was_there_first_stays() {
    let pair = Pair::new();
    let served = Served::new(&pair, "a", &["--read-only"]);
    pair.wait_for(READER);
    let held = pair.file.hold_image_locks().unwrap();
    assert!(held.is_some());
    assert_eq!(pair.locks(), READER);
    drop(served);
    pair.wait_for(NOBODY);
    drop(held);
    // One that reads it as a backing file.
    let reader = Open::new(&pair, "b", &["-r", "-f", "qcow2"]);
    assert_eq!(pair.locks(), READER);
    assert!(pair.file.hold_image_locks().unwrap().is_some());
    drop(reader);
    assert_eq!(pair.locks(), NOBODY);
}

/// As a reading QEMU, and in the way of no QEMU.
#[test]
fn a_reader_of_ours_is_shown_and_keeps_nobody_out() {
    let pair = Pair::new();
    let (one, two) = (pair.file.hold_reader_lock().unwrap(), pair.file.hold_reader_lock().unwrap());
    let store = PosixStore::open(pair.directory.path()).unwrap();
    let elsewhere = store.open(&StorePath::parse("a").unwrap()).unwrap();
    assert_eq!(elsewhere.image_locks().unwrap(), READER);
    assert!(can_write(&pair, "a"));
    readers_work(&pair);
    must("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", "a", text(&pair.path("b"))]);
    must("qemu-img", &["commit", "-q", text(&pair.path("b"))]);
    must("qemu-img", &["resize", "-q", text(&pair.path("a")), "+1M"]);
    drop(one);
    assert_eq!(elsewhere.image_locks().unwrap(), READER);
    drop(two);
    assert_eq!(elsewhere.image_locks().unwrap(), NOBODY);
    assert!(pair.file.hold_image_locks().unwrap().is_some());
}
