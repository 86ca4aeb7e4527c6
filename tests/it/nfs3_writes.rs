//! What is written to an export without a mount is durable once it was synced: whatever the server lost of it is written
//! again. What an export forbids is named.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use qchain::backend::nfs3::Nfs3Store;
use qchain::backend::posix::PosixStore;
use qchain::backend::{Backend, BackendError, Means, Move, StoreFile, publish};
use qchain::failure::{Code, Failure as _, Kind};
use qchain::ids::StorePath;

use super::support::nfs::{Ganesha, Terms, open};
use super::support::proxy::{Fate, Proxy};

const WRITE: u32 = 7;
const CREATE: u32 = 8;
const COMMIT: u32 = 21;

fn path(text: &str) -> StorePath {
    StorePath::parse(text).unwrap()
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..=250).cycle().skip(usize::from(seed)).take(length).collect()
}

/// Kills the server, and takes away what it had of a file: as a crash of its host does. It tells its incarnations apart by
/// the second in which they began.
fn crash(server: &mut Ganesha, file: &Path) {
    server.kill();
    std::thread::sleep(Duration::from_millis(1100));
    fs::File::options().write(true).open(file).unwrap().set_len(0).unwrap();
    server.restart();
}

fn read(file: &dyn StoreFile) -> Vec<u8> {
    let mut bytes = vec![0xEE; usize::try_from(file.stat().unwrap().length).unwrap() + 1];
    let count = file.read_at(0, &mut bytes).unwrap();
    bytes.truncate(count);
    bytes
}

#[test]
fn what_a_server_lost_is_written_again() {
    let root = tempfile::tempdir().unwrap();
    let mut server = Ganesha::start_alone(root.path());
    let store = server.open("");
    let place = root.path().join("a");
    let file = store.create(&path("a")).unwrap();
    let mut wanted = pattern(5_000_000, 3);
    file.write_at(0, &wanted).unwrap();
    // One write over another.
    wanted[1000..2000].fill(9);
    file.write_at(1000, &[9; 1000]).unwrap();
    crash(&mut server, &place);
    assert!(read(file.as_ref()) == wanted, "what is not durable yet is read as it was written");
    // By another incarnation, over what was lost.
    wanted[1500..3000].fill(7);
    file.write_at(1500, &[7; 1500]).unwrap();
    assert!(fs::read(&place).unwrap() != wanted, "nothing was lost");
    file.sync().unwrap();
    assert!(fs::read(&place).unwrap() == wanted, "what was lost is lost");
    // What was synced is not written again.
    file.write_at(0, b"new").unwrap();
    wanted[..3].copy_from_slice(b"new");
    file.sync().unwrap();
    fs::File::options().write(true).open(&place).unwrap().write_all_at(b"!", 4_000_000).unwrap();
    wanted[4_000_000] = b'!';
    file.sync().unwrap();
    assert!(fs::read(&place).unwrap() == wanted, "what was durable was written again");
}

#[test]
fn whoever_syncs_a_file_syncs_all_of_it() {
    let root = tempfile::tempdir().unwrap();
    let mut server = Ganesha::start_alone(root.path());
    let store = server.open("");
    let wanted = pattern(3_000_000, 1);
    let writer = store.create(&path("temporary")).unwrap();
    writer.write_at(0, &wanted).unwrap();
    crash(&mut server, &root.path().join("temporary"));
    let reader = store.open(&path("temporary")).unwrap();
    assert_eq!(reader.read_at(2_999_990, &mut [0; 20]).unwrap(), 10);
    drop(writer);
    publish::publish(&store, &path("temporary"), &path("target")).unwrap();
    assert!(fs::read(root.path().join("target")).unwrap() == wanted, "the writer was closed");
    // By nobody: closed, and written out by and by.
    let closed = store.create(&path("closed")).unwrap();
    closed.write_at(0, &wanted).unwrap();
    crash(&mut server, &root.path().join("closed"));
    drop(closed);
    let begun = Instant::now();
    while fs::read(root.path().join("closed")).unwrap() != wanted {
        assert!(begun.elapsed() < Duration::from_secs(30), "it was forgotten");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_length_that_was_set_stays() {
    let root = tempfile::tempdir().unwrap();
    let mut server = Ganesha::start_alone(root.path());
    let store = server.open("");
    let file = store.create(&path("a")).unwrap();
    file.write_at(0, &pattern(100_000, 0)).unwrap();
    file.set_length(50_000).unwrap();
    file.write_at(10, b"later").unwrap();
    crash(&mut server, &root.path().join("a"));
    file.set_length(60_000).unwrap();
    file.sync().unwrap();
    let mut wanted = vec![0; 60_000];
    wanted[10..15].copy_from_slice(b"later");
    assert!(
        fs::read(root.path().join("a")).unwrap() == wanted,
        "what was durable before is the server's to keep"
    );
}

/// More than is kept of one file: it is made durable on the way.
#[test]
fn much_is_written_with_little_kept() {
    let root = tempfile::tempdir().unwrap();
    let server = Ganesha::start(root.path());
    let proxy = Proxy::start(server.port());
    let commits = Arc::new(Mutex::new(0));
    let counted = commits.clone();
    proxy.choose_by(move |_, procedure| {
        *counted.lock().unwrap() += usize::from(procedure == COMMIT);
        Fate::Pass
    });
    let store = open(&server.url_by(proxy.port(), ""));
    let file = store.create(&path("a")).unwrap();
    let wanted = pattern(3 << 20, 5);
    for turn in 0..40_u64 {
        file.write_at(turn * (3 << 20), &wanted).unwrap();
    }
    let before = *commits.lock().unwrap();
    assert!((2..=9).contains(&before), "{before} commits of 120 MiB");
    file.sync().unwrap();
    // What was being made durable then is one more.
    assert!((1..=2).contains(&(*commits.lock().unwrap() - before)));
    let bytes = fs::read(root.path().join("a")).unwrap();
    assert!(bytes.len() == 40 * wanted.len() && bytes.chunks(wanted.len()).all(|chunk| chunk == wanted));
}

/// Each call breaks under a file that is made, written in pieces, and synced.
#[test]
fn writes_whose_answers_are_lost_are_made_again() {
    let root = tempfile::tempdir().unwrap();
    let server = Ganesha::start(root.path());
    let proxy = Proxy::start(server.port());
    let url = server.url_by(proxy.port(), "&connections=3&timeout=20");
    let wanted = pattern(6_500_000, 11);
    let make = |name: &str, store: &Nfs3Store| {
        let file = store.create(&path(name)).unwrap();
        file.write_at(0, &wanted).unwrap();
        file.sync().unwrap();
    };
    proxy.choose(|_| Fate::Pass);
    make("clean", &open(&url));
    let calls = proxy.requests();
    assert!(calls > 10, "{calls}");
    for fate in [Fate::CutBefore, Fate::CutAfter] {
        for at in 0..calls {
            proxy.choose(move |number| if number == at { fate } else { Fate::Pass });
            let name = format!("{fate:?}-{at}");
            make(&name, &open(&url));
            let place = root.path().join(&name);
            assert!(fs::read(&place).unwrap() == wanted, "{name}");
            assert_eq!(fs::metadata(&place).unwrap().mode() & 0o7777, 0o600, "{name}");
        }
    }
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1 + 2 * calls);
}

/// Somebody else's file of the name is never taken for the own one.
#[test]
fn a_create_without_an_answer_is_resolved_by_its_verifier() {
    let root = tempfile::tempdir().unwrap();
    let server = Ganesha::start(root.path());
    let proxy = Proxy::start(server.port());
    let store = open(&server.url_by(proxy.port(), "&timeout=20"));
    for (name, fate) in [("own", Fate::CutAfter), ("taken", Fate::CutBefore)] {
        let rival = root.path().join(name);
        let first = Mutex::new(true);
        proxy.choose_by(move |_, procedure| {
            if procedure != CREATE || !std::mem::take(&mut *first.lock().unwrap()) {
                return Fate::Pass;
            }
            if fate == Fate::CutBefore {
                fs::write(&rival, "somebody else's").unwrap();
            }
            fate
        });
        match store.create(&path(name)) {
            Ok(file) => assert!(fate == Fate::CutAfter && file.stat().unwrap().length == 0, "{name}"),
            Err(error) => {
                assert!(
                    fate == Fate::CutBefore && matches!(error, BackendError::AlreadyExists { .. }),
                    "{error}"
                );
                assert_eq!(fs::read(root.path().join(name)).unwrap(), b"somebody else's");
            }
        }
        assert!(matches!(store.create(&path(name)), Err(BackendError::AlreadyExists { .. })));
    }
}

/// An error of a write or of a COMMIT is one of the call that meets it.
#[test]
fn errors_of_a_server_are_told() {
    let root = tempfile::tempdir().unwrap();
    let server = Ganesha::start(root.path());
    let proxy = Proxy::start(server.port());
    let store = open(&server.url_by(proxy.port(), "&timeout=5"));
    for (procedure, status, kind) in [
        (WRITE, 28, Kind::NoSpace),
        (WRITE, 69, Kind::NoSpace),
        (WRITE, 5, Kind::Io),
        (WRITE, 30, Kind::Refused),
        (COMMIT, 5, Kind::Io),
        (COMMIT, 28, Kind::NoSpace),
    ] {
        let name = format!("{procedure}-{status}");
        let file = store.create(&path(&name)).unwrap();
        proxy.choose_by(move |_, call| if call == procedure { Fate::Answer(status) } else { Fate::Pass });
        let failed = file.write_at(0, &vec![1; 3_000_000]).and_then(|()| file.sync()).unwrap_err();
        assert_eq!(failed.kind(), kind, "{name}: {failed}");
        proxy.choose(|_| Fate::Pass);
    }
}

#[test]
fn runs_come_from_any_store() {
    let (root, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Ganesha::start(root.path());
    let (store, local) = (server.open(""), PosixStore::open(elsewhere.path()).unwrap());
    let bytes = pattern(20_000_000, 4);
    fs::write(elsewhere.path().join("a"), &bytes).unwrap();
    fs::write(root.path().join("b"), &bytes).unwrap();
    let sources = [local.open(&path("a")).unwrap(), store.open(&path("b")).unwrap()];
    let run = |source, from, to, length| Move { source, from, to, length };
    let runs =
        [run(0, 123, 5_000_000, 15_000_000), run(1, 7, 0, 4_000_000), run(1, 19_999_990, 30_000_000, 100)];
    let targets = [store.create(&path("t")).unwrap(), local.create(&path("t")).unwrap()];
    for target in &targets {
        let moved = target.move_runs(&sources, &runs, Means::Copy).unwrap();
        assert_eq!(moved.copied_bytes, 19_000_010);
        target.sync().unwrap();
    }
    let [over_nfs, here] = [root.path(), elsewhere.path()].map(|place| fs::read(place.join("t")).unwrap());
    assert!(over_nfs == here && here.len() == 30_000_100);
    let refused = targets[0].move_runs(&sources, &runs, Means::Clone).unwrap_err();
    assert!(matches!(refused, BackendError::CannotClone { .. }), "{refused}");
}

#[test]
fn an_export_that_is_read_only_says_so() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("d")).unwrap();
    fs::write(root.path().join("a"), "a").unwrap();
    let before = super::support::world::listing(root.path());
    let server = Ganesha::start_on(root.path(), Terms { access: "RO", ..Terms::default() });
    let store = server.open("");
    assert!(store.read_only());
    let (a, b, d) = (path("a"), path("b"), path("d"));
    store.open(&a).unwrap().sync().unwrap();
    let refused = [
        store.open_writable(&a).map(drop),
        store.create(&b).map(drop),
        store.create_dir(&b, true),
        store.remove_file(&a),
        store.remove_dir(&d),
        store.rename(&a, &b),
        store.rename_dir(&d, &b),
        store.hard_link(&a, &b),
        store.probe(&d).map(drop),
    ];
    for (index, outcome) in refused.into_iter().enumerate() {
        let error = outcome.unwrap_err();
        assert!(error.is_read_only(), "{index}: {error}");
        assert_eq!((error.kind(), error.code()), (Kind::Refused, Code::ReadOnly), "{index}");
    }
    assert_eq!(super::support::world::listing(root.path()), before);
}

#[test]
fn a_file_that_is_open_for_reading_is_not_written_to() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("a"), "a").unwrap();
    let server = Ganesha::start(root.path());
    let file = server.open("").open(&path("a")).unwrap();
    let identity = file.identity().unwrap();
    let refused = [
        file.write_at(0, b"x"),
        file.set_length(0),
        file.reserve(0, 1).map(drop),
        file.punch(0, 1).map(drop),
        file.move_runs(&[], &[], Means::Copy).map(drop),
        file.set_identity(&identity),
    ];
    assert!(refused.iter().all(Result::is_err), "{refused:?}");
    assert_eq!(fs::read(root.path().join("a")).unwrap(), b"a");
}

#[test]
fn a_server_that_makes_root_somebody_else_is_named() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("a"), "a").unwrap();
    let server = Ganesha::start_on(root.path(), Terms { squash: "Root_Squash", ..Terms::default() });
    let error = server.open("").create(&path("b")).map(drop).unwrap_err();
    let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    assert!(error.is_denied() && cause.contains("root squash"), "{error}: {cause}");
    // Where everybody may write, what is made is nobody's, and cannot be given back.
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let store = server.open("");
    let file = store.create(&path("b")).unwrap();
    let identity = file.identity().unwrap();
    assert_ne!(identity.uid, 0);
    let wanted = qchain::backend::Identity { uid: 0, gid: 0, ..identity };
    let refused = file.set_identity(&wanted).unwrap_err();
    assert!(matches!(&refused, BackendError::Squashed { what, .. } if what == "owner 0:0"), "{refused}");
    assert!(store.probe(&StorePath::root()).unwrap().hard_links);
}

/// Threads of one process exclude each other, by whatever value of the store.
#[test]
fn locks_are_of_the_process() {
    use qchain::backend::LockKind;
    let root = tempfile::tempdir().unwrap();
    let server = Ganesha::start(root.path());
    let (one, two) = (server.open(""), server.open("&connections=2"));
    let held = one.try_lock(&path("lock"), LockKind::Exclusive).unwrap();
    assert!(held.is_some() && two.try_lock(&path("lock"), LockKind::Shared).unwrap().is_none());
    drop(held);
    assert!(two.try_lock(&path("lock"), LockKind::Shared).unwrap().is_some());
    assert!(root.path().join("lock").exists());
}
