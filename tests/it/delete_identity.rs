//! Owner, mode, ACL and attributes across a delete; other users; QEMU reading and writing meanwhile.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qchain::failure::{Code, Failure, Kind as FailureKind};
use qchain::ops::delete::{ModeChoice, Status};
use qchain::store::record::StoreKind;
use rustix::fs::XattrFlags;

use super::support::chains::{Kind, Numbers, assert_true, build, folders};
use super::support::forked::{Forked, asked};
use super::support::mounts::{FsKind, LoopMount};
use super::support::qemu::{must, run, text};
use super::support::store::{delete, delete_well, files, init, left, open, scan};

/// Somebody who is not root.
const USER: u32 = 65_534;

/// base <- a <- b, with truths.
fn chain(parent: &Path) -> (PathBuf, PathBuf) {
    let (store, truth) = folders(parent, "store");
    let mut numbers = Numbers(5);
    let specs: Vec<_> = (0..3).map(|_| Kind::PLAIN.member(1 << 20, 6, &mut numbers)).collect();
    build(&store, &truth, &specs);
    init(&store, StoreKind::Plain);
    (store, truth)
}

fn attribute(path: &Path, name: &str) -> Vec<u8> {
    let mut value = vec![0; 256];
    let length = rustix::fs::getxattr(path, name, &mut value[..]).unwrap();
    value.truncate(length);
    value
}

#[test]
fn owner_mode_acl_and_attributes_survive() {
    for kind in [FsKind::Xfs, FsKind::Btrfs, FsKind::Ext4] {
        let mount = LoopMount::new(kind, 512 << 20);
        let (store, truth) = chain(&mount.path());
        let member = store.join("b");
        std::os::unix::fs::chown(&member, Some(12_345), Some(23_456)).unwrap();
        fs::set_permissions(&member, fs::Permissions::from_mode(0o640)).unwrap();
        must("setfacl", &["-m", "u:1234:r,g:77:rw,m:r", text(&member)]);
        for (name, value) in [("user.cloud", &b"stack\0\xff"[..]), ("user.empty", b""), ("trusted.own", b"1")]
        {
            rustix::fs::setxattr(&member, name, value, XattrFlags::empty()).unwrap();
        }
        let acl = || must("getfacl", &["-n", "-c", "-p", text(&member)]);
        let (before, inode) = (acl(), fs::metadata(&member).unwrap().ino());
        assert!(before.contains("user:1234:r--") && before.contains("mask::r--"), "{before}");
        delete_well(&store, &["a"], ModeChoice::Auto);
        let metadata = fs::metadata(&member).unwrap();
        assert_ne!(metadata.ino(), inode, "a new file");
        assert_eq!(
            (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777),
            (12_345, 23_456, 0o640),
            "{kind:?}"
        );
        assert_eq!(acl(), before, "{kind:?}");
        assert_eq!(attribute(&member, "user.cloud"), b"stack\0\xff");
        assert_eq!(attribute(&member, "user.empty"), b"");
        assert_eq!(attribute(&member, "trusted.own"), b"1");
        assert_true(&member, &truth.join("b"), "with another owner");
    }
}

/// A place that everybody may enter, with a copy of this binary that everybody may run.
fn public(directory: &Path) -> PathBuf {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    let program = directory.join("tests");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

fn give_away(store: &Path) {
    must("chown", &["-R", &format!("{USER}:{USER}"), text(store)]);
}

/// The part that runs as another user: all goes well.
#[test]
fn forked_delete_by_the_owner() {
    let Some(store) = asked("owner") else { return };
    assert_eq!(rustix::process::geteuid().as_raw(), USER);
    delete_well(Path::new(&store), &["a"], ModeChoice::Auto);
}

/// The part that runs as another user: the survivor is somebody else's.
#[test]
fn forked_delete_of_somebody_elses() {
    let Some(store) = asked("squashed") else { return };
    let report = delete(&open(Path::new(&store)), &["a"], ModeChoice::Auto).unwrap();
    assert_eq!(report.outcomes.len(), 1);
    let outcome = &report.outcomes[0];
    assert_eq!(outcome.status, Status::Refused);
    assert_eq!(outcome.error.as_ref().map(Failure::code), Some(Code::Squashed), "{outcome:?}");
    assert_eq!((outcome.bytes_written, outcome.metadata_bytes_written, outcome.bytes_cloned), (0, 0, 0));
}

#[test]
fn an_owner_without_rights_may_delete() {
    let mount = LoopMount::new(FsKind::Xfs, 512 << 20);
    let (store, truth) = chain(&mount.path());
    give_away(&store);
    fs::set_permissions(store.join("b"), fs::Permissions::from_mode(0o600)).unwrap();
    must("setfacl", &["-m", "u:1234:rw", text(&store.join("b"))]);
    rustix::fs::setxattr(store.join("b"), "user.cloud", b"stack", XattrFlags::empty()).unwrap();
    let acl = || must("getfacl", &["-n", "-c", "-p", text(&store.join("b"))]);
    let before = acl();
    let program = public(mount.path().parent().unwrap());
    let test = "delete_identity::forked_delete_by_the_owner";
    Forked::as_user(text(&program), USER, test, "owner", text(&store)).run();
    assert!(!store.join("a").exists());
    assert_true(&store.join("b"), &truth.join("b"), "by its owner");
    let metadata = fs::metadata(store.join("b")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (USER, USER));
    assert_eq!(acl(), before);
    assert_eq!(attribute(&store.join("b"), "user.cloud"), b"stack");
}

#[test]
fn what_cannot_keep_its_owner_is_refused_before_the_first_byte() {
    let folder = tempfile::tempdir().unwrap();
    let program = public(folder.path());
    let (store, truth) = chain(folder.path());
    give_away(&store);
    std::os::unix::fs::chown(store.join("b"), Some(0), Some(0)).unwrap();
    fs::set_permissions(store.join("b"), fs::Permissions::from_mode(0o644)).unwrap();
    let (bytes, inode) = (fs::read(store.join("b")).unwrap(), fs::metadata(store.join("b")).unwrap().ino());
    let test = "delete_identity::forked_delete_of_somebody_elses";
    Forked::as_user(text(&program), USER, test, "squashed", text(&store)).run();
    assert_eq!(fs::read(store.join("b")).unwrap(), bytes);
    assert_eq!(fs::metadata(store.join("b")).unwrap().ino(), inode);
    assert_eq!(left(&store), ["a", "b", "base"]);
    assert_true(&store.join("b"), &truth.join("b"), "refused");
}

/// A program that is ended when the test is.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let started = Instant::now();
    while !ready() {
        assert!(started.elapsed() < Duration::from_secs(20), "{what} did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_reader_keeps_its_view_until_it_closes() {
    let mount = LoopMount::new(FsKind::Xfs, 512 << 20);
    let (store, truth) = chain(&mount.path());
    let socket = mount.path().parent().unwrap().join("socket");
    let mut server = Command::new("qemu-nbd");
    server.args(["-r", "-t", "-f", "qcow2", "-k", text(&socket)]).arg(store.join("b"));
    let server = Running(server.stdout(Stdio::null()).spawn().unwrap());
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    let same = || {
        let output = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, text(&truth.join("b"))]);
        output.status.success()
    };
    wait_until("qemu-nbd", || socket.exists() && same());
    let stores = open(&store);
    let found = scan(&stores);
    assert!(found.members.iter().any(|member| member.locks.any && !member.locks.writer), "QEMU has it open");
    delete_well(&store, &["a"], ModeChoice::Clone);
    assert!(!store.join("a").exists());
    assert!(same(), "the old files are still open");
    delete_well(&store, &["base"], ModeChoice::Clone);
    assert!(same(), "and once more");
    drop(server);
    assert_true(&store.join("b"), &truth.join("b"), "after the reader closed");
}

#[test]
fn a_writer_makes_it_busy() {
    let folder = tempfile::tempdir().unwrap();
    let (store, truth) = chain(folder.path());
    let mut writer = Command::new("qemu-io");
    writer.args(["-f", "qcow2"]).arg(store.join("b")).stdin(Stdio::piped()).stdout(Stdio::null());
    let writer = Running(writer.spawn().unwrap());
    wait_until("a writer's lock", || scan(&open(&store)).members.iter().any(|member| member.locks.writer));
    let inodes = || -> Vec<_> {
        let all = files(&store).into_iter().filter(|path| !path.starts_with(".qchain"));
        all.map(|path| fs::metadata(store.join(path)).unwrap().ino()).collect()
    };
    let before = inodes();
    for deleted in ["a", "b"] {
        let error = delete(&open(&store), &[deleted], ModeChoice::Auto).unwrap_err();
        assert_eq!((error.kind(), error.code()), (FailureKind::Busy, Code::Locked), "{error}");
        assert_eq!(error.member(), Some("b"), "{error}");
        assert_eq!(inodes(), before);
    }
    // Further down nobody writes: the writer keeps the files it has open, and what comes reads the same.
    delete_well(&store, &["base"], ModeChoice::Auto);
    drop(writer);
    assert_true(&store.join("b"), &truth.join("b"), "after the writer closed");
    delete_well(&store, &["a"], ModeChoice::Auto);
    assert_true(&store.join("b"), &truth.join("b"), "later");
}
