//! Moving runs into a file of an export: by reading and writing, many at a time, as waiting is what they cost.
//!
//! NFSv3 has no call that copies, and none that shares extents. Nor does one make a hole: zeros are written.

use std::io;
use std::sync::Arc;

use super::file::NfsFile;
use crate::backend::copying::{self, copy, in_flight, make_room, shares};
use crate::backend::{BackendError, Means, Move, Moved, Result, StoreFile};

/// [`StoreFile::move_runs`] for a file of an export.
pub(super) fn move_runs(
    target: &NfsFile,
    sources: &[Arc<dyn StoreFile>],
    runs: &[Move],
    means: Means,
) -> Result<Moved> {
    let path = target.path().to_string();
    if means == Means::Clone {
        let source = io::Error::new(io::ErrorKind::Unsupported, "NFSv3 cannot share extents");
        return Err(BackendError::CannotClone { path, source });
    }
    let (_, batch) = copying::batch(target, sources, runs)?;
    make_room(target, &batch)?;
    let pieces: Vec<Move> = batch.pieces.iter().flat_map(shares).collect();
    in_flight(&pieces, |piece, buffer| copy(target, sources, piece, buffer))?;
    Ok(Moved { cloned_bytes: 0, copied_bytes: batch.bytes() })
}
