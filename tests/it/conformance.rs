//! Every store passes the same suite.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use qchain::backend::conformance;
use qchain::backend::faulty::Faulty;
use qchain::backend::memory::MemoryStore;
use qchain::backend::posix::PosixStore;
use qchain::backend::slow::Slow;
use qchain::backend::{Backend, BackendError, FileKind, LockKind, Means, Move};
use qchain::ids::StorePath;

use crate::support::mounts::{FsKind, LoopMount};

fn passes(backend: &Arc<dyn Backend>) {
    assert_eq!(conformance::check(backend), [], "{}", backend.describe());
}

fn posix(root: &Path) -> Arc<dyn Backend> {
    Arc::new(PosixStore::open(root).unwrap_or_else(|error| panic!("{error}")))
}

fn path(text: &str) -> StorePath {
    StorePath::parse(text).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn memory_conforms() {
    passes(&(Arc::new(MemoryStore::new()) as Arc<dyn Backend>));
    passes(&(Arc::new(MemoryStore::new().with_clone(false)) as Arc<dyn Backend>));
    let poor = MemoryStore::new().with_clone(false).with_hard_links(false).with_exchange(false);
    passes(&(Arc::new(poor) as Arc<dyn Backend>));
}

#[test]
fn slow_conforms() {
    let slow = Slow::new(Arc::new(MemoryStore::new()), Duration::from_micros(50), 1 << 30);
    let found = slow.probe(&StorePath::root()).unwrap();
    assert!(found.network && !found.clone && found.clone_alignment == 0, "{found:?}");
    passes(&(Arc::new(slow) as Arc<dyn Backend>));
}

#[test]
fn faulty_conforms_without_faults() {
    passes(&(Arc::new(Faulty::new(Arc::new(MemoryStore::new()))) as Arc<dyn Backend>));
}

#[test]
fn posix_conforms() {
    let root = tempfile::tempdir().unwrap();
    passes(&posix(root.path()));
    passes(&(Arc::new(PosixStore::open_by_components(root.path()).unwrap()) as Arc<dyn Backend>));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0, "the suite left something");
}

#[test]
fn xfs_conforms() {
    mounted(FsKind::Xfs, true);
}

#[test]
fn btrfs_conforms() {
    mounted(FsKind::Btrfs, true);
}

#[test]
fn ext4_conforms() {
    mounted(FsKind::Ext4, false);
}

fn mounted(kind: FsKind, clones: bool) {
    let mount = LoopMount::new(kind, 400 << 20);
    let store = posix(&mount.path());
    passes(&store);
    let found = store.probe(&StorePath::root()).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((found.clone, found.clone_alignment), if clones { (true, 4096) } else { (false, 0) });
    assert!(
        found.hard_links && found.byte_range_locks && found.rename_exchange && !found.network,
        "{found:?}"
    );
}

#[test]
fn a_foreign_source_is_copied_but_not_cloned() {
    let mount = LoopMount::new(FsKind::Xfs, 400 << 20);
    let elsewhere = tempfile::tempdir().unwrap();
    let (store, other) = (posix(&mount.path()), posix(elsewhere.path()));
    let memory = MemoryStore::new();
    let target = store.create(&path("t")).unwrap();
    for source in [other.create(&path("s")).unwrap(), memory.create(&path("s")).unwrap()] {
        source.write_at(0, &[7; 8192]).unwrap();
        let run = [Move { source: 0, from: 0, to: 4096, length: 8192 }];
        let sources = [source];
        let refused = target.move_runs(&sources, &run, Means::Clone);
        assert!(matches!(refused, Err(BackendError::CannotClone { .. })), "{refused:?}");
        assert_eq!(target.move_runs(&sources, &run, Means::Copy).unwrap().copied_bytes, 8192);
        let mut bytes = [0; 12_288];
        assert_eq!(target.read_at(0, &mut bytes).unwrap(), 12_288);
        assert!(bytes[..4096].iter().all(|&byte| byte == 0) && bytes[4096..].iter().all(|&byte| byte == 7));
        target.set_length(0).unwrap();
    }
}

#[test]
fn clones_share_their_space() {
    let mount = LoopMount::new(FsKind::Xfs, 400 << 20);
    let store = posix(&mount.path());
    let source = store.create(&path("s")).unwrap();
    source.write_at(0, &vec![7; 64 << 20]).unwrap();
    source.sync().unwrap();
    let before = store.space().unwrap().free_bytes;
    let target = store.create(&path("t")).unwrap();
    let run = [Move { source: 0, from: 0, to: 1 << 20, length: 64 << 20 }];
    assert_eq!(target.move_runs(&[source], &run, Means::Clone).unwrap().cloned_bytes, 64 << 20);
    target.sync().unwrap();
    let taken = before.saturating_sub(store.space().unwrap().free_bytes);
    assert!(taken < 2 << 20, "{taken} bytes were taken");
}

#[test]
fn a_full_store_says_so() {
    let mount = LoopMount::new(FsKind::Ext4, 20 << 20);
    let store = posix(&mount.path());
    let file = store.create(&path("a")).unwrap();
    let full = file.write_at(0, &vec![1; 40 << 20]).and_then(|()| file.sync());
    assert!(matches!(full, Err(BackendError::NoSpace { .. })), "{full:?}");
}

#[test]
fn reserved_space_is_there_when_the_store_is_full() {
    for kind in [FsKind::Ext4, FsKind::Xfs] {
        let mount = LoopMount::new(kind, 400 << 20);
        let store = posix(&mount.path());
        let (kept, other) = (store.create(&path("kept")).unwrap(), store.create(&path("other")).unwrap());
        assert!(kept.reserve(0, 8 << 20).unwrap());
        assert!(matches!(kept.reserve(0, 1 << 30), Err(BackendError::NoSpace { .. })));
        kept.set_length(0).unwrap();
        assert!(kept.reserve(0, 8 << 20).unwrap());
        let block = vec![1; 1 << 20];
        let full = (0..400).try_for_each(|n| other.write_at(n << 20, &block).and_then(|()| other.sync()));
        assert!(matches!(full, Err(BackendError::NoSpace { .. })), "{full:?}");
        for n in 0..8 {
            kept.write_at(n << 20, &block).unwrap();
        }
        kept.sync().unwrap();
    }
}

#[test]
fn a_local_path_is_that_of_the_directory_that_was_opened() {
    let outer = tempfile::tempdir().unwrap();
    let (here, there) = (outer.path().join("here"), outer.path().join("there"));
    fs::create_dir(&here).unwrap();
    let store = posix(&here);
    store.create(&path("a")).unwrap();
    assert_eq!(store.local_path(&path("d/b")).unwrap(), here.join("d/b"));
    assert_eq!(store.local_path(&StorePath::root()).unwrap(), here);
    assert!(fs::exists(store.local_path(&path("a")).unwrap()).unwrap());
    fs::rename(&here, &there).unwrap();
    assert!(store.local_path(&path("a")).is_none(), "nothing is there");
    fs::create_dir(&here).unwrap();
    assert!(store.local_path(&path("a")).is_none(), "another directory is there");
    assert!(MemoryStore::new().local_path(&path("a")).is_none());
}

/// A root with traps, and something outside that must not be touched.
fn trapped() -> (tempfile::TempDir, [Arc<dyn Backend>; 2]) {
    let outer = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
    let root = outer.path().join("root");
    let make = || -> std::io::Result<()> {
        fs::create_dir_all(outer.path().join("outside"))?;
        fs::write(outer.path().join("outside/secret"), "secret")?;
        fs::create_dir_all(root.join("real"))?;
        fs::write(root.join("real/file"), "inside")?;
        symlink("../outside", root.join("up"))?;
        symlink(outer.path().join("outside"), root.join("absolute"))?;
        symlink("real", root.join("near"))?;
        symlink("../outside/secret", root.join("last"))?;
        symlink("real/file", root.join("nearlast"))?;
        symlink("nowhere", root.join("dangling"))?;
        symlink("/proc/self/root", root.join("magic"))?;
        let fifo = root.join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0)?;
        std::os::unix::net::UnixListener::bind(root.join("socket"))?;
        Ok(())
    };
    make().unwrap_or_else(|error| panic!("{error}"));
    let by_components = PosixStore::open_by_components(&root).unwrap_or_else(|error| panic!("{error}"));
    (outer, [posix(&root), Arc::new(by_components)])
}

fn not_plain<T>(what: &str, outcome: Result<T, BackendError>) {
    match outcome {
        Err(BackendError::NotPlain { .. }) => {}
        Err(error) => panic!("{what}: {error:?}"),
        Ok(_) => panic!("{what} was followed"),
    }
}

#[test]
fn links_are_never_followed() {
    let (outer, stores) = trapped();
    for store in stores {
        for name in ["up/secret", "absolute/secret", "near/file", "magic/etc", "up/new", "dangling/x"] {
            let at = path(name);
            not_plain(name, store.open(&at));
            not_plain(name, store.open_writable(&at));
            not_plain(name, store.create(&at));
            not_plain(name, store.stat(&at));
            not_plain(name, store.create_dir(&at, true));
            not_plain(name, store.remove_file(&at));
            not_plain(name, store.remove_dir(&at));
            not_plain(name, store.rename(&path("real/file"), &at));
            not_plain(name, store.rename(&at, &path("taken")));
            not_plain(name, store.hard_link(&path("real/file"), &at));
            not_plain(name, store.hard_link(&at, &path("taken")));
            not_plain(name, store.exchange(&at, &path("real/file")));
            not_plain(name, store.exchange(&path("real/file"), &at));
            not_plain(name, store.try_lock(&at, LockKind::Exclusive));
        }
        for name in ["up", "absolute", "near", "last", "nearlast", "dangling", "magic"] {
            let at = path(name);
            not_plain(name, store.open(&at));
            not_plain(name, store.open_writable(&at));
            not_plain(name, store.read_dir(&at));
            not_plain(name, store.sync_dir(&at));
            not_plain(name, store.probe(&at));
            not_plain(name, store.remove_file(&at));
            not_plain(name, store.rename(&at, &path("taken")));
            not_plain(name, store.rename(&path("real/file"), &at));
            not_plain(name, store.hard_link(&at, &path("taken")));
            not_plain(name, store.exchange(&at, &path("real/file")));
            not_plain(name, store.exchange(&path("real/file"), &at));
            not_plain(name, store.try_lock(&at, LockKind::Exclusive));
            assert_eq!(store.stat(&at).unwrap().kind, FileKind::Symlink, "{name}");
            assert!(matches!(store.create(&at), Err(BackendError::AlreadyExists { .. })), "{name}");
        }
        let walked = store.walk(&StorePath::root(), 9, &|_| false);
        assert!(walked.iter().all(|entry| {
            entry
                .as_ref()
                .is_ok_and(|entry| entry.path.as_ref().is_ok_and(|path| path.file_name() != "secret"))
        }));
    }
    assert_eq!(fs::read_dir(outer.path().join("outside")).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(outer.path().join("outside/secret")).unwrap(), "secret");
    assert_eq!(fs::read_to_string(outer.path().join("root/real/file")).unwrap(), "inside");
}

#[test]
fn special_files_do_not_hang() {
    let (_outer, stores) = trapped();
    let (done, finished) = mpsc::channel();
    thread::spawn(move || {
        for store in stores {
            for name in ["fifo", "socket"] {
                not_plain(name, store.open(&path(name)));
                not_plain(name, store.open_writable(&path(name)));
                not_plain(name, store.try_lock(&path(name), LockKind::Exclusive));
                assert_eq!(store.stat(&path(name)).unwrap().kind, FileKind::Special);
            }
        }
        done.send(()).unwrap();
    });
    finished.recv_timeout(Duration::from_secs(20)).expect("opening a pipe hangs or fails");
}

#[test]
fn a_path_swapped_for_a_link_all_the_time_is_never_followed() {
    let (outer, stores) = trapped();
    let root = outer.path().join("root");
    let swapper = {
        let root = root.clone();
        thread::spawn(move || {
            for _ in 0..2000 {
                // "real" becomes a link to the outside and a directory again.
                fs::rename(root.join("real"), root.join("aside")).unwrap();
                symlink("../outside", root.join("real")).unwrap();
                fs::remove_file(root.join("real")).unwrap();
                fs::rename(root.join("aside"), root.join("real")).unwrap();
            }
        })
    };
    while !swapper.is_finished() {
        for store in &stores {
            assert!(store.open(&path("real/secret")).is_err());
            assert!(store.stat(&path("real/secret")).is_err());
            if store.create(&path("real/new")).is_ok() {
                let _ = store.remove_file(&path("real/new"));
            }
        }
    }
    swapper.join().unwrap();
    assert_eq!(fs::read_dir(outer.path().join("outside")).unwrap().count(), 1);
}

#[test]
fn names_that_are_no_text_are_shown_and_passed_over() {
    use std::os::unix::ffi::OsStrExt;
    let root = tempfile::tempdir().unwrap();
    let odd = root.path().join(std::ffi::OsStr::from_bytes(b"odd\xff"));
    fs::create_dir(&odd).unwrap();
    fs::write(odd.join("below"), "").unwrap();
    fs::write(root.path().join("line\nbreak"), "").unwrap();
    let store = posix(root.path());
    let names = store.read_dir(&StorePath::root()).unwrap();
    assert!(names.len() == 2 && names.iter().all(|entry| entry.name.is_err()), "{names:?}");
    let walked = store.walk(&StorePath::root(), 9, &|_| false);
    assert!(
        walked.len() == 2 && walked.iter().all(|entry| entry.as_ref().unwrap().path.is_err()),
        "{walked:?}"
    );
}

#[test]
fn acls_and_owners_are_taken_over() {
    let mount = LoopMount::new(FsKind::Ext4, 64 << 20);
    let store = posix(&mount.path());
    let (old, new) = (store.create(&path("old")).unwrap(), store.create(&path("new")).unwrap());
    // u::rw-, u:1234:r--, g::r--, m::r--, o::---
    let mut acl = vec![2, 0, 0, 0];
    let no_one = u32::MAX;
    for (tag, rights, id) in
        [(1_u16, 6_u16, no_one), (2, 4, 1234), (4, 4, no_one), (16, 4, no_one), (32, 0, no_one)]
    {
        acl.extend(tag.to_le_bytes());
        acl.extend(rights.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    let mut wanted = old.identity().unwrap();
    (wanted.uid, wanted.gid, wanted.mode) = (1000, 1001, 0o2640);
    wanted.attributes.push(("system.posix_acl_access".to_owned(), acl));
    wanted.attributes.push(("user.note".to_owned(), vec![1; 700]));
    old.set_identity(&wanted).unwrap();
    new.set_identity(&old.identity().unwrap()).unwrap();
    assert_eq!(new.identity().unwrap(), wanted);
    let mode = fs::metadata(mount.path().join("new")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o2640);
}

#[test]
fn the_image_locks_of_qemu_are_seen() {
    let root = tempfile::tempdir().unwrap();
    let image = root.path().join("image");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("1M").status();
    assert!(made.expect("qemu-img is needed").success());
    let store = posix(root.path());
    let file = store.open(&path("image")).unwrap();
    assert!(!file.image_locks().unwrap().any);
    for (flags, writer) in [(&["-r"][..], false), (&[][..], true)] {
        let mut qemu = Command::new("qemu-io")
            .args(flags)
            .arg(&image)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("qemu-io is needed");
        let mut locks = file.image_locks().unwrap();
        for _ in 0..500 {
            if locks.any && locks.writer == writer {
                break;
            }
            thread::sleep(Duration::from_millis(10));
            locks = file.image_locks().unwrap();
        }
        drop(qemu.stdin.take());
        qemu.wait().unwrap();
        assert!(locks.any, "{flags:?}");
        assert_eq!(locks.writer, writer, "{flags:?}");
        assert!(!file.image_locks().unwrap().any, "locks go with their process");
    }
}

#[test]
fn the_file_limit_can_be_raised() {
    assert!(qchain::backend::posix::raise_file_limit() >= 256);
}
