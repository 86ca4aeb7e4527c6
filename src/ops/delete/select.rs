//! What may be deleted (design, sections 1 and 5): a scan and a request in, merges or a refusal out. Reads nothing
//! but the tables of stubs, to see that they are empty. What may be made a base is in `consolidate`.

use std::collections::{BTreeMap, BTreeSet};

use crate::chain::delete::{Groups, group};
use crate::chain::graph::{NodeId, Parent};
use crate::cloudstack::records::{Records, Row};
use crate::failure::Code;
use crate::ops::delete::stub::holds_nothing;
use crate::ops::{OpError, Result};
use crate::qcow2::Image;
use crate::store::Stores;
use crate::store::record::StoreKind;
use crate::store::scan::{Member, Scan};

/// Which way of moving data was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ModeChoice {
    /// The cheapest that works.
    #[default]
    Auto,
    /// By sharing extents, or not at all.
    Clone,
    /// By writing into the deleted member, or not at all.
    InPlace,
    /// By copying.
    Copy,
}

/// What becomes of the targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aim {
    /// They are merged into their children, and go.
    #[default]
    Delete,
    /// All that is below each is merged into it, and stays: it becomes a full base.
    Consolidate,
}

/// What is to be deleted or consolidated, and what its caller vouches for.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a word of the caller's of its own")]
pub struct Request<'a> {
    /// The members.
    pub targets: Vec<NodeId>,
    /// What becomes of them.
    pub aim: Aim,
    /// Why, of those that the caller did not name himself.
    pub reasons: BTreeMap<NodeId, String>,
    /// How to move data.
    pub mode: ModeChoice,
    /// CloudStack's rows.
    pub records: Option<&'a Records>,
    /// The caller vouches that CloudStack has given the members up.
    pub assume_deleted: bool,
    /// The caller vouches that the chain has been ended, so that its newest member may go.
    pub end_of_chain: bool,
    /// Members that are known not to be the newest of their chains, although no file says so: by rows somebody is
    /// newer.
    pub superseded: BTreeSet<NodeId>,
    /// Only a plan is wanted: what a store can do is taken from its `store.json` if that says it.
    pub dry_run: bool,
    /// Leave a checkpoint file that cannot be edited as it is.
    pub force: bool,
    /// When a merge in place may be chosen.
    pub in_place: InPlacePolicy,
    /// The caller vouches that nobody else has the members open, where no locks can prove it.
    pub exclusive: bool,
    /// Members that were deleted and have their names still.
    pub leaving: BTreeSet<NodeId>,
    /// Deleted members keep their names for a stub each. Without, the stubs above them go, too.
    pub stubs: bool,
}

/// When a merge in place may be chosen; one that is asked for is not concerned, but for `Never`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InPlacePolicy {
    /// Where it is much cheaper.
    #[default]
    Auto,
    /// Where there is no room for another way.
    NoSpace,
    /// Never.
    Never,
}

/// The merges and removals that delete `targets` (all of one tree), or why not.
pub fn select(stores: &Stores, scan: &Scan, request: &Request<'_>, targets: &[NodeId]) -> Result<Groups> {
    let check = Check { stores, scan, request };
    for target in targets {
        check.target(*target)?;
    }
    // Those that are on their way out read through others, and need nothing of them; nor do stubs.
    let tree = targets.first().map(|target| scan.graph.tree_of(*target));
    let leaving = request.leaving.iter().copied().filter(|id| Some(scan.graph.tree_of(*id)) == tree);
    let stubs = check.stubs(targets)?;
    let delete: BTreeSet<NodeId> =
        targets.iter().copied().chain(leaving).chain(stubs.iter().copied()).collect();
    let mut groups = group(&scan.graph, &delete)?;
    let stays = |id: &NodeId| {
        request.leaving.contains(id) || request.stubs && stubs.contains(id) && !targets.contains(id)
    };
    groups.removals.retain(|id| !stays(id));
    groups.departures.retain(|departure| !stays(&departure.member));
    for merge in &groups.merges {
        check.usable(merge.survivor)?;
        for below in scan.graph.ancestors(merge.survivor).unwrap_or_default() {
            check.still(below)?;
        }
    }
    for removal in &groups.removals {
        check.tip(*removal)?;
    }
    Ok(groups)
}

/// What the rules look at.
pub(super) struct Check<'a> {
    pub(super) stores: &'a Stores,
    pub(super) scan: &'a Scan,
    pub(super) request: &'a Request<'a>,
}

impl<'a> Check<'a> {
    pub(super) fn member(&self, id: NodeId) -> Result<&'a Member> {
        self.scan.member(id).ok_or_else(|| refused(Code::NotFound, String::new(), "it is not in the scan"))
    }

    pub(super) fn name(&self, member: &Member) -> String {
        self.stores.display(&member.key)
    }

    pub(super) fn refuse(&self, member: &Member, code: Code, message: impl Into<String>) -> OpError {
        refused(code, self.name(member), message)
    }

    fn cloudstack(&self, member: &Member) -> Result<bool> {
        Ok(self.stores.get(member.key.store)?.kind() == StoreKind::Cloudstack)
    }

    /// A member that is asked away.
    fn target(&self, id: NodeId) -> Result<()> {
        let member = self.member(id)?;
        if self.request.leaving.contains(&id) {
            let message = "it was deleted already, and keeps its name until its readers have had their grace";
            return Err(self.refuse(member, Code::Leaving, message));
        }
        if member.temporary {
            return Err(self.refuse(member, Code::NotDeletable, "it is CloudStack's own temporary file"));
        }
        self.readable(id)?;
        self.one_name(id, member, true)?;
        self.given_up(member)?;
        self.hidden_children(id, member)
    }

    /// A member whose file is read whole and replaced or dropped: readable, settled, one name, nothing inside
    /// that a merge would lose.
    pub(super) fn usable(&self, id: NodeId) -> Result<()> {
        self.readable(id)?;
        self.one_name(id, self.member(id)?, false)
    }

    /// A merge in place gives its survivor the deleted member's file, which has both names for a while, and for
    /// good if somebody came to read through it. Such a name alone may go later (`goes`).
    fn one_name(&self, id: NodeId, member: &Member, goes: bool) -> Result<()> {
        let twin = |other: &Member| other.stat.id == member.stat.id;
        let leaving = |other: &NodeId| *other != id && self.scan.member(*other).is_some_and(twin);
        let names = || self.scan.members.iter().filter(|other| twin(other)).count() as u64;
        if member.stat.links <= 1
            || self.request.leaving.iter().any(leaving)
            || goes && names() == member.stat.links
        {
            return Ok(());
        }
        let message = "the file has a second name, under which its old content would stay";
        Err(self.refuse(member, Code::HardLinked, message))
    }

    /// Settled, and nothing inside that a merge would lose.
    fn readable(&self, id: NodeId) -> Result<()> {
        let member = self.member(id)?;
        if let Some((code, message)) = member.reading.fault() {
            return Err(self.refuse(member, code, message));
        }
        self.settled(id)?;
        let header = member.reading.header();
        if header.is_some_and(|header| header.snapshots > 0) {
            return Err(self.refuse(member, Code::HasInternalSnapshots, "a merge would drop its snapshots"));
        }
        if header.is_some_and(|header| header.bitmaps > 0) {
            return Err(self.refuse(member, Code::HasBitmaps, "a merge would drop its bitmaps"));
        }
        Ok(())
    }

    /// The stubs above the targets that nobody reads through. Each is looked into: a mark in its header alone
    /// would not be enough to leave a child behind.
    fn stubs(&self, targets: &[NodeId]) -> Result<BTreeSet<NodeId>> {
        let mut found = BTreeSet::new();
        let mut left: Vec<NodeId> = targets.to_vec();
        while let Some(id) = left.pop() {
            for child in self.scan.graph.children(id).iter().copied() {
                if !found.contains(&child) && self.scan.is_idle_stub(child) && self.is_empty(child)? {
                    found.insert(child);
                    left.push(child);
                }
            }
        }
        Ok(found)
    }

    fn is_empty(&self, id: NodeId) -> Result<bool> {
        let member = self.member(id)?;
        let store = self.stores.get(member.key.store)?;
        let file = store.backend().open(&member.key.path);
        let file = file.map_err(|source| crate::store::StoreError::backend(store, source))?;
        Ok(holds_nothing(&Image::open(file, &self.name(member))?)?)
    }

    /// A member that is read must not be written meanwhile.
    fn still(&self, id: NodeId) -> Result<()> {
        let member = self.member(id)?;
        if member.locks.writer {
            return Err(self.refuse(member, Code::Locked, "QEMU has it open for writing"));
        }
        Ok(())
    }

    /// Nobody writes it, and it is whole.
    pub(super) fn settled(&self, id: NodeId) -> Result<()> {
        self.still(id)?;
        let member = self.member(id)?;
        let Some(incoming) = &member.incoming else { return Ok(()) };
        let message = format!("still being made: {}", incoming.reason());
        Err(self.refuse(member, Code::Incoming, message))
    }

    /// CloudStack must have given the member up, by its rows or by the caller's word.
    fn given_up(&self, member: &Member) -> Result<()> {
        if !self.cloudstack(member)? || self.request.assume_deleted {
            return Ok(());
        }
        let Some(records) = self.request.records else {
            let message = "nothing shows that CloudStack gave it up: give --records, or say --assume-deleted";
            return Err(self.refuse(member, Code::NotDeletable, message));
        };
        match self.row(records, member)? {
            Some(row) if row.deletable() => Ok(()),
            Some(row) => {
                let message = format!("CloudStack's records show it as {}", row.ref_state.as_str());
                Err(self.refuse(member, Code::NotDeletable, message))
            }
            None => Err(self.refuse(member, Code::NotDeletable, "CloudStack's records have no row for it")),
        }
    }

    /// The row of a member's file.
    pub(super) fn row(&self, records: &'a Records, member: &Member) -> Result<Option<&'a Row>> {
        let url = self.stores.get(member.key.store)?.config().url.as_ref().map(ToString::to_string);
        Ok(records.lookup(member.key.path.as_str(), url.as_deref()))
    }

    /// A member that no survivor reads, so that its chain gets a new tip or ends.
    fn tip(&self, id: NodeId) -> Result<()> {
        let member = self.member(id)?;
        let volume = member.key.path.parent();
        let newer =
            self.scan.members.iter().find(|other| {
                other.incoming.is_some() && other.key.path.parent() == volume && !other.temporary
            });
        if let Some(newer) = newer {
            let message = format!("{} is still being made and may become its child", self.name(newer));
            return Err(self.refuse(member, Code::Incoming, message));
        }
        if self.cloudstack(member)?
            && !member.stub
            && !self.request.end_of_chain
            && !self.request.superseded.contains(&id)
        {
            let message = "the hypervisor names it as parent of its next increment: say --end-of-chain if the \
                           chain has been ended";
            return Err(self.refuse(member, Code::EndOfChain, message));
        }
        Ok(())
    }

    /// Refuses if somebody might be its child without its being known.
    fn hidden_children(&self, id: NodeId, member: &Member) -> Result<()> {
        let Some(other) = self.scan.graph.possible_children(id).next() else { return Ok(()) };
        let node = self.scan.graph.node(other);
        let (code, why) = match node.parent {
            Parent::Unreadable => (Code::BadHeader, "cannot be read"),
            _ => (Code::MissingParent, "has a backing name that leads nowhere but ends like its name"),
        };
        let message = format!("{} {why}, so it may be a child", self.stores.display(&node.key));
        Err(self.refuse(member, code, message))
    }
}

fn refused(code: Code, member: String, message: impl Into<String>) -> OpError {
    OpError::Refused { code, member, message: message.into() }
}
