//! Members that were deleted and have their names still.

use std::collections::BTreeSet;

use crate::chain::graph::NodeId;
use crate::change::error::Result;
use crate::change::journal::{Found, Journal};
use crate::change::record::{Claim, Decision};
use crate::change::site::Site;
use crate::store::scan::Scan;

/// The members of a scan that wait for the end of their grace. Nobody but others of them reads through one:
/// a deleted member that got a reader is a member like any other.
pub fn leaving(site: &Site<'_>, scan: &Scan) -> Result<BTreeSet<NodeId>> {
    let mut leaving = BTreeSet::new();
    for (_, store) in site.stores.iter() {
        let journal = Journal::new(store.backend());
        for name in journal.intents()? {
            let Found::Record(Claim { decision: Decision::Commit(commit), .. }) =
                journal.claim(&name.tree, name.generation)?
            else {
                continue;
            };
            for departure in &commit.departures {
                let Some(id) = scan.graph.find(&site.key(&departure.at)?) else { continue };
                if scan.member(id).is_some_and(|member| departure.is(&member.stat)) {
                    leaving.insert(id);
                }
            }
        }
    }
    loop {
        let read = |id: &&NodeId| scan.graph.children(**id).iter().any(|child| !leaving.contains(child));
        let Some(kept) = leaving.iter().find(read).copied() else { return Ok(leaving) };
        leaving.remove(&kept);
    }
}
