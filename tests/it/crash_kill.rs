//! SIGKILL at every call that changes a store: of a deletion, of the recovery after it, of an undo.
//!
//! The points are the mutating calls of a clean run; each is met by a process of its own, which really dies.
//! The bounded form takes all points of some cases and steps through the others by the seed; `QCHAIN_FULL`
//! takes all of all.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use qchain::backend::faulty::Faulty;
use qchain::change::recover::{Action, Recovered};
use qchain::change::witness::Witness;
use qchain::change::{Site, SystemClock};
use qchain::ops::delete::{ModeChoice, Terms};
use qchain::ops::recover::{purge, recover};
use qchain::progress::Cancel;
use qchain::store::Stores;
use tempfile::TempDir;

use super::support::crash::{
    Chain, Files, Judge, Row, Shape, Table, difference, full, left_inside, outside, seed, word,
};
use super::support::killing::{Death, LONG, Order, Verb, act, begins, mutations, obey};
use super::support::known::{self, Wanted};
use super::support::later::Later;
use super::support::mounts::{Bound, FsKind, LoopMount, write_out};
use super::support::nfs::{self, Ganesha};
use super::support::store::{backend, open, open_with};

/// How far free space may be from what it was, in bytes: directories and journals grow.
const NOISE: u64 = 192 << 10;

/// Also what the killed processes are made of.
#[test]
fn a_process_kills_itself() {
    if obey() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let chain = Chain::make(Shape::Tip, 1);
    let room = Room::new(folder.path(), FsKind::Ext4);
    room.put(&chain);
    let order = room.order(&chain, Verb::Delete, ModeChoice::Auto);
    assert_eq!(order.dying(Death::Before(0)).run().unwrap().len(), 1);
    assert!(order.run().unwrap().len() > 10);
    assert!(order.dying(Death::Before(10_000)).run().is_err(), "it did not die");
}

/// Where points are tried.
struct Room {
    root: PathBuf,
    fs: FsKind,
    /// An export that it is reached by, instead of its directory.
    url: Option<String>,
    judge: Judge,
    /// For what is not on the file system that is looked at.
    aside: TempDir,
}

impl Room {
    fn new(directory: &Path, fs: FsKind) -> Self {
        let (judge, aside) = (Judge::default(), tempfile::tempdir().unwrap());
        Self { root: directory.join("s"), fs, url: None, judge, aside }
    }

    /// As the one that changes it does.
    fn open(&self) -> Stores {
        open_with(&self.root, backend(&self.root, self.url.as_deref()))
    }

    fn order(&self, chain: &Chain, verb: Verb, mode: ModeChoice) -> Order {
        Order {
            root: self.root.clone(),
            url: self.url.clone(),
            verb: if verb == Verb::Delete { Verb::on(chain) } else { verb },
            members: chain.targets.clone(),
            mode: word(mode).to_owned(),
            grace_ns: 0,
            retention_ns: 0,
            death: Death::Never,
            trace: self.aside.path().join("trace"),
        }
    }

    fn put(&self, chain: &Chain) {
        if let Some(url) = &self.url {
            nfs::clear(url);
        }
        chain.put(&self.root);
        // Members are long on the disk when they are deleted. What is not yet would go there together with what a merge
        // adds to it, on btrfs as one extent, which is kept whole as long as a part of it is used.
        write_out(&self.root);
    }

    fn row(&self, verb: &str, chain: &Chain, mode: ModeChoice) -> Row {
        let fs = if self.url.is_some() { "nfs".to_owned() } else { format!("{:?}", self.fs).to_lowercase() };
        Row { verb: verb.to_owned(), mode: word(mode), fs, shape: chain.label(), ..Row::default() }
    }

    /// What is known of adopted members once all is recovered: all of it, and nothing else.
    fn known(&self, chain: &Chain, row: &mut Row) {
        if chain.adopted {
            let (wrong, strays) = known::wrong(&open(&self.root), Wanted::All);
            row.after.extend(wrong);
            row.leaks.extend(strays);
        }
    }

    /// The bytes free, once all is written out.
    fn free(&self) -> u64 {
        write_out(&self.root);
        let space = rustix::fs::statvfs(&self.root).unwrap();
        space.f_bfree * space.f_frsize
    }

    /// The same, once it is as much as that: file systems free the blocks of deleted files in the background.
    fn freed(&self, wanted: u64) -> u64 {
        let mut free = self.free();
        for _ in 0..100 {
            if free + NOISE >= wanted {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
            free = self.free();
        }
        free
    }

    fn recover(&self) -> Vec<Recovered> {
        let (stores, cancel) = (self.open(), Cancel::default());
        let site = Site::new(&stores, &SystemClock, &cancel, LONG);
        recover(&site, Witness::None).unwrap()
    }
}

/// The two states between which there is nothing.
struct States {
    old: (Files, u64),
    new: (Files, u64),
}

impl States {
    /// Which of the two it is, or what is left over of which; and what is known of it.
    fn tell(&self, room: &Room, chain: &Chain, row: &mut Row) {
        let now = outside(&room.root);
        let (name, (files, free)) =
            if now == self.old.0 { ("not-done", &self.old) } else { ("done", &self.new) };
        name.clone_into(&mut row.end);
        if now != *files {
            let (to_old, to_new) = (difference(&now, &self.old.0), difference(&now, &self.new.0));
            row.after.push(format!(
                "neither: differs from the old state in {to_old:?}, from the new in {to_new:?}"
            ));
        }
        row.leaks.extend(left_inside(&room.root));
        // A server keeps files open that were cleared away behind its back, with their space.
        if room.url.is_none() {
            let is = room.freed(*free);
            if is + NOISE < *free {
                row.leaks.push(format!("{is} bytes are free, not {free}"));
            }
        }
        room.known(chain, row);
    }
}

fn ended(recovered: &[Recovered], row: &mut Row) {
    for one in recovered {
        if !matches!(one.action, Action::TakenBack | Action::Finished) || !one.kept.is_empty() {
            row.after.push(format!("recovery: {:?} {:?}", one.action, one.kept));
        }
    }
}

/// The deaths of a run of so many calls: before each, and after the last.
fn deaths(calls: usize) -> impl Iterator<Item = Death> {
    let calls = calls as u64;
    (0..calls).map(Death::Before).chain([Death::After(calls - 1)])
}

fn call_of(death: Death) -> u64 {
    match death {
        Death::Never => 0,
        Death::Before(at) => at,
        Death::After(at) => at + 1,
    }
}

/// A clean run: its calls, and the states before and after.
fn clean(room: &Room, chain: &Chain, order: &Order) -> (Vec<String>, States) {
    room.put(chain);
    let old = (outside(&room.root), room.free());
    let calls = order.run().unwrap();
    let new = (outside(&room.root), room.free());
    assert!(left_inside(&room.root).is_empty(), "{:?}", left_inside(&room.root));
    let mut row = Row::default();
    room.known(chain, &mut row);
    assert!(row.after.is_empty() && row.leaks.is_empty(), "{row:?}");
    let wrong = chain.wrong(&room.judge, &outside(&room.root), true);
    assert!(wrong.is_empty() && difference(&old.0, &new.0).len() >= chain.targets.len(), "{wrong:?}");
    (calls, States { old, new })
}

/// Kills a deletion at its calls: all of them, or each `step`-th from one that the seed says.
fn kill_deletes(room: &Room, chain: &Chain, mode: ModeChoice, step: usize, table: &mut Table) {
    let order = room.order(chain, Verb::Delete, mode);
    let (calls, states) = clean(room, chain, &order);
    let mut met = BTreeSet::new();
    let first = usize::try_from(seed()).unwrap() % step;
    for death in deaths(calls.len()).skip(first).step_by(step) {
        let mut row = room.row("delete", chain, mode);
        row.number = call_of(death);
        room.put(chain);
        let trace = order.dying(death).run().unwrap_or_else(|error| panic!("{row:?}: {error}"));
        assert!(begins(&calls, &trace), "{row:?}: {trace:#?} do not begin the clean run: {calls:#?}");
        row.call = trace.last().cloned().unwrap();
        met.insert(trace.len() - 1);
        row.before = chain.wrong(&room.judge, &outside(&room.root), false);
        ended(&room.recover(), &mut row);
        row.after.extend(chain.wrong(&room.judge, &outside(&room.root), true));
        states.tell(room, chain, &mut row);
        table.rows.push(row);
    }
    assert!(step > 1 || met.len() == calls.len(), "calls that were no point: {calls:?}");
}

/// Kills the recovery of deletions that were killed. Of those from which recovery takes the same course one
/// is enough.
fn kill_recoveries(room: &Room, chain: &Chain, mode: ModeChoice, step: usize, table: &mut Table) {
    let order = room.order(chain, Verb::Delete, mode);
    let (calls, states) = clean(room, chain, &order);
    let recovery = Order { verb: Verb::Recover, ..order.clone() };
    let mut courses = BTreeSet::new();
    let mut points = 0;
    for death in deaths(calls.len()) {
        room.put(chain);
        order.dying(death).run().unwrap();
        let faulty = Faulty::new(backend(&room.root, room.url.as_deref()));
        let stores = open_with(&room.root, Arc::new(faulty.clone()));
        act(&stores, Verb::Recover, &[], mode, Terms::default()).unwrap();
        let course = mutations(&faulty.trace());
        if course.is_empty() || !courses.insert(course.clone()) {
            continue;
        }
        for second in deaths(course.len()) {
            points += 1;
            if (points + usize::try_from(seed()).unwrap()) % step != 0 {
                continue;
            }
            let mut row = room.row(&format!("recover-{}", call_of(death)), chain, mode);
            row.number = call_of(second);
            room.put(chain);
            order.dying(death).run().unwrap();
            let trace =
                recovery.dying(second).run().unwrap_or_else(|error| panic!("{row:?}: {course:#?} {error}"));
            assert!(begins(&course, &trace), "{row:?}: {trace:#?} do not begin the clean run: {course:#?}");
            row.call = trace.last().cloned().unwrap();
            row.before = chain.wrong(&room.judge, &outside(&room.root), false);
            ended(&room.recover(), &mut row);
            row.after.extend(chain.wrong(&room.judge, &outside(&room.root), true));
            states.tell(room, chain, &mut row);
            table.rows.push(row);
        }
    }
    assert!(courses.len() > 3, "{courses:?}");
}

/// One day, in nanoseconds.
const DAY: i64 = 86_400_000_000_000;

/// Kills an undo at its calls. What was not undone is as the deletion left it.
fn kill_undos(room: &Room, chain: &Chain, mode: ModeChoice, step: usize, table: &mut Table) {
    let mut order = room.order(chain, Verb::Delete, mode);
    let (_, states) = clean(room, chain, &order);
    order.retention_ns = DAY;
    let order = order;
    let undo = Order { verb: Verb::Undo, ..order.clone() };
    room.put(chain);
    order.run().unwrap();
    let calls = undo.run().unwrap();
    let first = usize::try_from(seed()).unwrap() % step;
    for death in deaths(calls.len()).skip(first).step_by(step) {
        let mut row = room.row("undo", chain, mode);
        row.number = call_of(death);
        room.put(chain);
        order.run().unwrap();
        let trace = undo.dying(death).run().unwrap_or_else(|error| panic!("{row:?}: {error}"));
        assert!(begins(&calls, &trace), "{row:?}: {trace:#?} do not begin the clean run: {calls:#?}");
        row.call = trace.last().cloned().unwrap();
        row.before = chain.wrong(&room.judge, &outside(&room.root), false);
        let (stores, cancel) = (room.open(), Cancel::default());
        let site = Site::new(&stores, &SystemClock, &cancel, LONG);
        row.after.extend(chain.wrong(&room.judge, &outside(&room.root), true));
        // What was undone ends after its undo, which comes after it.
        purge(&site, true, Witness::None).unwrap();
        ended(&room.recover(), &mut row);
        row.after.extend(chain.wrong(&room.judge, &outside(&room.root), true));
        states.tell(room, chain, &mut row);
        table.rows.push(row);
    }
}

/// Kills a deletion with grace and retention, and lets the time pass after it.
fn kill_slow_deletes(room: &Room, chain: &Chain, mode: ModeChoice, step: usize, table: &mut Table) {
    let (_, states) = clean(room, chain, &room.order(chain, Verb::Delete, mode));
    let order = Order { grace_ns: DAY, retention_ns: DAY, ..room.order(chain, Verb::Delete, mode) };
    room.put(chain);
    let calls = order.run().unwrap();
    let first = usize::try_from(seed()).unwrap() % step;
    for death in deaths(calls.len()).skip(first).step_by(step) {
        let mut row = room.row("delete-grace", chain, mode);
        row.number = call_of(death);
        room.put(chain);
        let trace = order.dying(death).run().unwrap_or_else(|error| panic!("{row:?}: {error}"));
        row.call = trace.last().cloned().unwrap();
        row.before = chain.wrong(&room.judge, &outside(&room.root), false);
        let (stores, cancel) = (room.open(), Cancel::default());
        for (days, name_stays) in [(0, true), (1, false), (2, false)] {
            let clock = Later(days * DAY);
            let site = Site::new(&stores, &clock, &cancel, LONG);
            let recovered = recover(&site, Witness::None).unwrap();
            row.after.extend(chain.wrong(&room.judge, &outside(&room.root), true));
            let waits =
                recovered.iter().any(|one| matches!(one.action, Action::Grace(_) | Action::Retention(_)));
            let names = chain.deleted.iter().filter(|name| room.root.join(name).exists()).count();
            if waits && (days == 2 || !chain.deleted.is_empty() && (names > 0) != name_stays) {
                row.after.push(format!("after {days} days: {names} names, {recovered:?}"));
            }
        }
        states.tell(room, chain, &mut row);
        table.rows.push(row);
    }
}

/// All shapes and modes of one file system.
fn matrix(fs: FsKind) {
    let mount = LoopMount::in_memory(fs, 512 << 20);
    let room = Room::new(&mount.path(), fs);
    let mut table = Table::new(&format!("crash-kill-{fs:?}").to_lowercase());
    // Of each file system one case is always complete.
    let complete = match fs {
        FsKind::Xfs => (Shape::Cloudstack, ModeChoice::Clone),
        FsKind::Btrfs => (Shape::Fork, ModeChoice::Clone),
        FsKind::Ext4 => (Shape::Middle, ModeChoice::InPlace),
    };
    for shape in Shape::ALL {
        let chain = Chain::make(shape, seed());
        for mode in shape.modes(fs) {
            let own = (shape, fs) == (Shape::Consolidate, FsKind::Ext4);
            let step = if full() || own || (shape, mode) == complete { 1 } else { 23 };
            kill_deletes(&room, &chain, mode, step, &mut table);
        }
    }
    table.finish();
}

#[test]
fn a_delete_is_killed_on_xfs() {
    matrix(FsKind::Xfs);
}

#[test]
fn a_delete_is_killed_on_btrfs() {
    matrix(FsKind::Btrfs);
}

#[test]
fn a_delete_is_killed_on_ext4() {
    matrix(FsKind::Ext4);
}

/// By an export without a mount; the files are those of the directory, which is looked at.
#[test]
fn changes_over_nfs_are_killed() {
    let mount = LoopMount::in_memory(FsKind::Ext4, 512 << 20);
    let server = Ganesha::start(&mount.path());
    // The file system's root, which stays: the server knows a directory's handle longer than the directory.
    let url = Some(server.url(""));
    let room = Room { root: mount.path(), url, ..Room::new(&mount.path(), FsKind::Ext4) };
    let mut table = Table::new("crash-kill-nfs");
    let step = |bounded: usize| if full() { 1 } else { bounded };
    for (shape, bounded) in [
        (Shape::Cloudstack, 7),
        (Shape::Tip, 11),
        (Shape::Several, 29),
        (Shape::Fork, 37),
        (Shape::Consolidate, 31),
    ] {
        let chain = Chain::make(shape, seed());
        let mode = if shape == Shape::Tip { ModeChoice::Auto } else { ModeChoice::Copy };
        kill_deletes(&room, &chain, mode, step(bounded), &mut table);
        if shape == Shape::Cloudstack {
            kill_recoveries(&room, &chain, mode, step(97), &mut table);
            kill_slow_deletes(&room, &chain, mode, step(23), &mut table);
            kill_undos(&room, &chain, mode, step(23), &mut table);
        }
    }
    table.finish();
}

/// Recovery, undo, and deletions whose files stay for a while.
fn sequels(fs: FsKind, modes: &[ModeChoice], shapes: &[Shape]) {
    let mount = LoopMount::in_memory(fs, 512 << 20);
    let room = Room::new(&mount.path(), fs);
    let mut table = Table::new(&format!("crash-sequels-{fs:?}").to_lowercase());
    for shape in shapes {
        let chain = Chain::make(*shape, seed());
        for mode in modes {
            kill_recoveries(&room, &chain, *mode, if full() { 1 } else { 29 }, &mut table);
            kill_slow_deletes(&room, &chain, *mode, if full() { 1 } else { 13 }, &mut table);
            if *mode != ModeChoice::InPlace {
                kill_undos(&room, &chain, *mode, if full() { 1 } else { 7 }, &mut table);
            }
        }
    }
    table.finish();
}

#[test]
fn recovery_and_undo_are_killed() {
    let shapes: &[Shape] = &[Shape::Cloudstack, Shape::Consolidate, Shape::Fork];
    let shapes = if full() { shapes } else { &shapes[..2] };
    sequels(FsKind::Xfs, &[ModeChoice::Clone, ModeChoice::Copy], shapes);
    sequels(FsKind::Ext4, &[ModeChoice::InPlace], &shapes[..1]);
    if full() {
        sequels(FsKind::Btrfs, &[ModeChoice::Clone], shapes);
    }
}

/// Members that are adopted: what is known of them is true, or nothing is, at every point; and nobody keeps what belongs
/// to no file.
fn adopted(fs: FsKind, first: ModeChoice) {
    let mount = LoopMount::in_memory(fs, 512 << 20);
    let room = Room::new(&mount.path(), fs);
    let mut table = Table::new(&format!("crash-adopted-{fs:?}").to_lowercase());
    let step = |bounded: usize| if full() { 1 } else { bounded };
    for shape in Shape::ALL {
        let chain = Chain::make(shape, seed()).adopted();
        for mode in shape.modes(fs) {
            let complete = shape == Shape::Middle && mode == first;
            kill_deletes(&room, &chain, mode, if complete { 1 } else { step(31) }, &mut table);
            let sequels = mode == first && shape == Shape::Cloudstack || full();
            if sequels {
                kill_recoveries(&room, &chain, mode, step(41), &mut table);
                kill_slow_deletes(&room, &chain, mode, step(19), &mut table);
            }
            if sequels && mode != ModeChoice::InPlace {
                kill_undos(&room, &chain, mode, step(11), &mut table);
            }
        }
    }
    table.finish();
}

#[test]
fn changes_of_adopted_members_are_killed_on_xfs() {
    adopted(FsKind::Xfs, ModeChoice::Clone);
}

#[test]
fn changes_of_adopted_members_are_killed_on_ext4() {
    adopted(FsKind::Ext4, ModeChoice::InPlace);
}

/// Stores whose `.qchain` is another mount than their members: on another file system, or just another mount of
/// the same, which no device number tells. Temporaries and old files lie beside the members then.
#[test]
fn a_store_with_its_records_on_another_mount_is_killed() {
    let (mount, other) =
        (LoopMount::in_memory(FsKind::Xfs, 512 << 20), LoopMount::in_memory(FsKind::Ext4, 64 << 20));
    for (name, own) in [("apart", other.path().join("own")), ("bound", mount.path().join("own"))] {
        let directory = mount.path().join(name);
        let _bound = Bound::new(&own, &directory.join("s/.qchain"));
        let room = Room::new(&directory, FsKind::Xfs);
        let mut table = Table::new(&format!("crash-kill-{name}"));
        let step = |bounded: usize| if full() { 1 } else { bounded };
        for (shape, bounded) in [(Shape::Cloudstack, 29), (Shape::Apart, 59), (Shape::Tip, 31)] {
            let chain = Chain::make(shape, seed());
            for mode in shape.modes(FsKind::Xfs).into_iter().filter(|mode| *mode != ModeChoice::InPlace) {
                kill_deletes(&room, &chain, mode, step(bounded), &mut table);
                if shape == Shape::Cloudstack {
                    kill_recoveries(&room, &chain, mode, step(199), &mut table);
                    kill_slow_deletes(&room, &chain, mode, step(41), &mut table);
                    kill_undos(&room, &chain, mode, step(41), &mut table);
                }
            }
        }
        table.finish();
    }
}
