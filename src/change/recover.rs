//! Finishing or taking back what was interrupted, and moving on what has waited long enough.
//!
//! Every changing verb begins with this. It looks at what lies on the stores and at nothing else, so it can be
//! cut off anywhere and done again, by any instance.

use crate::change::decided::Decided;
use crate::change::departure::{Departed, depart};
use crate::change::error::{ChangeError, Result};
use crate::change::journal::{Found, Journal};
use crate::change::lease::Lease;
use crate::change::operation::take_back;
use crate::change::places::IntentName;
use crate::change::publication::Published;
use crate::change::purge::purge;
use crate::change::record::{Decision, Freeze, Place, SCHEMA};
use crate::change::site::Site;
use crate::change::witness::{Verdict, Witness};
use crate::change::{in_place, sweep, undo};
use crate::failure::{Code, Failure, Kind};
use crate::store::scan::Finding;

/// What became of an interrupted or waiting operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing was decided: it was taken back.
    TakenBack,
    /// It was decided: what was left was done. Deleted members are gone, and so are the files kept.
    Finished,
    /// Its names are published; deleted members have theirs until then, nanoseconds since 1970.
    Grace(i64),
    /// Deleted members are gone; old files are kept until then, nanoseconds since 1970.
    Retention(i64),
    /// Somebody else is at work on it.
    Busy,
    /// Its tree is frozen; nothing was done.
    Frozen(String),
    /// Something stands against its end, which a person should look at.
    Stuck(Vec<Finding>),
    /// It failed.
    Failed {
        /// What kind of failure it was.
        kind: Kind,
        /// Why, as a code.
        code: Code,
        /// Why, in words.
        message: String,
    },
}

impl Action {
    /// The word in reports.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::TakenBack => "taken-back",
            Self::Finished => "finished",
            Self::Grace(_) => "grace",
            Self::Retention(_) => "retention",
            Self::Busy => "busy",
            Self::Frozen(_) => "frozen",
            Self::Stuck(_) => "stuck",
            Self::Failed { .. } => "failed",
        }
    }
}

/// One operation that was found unfinished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Its intent.
    pub name: IntentName,
    /// The store that has its records.
    pub home: usize,
    /// What was asked away, as far as that is known.
    pub members: Vec<Place>,
    /// What became of it.
    pub action: Action,
    /// Why deleted members stay, if some do.
    pub kept: Vec<String>,
}

/// How far recovery goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Ends what is kept although its time has not come.
    pub purge_all: bool,
}

/// Recovers all operations on all stores. One that fails stops no other. Who calls it has swept ([`sweep::strays`]); it is done
/// again if there was anything to recover.
pub fn recover(site: &Site<'_>, extent: Extent, witness: Witness) -> Result<Vec<Recovered>> {
    let mut recovered = Vec::new();
    // What this process began before is recovered as anybody's.
    site.begun().clear();
    for (home, store) in site.stores.iter() {
        let journal = Journal::new(store.backend());
        for name in journal.intents()? {
            let members = journal.intent(&name)?.map(|intent| intent.members).unwrap_or_default();
            let mut kept = Vec::new();
            let done = one(site, home, &journal, &name, extent, witness, &mut kept);
            if done.as_ref().is_ok_and(|action| *action != Action::Busy) {
                site.settle(&name.operation);
            }
            let action = done.unwrap_or_else(|error| failed(&error));
            recovered.push(Recovered { name, home, members, action, kept });
        }
    }
    if !recovered.is_empty() {
        sweep::strays(site)?;
    }
    Ok(recovered)
}

fn failed(error: &ChangeError) -> Action {
    match error {
        ChangeError::Busy { .. } => Action::Busy,
        error => {
            let message = crate::failure::with_causes(error);
            Action::Failed { kind: error.kind(), code: error.code(), message }
        }
    }
}

fn one(
    site: &Site<'_>,
    home: usize,
    journal: &Journal,
    name: &IntentName,
    extent: Extent,
    witness: Witness,
    kept: &mut Vec<String>,
) -> Result<Action> {
    if let Some(freeze) = journal.frozen(&name.tree)? {
        return Ok(Action::Frozen(freeze.reason));
    }
    let lease = Lease::take(site, home, &name.tree)?;
    // Its maker may have ended it just now.
    if !journal.intents()?.contains(name) {
        return Ok(Action::Finished);
    }
    let claim = match journal.claim(&name.tree, name.generation)? {
        Found::Nothing | Found::Torn(_) => {
            return match take_back(site, home, name) {
                Ok(()) => Ok(Action::TakenBack),
                // Decided at the last moment.
                Err(ChangeError::Decided { .. }) => Ok(Action::Busy),
                Err(error) => Err(error),
            };
        }
        Found::Record(claim) => claim,
    };
    if claim.operation != name.operation || claim.decision == Decision::Abort {
        take_back(site, home, name)?;
        return Ok(Action::TakenBack);
    }
    let Some(decided) = Decided::new(site, home, name.clone(), claim, Some(lease)) else {
        return Ok(Action::TakenBack);
    };
    if decided.is_undone()? {
        // It ends with the operation that took it back.
        return undone(site, journal, &decided);
    }
    in_place::take_over(site, &decided)?;
    let published = decided.publish()?;
    carry_on(site, &decided, &published, extent, witness, kept)
}

/// An operation that was taken back: its undo ends it, unless that has ended already.
fn undone(site: &Site<'_>, journal: &Journal, decided: &Decided<'_>) -> Result<Action> {
    let name = decided.name();
    let open = journal.intents()?;
    if journal.is_followed(&name.tree, name.generation, |undo, later| {
        later.undoes(name.generation) && open.contains(undo)
    })? {
        return Ok(Action::Grace(decided.grace_until()));
    }
    sweep::end(site, journal, name)?;
    Ok(Action::Finished)
}

/// What follows the publication, as far as it is due: deleted members go, old files are looked at by the
/// witness and go.
pub fn carry_on(
    site: &Site<'_>,
    decided: &Decided<'_>,
    published: &[Published],
    extent: Extent,
    witness: Witness,
    kept: &mut Vec<String>,
) -> Result<Action> {
    let departed = depart(site, &[(decided, published)])?.pop().unwrap_or_default();
    finish(site, decided, published, &departed, extent, witness, kept)
}

/// The end, once what became of the deleted members is known.
pub fn finish(
    site: &Site<'_>,
    decided: &Decided<'_>,
    published: &[Published],
    departed: &[Departed],
    extent: Extent,
    witness: Witness,
    kept: &mut Vec<String>,
) -> Result<Action> {
    for one in departed {
        if let Departed::Kept { reason, .. } = one {
            kept.push(reason.clone());
        }
    }
    let waits = departed.iter().filter_map(|one| match one {
        Departed::Waits(until) => Some(*until),
        Departed::Gone | Departed::Kept { .. } => None,
    });
    if let Some(until) = waits.max() {
        return Ok(Action::Grace(until));
    }
    let due = decided.grace_until().saturating_add(decided.commit().retention_ns);
    if site.clock.wall_ns() < due && !extent.purge_all {
        return Ok(Action::Retention(due));
    }
    if let Verdict::Differs(reason) = witness.compare(site, decided, published)? {
        return freeze(site, decided, &reason);
    }
    let findings = purge(site, decided, departed)?;
    if !findings.is_empty() {
        return Ok(Action::Stuck(findings));
    }
    if decided.journal()?.intents()?.contains(decided.name()) {
        return Ok(Action::Retention(due));
    }
    Ok(Action::Finished)
}

/// The witness found a difference: the old files come back, and nothing more is done to the tree.
fn freeze(site: &Site<'_>, decided: &Decided<'_>, reason: &str) -> Result<Action> {
    let journal = decided.journal()?;
    let back = undo::undo_held(site, decided).and_then(|undo| undo.publish().map(drop));
    let reason = match back {
        Ok(()) => format!("{reason}; the old files were put back"),
        Err(error) => format!("{reason}; the old files could not be put back: {error}"),
    };
    let freeze = Freeze {
        schema: SCHEMA,
        operation: decided.id().clone(),
        time_ns: site.clock.wall_ns(),
        reason: reason.clone(),
    };
    journal.freeze(&decided.name().tree, &freeze)?;
    Ok(Action::Frozen(reason))
}
