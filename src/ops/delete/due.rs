//! Which members the policy wants to be full bases.
//!
//! - A chain of more than `max_length` members is cut so that half as many, `max_length / 2` and at least one, stand
//!   from its new base to its newest member: the oldest of these becomes the base. So it takes as many increments
//!   again before the next cut. What is below is a chain of its own then; if that is too long still, a later run
//!   cuts it.
//! - A chain whose base is older than `max_base_age`, on which something younger stands, gets a new base: the oldest
//!   member younger than half of that age, or the newest member if none is. A chain of which all is old is left
//!   alone, as nobody builds on it any more.
//!
//! `max_pinned_bytes` is for `reclaim`, which gives bytes back; a new base takes some.

use std::collections::BTreeSet;

use crate::chain::graph::{NodeId, Tree};
use crate::ops::policy::{Policy, created_ns, is_snapshot};
use crate::store::Stores;
use crate::store::rows::RowMap;
use crate::store::scan::Scan;

/// What chains are held against.
pub struct Yardstick<'a> {
    /// All stores of the zone.
    pub stores: &'a Stores,
    /// Their members.
    pub scan: &'a Scan,
    /// CloudStack's rows: they know best how old a snapshot is.
    pub rows: Option<&'a RowMap<'a>>,
    /// Members that were deleted and have their names still.
    pub leaving: &'a BTreeSet<NodeId>,
    /// How chains should be.
    pub policy: Policy,
    /// The time, nanoseconds since 1970.
    pub now_ns: i128,
}

/// A member that should be a full base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// It.
    pub member: NodeId,
    /// Why, in words.
    pub why: String,
}

/// The members to be made bases, so that every chain that can be read obeys the policy from its new base up.
#[must_use]
pub fn due(yardstick: &Yardstick<'_>) -> Vec<Due> {
    let graph = &yardstick.scan.graph;
    let whole = |tree: &&Tree| tree.members.first().is_some_and(|base| graph.complete(*base).is_ok());
    graph.trees().iter().filter(whole).flat_map(|tree| yardstick.of_tree(tree)).collect()
}

impl Yardstick<'_> {
    fn of_tree(&self, tree: &Tree) -> Vec<Due> {
        let (graph, scan) = (&self.scan.graph, self.scan);
        let counts = |id: &NodeId| {
            let snapshot = scan.member(*id).is_some_and(|member| is_snapshot(self.stores, member));
            snapshot && !scan.is_idle_stub(*id) && !self.leaving.contains(id)
        };
        let mut tips: Vec<NodeId> = tree.members.iter().copied().filter(counts).collect();
        tips.retain(|id| !graph.children(*id).iter().any(counts));
        // A cut for the longest may do for others.
        tips.sort_by_key(|id| std::cmp::Reverse(graph.depth(*id)));
        let mut cuts: Vec<Due> = Vec::new();
        for tip in tips {
            let mut chain = graph.ancestors(tip).unwrap_or_default();
            chain.reverse();
            chain.push(tip);
            let cut = chain.iter().rposition(|id| cuts.iter().any(|cut| cut.member == *id));
            let chain = chain.split_off(cut.unwrap_or(0));
            cuts.extend(self.too_long(&chain).or_else(|| self.too_old(&chain)));
        }
        cuts
    }

    fn name(&self, id: NodeId) -> String {
        self.stores.display(&self.scan.graph.node(id).key)
    }

    /// The first from there up that can be a base.
    fn usable(&self, chain: &[NodeId], from: usize) -> Option<NodeId> {
        let usable = |id: &NodeId| {
            let member = self.scan.member(*id);
            !self.leaving.contains(id) && member.is_some_and(|member| !member.stub && !member.temporary)
        };
        chain.get(from.max(1)..)?.iter().copied().find(usable)
    }

    fn too_long(&self, chain: &[NodeId]) -> Option<Due> {
        let (length, most) = (chain.len(), self.policy.max_length);
        if most == 0 || length <= most {
            return None;
        }
        let stay = (most / 2).max(1);
        let member = self.usable(chain, length - stay)?;
        let base = self.name(*chain.first()?);
        Some(Due { member, why: format!("the chain of {base} has {length} members, more than {most}") })
    }

    fn too_old(&self, chain: &[NodeId]) -> Option<Due> {
        let limit = i128::try_from(self.policy.max_base_age.as_nanos()).unwrap_or(i128::MAX);
        let age = |id: &NodeId| {
            let row = self.rows.and_then(|rows| rows.row(&self.scan.graph.node(*id).key));
            self.scan.member(*id).map(|member| self.now_ns - created_ns(row, member))
        };
        let base = chain.first()?;
        let old = age(base)?;
        let younger = |than: i128| chain.iter().position(|id| age(id).is_some_and(|age| age <= than));
        if limit == 0 || old <= limit || chain.last().and_then(age)? > limit {
            return None;
        }
        let member = self.usable(chain, younger(limit / 2).unwrap_or(chain.len() - 1))?;
        let days = old / 86_400_000_000_000;
        Some(Due { member, why: format!("its base {} is {days} days old", self.name(*base)) })
    }
}
