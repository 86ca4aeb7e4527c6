//! Which tree a member is in: an id of its own, kept in the manifest of the tree's root.
//!
//! A tree is named by its root, the member that stands on nothing. The first change makes up a random id and
//! offers it as the root's manifest; who comes second takes what he finds. When a root is deleted the
//! survivors that become roots get the same id before it goes. Manifests are not made durable, which would
//! cost two syncs: what has claimed a number says in its claim, which is, which roots its tree has. So a
//! manifest that a power cut loses is made anew with the same id as long as anything of the tree is open; a
//! freeze, an undo and who it would hurt are never in two trees. With nothing open another id does as well.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};

use serde::{Deserialize, Serialize};

use crate::backend::publish::offer;
use crate::backend::{Backend, BackendError};
use crate::chain::graph::{Graph, Key, NodeId};
use crate::change::error::{ChangeError, Result};
use crate::change::journal::{Found, Journal};
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
    if let Some(tree) = find(site.stores.get(root.store)?.backend(), &root.path)? {
        return Ok(tree);
    }
    let tree = remembered(site, root)?.unwrap_or_else(|| TreeId::of(site.clock.unique()));
    belong(site, root, &tree)
}

/// The tree of a root whose manifest is missing, as the claims of trees have it that have anything open. They
/// are read once: what a power cut took was gone before.
fn remembered(site: &Site<'_>, root: &Key) -> Result<Option<TreeId>> {
    let mut remembered = site.remembered.lock().unwrap_or_else(PoisonError::into_inner);
    if remembered.is_none() {
        *remembered = Some(claimed_roots(site)?);
    }
    Ok(remembered.as_ref().and_then(|roots| roots.get(root)).cloned())
}

fn claimed_roots(site: &Site<'_>) -> Result<BTreeMap<Key, TreeId>> {
    let mut roots: BTreeMap<Key, (i64, TreeId)> = BTreeMap::new();
    for (_, store) in site.stores.iter() {
        let journal = Journal::new(store.backend());
        let trees: BTreeSet<TreeId> = journal.intents()?.into_iter().map(|name| name.tree).collect();
        for tree in trees {
            for number in journal.generations(&tree)? {
                let Found::Record(claim) = journal.claim(&tree, number)? else { continue };
                for place in &claim.roots {
                    let entry = (claim.decided_ns, tree.clone());
                    let latest = roots.entry(site.key(place)?).or_insert_with(|| entry.clone());
                    if entry.0 > latest.0 {
                        *latest = entry;
                    }
                }
            }
        }
    }
    Ok(roots.into_iter().map(|(root, (_, tree))| (root, tree)).collect())
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
