//! `recover`, `history`, `undo`, `purge`: what was interrupted, what was done, taking it back, ending it.

mod report;
mod state;

use std::collections::BTreeMap;

use crate::change::history::{Done, history as read_history};
use crate::change::journal::Journal;
use crate::change::log::{self, Did, Found};
use crate::change::publication::{Published, stat};
use crate::change::purge::held_bytes;
use crate::change::record::{OperationId, Place, TreeId};
use crate::change::recover::{Action, Extent, Recovered, carry_on, recover as recover_all};
use crate::change::undo::undo as decide_undo;
use crate::change::witness::Witness;
use crate::change::{ChangeError, Guard, Site, sweep};
use crate::cloudstack::paths::snapshot_of;
use crate::failure::Code;
use crate::ops::{OpError, Result};

pub use report::{RecoverEntry, RecoverReport, failure, findings, names, store, until};
pub use state::{StoreState, state, trash_bytes};

/// How many operations an error names.
const MAX_CANDIDATES: usize = 10;

/// What every changing verb begins with: sweeps, takes the right to change the stores, and recovers what was
/// interrupted. What cannot be recovered stops nothing here: whoever meets it will.
pub fn begin(site: &Site<'_>, witness: Witness) -> Result<Guard> {
    site.stores.check_writable()?;
    sweep::strays(site)?;
    let guard = Guard::take(site.stores)?;
    recover_all(site, Extent::default(), witness)?;
    Ok(guard)
}

/// Finishes or takes back all that was interrupted, and moves on what is due.
pub fn recover(site: &Site<'_>, witness: Witness) -> Result<Vec<Recovered>> {
    site.stores.check_writable()?;
    sweep::strays(site)?;
    let _guard = Guard::take(site.stores)?;
    all(site, Extent::default(), witness)
}

/// One operation that `purge` looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Purged {
    /// What became of it.
    pub recovered: Recovered,
    /// It, as it was before; `None` if it had not been decided.
    pub done: Option<Done>,
    /// The bytes that it keeps still.
    pub held_bytes: u64,
}

impl Purged {
    /// The bytes given back, by the allocation of the files.
    #[must_use]
    pub fn freed_bytes(&self) -> u64 {
        self.done.as_ref().map_or(0, |done| done.held_bytes.saturating_sub(self.held_bytes))
    }
}

/// Ends what is due: deleted members go after their grace, old files after their retention; with `everything`
/// the retention is cut short, the grace, which readers need, is not.
pub fn purge(site: &Site<'_>, everything: bool, witness: Witness) -> Result<Vec<Purged>> {
    site.stores.check_writable()?;
    sweep::strays(site)?;
    let _guard = Guard::take(site.stores)?;
    let before = history(site)?.into_iter().map(|done| (done.operation.clone(), done));
    let mut before: BTreeMap<OperationId, Done> = before.collect();
    let recovered = all(site, Extent { purge_all: everything }, witness)?;
    sweep::manifests(site)?;
    recovered
        .into_iter()
        .map(|recovered| {
            let held_bytes = held_bytes(site, &recovered.name.operation)?;
            let done = before.remove(&recovered.name.operation);
            Ok(Purged { recovered, done, held_bytes })
        })
        .collect()
}

/// An operation that another one ended, as an undo ends what it takes back, was looked at before that.
fn all(site: &Site<'_>, extent: Extent, witness: Witness) -> Result<Vec<Recovered>> {
    let mut recovered = recover_all(site, extent, witness)?;
    for (home, store) in site.stores.iter() {
        let open = Journal::new(store.backend()).intents()?;
        for one in recovered.iter_mut().filter(|one| one.home == home && !open.contains(&one.name)) {
            if matches!(one.action, Action::Grace(_) | Action::Retention(_)) {
                one.action = Action::Finished;
            }
        }
    }
    Ok(recovered)
}

/// What was done, oldest first. Needs no right to change anything.
pub fn history(site: &Site<'_>) -> Result<Vec<Done>> {
    let mut all = read_history(site)?;
    for done in &mut all {
        // Departures are recorded children first.
        if done.undoes.is_none() {
            done.members.reverse();
        }
    }
    let members: BTreeMap<OperationId, Vec<Place>> =
        all.iter().map(|done| (done.operation.clone(), done.members.clone())).collect();
    for done in &mut all {
        // What an undo is about is what was deleted; its own record has just the names that were gone.
        match done.undoes.as_ref().and_then(|undone| members.get(undone)) {
            Some(deleted) => done.members.clone_from(deleted),
            None => done.members.retain(|place| snapshot_of(&place.path).is_none()),
        }
    }
    Ok(all)
}

/// An operation by its id, or by a beginning of it that no other has.
pub fn find(site: &Site<'_>, text: &str) -> Result<Done> {
    let fits = |done: &Done| !text.is_empty() && done.operation.as_str().starts_with(text);
    let mut fitting: Vec<Done> = history(site)?.into_iter().filter(fits).collect();
    if fitting.len() > 1 {
        let names: Vec<&str> =
            fitting.iter().map(|done| done.operation.as_str()).take(MAX_CANDIDATES).collect();
        let message = format!("is the beginning of several operations: {}", names.join(", "));
        return Err(OpError::Refused { code: Code::Ambiguous, member: text.to_owned(), message });
    }
    fitting.pop().ok_or_else(|| no_operation(text))
}

/// As [`find`], of an operation that is to be undone: what cannot be for certain is refused before anything
/// is done.
pub fn find_undoable(site: &Site<'_>, text: &str) -> Result<Done> {
    let done = find(site, text)?;
    let reason = match &done {
        Done { undoes: Some(_), .. } => "it is an undo itself",
        Done { undone: true, .. } => "it was undone already",
        Done { ended: true, .. } => "its old files are gone",
        _ => return Ok(done),
    };
    let (operation, reason) = (done.operation.to_string(), reason.to_owned());
    Err(ChangeError::NotUndoable { operation, reason }.into())
}

fn no_operation(text: &str) -> OpError {
    let message = "no operation has that id; qchain history lists them".to_owned();
    OpError::Refused { code: Code::NotFound, member: format!("{text:?}"), message }
}

/// What became of an undo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undone {
    /// What was taken back.
    pub done: Done,
    /// The undo, an operation of its own.
    pub operation: OperationId,
    /// How far that came.
    pub action: Action,
    /// Survivors that were left as they are because somebody else changed them at that moment: why.
    pub left: Vec<String>,
}

/// Takes an operation back, whole. `text` is its id, or the beginning of it.
pub fn undo(site: &Site<'_>, text: &str, witness: Witness) -> Result<Undone> {
    let _guard = begin(site, witness)?;
    let done = find(site, text)?;
    let undo = decide_undo(site, done.home, &done.name())?;
    let stopped = |error| OpError::after_decision(&error);
    let published = undo.publish().map_err(stopped)?;
    let mut gone = None;
    for member in &done.members {
        if stat(&site.at(member)?, &member.path)?.is_none() {
            gone = Some(member);
        }
    }
    let left = published.iter().filter_map(|one| match one {
        Published::TakenBack { reason, .. } => Some(reason.clone()),
        Published::Done => None,
    });
    let left = left.collect();
    let (mut kept, nobody) = (Vec::new(), Witness::None);
    let action = carry_on(site, &undo, &published, Extent::default(), nobody, &mut kept).map_err(stopped)?;
    if let Some(member) = gone {
        let reason = format!("the old file of {} is gone by now", site.at(member)?.name);
        return Err(stopped(ChangeError::NotUndoable { operation: done.operation.to_string(), reason }));
    }
    let members = done.members.iter().map(|place| place.path.to_string()).collect();
    let did = Did { members, mode: Some(done.operation.to_string()), ..Did::default() };
    // It was done all the same; the log is for people.
    let _ = site.log(undo.home(), undo.id(), "undo", vec![did]);
    Ok(Undone { done, operation: undo.id().clone(), action, left })
}

/// The logs of all stores, each line with whether it follows the one before.
pub fn logs(site: &Site<'_>) -> Result<Vec<(usize, Found)>> {
    let mut found = Vec::new();
    for (index, store) in site.stores.iter() {
        found.extend(log::read(store.backend())?.into_iter().map(|line| (index, line)));
    }
    Ok(found)
}

/// Lets a frozen tree be changed again; `text` is the operation that froze it, or the beginning of its id.
/// Gives its tree.
pub fn thaw(site: &Site<'_>, text: &str) -> Result<TreeId> {
    site.stores.check_writable()?;
    let _guard = Guard::take(site.stores)?;
    let done = find(site, text)?;
    let journal = Journal::new(site.stores.get(done.home)?.backend());
    if journal.thaw(&done.tree)? {
        return Ok(done.tree);
    }
    let (member, message) = (done.operation.to_string(), "its tree is not frozen".to_owned());
    Err(OpError::Refused { code: Code::NotFound, member, message })
}
