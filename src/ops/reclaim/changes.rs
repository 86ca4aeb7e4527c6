//! The changes of rows that follow a merge.

use std::collections::BTreeSet;

use crate::chain::delete::Merge;
use crate::chain::graph::NodeId;
use crate::cloudstack::row_change::{Planned, RowChange, Set};
use crate::store::rows::RowMap;
use crate::store::scan::Scan;

/// What CloudStack's garbage collection takes away.
const DESTROYED: &str = "Destroyed";

/// The changes that follow the merges of one tree; `merges` come with the length of each survivor's new file in
/// bytes. Survivors get their new parents, then deleted members their state: a row that is read in between has
/// a parent that is there.
#[must_use]
pub fn row_changes<'a>(
    scan: &Scan,
    map: &RowMap<'_>,
    merges: impl Iterator<Item = (&'a Merge, u64)>,
) -> Vec<RowChange> {
    let planned = |id: NodeId| map.row(&scan.graph.node(id).key).and_then(Planned::of);
    let mut changes = Vec::new();
    let mut gone: BTreeSet<NodeId> = BTreeSet::new();
    for (merge, physical_bytes) in merges {
        let parent_snapshot_id = merge
            .new_parent
            .and_then(|parent| map.row(&scan.graph.node(parent).key))
            .map(|row| row.snapshot_id);
        if let Some(planned) = planned(merge.survivor) {
            changes.push(RowChange { planned, set: Set::Parent { parent_snapshot_id, physical_bytes } });
        }
        gone.extend(&merge.merged);
    }
    let state = |planned| RowChange { planned, set: Set::State(DESTROYED.to_owned()) };
    changes.extend(gone.into_iter().filter_map(planned).map(state));
    changes
}
