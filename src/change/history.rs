//! What was done, and what can still be taken back.

use crate::change::decided::Decided;
use crate::change::error::Result;
use crate::change::journal::{Found, Journal};
use crate::change::places::IntentName;
use crate::change::purge::held_bytes;
use crate::change::record::{Claim, Commit, Decision, OperationId, Place, Purpose, TreeId};
use crate::change::site::Site;

/// One decided operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// Its id.
    pub operation: OperationId,
    /// The tree.
    pub tree: TreeId,
    /// Its number in the tree.
    pub generation: u64,
    /// The store that has its records.
    pub home: usize,
    /// When it was decided, nanoseconds since 1970.
    pub time_ns: i64,
    /// The operation that it takes back, if it does.
    pub undoes: Option<OperationId>,
    /// The members deleted, or brought back.
    pub members: Vec<Place>,
    /// The survivors that got new files.
    pub survivors: Vec<Place>,
    /// Until when it can be undone, nanoseconds since 1970; `None` if it cannot.
    pub undo_until: Option<i64>,
    /// Bytes kept for that.
    pub held_bytes: u64,
    /// Whether it is over: nothing of it is kept or left to be done.
    pub ended: bool,
    /// It was taken back.
    pub undone: bool,
    /// It gave damaged members what they had lost.
    pub repairs: bool,
}

/// All decided operations on all stores, oldest first.
pub fn history(site: &Site<'_>) -> Result<Vec<Done>> {
    let mut all = Vec::new();
    for (home, store) in site.stores.iter() {
        let journal = Journal::new(store.backend());
        let open = journal.intents()?;
        for tree in journal.trees()? {
            for number in journal.generations(&tree)? {
                if let Found::Record(claim) = journal.claim(&tree, number)?
                    && let Decision::Commit(commit) = &claim.decision
                {
                    let name = IntentName {
                        tree: tree.clone(),
                        generation: number,
                        operation: claim.operation.clone(),
                    };
                    let ended = !open.contains(&name);
                    all.push(done(site, home, &name, &claim, commit, ended)?);
                }
            }
        }
    }
    all.sort_by(|a, b| (a.time_ns, &a.operation).cmp(&(b.time_ns, &b.operation)));
    Ok(all)
}

fn done(
    site: &Site<'_>,
    home: usize,
    name: &IntentName,
    claim: &Claim,
    commit: &Commit,
    ended: bool,
) -> Result<Done> {
    let restored = commit.restores.iter().map(|restore| &restore.at);
    let deleted = commit.departures.iter().map(|departure| &departure.at);
    let members = match &commit.purpose {
        Purpose::Delete => deleted.cloned().collect(),
        Purpose::Undo { .. } => restored.cloned().collect(),
    };
    let survivors = commit.publications.iter().map(|publication| publication.at.clone()).collect();
    let undoes = match &commit.purpose {
        Purpose::Undo { operation, .. } => Some(operation.clone()),
        Purpose::Delete => None,
    };
    let held_bytes = if ended { 0 } else { held_bytes(site, &name.operation)? };
    let (undo_until, undone) = match Decided::new(site, home, name.clone(), claim.clone(), None) {
        Some(decided) => {
            let undone = decided.is_undone()?;
            (decided.undo_until().filter(|_| !ended && !undone), undone)
        }
        None => (None, false),
    };
    Ok(Done {
        operation: name.operation.clone(),
        tree: name.tree.clone(),
        generation: name.generation,
        home,
        time_ns: claim.decided_ns,
        undoes,
        members,
        survivors,
        repairs: commit.repairs,
        undo_until,
        held_bytes,
        ended,
        undone,
    })
}

impl Done {
    /// Its intent's name.
    #[must_use]
    pub fn name(&self) -> IntentName {
        IntentName { tree: self.tree.clone(), generation: self.generation, operation: self.operation.clone() }
    }
}
