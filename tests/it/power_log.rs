//! The power goes, and the disk had not yet done all that it was given: what was written since its last flush
//! is there in part, in any order, or torn.
//!
//! A deletion or an undo runs on a disk that remembers ([`super::support::disk`]). Then the states that the
//! disk may be in after a power cut are made from that, one after the other, mounted and recovered: after each
//! flush nothing more; at each call all so far; and after each flush some of what came next. This covers
//! btrfs, which has no call that shuts it down, and what such a call does not show on the others: it lets all
//! that the file system had sent arrive. `QCHAIN_FULL` takes all states of all cases, and more parts of each.

use std::fs::{self, File, OpenOptions};
use std::path::PathBuf;
use std::sync::Arc;

use qchain::backend::faulty::Faulty;
use qchain::backend::posix::PosixStore;
use qchain::change::recover::Action;
use qchain::change::witness::Witness;
use qchain::change::{Site, SystemClock};
use qchain::ops::delete::{ModeChoice, Terms};
use qchain::ops::recover::{purge, recover};
use qchain::progress::Cancel;

use super::support::chains::{Numbers, copy};
use super::support::crash::{
    Chain, Files, Judge, Row, Shape, Table, difference, full, left_inside, outside, seed, word,
};
use super::support::disk::{Disk, Event, SECTOR, WHOLE, apply};
use super::support::killing::{LONG, Verb, act, mutations};
use super::support::mounts::{FsKind, LoopMount};
use super::support::store::{open, open_with};

/// One day, in nanoseconds.
const DAY: i64 = 86_400_000_000_000;
/// The mark after the answer.
const ANSWER: u64 = u64::MAX;

/// What is done on the disk that remembers.
#[derive(Clone, Copy, Debug)]
struct Case {
    verb: Verb,
    shape: Shape,
    mode: ModeChoice,
    /// Every so-many-th state.
    step: usize,
}

impl Case {
    fn terms(self) -> Terms {
        let retention_ns = if self.verb == Verb::Undo { DAY } else { 0 };
        Terms { retention_ns, ..Terms::default() }
    }
}

/// A state of the disk after its power went.
#[derive(Clone, Debug)]
struct State {
    /// In words.
    name: String,
    /// So many of the events, all of them.
    whole: usize,
    /// Of those up to here a part, by that seed.
    part: Option<(usize, u64)>,
    /// The call that the power cut came before; the answer had been given if there was none.
    call: Option<u64>,
}

/// What came to the disk, and the states of the store between which there is nothing.
struct Recorded {
    events: Vec<Event>,
    calls: Vec<String>,
    before: Files,
    after: Files,
}

/// Where it is done.
struct Room {
    mount: LoopMount,
    fs: FsKind,
    judge: Judge,
}

/// The states to be looked at.
fn states(events: &[Event]) -> Vec<State> {
    let mut states = Vec::new();
    let (mut flushed, mut call) = (0, Some(0));
    for (index, event) in events.iter().enumerate() {
        let end = index + 1;
        match event {
            Event::Write(..) => {}
            Event::Flush => {
                if index > flushed {
                    let part = |sample| Some((index, seed() * 1000 + sample));
                    for sample in 0..if full() { 4 } else { 1 } {
                        let name = format!("a part of what came before flush {index}");
                        states.push(State { name, whole: flushed, part: part(sample), call });
                    }
                }
                states.push(State { name: format!("up to flush {index}"), whole: end, part: None, call });
                flushed = end;
            }
            Event::Mark(number) => {
                call = (*number != ANSWER).then_some(*number);
                states.push(State { name: format!("at mark {number}"), whole: end, part: None, call });
                // What the disk was asked to make last, and not a byte more.
                if call.is_none() {
                    let name = "what lasts at the answer".to_owned();
                    states.push(State { name, whole: flushed, part: None, call });
                    let name = "a part of the rest at the answer".to_owned();
                    states.push(State { name, whole: flushed, part: Some((end, seed())), call });
                }
            }
        }
    }
    states
}

/// Some of the writes, some of the longer ones torn between two sectors. In which order a disk did them makes no
/// difference but where two are for one place, and of those it keeps the order.
fn some(events: &[Event], seed: u64) -> Vec<Event> {
    let mut numbers = Numbers(seed);
    let mut some = Vec::new();
    for event in events {
        let Event::Write(at, data) = event else { continue };
        match numbers.below(8) {
            0..=3 => some.push(event.clone()),
            4 if data.len() > WHOLE => {
                let sectors = (data.len() / SECTOR) as u64;
                let cut = usize::try_from(numbers.below(sectors)).unwrap() * SECTOR;
                some.push(Event::Write(*at, data[..cut].to_vec()));
            }
            5 if data.len() > WHOLE => {
                let cut = SECTOR.max(data.len() / 2 / SECTOR * SECTOR);
                some.push(Event::Write(*at + cut as u64, data[cut..].to_vec()));
            }
            _ => {}
        }
    }
    some
}

impl Room {
    fn new(fs: FsKind) -> Self {
        let bytes = if fs == FsKind::Xfs { 320 << 20 } else { 128 << 20 };
        Self { mount: LoopMount::in_memory(fs, bytes), fs, judge: Judge::default() }
    }

    fn root(&self) -> PathBuf {
        self.mount.path().join("s")
    }

    fn wrong(&self, chain: &Chain, leaks: bool) -> Vec<String> {
        chain.wrong(&self.judge, &outside(&self.root()), leaks)
    }

    /// Leaves a durable store in the image file, as it is before the deed, and nothing mounted. The states.
    fn prepare(&mut self, chain: &Chain, case: Case) -> (Vec<String>, Files, Files) {
        let root = self.root();
        chain.put(&root);
        let original = outside(&root);
        act(&open(&root), Verb::Delete, &chain.deleted, case.mode, Terms::default()).unwrap();
        let deleted = outside(&root);
        // A clean run tells how many calls there are.
        let mut calls = Vec::new();
        for last in [false, true] {
            chain.put(&root);
            if case.verb == Verb::Undo {
                act(&open(&root), Verb::Delete, &chain.deleted, case.mode, case.terms()).unwrap();
            }
            if !last {
                let faulty = Faulty::new(Arc::new(PosixStore::open(&root).unwrap()));
                let stores = open_with(&root, Arc::new(faulty.clone()));
                act(&stores, case.verb, &chain.deleted, case.mode, case.terms()).unwrap();
                calls = mutations(&faulty.trace());
            }
        }
        self.mount.unmount();
        if case.verb == Verb::Undo { (calls, deleted, original) } else { (calls, original, deleted) }
    }

    /// Runs it on a disk that remembers.
    fn record(&mut self, chain: &Chain, case: Case) -> Recorded {
        let (calls, before, after) = self.prepare(chain, case);
        let disk = Disk::serve(&self.mount.image());
        // Of the two the mount must go first, also if something fails.
        let served = Served(&mut self.mount);
        served.0.mount(&disk.path());
        let root = served.0.path().join("s");
        let faulty = Faulty::new(Arc::new(PosixStore::open(&root).unwrap()));
        for number in 0..calls.len() as u64 {
            let mark = disk.marker();
            faulty.before_mutation(number, move || mark(number));
        }
        let from = disk.events().len();
        let stores = open_with(&root, Arc::new(faulty));
        act(&stores, case.verb, &chain.deleted, case.mode, case.terms()).unwrap();
        disk.marker()(ANSWER);
        let mut events = disk.events();
        drop(stores);
        drop(served);
        // What was written by the mount itself is no part of it, but must be there.
        let mounted: Vec<Event> = events.drain(..from).collect();
        apply(&self.image(), &mounted);
        Recorded { events, calls, before, after }
    }

    fn image(&self) -> File {
        OpenOptions::new().read(true).write(true).open(self.mount.image()).unwrap()
    }

    /// One state, in a copy of the image.
    fn look(&mut self, chain: &Chain, case: Case, recorded: &Recorded, state: &State) -> Row {
        let shape = format!("{:?}", chain.shape).to_lowercase();
        let verb = format!("{:?}", case.verb).to_lowercase();
        let fs = format!("{:?}-log", self.fs).to_lowercase();
        let mut row = Row { verb, mode: word(case.mode), fs, shape, ..Row::default() };
        let call = state.call.map(|call| &recorded.calls[usize::try_from(call).unwrap()]);
        row.number = state.call.unwrap_or(recorded.calls.len() as u64);
        row.call = format!("{}: {}", state.name, call.map_or("the end", String::as_str));
        let copied = self.mount.image().with_extension("copy");
        copy(&self.mount.image(), &copied);
        let file = OpenOptions::new().write(true).open(&copied).unwrap();
        apply(&file, &recorded.events[..state.whole]);
        if let Some((end, seed)) = state.part {
            apply(&file, &some(&recorded.events[state.whole..end], seed));
        }
        drop(file);
        self.mount.mount(&copied);
        row.before = self.wrong(chain, false);
        self.recover(case, chain, &mut row);
        let now = outside(&self.root());
        let (word, wanted) =
            if now == recorded.before { ("not-done", &recorded.before) } else { ("done", &recorded.after) };
        word.clone_into(&mut row.end);
        if now != *wanted {
            let (before, after) = (difference(&now, &recorded.before), difference(&now, &recorded.after));
            row.after.push(format!("neither: not the old state in {before:?}, not the new in {after:?}"));
        }
        if state.call.is_none() && word != "done" {
            row.after.push("it was said to be done".to_owned());
        }
        row.leaks = left_inside(&self.root());
        self.mount.unmount();
        fs::remove_file(&copied).unwrap();
        row
    }

    fn recover(&self, case: Case, chain: &Chain, row: &mut Row) {
        let (stores, cancel) = (open(&self.root()), Cancel::default());
        let site = Site::new(&stores, &SystemClock, &cancel, LONG);
        let mut recovered = recover(&site, Witness::None).unwrap();
        if case.verb == Verb::Undo {
            row.after.extend(self.wrong(chain, true));
            purge(&site, true, Witness::None).unwrap();
            recovered = recover(&site, Witness::None).unwrap();
        }
        for one in recovered {
            if !matches!(one.action, Action::TakenBack | Action::Finished) || !one.kept.is_empty() {
                row.after.push(format!("recovery: {:?} {:?}", one.action, one.kept));
            }
        }
        row.after.extend(self.wrong(chain, true));
    }
}

/// A mount whose disk goes after it.
struct Served<'a>(&'a mut LoopMount);

impl Drop for Served<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

fn matrix(fs: FsKind, cases: &[Case]) {
    let mut table = Table::new(&format!("power-log-{fs:?}").to_lowercase());
    for case in cases {
        let mut room = Room::new(fs);
        let chain = Chain::make(case.shape, seed());
        let recorded = room.record(&chain, *case);
        let states = states(&recorded.events);
        let flushes = recorded.events.iter().filter(|event| matches!(event, Event::Flush)).count();
        eprintln!(
            "{fs:?} {case:?}: {} events, {flushes} flushes, {} states",
            recorded.events.len(),
            states.len()
        );
        let writes = recorded.events.iter().filter(|event| matches!(event, Event::Write(..))).count();
        assert!(flushes > 5 && writes > 5, "the disk saw too little: {writes} writes, {flushes} flushes");
        let first = usize::try_from(seed()).unwrap() % case.step;
        let (last, others) = states.split_at(states.len() - 3);
        let chosen = last.iter().skip(first).step_by(case.step).chain(others);
        for state in chosen {
            let row = room.look(&chain, *case, &recorded, state);
            table.rows.push(row);
        }
    }
    let right = table.rows.iter().filter(|row| row.before.is_empty()).count();
    eprintln!("{fs:?}: {right} of {} were right before recovery", table.rows.len());
    table.finish();
}

fn cases(fs: FsKind) -> Vec<Case> {
    let mut cases = Vec::new();
    let complete = (FsKind::Btrfs, Verb::Delete, Shape::Cloudstack, ModeChoice::Clone);
    let shapes = [Shape::Middle, Shape::Several, Shape::Fork, Shape::Cloudstack];
    for shape in shapes.into_iter().filter(|shape| full() || *shape == Shape::Cloudstack) {
        for mode in shape.modes(fs) {
            for verb in [Verb::Delete, Verb::Undo] {
                if verb == Verb::Undo && mode == ModeChoice::InPlace {
                    continue;
                }
                let step = if full() || (fs, verb, shape, mode) == complete { 1 } else { 23 };
                cases.push(Case { verb, shape, mode, step });
            }
        }
    }
    cases
}

#[test]
fn a_disk_loses_what_it_had_not_flushed_on_btrfs() {
    matrix(FsKind::Btrfs, &cases(FsKind::Btrfs));
}

#[test]
fn a_disk_loses_what_it_had_not_flushed_on_xfs() {
    matrix(FsKind::Xfs, &cases(FsKind::Xfs));
}

#[test]
fn a_disk_loses_what_it_had_not_flushed_on_ext4() {
    matrix(FsKind::Ext4, &cases(FsKind::Ext4));
}

/// The disk does what it is taken for: what was not synced is not there after the power went, what was is.
#[test]
fn a_disk_keeps_what_was_synced() {
    let mut mount = LoopMount::in_memory(FsKind::Btrfs, 128 << 20);
    let image = mount.image();
    mount.unmount();
    let disk = Disk::serve(&image);
    let served = Served(&mut mount);
    served.0.mount(&disk.path());
    let (place, bytes) = (served.0.path(), vec![7; 100_000]);
    let mark = disk.marker();
    for (number, name) in (0..).zip(["first", "second"]) {
        let path = place.join(name);
        fs::write(&path, &bytes).unwrap();
        mark(2 * number);
        File::open(&path).unwrap().sync_all().unwrap();
        File::open(&place).unwrap().sync_all().unwrap();
        mark(2 * number + 1);
    }
    let events = disk.events();
    drop(served);
    drop(disk);
    let mut seen = Vec::new();
    for (end, event) in (1..).zip(&events) {
        if let Event::Mark(_) = event {
            let copied = image.with_extension("copy");
            copy(&image, &copied);
            apply(&OpenOptions::new().write(true).open(&copied).unwrap(), &events[..end]);
            mount.mount(&copied);
            let there = |name: &str| fs::read(mount.path().join(name)).is_ok_and(|found| found == bytes);
            seen.push(["first", "second"].map(there));
            mount.unmount();
        }
    }
    assert_eq!(seen, [[false, false], [true, false], [true, false], [true, true]]);
}
