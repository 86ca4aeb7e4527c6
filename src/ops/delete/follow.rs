//! The checkpoint files that must follow a deletion, or a member that is made a base.

use std::collections::BTreeMap;

use crate::chain::graph::{Key, NodeId};
use crate::change::ChangeError;
use crate::change::checkpoint::{Edit, Volumes, edits, orphan};
use crate::cloudstack::paths::checkpoint_of;
use crate::failure::{Failure, with_causes};
use crate::ops::delete::select::Aim;
use crate::ops::{OpError, Result};
use crate::store::Stores;
use crate::store::scan::Scan;

/// The edits that deleting or consolidating `members` needs, or why one cannot be made.
pub fn plan(
    stores: &Stores,
    scan: &Scan,
    (aim, members): (Aim, &[NodeId]),
    force: bool,
) -> Result<Vec<(Key, Edit)>> {
    match aim {
        Aim::Delete => deleted(stores, scan, members, force),
        Aim::Consolidate => consolidated(stores, scan, members, force),
    }
}

/// A member that becomes a base has no parent any more; its children, and who stays below, name whom they named.
fn consolidated(stores: &Stores, scan: &Scan, members: &[NodeId], force: bool) -> Result<Vec<(Key, Edit)>> {
    let mut edits = Vec::new();
    for id in members {
        let key = &scan.graph.node(*id).key;
        let Some(path) = checkpoint_of(&key.path) else { continue };
        let file = Key { store: key.store, path };
        if let Some(edit) = orphan(stores, &file, force).map_err(|error| refused(&error))? {
            edits.push((file, edit));
        }
    }
    Ok(edits)
}

/// A deleted member's name is replaced by the next one's below it, in every file of its volume.
fn deleted(stores: &Stores, scan: &Scan, members: &[NodeId], force: bool) -> Result<Vec<(Key, Edit)>> {
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
    edits(stores, &volumes, &own, &needed, force).map_err(|error| refused(&error))
}

fn refused(error: &ChangeError) -> OpError {
    OpError::Refused {
        code: error.code(),
        member: error.member().unwrap_or_default().to_owned(),
        message: with_causes(error),
    }
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
