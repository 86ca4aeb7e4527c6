//! Deletions by an export without a mount: what QEMU says of the survivors, and what becomes of a deletion whose answers
//! are lost, or whose server is killed or stopped, at any of its calls.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use qchain::backend::Means;
use qchain::backend::faulty::Faulty;
use qchain::ops::delete::{ModeChoice, Terms};
use qchain::store::Stores;
use qchain::store::record::StoreKind;

use super::delete_oracle::{DELETIONS, chains, check_known, check_proof, check_survivors};
use super::support::chains::{NAMES, build, copy, folders};
use super::support::crash::{
    Chain, Files, Judge, Row, Shape, Table, difference, full, left_inside, outside, seed,
};
use super::support::killing::{Verb, act, mutations};
use super::support::mounts::{FsKind, LoopMount};
use super::support::nfs::{Ganesha, clear, open};
use super::support::proxy::{Fate, Proxy};
use super::support::store::{adopt_in, delete, digests, init, open_with, owner_and_mode};

/// Every kind of chain, adopted and deleted from over NFS; bounded, every seventh.
#[test]
fn every_kind_of_chain_over_nfs() {
    let place = tempfile::tempdir().unwrap();
    let server = Ganesha::start(place.path());
    let step = if full() { 1 } else { 7 };
    for (index, (name, specs)) in chains().iter().enumerate().step_by(step) {
        let (store, truth) = folders(place.path(), &format!("original{index}"));
        build(&store, &truth, specs);
        init(&store, StoreKind::Plain);
        let deletions = if full() { DELETIONS } else { &DELETIONS[..3] };
        for (turn, deleted) in deletions.iter().enumerate() {
            let context = format!("{name}, without {deleted:?}: {specs:#?}");
            let below = format!("copy{index}-{turn}");
            let copied = place.path().join(&below);
            copy(&store, &copied);
            let before: Vec<_> = NAMES[..4].iter().map(|name| owner_and_mode(&copied.join(name))).collect();
            let stores = by_nfs(&copied, &server.url_of(&below, ""));
            let adopted = adopt_in(&stores, false);
            assert!(adopted.failure.is_none() && adopted.findings.is_empty(), "{context}: {adopted:?}");
            let report = delete(&stores, deleted, ModeChoice::Auto)
                .unwrap_or_else(|error| panic!("{context}: {error}"));
            assert!(report.first_failure().is_none(), "{context}: {:?}", report.first_failure());
            check_proof(&report, Means::Copy, &context);
            check_known(&copied, &context);
            check_survivors(&copied, &truth, deleted, &before, &context);
            let survivors: Vec<&str> =
                NAMES[..4].iter().copied().filter(|name| !deleted.contains(name)).collect();
            let over_nfs = digests(&stores, &survivors);
            assert_eq!(over_nfs, digests(&super::support::store::open(&copied), &survivors), "{context}");
            fs::remove_dir_all(&copied).unwrap();
        }
        fs::remove_dir_all(&store).unwrap();
        fs::remove_dir_all(&truth).unwrap();
    }
}

/// The only store, by an export; one file is read at a time, so that calls come in one order.
fn by_nfs(root: &Path, url: &str) -> Stores {
    open_with(root, Arc::new(open(url))).with_readers(1)
}

/// A store behind a proxy, and what a clean deletion of its chain makes of it.
struct Room {
    _mount: LoopMount,
    root: PathBuf,
    chain: Chain,
    judge: Judge,
    proxy: Proxy,
    /// By the proxy.
    url: String,
    direct: String,
    old: Files,
    new: Files,
    /// The procedures of NFS that a clean run calls, in order.
    calls: Vec<u32>,
}

impl Room {
    /// `more` are options of the URL.
    fn new(mount: LoopMount, server: &Ganesha, shape: Shape, more: &str) -> Self {
        let chain = Chain::make(shape, seed());
        // The file system's root, which stays: the server knows a directory's handle longer than the directory.
        let directory = mount.path();
        chain.put(&directory);
        let proxy = Proxy::start(server.port());
        let (url, direct) = (server.url_by(proxy.port(), more), server.url(""));
        let old = outside(&directory);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let note = seen.clone();
        proxy.choose_by(move |_, procedure| {
            note.lock().unwrap().push(procedure);
            Fate::Pass
        });
        let mut room = Self {
            _mount: mount,
            root: directory,
            chain,
            judge: Judge::default(),
            proxy,
            url,
            direct,
            old,
            new: Files::new(),
            calls: Vec::new(),
        };
        room.delete().unwrap();
        room.calls.clone_from(&seen.lock().unwrap());
        room.new = outside(&room.root);
        assert!(left_inside(&room.root).is_empty(), "{:?}", left_inside(&room.root));
        assert!(difference(&room.old, &room.new).len() >= 2 && room.calls.len() > 100, "{:?}", room.calls);
        room
    }

    fn put(&self) {
        clear(&self.direct);
        self.chain.put(&self.root);
    }

    fn delete(&self) -> Result<(), String> {
        let stores = by_nfs(&self.root, &self.url);
        act(&stores, Verb::on(&self.chain), &self.chain.targets, ModeChoice::Copy, Terms::default())
    }

    /// The calls of a clean run that change something, by their numbers.
    fn changing(&self) -> Vec<usize> {
        let changes = |procedure: &u32| matches!(procedure, 2 | 7..=15 | 21);
        let numbers = self.calls.iter().enumerate();
        numbers.filter(|(_, procedure)| changes(procedure)).map(|(number, _)| number).collect()
    }

    fn row(&self, what: &str, number: usize) -> Row {
        let call = format!("procedure {}", self.calls.get(number).copied().unwrap_or_default());
        let (verb, fs, shape) = (what.to_owned(), "nfs".to_owned(), self.chain.label());
        Row { verb, mode: "copy", fs, shape, number: number as u64, call, ..Row::default() }
    }

    /// A deletion that must succeed, whatever `hurt` does to it, and take effect once.
    fn point(&self, what: &str, number: usize, hurt: impl FnOnce()) -> Row {
        let mut row = self.row(what, number);
        self.put();
        hurt();
        let mut done = self.delete();
        self.proxy.choose(|_| Fate::Pass);
        if what.starts_with("server-killed") {
            // A server that dies within a CREATE may leave a file that nobody can tell for his. It is nobody's then: a temporary
            // that whoever comes next sweeps. If no other name would do, the deletion has failed: with the old state, or, once it
            // was decided, with an error that says so, and recovery makes the new one.
            if !left_inside(&self.root).is_empty() {
                let stores = by_nfs(&self.root, &self.direct);
                act(&stores, Verb::Recover, &[], ModeChoice::Auto, Terms::default()).unwrap();
            }
            done = match done {
                Err(error) if error.contains("exists already") && error.contains("it is decided") => {
                    "recovered".clone_into(&mut row.end);
                    Ok(())
                }
                Err(error) if error.contains("exists already") => {
                    let allowed = [&self.old, &self.new];
                    let uncertain = error.contains("is not certain");
                    self.settled(&mut row, &allowed[..if uncertain { 2 } else { 1 }]);
                    if outside(&self.root) == self.new { Ok(()) } else { self.delete() }
                }
                done => done,
            };
        }
        match done {
            Ok(()) if row.end.is_empty() => "done".clone_into(&mut row.end),
            Ok(()) => {}
            Err(error) => row.after.push(error),
        }
        self.settled(&mut row, &[&self.new]);
        row
    }

    /// One of these states, sound, and nothing else.
    fn settled(&self, row: &mut Row, allowed: &[&Files]) {
        let now = outside(&self.root);
        if !allowed.contains(&&now) {
            let differs: Vec<_> = allowed.iter().map(|state| difference(&now, state)).collect();
            row.after.push(format!("differs from what is allowed in {differs:?}"));
        }
        row.after.extend(self.chain.wrong(&self.judge, &now, true));
        row.leaks.extend(left_inside(&self.root));
    }
}

fn ground() -> LoopMount {
    LoopMount::in_memory(FsKind::Ext4, 256 << 20)
}

/// Each `step`-th of the points from where the seed says; all of them in the full form.
fn some(points: Vec<usize>, step: usize) -> Vec<usize> {
    let step = if full() { 1 } else { step };
    points.into_iter().skip(usize::try_from(seed()).unwrap() % step).step_by(step).collect()
}

#[test]
fn each_lost_answer_of_a_deletion_leaves_its_effect_once() {
    let mount = ground();
    let server = Ganesha::start(&mount.path());
    let room = Room::new(mount, &server, Shape::Cloudstack, "&connections=2");
    let mut table = Table::new("nfs-lost-answers");
    let point = |fate: Fate, number: usize| {
        room.point(&format!("{fate:?}").to_lowercase(), number, || {
            room.proxy.choose(move |at| if at == number { fate } else { Fate::Pass });
        })
    };
    table.rows.extend(some(room.changing(), 2).into_iter().map(|number| point(Fate::CutAfter, number)));
    table.rows.extend(some(room.changing(), 7).into_iter().map(|number| point(Fate::CutBefore, number)));
    let all: Vec<usize> = (0..room.calls.len()).collect();
    table.rows.extend(some(all.clone(), 41).into_iter().map(|number| point(Fate::CutAfter, number)));
    if full() {
        table.rows.extend(all.into_iter().map(|number| point(Fate::CutBefore, number)));
    }
    // Every third call, whatever it is.
    table.rows.push(room.point("cutafter-often", 0, || {
        room.proxy.choose(|at| if at % 3 == 2 { Fate::CutAfter } else { Fate::Pass });
    }));
    table.finish();
}

/// The connection stays, and nobody says anything on it.
#[test]
fn each_swallowed_answer_of_a_deletion_leaves_its_effect_once() {
    let mount = ground();
    let server = Ganesha::start(&mount.path());
    let room = Room::new(mount, &server, Shape::Cloudstack, "&connections=2&timeout=8");
    let mut table = Table::new("nfs-swallowed-answers");
    for number in some(room.changing(), 11) {
        table.rows.push(room.point("swallow", number, || {
            room.proxy.choose(move |at| if at == number { Fate::Swallow } else { Fate::Pass });
        }));
    }
    table.finish();
}

/// At each call: before it reaches the server, and after it was answered.
#[test]
fn a_server_killed_at_each_call_of_a_deletion_loses_nothing() {
    let mount = ground();
    let server = Arc::new(Mutex::new(Ganesha::start_alone(&mount.path())));
    let room = Room::new(mount, &server.lock().unwrap(), Shape::Cloudstack, "&timeout=40");
    let (kill, killed) = mpsc::channel();
    let restarted = server.clone();
    let [kills, restarts] = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
    let count = restarts.clone();
    // One thread for all: a server ends with the thread that started it.
    let starter = std::thread::spawn(move || {
        for () in killed {
            std::thread::sleep(Duration::from_millis(100));
            restarted.lock().unwrap().restart();
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    let mut table = Table::new("nfs-server-killed");
    let mut unreached = 0;
    for number in some((0..room.calls.len()).collect(), 37) {
        for wait in [0, 10] {
            let before = kills.load(Ordering::SeqCst);
            table.rows.push(room.point(&format!("server-killed-{wait}"), number, || {
                let (server, kill, kills) = (server.clone(), kill.clone(), kills.clone());
                room.proxy.choose(move |at| {
                    if at == number {
                        kills.fetch_add(1, Ordering::SeqCst);
                        let (server, kill) = (server.clone(), kill.clone());
                        let end = move || {
                            server.lock().unwrap().kill();
                            kill.send(()).unwrap();
                        };
                        if wait == 0 {
                            end();
                        } else {
                            std::thread::spawn(move || {
                                std::thread::sleep(Duration::from_millis(wait));
                                end();
                            });
                        }
                    }
                    Fate::Pass
                });
            }));
            // One run has some calls less than another.
            unreached += usize::from(kills.load(Ordering::SeqCst) == before);
            // Also after the last call.
            let begun = Instant::now();
            while restarts.load(Ordering::SeqCst) < kills.load(Ordering::SeqCst) {
                assert!(begun.elapsed() < Duration::from_mins(1), "{number}: the server was not killed");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
    drop(kill);
    room.proxy.choose(|_| Fate::Pass);
    starter.join().unwrap();
    assert!(unreached <= 10, "{unreached} calls were not made again");
    table.finish();
}

/// For a while, and a deletion waits and goes on; for longer than it waits, and it fails, and is finished or taken back
/// once the server goes on.
#[test]
fn a_server_that_stands_still_delays_a_deletion_or_fails_it_whole() {
    let mount = ground();
    let server = Ganesha::start(&mount.path());
    let (seconds, timeout) = if full() { (30, 60) } else { (4, 16) };
    let room = Room::new(mount, &server, Shape::Cloudstack, &format!("&timeout={timeout}"));
    let mut table = Table::new("nfs-server-stopped");
    let changing = room.changing();
    let picks: Vec<usize> = some(changing.clone(), changing.len().div_ceil(4));
    let picks = if full() { picks.into_iter().step_by(5).collect() } else { picks };
    for &number in &picks {
        let begun = Instant::now();
        table.rows.push(room.point("server-stopped", number, || {
            let server = server.clone();
            room.proxy.choose(move |at| {
                if at == number {
                    server.stop();
                    let server = server.clone();
                    std::thread::spawn(move || {
                        std::thread::sleep(Duration::from_secs(seconds));
                        server.go_on();
                    });
                }
                Fate::Pass
            });
        }));
        assert!(begun.elapsed() >= Duration::from_secs(seconds), "it was not stopped: {:?}", begun.elapsed());
    }
    let hasty =
        Room { url: format!("{}&timeout=2", room.url.replace(&format!("&timeout={timeout}"), "")), ..room };
    for &number in &picks {
        table.rows.push(abandoned(&hasty, &server, number));
    }
    table.finish();
}

/// A deletion whose server stands still for longer than it waits.
fn abandoned(room: &Room, server: &Arc<Ganesha>, number: usize) -> Row {
    let mut row = room.row("server-stays-away", number);
    room.put();
    let stopped = server.clone();
    room.proxy.choose(move |at| {
        if at == number {
            stopped.stop();
        }
        Fate::Pass
    });
    // What it does at the very end nobody needs: then all is as it is to be.
    if room.delete().is_ok() && outside(&room.root) != room.new {
        row.after.push("it succeeded with nobody to answer".to_owned());
    }
    room.proxy.choose(|_| Fate::Pass);
    row.before = room.chain.wrong(&room.judge, &outside(&room.root), false);
    server.go_on();
    // What it was asked meanwhile is done now.
    std::thread::sleep(Duration::from_secs(1));
    let stores = by_nfs(&room.root, &room.url);
    if let Err(error) = act(&stores, Verb::Recover, &[], ModeChoice::Auto, Terms::default()) {
        row.after.push(error);
    }
    room.settled(&mut row, &[&room.old, &room.new]);
    row
}

/// No clones, no locks: a plan says so, and in place is for who vouches that nobody else reads.
#[test]
fn in_place_needs_a_word_of_the_operator() {
    use qchain::failure::{Code, Failure as _};
    let place = tempfile::tempdir().unwrap();
    let server = Ganesha::start(place.path());
    let root = place.path().join("s");
    let chain = Chain::make(Shape::Middle, seed());
    chain.put(&root);
    let faulty = Faulty::new(Arc::new(open(&server.url_of("s", ""))));
    let stores = open_with(&root, Arc::new(faulty.clone()));
    let targets: Vec<&str> = chain.targets.iter().map(String::as_str).collect();
    for (mode, word) in [(ModeChoice::InPlace, "--exclusive"), (ModeChoice::Clone, "share extents")] {
        let refused = delete(&stores, &targets, mode).unwrap_err();
        assert_eq!(refused.code(), Code::ModeImpossible);
        assert!(refused.to_string().contains(word), "{refused}");
    }
    assert!(!mutations(&faulty.trace()).iter().any(|call| call.contains(" a")), "members were touched");
    assert_eq!(outside(&root), chain.files);
}
