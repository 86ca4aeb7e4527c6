//! What the records of changes say of members: which are leaving, which were kept, which trees are frozen.
//!
//! `list` needs no rights and no records. What cannot be read here is as if it were not there.

use std::collections::{BTreeMap, BTreeSet};

use crate::chain::graph::NodeId;
use crate::change::journal::Journal;
use crate::change::leaving::{Remaining, remaining};
use crate::change::record::{Freeze, TreeId};
use crate::change::{Site, SystemClock, tree};
use crate::failure::{Code, Failure};
use crate::progress::Cancel;
use crate::store::Stores;
use crate::store::scan::{Finding, Scan};

/// What the records say.
pub(super) struct Records {
    /// Members that were deleted and wait for the end of their grace.
    pub(super) leaving: BTreeSet<NodeId>,
    /// What is worth telling.
    pub(super) findings: Vec<Finding>,
}

/// Reads them, as far as they can be read.
pub(super) fn read(stores: &Stores, scan: &Scan, cancel: &Cancel) -> Records {
    let site = Site::new(stores, &SystemClock, cancel, std::time::Duration::ZERO);
    let Remaining { leaving, kept } = remaining(&site, scan).unwrap_or_else(|error| {
        tracing::debug!("which members are leaving is not known: {error} [{}]", error.code());
        Remaining::default()
    });
    let name = |id: NodeId| stores.display(&scan.graph.node(id).key);
    let mut findings: Vec<Finding> = kept
        .iter()
        .map(|(id, reader)| {
            let message = format!("it was deleted, and {} reads through it now", name(*reader));
            Finding { member: name(*id), code: Code::Kept, message }
        })
        .collect();
    findings.extend(frozen(stores, scan));
    Records { leaving, findings }
}

/// A finding for each frozen tree, at its lowest member.
fn frozen(stores: &Stores, scan: &Scan) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (home, store) in stores.iter() {
        let journal = Journal::new(store.backend());
        let mut frozen: BTreeMap<TreeId, Freeze> = BTreeMap::new();
        for tree in journal.trees().unwrap_or_default() {
            if let Ok(Some(freeze)) = journal.frozen(&tree) {
                frozen.insert(tree, freeze);
            }
        }
        // The usual case: not a single manifest needs to be read.
        if frozen.is_empty() {
            continue;
        }
        let roots = scan.graph.trees().iter().filter_map(|tree| tree.members.first());
        for key in roots.map(|id| &scan.graph.node(*id).key).filter(|key| key.store == home) {
            if let Ok(Some(tree)) = tree::find(store.backend(), &key.path)
                && let Some(freeze) = frozen.remove(&tree)
            {
                findings.push(finding(stores.display(key), &freeze));
            }
        }
        // Its lowest member is gone or another one by now.
        findings.extend(frozen.values().map(|freeze| finding(store.id().to_string(), freeze)));
    }
    findings
}

fn finding(member: String, freeze: &Freeze) -> Finding {
    let Freeze { operation, reason, .. } = freeze;
    let message = format!("its tree is frozen: {reason} (qchain recover --thaw {operation})");
    Finding { member, code: Code::Frozen, message }
}
