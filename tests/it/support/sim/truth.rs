//! What must be so at every instant of a simulated history, and what must be so at its end.

use std::collections::{BTreeMap, BTreeSet};

use qchain::backend::Backend;
use qchain::backend::memory::MemoryStore;
use qchain::backend::publish::decided;
use qchain::ids::StorePath;

use super::image::{Chain, Layers, Version, bytes};
use super::stage::{Layout, Made, Template, owner, path};

/// Whether a name must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    Must,
    Gone,
    Either,
}

/// What somebody else did to a name that must not be lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Foreign {
    Removed,
    File { inode: u64, backing: Option<String> },
}

/// One member.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "a list of independent facts")]
pub struct Member {
    pub view: Vec<u8>,
    /// Whose the file is.
    uid: u32,
    pub presence: Presence,
    /// Deletes of it that are under way.
    pub open: u32,
    /// Somebody else broke what it reads through: what it shows is nobody's business.
    pub spoilt: bool,
    /// It was asked away in place: its own view may end before its name.
    pub in_place: bool,
    /// It was asked away once, and may have come back while what is below it was going.
    pub asked: bool,
    /// How often it was.
    pub asked_times: u32,
    /// Somebody else put it there while others worked.
    pub late: bool,
    pub foreign: Option<Foreign>,
    /// What others wrote into its checkpoint file last.
    pub stamp: u64,
    verified: Vec<Version>,
}

impl Member {
    pub fn new(view: Vec<u8>, uid: u32) -> Self {
        Self {
            view,
            uid,
            presence: Presence::Must,
            open: 0,
            spoilt: false,
            in_place: false,
            asked: false,
            asked_times: 0,
            late: false,
            foreign: None,
            stamp: 0,
            verified: Vec::new(),
        }
    }
}

/// What a claim's file said, and whether it is there for good.
#[derive(Debug)]
struct Seen {
    bytes: Vec<u8>,
    lasting: bool,
}

/// All that is known of how things must be.
#[derive(Debug)]
pub struct Truth {
    pub layout: Layout,
    pub members: BTreeMap<String, Member>,
    pub layers: Layers,
    /// Undos under way, and all that ever began.
    pub undos: u32,
    pub undos_begun: u32,
    /// Whether there was no power cut since all was last in order.
    pub orderly: bool,
    /// Whether a write was ever cut off in its middle.
    pub halved: bool,
    /// Whether there was a power cut at all: who announced himself and is forgotten never takes his number.
    cut: bool,
    claims: BTreeMap<StorePath, Seen>,
    /// What each member read through when it was last seen.
    over: BTreeMap<StorePath, StorePath>,
}

/// When a look is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Anywhere in the middle.
    Instant,
    /// After everything was recovered.
    Recovered,
    /// After everything was purged, too.
    End,
}

impl Truth {
    pub fn new(layout: Layout, template: &Template) -> Self {
        let member = |(number, made): (usize, &Made)| {
            (made.name.clone(), Member::new(made.view.clone(), owner(number)))
        };
        let members = template.members.iter().enumerate().map(member).collect();
        Self {
            layout,
            members,
            layers: Layers::default(),
            undos: 0,
            undos_begun: 0,
            orderly: true,
            halved: false,
            cut: false,
            claims: BTreeMap::new(),
            over: BTreeMap::new(),
        }
    }

    /// Undos that are over.
    pub fn undos_ended(&self) -> u32 {
        self.undos_begun - self.undos
    }

    /// Looks at everything; the first thing that is wrong.
    pub fn check(&mut self, store: &MemoryStore, when: When) -> Result<(), String> {
        let names: Vec<String> = self.members.keys().cloned().collect();
        for name in &names {
            self.check_member(store, name, when)?;
        }
        self.check_checkpoints(store, when)?;
        if when != When::Instant {
            names.iter().try_for_each(|name| self.check_foreign(store, name))?;
        }
        if when == When::End {
            check_leaks(store)?;
        }
        Ok(())
    }

    fn check_member(&mut self, store: &MemoryStore, name: &str, when: When) -> Result<(), String> {
        let place = self.layout.member(name);
        let found = store.stat(&place).ok();
        let there = found.is_some();
        let orderly = self.orderly || when != When::Instant;
        let Some(member) = self.members.get(name) else { return Ok(()) };
        match (there, member.presence) {
            // Taken back, it may lose its name for an instant to an instance that was stopped right before its
            // rename, and gives it back.
            (false, Presence::Must)
                if member.asked && when == When::Instant && is_kept(store, member.uid) =>
            {
                return Ok(());
            }
            (false, Presence::Must) => return Err(format!("{name} is lost")),
            (true, Presence::Gone) => return Err(format!("{name} is back")),
            (false, _) => return Ok(()),
            (true, _) => {}
        }
        if member.spoilt {
            return Ok(());
        }
        // Merged into in place, its file becomes the survivor's: what that one shows, then whose it is.
        let leaves = member.in_place && member.presence == Presence::Either;
        let (uid, own) = (found.map_or(0, |found| found.uid), member.uid);
        if uid != own && !(leaves && (self.members.values().any(|other| other.uid == uid))) {
            return Err(format!("{name} has the owner {uid}"));
        }
        let chain = match self.layers.chain(store, &place) {
            Ok(chain) => chain,
            // A deleted member's name comes back by a power cut, and what was below it does not.
            Err(_) if !orderly && member.presence == Presence::Either => return Ok(()),
            // Who comes while a name goes gets it back.
            Err(_) if (member.late || member.asked) && when == When::Instant => return Ok(()),
            // As above: what reads through a member that was taken back is not there for that instant.
            Err(broken) if when == When::Instant && self.undos_begun > 0 => {
                return if self.comes_back(store, &broken) {
                    Ok(())
                } else {
                    Err(format!("{name}: {broken}"))
                };
            }
            // Half of the switch was written, which leaves neither image: recovery writes the rest.
            Err(_) if leaves && self.halved && when == When::Instant => return Ok(()),
            Err(broken) => return Err(format!("{name}: {broken}")),
        };
        for pair in chain.paths.windows(2) {
            self.over.insert(pair[0].clone(), pair[1].clone());
        }
        let shown = |other: &Member| chain.view() == other.view;
        let Some(member) = self.members.get(name) else { return Ok(()) };
        if member.verified != chain.versions {
            // One of whom it belongs to already says it shows the right thing, or one that it is about to be given to.
            let whose = |other: &&Member| when == When::Instant || other.uid == uid;
            let anothers = || self.members.values().filter(whose).any(shown);
            // Of several that become one, those above the lowest read through it until their names are gone.
            let between = || when != When::End && self.reads_through_leaving(&chain);
            let half = self.halved && when == When::Instant;
            if !(uid == own && shown(member) || leaves && (half || anothers() || between())) {
                let through: Vec<&str> = chain.paths.iter().map(StorePath::as_str).collect();
                return Err(format!("{name} shows something else, through {through:?}"));
            }
            if let Some(member) = self.members.get_mut(name) {
                member.verified = chain.versions;
            }
        }
        Ok(())
    }

    /// Whether the first of these reads through one that is merged into, and shows another member already.
    fn reads_through_leaving(&self, chain: &Chain) -> bool {
        let merged = |member: &&Member| member.in_place && member.presence == Presence::Either;
        let shows_another = |(depth, path): (usize, &StorePath)| {
            let Some(own) = self.members.get(path.file_name()).filter(merged) else { return false };
            let view = chain.view_of(depth);
            view != own.view && self.members.values().any(|other| other.view == view)
        };
        (1..).zip(chain.paths.iter().skip(1)).any(shows_another)
    }

    /// Whether what is missing is a member that was asked away, and is in trash.
    fn comes_back(&self, store: &MemoryStore, broken: &str) -> bool {
        let missing = broken.strip_suffix(" is missing").unwrap_or_default();
        let mut members = self.members.iter().filter(|(_, member)| member.asked);
        let missing = members.find(|(name, _)| self.layout.member(name).as_str() == missing);
        missing.is_some_and(|(_, member)| is_kept(store, member.uid))
    }

    /// Who a checkpoint file names as parent, and its stamp.
    pub fn checkpoint(&self, store: &MemoryStore, name: &str) -> Option<(Option<String>, u64)> {
        let text = String::from_utf8(bytes(store, &self.layout.checkpoint(name)?)?).ok()?;
        let between = |from: &str, to: &str| Some(text.split_once(from)?.1.split_once(to)?.0.to_owned());
        let parent = between("<parent><name>", "</name>");
        Some((parent, between("<stamp>", "</stamp>")?.parse().ok()?))
    }

    fn check_checkpoints(&mut self, store: &MemoryStore, when: When) -> Result<(), String> {
        if self.layout.checkpoint("m0").is_none() {
            return Ok(());
        }
        for (name, member) in &self.members {
            let found = self.checkpoint(store, name);
            let there = store.stat(&self.layout.member(name)).is_ok();
            if member.spoilt || member.foreign.is_some() {
                continue;
            }
            let Some((parent, stamp)) = found else {
                // As with a member's own name.
                let comes_back = member.asked && when == When::Instant && is_checkpoint_kept(store, name);
                if there && !comes_back && (member.presence == Presence::Must || when != When::Instant) {
                    return Err(format!("the checkpoint file of {name} is lost"));
                }
                continue;
            };
            // One that others wrote while its member was leaving stays: it is not qchain's to judge.
            if !there && when != When::Instant && stamp == 0 {
                return Err(format!("the checkpoint file of {name} is left behind"));
            }
            if there && stamp != member.stamp && when != When::Instant {
                return Err(format!("what was written into the checkpoint file of {name} is lost"));
            }
            if !there && when != When::Instant {
                continue;
            }
            if when == When::Instant {
                let dangles = parent.as_ref().filter(|parent| self.checkpoint(store, parent).is_none());
                if let Some(parent) = dangles.filter(|_| self.orderly && !member.late && !member.asked) {
                    return Err(format!("the checkpoint file of {name} names {parent}, which is gone"));
                }
                continue;
            }
            let (_, layer) = self.layers.layer(store, &self.layout.member(name))?;
            if parent != layer.backing {
                let header = &layer.backing;
                return Err(format!("{name} is over {header:?}, its checkpoint file says {parent:?}"));
            }
        }
        Ok(())
    }

    /// What others did stays done.
    fn check_foreign(&mut self, store: &MemoryStore, name: &str) -> Result<(), String> {
        let place = self.layout.member(name);
        let found = store.stat(&place).ok();
        match self.members.get(name).and_then(|member| member.foreign.as_ref()) {
            None => Ok(()),
            Some(Foreign::Removed) => match found {
                None => Ok(()),
                // What was merged in place is kept nowhere, so nobody can tell who removed its name; who came to read
                // through it has it again.
                Some(_) if self.is_merged_and_read(store, name) => Ok(()),
                Some(_) => Err(format!("{name} was removed by others and is back")),
            },
            Some(Foreign::File { inode, backing }) => {
                if found.is_none_or(|found| found.id.inode != *inode) {
                    return Err(format!("the file that others put at {name} is lost"));
                }
                match self.layers.layer(store, &place)?.1 {
                    layer if layer.backing == *backing => Ok(()),
                    layer => Err(format!("the header of {name} says {:?}, not {backing:?}", layer.backing)),
                }
            }
        }
    }

    /// Whether a member that was asked away in place has a child that others made meanwhile.
    fn is_merged_and_read(&mut self, store: &MemoryStore, name: &str) -> bool {
        let late = |(_, member): &(&String, &Member)| member.late;
        let children = self.members.iter().filter(late).map(|(child, _)| self.layout.member(child));
        let children: Vec<StorePath> = children.collect();
        let mut stands_on_it = |child: &StorePath| {
            self.layers.layer(store, child).is_ok_and(|(_, layer)| layer.backing.as_deref() == Some(name))
        };
        self.members.get(name).is_some_and(|member| member.in_place) && children.iter().any(&mut stands_on_it)
    }

    /// Members whose view or checkpoint reads through a name now, itself included. One whose name is gone for an
    /// instant reads through what it did.
    pub fn above(&mut self, store: &MemoryStore, name: &str) -> BTreeSet<String> {
        let names: Vec<String> = self.members.keys().cloned().collect();
        let place = self.layout.member(name);
        let mut found = BTreeSet::from([name.to_owned()]);
        for other in names {
            let mut below = Some(other.clone());
            let mut steps = 0;
            while let Some(at) = below.filter(|_| steps < 16) {
                if at == name {
                    found.insert(other.clone());
                }
                below = self.checkpoint(store, &at).and_then(|(parent, _)| parent);
                steps += 1;
            }
            let mut at = self.layout.member(&other);
            for _ in 0..16 {
                if at == place {
                    found.insert(other.clone());
                }
                let below = match self.layers.layer(store, &at) {
                    Ok((_, layer)) => {
                        layer.backing.as_ref().map(|backing| at.parent().join(backing).unwrap())
                    }
                    Err(_) => self.over.get(&at).cloned(),
                };
                let Some(below) = below else { break };
                at = below;
            }
        }
        found
    }

    /// Looks at all claims: whole ones never change, and numbers have no gaps once nobody is at work (who
    /// announced himself first may decide last).
    pub fn check_claims(&mut self, store: &MemoryStore, when: When) -> Result<(), String> {
        let root = path(".qchain/generations");
        for tree in store.read_dir(&root).unwrap().iter().filter_map(|tree| tree.path_in(&root)) {
            let entries = store.read_dir(&tree).unwrap();
            let mut claims: Vec<StorePath> =
                entries.iter().filter_map(|entry| entry.path_in(&tree)).collect();
            claims.sort();
            for (number, claim) in (1..).zip(&claims) {
                if when != When::Instant && !self.cut && claim.file_name().parse() != Ok(number) {
                    return Err(format!("{claim} follows a gap"));
                }
                // Without hard links it lies in a directory of its own.
                let own = decided(claim);
                self.check_claim(store, if store.stat(&own).is_ok() { &own } else { claim })?;
            }
        }
        match self.claims.keys().find(|claim| store.stat(claim).is_err()) {
            Some(claim) => Err(format!("{claim} is lost")),
            None => Ok(()),
        }
    }

    fn check_claim(&mut self, store: &MemoryStore, claim: &StorePath) -> Result<(), String> {
        let bytes = bytes(store, claim).unwrap_or_default();
        // A power cut can take the bytes of one that nobody has built on.
        if serde_json::from_slice::<serde_json::Value>(&bytes).is_err() {
            return match self.claims.get(claim) {
                Some(_) => Err(format!("{claim} is torn")),
                None => Ok(()),
            };
        }
        match self.claims.get(claim) {
            Some(seen) if seen.bytes != bytes => Err(format!("{claim} was written again")),
            Some(_) => Ok(()),
            None => {
                self.claims.insert(claim.clone(), Seen { bytes, lasting: false });
                Ok(())
            }
        }
    }

    /// The claims of these operations are there for good: somebody was told that they are done.
    pub fn claims_last(&mut self, operations: &[String]) {
        let last = |seen: &Seen| operations.iter().any(|id| claims(&seen.bytes, id));
        self.claims.values_mut().filter(|seen| last(seen)).for_each(|seen| seen.lasting = true);
    }

    /// The names in a directory of claims were made durable, and the bytes have to be before.
    pub fn claims_synced(&mut self, directory: &StorePath) {
        // One in a directory of its own lasts when that directory's name does.
        let names = |claim: &StorePath| match claim.file_name() {
            "record" => claim.parent().parent(),
            _ => claim.parent(),
        };
        let there = self.claims.iter_mut().filter(|(claim, _)| names(claim) == *directory);
        there.for_each(|(_, seen)| seen.lasting = true);
    }

    /// A power cut: claims that nobody was told of may be gone, and versions of files mean nothing.
    pub fn power_cut(&mut self) {
        self.cut = true;
        self.claims.retain(|_, seen| seen.lasting);
        self.orderly = false;
        self.layers.forget();
        self.members.values_mut().for_each(|member| member.verified.clear());
    }
}

/// Whether a file of that owner is in trash.
fn is_kept(store: &MemoryStore, uid: u32) -> bool {
    let trash = path(".qchain/trash");
    let entries = store.read_dir(&trash).unwrap_or_default();
    let mut files = entries.iter().filter_map(|entry| entry.path_in(&trash));
    files.any(|file| store.stat(&file).is_ok_and(|found| found.uid == uid))
}

/// Whether a member's checkpoint file is in trash.
fn is_checkpoint_kept(store: &MemoryStore, name: &str) -> bool {
    let trash = path(".qchain/trash");
    let own = format!("<domaincheckpoint>\n  <name>{name}</name>");
    let entries = store.read_dir(&trash).unwrap_or_default();
    let mut files = entries.iter().filter_map(|entry| entry.path_in(&trash));
    files.any(|file| bytes(store, &file).is_some_and(|text| text.starts_with(own.as_bytes())))
}

/// Whether a claim's bytes are that operation's.
fn claims(bytes: &[u8], operation: &str) -> bool {
    let claim: Option<serde_json::Value> = serde_json::from_slice(bytes).ok();
    claim.is_some_and(|claim| claim["operation"] == operation)
}

/// Nothing of qchain's is left but what is meant to last.
fn check_leaks(store: &MemoryStore) -> Result<(), String> {
    for directory in ["tmp", "trash", "intents"] {
        let place = path(".qchain").join(directory).unwrap();
        if let Some(left) = store.read_dir(&place).unwrap().first() {
            return Err(format!("{directory} has {:?} left", left.name));
        }
    }
    Ok(())
}
