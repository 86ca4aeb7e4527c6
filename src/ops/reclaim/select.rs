//! Which members can be reclaimed.

use std::collections::{BTreeMap, BTreeSet};

use crate::chain::graph::{Key, NodeId};
use crate::cloudstack::records::{RefState, Row};
use crate::cloudstack::row_change::Planned;
use crate::failure::Code;
use crate::ops::{OpError, Result};
use crate::store::Stores;
use crate::store::rows::RowMap;
use crate::store::scan::{Finding, Scan};

/// How far up a line of rows without files is followed: no chain is longer.
const MAX_DEPTH: usize = 100_000;

/// What to look at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Only these accounts' snapshots; empty: all.
    pub accounts: Vec<u64>,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Members that are Hidden, at full size, with living children, or with such by their rows that read them no more.
    pub targets: Vec<NodeId>,
    /// Those of the targets that are not the newest of their chains by their rows, whatever the files say.
    pub superseded: BTreeSet<NodeId>,
    /// Why others are not among them, and what is wrong with rows.
    pub findings: Vec<Finding>,
}

/// Finds the members that are Hidden and have living children, where rows and files tell the same story: or a story
/// of members that became full bases, and whose rows still name the parent that they had.
/// `leaving` are those that were deleted already and have their names still. `Destroyed` ones are CloudStack's to
/// remove; what is being copied, migrated or made is left alone.
#[must_use]
pub fn find(
    stores: &Stores,
    scan: &Scan,
    map: &RowMap<'_>,
    leaving: &BTreeSet<NodeId>,
    bounds: &Bounds,
) -> Found {
    let mut found = Found { findings: map.findings().to_vec(), ..Found::default() };
    let mut keys: Vec<&Key> = map.keys().collect();
    keys.sort();
    let moving = moving(stores, scan, map, &keys);
    for key in keys {
        let Some(row) = map.row(key).filter(|row| row.ref_state == RefState::Hidden) else { continue };
        if !bounds.accounts.is_empty() && !bounds.accounts.contains(&row.account_id) {
            continue;
        }
        let Some(id) = scan.graph.find(key) else {
            let message = format!("snapshot {} is Hidden and its file is gone", row.snapshot_id);
            found.findings.push(Finding { member: stores.display(key), code: Code::RowWithoutFile, message });
            continue;
        };
        if leaving.contains(&id) || scan.member(id).is_none_or(|member| member.stub) {
            continue;
        }
        let agree = match moving.get(&scan.graph.tree_of(id)) {
            Some(why) => Err((Code::RowsDisagree, why.clone())),
            None => children_agree(stores, scan, map, leaving, id, row),
        };
        match agree {
            Ok(true) => {
                found.targets.push(id);
                if map.children(row.snapshot_id).next().is_some() {
                    found.superseded.insert(id);
                }
            }
            // CloudStack removes it by itself.
            Ok(false) => {}
            Err((code, message)) => {
                found.findings.push(Finding { member: stores.display(key), code, message });
            }
        }
    }
    found
}

/// The trees of which CloudStack is making, copying, migrating or removing something, and what.
fn moving(stores: &Stores, scan: &Scan, map: &RowMap<'_>, keys: &[&Key]) -> BTreeMap<usize, String> {
    let mut trees = BTreeMap::new();
    for key in keys {
        let state = map.of(key).iter().find_map(|row| match &row.ref_state {
            RefState::Other(state) => Some(state),
            _ => None,
        });
        if let (Some(state), Some(id)) = (state, scan.graph.find(key)) {
            let why = format!("{} of the same chain is {state}", stores.display(key));
            trees.entry(scan.graph.tree_of(id)).or_insert(why);
        }
    }
    trees
}

/// Whether a member has children that stay, each of which its rows know, and none that only they know. A child by its
/// row that is a full base ([`Scan::stands_alone`]) reads nothing of it: with such alone nobody reads the member, and
/// yet CloudStack keeps it for them.
fn children_agree(
    stores: &Stores,
    scan: &Scan,
    map: &RowMap<'_>,
    leaving: &BTreeSet<NodeId>,
    id: NodeId,
    row: &Row,
) -> std::result::Result<bool, (Code, String)> {
    let children = scan.graph.children(id);
    let mut living = false;
    for child in children.iter().filter(|child| !scan.is_idle_stub(**child) && !leaving.contains(child)) {
        let key = &scan.graph.node(*child).key;
        let name = || stores.display(key);
        match map.row(key).map(|row| &row.ref_state) {
            Some(RefState::Ready | RefState::Hidden) => living = true,
            Some(RefState::Destroyed) => {
                return Err((Code::RowsDisagree, format!("its child {} is Destroyed", name())));
            }
            Some(RefState::Other(state)) => {
                return Err((Code::RowsDisagree, format!("its child {} is {state}", name())));
            }
            None => return Err((Code::RowsDisagree, format!("no row knows its child {}", name()))),
        }
    }
    // Rows may know a child that its file does not show: one in the making, or on a store that is not here.
    let mut left: Vec<u64> = vec![row.snapshot_id];
    for _ in 0..MAX_DEPTH {
        let Some(snapshot) = left.pop() else { return Ok(living) };
        for child in map.children(snapshot) {
            let place = map.place(child);
            match place.and_then(|key| scan.graph.find(key)) {
                // It was taken away before: its own children are children now.
                Some(known) if scan.is_idle_stub(known) => left.push(child.snapshot_id),
                Some(known) if children.contains(&known) => {}
                Some(known) if is_at_rest(child) && scan.stands_alone(known) => living = true,
                // It was merged away before, and its own children stand here now.
                None if place.is_some() && child.ref_state == RefState::Hidden => {
                    left.push(child.snapshot_id);
                }
                _ => {
                    let message = format!(
                        "by its row snapshot {} ({}) is its child, by its file it is not",
                        child.snapshot_id,
                        child.ref_state.as_str()
                    );
                    return Err((Code::RowsDisagree, message));
                }
            }
        }
    }
    Err((Code::RowsDisagree, "its rows go round in circles".to_owned()))
}

/// Whether nothing is done to a snapshot: it is not being made, moved or removed.
fn is_at_rest(row: &Row) -> bool {
    matches!(row.ref_state, RefState::Ready | RefState::Hidden)
}

/// Whether the rows around a tree's targets read as when they were planned with: the same rows, in the same
/// states, with the same parents and paths. `then` and `now` may know other rows besides.
pub fn still<'a>(
    snapshots: &[u64],
    then: impl Iterator<Item = &'a Row>,
    now: impl Iterator<Item = &'a Row>,
) -> Result<()> {
    let around = |row: &&Row| {
        let parent = row.parent_snapshot_id.is_some_and(|parent| snapshots.contains(&parent));
        (parent || snapshots.contains(&row.snapshot_id)) && row.ref_state != RefState::Destroyed
    };
    let planned = |row: &Row| {
        Planned::of(row).map(|planned| (planned.snapshot_id, planned.store_uuid.clone(), planned))
    };
    let sorted = |rows: Vec<(u64, String, Planned)>| {
        let mut rows = rows;
        rows.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        rows
    };
    let then = sorted(then.filter(around).filter_map(planned).collect());
    let now = sorted(now.filter(around).filter_map(planned).collect());
    if then == now {
        return Ok(());
    }
    let differs =
        then.iter().find(|row| !now.contains(row)).or_else(|| now.iter().find(|row| !then.contains(row)));
    let snapshot = differs.map_or(0, |(snapshot, ..)| *snapshot);
    Err(OpError::Refused {
        code: Code::RowsChanged,
        member: String::new(),
        message: format!("CloudStack changed the row of snapshot {snapshot} since the plan was made"),
    })
}
