//! What merging given-up members away would free: their files and the old survivors', less the new files.
//!
//! The new files are laid out for it, which reads the tables of the members concerned, no data.

use std::collections::BTreeSet;

use rayon::prelude::*;

use crate::chain::delete::{Merge, group};
use crate::chain::graph::{NodeId, Tree};
use crate::cloudstack::records::{Records, Row};
use crate::ops::Result;
use crate::progress::{Cancel, Progress};
use crate::store::Stores;
use crate::store::merge::MergeInput;
use crate::store::scan::Scan;

/// What is known of one tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Bytes that given-up members take.
    pub pinned_bytes: u64,
    /// Bytes that a merge gives back; `None` where a member cannot be merged.
    pub frees_bytes: Option<u64>,
}

/// Estimates each of some trees.
pub fn estimate(
    stores: &Stores,
    scan: &Scan,
    records: &Records,
    trees: &[Option<&Tree>],
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Vec<Freed>> {
    progress.phase("estimating merges", trees.len() as u64);
    let of_tree = |tree: Option<&Tree>| {
        cancel.check()?;
        let freed = tree.map_or_else(Freed::default, |tree| of_tree(stores, scan, records, tree));
        progress.advance(1);
        Ok(freed)
    };
    trees.par_iter().copied().map(of_tree).collect()
}

fn of_tree(stores: &Stores, scan: &Scan, records: &Records, tree: &Tree) -> Freed {
    let given_up = |id: &&NodeId| {
        let member = scan.member(**id);
        member.is_some_and(|member| super::row_of(stores, records, member).is_some_and(Row::deletable))
    };
    let pinned: Vec<NodeId> = tree.members.iter().filter(given_up).copied().collect();
    let pinned_bytes = pinned.iter().map(|id| scan.allocated_bytes(*id)).sum();
    let settled = |id: &NodeId| scan.member(*id).is_some_and(|member| member.incoming.is_none());
    // A member above which nobody is stays: the hypervisor names it as parent of its next increment.
    let delete: BTreeSet<NodeId> =
        pinned.into_iter().filter(|id| settled(id) && !scan.graph.is_tip(*id)).collect();
    Freed { pinned_bytes, frees_bytes: freed_by(stores, scan, &delete) }
}

fn freed_by(stores: &Stores, scan: &Scan, delete: &BTreeSet<NodeId>) -> Option<u64> {
    let groups = group(&scan.graph, delete).ok()?;
    let mut before: u64 = groups.departures.iter().map(|gone| scan.allocated_bytes(gone.member)).sum();
    let mut after = 0_u64;
    for merge in &groups.merges {
        before += scan.allocated_bytes(merge.survivor);
        match new_bytes(stores, scan, merge) {
            Ok(bytes) => after = after.saturating_add(bytes),
            Err(error) => {
                tracing::debug!("no estimate for a merge: {error}");
                return None;
            }
        }
    }
    Some(before.saturating_sub(after))
}

/// What the new file of a survivor will take.
fn new_bytes(stores: &Stores, scan: &Scan, merge: &Merge) -> Result<u64> {
    let input = MergeInput::open(stores, scan, merge)?;
    Ok(input.cost(&input.layout()?, &[]).file_bytes())
}
