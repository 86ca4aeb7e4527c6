//! Members and their parents: who is below whom, over all stores.
//!
//! A graph is built once from plain facts and never changes. Each member has at most one parent, so the
//! connected parts are trees, or one cycle with trees hanging off it; both are input, since backing names
//! are written by others. Nothing here recurses: depth is bounded by memory only. Building is
//! O(n log n) (for the sorting by key), everything else O(size of the answer).

use std::fmt;

use crate::failure::{Code, Failure, Kind};
use crate::ids::StorePath;

/// A member's index in the list that its graph was built from; of no meaning in another graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub usize);

/// What names a member: the index of its store in the caller's list, and its install path there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Which store.
    pub store: usize,
    /// The install path on it.
    pub path: StorePath,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.path, f)
    }
}

/// What a member's header says is below it. The texts are for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parent {
    /// Nothing: it is a full base.
    None,
    /// That member.
    Node(NodeId),
    /// A name that leads to no member.
    Missing(String),
    /// A name that cannot be a member's.
    Outside(String),
    /// A name that fits several members.
    Ambiguous(String),
    /// Unknown: the header cannot be read. Such a member may be anybody's child, which whoever deletes
    /// has to think of.
    Unreadable,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// What names it.
    pub key: Key,
    /// What is below it.
    pub parent: Parent,
}

/// Why a list of members is no graph: always a fault of the caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GraphError {
    /// Two nodes have one key.
    #[error("member {key} is listed twice")]
    Duplicate {
        /// The key.
        key: Key,
    },
    /// A parent's index is past the end of the list.
    #[error("the parent of {key} is not in the list")]
    NoSuchParent {
        /// The child's key.
        key: Key,
    },
}

/// Why the members below a member cannot be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// Following the parents leads round in a circle.
    #[error("the backing names below {member} form a cycle")]
    Cycle {
        /// The member asked about.
        member: Key,
    },
    /// The chain does not end in a full base.
    #[error("the chain of {member} is broken at {at}: {}", reason(.parent))]
    Broken {
        /// The member asked about.
        member: Key,
        /// The lowest member that is known.
        at: Key,
        /// What that one says is below it.
        parent: Parent,
    },
}

fn reason(parent: &Parent) -> String {
    match parent {
        Parent::None | Parent::Node(_) => "it has a parent".to_owned(),
        Parent::Missing(name) => format!("its backing file {name:?} is no member of any store"),
        Parent::Outside(name) => format!("its backing file {name:?} is outside every store"),
        Parent::Ambiguous(name) => format!("its backing file {name:?} fits several members"),
        Parent::Unreadable => "its header cannot be read".to_owned(),
    }
}

impl Failure for ChainError {
    fn kind(&self) -> Kind {
        Kind::Corrupt
    }

    fn code(&self) -> Code {
        match self {
            Self::Cycle { .. } => Code::Cycle,
            Self::Broken { parent, .. } => match parent {
                Parent::None | Parent::Node(_) | Parent::Missing(_) => Code::MissingParent,
                Parent::Outside(_) => Code::OutsideName,
                Parent::Ambiguous(_) => Code::AmbiguousParent,
                Parent::Unreadable => Code::BadHeader,
            },
        }
    }

    fn member(&self) -> Option<&str> {
        match self {
            Self::Cycle { member } | Self::Broken { member, .. } => Some(member.path.as_str()),
        }
    }
}

/// Members that are connected by backing names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// All of them: parents before children, each member followed by all above it before its next sibling,
    /// siblings by key. The first is the base, or the first by key of the cycle.
    pub members: Vec<NodeId>,
    /// Whether the tree stands on a cycle instead of a base.
    pub cyclic: bool,
}

/// Members and their parents. Ids handed to it must be its own; a foreign one may panic.
#[derive(Clone, Debug)]
pub struct Graph {
    nodes: Vec<Node>,
    by_key: Vec<NodeId>,
    children: Vec<Vec<NodeId>>,
    trees: Vec<Tree>,
    places: Vec<Place>,
}

/// Where a node is.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    tree: usize,
    /// Steps above the base, or above the cycle's first member.
    depth: usize,
    on_cycle: bool,
    /// Whether the search for a cycle came by.
    walked: bool,
    /// Whether a tree took the node already; true for all once the graph is built.
    placed: bool,
}

impl Graph {
    /// Builds the graph; `NodeId(i)` is `nodes[i]`.
    pub fn new(nodes: Vec<Node>) -> Result<Self, GraphError> {
        let mut by_key: Vec<NodeId> = (0..nodes.len()).map(NodeId).collect();
        by_key.sort_unstable_by(|a, b| nodes[a.0].key.cmp(&nodes[b.0].key));
        for pair in by_key.windows(2) {
            if let [a, b] = pair
                && nodes[a.0].key == nodes[b.0].key
            {
                return Err(GraphError::Duplicate { key: nodes[a.0].key.clone() });
            }
        }
        let mut children = vec![Vec::new(); nodes.len()];
        // In key order, so that every list of children is sorted by key.
        for id in &by_key {
            if let Parent::Node(parent) = nodes[id.0].parent {
                children
                    .get_mut(parent.0)
                    .ok_or_else(|| GraphError::NoSuchParent { key: nodes[id.0].key.clone() })?
                    .push(*id);
            }
        }
        let places = vec![Place::default(); nodes.len()];
        let mut graph = Self { nodes, by_key, children, trees: Vec::new(), places };
        graph.plant();
        Ok(graph)
    }

    /// Finds the trees, in order of their first members' keys.
    fn plant(&mut self) {
        for index in 0..self.by_key.len() {
            let id = self.by_key[index];
            if self.parent(id).is_none() {
                self.grow(id, false);
            }
        }
        // What no base reaches stands on a cycle.
        for index in 0..self.by_key.len() {
            let id = self.by_key[index];
            if !self.places[id.0].placed {
                let first = self.mark_cycle(id);
                self.grow(first, true);
            }
        }
        let Self { nodes, trees, places, .. } = self;
        trees.sort_by(|a, b| first_key(nodes, a).cmp(&first_key(nodes, b)));
        for (index, tree) in trees.iter().enumerate() {
            for id in &tree.members {
                places[id.0].tree = index;
            }
        }
    }

    /// Walks down from a node that stands on a cycle, marks the cycle, and gives its first member by key.
    fn mark_cycle(&mut self, above: NodeId) -> NodeId {
        // The first node met twice is on the cycle. Each walk stays in its own tree: linear over all.
        let mut on_it = above;
        while !std::mem::replace(&mut self.places[on_it.0].walked, true) {
            on_it = self.parent(on_it).unwrap_or(on_it);
        }
        let (mut first, mut at) = (on_it, on_it);
        loop {
            self.places[at.0].on_cycle = true;
            if self.nodes[at.0].key < self.nodes[first.0].key {
                first = at;
            }
            at = self.parent(at).unwrap_or(on_it);
            if at == on_it {
                return first;
            }
        }
    }

    /// Collects all above `first`, depth first.
    fn grow(&mut self, first: NodeId, cyclic: bool) {
        let mut members = Vec::new();
        let mut waiting = vec![(first, 0)];
        while let Some((id, depth)) = waiting.pop() {
            let place = &mut self.places[id.0];
            if place.placed {
                continue;
            }
            place.placed = true;
            place.depth = depth;
            members.push(id);
            waiting.extend(self.children[id.0].iter().rev().map(|child| (*child, depth + 1)));
        }
        self.trees.push(Tree { members, cyclic });
    }

    /// How many members there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// All ids.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.nodes.len()).map(NodeId)
    }

    /// Whether the id is one of this graph.
    #[must_use]
    pub fn contains(&self, id: NodeId) -> bool {
        id.0 < self.nodes.len()
    }

    /// One member.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// The member with that key.
    #[must_use]
    pub fn find(&self, key: &Key) -> Option<NodeId> {
        let at = self.by_key.binary_search_by(|id| self.nodes[id.0].key.cmp(key)).ok()?;
        self.by_key.get(at).copied()
    }

    /// The member below, if there is one and it is known.
    #[must_use]
    pub fn parent(&self, id: NodeId) -> Option<NodeId> {
        match self.nodes[id.0].parent {
            Parent::Node(parent) => Some(parent),
            _ => None,
        }
    }

    /// The members right above, by key.
    #[must_use]
    pub fn children(&self, id: NodeId) -> &[NodeId] {
        &self.children[id.0]
    }

    /// Members that might be children of `id` without its being known: ones in the same directory that cannot
    /// be read, and ones whose backing name leads nowhere but ends in the file name of `id`.
    pub fn possible_children(&self, id: NodeId) -> impl Iterator<Item = NodeId> {
        let key = &self.node(id).key;
        let directory = key.path.parent();
        self.ids().filter(move |other| {
            let node = self.node(*other);
            let suspect = match &node.parent {
                Parent::Unreadable => node.key.path.parent() == directory,
                Parent::Missing(name) | Parent::Outside(name) | Parent::Ambiguous(name) => {
                    name.rsplit('/').next() == Some(key.path.file_name())
                }
                Parent::None | Parent::Node(_) => false,
            };
            suspect && *other != id
        })
    }

    /// All that read through `id`, or may: its children and its possible ones.
    pub fn readers(&self, id: NodeId) -> impl Iterator<Item = NodeId> {
        self.children(id).iter().copied().chain(self.possible_children(id))
    }

    /// Whether nobody names it as backing file.
    #[must_use]
    pub fn is_tip(&self, id: NodeId) -> bool {
        self.children[id.0].is_empty()
    }

    /// Whether its parents lead back to itself. Those that only stand on a cycle are not on it.
    #[must_use]
    pub fn on_cycle(&self, id: NodeId) -> bool {
        self.places[id.0].on_cycle
    }

    /// All trees, by the key of their first member.
    #[must_use]
    pub fn trees(&self) -> &[Tree] {
        &self.trees
    }

    /// The index of a member's tree.
    #[must_use]
    pub fn tree_of(&self, id: NodeId) -> usize {
        self.places[id.0].tree
    }

    /// The tips of a tree, in the order of its members; none for an index past the end.
    pub fn tips(&self, tree: usize) -> impl Iterator<Item = NodeId> {
        let members = self.trees.get(tree).map_or(&[][..], |tree| &tree.members);
        members.iter().copied().filter(|id| self.is_tip(*id))
    }

    /// How many members are below: 0 for the lowest one known; `None` where there is no lowest.
    #[must_use]
    pub fn depth(&self, id: NodeId) -> Option<usize> {
        let place = self.places[id.0];
        (!self.trees[place.tree].cyclic).then_some(place.depth)
    }

    /// The known members below, nearest first, whether or not they end in a full base.
    pub fn ancestors(&self, id: NodeId) -> Result<Vec<NodeId>, ChainError> {
        let Some(depth) = self.depth(id) else {
            return Err(ChainError::Cycle { member: self.nodes[id.0].key.clone() });
        };
        let mut below = Vec::with_capacity(depth);
        below.extend(std::iter::successors(self.parent(id), |at| self.parent(*at)));
        Ok(below)
    }

    /// The whole chain of a member, the full base first and itself last; an error if it is not complete.
    pub fn chain(&self, id: NodeId) -> Result<Vec<NodeId>, ChainError> {
        self.complete(id)?;
        let mut chain = self.ancestors(id)?;
        chain.reverse();
        chain.push(id);
        Ok(chain)
    }

    /// Whether the chain below a member ends in a full base, without listing it.
    pub fn complete(&self, id: NodeId) -> Result<(), ChainError> {
        let member = || self.nodes[id.0].key.clone();
        let tree = &self.trees[self.places[id.0].tree];
        if tree.cyclic {
            return Err(ChainError::Cycle { member: member() });
        }
        match tree.members.first().map(|base| &self.nodes[base.0]) {
            None | Some(Node { parent: Parent::None, .. }) => Ok(()),
            Some(Node { key, parent }) => {
                Err(ChainError::Broken { member: member(), at: key.clone(), parent: parent.clone() })
            }
        }
    }
}

fn first_key<'a>(nodes: &'a [Node], tree: &Tree) -> Option<&'a Key> {
    tree.members.first().map(|id| &nodes[id.0].key)
}

#[cfg(test)]
#[path = "graph_tests.rs"]
mod tests;
