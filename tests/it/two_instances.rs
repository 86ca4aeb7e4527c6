//! Two processes on one directory: the first is stopped at a call that changes the store, for longer than the
//! lease; the second does its work and ends; then the first goes on.
//!
//! The points are the mutating calls of a clean run. `QCHAIN_FULL` takes all of all cases, else one case is
//! complete and the others are stepped through from where the seed says.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use qchain::backend::faulty::Faulty;
use qchain::change::record::{Claim, Decision, Purpose};
use qchain::change::witness::Witness;
use qchain::change::{Site, SystemClock};
use qchain::failure::{Code, Failure, Kind as FailureKind, with_causes};
use qchain::ops::delete::{Aim, ModeChoice, Terms};
use qchain::ops::recover::{history, purge, recover, undo};
use qchain::ops::{OpError, Result};
use qchain::progress::Cancel;
use serde::{Deserialize, Serialize};

use super::support::crash::{
    Chain, Files, Judge, Row, Shape, Table, difference, full, left_inside, outside, seed, word,
};
use super::support::forked::{Forked, asked, stop_here};
use super::support::killing::{LONG, mutations};
use super::support::mounts::{FsKind, LoopMount};
use super::support::nfs::{self, Ganesha};
use super::support::store::{LEASE, backend, change_by, open, open_with};

/// One day, in nanoseconds.
const DAY: i64 = 86_400_000_000_000;
/// The lease of the second: the first stands still for as long as it takes anyway.
const SHORT: Duration = Duration::from_millis(100);
/// How many pairs are at work at once: what they mostly do is wait for leases.
const PAIRS: usize = 6;

/// What the second does while the first stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rival {
    /// The very same deletion.
    Same,
    /// It recovers.
    Recover,
    /// It deletes the first one's survivor.
    Other,
    /// It takes the last operation back.
    Undo,
}

/// What the first is asked to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Order {
    root: PathBuf,
    /// By what export it is reached, if not by its directory.
    url: Option<String>,
    /// None: it takes the last operation back.
    members: Vec<String>,
    /// They become bases, instead of being deleted.
    consolidates: bool,
    mode: String,
    retention_ns: i64,
    /// Before which mutating call it stops.
    at: Option<u64>,
    /// Whether its lease is renewed by a thread meanwhile.
    renews: bool,
    /// Where it says how it ended.
    said: PathBuf,
}

/// How the first ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Said {
    /// What it takes for done.
    done: bool,
    /// Its words.
    words: String,
    /// Its operation, if it came to that.
    operation: String,
    /// Its calls.
    calls: Vec<String>,
}

fn mode_of(word: &str) -> ModeChoice {
    let modes = [ModeChoice::Copy, ModeChoice::Clone, ModeChoice::InPlace];
    modes.into_iter().find(|mode| super::support::crash::word(*mode) == word).unwrap()
}

/// Changes members, or takes the last operation back if there are none; gives the operation.
fn act(
    site: &Site<'_>,
    (aim, members): (Aim, &[String]),
    mode: ModeChoice,
    retention_ns: i64,
) -> Result<String> {
    if members.is_empty() {
        let last = history(site)?.last().map(|done| done.operation.to_string()).unwrap_or_default();
        return undo(site, &last, Witness::None).map(|_| String::new());
    }
    let members: Vec<&str> = members.iter().map(String::as_str).collect();
    let terms = Terms { retention_ns, ..Terms::default() };
    let report = change_by(site, (aim, &members), mode, terms, 1)?;
    let operation = report.outcomes.first().map(|outcome| outcome.operation.clone()).unwrap_or_default();
    report.outcomes.into_iter().find_map(|outcome| outcome.error).map_or(Ok(operation), Err)
}

/// What the first process is made of.
#[test]
fn a_process_stops_itself() {
    let Some(text) = asked("stop") else { return };
    let order: Order = serde_json::from_str(&text).unwrap();
    let faulty = Faulty::new(backend(&order.root, order.url.as_deref()));
    if let Some(at) = order.at {
        faulty.before_mutation(at, stop_here);
    }
    let stores = open_with(&order.root, Arc::new(faulty.clone()));
    let cancel = Cancel::default();
    let lease = if order.renews { LEASE } else { LONG };
    let site = Site::new(&stores, &SystemClock, &cancel, lease);
    let aim = if order.consolidates { Aim::Consolidate } else { Aim::Delete };
    let result = act(&site, (aim, &order.members), mode_of(&order.mode), order.retention_ns);
    let said = Said {
        done: result.is_ok(),
        words: result.as_ref().err().map_or_else(String::new, |error| with_causes(error)),
        operation: result.unwrap_or_default(),
        calls: mutations(&faulty.trace()),
    };
    fs::write(&order.said, serde_json::to_vec(&said).unwrap()).unwrap();
}

/// One pair: what the first does, and how the second meets it.
#[derive(Clone, Copy, Debug)]
struct Case {
    shape: Shape,
    mode: ModeChoice,
    /// Whether the first takes back a deletion, instead of making one.
    undoes: bool,
    rival: Rival,
    renews: bool,
    step: usize,
}

impl Case {
    /// Where something is to be taken back it must be kept.
    fn retention_ns(self) -> i64 {
        if self.undoes || self.rival == Rival::Undo { DAY } else { 0 }
    }

    fn aim(self) -> Aim {
        if self.shape == Shape::Consolidate { Aim::Consolidate } else { Aim::Delete }
    }
}

/// Where pairs meet, one after the other.
struct Room {
    root: PathBuf,
    fs: FsKind,
    /// What export each of both goes by, if not by the directory.
    urls: [Option<String>; 2],
    said: PathBuf,
    judge: Judge,
}

/// The states before and after a deletion.
struct States {
    old: Files,
    new: Files,
}

fn site<'a>(stores: &'a qchain::store::Stores, cancel: &'a Cancel) -> Site<'a> {
    Site::new(stores, &SystemClock, cancel, SHORT)
}

/// All claims on a store.
fn claims(root: &Path) -> Vec<Claim> {
    let mut claims = Vec::new();
    for tree in fs::read_dir(root.join(".qchain/generations")).unwrap() {
        for file in fs::read_dir(tree.unwrap().path()).unwrap() {
            let file = file.unwrap();
            let claim: Claim = serde_json::from_slice(&fs::read(file.path()).unwrap()).unwrap();
            let name: u64 = file.file_name().to_str().unwrap().parse().unwrap();
            assert_eq!(claim.generation, name);
            claims.push(claim);
        }
    }
    claims
}

/// The operations that were decided to be done: deletions or consolidations of that member, or undoes.
fn commits(claims: &[Claim], member: Option<&str>) -> Vec<String> {
    let fits = |claim: &&Claim| match &claim.decision {
        Decision::Abort => false,
        Decision::Commit(commit) => match (&commit.purpose, member) {
            (Purpose::Undo { .. }, None) => true,
            (Purpose::Delete, Some(name)) if commit.departures.is_empty() => {
                commit.publications.iter().any(|one| one.at.path.as_str() == name)
            }
            (Purpose::Delete, Some(name)) => commit.departures.iter().any(|one| one.at.path.as_str() == name),
            _ => false,
        },
    };
    claims.iter().filter(fits).map(|claim| claim.operation.to_string()).collect()
}

impl Room {
    fn order(&self, chain: &Chain, case: Case, at: Option<u64>) -> Order {
        Order {
            root: self.root.clone(),
            url: self.urls[0].clone(),
            members: if case.undoes { Vec::new() } else { chain.targets.clone() },
            consolidates: case.aim() == Aim::Consolidate,
            mode: word(case.mode).to_owned(),
            retention_ns: case.retention_ns(),
            at,
            renews: case.renews,
            said: self.said.clone(),
        }
    }

    fn start(&self, order: &Order) -> super::support::forked::Running {
        let _ = fs::remove_file(&self.said);
        let test = "two_instances::a_process_stops_itself";
        Forked::new(test, "stop", &serde_json::to_string(order).unwrap()).start()
    }

    fn said(&self) -> Said {
        serde_json::from_slice(&fs::read(&self.said).unwrap()).unwrap()
    }

    fn put(&self, chain: &Chain) {
        if let Some(url) = self.urls.iter().flatten().next() {
            nfs::clear(url);
        }
        chain.put(&self.root);
    }

    fn prepare(&self, chain: &Chain, case: Case) {
        self.put(chain);
        if case.undoes {
            let (stores, cancel) = (open(&self.root), Cancel::default());
            act(&site(&stores, &cancel), (case.aim(), &chain.targets), case.mode, DAY).unwrap();
        }
    }

    /// A clean run of the first: its calls, and the states.
    fn clean(&self, chain: &Chain, case: Case) -> (Vec<String>, States) {
        self.put(chain);
        let old = outside(&self.root);
        let (stores, cancel) = (open(&self.root), Cancel::default());
        act(&site(&stores, &cancel), (case.aim(), &chain.targets), case.mode, 0).unwrap();
        let new = outside(&self.root);
        self.prepare(chain, case);
        let order = self.order(chain, Case { renews: false, ..case }, None);
        assert!(self.start(&order).go_on().success());
        let said = self.said();
        assert!(said.done && said.calls.len() > 10, "{said:?}");
        (said.calls, States { old, new })
    }

    /// What the second does, and how that ended.
    fn rival(&self, chain: &Chain, case: Case) -> Result<()> {
        let store = backend(&self.root, self.urls[1].as_deref());
        let (stores, cancel) = (open_with(&self.root, store), Cancel::default());
        let site = site(&stores, &cancel);
        match case.rival {
            Rival::Same => act(&site, (case.aim(), &chain.targets), case.mode, case.retention_ns()).map(drop),
            Rival::Other => {
                act(&site, (Aim::Delete, &[other(chain)]), case.mode, case.retention_ns()).map(drop)
            }
            Rival::Undo => act(&site, (Aim::Delete, &[]), case.mode, 0).map(drop),
            Rival::Recover => recover(&site, Witness::None).map(drop),
        }
    }

    /// One point.
    fn point(&self, chain: &Chain, case: Case, at: u64, calls: &[String], states: &States) -> Row {
        let shape = format!("{:?}", chain.shape).to_lowercase();
        let fs = match &self.urls {
            [None, None] => format!("{:?}", self.fs).to_lowercase(),
            [Some(_), _] => "nfs-first".to_owned(),
            [None, Some(_)] => "nfs-second".to_owned(),
        };
        let what = if case.undoes { "Undo".to_owned() } else { format!("{:?}", case.aim()) };
        let verb = format!("{what}/{:?}", case.rival).to_lowercase();
        let mut row = Row { verb, mode: word(case.mode), fs, shape, number: at, ..Row::default() };
        row.call = calls.get(usize::try_from(at).unwrap()).cloned().unwrap_or_default();
        self.prepare(chain, case);
        let mut first = self.start(&self.order(chain, case, Some(at)));
        if !first.stopped() {
            // By the clock it may have made fewer calls.
            row.after.extend((!case.renews).then(|| "it did not stop".to_owned()));
            return row;
        }
        let second = self.rival(chain, case);
        row.before = chain.wrong(&self.judge, &outside(&self.root), false);
        let ended = first.go_on();
        row.before.extend(chain.wrong(&self.judge, &outside(&self.root), false));
        if !ended.success() {
            row.after.push(format!("the first: {ended}"));
            return row;
        }
        let said = self.said();
        let (stores, cancel) = (open(&self.root), Cancel::default());
        let site = site(&stores, &cancel);
        recover(&site, Witness::None).unwrap();
        row.before.extend(chain.wrong(&self.judge, &outside(&self.root), false));
        purge(&site, true, Witness::None).unwrap();
        recover(&site, Witness::None).unwrap();
        row.after.extend(chain.wrong(&self.judge, &outside(&self.root), true));
        row.leaks = left_inside(&self.root);
        let (first, other) = (if said.done { "done" } else { "failed" }, second.is_ok());
        row.end = format!("first {first}, second {}", if other { "done" } else { "failed" });
        let wrong = self.verdict(chain, case, &said, second, states);
        row.after.extend(wrong);
        row
    }

    /// What is wrong with the end.
    fn verdict(
        &self,
        chain: &Chain,
        case: Case,
        said: &Said,
        second: Result<()>,
        states: &States,
    ) -> Vec<String> {
        let mut wrong = Vec::new();
        let claims = claims(&self.root);
        let numbers: BTreeSet<_> = claims.iter().map(|claim| (&claim.tree, claim.generation)).collect();
        let trees: BTreeSet<_> = claims.iter().map(|claim| &claim.tree).collect();
        if numbers.len() != claims.len() || trees.len() > 1 {
            wrong.push(format!("{} claims in {} trees", claims.len(), trees.len()));
        }
        let deleted = commits(&claims, Some(&chain.targets[0]));
        let undone = commits(&claims, None);
        // What was undone may be deleted once more.
        let again = usize::from(case.undoes && case.rival == Rival::Same);
        if deleted.len() > 1 + again || undone.len() > 1 {
            wrong.push(format!("{} commits and {} undoes", deleted.len(), undone.len()));
        }
        let own = if case.undoes { undone.len() == 1 } else { deleted.contains(&said.operation) };
        if said.done && !own {
            wrong.push(format!("the first says it is done, and was not decided: {said:?}"));
        }
        let second_done = second.is_ok();
        if let Err(error) = second
            && !fair(case, &error, &deleted)
        {
            wrong.push(format!("the second failed: {}", with_causes(&error)));
        }
        let now = outside(&self.root);
        if case.rival == Rival::Other {
            let gone = |name: &String| !now.contains_key(name);
            if gone(&other(chain)) != second_done || gone(&chain.targets[0]) == deleted.is_empty() {
                wrong.push(format!("{:?} are there", now.keys()));
            }
            return wrong;
        }
        // What was decided is what is there.
        let wanted = if deleted.len() == undone.len() { &states.old } else { &states.new };
        if case.rival == Rival::Same && deleted.is_empty()
            || case.rival == Rival::Undo && second_done && undone.is_empty()
        {
            wrong.push("what the second said it did was never decided".to_owned());
        }
        if now != *wanted {
            let (old, new) = (difference(&now, &states.old), difference(&now, &states.new));
            wrong.push(format!(
                "{deleted:?} {undone:?}: not the old state in {old:?}, not the new in {new:?}"
            ));
        }
        wrong
    }
}

/// Whether the second may fail with that.
fn fair(case: Case, error: &OpError, deleted: &[String]) -> bool {
    // Only one process merges into a file, however long it is stopped: its tree waits for it, decided.
    let waits = case.mode == ModeChoice::InPlace
        && !case.undoes
        && deleted.len() == 1
        && matches!(error.kind(), FailureKind::Busy | FailureKind::Refused);
    match case.rival {
        Rival::Same if waits => true,
        // It finished what the first had decided, and then there was nothing to do.
        Rival::Same if case.aim() == Aim::Consolidate => {
            error.code() == Code::AlreadyBase && deleted.len() == 1
        }
        // Or the undo was taken back, and there still was nothing.
        Rival::Same => error.kind() == FailureKind::NotFound && deleted.len() == 1,
        // There was nothing to be taken back, or it is an undo.
        Rival::Undo => true,
        // A file that an instance that was taken over may still write into is not written into again.
        Rival::Other => waits || case.mode == ModeChoice::InPlace && error.kind() == FailureKind::Refused,
        Rival::Recover => false,
    }
}

/// The member that the second deletes: it neither stays nor is the first one's.
fn other(chain: &Chain) -> String {
    let own = |name: &&String| chain.survivors.contains(name) || chain.deleted.contains(name);
    let mut members = chain.files.keys().filter(|name| name.starts_with("snapshots/"));
    members.find(|name| !own(name)).unwrap().clone()
}

/// The chain; what both delete does not stay. The first merges into what the second deletes.
fn chain_for(case: Case) -> Chain {
    let mut chain = Chain::make(case.shape, seed());
    if case.rival == Rival::Other {
        chain.survivors.remove(1);
    }
    chain
}

fn run_case(rooms: &[Room], chain: &Chain, case: Case, table: &Mutex<Table>) {
    let (calls, states) = rooms[0].clean(chain, case);
    let first = usize::try_from(seed()).unwrap() % case.step;
    let points: Vec<usize> = (first..calls.len()).step_by(case.step).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for room in rooms {
            scope.spawn(|| {
                while let Some(at) = points.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let row = room.point(chain, case, *at as u64, &calls, &states);
                    table.lock().unwrap().rows.push(row);
                }
            });
        }
    });
}

/// All cases of a file system. XFS is stepped through closely, and one case is complete; of the others the
/// bounded form takes some cases, by the seed, at wide steps.
fn cases(fs: FsKind) -> Vec<Case> {
    let xfs = fs == FsKind::Xfs;
    let shape = Shape::Cloudstack;
    let mut cases = Vec::new();
    for mode in shape.modes(fs) {
        let in_place = mode == ModeChoice::InPlace;
        for rival in [Rival::Same, Rival::Recover, Rival::Other, Rival::Undo] {
            let complete = full() || xfs && mode == ModeChoice::Clone && rival == Rival::Same;
            let step = if complete { 1 } else { 11 };
            if !in_place || rival != Rival::Undo {
                cases.push(Case { shape, mode, undoes: false, rival, renews: false, step });
            }
            if !in_place && rival != Rival::Other {
                cases.push(Case { shape, mode, undoes: true, rival, renews: false, step });
            }
        }
        if Shape::Consolidate.modes(fs).contains(&mode) {
            for (rival, undoes) in
                [(Rival::Same, false), (Rival::Recover, false), (Rival::Undo, false), (Rival::Recover, true)]
            {
                let (shape, step) = (Shape::Consolidate, if full() { 1 } else { 17 });
                cases.push(Case { shape, mode, undoes, rival, renews: false, step });
            }
        }
        if !in_place {
            let (shape, step) = (Shape::Fork, if full() { 1 } else { 13 });
            cases.push(Case { shape, mode, undoes: false, rival: Rival::Same, renews: true, step });
        }
    }
    if xfs || full() {
        return cases;
    }
    let first = usize::try_from(seed()).unwrap() % 4;
    cases.into_iter().skip(first).step_by(4).map(|case| Case { step: 19, ..case }).collect()
}

fn pairs_meet(fs: FsKind) {
    let mount = LoopMount::in_memory(fs, 1 << 30);
    let rooms: Vec<Room> = (0..PAIRS)
        .map(|number| Room {
            root: mount.path().join(format!("s{number}")),
            fs,
            urls: [None, None],
            said: mount.path().join(format!("said{number}")),
            judge: Judge::default(),
        })
        .collect();
    let table = Mutex::new(Table::new(&format!("two-instances-{fs:?}").to_lowercase()));
    for case in cases(fs) {
        run_case(&rooms, &chain_for(case), case, &table);
    }
    table.into_inner().unwrap().finish();
}

/// One works on the directory, the other on the same files as an export.
#[test]
fn one_is_stopped_and_another_takes_over_by_nfs() {
    // The server has files open for a while that were removed.
    let bytes = if full() { 4 << 30 } else { 256 << 20 };
    let (mount, aside) = (LoopMount::in_memory(FsKind::Ext4, bytes), tempfile::tempdir().unwrap());
    let server = Ganesha::start(&mount.path());
    for by_nfs in [0, 1] {
        let mut urls = [None, None];
        urls[by_nfs] = Some(server.url(""));
        // The file system's root, which stays: the server knows a directory's handle longer than the directory.
        let (root, said) = (mount.path(), aside.path().join("said"));
        let rooms = [Room { root, fs: FsKind::Ext4, urls, said, judge: Judge::default() }];
        let table = Mutex::new(Table::new(&format!("two-instances-nfs-{by_nfs}")));
        for rival in [Rival::Same, Rival::Recover, Rival::Other, Rival::Undo] {
            let (shape, mode) = (Shape::Cloudstack, ModeChoice::Copy);
            let step = if full() { 1 } else { 17 };
            let case = Case { shape, mode, undoes: false, rival, renews: false, step };
            run_case(&rooms, &chain_for(case), case, &table);
            if full() && rival != Rival::Other {
                let case = Case { undoes: true, ..case };
                run_case(&rooms, &chain_for(case), case, &table);
            }
        }
        table.into_inner().unwrap().finish();
    }
}

#[test]
fn one_is_stopped_and_another_takes_over() {
    pairs_meet(FsKind::Xfs);
}

#[test]
fn one_is_stopped_and_another_takes_over_on_btrfs() {
    pairs_meet(FsKind::Btrfs);
}

#[test]
fn one_is_stopped_and_another_takes_over_on_ext4() {
    pairs_meet(FsKind::Ext4);
}
