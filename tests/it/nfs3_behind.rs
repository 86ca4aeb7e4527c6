//! What is written behind whoever writes, and read ahead of whoever reads: nobody sees the difference, but for the time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nfs3_types::nfs3::nfsstat3;
use qchain::backend::{Backend, BackendError, Result, StoreFile};
use qchain::failure::{Failure as _, Kind};
use qchain::ids::StorePath;

use super::support::chains::Numbers;
use super::support::fake_nfs::{FakeNfs, Fate, Manner};

const READ: u32 = 6;
const WRITE: u32 = 7;
const RENAME: u32 = 14;
const LINK: u32 = 15;
const COMMIT: u32 = 21;
const MIB: usize = 1 << 20;

fn path(text: &str) -> StorePath {
    StorePath::parse(text).unwrap()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

fn read(file: &dyn StoreFile, offset: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xEE; length];
    let count = file.read_at(offset as u64, &mut bytes).unwrap();
    bytes.truncate(count);
    bytes
}

/// Shut until it is opened.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn wait(&self) {
        drop(self.opened.wait_while(self.open.lock().unwrap(), |open| !*open).unwrap());
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

/// How often the server was called so.
fn count(fake: &FakeNfs, procedure: u32) -> usize {
    fake.calls().into_iter().filter(|call| *call == procedure).count()
}

fn no_space(done: &Result<()>) -> bool {
    matches!(done, Err(BackendError::NoSpace { .. }))
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_mins(1), "{what}");
        thread::yield_now();
    }
}

#[test]
fn whoever_writes_does_not_wait_for_the_server_but_whoever_syncs_does() {
    let fake = FakeNfs::start(Manner::default());
    let store = fake.open("&timeout=60");
    let gate = Arc::new(Gate::default());
    let shut = gate.clone();
    fake.choose(move |call, _| {
        let shut = shut.clone();
        if call == WRITE { Fate::Late(Box::new(move || shut.wait())) } else { Fate::Pass }
    });
    let bytes = pattern(3 * MIB + 5);
    let file = store.create(&path("a")).unwrap();
    for (index, part) in bytes.chunks(MIB).enumerate() {
        file.write_at((index * MIB) as u64, part).unwrap();
    }
    assert!(fake.bytes("a").is_empty(), "nothing was done yet");
    assert!(read(file.as_ref(), 0, bytes.len() + 9) == bytes, "but its writer reads it");
    until("several are under way", || count(&fake, WRITE) > 1);
    thread::scope(|scope| {
        let synced = scope.spawn(|| file.sync());
        assert_eq!(count(&fake, COMMIT), 0);
        gate.open();
        synced.join().unwrap().unwrap();
    });
    assert!(fake.bytes("a") == bytes);
    assert_eq!(count(&fake, COMMIT), 1);
}

/// Another client that sees a name sees the bytes.
#[test]
fn a_file_has_its_bytes_before_it_has_another_name_or_is_looked_at() {
    type Deed = fn(&dyn Backend, &dyn StoreFile) -> Result<()>;
    let link: Deed = |store, _| store.hard_link(&path("a"), &path("b"));
    let rename: Deed = |store, _| store.rename(&path("a"), &path("b"));
    for (procedure, deed) in [(LINK, link), (RENAME, rename)] {
        let fake = Arc::new(FakeNfs::start(Manner::default()));
        let store = fake.open("&timeout=60");
        let bytes = pattern(2 * MIB);
        let whole = Arc::new(AtomicBool::new(false));
        let (server, expected, seen) = (Arc::downgrade(&fake), bytes.clone(), whole.clone());
        fake.choose(move |call, _| {
            let (server, expected, seen) = (server.clone(), expected.clone(), seen.clone());
            match call {
                WRITE => Fate::Late(Box::new(|| thread::sleep(Duration::from_millis(50)))),
                call if call == procedure => Fate::Late(Box::new(move || {
                    seen.store(server.upgrade().unwrap().bytes("a") == expected, Ordering::SeqCst);
                })),
                _ => Fate::Pass,
            }
        });
        let file = store.create(&path("a")).unwrap();
        file.write_at(0, &bytes).unwrap();
        deed(&store, file.as_ref()).unwrap();
        assert!(whole.load(Ordering::SeqCst), "{procedure}");
    }
    let fake = FakeNfs::start(Manner::default());
    let store = fake.open("&timeout=60");
    fake.choose(|call, _| match call {
        WRITE => Fate::Late(Box::new(|| thread::sleep(Duration::from_millis(50)))),
        _ => Fate::Pass,
    });
    let file = store.create(&path("a")).unwrap();
    for (round, look) in [
        (|file: &dyn StoreFile, _: &dyn Backend| file.stat().unwrap())
            as fn(&dyn StoreFile, &dyn Backend) -> _,
        |_, store| store.stat(&path("a")).unwrap(),
        |_, store| store.open(&path("a")).unwrap().stat().unwrap(),
    ]
    .into_iter()
    .enumerate()
    {
        file.write_at((round * MIB) as u64, &pattern(MIB)).unwrap();
        let then = look(file.as_ref(), &store);
        assert_eq!(then.length, ((round + 1) * MIB) as u64);
        file.sync().unwrap();
        assert_eq!(
            store.stat(&path("a")).unwrap().modified_ns,
            then.modified_ns,
            "it was not the last write"
        );
    }
}

/// Another client sees what was written by whoever closed the file, and a process that ends then takes nothing with it.
#[test]
fn whoever_closes_a_file_waits_for_the_server() {
    let fake = FakeNfs::start(Manner::default());
    let store = fake.open("&timeout=60");
    fake.choose(|call, _| match call {
        WRITE => Fate::Late(Box::new(|| thread::sleep(Duration::from_millis(50)))),
        _ => Fate::Pass,
    });
    let bytes = pattern(2 * MIB + 77);
    let file = store.create(&path("a")).unwrap();
    file.write_at(0, &bytes[..2 * MIB]).unwrap();
    file.write_at(2 * MIB as u64, &bytes[2 * MIB..]).unwrap();
    drop(file);
    assert!(fake.bytes("a") == bytes);
}

/// However the answers to what was written last fall together with the look.
#[test]
fn a_file_that_its_writer_left_is_as_long_as_what_he_wrote() {
    let fake = FakeNfs::start(Manner::default());
    let store = fake.open("&timeout=60");
    for turn in 0..300 {
        let name = format!("a{turn}");
        store.create(&path(&name)).unwrap().write_at(0, b"hello").unwrap();
        let file = store.open(&path(&name)).unwrap();
        assert_eq!(file.stat().unwrap().length, 5, "{turn}");
        assert_eq!(read(file.as_ref(), 0, 9), b"hello", "{turn}");
    }
}

/// Writes that lie over each other, answered in any order, and lost now and then.
#[test]
fn what_was_written_last_is_what_stays() {
    for seed in 0..24 {
        let mut numbers = Numbers(seed);
        let losses = u32::try_from(numbers.below(3)).unwrap();
        let fake = FakeNfs::start(Manner { losses, ..Manner::default() });
        let store = fake.open("&timeout=60");
        fake.choose(move |call, number| {
            let pause = Duration::from_micros((number as u64 * 7919 + seed) % 2000);
            if call == WRITE { Fate::Late(Box::new(move || thread::sleep(pause))) } else { Fate::Pass }
        });
        let file = store.create(&path("a")).unwrap();
        let mut model: Vec<u8> = Vec::new();
        for step in 0..120_u8 {
            let offset = usize::try_from(numbers.below(4000)).unwrap();
            let length = usize::try_from(numbers.below(1500)).unwrap();
            match numbers.below(20) {
                0 => file.sync().unwrap(),
                1 => {
                    file.set_length(offset as u64).unwrap();
                    model.resize(offset, 0);
                }
                2 => {
                    let end = model.len().min(offset + length);
                    let wanted = model.get(offset..end).unwrap_or_default();
                    let there = read(file.as_ref(), offset, length);
                    let differs = there.iter().zip(wanted).position(|(one, other)| one != other);
                    let lengths = (there.len(), wanted.len());
                    assert!(
                        there == wanted,
                        "seed {seed}, step {step}: at {differs:?} of {lengths:?}, {losses} losses"
                    );
                }
                _ => {
                    let data = vec![step; length];
                    file.write_at(offset as u64, &data).unwrap();
                    if length > 0 {
                        model.resize(model.len().max(offset + length), 0);
                        model[offset..offset + length].copy_from_slice(&data);
                    }
                }
            }
        }
        file.sync().unwrap();
        assert!(fake.bytes("a") == model, "{seed}");
        assert!(read(store.open(&path("a")).unwrap().as_ref(), 0, 6000) == model, "{seed}");
    }
}

/// What was taken stays until there is room for it; nothing more is taken meanwhile, and no sync says that all is well.
#[test]
fn a_write_that_fails_is_told_and_made_up_for() {
    for fails in 0..4 {
        let fake = FakeNfs::start(Manner::default());
        let store = fake.open("&timeout=60");
        let full = Arc::new(AtomicBool::new(true));
        let is_full = full.clone();
        fake.choose(move |call, number| match call {
            WRITE if number >= fails && is_full.load(Ordering::SeqCst) => {
                Fate::Answer(nfsstat3::NFS3ERR_NOSPC)
            }
            _ => Fate::Pass,
        });
        let file = store.create(&path("a")).unwrap();
        let bytes = pattern(4 * MIB);
        let parts = bytes.chunks(MIB).enumerate();
        let taken = parts.map(|(index, part)| file.write_at((index * MIB) as u64, part));
        let taken = taken.take_while(|done| done.is_ok() || !no_space(done)).count();
        assert!(taken >= fails, "{fails}: {taken}");
        // By whoever makes it durable, however often he tries.
        for _ in 0..2 {
            assert!(no_space(&file.sync()), "{fails}");
            assert!(no_space(&store.open(&path("a")).unwrap().sync()), "{fails}");
        }
        assert!(no_space(&file.write_at(0, b"x")), "{fails}");
        full.store(false, Ordering::SeqCst);
        store.open(&path("a")).unwrap().sync().unwrap();
        assert!(fake.bytes("a") == bytes[..taken * MIB], "{fails}");
        file.write_at(0, b"x").unwrap();
        file.sync().unwrap();
        assert_eq!(fake.bytes("a")[..2], [b'x', 1]);
    }
}

/// When those are gone who wrote, others may write: what was lost does not come back over that.
#[test]
fn what_was_lost_is_given_up_with_whoever_wrote_it() {
    let fake = FakeNfs::start(Manner::default());
    let store = fake.open("&timeout=60");
    fake.choose(|call, _| match call {
        WRITE => Fate::Answer(nfsstat3::NFS3ERR_NOSPC),
        _ => Fate::Pass,
    });
    let file = store.create(&path("a")).unwrap();
    file.write_at(0, b"lost").unwrap();
    assert!(no_space(&file.sync()));
    drop(file);
    until("it was not given up", || {
        let before = count(&fake, WRITE);
        assert!(no_space(&store.open(&path("a")).unwrap().sync()));
        count(&fake, WRITE) == before
    });
    fake.choose(|_, _| Fate::Pass);
    assert!(no_space(&store.open(&path("a")).unwrap().sync()), "whoever comes late is told");
    let others = fake.open("");
    others.open_writable(&path("a")).unwrap().write_at(0, b"others").unwrap();
    until("others write", || fake.bytes("a") == b"others");
    let file = store.open_writable(&path("a")).unwrap();
    file.write_at(6, b" and we").unwrap();
    file.sync().unwrap();
    assert_eq!(fake.bytes("a"), b"others and we");
    store.remove_file(&path("a")).unwrap();
}

#[test]
fn what_could_not_be_made_durable_is_written_again_first() {
    let fake = FakeNfs::start(Manner::default());
    let store = fake.open("&timeout=60");
    fake.choose(|call, number| match call {
        COMMIT if number < 3 => Fate::Answer(nfsstat3::NFS3ERR_IO),
        _ => Fate::Pass,
    });
    let file = store.create(&path("a")).unwrap();
    file.write_at(0, b"first").unwrap();
    for time in 1..=3 {
        assert_eq!(file.sync().unwrap_err().kind(), Kind::Io);
        assert_eq!((count(&fake, WRITE), count(&fake, COMMIT)), (time, time));
    }
    file.sync().unwrap();
    assert_eq!((count(&fake, WRITE), count(&fake, COMMIT)), (4, 4));
    assert_eq!(fake.bytes("a"), b"first");
}

/// By several writers, each in its own place, as blocks of a copy come.
#[test]
fn little_writes_that_follow_each_other_are_one_call() {
    let fake = FakeNfs::start(Manner::default());
    let store = fake.open("&timeout=60");
    fake.choose(|_, _| Fate::Pass);
    let file = store.create(&path("a")).unwrap();
    let bytes = pattern(4 * MIB);
    for step in (0..MIB).step_by(64 << 10) {
        for place in [0, MIB, 2 * MIB, 3 * MIB] {
            file.write_at((place + step) as u64, &bytes[place + step..place + step + (64 << 10)]).unwrap();
        }
    }
    file.sync().unwrap();
    assert!(fake.bytes("a") == bytes);
    assert_eq!(count(&fake, WRITE), 4);
    // What is left of them goes when it is asked about, too.
    file.write_at(4 * MIB as u64, b"end").unwrap();
    assert_eq!(store.stat(&path("a")).unwrap().length, 4 * MIB as u64 + 3);
    assert_eq!(count(&fake, WRITE), 5);
}

/// Much is made durable before anybody asks, so that not all of it is kept.
#[test]
fn not_all_of_a_large_file_is_kept() {
    let fake = FakeNfs::start(Manner::default());
    let store = fake.open("&timeout=60");
    fake.choose(|_, _| Fate::Pass);
    let file = store.create(&path("a")).unwrap();
    let part = pattern(MIB);
    for index in 0..100 {
        file.write_at((index * MIB) as u64, &part).unwrap();
    }
    assert!(count(&fake, COMMIT) >= 1, "{} commits", count(&fake, COMMIT));
    file.sync().unwrap();
    assert_eq!(fake.bytes("a").len(), 100 * MIB);
    assert!(fake.bytes("a").chunks(MIB).all(|piece| piece == part));
}

#[test]
fn what_is_announced_is_read_before_it_is_asked_for_and_once() {
    let fake = FakeNfs::start(Manner::default());
    let store = fake.open("&timeout=60");
    let bytes = pattern(8 * MIB);
    let file = store.create(&path("a")).unwrap();
    file.write_at(0, &bytes).unwrap();
    file.sync().unwrap();
    drop(file);
    fake.choose(|_, _| Fate::Pass);
    let file = store.open(&path("a")).unwrap();
    file.will_read(0, 4 * MIB as u64);
    until("nobody read ahead", || count(&fake, READ) == 4);
    for offset in [0, MIB + 77, 3 * MIB - 5] {
        assert!(read(file.as_ref(), offset, 1000) == bytes[offset..offset + 1000]);
    }
    assert_eq!(count(&fake, READ), 4, "it was read once more");
    // What this process writes lies over what was read ahead of that.
    file.will_read(4 * MIB as u64, MIB as u64);
    until("nobody read ahead", || count(&fake, READ) == 5);
    let writer = store.open_writable(&path("a")).unwrap();
    writer.write_at(4 * MIB as u64, b"changed").unwrap();
    assert_eq!(read(file.as_ref(), 4 * MIB, 7), b"changed");
    writer.sync().unwrap();
    drop(writer);
    assert_eq!(read(file.as_ref(), 4 * MIB, 7), b"changed");
    // What could not be read ahead is read when it is asked for.
    fake.choose(|call, number| match call {
        READ if number == 0 => Fate::Answer(nfsstat3::NFS3ERR_IO),
        _ => Fate::Pass,
    });
    file.will_read(6 * MIB as u64, MIB as u64);
    assert!(read(file.as_ref(), 6 * MIB, MIB) == bytes[6 * MIB..7 * MIB]);
    // Past the end there is nothing, however much is announced.
    file.will_read(8 * MIB as u64 - 10, 64 * MIB as u64);
    assert!(read(file.as_ref(), 8 * MIB - 10, 100) == bytes[8 * MIB - 10..]);
}
