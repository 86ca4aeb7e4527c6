//! The survivor's checkpoint file, which must name the new parent.

use crate::chain::delete::Merge;
use crate::change::checkpoint;
use crate::failure::{Failure, with_causes};
use crate::ops::{OpError, Result};
use crate::store::Stores;
use crate::store::facts::CheckpointFacts;
use crate::store::scan::Scan;

/// Whether the survivor's checkpoint file can follow the merge.
pub fn check(stores: &Stores, scan: &Scan, merge: &Merge) -> Result<()> {
    let key = &scan.graph.node(merge.survivor).key;
    if !has_checkpoint(scan, merge) {
        return Ok(());
    }
    let backend = stores.get(key.store)?.backend();
    checkpoint::check(backend, &key.path, new_parent_name(scan, merge)).map_err(|error| OpError::Refused {
        code: error.code(),
        member: stores.display(key),
        message: with_causes(&error),
    })
}

/// Whether the survivor had a checkpoint file when it was scanned.
pub fn has_checkpoint(scan: &Scan, merge: &Merge) -> bool {
    scan.member(merge.survivor).is_some_and(|member| member.checkpoint != CheckpointFacts::None)
}

/// What its checkpoint file must call the parent.
pub fn new_parent_name<'a>(scan: &'a Scan, merge: &Merge) -> Option<&'a str> {
    merge.new_parent.map(|parent| scan.graph.node(parent).key.path.file_name())
}
