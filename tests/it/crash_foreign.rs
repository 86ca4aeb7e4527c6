//! Others at work on the same files, at every call of a deletion: CloudStack removes by its glob, hypervisors
//! add children, rewrite backing names and checkpoint files, somebody puts another file in a member's place.
//! The end is done, taken back, or left with a finding; nothing of theirs is lost, and no view is wrong that
//! they have not made wrong themselves.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qchain::backend::faulty::{Faulty, Lasting};
use qchain::backend::posix::PosixStore;
use qchain::change::recover::Action;
use qchain::change::witness::Witness;
use qchain::change::{Site, SystemClock};
use qchain::ops::delete::{ModeChoice, Terms};
use qchain::ops::recover::recover;
use qchain::progress::Cancel;

use super::support::crash::{
    Chain, Files, Judge, Row, Shape, Table, backing, checkpoint, full, left_inside, outside, seed, uuid, word,
};
use super::support::killing::{LONG, Verb, act, mutations};
use super::support::mounts::{FsKind, LoopMount};
use super::support::qemu::{must, run, text};
use super::support::store::{open, open_with};

/// Whom it is done to: of base <- a <- b <- c, of which `a` is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Parent,
    Deleted,
    Survivor,
}

impl Role {
    const ALL: [Self; 3] = [Self::Parent, Self::Deleted, Self::Survivor];

    fn name(self) -> &'static str {
        match self {
            Self::Parent => "base",
            Self::Deleted => "a",
            Self::Survivor => "b",
        }
    }
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    /// `rm snapshots/2/7/UUID* checkpoints/2/7/UUID*`.
    Remove,
    /// A new member on it.
    Adopt,
    /// `qemu-img rebase -u` with the same parent, spelled in another way.
    Rebase,
    /// The agent writes another disk's label into its checkpoint file.
    Label,
    /// Another file takes its name.
    Replace,
}

impl Deed {
    const ALL: [Self; 5] = [Self::Remove, Self::Adopt, Self::Rebase, Self::Label, Self::Replace];
}

const EIO: i32 = 5;
const CHILD: &str = "6f9619ff-8b86-4d01-b42d-00cf4fc96409";
const LABEL: &str = "name='sdx'";

fn member(name: &str) -> String {
    format!("snapshots/2/7/{}", uuid(name))
}

fn checkpoint_file(name: &str) -> String {
    format!("checkpoints/2/7/{}", uuid(name))
}

/// Somebody else, ready to act.
#[derive(Clone)]
struct Actor {
    root: PathBuf,
    role: Role,
    deed: Deed,
    /// The image that is put on a member, or in its place.
    image: Vec<u8>,
    acted: Arc<AtomicBool>,
}

impl Actor {
    fn new(root: &Path, chain: &Chain, role: Role, deed: Deed) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("image");
        match (deed, role) {
            (Deed::Adopt, _) => {
                let below = uuid(role.name());
                must(
                    "qemu-img",
                    &["create", "-q", "-u", "-f", "qcow2", "-b", &below, "-F", "qcow2", text(&path), "1M"],
                );
            }
            (Deed::Replace, Role::Parent) => {
                let truth = chain.truth(&member("base"));
                must("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&truth), text(&path)]);
            }
            (Deed::Replace, _) => {
                must("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), "1M"]);
                must("qemu-io", &["-c", "write -P 77 0 512k", text(&path)]);
            }
            _ => fs::write(&path, b"").unwrap(),
        }
        let image = fs::read(&path).unwrap();
        Self { root: root.to_owned(), role, deed, image, acted: Arc::default() }
    }

    fn act(&self) {
        let path = self.root.join(member(self.role.name()));
        let label = self.root.join(checkpoint_file(self.role.name()));
        let acted = match self.deed {
            Deed::Remove => [&path, &label].map(|path| fs::remove_file(path).is_ok())[0],
            Deed::Adopt if path.exists() => {
                fs::write(self.root.join("snapshots/2/7").join(CHILD), &self.image).unwrap();
                let file = checkpoint(CHILD, Some(&uuid(self.role.name())));
                fs::write(self.root.join("checkpoints/2/7").join(CHILD), file).unwrap();
                true
            }
            Deed::Rebase => {
                let parent = match self.role {
                    Role::Parent => String::new(),
                    Role::Deleted => format!("./{}", uuid("base")),
                    Role::Survivor => format!("./{}", uuid("a")),
                };
                let arguments = ["rebase", "-u", "-f", "qcow2", "-b", &parent, "-F", "qcow2", text(&path)];
                let below = path.with_file_name(parent.trim_start_matches("./"));
                path.exists() && below.exists() && run("qemu-img", &arguments).status.success()
            }
            Deed::Label if label.exists() => {
                let edited = fs::read_to_string(&label).unwrap().replace("name='vda'", LABEL);
                fs::write(&label, edited).unwrap();
                true
            }
            Deed::Replace if path.exists() => {
                let other = self.root.join("incoming");
                fs::write(&other, &self.image).unwrap();
                fs::rename(other, &path).unwrap();
                true
            }
            Deed::Adopt | Deed::Label | Deed::Replace => false,
        };
        self.acted.store(acted, Ordering::Relaxed);
    }

    fn did(&self, deed: Deed, role: Role) -> bool {
        self.acted.load(Ordering::Relaxed) && self.deed == deed && self.role == role
    }
}

/// What a state must be after somebody acted and all was recovered.
struct Verdict<'a> {
    chain: &'a Chain,
    judge: &'a Judge,
    now: &'a Files,
    actor: &'a Actor,
    mode: ModeChoice,
    /// The actor was there before the deletion looked: then what he made is what was asked away.
    early: bool,
    succeeded: bool,
    wrong: Vec<String>,
}

impl Verdict<'_> {
    fn has(&self, name: &str) -> bool {
        self.now.contains_key(&member(name))
    }

    fn must(&mut self, holds: bool, what: &str) {
        if !holds {
            self.wrong.push(what.to_owned());
        }
    }

    /// The view of a member is that of another's truth.
    fn same(&self, path: &str, truth: &str) -> Option<String> {
        self.judge.view(self.now, path, &self.chain.truth(&member(truth)))
    }

    fn judged(mut self) -> Vec<String> {
        self.theirs();
        self.done();
        self.views();
        self.parents();
        self.wrong
    }

    /// Nobody goes: a member in the middle becomes a base.
    fn consolidates(&self) -> bool {
        self.chain.shape == Shape::Consolidate
    }

    /// What is said to be done is so, unless they made something else of it.
    fn done(&mut self) {
        let theirs = self.actor.role == Role::Survivor && self.actor.acted.load(Ordering::Relaxed);
        if self.consolidates() && self.succeeded && !theirs {
            let base = self.now.get(&member("b")).is_some_and(|bytes| backing(bytes).is_none());
            self.must(base, "a success, but the member is no base");
        }
    }

    /// What they did is still so.
    fn theirs(&mut self) {
        let (deed, role) = (self.actor.deed, self.actor.role);
        if !self.actor.acted.load(Ordering::Relaxed) {
            return;
        }
        let name = role.name();
        let file = self.now.get(&member(name));
        let label =
            self.now.get(&checkpoint_file(name)).map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        let going = role == Role::Deleted && !self.consolidates();
        match deed {
            Deed::Remove => self.must(file.is_none() && label.is_none(), "a removed name came back"),
            Deed::Adopt => {
                let made = self.now.get(&format!("snapshots/2/7/{CHILD}")) == Some(&self.actor.image);
                // One that was there before was a child like the other, and merged into.
                let merged = self.early && going;
                self.must(made && self.has(name) || merged, "a child was changed, or has no parent");
            }
            Deed::Rebase => {
                // What was merged has its parent's parent; that is what the edit meant then.
                let says = file.and_then(|bytes| backing(bytes));
                let wanted = match role {
                    Role::Parent => vec![None],
                    Role::Deleted => vec![Some(format!("./{}", uuid("base")))],
                    // What it named before is what was folded into it.
                    Role::Survivor if self.consolidates() && self.early => {
                        vec![None, Some(format!("./{}", uuid("a")))]
                    }
                    Role::Survivor if self.has("a") => vec![Some(format!("./{}", uuid("a")))],
                    Role::Survivor => vec![Some(uuid("base")), Some(format!("./{}", uuid("base")))],
                };
                let kept = wanted.contains(&says) || going && file.is_none();
                self.must(kept, &format!("an edited backing name was lost: {says:?}"));
            }
            Deed::Label => {
                let kept = label.as_ref().is_some_and(|label| label.contains(LABEL));
                self.must(kept || going && file.is_none(), "an edited checkpoint file was lost");
            }
            Deed::Replace => {
                let early = self.early && role != Role::Parent && !self.consolidates();
                self.must(file == Some(&self.actor.image) || early, "a file put in place was lost");
            }
        }
    }

    /// Views are right, but those that the actor took the bytes of away.
    fn views(&mut self) {
        let actor = self.actor;
        let base_gone = actor.did(Deed::Remove, Role::Parent);
        let b_gone = actor.did(Deed::Remove, Role::Survivor) || actor.did(Deed::Replace, Role::Survivor);
        let a_gone = actor.did(Deed::Remove, Role::Deleted) || actor.did(Deed::Replace, Role::Deleted);
        let old_b = self.now.get(&member("b")) == self.chain.files.get(&member("b"));
        let b_lost = b_gone || a_gone && (old_b || self.early);
        if !base_gone {
            self.wrong.extend(self.same(&member("base"), "base"));
            if !b_lost {
                self.wrong.extend(self.same(&member("b"), "b"));
                self.wrong.extend(self.same(&member("c"), "c"));
            }
            if self.has("a") && !a_gone && self.mode != ModeChoice::InPlace {
                self.wrong.extend(self.same(&member("a"), "a"));
            }
        }
        if actor.deed == Deed::Adopt && actor.acted.load(Ordering::Relaxed) {
            let child = format!("snapshots/2/7/{CHILD}");
            let wrong = self.same(&child, actor.role.name());
            // Whoever reads a member that is being merged in place sees its successor from the switch on.
            let merged = self.mode == ModeChoice::InPlace && actor.role == Role::Deleted;
            let wrong = wrong.filter(|_| !merged || self.same(&child, "b").is_some());
            self.wrong.extend(wrong);
        }
    }

    /// Whoever has a parent finds it, but for what the actor removed; so do checkpoint files.
    fn parents(&mut self) {
        let removed = |name: &str| {
            Role::ALL.iter().any(|role| self.actor.did(Deed::Remove, *role) && uuid(role.name()) == name)
        };
        let mut wrong = Vec::new();
        for (path, bytes) in self.now {
            let (directory, parent) = if path.starts_with("snapshots/2/7/") {
                ("snapshots/2/7", backing(bytes).map(|name| name.trim_start_matches("./").to_owned()))
            } else {
                let text = String::from_utf8_lossy(bytes).into_owned();
                let parent = text.split_once("<parent>").and_then(|(_, rest)| rest.split_once("<name>"));
                let parent =
                    parent.and_then(|(_, rest)| rest.split_once('<')).map(|(name, _)| name.to_owned());
                ("checkpoints/2/7", parent)
            };
            if let Some(parent) = parent
                && !removed(&parent)
                && !self.now.contains_key(&format!("{directory}/{parent}"))
            {
                wrong.push(format!("{path} has lost its parent {parent}"));
            }
        }
        self.wrong.extend(wrong);
    }
}

/// Where others are met.
struct Room {
    root: PathBuf,
    fs: FsKind,
    chain: Chain,
    judge: Judge,
}

impl Room {
    fn new(mount: &LoopMount, fs: FsKind, shape: Shape) -> Self {
        let chain = Chain::make(shape, seed());
        Self { root: mount.path().join("s"), fs, chain, judge: Judge::default() }
    }

    fn faulty(&self) -> Faulty {
        Faulty::new(Arc::new(PosixStore::open(&self.root).unwrap()))
    }

    fn act(&self, faulty: &Faulty, verb: Verb, mode: ModeChoice) -> Result<(), String> {
        let stores = open_with(&self.root, Arc::new(faulty.clone()));
        let verb = if verb == Verb::Delete { Verb::on(&self.chain) } else { verb };
        act(&stores, verb, &self.chain.targets, mode, Terms::default())
    }

    /// The chain as it is put there, and how often a deletion of it changes the store.
    fn clean(&self, mode: ModeChoice) -> u64 {
        self.chain.put(&self.root);
        let faulty = self.faulty();
        self.act(&faulty, Verb::Delete, mode).unwrap();
        faulty.mutations()
    }

    /// A deletion that was cut off before its call of that number.
    fn cut_off(&self, mode: ModeChoice, at: u64) {
        self.chain.put(&self.root);
        let faulty = self.faulty();
        faulty.fail_at(at, EIO, Lasting::Dead);
        let _ = self.act(&faulty, Verb::Delete, mode);
    }

    /// One actor at one call of what is done to the store as it is now.
    fn meet(&self, verb: Verb, mode: ModeChoice, actor: &Actor, at: u64) -> Row {
        actor.acted.store(false, Ordering::Relaxed);
        let faulty = self.faulty();
        let hook = actor.clone();
        faulty.before_mutation(at, move || hook.act());
        let result = self.act(&faulty, verb, mode);
        let calls = mutations(&faulty.trace());
        let mut row = Row {
            verb: format!("{:?}-{:?}", actor.deed, actor.role).to_lowercase(),
            mode: word(mode),
            fs: format!("{:?}", self.fs).to_lowercase(),
            shape: format!("{:?}", self.chain.shape).to_lowercase(),
            number: at,
            call: calls.get(usize::try_from(at).unwrap()).cloned().unwrap_or_default(),
            ..Row::default()
        };
        let (stores, cancel) = (open(&self.root), Cancel::default());
        let site = Site::new(&stores, &SystemClock, &cancel, LONG);
        let mut actions = Vec::new();
        for _ in 0..2 {
            actions = recover(&site, Witness::None).unwrap().into_iter().map(|one| one.action).collect();
        }
        let now = outside(&self.root);
        let gone = !now.contains_key(&member("a"));
        row.end = match (&result, &actions[..]) {
            (_, [action, ..]) => action.word().to_owned(),
            (Ok(()), []) => "done".to_owned(),
            (Err(_), []) => if gone { "failed, gone" } else { "failed, kept" }.to_owned(),
        };
        if actions.iter().any(|action| matches!(action, Action::Failed { .. } | Action::Busy)) {
            row.after.push(format!("{actions:?}"));
        }
        let succeeded = verb == Verb::Delete && result.is_ok();
        let deletes = !self.chain.deleted.is_empty();
        if succeeded && deletes && !gone && !actor.did(Deed::Replace, Role::Deleted) {
            row.after.push("a success, but the member is there".to_owned());
        }
        let scanned = calls.iter().position(|call| call.starts_with("probe")).unwrap_or(0) as u64;
        let (chain, judge, early) = (&self.chain, &self.judge, at < scanned);
        let wrong = Vec::new();
        let verdict = Verdict { chain, judge, now: &now, actor, mode, early, succeeded, wrong };
        row.after.extend(verdict.judged());
        if actions.is_empty() {
            row.leaks = left_inside(&self.root);
        }
        row
    }
}

/// Everybody at every call of a deletion, or of a consolidation.
fn changes(fs: FsKind, shape: Shape) {
    let mount = LoopMount::in_memory(fs, 512 << 20);
    let room = Room::new(&mount, fs, shape);
    let deletes = shape == Shape::Cloudstack;
    let mut table = Table::new(&format!("crash-foreign-{shape:?}-{fs:?}").to_lowercase());
    let turn = Rc::new(Cell::new(usize::try_from(seed()).unwrap()));
    for mode in shape.modes(fs) {
        let calls = room.clean(mode);
        for deed in Deed::ALL {
            for role in Role::ALL {
                let actor = Actor::new(&room.root, &room.chain, role, deed);
                turn.set(turn.get() + 1);
                let xfs = fs == FsKind::Xfs;
                let always = xfs
                    && deletes
                    && mode == ModeChoice::Copy
                    && role == Role::Survivor
                    && deed == Deed::Remove;
                let step = match (full() || always, xfs && deletes) {
                    (true, _) => 1,
                    (false, true) => 11,
                    (false, false) => 29,
                };
                for at in (0..calls).skip(turn.get() % step).step_by(step) {
                    room.chain.put(&room.root);
                    table.rows.push(room.meet(Verb::Delete, mode, &actor, at));
                }
            }
        }
    }
    table.finish();
}

#[test]
fn others_meet_a_deletion_at_every_call() {
    changes(FsKind::Xfs, Shape::Cloudstack);
}

#[test]
fn others_meet_a_deletion_on_btrfs() {
    changes(FsKind::Btrfs, Shape::Cloudstack);
}

#[test]
fn others_meet_a_deletion_on_ext4() {
    changes(FsKind::Ext4, Shape::Cloudstack);
}

#[test]
fn others_meet_a_consolidation() {
    changes(FsKind::Xfs, Shape::Consolidate);
    changes(FsKind::Ext4, Shape::Consolidate);
}

/// Everybody at every call of the recovery of a merge in place, wherever that was cut off. Between the two
/// nobody keeps QEMU's writers out: the survivor is rebased from the moment on when its locks are held again.
#[test]
fn others_meet_the_recovery_of_a_merge_in_place() {
    let mount = LoopMount::in_memory(FsKind::Ext4, 512 << 20);
    let (room, mode) = (Room::new(&mount, FsKind::Ext4, Shape::Cloudstack), ModeChoice::InPlace);
    let mut table = Table::new("crash-foreign-recovery");
    let mut courses = BTreeSet::new();
    let mut turn = usize::try_from(seed()).unwrap();
    for cut in 0..room.clean(mode) {
        room.cut_off(mode, cut);
        let faulty = room.faulty();
        let _ = room.act(&faulty, Verb::Recover, mode);
        let trace = faulty.trace();
        if !courses.insert(mutations(&trace)) {
            continue;
        }
        let locked = trace.iter().position(|call| call.name == "hold_image_locks").unwrap_or(trace.len());
        let locked = trace[..locked].iter().filter(|call| call.mutation.is_some()).count();
        for deed in Deed::ALL {
            for role in Role::ALL {
                let rebase = deed == Deed::Rebase && role == Role::Survivor;
                let actor = Actor::new(&room.root, &room.chain, role, deed);
                turn += 1;
                let step = match (full(), rebase) {
                    (true, _) => 1,
                    (false, true) => 7,
                    (false, false) => 199,
                };
                let first = if rebase { locked } else { 0 };
                for at in (first..mutations(&trace).len()).skip(turn % step).step_by(step) {
                    room.cut_off(mode, cut);
                    let mut row = room.meet(Verb::Recover, mode, &actor, at as u64);
                    row.verb = format!("recover-{cut}-{}", row.verb);
                    table.rows.push(row);
                }
            }
        }
    }
    table.finish();
}
