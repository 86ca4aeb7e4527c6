//! What recovery did, as documents show it.

use serde::Serialize;
use utoipa::ToSchema;

use crate::change::Site;
use crate::change::record::{Place, TreeId};
use crate::change::recover::{Action, Recovered};
use crate::failure::{Code, Kind};
use crate::ops::document::{ErrorBody, time};
use crate::store::scan::Finding;

/// What `recover --json` shows.
#[derive(Debug, Serialize, ToSchema)]
pub struct RecoverReport {
    /// One for each operation that was open.
    pub recovered: Vec<RecoverEntry>,
    /// What somebody should look at.
    pub findings: Vec<Finding>,
    /// The tree that was thawed.
    pub thawed: Option<String>,
}

/// What became of one open operation.
#[derive(Debug, Serialize, ToSchema)]
pub struct RecoverEntry {
    /// The name of its record in `.qchain/intents`.
    pub intent: String,
    /// What was done with it, in a word.
    pub action: &'static str,
    /// Its id.
    pub operation: String,
    /// The store that has its records.
    pub store: String,
    /// The members that it is about.
    pub members: Vec<String>,
    /// Until when it waits, if it does.
    pub until: Option<String>,
    /// Why it did not come to its end.
    pub error: Option<ErrorBody>,
    /// Deleted members that stay, and why.
    pub kept: Vec<String>,
}

impl RecoverReport {
    /// Of all that was recovered; `more` are findings from elsewhere.
    #[must_use]
    pub fn of(site: &Site<'_>, all: &[Recovered], more: &[Finding], thawed: Option<&TreeId>) -> Self {
        Self {
            recovered: all.iter().map(|one| RecoverEntry::of(site, one)).collect(),
            findings: all.iter().flat_map(|one| findings(&one.action)).chain(more).cloned().collect(),
            thawed: thawed.map(ToString::to_string),
        }
    }
}

impl RecoverEntry {
    fn of(site: &Site<'_>, recovered: &Recovered) -> Self {
        let Recovered { name, home, members, action, kept } = recovered;
        Self {
            intent: name.path().file_name().to_owned(),
            action: action.word(),
            operation: name.operation.to_string(),
            store: store(site, *home),
            members: names(site, members),
            until: until(action),
            error: failure(action).map(|(_, error)| error),
            kept: kept.clone(),
        }
    }
}

/// The id of a store of the call.
#[must_use]
pub fn store(site: &Site<'_>, index: usize) -> String {
    site.stores.get(index).map_or_else(|_| String::new(), |store| store.id().to_string())
}

/// Members as they can be written on the command line; those of a store that is not at hand by its own id.
#[must_use]
pub fn names(site: &Site<'_>, places: &[Place]) -> Vec<String> {
    let name = |place: &Place| match site.key(place) {
        Ok(key) => site.stores.display(&key),
        Err(_) => format!("{}:{}", place.store, place.path),
    };
    places.iter().map(name).collect()
}

/// Why something did not come to its end; `None` if it did, or only waits for its time.
#[must_use]
pub fn failure(action: &Action) -> Option<(Kind, ErrorBody)> {
    let (kind, code, message) = match action {
        Action::TakenBack | Action::Finished | Action::Grace(_) | Action::Retention(_) => return None,
        Action::Busy => (Kind::Busy, Code::StoreBusy, "somebody else is at work on it".to_owned()),
        Action::Frozen(reason) => (Kind::Refused, Code::Frozen, reason.clone()),
        Action::Stuck(findings) => {
            let first = findings.first();
            let message = first.map_or_else(String::new, |one| format!("{}: {}", one.member, one.message));
            (Kind::Refused, first.map_or(Code::TrashChanged, |one| one.code), message)
        }
        Action::Failed { kind, code, message } => (*kind, *code, message.clone()),
    };
    Some((kind, ErrorBody::new(kind, code, message)))
}

/// Until when it waits.
#[must_use]
pub fn until(action: &Action) -> Option<String> {
    match action {
        Action::Grace(ns) | Action::Retention(ns) => Some(time(*ns)),
        _ => None,
    }
}

/// What somebody should look at.
#[must_use]
pub fn findings(action: &Action) -> &[Finding] {
    if let Action::Stuck(findings) = action { findings } else { &[] }
}
