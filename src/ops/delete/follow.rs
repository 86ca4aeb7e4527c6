//! The checkpoint files that must follow a deletion.

use std::collections::BTreeMap;

use crate::chain::graph::{Key, NodeId};
use crate::change::checkpoint::{Edit, Volumes, edits};
use crate::cloudstack::paths::checkpoint_of;
use crate::failure::{Failure, with_causes};
use crate::ops::{OpError, Result};
use crate::store::Stores;
use crate::store::scan::Scan;

/// The edits that deleting `members` needs, or why one cannot be made.
pub fn plan(stores: &Stores, scan: &Scan, members: &[NodeId], force: bool) -> Result<Vec<(Key, Edit)>> {
    let key = |id: NodeId| &scan.graph.node(id).key;
    let checkpoint = |id: NodeId| {
        let path = checkpoint_of(&key(id).path)?;
        Some(Key { store: key(id).store, path })
    };
    let own: Vec<Key> = members.iter().filter_map(|id| checkpoint(*id)).collect();
    let survivors = members.iter().flat_map(|id| scan.graph.children(*id));
    let needed: Vec<Key> = survivors.filter_map(|id| checkpoint(*id)).collect();
    let mut volumes = Volumes::new();
    for member in members {
        let Some(directory) = checkpoint(*member).map(|file| file.path.parent()) else { continue };
        let name = key(*member).path.file_name().to_owned();
        let parent = heir(scan, members, *member).map(|id| key(id).path.file_name().to_owned());
        // A child may lie on another store than what it loses, and so may its checkpoint file.
        let stores = scan.graph.children(*member).iter().map(|child| key(*child).store);
        for store in stores.chain([key(*member).store]) {
            let directory = Key { store, path: directory.clone() };
            let parents: &mut BTreeMap<_, _> = volumes.entry(directory).or_default();
            parents.insert(name.clone(), parent.clone());
        }
    }
    edits(stores, &volumes, &own, &needed, force).map_err(|error| OpError::Refused {
        code: error.code(),
        member: error.member().unwrap_or_default().to_owned(),
        message: with_causes(&error),
    })
}

/// The nearest member below that stays.
fn heir(scan: &Scan, members: &[NodeId], member: NodeId) -> Option<NodeId> {
    let mut below = scan.graph.parent(member);
    let mut steps = scan.members.len();
    while let Some(id) = below.filter(|id| members.contains(id) && steps > 0) {
        below = scan.graph.parent(id);
        steps -= 1;
    }
    below
}
