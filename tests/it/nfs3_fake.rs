//! A server in this process that does what no real one does on order: what it leaves out, cuts short, limits, forgets and
//! makes up ends in the right result or in an error that names it, and never without an end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nfs3_types::nfs3::nfsstat3;
use qchain::backend::{Backend, BackendError, Capabilities, Result, StoreFile, conformance};
use qchain::failure::{Failure as _, Kind};
use qchain::ids::StorePath;

use super::support::fake_nfs::{FakeNfs, Fate, Manner, Pages};

const SETATTR: u32 = 2;
const LOOKUP: u32 = 3;
const READ: u32 = 6;
const WRITE: u32 = 7;
const LINK: u32 = 15;
const READDIRPLUS: u32 = 17;
const COMMIT: u32 = 21;

fn path(text: &str) -> StorePath {
    StorePath::parse(text).unwrap()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

/// An error with what is behind it.
fn told(error: &BackendError) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    format!("{error}{cause}")
}

fn read(file: &dyn StoreFile, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0xEE; length];
    let count = file.read_at(0, &mut bytes)?;
    bytes.truncate(count);
    Ok(bytes)
}

/// Makes a file of these bytes and reads it back.
fn round(store: &dyn Backend, name: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    let file = store.create(&path(name))?;
    file.write_at(0, bytes)?;
    file.sync()?;
    read(store.open(&path(name))?.as_ref(), bytes.len() + 10)
}

/// All of the protocol that is used, and what the server has of it then.
fn work(fake: &FakeNfs, store: &dyn Backend) -> Result<Vec<u8>> {
    let (d, a, b, c) = (path("d"), path("d/a"), path("d/b"), path("d/c"));
    store.create_dir(&d, true)?;
    let bytes = pattern(100_000);
    let file = store.create(&a)?;
    file.write_at(0, &bytes)?;
    file.sync()?;
    file.set_length(90_000)?;
    assert_eq!(read(store.open(&a)?.as_ref(), 100_000)?, bytes[..90_000]);
    assert_eq!(file.stat()?.length, 90_000);
    store.hard_link(&a, &b)?;
    store.rename(&a, &c)?;
    store.remove_file(&b)?;
    drop(store.open_writable(&c)?);
    let names = |path: &StorePath| -> Result<Vec<String>> {
        Ok(store.read_dir(path)?.into_iter().map(|entry| entry.name.unwrap()).collect())
    };
    assert_eq!((names(&StorePath::root())?, names(&d)?), (vec!["d".to_owned()], vec!["c".to_owned()]));
    assert_eq!(store.walk(&StorePath::root(), 3, &|_| false).len(), 2);
    assert!(store.space()?.free_bytes > 0 && store.probe(&d)?.hard_links);
    store.create_dir(&path("e"), false)?;
    store.remove_dir(&path("e"))?;
    store.sync_dir(&d)?;
    let there = fake.bytes("d/c");
    assert!(there == bytes[..90_000]);
    store.remove_file(&c)?;
    store.remove_dir(&d)?;
    Ok(there)
}

#[test]
fn a_server_conforms_whatever_it_leaves_out_or_cuts_short() {
    let plain = Manner::default;
    for (what, manner) in [
        ("nothing", plain()),
        ("attributes and handles", Manner { bare: true, ..plain() }),
        ("verifiers of CREATE", Manner { exclusive: false, ..plain() }),
        ("hard links", Manner { links: false, ..plain() }),
        ("READDIRPLUS", Manner { plus: false, ..plain() }),
        ("all but 10,000 bytes of what a call may move", Manner { most: 10_000, ..plain() }),
        ("all of it", Manner { bare: true, exclusive: false, plus: false, most: 70_000, ..plain() }),
    ] {
        let fake = FakeNfs::start(manner);
        let backend: Arc<dyn Backend> = Arc::new(fake.open("&timeout=20"));
        for (case, why) in conformance::check(&backend) {
            // The protocol knows no open files.
            assert!(
                ["removed-files-stay-open", "replace-keeps-identity"].contains(&case),
                "{what}: {case}: {why}"
            );
            assert!(why.contains("removed or replaced on the server"), "{what}: {case}: {why}");
        }
    }
}

/// The procedures that [`work`] calls, each once.
fn procedures() -> Vec<u32> {
    let fake = FakeNfs::start(Manner::default());
    let store = fake.open("");
    fake.choose(|_, _| Fate::Pass);
    work(&fake, &store).unwrap();
    let mut called = fake.calls();
    called.sort_unstable();
    called.dedup();
    assert!(called.len() >= 15, "{called:?}");
    called
}

#[test]
fn each_procedure_may_be_put_off_three_times_and_forget_a_handle_once() {
    for procedure in procedures() {
        for (status, times) in [(nfsstat3::NFS3ERR_JUKEBOX, 3), (nfsstat3::NFS3ERR_STALE, 1)] {
            let fake = FakeNfs::start(Manner::default());
            let store = fake.open("&timeout=20");
            fake.choose(
                move |call, number| {
                    if call == procedure && number < times { Fate::Answer(status) } else { Fate::Pass }
                },
            );
            let done = work(&fake, &store);
            assert!(done.is_ok(), "{procedure}, {status}: {}", told(&done.unwrap_err()));
        }
    }
}

#[test]
fn each_procedure_may_forget_handles_for_ever_or_fail() {
    for procedure in procedures() {
        for (status, kind) in [
            (nfsstat3::NFS3ERR_STALE, Kind::Io),
            (nfsstat3::NFS3ERR_IO, Kind::Io),
            (nfsstat3::NFS3ERR_SERVERFAULT, Kind::Io),
            (nfsstat3::NFS3ERR_DQUOT, Kind::NoSpace),
            (nfsstat3::NFS3ERR_ROFS, Kind::Refused),
        ] {
            // One that does not say what may be written to is found out by writing.
            if procedure == 4 {
                continue;
            }
            let fake = FakeNfs::start(Manner::default());
            let store = fake.open("");
            fake.choose(move |call, _| if call == procedure { Fate::Answer(status) } else { Fate::Pass });
            let begun = Instant::now();
            let error = work(&fake, &store).unwrap_err();
            let text = told(&error);
            assert_eq!(error.kind(), kind, "{procedure}, {status}: {text}");
            let named = error.is_read_only() || text.contains(&status.to_string());
            assert!(named && begun.elapsed() < Duration::from_secs(5), "{procedure}, {status}: {text}");
            assert!(fake.calls().len() < 200, "{procedure}, {status}: {} calls", fake.calls().len());
        }
    }
}

#[test]
fn what_was_lost_before_a_commit_is_written_again_but_not_for_ever() {
    let bytes = pattern(3_000_000);
    for (losses, sound) in [(1, true), (3, true), (1000, false)] {
        let fake = FakeNfs::start(Manner { losses, ..Manner::default() });
        let store = fake.open("");
        fake.choose(|_, _| Fate::Pass);
        match round(&store, "a", &bytes) {
            Ok(there) => assert!(sound && there == bytes && fake.bytes("a") == bytes, "{losses}"),
            Err(error) => {
                assert!(!sound && told(&error).contains("started anew again and again"), "{}", told(&error));
            }
        }
        let commits = fake.calls().iter().filter(|call| **call == COMMIT).count();
        assert!(commits < 15, "{losses}: {commits} commits");
    }
}

#[test]
fn nothing_more_than_everything_or_too_much_is_an_error() {
    let bytes = pattern(50_000);
    let plain = Manner::default;
    for (manner, text) in [
        (Manner { most: 0, ..plain() }, "the server took 0 bytes of 50000"),
        (Manner { more: 1, ..plain() }, "the server took 50001 bytes of 50000"),
    ] {
        let fake = FakeNfs::start(manner);
        let error = round(&fake.open(""), "a", &bytes).unwrap_err();
        assert!(told(&error).contains(text), "{}", told(&error));
    }
    let fake = FakeNfs::start(plain());
    let store = fake.open("");
    round(&store, "a", &bytes).unwrap();
    for (manner, text) in [
        (Manner { most: 0, ..plain() }, "no bytes of a file that goes on"),
        (Manner { more: 1, ..plain() }, "more bytes than it was asked for"),
        (Manner { most: 900, more: 100, ..plain() }, ""),
    ] {
        fake.be(manner);
        fake.choose(|_, _| Fate::Pass);
        let file = store.open(&path("a")).unwrap();
        match read(file.as_ref(), 40_000) {
            Ok(there) => assert!(text.is_empty() && there == bytes[..40_000]),
            Err(error) => assert!(!text.is_empty() && told(&error).contains(text), "{}", told(&error)),
        }
        assert!(fake.calls().len() < 60);
    }
}

#[test]
fn transfer_sizes_are_what_the_server_says_within_reason() {
    let bytes = pattern(2_500_000);
    for (told, most) in [
        ((0, 0), 512),
        ((1, 1), 4000),
        ((511, 513), 511),
        ((5000, 3000), 1 << 20),
        ((u32::MAX, u32::MAX), 1 << 20),
    ] {
        let fake = FakeNfs::start(Manner { told, most, ..Manner::default() });
        let there = round(&fake.open("&timeout=60"), "a", &bytes).unwrap();
        assert!(there == bytes && fake.bytes("a") == bytes, "{told:?}");
    }
}

/// Listings that never come to an end.
#[test]
fn a_directory_without_an_end_is_an_error() {
    let long = |cookie: u64| format!("{cookie:0250}").into_bytes();
    let pages: Vec<(&str, Pages)> = vec![
        ("the same page", Arc::new(move |_| (vec![(long(1), 1), (long(2), 2)], false))),
        ("in a circle", Arc::new(move |cookie| (vec![(long(cookie), (cookie + 1) % 3)], false))),
        ("nothing", Arc::new(|_| (Vec::new(), false))),
        (
            "itself",
            Arc::new(|cookie| ((1..8000).map(|more| (b".".to_vec(), cookie + more)).collect(), false)),
        ),
        (
            "ever new names",
            Arc::new(move |cookie| {
                ((1..2500).map(|more| (long(cookie + more), cookie + more)).collect(), false)
            }),
        ),
    ];
    for (what, pages) in pages {
        let fake =
            FakeNfs::start(Manner { pages: Some(pages), bare: what == "nothing", ..Manner::default() });
        let store = fake.open("");
        fake.choose(|_, _| Fate::Pass);
        let begun = Instant::now();
        let error = store.walk(&StorePath::root(), 9, &|_| false).remove(0).unwrap_err();
        let text = told(&error);
        assert!(text.contains("without end") || text.contains("more names than can be"), "{what}: {text}");
        assert!(begun.elapsed() < Duration::from_mins(1), "{what}: {:?}", begun.elapsed());
    }
}

/// What no file can be called.
#[test]
fn names_that_are_none_are_told_and_never_followed() {
    let names: Vec<Vec<u8>> =
        [&b"/"[..], b"..", b".", b"", b"a/b", b"../../etc/passwd", b"nul\0", b"\xff", b"good"]
            .into_iter()
            .map(<[u8]>::to_vec)
            .chain([vec![b'n'; 256], vec![b'n'; 4096]])
            .collect();
    for bare in [false, true] {
        let names = names.clone();
        let pages = Arc::new(move |_| (names.clone().into_iter().zip(1..).collect(), true));
        let fake = FakeNfs::start(Manner { bare, ..Manner::default() });
        for name in ["good", "other"] {
            fake.open("").create_dir(&path(name), false).unwrap();
        }
        fake.be(Manner { bare, pages: Some(pages), ..Manner::default() });
        let store = fake.open("");
        let listed = store.read_dir(&StorePath::root()).unwrap();
        let good: Vec<_> = listed.iter().filter_map(|entry| entry.name.as_ref().ok()).collect();
        assert_eq!(good, ["good"], "{listed:?}");
        fake.choose(|_, _| Fate::Pass);
        let walked = store.walk(&StorePath::root(), 2, &|_| false);
        let paths: Vec<_> = walked.into_iter().filter_map(|entry| entry.unwrap().path.ok()).collect();
        assert_eq!(paths.first().map(ToString::to_string).as_deref(), Some("good"), "{paths:?}");
    }
    let pages = Arc::new(|_| (vec![(vec![b'n'; 5000], 1)], true));
    let fake = FakeNfs::start(Manner { pages: Some(pages), ..Manner::default() });
    let error = fake.open("").read_dir(&StorePath::root()).unwrap_err();
    assert!(told(&error).contains("cannot be understood"), "{}", told(&error));
}

/// A name that a directory has while it is read may come twice.
#[test]
fn a_name_that_is_told_twice_is_one() {
    let pages = Arc::new(|_| (vec![(b"b".to_vec(), 1), (b"a".to_vec(), 2), (b"b".to_vec(), 3)], true));
    let fake = FakeNfs::start(Manner::default());
    for name in ["a", "b"] {
        fake.open("").create(&path(name)).unwrap();
    }
    fake.be(Manner { pages: Some(pages), ..Manner::default() });
    let walked = fake.open("").walk(&StorePath::root(), 2, &|_| false);
    let paths: Vec<_> = walked.into_iter().map(|entry| entry.unwrap().path.unwrap().to_string()).collect();
    assert_eq!(paths, ["a", "b"]);
}

/// What makes nonsense of a record, whose first word is its length.
type Change = fn(Vec<u8>) -> Vec<u8>;
type AnyChange = Box<dyn Fn(Vec<u8>) -> Vec<u8> + Send + Sync>;

fn changes() -> [(&'static str, Change); 7] {
    [
        ("another call's", |mut record| {
            record[7] ^= 1;
            record
        }),
        ("a call itself", |mut record| {
            record[11] = 0;
            record
        }),
        ("refused", |mut record| {
            record[15] = 1;
            record
        }),
        ("no such program", |mut record| {
            record[27] = 1;
            record
        }),
        ("too long by a word", |mut record| {
            record.extend([0; 4]);
            let length = u32::try_from(record.len() - 4).unwrap();
            record[..4].copy_from_slice(&((1 << 31) + length).to_be_bytes());
            record
        }),
        ("announced as 2 GiB", |mut record| {
            record[..4].fill(0xFF);
            record
        }),
        ("all ones behind its head", |mut record| {
            record[32..].fill(0xFF);
            record
        }),
    ]
}

/// The first bytes of a record, as if they were all of it.
fn cut(mut record: Vec<u8>, length: usize) -> Vec<u8> {
    record.truncate(4 + length);
    record[..4].copy_from_slice(&((1_u32 << 31) + u32::try_from(length).unwrap()).to_be_bytes());
    record
}

/// A reply that is cut, too long, of another call, or of nobody's making.
#[test]
fn replies_that_make_no_sense_are_errors_at_once() {
    for procedure in procedures().into_iter().filter(|procedure| *procedure > 0) {
        let mut broken: Vec<(String, AnyChange)> =
            changes().into_iter().map(|(what, change)| (what.to_owned(), Box::new(change) as _)).collect();
        for words in (0..24).chain([30, 50]) {
            // What is shorter is cut by a word.
            let shorter = move |record: Vec<u8>| {
                let length = (4 * words).min(record.len() - 8);
                cut(record, length)
            };
            broken.push((format!("cut to {words} words"), Box::new(shorter)));
        }
        for (what, change) in broken {
            let fake = FakeNfs::start(Manner::default());
            let store = fake.open("");
            let change = Arc::new(change);
            fake.choose(move |call, _| {
                if call != procedure {
                    return Fate::Pass;
                }
                let change = change.clone();
                Fate::Change(Box::new(move |record| change(record)))
            });
            let begun = Instant::now();
            match work(&fake, &store) {
                // What is not known of may_write is found out.
                Ok(_) => panic!("{procedure}, {what}: it was taken"),
                Err(error) => assert_eq!(error.kind(), Kind::Io, "{procedure}, {what}: {}", told(&error)),
            }
            assert!(begun.elapsed() < Duration::from_secs(4), "{procedure}, {what}: {:?}", begun.elapsed());
        }
    }
}

/// It says so by FSINFO, or by the call.
#[test]
fn a_server_without_hard_links_is_found_out() {
    for (links, status) in
        [(false, None), (true, Some(nfsstat3::NFS3ERR_NOTSUPP)), (true, Some(nfsstat3::NFS3ERR_PERM))]
    {
        let fake = FakeNfs::start(Manner { links, ..Manner::default() });
        let store = fake.open("");
        fake.choose(move |call, _| match status {
            Some(status) if call == LINK => Fate::Answer(status),
            _ => Fate::Pass,
        });
        let found = store.probe(&StorePath::root()).unwrap();
        assert_eq!(found, Capabilities { network: true, ..found }, "{found:?}");
        assert!(!found.hard_links, "{found:?}");
        store.create(&path("a")).unwrap();
        let error = store.hard_link(&path("a"), &path("b")).unwrap_err();
        assert!(error.is_unsupported() && told(&error).contains("hard links"), "{}", told(&error));
        assert_eq!(fake.calls().contains(&LINK), links);
    }
}

#[test]
fn a_server_of_short_names_is_named() {
    let fake = FakeNfs::start(Manner { name_max: 64, ..Manner::default() });
    let error = fake.open("").probe(&StorePath::root()).unwrap_err();
    assert!(
        told(&error).contains("names have at most 64 bytes there, and 128 are needed"),
        "{}",
        told(&error)
    );
}

/// What is refused when it is made durable was not written.
#[test]
fn space_that_runs_out_at_a_commit_is_told_there() {
    for (status, procedure) in [
        (nfsstat3::NFS3ERR_NOSPC, COMMIT),
        (nfsstat3::NFS3ERR_DQUOT, COMMIT),
        (nfsstat3::NFS3ERR_DQUOT, WRITE),
        (nfsstat3::NFS3ERR_DQUOT, SETATTR),
    ] {
        let fake = FakeNfs::start(Manner::default());
        let store = fake.open("");
        let file = store.create(&path("a")).unwrap();
        fake.choose(move |call, _| if call == procedure { Fate::Answer(status) } else { Fate::Pass });
        let bytes = pattern(10_000);
        let done = file.write_at(0, &bytes).and_then(|()| file.set_length(5000)).and_then(|()| file.sync());
        let error = done.unwrap_err();
        assert_eq!(error.kind(), Kind::NoSpace, "{}", told(&error));
        // What is kept is made durable once there is room.
        fake.choose(|_, _| Fate::Pass);
        if procedure == COMMIT {
            file.sync().unwrap();
            assert!(fake.bytes("a") == bytes);
        }
    }
}

/// A link that a server puts where a directory was is not walked through, whatever it says of it.
#[test]
fn the_server_is_asked_for_one_name_at_a_time() {
    let place = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(place.path().join("d/e")).unwrap();
    std::fs::write(place.path().join("d/e/a"), "a").unwrap();
    std::os::unix::fs::symlink("d", place.path().join("link")).unwrap();
    let fake = FakeNfs::of(place.path(), Manner::default());
    let store = fake.open("");
    fake.choose(|_, _| Fate::Pass);
    assert_eq!(store.stat(&path("d/e/a")).unwrap().length, 1);
    assert_eq!(fake.calls(), [LOOKUP; 3]);
    for name in ["link", "link/e", "link/e/a"] {
        let error = store.open(&path(name)).unwrap_err();
        assert!(matches!(error, BackendError::NotPlain { .. }), "{name}: {}", told(&error));
    }
    assert!(!fake.calls().contains(&5), "a link was read");
    assert!(!fake.calls().contains(&READ) && !fake.calls().contains(&READDIRPLUS));
}
