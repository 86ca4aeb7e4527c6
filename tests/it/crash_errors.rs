//! Every way in which a store can say no, at every call that changes it: never a success with a wrong result,
//! never a wrong view, nothing left once the store is well and somebody recovers.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use qchain::backend::faulty::{Call, Faulty, Lasting};
use qchain::ops::delete::{ModeChoice, Terms};

use super::support::crash::{Chain, Files, Judge, Row, Shape, Table, difference, full, seed, word};
use super::support::grounds::{Ground, Place};
use super::support::killing::{Verb, act, mutations, recover_telling};
use super::support::known::{self, Wanted};
use super::support::mounts::{Bound, FsKind, LoopMount};
use super::support::store::open_with;

const EINTR: i32 = 4;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const ESTALE: i32 = 116;
const EDQUOT: i32 = 122;
const ERRNOS: [i32; 5] = [EIO, ENOSPC, EDQUOT, ESTALE, EINTR];

/// One day, in nanoseconds.
const DAY: i64 = 86_400_000_000_000;

/// A fault to try.
#[derive(Clone, Copy, Debug)]
struct Fault {
    at: u64,
    errno: i32,
    lasting: Lasting,
    half: bool,
}

/// The faults of one call: all of them, or each kind once with an error number that changes from call to call.
fn faults(at: u64, all: bool) -> Vec<Fault> {
    let kinds =
        [(Lasting::Once, false), (Lasting::Onwards, false), (Lasting::Once, true), (Lasting::Onwards, true)];
    let mut faults = Vec::new();
    for (turn, (lasting, half)) in (0..).zip(kinds) {
        let first = usize::try_from(at + seed() + turn).unwrap() % ERRNOS.len();
        let count = if all { ERRNOS.len() } else { 1 };
        let errnos = ERRNOS.iter().cycle().skip(first).take(count);
        faults.extend(errnos.map(|errno| Fault { at, errno: *errno, lasting, half }));
    }
    faults
}

/// What is tried on a store, and from where.
struct Trial<'a> {
    ground: Ground,
    chain: &'a Chain,
    mode: ModeChoice,
    judge: &'a Judge,
    row: Row,
}

impl Trial<'_> {
    fn act(&self, faulty: &Faulty, verb: Verb, terms: Terms) -> Result<(), String> {
        let stores = open_with(Path::new("/nowhere"), Arc::new(faulty.clone()));
        let verb = if verb == Verb::Delete { Verb::on(self.chain) } else { verb };
        act(&stores, verb, &self.chain.targets, self.mode, terms)
    }

    /// The whole verb without a fault: its calls, and the files after it.
    fn clean(&self, start: &dyn Fn() -> Place, verb: Verb) -> (Vec<String>, Files) {
        let place = start();
        let faulty = Faulty::new(Arc::clone(&place.backend));
        self.act(&faulty, verb, Terms::default()).unwrap();
        (mutations(&faulty.trace()), place.files())
    }

    /// One fault on what `start` gives. `ends` are the states that are allowed in the end; a success must be
    /// the last of them.
    fn fail(&self, start: &dyn Fn() -> Place, verb: Verb, fault: Fault, ends: &[&Files]) -> Row {
        let place = start();
        let faulty = Faulty::new(Arc::clone(&place.backend));
        let Fault { at, errno, lasting, half } = fault;
        if half {
            faulty.fail_halfway_at(at, errno, lasting);
        } else {
            faulty.fail_at(at, errno, lasting);
        }
        let result = if verb == Verb::Recover {
            recover_telling(&open_with(Path::new("/nowhere"), Arc::new(faulty.clone())))
        } else {
            self.act(&faulty, verb, Terms::default()).map(|()| Vec::new())
        };
        let trace = faulty.trace();
        let mut row = self.row.clone();
        let failed = mutations(&trace).get(usize::try_from(at).unwrap()).cloned().unwrap_or_default();
        row.number = at;
        row.call = format!("{failed}: {errno} {lasting:?}{}", if half { " halfway" } else { "" });
        if result.is_ok() { "success" } else { "failure" }.clone_into(&mut row.end);
        let now = place.files();
        // Half a header leaves a deleted member's tables in disorder until it is written again, not its data.
        row.before = self.chain.wrong_views(self.judge, &now);
        let wanted = ends.last().unwrap();
        if let Ok(told) = &result {
            let differs = difference(&now, wanted);
            // A merge in place for which there is no room any more is taken back by recovery, which has to tell so.
            let no_room = !told.is_empty() && matches!(errno, ENOSPC | EDQUOT);
            let back = no_room && ends.iter().any(|end| difference(&now, end).is_empty());
            if !differs.is_empty() && !back {
                row.before.push(format!("a success, but {differs:?}"));
            }
        }
        row.before.extend(synced_again(&trace, fault));
        faulty.heal();
        if let Err(error) = self.act(&faulty, Verb::Recover, Terms::default()) {
            row.after.push(format!("recovery: {error}"));
        }
        let now = place.files();
        row.after.extend(self.chain.wrong(self.judge, &now, true));
        if !ends.contains(&&now) {
            let differs: Vec<_> = ends.iter().map(|end| difference(&now, end)).collect();
            row.after.push(format!("neither: {differs:?}"));
        }
        row.leaks = place.left();
        if self.chain.adopted {
            let stores = open_with(Path::new("/nowhere"), Arc::clone(&place.backend));
            let (wrong, strays) = known::wrong(&stores, Wanted::All);
            row.after.extend(wrong);
            row.leaks.extend(strays);
        }
        row
    }

    /// All faults of a verb.
    fn fail_everywhere(
        &self,
        start: &dyn Fn() -> Place,
        verb: Verb,
        old: &Files,
        step: usize,
        table: &mut Table,
    ) {
        let (calls, new) = self.clean(start, verb);
        for at in (0..calls.len() as u64).step_by(step) {
            for fault in faults(at, full()) {
                table.rows.push(self.fail(start, verb, fault, &[old, &new]));
            }
        }
    }
}

/// Syncs of a file whose sync had failed: the kernel may have dropped what was not written, and say nothing
/// the second time. Another file under the same name is another file.
fn synced_again(trace: &[Call], fault: Fault) -> Vec<String> {
    let failed = |call: &Call| {
        let within = match fault.lasting {
            Lasting::Once => call.mutation == Some(fault.at),
            Lasting::Onwards | Lasting::Dead => call.mutation >= Some(fault.at),
        };
        call.mutation.is_some() && within
    };
    let mut given_up = BTreeSet::new();
    let mut again = Vec::new();
    for call in trace {
        match call.name {
            "sync" if given_up.contains(&call.path) => again.push(format!("{} was synced again", call.path)),
            "sync" if failed(call) => drop(given_up.insert(call.path.clone())),
            "create" if !failed(call) => drop(given_up.remove(&call.path)),
            _ => {}
        }
    }
    again
}

/// A deletion, its recovery from each state in which it can be cut off, and its undo.
/// Undo needs hard links: without them nothing keeps an old file whose name is taken.
fn errors(
    ground: &Ground,
    name: &str,
    chain: &Chain,
    mode: ModeChoice,
    steps: [usize; 3],
    table: &mut Table,
) {
    let judge = Judge::default();
    let row = Row { mode: word(mode), fs: name.to_owned(), shape: chain.label(), ..Row::default() };
    let trial = |verb: &str| Trial {
        ground: ground.clone(),
        chain,
        mode,
        judge: &judge,
        row: Row { verb: verb.to_owned(), ..row.clone() },
    };
    let delete = trial("delete");
    let fresh = || delete.ground.place(chain);
    let old = fresh().files();
    delete.fail_everywhere(&fresh, Verb::Delete, &old, steps[0], table);
    let (calls, _) = delete.clean(&fresh, Verb::Delete);
    let mut courses = BTreeSet::new();
    for at in 0..calls.len() as u64 {
        let cut_off = || {
            let place = fresh();
            let faulty = Faulty::new(Arc::clone(&place.backend));
            faulty.fail_at(at, EIO, Lasting::Dead);
            // The very last call gives the lease back, which nobody waits for.
            let _ = delete.act(&faulty, Verb::Delete, Terms::default());
            place
        };
        let recover = trial(&format!("recover-{at}"));
        let (course, _) = recover.clean(&cut_off, Verb::Recover);
        if courses.insert(course) {
            recover.fail_everywhere(&cut_off, Verb::Recover, &old, steps[1], table);
        }
    }
    let links = !matches!(ground, Ground::Memory { links: false, .. });
    if mode != ModeChoice::InPlace && links {
        let undo = trial("undo");
        let done = || {
            let place = fresh();
            let faulty = Faulty::new(Arc::clone(&place.backend));
            let terms = Terms { retention_ns: DAY, ..Terms::default() };
            delete.act(&faulty, Verb::Delete, terms).unwrap();
            place
        };
        undo_everywhere(&undo, &done, &old, steps[2], table);
    }
}

/// As for the other verbs; what was not undone keeps its old files, which the retention allows.
fn undo_everywhere(undo: &Trial<'_>, done: &dyn Fn() -> Place, old: &Files, step: usize, table: &mut Table) {
    let new = done().files();
    let (calls, undone) = undo.clean(done, Verb::Undo);
    assert_eq!(difference(&undone, old), Vec::<String>::new(), "an undo gives back what was");
    for at in (0..calls.len() as u64).step_by(step) {
        for fault in faults(at, full()) {
            let mut row = undo.fail(done, Verb::Undo, fault, &[&new, old]);
            let kept = |left: &String| left.contains("/trash/") || left.contains("/intents/");
            if row.end == "failure" && row.leaks.iter().all(kept) {
                row.leaks.clear();
            }
            table.rows.push(row);
        }
    }
}

#[test]
fn every_error_at_every_call_in_memory() {
    let mut table = Table::new("crash-errors-memory");
    let abilities = [(true, true), (false, true), (false, false)];
    for (shape, complete) in [
        (Shape::Cloudstack, true),
        (Shape::Several, false),
        (Shape::Apart, false),
        (Shape::Fork, false),
        (Shape::Tip, false),
        (Shape::Base, false),
        (Shape::Consolidate, false),
    ] {
        let chain = Chain::make(shape, seed());
        for (exchange, links) in abilities {
            let name = format!(
                "memory{}{}",
                if exchange { "" } else { "-noexchange" },
                if links { "" } else { "-nolinks" }
            );
            let ground = Ground::Memory { exchange, links };
            for mode in
                shape.modes(FsKind::Xfs).into_iter().filter(|mode| links || *mode != ModeChoice::InPlace)
            {
                let all = complete && exchange;
                let steps = if full() {
                    [1, if all { 1 } else { 13 }, 1]
                } else if all {
                    [1, 41, 11]
                } else {
                    [17, 199, 41]
                };
                errors(&ground, &name, &chain, mode, steps, &mut table);
            }
        }
    }
    table.finish();
}

/// What a change makes and keeps lies beside the members then.
#[test]
fn every_error_where_the_records_are_on_another_mount() {
    let mut table = Table::new("crash-errors-bound");
    let mount = LoopMount::in_memory(FsKind::Xfs, 512 << 20);
    let root = mount.path().join("s");
    let _bound = Bound::new(&mount.path().join("own"), &root.join(".qchain"));
    let (chain, ground) = (Chain::make(Shape::Cloudstack, seed()), Ground::Disk(root));
    let steps = if full() { [1, 7, 1] } else { [29, 499, 79] };
    errors(&ground, "bound", &chain, ModeChoice::Clone, steps, &mut table);
    table.finish();
}

#[test]
fn every_error_at_every_call_on_a_file_system() {
    let mut table = Table::new("crash-errors-disk");
    for (fs, mode) in [
        (FsKind::Xfs, ModeChoice::Clone),
        (FsKind::Ext4, ModeChoice::InPlace),
        (FsKind::Ext4, ModeChoice::Copy),
    ] {
        let mount = LoopMount::in_memory(fs, 512 << 20);
        let ground = Ground::Disk(mount.path().join("s"));
        for (shape, bounded) in [(Shape::Cloudstack, [7, 89, 23]), (Shape::Consolidate, [29, 499, 79])] {
            if shape.modes(fs).contains(&mode) {
                let chain = Chain::make(shape, seed());
                let steps = if full() { [1, 3, 1] } else { bounded };
                errors(&ground, &format!("{fs:?}").to_lowercase(), &chain, mode, steps, &mut table);
            }
        }
    }
    table.finish();
}

/// What is known of adopted members stays true, and nothing is kept that belongs to no file.
#[test]
fn every_error_where_members_are_adopted() {
    let mut table = Table::new("crash-errors-adopted");
    let mount = LoopMount::in_memory(FsKind::Ext4, 256 << 20);
    let disk = Ground::Disk(mount.path().join("s"));
    let memory = Ground::Memory { exchange: true, links: true };
    for (ground, name, shape, mode, bounded) in [
        (&memory, "memory", Shape::Middle, ModeChoice::Copy, [11, 499, 61]),
        (&memory, "memory", Shape::Consolidate, ModeChoice::Copy, [29, 999, 79]),
        (&disk, "ext4", Shape::Middle, ModeChoice::InPlace, [7, 199, 1]),
        (&disk, "ext4", Shape::Several, ModeChoice::InPlace, [41, 999, 1]),
    ] {
        let chain = Chain::make(shape, seed()).adopted();
        let steps = if full() { [1, 3, 1] } else { bounded };
        errors(ground, name, &chain, mode, steps, &mut table);
    }
    table.finish();
}
