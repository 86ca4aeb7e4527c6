//! An operation that was decided: what it still has to do is worked out from what lies on the stores, so any
//! step can be done again, by anyone, after any crash.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::chain::proof::Proof;
use crate::change::checkpoint;
use crate::change::error::Result;
use crate::change::journal::Journal;
use crate::change::lease::Lease;
use crate::change::places::IntentName;
use crate::change::publication::{self, Published};
use crate::change::record::{Claim, Commit, Decision, OperationId, Place, Purpose};
use crate::change::site::Site;
use crate::qcow2::write::Written;
use crate::store::attest::Carried;

/// A decided operation, with its tree's lease while it is worked on.
pub struct Decided<'s> {
    pub(super) site: &'s Site<'s>,
    /// The store that has the records.
    pub(super) home: usize,
    pub(super) name: IntentName,
    pub(super) since_ns: i64,
    pub(super) commit: Commit,
    /// Kept for as long as it is worked on.
    lease: Option<Lease>,
    /// Whether its claim is known to be durable.
    lasts: AtomicBool,
    /// Whether this process has made the published names durable.
    synced: AtomicBool,
    grown: Mutex<Vec<Grown>>,
    /// What keeps QEMU's writers out of files that are merged into in place.
    locks: Mutex<Vec<Box<dyn Send + Sync>>>,
}

/// What a merge in place wrote and proved.
#[derive(Clone, Debug)]
pub struct Grown {
    /// The survivor.
    pub survivor: Place,
    /// What was written.
    pub written: Written,
    /// What was proved.
    pub proof: Proof,
    /// What was proved beside the plan, or why nothing was.
    pub carried: Carried,
}

impl<'s> Decided<'s> {
    /// From a claim; `None` if that is no commit.
    pub(super) fn new(
        site: &'s Site<'s>,
        home: usize,
        name: IntentName,
        claim: Claim,
        lease: Option<Lease>,
    ) -> Option<Self> {
        match claim.decision {
            Decision::Commit(commit) => Some(Self {
                site,
                home,
                name,
                since_ns: claim.decided_ns,
                commit,
                lease,
                lasts: AtomicBool::new(false),
                synced: AtomicBool::new(false),
                grown: Mutex::default(),
                locks: Mutex::default(),
            }),
            Decision::Abort => None,
        }
    }

    /// The store that has its records.
    #[must_use]
    pub fn home(&self) -> usize {
        self.home
    }

    /// Its claim was just made durable.
    pub(super) fn lasting(self) -> Self {
        self.lasts.store(true, Ordering::Relaxed);
        self
    }

    /// Whether its claim is known to be durable.
    pub(super) fn is_lasting(&self) -> bool {
        self.lasts.load(Ordering::Relaxed)
    }

    /// Makes its claim durable before anything is built on it: whoever claimed may have been stopped by a failing
    /// store, or died, before he could.
    pub(super) fn make_last(&self) -> Result<()> {
        if !self.is_lasting() {
            self.journal()?.confirm(&self.name.tree, self.name.generation)?;
            self.lasts.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether nobody has taken its tree's lease over.
    pub(super) fn is_held(&self) -> bool {
        self.lease.as_ref().is_none_or(Lease::is_held)
    }

    /// What this process wrote of merges in place so far.
    #[must_use]
    pub fn grown(&self) -> Vec<Grown> {
        self.grown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn note(&self, grown: Grown) {
        self.grown.lock().unwrap_or_else(PoisonError::into_inner).push(grown);
    }

    /// Takes a file's image locks over, until [`Decided::let_writers_in`] or its own end.
    pub(super) fn keep_writers_out(&self, lock: Box<dyn Send + Sync>) {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner).push(lock);
    }

    /// Gives the image locks back.
    pub(super) fn let_writers_in(&self) {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &OperationId {
        &self.name.operation
    }

    /// Its intent's name.
    #[must_use]
    pub fn name(&self) -> &IntentName {
        &self.name
    }

    /// What was decided.
    #[must_use]
    pub fn commit(&self) -> &Commit {
        &self.commit
    }

    pub(super) fn journal(&self) -> Result<Journal> {
        Ok(Journal::new(self.site.stores.get(self.home)?.backend()))
    }

    /// Lets names come back and publishes new files; checkpoint files follow. Gives what became of each
    /// publication. Idempotent. What it did is durable when it returns.
    ///
    /// # After a crash
    ///
    /// Each name stands for its whole old file or its whole new one; calling again does the rest.
    pub fn publish(&self) -> Result<Vec<Published>> {
        let published = publication::publish(self.site, self)?;
        checkpoint::follow_all(self.site, self, &published)?;
        Ok(published)
    }

    /// Makes the published names durable, once, before anything that they replace goes.
    pub(super) fn settle(&self) -> Result<()> {
        if !self.synced.load(Ordering::Relaxed) {
            publication::sync(self.site, self)?;
            self.synced.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether a later operation of the tree took this one back.
    pub fn is_undone(&self) -> Result<bool> {
        self.journal()?.is_undone(&self.name.tree, self.name.generation)
    }

    /// Whether a later operation of the tree gives a checkpoint file another parent.
    pub(super) fn is_overtaken(&self, checkpoint: &Place) -> Result<bool> {
        let edits =
            |_: &IntentName, later: &Commit| later.checkpoints.iter().any(|edit| edit.at == *checkpoint);
        self.journal()?.is_followed(&self.name.tree, self.name.generation, edits)
    }

    /// Whether a later operation of the tree, which is not over, deletes a member or gives it a new file.
    pub(super) fn is_built_on(&self, member: &Place) -> Result<bool> {
        let journal = self.journal()?;
        let open = journal.intents()?;
        let changes = |name: &IntentName, later: &Commit| {
            let published = later.publications.iter().map(|publication| &publication.at);
            let mut touched = published.chain(later.departures.iter().map(|departure| &departure.at));
            open.contains(name) && touched.any(|at| at == member)
        };
        journal.is_followed(&self.name.tree, self.name.generation, changes)
    }

    /// Until when deleted members keep their names, nanoseconds since 1970.
    #[must_use]
    pub fn grace_until(&self) -> i64 {
        self.since_ns.saturating_add(self.commit.grace_ns)
    }

    /// Until when it can be undone, nanoseconds since 1970; `None` if never.
    #[must_use]
    pub fn undo_until(&self) -> Option<i64> {
        let possible = self.commit.purpose == Purpose::Delete
            && self.commit.publications.iter().all(|publication| publication.in_place.is_none());
        possible.then(|| self.grace_until().saturating_add(self.commit.retention_ns))
    }
}
