//! Rows and files kept in step: rows are looked at right before each decision, and changed right after the files.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

use super::super::error::Result;
use super::Rows;
use crate::chain::graph::NodeId;
use crate::change::pending_rows::{self, Fate};
use crate::change::record::OperationId;
use crate::change::{Operation, Site};
use crate::cloudstack::records::Records;
use crate::cloudstack::row_change::RowChange;
use crate::database::{Applied, Database, Source};
use crate::failure::{Code, Failure, with_causes};
use crate::ops::OpError;
use crate::ops::delete::{Gate, Plan, TreePlan};
use crate::ops::reclaim::{Happening, row_changes, still};
use crate::store::rows::RowMap;
use crate::store::scan::{Finding, Scan};

/// The changes of rows of one tree.
#[derive(Clone, Debug, Serialize)]
pub struct Made {
    /// The operation; empty before it is made.
    pub operation: String,
    /// `planned`, `printed`, `applied`, `pending` or `changed`.
    pub status: &'static str,
    /// Why they were not applied.
    pub note: Option<String>,
    /// The changes.
    pub changes: Vec<Shown>,
}

/// One change.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    #[serde(flatten)]
    change: RowChange,
    /// As SQL.
    pub statement: String,
}

/// Watches the merges of a plan.
pub struct Ledger<'a> {
    pub site: &'a Site<'a>,
    pub source: &'a Source,
    /// The rows that were planned with.
    pub records: &'a Records,
    pub map: &'a RowMap<'a>,
    pub scan: &'a Scan,
    pub plan: &'a Plan,
    pub rows: Rows,
    /// No tree is begun after that.
    pub deadline: Option<Instant>,
    /// What became of rows so far.
    pub made: Mutex<Vec<Made>>,
}

impl Ledger<'_> {
    /// What would be changed, if rows are to be.
    pub fn planned(&self) -> Vec<Made> {
        if self.rows == Rows::Untouched {
            return Vec::new();
        }
        let trees = self.plan.trees.iter().filter(|tree| tree.refusal.is_none());
        trees.map(|tree| entry("", "planned", None, &self.changes(tree))).collect()
    }

    /// What was.
    pub fn made(&self) -> Vec<Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn changes(&self, tree: &TreePlan) -> Vec<RowChange> {
        let merges = tree.entries.iter().filter_map(|entry| Some((entry.merge.as_ref()?, entry.file_length)));
        // Who goes beside the targets is a stub, whose row stays as it was.
        let removed =
            tree.entries.iter().filter(|entry| entry.into.is_none()).flat_map(|entry| &entry.members);
        let happening = Happening {
            merges: merges.collect(),
            removed: removed.copied().filter(|id| tree.targets.contains(id)).collect(),
        };
        row_changes(self.scan, self.map, &happening)
    }

    fn tree(&self, targets: &[NodeId]) -> Option<&TreePlan> {
        self.plan.trees.iter().find(|tree| tree.targets == targets)
    }

    /// The store that has the records of the targets' tree.
    fn home(&self, targets: &[NodeId]) -> usize {
        let tree = targets.first().and_then(|id| self.scan.graph.trees().get(self.scan.graph.tree_of(*id)));
        let root = tree.and_then(|tree| tree.members.first());
        root.map_or(0, |root| self.scan.graph.node(*root).key.store)
    }

    /// Takes the record of changes away that are not to be made; gives why, and what went wrong with that.
    fn dropped(&self, home: usize, operation: &OperationId, why: String) -> String {
        match pending_rows::settle(self.site, home, operation) {
            Ok(()) => why,
            Err(error) => format!("{why}; {}", with_causes(&error)),
        }
    }

    fn note(&self, made: Made) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push(made);
    }

    fn snapshots(&self, targets: &[NodeId]) -> Vec<u64> {
        let row = |id: &NodeId| self.map.row(&self.scan.graph.node(*id).key).map(|row| row.snapshot_id);
        targets.iter().filter_map(row).collect()
    }

    /// Makes the changes; a record of them stays until they are made, or turn out to be none of ours any more.
    fn apply(&self, operation: &OperationId, home: usize, changes: &[RowChange]) -> Made {
        let id = operation.as_str();
        let done = self.source.database().map(|database| database.apply(changes));
        match done {
            Some(Ok(Applied::Done)) => match pending_rows::settle(self.site, home, operation) {
                Ok(()) => entry(id, "applied", None, changes),
                Err(error) => entry(id, "applied", Some(with_causes(&error)), changes),
            },
            Some(Ok(Applied::Changed(why))) => {
                let why = self.dropped(home, operation, format!("{why}; no row was changed"));
                entry(id, "changed", Some(why), changes)
            }
            Some(Err(error)) => {
                let why = format!("{}; recover --database makes them", with_causes(&error));
                entry(id, "pending", Some(why), changes)
            }
            None => entry(id, "pending", None, changes),
        }
    }
}

fn entry(operation: &str, status: &'static str, note: Option<String>, changes: &[RowChange]) -> Made {
    let shown = |change: &RowChange| Shown { statement: change.statement(), change: change.clone() };
    Made { operation: operation.to_owned(), status, note, changes: changes.iter().map(shown).collect() }
}

/// An error of the call, for a tree.
fn refused(error: &impl Failure) -> OpError {
    OpError::Refused { code: error.code(), member: String::new(), message: with_causes(error) }
}

impl Gate for Ledger<'_> {
    fn begin(&self, _targets: &[NodeId]) -> crate::ops::Result<()> {
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let message = "--max-duration was over before it was begun".to_owned();
            return Err(OpError::Refused { code: Code::LeftForLater, member: String::new(), message });
        }
        Ok(())
    }

    fn pass(&self, operation: &Operation<'_>, targets: &[NodeId]) -> crate::ops::Result<()> {
        let snapshots = self.snapshots(targets);
        if let Some(now) = self.source.around(&snapshots).map_err(|error| refused(&error))? {
            still(&snapshots, self.records.rows().iter(), now.rows().iter())?;
        }
        if self.rows == Rows::Apply
            && let Some(tree) = self.tree(targets)
        {
            pending_rows::note(operation, self.changes(tree))?;
        }
        Ok(())
    }

    fn published(&self, operation: &OperationId, targets: &[NodeId], whole: bool) -> Option<String> {
        let changes = self.changes(self.tree(targets)?);
        let home = self.home(targets);
        let made = match self.rows {
            Rows::Untouched => return None,
            Rows::Print if whole => entry(operation.as_str(), "printed", None, &changes),
            Rows::Apply if whole => self.apply(operation, home, &changes),
            Rows::Print | Rows::Apply => {
                let why = "somebody else changed a survivor meanwhile; no row was changed".to_owned();
                let why = if self.rows == Rows::Apply { self.dropped(home, operation, why) } else { why };
                entry(operation.as_str(), "changed", Some(why), &changes)
            }
        };
        let note = made.note.clone();
        self.note(made);
        note
    }
}

/// Makes the changes of rows that earlier runs left, for operations that stand. Gives what cannot be made; without
/// a database all of them.
pub fn finish(site: &Site<'_>, database: Option<&Database>) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for (home, record) in pending_rows::pending(site).map_err(OpError::from)? {
        match pending_rows::fate(site, home, &record).map_err(OpError::from)? {
            Fate::Open => continue,
            Fate::TakenBack => {}
            Fate::Decided => {
                let member = record.operation.to_string();
                let Some(database) = database else {
                    let message = "its merge was made, its rows are not changed yet".to_owned();
                    findings.push(Finding { member, code: Code::RowsPending, message });
                    continue;
                };
                if let Applied::Changed(message) = database.apply(&record.changes)? {
                    findings.push(Finding { member, code: Code::RowsChanged, message });
                }
            }
        }
        pending_rows::settle(site, home, &record.operation).map_err(OpError::from)?;
    }
    Ok(findings)
}
