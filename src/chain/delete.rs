//! Which merges and removals take a set of members away.
//!
//! A deleted member is merged into each survivor right above it (through other deleted members, if several
//! are adjacent), and one above which nobody survives is just removed. No member's name may go before all
//! survivors that read it are published without it, and never before a member that still names it. To make a member
//! a full base is the same merge, of all that is below it, without anybody going ([`fold`]).

use std::collections::{BTreeMap, BTreeSet};

use super::graph::{ChainError, Graph, Key, NodeId};
use crate::failure::{Code, Failure, Kind};

/// Members that are merged into one survivor, in one pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merge {
    /// The member that stays, and gets a new file.
    pub survivor: NodeId,
    /// The members between it and its new parent, the lowest first; never empty for a delete.
    pub merged: Vec<NodeId>,
    /// The nearest member below that stays; `None` if the survivor becomes a full base.
    pub new_parent: Option<NodeId>,
    /// What is merged stays, and somebody may put the survivor over it again: it must read the same then.
    pub merged_stay: bool,
}

/// A deleted member whose name goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Departure {
    /// The deleted member.
    pub member: NodeId,
    /// The survivors that must be published before, in the order of [`Groups::merges`]; none for a member
    /// that is merged into nobody.
    pub after: Vec<NodeId>,
}

/// All that a delete does, in an order that depends on the graph only.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    /// One for each survivor whose parent is deleted, tree by tree, lower survivors first.
    pub merges: Vec<Merge>,
    /// The deleted members that nobody who stays reads, tree by tree, children before parents.
    pub removals: Vec<NodeId>,
    /// Every deleted member once, tree by tree, children before parents: in this order no name goes
    /// that a file still on the store refers to.
    pub departures: Vec<Departure>,
}

/// Why a delete cannot be planned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeleteError {
    /// No such node in the graph: a fault of the caller.
    #[error("node {} is not in the graph", .0.0)]
    NoSuchNode(NodeId),
    /// A member to delete is on a cycle, or stands on one.
    #[error("refused to delete {member}: the backing names of its tree form a cycle")]
    Cycle {
        /// The member.
        member: Key,
    },
    /// A merge needs all of a chain, and a part is missing.
    #[error("refused to merge into {survivor}")]
    Incomplete {
        /// The survivor.
        survivor: Key,
        /// What is missing.
        #[source]
        source: Box<ChainError>,
    },
}

impl Failure for DeleteError {
    fn kind(&self) -> Kind {
        match self {
            Self::NoSuchNode(_) => Kind::NotFound,
            Self::Cycle { .. } | Self::Incomplete { .. } => Kind::Corrupt,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NoSuchNode(_) => Code::NotFound,
            Self::Cycle { .. } => Code::Cycle,
            Self::Incomplete { source, .. } => source.code(),
        }
    }

    fn member(&self) -> Option<&str> {
        match self {
            Self::NoSuchNode(_) => None,
            Self::Cycle { member: key } | Self::Incomplete { survivor: key, .. } => Some(key.path.as_str()),
        }
    }
}

/// Plans to take `delete` away.
///
/// The first error in the order of the graph refuses the whole plan; whoever wants the other trees done
/// plans tree by tree ([`Graph::tree_of`]). A tip above a broken chain can be removed, since nobody reads
/// it; a merge there is refused. Members whose parent is unknown are taken for nobody's children here:
/// the caller decides what that means for its store.
///
/// Time and memory are in the size of the trees concerned and of the answer, which lists a member once for
/// each survivor it is merged into.
pub fn group(graph: &Graph, delete: &BTreeSet<NodeId>) -> Result<Groups, DeleteError> {
    if let Some(foreign) = delete.iter().find(|id| !graph.contains(**id)) {
        return Err(DeleteError::NoSuchNode(*foreign));
    }
    let trees: BTreeSet<usize> = delete.iter().map(|id| graph.tree_of(*id)).collect();
    let mut groups = Groups::default();
    for tree in trees.iter().filter_map(|index| graph.trees().get(*index)) {
        if tree.cyclic
            && let Some(member) = tree.members.iter().find(|id| delete.contains(id))
        {
            return Err(DeleteError::Cycle { member: graph.node(*member).key.clone() });
        }
        let mut readers: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::new();
        for id in tree.members.iter().filter(|id| !delete.contains(id)) {
            let merge = merge_into(graph, delete, *id);
            if merge.merged.is_empty() {
                continue;
            }
            graph.complete(*id).map_err(|source| DeleteError::Incomplete {
                survivor: graph.node(*id).key.clone(),
                source: Box::new(source),
            })?;
            for merged in &merge.merged {
                readers.entry(*merged).or_default().push(*id);
            }
            groups.merges.push(merge);
        }
        // Members are listed parents first, so backwards is children first.
        for member in tree.members.iter().rev().copied().filter(|id| delete.contains(id)) {
            let after = readers.remove(&member).unwrap_or_default();
            if after.is_empty() {
                groups.removals.push(member);
            }
            groups.departures.push(Departure { member, after });
        }
    }
    Ok(groups)
}

/// Plans to make each of `members` a full base of its own: all that is below is merged into it, and nobody goes.
/// One that is a base already has nothing merged into it.
///
/// The result is in the order of the trees, parents before children; the first error refuses all. Time and memory are in
/// the sum of the members' depths.
pub fn fold(graph: &Graph, members: &BTreeSet<NodeId>) -> Result<Vec<Merge>, DeleteError> {
    if let Some(foreign) = members.iter().find(|id| !graph.contains(**id)) {
        return Err(DeleteError::NoSuchNode(*foreign));
    }
    let trees: BTreeSet<usize> = members.iter().map(|id| graph.tree_of(*id)).collect();
    let ordered = trees.iter().filter_map(|index| graph.trees().get(*index)).flat_map(|tree| &tree.members);
    let mut merges = Vec::new();
    for survivor in ordered.copied().filter(|id| members.contains(id)) {
        let key = || graph.node(survivor).key.clone();
        let Ok(mut below) = graph.ancestors(survivor) else {
            return Err(DeleteError::Cycle { member: key() });
        };
        graph
            .complete(survivor)
            .map_err(|source| DeleteError::Incomplete { survivor: key(), source: Box::new(source) })?;
        below.reverse();
        merges.push(Merge { survivor, merged: below, new_parent: None, merged_stay: true });
    }
    Ok(merges)
}

/// The deleted members right below a survivor, and what it stands on without them.
fn merge_into(graph: &Graph, delete: &BTreeSet<NodeId>, survivor: NodeId) -> Merge {
    let mut merged = Vec::new();
    let mut new_parent = graph.parent(survivor);
    while let Some(below) = new_parent.filter(|id| delete.contains(id)) {
        merged.push(below);
        new_parent = graph.parent(below);
    }
    merged.reverse();
    Merge { survivor, merged, new_parent, merged_stay: false }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::{DeleteError, Departure, Groups, Merge, fold, group};
    use crate::chain::graph::{Graph, Key, Node, NodeId, Parent};
    use crate::failure::{Code, Failure, Kind};
    use crate::ids::StorePath;

    /// A graph from parents; a member's name is its index.
    fn graph(parents: impl IntoIterator<Item = Parent>) -> Graph {
        let node = |(index, parent)| Node {
            key: Key { store: 0, path: StorePath::parse(&format!("m{index:05}")).unwrap() },
            parent,
        };
        Graph::new(parents.into_iter().enumerate().map(node).collect()).unwrap()
    }

    /// A tree from parent indices.
    fn tree(parents: &[Option<usize>]) -> Graph {
        graph(parents.iter().map(|parent| parent.map_or(Parent::None, |index| Parent::Node(NodeId(index)))))
    }

    fn ids(list: &[usize]) -> Vec<NodeId> {
        list.iter().copied().map(NodeId).collect()
    }

    fn delete(graph: &Graph, list: &[usize]) -> Result<Groups, DeleteError> {
        group(graph, &list.iter().copied().map(NodeId).collect())
    }

    fn merge(survivor: usize, merged: &[usize], new_parent: Option<usize>) -> Merge {
        let new_parent = new_parent.map(NodeId);
        Merge { survivor: NodeId(survivor), merged: ids(merged), new_parent, merged_stay: false }
    }

    fn departure(member: usize, after: &[usize]) -> Departure {
        Departure { member: NodeId(member), after: ids(after) }
    }

    #[test]
    fn base_middle_and_tip_of_one_chain() {
        // 0 <- 1 <- 2 <- 3 <- 4 <- 5
        let chain = tree(&[None, Some(0), Some(1), Some(2), Some(3), Some(4)]);
        let groups = delete(&chain, &[0, 2, 3, 5]).unwrap();
        assert_eq!(groups.merges, [merge(1, &[0], None), merge(4, &[2, 3], Some(1))]);
        assert_eq!(groups.removals, ids(&[5]));
        assert_eq!(
            groups.departures,
            [departure(5, &[]), departure(3, &[4]), departure(2, &[4]), departure(0, &[1])]
        );
    }

    #[test]
    fn several_children_each_get_it() {
        // 0 <- 1 <- {2, 3 <- 4}
        let forked = tree(&[None, Some(0), Some(1), Some(1), Some(3)]);
        let groups = delete(&forked, &[1, 3]).unwrap();
        assert_eq!(groups.merges, [merge(2, &[1], Some(0)), merge(4, &[1, 3], Some(0))]);
        assert_eq!(groups.departures, [departure(3, &[4]), departure(1, &[2, 4])]);
        assert!(groups.removals.is_empty());
    }

    #[test]
    fn a_whole_tree_and_nothing() {
        let forked = tree(&[None, Some(0), Some(0)]);
        let groups = delete(&forked, &[0, 1, 2]).unwrap();
        assert!(groups.merges.is_empty());
        assert_eq!(groups.removals, ids(&[2, 1, 0]));
        assert_eq!(delete(&forked, &[]).unwrap(), Groups::default());
    }

    #[test]
    fn members_are_made_bases_of_their_own() {
        // 0 <- 1 <- {2 <- 4, 3}
        let forked = tree(&[None, Some(0), Some(1), Some(1), Some(2)]);
        let merges = fold(&forked, &ids(&[4, 3, 0]).into_iter().collect()).unwrap();
        let whole = |survivor, below: &[usize]| Merge { merged_stay: true, ..merge(survivor, below, None) };
        assert_eq!(merges, [whole(0, &[]), whole(4, &[0, 1, 2]), whole(3, &[0, 1])]);
        let node = |index| Parent::Node(NodeId(index));
        let broken = graph([Parent::Missing("gone".into()), node(0), node(3), node(2)]);
        let error = |index| fold(&broken, &BTreeSet::from([NodeId(index)])).unwrap_err();
        assert_eq!((error(1).code(), error(2).code()), (Code::MissingParent, Code::Cycle));
        assert_eq!(error(9), DeleteError::NoSuchNode(NodeId(9)));
    }

    #[test]
    fn refusals() {
        let node = |index| Parent::Node(NodeId(index));
        let broken =
            graph([Parent::Missing("gone".into()), node(0), node(1), Parent::None, node(5), node(4)]);
        let error = delete(&broken, &[1]).unwrap_err();
        assert_eq!((error.kind(), error.code()), (Kind::Corrupt, Code::MissingParent));
        assert_eq!(error.member(), Some("m00002"));
        // The tip of a broken chain is nobody's parent: it can go, and so can all of it.
        assert_eq!(delete(&broken, &[2]).unwrap().removals, ids(&[2]));
        assert_eq!(delete(&broken, &[0, 1, 2]).unwrap().removals, ids(&[2, 1, 0]));
        assert_eq!(delete(&broken, &[5]).unwrap_err().code(), Code::Cycle);
        assert_eq!(delete(&broken, &[5]).unwrap_err().member(), Some("m00005"));
        assert_eq!(delete(&broken, &[3]).unwrap().removals, ids(&[3]));
        assert_eq!(delete(&broken, &[9]).unwrap_err(), DeleteError::NoSuchNode(NodeId(9)));
    }

    #[test]
    fn a_thousand_members_in_one_merge() {
        let chain: Vec<_> = (0..1000_usize).map(|index| index.checked_sub(1)).collect();
        let groups = delete(&tree(&chain), &(1..999).collect::<Vec<_>>()).unwrap();
        assert_eq!(groups.merges.len(), 1);
        assert_eq!(groups.merges[0].merged.len(), 998);
        assert_eq!(groups.merges[0].new_parent, Some(NodeId(0)));
        assert_eq!(groups.departures.first(), Some(&departure(998, &[999])));
    }

    proptest! {
        #[test]
        fn survivors_keep_their_surviving_ancestors(
            nodes in prop::collection::vec((prop::option::of(any::<prop::sample::Index>()), any::<bool>()), 1..40)
        ) {
            // Parents come earlier in the list, so that there is no cycle.
            let parents: Vec<_> = nodes
                .iter()
                .enumerate()
                .map(|(index, (parent, _))| parent.filter(|_| index > 0).map(|parent| parent.index(index)))
                .collect();
            let before = tree(&parents);
            let gone: BTreeSet<NodeId> =
                nodes.iter().enumerate().filter(|(_, node)| node.1).map(|(index, _)| NodeId(index)).collect();
            let groups = group(&before, &gone).unwrap();

            let mut now: BTreeMap<NodeId, Option<NodeId>> =
                before.ids().map(|id| (id, before.parent(id))).collect();
            for merge in &groups.merges {
                prop_assert!(!gone.contains(&merge.survivor) && !merge.merged.is_empty());
                let below = before.ancestors(merge.survivor).unwrap();
                let nearest: Vec<_> = merge.merged.iter().rev().copied().collect();
                prop_assert_eq!(&below[..nearest.len()], &nearest[..]);
                now.insert(merge.survivor, merge.new_parent);
            }
            for id in before.ids().filter(|id| !gone.contains(id)) {
                let expected: Vec<_> =
                    before.ancestors(id).unwrap().into_iter().filter(|id| !gone.contains(id)).collect();
                let got: Vec<_> = std::iter::successors(now[&id], |below| now[below]).collect();
                prop_assert_eq!(got, expected);
            }

            // Names go in an order in which nothing left ever names what is gone.
            let published: BTreeSet<NodeId> = groups.merges.iter().map(|merge| merge.survivor).collect();
            let mut left: BTreeSet<NodeId> = before.ids().collect();
            for departure in &groups.departures {
                prop_assert!(left.remove(&departure.member));
                for child in before.children(departure.member) {
                    let merged_away = published.contains(child) && departure.after.contains(child);
                    prop_assert!(!left.contains(child) || merged_away);
                }
                prop_assert_eq!(departure.after.is_empty(), groups.removals.contains(&departure.member));
            }
            prop_assert!(left.is_disjoint(&gone));
            prop_assert_eq!(groups.departures.len(), gone.len());
        }
    }
}
