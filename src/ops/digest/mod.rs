//! `digest`: the view digest of a member, or of a file that belongs to no store.

use std::sync::Arc;

use serde::Serialize;

use crate::backend::{Backend, BackendError};
use crate::chain::graph::NodeId;
use crate::ids::StorePath;
use crate::ops::Result;
use crate::progress::{Cancel, Progress};
use crate::qcow2::format::MAGIC;
use crate::store::chain::OpenChain;
use crate::store::digest::{raw_digest, view_digest};
use crate::store::scan::Scan;
use crate::store::{StoreError, Stores, standalone};

/// A view's digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DigestReport {
    /// The member or file.
    pub member: String,
    /// 64 hex digits.
    pub digest: String,
    /// The size of the view.
    pub virtual_bytes: u64,
}

/// The digest of a member's view.
pub fn of_member(
    stores: &Stores,
    scan: &Scan,
    id: NodeId,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<DigestReport> {
    let chain = OpenChain::of_member(stores, scan, id)?;
    let digest = view_digest(&chain, progress, cancel)?.to_string();
    let member = stores.display(&scan.graph.node(id).key);
    Ok(DigestReport { member, digest, virtual_bytes: chain.virtual_size() })
}

/// The digest of a file in a directory whose absolute path is `root`: of a qcow2 image with what lies below
/// it in that directory, or, if it does not begin as one or `raw` says so, of a raw image.
pub fn of_file(
    backend: &Arc<dyn Backend>,
    root: &str,
    file: &StorePath,
    raw: bool,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<DigestReport> {
    let member = file.to_string();
    let (digest, virtual_bytes) = if raw || !is_qcow2(backend, file)? {
        let opened = backend.open(file).map_err(|source| failed(backend, file, source))?;
        raw_digest(opened.as_ref(), progress, cancel)?
    } else {
        let chain = standalone::open(backend, root, file)?;
        (view_digest(&chain, progress, cancel)?, chain.virtual_size())
    };
    Ok(DigestReport { member, digest: digest.to_string(), virtual_bytes })
}

fn is_qcow2(backend: &Arc<dyn Backend>, file: &StorePath) -> Result<bool> {
    let mut magic = [0; 4];
    let read = backend.open(file).and_then(|opened| opened.read_at(0, &mut magic));
    read.map_err(|source| failed(backend, file, source))?;
    Ok(u32::from_be_bytes(magic) == MAGIC)
}

fn failed(backend: &Arc<dyn Backend>, file: &StorePath, source: BackendError) -> StoreError {
    match source {
        BackendError::NotFound { .. } => StoreError::NotFound { name: file.to_string() },
        source => StoreError::Backend { store: backend.describe(), source },
    }
}
