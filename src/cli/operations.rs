//! Operations as `history`, `undo`, `purge` and `recover` show them.

use serde::Serialize;

use super::output::time;
use crate::change::Site;
use crate::change::history::Done;
use crate::change::recover::Action;
use crate::ops::recover::trash_bytes;
pub use crate::ops::recover::{failure, findings, names, store, until};

/// How much of an id is shown to people: enough to be unique, and taken by `undo`.
const SHORT: usize = 12;

/// One decided operation.
#[derive(Serialize)]
pub struct Row {
    pub operation: String,
    /// The first of the members; of the survivors where nobody was deleted.
    pub member: Option<String>,
    /// The members deleted, or brought back; lowest first.
    pub members: Vec<String>,
    /// The members that got new files, or their old ones again.
    pub survivors: Vec<String>,
    pub time: String,
    /// Null if it cannot be undone, or not any more.
    pub undo_until: Option<String>,
    pub bytes_held: u64,
    /// `delete`, `consolidate`, `repair` or `undo`.
    pub did: &'static str,
    /// The operation that it took back.
    pub undoes: Option<String>,
    pub undone: bool,
    /// Nothing of it is left to be done or kept.
    pub ended: bool,
    pub tree: String,
    /// The store that has its records.
    pub store: String,
}

impl Row {
    /// Of an operation.
    pub fn of(site: &Site<'_>, done: &Done) -> Self {
        let (members, survivors) = (names(site, &done.members), names(site, &done.survivors));
        Self {
            operation: done.operation.to_string(),
            member: members.first().or(survivors.first()).cloned(),
            members,
            survivors,
            time: time(done.time_ns),
            undo_until: done.undo_until.map(time),
            bytes_held: done.held_bytes,
            did: did(done),
            undoes: done.undoes.as_ref().map(ToString::to_string),
            undone: done.undone,
            ended: done.ended,
            tree: done.tree.to_string(),
            store: store(site, done.home),
        }
    }

    /// The members deleted or brought back; where there are none, those that became bases, or were it.
    pub fn about(&self) -> &[String] {
        if self.members.is_empty() { &self.survivors } else { &self.members }
    }
}

/// What an operation did. Where a survivor got a new file and nobody went it became a base.
fn did(done: &Done) -> &'static str {
    match (&done.undoes, done.members.is_empty()) {
        (Some(_), _) => "undo",
        (None, true) if done.repairs => "repair",
        (None, true) => "consolidate",
        (None, false) => "delete",
    }
}

/// What old files take that are kept for an undo. Only for figures: 0 if that cannot be found out.
pub fn held_bytes(site: &Site<'_>) -> u64 {
    trash_bytes(site.stores).unwrap_or_default()
}

/// The first of several members, and how many more there are.
pub fn several(members: &[String]) -> String {
    match members {
        [] => "-".to_owned(),
        [one] => one.clone(),
        [first, rest @ ..] => format!("{first} and {} more", rest.len()),
    }
}

/// The beginning of an id.
pub fn short(operation: &str) -> &str {
    operation.get(..SHORT).unwrap_or(operation)
}

/// What became of it, for people.
pub fn said(action: &Action) -> String {
    match action {
        Action::TakenBack => "was never decided; taken back".to_owned(),
        Action::Finished => "finished; nothing of it is kept".to_owned(),
        Action::Grace(ns) => format!("deleted members keep their names for readers until {}", time(*ns)),
        Action::Retention(ns) => format!("old files are kept until {}", time(*ns)),
        Action::Busy | Action::Frozen(_) | Action::Stuck(_) | Action::Failed { .. } => {
            let failed = failure(action).map(|(_, error)| error.text()).unwrap_or_default();
            format!("{}: {failed}", action.word())
        }
    }
}
