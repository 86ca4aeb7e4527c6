//! Of many members that may go, those that can, and whose going gives space back.

use std::collections::{BTreeMap, BTreeSet};

use crate::chain::graph::NodeId;
use crate::failure::{Code, Failure};
use crate::ops::Result;
use crate::ops::delete::plan::{Plan, plan};
use crate::ops::delete::select::{Request, select};
use crate::store::Stores;
use crate::store::scan::{Finding, Scan};

/// The targets that can be merged away. What stands against one is told, and the rest of its tree goes on
/// without it.
pub fn selectable(
    stores: &Stores,
    scan: &Scan,
    request: &Request<'_>,
    findings: &mut Vec<Finding>,
) -> Vec<NodeId> {
    let mut trees: BTreeMap<usize, Vec<NodeId>> = BTreeMap::new();
    for target in &request.targets {
        trees.entry(scan.graph.tree_of(*target)).or_default().push(*target);
    }
    let name = |id: NodeId| stores.display(&scan.graph.node(id).key);
    let mut good = Vec::new();
    for mut targets in trees.into_values() {
        while !targets.is_empty() {
            let Err(error) = select(stores, scan, request, &targets) else { break };
            let about = error.member().unwrap_or_default().to_owned();
            findings.push(Finding { member: about.clone(), code: error.code(), message: error.to_string() });
            let before = targets.len();
            // It is about a target, or about one that a target would be merged into or stands on.
            let near = |id: &NodeId| {
                name(*id) == about || scan.graph.children(*id).iter().any(|child| name(*child) == about)
            };
            targets.retain(|id| !near(id));
            if targets.len() == before {
                targets.clear();
            }
        }
        good.extend(targets);
    }
    good
}

/// Plans what gives space back: a member that several survivors read may take more as their copies.
pub fn plan_worth(
    stores: &Stores,
    scan: &Scan,
    request: &mut Request<'_>,
    findings: &mut Vec<Finding>,
) -> Result<Plan> {
    loop {
        if request.targets.is_empty() {
            return Ok(Plan::default());
        }
        let planned = plan(stores, scan, request)?;
        let useless = without_gain(&planned);
        if useless.is_empty() {
            return Ok(planned);
        }
        for id in &useless {
            let member = stores.display(&scan.graph.node(*id).key);
            let message = "merging it into its children would take more space than it gives back".to_owned();
            findings.push(Finding { member, code: Code::NoGain, message });
        }
        request.targets.retain(|id| !useless.contains(id));
    }
}

/// The members that give nothing back, together with those that are merged with them.
fn without_gain(plan: &Plan) -> BTreeSet<NodeId> {
    let mut useless = BTreeSet::new();
    for tree in &plan.trees {
        // Entries that share a member hang together.
        let mut groups: Vec<(BTreeSet<NodeId>, u64, u64)> = Vec::new();
        for entry in &tree.entries {
            let members: BTreeSet<NodeId> = entry.members.iter().copied().collect();
            let mut joined = (members, entry.bytes_to_free, entry.bytes_to_take);
            let (touching, apart): (Vec<_>, Vec<_>) =
                groups.into_iter().partition(|group| !group.0.is_disjoint(&joined.0));
            for (members, freed, taken) in touching {
                joined.0.extend(members);
                joined.1 += freed;
                joined.2 += taken;
            }
            groups = apart;
            groups.push(joined);
        }
        useless
            .extend(groups.into_iter().filter(|(_, freed, taken)| freed <= taken).flat_map(|group| group.0));
    }
    useless
}
