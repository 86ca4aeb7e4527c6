//! The changes of rows that follow merges and removals.

use std::collections::BTreeSet;

use crate::chain::delete::Merge;
use crate::chain::graph::NodeId;
use crate::cloudstack::row_change::{Planned, RowChange, Set};
use crate::store::rows::RowMap;
use crate::store::scan::Scan;

/// What CloudStack's garbage collection takes away.
const DESTROYED: &str = "Destroyed";

/// What happens to one tree.
#[derive(Clone, Debug, Default)]
pub struct Happening<'a> {
    /// Merges, with the length of each survivor's new file in bytes.
    pub merges: Vec<(&'a Merge, u64)>,
    /// Members that go without being merged into anybody.
    pub removed: Vec<NodeId>,
}

/// The changes that follow what happens to one tree. Survivors get their new parents, and so do members that stand
/// alone already and whose rows name one that goes; then deleted members get their state: a row that is read in
/// between has a parent that is there.
#[must_use]
pub fn row_changes(scan: &Scan, map: &RowMap<'_>, happening: &Happening<'_>) -> Vec<RowChange> {
    let planned = |id: NodeId| map.row(&scan.graph.node(id).key).and_then(Planned::of);
    let mut changes = Vec::new();
    let mut gone: BTreeSet<NodeId> = happening.removed.iter().copied().collect();
    for (merge, physical_bytes) in &happening.merges {
        let parent_snapshot_id = merge
            .new_parent
            .and_then(|parent| map.row(&scan.graph.node(parent).key))
            .map(|row| row.snapshot_id);
        if let Some(planned) = planned(merge.survivor) {
            let physical_bytes = *physical_bytes;
            changes.push(RowChange { planned, set: Set::Parent { parent_snapshot_id, physical_bytes } });
        }
        if !merge.merged_stay {
            gone.extend(&merge.merged);
        }
    }
    changes.extend(gone.iter().flat_map(|id| freed(scan, map, *id)));
    let state = |planned| RowChange { planned, set: Set::State(DESTROYED.to_owned()) };
    changes.extend(gone.into_iter().filter_map(planned).map(state));
    changes
}

/// Of the members that stand on a deleted one by their rows those that are full bases.
fn freed(scan: &Scan, map: &RowMap<'_>, gone: NodeId) -> Vec<RowChange> {
    let Some(row) = map.row(&scan.graph.node(gone).key) else { return Vec::new() };
    let change = |row| {
        let id = scan.graph.find(map.place(row)?).filter(|id| scan.stands_alone(*id))?;
        let set = Set::Parent { parent_snapshot_id: None, physical_bytes: scan.member(id)?.stat.length };
        Some(RowChange { planned: Planned::of(row)?, set })
    };
    map.children(row.snapshot_id).filter_map(change).collect()
}
