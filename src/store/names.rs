//! Members as users write them: `[STORE:]install/path`, a file name if it is unique, a prefix ending in `/`.
//!
//! `@FILE` and `-` are lists of such names; who reads files expands them first.

use std::collections::BTreeSet;

use crate::chain::graph::NodeId;
use crate::store::Stores;
use crate::store::error::{Result, StoreError};
use crate::store::scan::Scan;

/// How many candidates an error names.
const MAX_CANDIDATES: usize = 10;

/// The members that `names` stand for, each once, in the order of their first mention; within a prefix in the
/// order of the scan.
pub fn resolve_all(stores: &Stores, scan: &Scan, names: &[String]) -> Result<Vec<NodeId>> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for name in names {
        found.extend(resolve(stores, scan, name)?.into_iter().filter(|id| seen.insert(*id)));
    }
    Ok(found)
}

/// The one member that `name` stands for.
pub fn resolve_one(stores: &Stores, scan: &Scan, name: &str) -> Result<NodeId> {
    match resolve(stores, scan, name)?.as_slice() {
        [id] => Ok(*id),
        found => Err(ambiguous(stores, scan, name, found)),
    }
}

/// The members that one name stands for: one, or those under a prefix ending in `/`.
///
/// # Errors
///
/// `usage` for an empty name, which would be the prefix of all members: somebody's variable was not set.
pub fn resolve(stores: &Stores, scan: &Scan, name: &str) -> Result<Vec<NodeId>> {
    if name.is_empty() {
        return Err(StoreError::Usage { detail: "a member's name is empty".to_owned() });
    }
    let (store, path) = stores.split_name(name);
    let in_store = |id: &NodeId| store.is_none_or(|index| scan.graph.node(*id).key.store == index);
    let candidates = || scan.graph.ids().filter(in_store);
    let text = |id: &NodeId| scan.graph.node(*id).key.path.as_str();
    if path.is_empty() || path.ends_with('/') {
        let found: Vec<NodeId> = candidates().filter(|id| text(id).starts_with(path)).collect();
        return if found.is_empty() { Err(not_found(name)) } else { Ok(found) };
    }
    let exact: Vec<NodeId> = candidates().filter(|id| text(id) == path).collect();
    let found = if exact.is_empty() && !path.contains('/') {
        candidates().filter(|id| scan.graph.node(*id).key.path.file_name() == path).collect()
    } else {
        exact
    };
    match found.as_slice() {
        [] => Err(not_found(name)),
        [_] => Ok(found),
        several => Err(ambiguous(stores, scan, name, several)),
    }
}

fn not_found(name: &str) -> StoreError {
    StoreError::NotFound { name: name.to_owned() }
}

fn ambiguous(stores: &Stores, scan: &Scan, name: &str, found: &[NodeId]) -> StoreError {
    let candidates =
        found.iter().take(MAX_CANDIDATES).map(|id| stores.display(&scan.graph.node(*id).key)).collect();
    StoreError::Ambiguous { name: name.to_owned(), candidates }
}
