//! The power goes at every call that changes a store.
//!
//! The file system is shut down at a call of a deletion or an undo: nothing that was not synced is left, and
//! in another form of it names and lengths are left without their bytes. Then it is mounted again, and another
//! instance recovers. The points are the calls of a clean run; `QCHAIN_FULL` takes all of all cases, else one
//! case is complete and the others are stepped through from where the seed says.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qchain::backend::faulty::Faulty;
use qchain::backend::posix::PosixStore;
use qchain::change::Site;
use qchain::change::recover::{Action, Recovered};
use qchain::change::witness::Witness;
use qchain::ops::delete::{ModeChoice, Terms};
use qchain::ops::recover::{purge, recover};
use qchain::progress::Cancel;

use super::support::crash::{
    Chain, Files, Judge, Row, Shape, Table, difference, full, left_inside, outside, seed, word,
};
use super::support::killing::{LONG, Verb, act, mutations};
use super::support::later::Later;
use super::support::mounts::{Cut, FsKind, LoopMount, write_out};
use super::support::store::{open, open_with};

/// One day, in nanoseconds.
const DAY: i64 = 86_400_000_000_000;

/// What is done, and cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    /// A deletion; nothing is kept.
    Delete,
    /// A deletion with a grace and a retention of a day each.
    Slow,
    /// The undo of a deletion.
    Undo,
}

impl Deed {
    fn word(self) -> &'static str {
        match self {
            Self::Delete => "delete",
            Self::Slow => "delete-grace",
            Self::Undo => "undo",
        }
    }

    fn terms(self) -> Terms {
        let (grace_ns, retention_ns) = match self {
            Self::Delete => (0, 0),
            Self::Slow => (DAY, DAY),
            Self::Undo => (0, DAY),
        };
        Terms { grace_ns, retention_ns, ..Terms::default() }
    }

    fn verb(self, chain: &Chain) -> Verb {
        match self {
            Self::Delete | Self::Slow => Verb::on(chain),
            Self::Undo => Verb::Undo,
        }
    }
}

/// One thing to be cut off.
#[derive(Clone, Copy, Debug)]
struct Case {
    deed: Deed,
    shape: Shape,
    mode: ModeChoice,
    cut: Cut,
    /// Every so-many-th point.
    step: usize,
}

/// Where it is done.
struct Room {
    mount: LoopMount,
    fs: FsKind,
    judge: Judge,
}

/// The two states between which there is nothing.
struct States {
    before: Files,
    after: Files,
}

impl Room {
    fn new(fs: FsKind) -> Self {
        Self { mount: LoopMount::in_memory(fs, 512 << 20), fs, judge: Judge::default() }
    }

    fn root(&self) -> PathBuf {
        self.mount.path().join("s")
    }

    /// The chain as it is before the deed, durable.
    fn prepare(&self, chain: &Chain, case: Case) {
        let root = self.root();
        chain.put(&root);
        if case.deed == Deed::Undo {
            act(&open(&root), Verb::on(chain), &chain.targets, case.mode, case.deed.terms()).unwrap();
        }
        write_out(&self.mount.path());
    }

    fn wrong(&self, chain: &Chain, leaks: bool) -> Vec<String> {
        chain.wrong(&self.judge, &outside(&self.root()), leaks)
    }

    /// A clean run: its calls, and the states before and after.
    fn clean(&self, chain: &Chain, case: Case) -> (Vec<String>, States) {
        let root = self.root();
        chain.put(&root);
        let original = outside(&root);
        act(&open(&root), Verb::on(chain), &chain.targets, case.mode, Terms::default()).unwrap();
        let deleted = outside(&root);
        self.prepare(chain, case);
        let faulty = Faulty::new(Arc::new(PosixStore::open(&root).unwrap()));
        let stores = open_with(&root, Arc::new(faulty.clone()));
        act(&stores, case.deed.verb(chain), &chain.targets, case.mode, case.deed.terms()).unwrap();
        let (before, after) = if case.deed == Deed::Undo { (deleted, original) } else { (original, deleted) };
        (mutations(&faulty.trace()), States { before, after })
    }

    /// Does it, and cuts the power right before that call, or after the last one. Whether it was said to be
    /// done; a cut that comes before the last call lets nothing else succeed.
    fn cut_off(&self, chain: &Chain, case: Case, at: u64, calls: u64) -> bool {
        let root = self.root();
        let place = self.mount.path();
        let faulty = Faulty::new(Arc::new(PosixStore::open(&root).unwrap()));
        if at < calls {
            let place = place.clone();
            faulty.before_mutation(at, move || case.cut.cut(&place));
        }
        let stores = open_with(&root, Arc::new(faulty.clone()));
        let done = act(&stores, case.deed.verb(chain), &chain.targets, case.mode, case.deed.terms()).is_ok();
        if at == calls {
            case.cut.cut(&place);
        }
        done
    }

    /// Recovers until all is over: after grace and retention, if they were given.
    fn recover(&self, case: Case, row: &mut Row, chain: &Chain) {
        let (stores, cancel) = (open(&self.root()), Cancel::default());
        let days: &[i64] = if case.deed == Deed::Slow { &[0, 1, 2] } else { &[0] };
        for day in days {
            let clock = Later(day * DAY);
            let site = Site::new(&stores, &clock, &cancel, LONG);
            let recovered = recover(&site, Witness::None).unwrap();
            row.after.extend(self.wrong(chain, true));
            check_end(&recovered, case.deed == Deed::Slow && *day < 2, row);
            if case.deed == Deed::Undo {
                purge(&site, true, Witness::None).unwrap();
                check_end(&recover_again(&site), false, row);
                row.after.extend(self.wrong(chain, true));
            }
        }
    }

    /// One point.
    fn point(&mut self, chain: &Chain, case: Case, at: u64, calls: &[String], states: &States) -> Row {
        let shape = format!("{:?}", chain.shape).to_lowercase();
        let fs = format!("{:?}-{:?}", self.fs, case.cut).to_lowercase();
        let mut row = Row { mode: word(case.mode), fs, shape, number: at, ..Row::default() };
        case.deed.word().clone_into(&mut row.verb);
        row.call = calls.get(usize::try_from(at).unwrap()).cloned().unwrap_or_else(|| "the end".to_owned());
        self.prepare(chain, case);
        let said_done = self.cut_off(chain, case, at, calls.len() as u64);
        self.mount.remount();
        row.before = self.wrong(chain, false);
        self.recover(case, &mut row, chain);
        let now = outside(&self.root());
        let (word, wanted) =
            if now == states.before { ("not-done", &states.before) } else { ("done", &states.after) };
        word.clone_into(&mut row.end);
        if now != *wanted {
            let (before, after) = (difference(&now, &states.before), difference(&now, &states.after));
            row.after.push(format!("neither: not the old state in {before:?}, not the new in {after:?}"));
        }
        if said_done && word != "done" {
            row.after.push("it was said to be done".to_owned());
        }
        row.leaks = left_inside(&self.root());
        row
    }

    fn cut_all(&mut self, chain: &Chain, case: Case, table: &mut Table) {
        let (calls, states) = self.clean(chain, case);
        let points = calls.len() + 1;
        let first = usize::try_from(seed()).unwrap() % case.step;
        for at in (first..points).step_by(case.step) {
            let row = self.point(chain, case, at as u64, &calls, &states);
            table.rows.push(row);
        }
        // What was said to be done, and then the power went.
        if (points - 1) % case.step != first {
            let row = self.point(chain, case, points as u64 - 1, &calls, &states);
            table.rows.push(row);
        }
    }
}

fn recover_again(site: &Site<'_>) -> Vec<Recovered> {
    recover(site, Witness::None).unwrap()
}

fn check_end(recovered: &[Recovered], may_wait: bool, row: &mut Row) {
    for one in recovered {
        let ended = match one.action {
            Action::TakenBack | Action::Finished => true,
            Action::Grace(_) | Action::Retention(_) => may_wait || row.verb == "undo",
            _ => false,
        };
        if !ended || !one.kept.is_empty() {
            row.after.push(format!("recovery: {:?} {:?}", one.action, one.kept));
        }
    }
}

/// The chains.
const SHAPES: [Shape; 5] =
    [Shape::Middle, Shape::Several, Shape::Fork, Shape::Cloudstack, Shape::Consolidate];

/// All cases of a file system.
fn cases(fs: FsKind) -> Vec<Case> {
    let complete = match fs {
        FsKind::Xfs => (Deed::Delete, Shape::Cloudstack, ModeChoice::Clone),
        _ => (Deed::Delete, Shape::Middle, ModeChoice::InPlace),
    };
    let mut cases = Vec::new();
    for shape in SHAPES {
        for mode in shape.modes(fs) {
            for deed in [Deed::Delete, Deed::Slow, Deed::Undo] {
                let undone = deed == Deed::Undo && mode == ModeChoice::InPlace;
                let rare = deed != Deed::Delete && !matches!(shape, Shape::Fork | Shape::Cloudstack);
                if undone || rare && !full() {
                    continue;
                }
                for cut in [Cut::Dropped, Cut::Logged] {
                    let all = full() || (deed, shape, mode) == complete && cut == Cut::Dropped;
                    cases.push(Case { deed, shape, mode, cut, step: if all { 1 } else { 31 } });
                }
            }
        }
    }
    cases
}

fn matrix(fs: FsKind) {
    let mut room = Room::new(fs);
    let mut table = Table::new(&format!("power-cut-{fs:?}").to_lowercase());
    let chains = SHAPES.map(|shape| Chain::make(shape, seed()));
    for case in cases(fs) {
        let chain = chains.iter().find(|chain| chain.shape == case.shape).unwrap();
        room.cut_all(chain, case, &mut table);
    }
    let right = table.rows.iter().filter(|row| row.before.is_empty()).count();
    eprintln!("{fs:?}: {right} of {} were right before recovery", table.rows.len());
    table.finish();
}

#[test]
fn the_power_goes_on_xfs() {
    matrix(FsKind::Xfs);
}

#[test]
fn the_power_goes_on_ext4() {
    matrix(FsKind::Ext4);
}

/// The call does what it is taken for: what was not synced is gone, what was is not.
#[test]
fn a_cut_loses_what_was_not_synced() {
    for fs in [FsKind::Xfs, FsKind::Ext4] {
        for cut in [Cut::Dropped, Cut::Logged] {
            let mut mount = LoopMount::in_memory(fs, 512 << 20);
            let place = |mount: &LoopMount, name: &str| mount.path().join(name);
            let write = |path: &Path| std::fs::write(path, vec![7; 100_000]).unwrap();
            write(&place(&mount, "synced"));
            write_out(&mount.path());
            write(&place(&mount, "unsynced"));
            std::fs::rename(place(&mount, "synced"), place(&mount, "renamed")).unwrap();
            cut.cut(&mount.path());
            assert!(
                std::fs::read(place(&mount, "unsynced")).is_err()
                    || File::create(place(&mount, "x")).is_err()
            );
            mount.remount();
            let name = if cut == Cut::Dropped { "synced" } else { "renamed" };
            assert_eq!(std::fs::read(place(&mount, name)).unwrap(), vec![7; 100_000], "{fs:?} {cut:?}");
            let lost = std::fs::read(place(&mount, "unsynced")).unwrap_or_default();
            assert!(lost.iter().all(|byte| *byte == 0), "{fs:?} {cut:?}: {} bytes", lost.len());
            assert_eq!(place(&mount, "unsynced").exists(), cut == Cut::Logged, "{fs:?}");
        }
    }
}
