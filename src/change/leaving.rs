//! Members that were deleted and have their names still.

use std::collections::{BTreeMap, BTreeSet};

use crate::chain::graph::NodeId;
use crate::change::decided::Decided;
use crate::change::error::Result;
use crate::change::journal::{Found, Journal};
use crate::change::site::Site;
use crate::store::scan::Scan;

/// Members of a scan that were deleted and have their names still.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remaining {
    /// They wait for the end of their grace. Nobody but others of them reads through one.
    pub leaving: BTreeSet<NodeId>,
    /// They got a reader, which is given, and so are members like any other.
    pub kept: BTreeMap<NodeId, NodeId>,
}

/// The members of a scan that wait for the end of their grace.
pub fn leaving(site: &Site<'_>, scan: &Scan) -> Result<BTreeSet<NodeId>> {
    Ok(remaining(site, scan)?.leaving)
}

/// All deleted members of a scan that have their names. Reads records, needs no right to change anything.
pub fn remaining(site: &Site<'_>, scan: &Scan) -> Result<Remaining> {
    let mut found = Remaining::default();
    for (home, store) in site.stores.iter() {
        let journal = Journal::new(store.backend());
        for name in journal.intents()? {
            let Found::Record(claim) = journal.claim(&name.tree, name.generation)? else { continue };
            let Some(decided) = Decided::new(site, home, name, claim, None) else { continue };
            // What was taken back is as if it had not been deleted, although its records wait for their time.
            if decided.commit.departures.is_empty() || decided.is_undone()? {
                continue;
            }
            for departure in &decided.commit.departures {
                let Some(id) = scan.graph.find(&site.key(&departure.at)?) else { continue };
                if scan.member(id).is_some_and(|member| departure.is(&member.stat)) {
                    found.leaving.insert(id);
                }
            }
        }
    }
    loop {
        let reader =
            |id: &NodeId| scan.graph.children(*id).iter().find(|child| !found.leaving.contains(child));
        let Some((kept, reader)) = found.leaving.iter().find_map(|id| Some((*id, *reader(id)?))) else {
            return Ok(found);
        };
        found.leaving.remove(&kept);
        found.kept.insert(kept, reader);
    }
}
