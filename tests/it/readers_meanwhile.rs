//! Whoever reads a survivor while others are merged into it sees no difference and meets no error.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qchain::change::Site;
use qchain::change::recover::Action;
use qchain::change::witness::Witness;
use qchain::failure::{Failure, Kind as FailureKind, with_causes};
use qchain::ops::delete::{ModeChoice, Terms};
use qchain::ops::recover::recover;
use qchain::progress::Cancel;
use qchain::store::record::StoreKind;

use super::support::chains::{Kind, NAMES, Numbers, Spec, assert_true, build, copy, folders};
use super::support::crash::{full, seed};
use super::support::later::Later;
use super::support::mounts::{FsKind, LoopMount};
use super::support::qemu::{run, text};
use super::support::reader::Layers;
use super::support::store::{LEASE, delete_on, init, left, open};

/// One day, in nanoseconds.
const DAY: i64 = 86_400_000_000_000;

/// Tells a thread to end when this goes, also when a test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a reader counts.
#[derive(Default)]
struct Counts {
    /// Views that were read and compared.
    views: AtomicU64,
    /// Times when a name went between two opens of one chain, and the chain was opened again.
    again: AtomicU64,
}

/// Reads a view, opening its chain afresh; `None` once the member's own name is gone.
fn view(member: &Path, counts: &Counts) -> Option<Vec<u8>> {
    for _ in 0..1000 {
        match Layers::try_open(member) {
            Ok(layers) => return Some(layers.read(0, layers.0[0].size)),
            Err(error) if error.kind() != ErrorKind::NotFound => panic!("{}: {error}", member.display()),
            Err(_) if !member.exists() => return None,
            Err(_) => counts.again.fetch_add(1, Ordering::Relaxed),
        };
    }
    panic!("{} has a parent that is missing", member.display());
}

/// Compares the views of members in a loop; the newest one is always there.
fn compare(store: &Path, truths: &[(&str, Vec<u8>)], counts: &Counts, stop: &AtomicBool) {
    loop {
        let last = stop.load(Ordering::Relaxed);
        for (name, truth) in truths {
            match view(&store.join(name), counts) {
                Some(bytes) => assert!(bytes == *truth, "{name} differs"),
                None => assert_ne!(*name, "e"),
            }
            counts.views.fetch_add(1, Ordering::Relaxed);
        }
        if last {
            return;
        }
    }
}

/// The modes of rounds, which of a chain of six go one after the other, and for how long they are kept. In
/// place the old file is written into: what stays for a while protects readers without QEMU's locks, and the
/// deleted name shows the survivor's view until it goes.
const ROUNDS: [(ModeChoice, &[&str], i64); 3] = [
    (ModeChoice::Clone, &["a", "b", "c", "d", "base"], 0),
    (ModeChoice::Copy, &["a", "b", "c", "d", "base"], 0),
    (ModeChoice::InPlace, &["a", "c"], DAY),
];

fn round(store: &Path, (mode, members, keep): (ModeChoice, &[&str], i64)) -> u64 {
    for member in members {
        let terms = Terms { grace_ns: keep, retention_ns: keep, ..Terms::default() };
        let report = delete_on(&open(store), &[member], mode, terms);
        let report = report.unwrap_or_else(|error| panic!("{member} by {mode:?}: {}", with_causes(&error)));
        assert!(report.first_failure().is_none(), "{member} by {mode:?}: {:?}", report.first_failure());
    }
    members.len() as u64
}

#[test]
fn a_reader_sees_no_difference_during_many_merges() {
    let mount = LoopMount::in_memory(FsKind::Xfs, 1 << 30);
    let (template, truth) = folders(&mount.path(), "template");
    let mut numbers = Numbers(seed());
    let specs: Vec<Spec> = NAMES.iter().map(|_| Kind::PLAIN.member(1 << 20, 6, &mut numbers)).collect();
    build(&template, &truth, &specs);
    let wanted = if full() { 1000 } else { 100 };
    let counts = Counts::default();
    let (mut merges, mut number) = (0, 0);
    while merges < wanted {
        let store = mount.path().join(format!("s{number}"));
        copy(&template, &store);
        init(&store, StoreKind::Plain);
        let how = ROUNDS[number % ROUNDS.len()];
        let read = NAMES.into_iter().filter(|name| how.0 != ModeChoice::InPlace || !how.1.contains(name));
        let truths: Vec<_> = read.map(|name| (name, fs::read(truth.join(name)).unwrap())).collect();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stopping = Stop(&stop);
            scope.spawn(|| compare(&store, &truths, &counts, &stop));
            merges += round(&store, how);
            drop(stopping);
        });
        assert_true(&store.join("e"), &truth.join("e"), "at the end");
        fs::remove_dir_all(&store).unwrap();
        number += 1;
    }
    let Counts { views, again } = counts;
    let (views, again) = (views.into_inner(), again.into_inner());
    eprintln!("{merges} merges, {views} views compared, {again} opened again as a name had gone");
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_mins(2), "{what} did not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Converts a member in a loop; each must succeed, and give the truth.
fn convert(member: &Path, truth: &[u8], output: &Path, done: &AtomicU64, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let ended = run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(member), text(output)]);
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        // Whoever waits for conversions sees that there are none any more.
        assert!(ended.status.success(), "after {} conversions: {said}", done.load(Ordering::Relaxed));
        assert!(fs::read(output).unwrap() == truth, "another view");
        done.fetch_add(1, Ordering::Relaxed);
    }
}

/// One merge in place under conversions, to the end of its grace and of its purge. How often it had to be
/// asked for, and how many conversions there were.
fn merge_meanwhile(store: &Path, output: &Path, truth: &[u8]) -> (u64, u64) {
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let member = store.join("b");
    let mut asked = 0;
    std::thread::scope(|scope| {
        let _stopping = Stop(&stop);
        let converting = scope.spawn(|| convert(&member, truth, output, &done, &stop));
        let two_more = || {
            let from = done.load(Ordering::Relaxed);
            until("a conversion", || converting.is_finished() || done.load(Ordering::Relaxed) >= from + 2);
        };
        two_more();
        // Without a grace the deleted name would go under a program that has just read it in a header.
        let terms = Terms { grace_ns: DAY, ..Terms::default() };
        until("the merge", || {
            asked += 1;
            let error = match delete_on(&open(store), &["a"], ModeChoice::InPlace, terms.clone()) {
                Ok(report) => report.outcomes.into_iter().find_map(|outcome| outcome.error),
                Err(error) => Some(error),
            };
            // A member that is read is not written into.
            let refused = |kind| matches!(kind, FailureKind::Refused | FailureKind::Busy);
            assert!(error.as_ref().is_none_or(|error| refused(error.kind())), "{error:?}");
            error.is_none() || converting.is_finished()
        });
        two_more();
        let (stores, cancel, clock) = (open(store), Cancel::default(), Later(2 * DAY));
        let site = Site::new(&stores, &clock, &cancel, LEASE);
        until("the end", || {
            let ended = |action: &Action| *action == Action::Finished;
            let recovered = recover(&site, Witness::None).unwrap();
            converting.is_finished() || recovered.iter().all(|one| ended(&one.action))
        });
        two_more();
    });
    (asked, done.into_inner())
}

#[test]
fn conversions_never_fail_during_a_merge_in_place() {
    for kind in [FsKind::Xfs, FsKind::Ext4] {
        let mount = LoopMount::in_memory(kind, 512 << 20);
        let (template, truth) = folders(&mount.path(), "template");
        let member = |commands: &[&str]| Spec {
            options: "cluster_size=65536".to_owned(),
            size: 16 << 20,
            commands: commands.iter().map(|command| (*command).to_owned()).collect(),
        };
        let specs = [
            member(&["write -P 1 0 12M"]),
            member(&["write -P 2 1M 6M", "write -z 8M 1M"]),
            member(&["write -P 3 2M 2M", "write -P 4 9M 5M", "write -z 0 64k"]),
        ];
        build(&template, &truth, &specs);
        let bytes = fs::read(truth.join("b")).unwrap();
        for number in 0..if full() { 50 } else { 3 } {
            let store: PathBuf = mount.path().join(format!("s{number}"));
            copy(&template, &store);
            init(&store, StoreKind::Plain);
            let (asked, conversions) = merge_meanwhile(&store, &mount.path().join("output"), &bytes);
            assert_eq!(left(&store), ["b", "base"]);
            assert_true(&store.join("b"), &truth.join("b"), "at the end");
            eprintln!("{kind:?}: asked {asked} times, {conversions} conversions");
            fs::remove_dir_all(&store).unwrap();
        }
    }
}
