//! Which tree a member is in: an id of its own, kept in the manifest of the tree's root.
//!
//! A tree is named by its root, the member that stands on nothing. The first change makes up a random id and
//! offers it as the root's manifest; who comes second takes what he finds. When a root is deleted the
//! survivors that become roots get the same id before it goes. A manifest that a power cut loses is made
//! anew with another id, which is harmless: a change that was under way is found by its intent, and both
//! compare file ids.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::publish::offer;
use crate::backend::{Backend, BackendError};
use crate::chain::graph::{Graph, Key, NodeId};
use crate::change::error::{ChangeError, Result};
use crate::change::places;
use crate::change::record::{OperationId, SCHEMA, TreeId, encode};
use crate::change::site::Site;
use crate::ids::StorePath;
use crate::store::facts::read_whole;

/// The largest manifest that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// What is known of a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The member's path on this store.
    pub member: StorePath,
    /// The tree it is in.
    pub tree: TreeId,
}

/// The member below all others of a member's chain, as far as the chain goes.
#[must_use]
pub fn root(graph: &Graph, member: NodeId) -> NodeId {
    graph.ancestors(member).unwrap_or_default().last().copied().unwrap_or(member)
}

/// The id of the tree with that root, if it has one.
pub fn find(backend: &Arc<dyn Backend>, root: &StorePath) -> Result<Option<TreeId>> {
    let path = places::manifest(root);
    match read_whole(backend, &path, MAX_BYTES) {
        Ok(bytes) => {
            let manifest: Option<Manifest> = serde_json::from_slice(&bytes).ok();
            Ok(manifest.filter(|manifest| manifest.member == *root).map(|manifest| manifest.tree))
        }
        Err(BackendError::NotFound { .. }) => Ok(None),
        Err(source) => Err(failed("read", &path, source)),
    }
}

/// The id of the tree with that root, made if it has none yet.
pub fn identify(site: &Site<'_>, root: &Key) -> Result<TreeId> {
    match find(site.stores.get(root.store)?.backend(), &root.path)? {
        Some(tree) => Ok(tree),
        None => belong(site, root, &TreeId::of(site.clock.unique())),
    }
}

/// Says that a member is in a tree, unless it is known to be in one; gives the tree it is in.
pub fn belong(site: &Site<'_>, member: &Key, tree: &TreeId) -> Result<TreeId> {
    let (backend, member) = (site.stores.get(member.store)?.backend(), &member.path);
    let path = places::manifest(member);
    let manifest = Manifest { schema: SCHEMA, member: member.clone(), tree: tree.clone() };
    if backend.stat(&path.parent()).is_err() {
        places::make(backend.as_ref(), &path.parent()).map_err(|source| failed("make", &path, source))?;
    }
    for _ in 0..2 {
        let temporary = places::temporary(&OperationId::of(site.clock.unique()), "manifest");
        match offer(backend.as_ref(), &temporary, &path, &encode(&manifest)) {
            Ok(()) => return Ok(tree.clone()),
            Err(BackendError::AlreadyExists { .. }) => {}
            Err(source) => return Err(failed("write", &path, source)),
        }
        if let Some(found) = find(backend, member)? {
            return Ok(found);
        }
        // A power cut left a name without its bytes.
        match backend.remove_file(&path) {
            Ok(()) | Err(BackendError::NotFound { .. }) => {}
            Err(source) => return Err(failed("remove", &path, source)),
        }
    }
    Err(ChangeError::ChangedMeanwhile { member: path.to_string() })
}

/// Forgets a member that is gone.
pub fn forget(backend: &dyn Backend, member: &StorePath) -> Result<()> {
    let path = places::manifest(member);
    match backend.remove_file(&path) {
        Ok(()) | Err(BackendError::NotFound { .. }) => Ok(()),
        Err(source) => Err(failed("remove", &path, source)),
    }
}

fn failed(action: &'static str, path: &StorePath, source: BackendError) -> ChangeError {
    ChangeError::Store { action, member: path.to_string(), source }
}
