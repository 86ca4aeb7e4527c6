//! What a server can do and we may: found out by trying, as far as the protocol has it at all.

use std::io;

use nfs3_client::nfs3_types::nfs3::{
    ACCESS3_EXTEND, ACCESS3_MODIFY, ACCESS3args, ACCESS3resfail, ACCESS3resok, NFS_PROGRAM, PATHCONF3args,
    PATHCONF3resfail, PATHCONF3resok, nfs_fh3,
};

use super::Nfs3Store;
use super::fault::{Fault, Result as Asked};
use super::pool::Pool;
use crate::backend::{Backend as _, BackendError, Capabilities, Result, publish};
use crate::ids::StorePath;

/// The longest name that qchain or CloudStack gives a file, in bytes, and some more.
const LONGEST_NAME: u32 = 128;

/// What the protocol alone lets a store do.
pub(super) const NOTHING: Capabilities = Capabilities {
    clone: false,
    clone_alignment: 0,
    hard_links: false,
    byte_range_locks: false,
    rename_exchange: false,
    direct_io: false,
    network: true,
};

/// Whether a handle's directory or file may be written to by this user, on this export. A server that does not want to
/// say will say so when it is written to.
pub(super) async fn may_write(pool: &Pool, object: &nfs_fh3) -> Asked<bool> {
    let access = ACCESS3_MODIFY | ACCESS3_EXTEND;
    let args = ACCESS3args { object: object.clone(), access };
    match pool.ask::<_, ACCESS3resok, ACCESS3resfail>(NFS_PROGRAM::NFSPROC3_ACCESS, &args).await {
        Ok(told) => Ok(told.access & access == access),
        Err(Fault::Status(_)) => Ok(true),
        Err(fault) => Err(fault),
    }
}

/// [`crate::backend::Backend::probe`] for an export.
pub(super) fn probe(store: &Nfs3Store, scratch: &StorePath) -> Result<Capabilities> {
    check_names(store, scratch)?;
    // Told by their names from the temporary files of a change, by whoever sweeps.
    let name = || -> Result<StorePath> {
        scratch.join(&format!("probe.{}", publish::temporary_name())).map_err(|error| {
            let source = io::Error::new(io::ErrorKind::InvalidInput, error);
            BackendError::Io { action: "probe", path: scratch.to_string(), source }
        })
    };
    let (first, second) = (name()?, name()?);
    let made = store.create(&first)?.stat()?;
    let told = store.user();
    if made.uid != told {
        tracing::warn!(
            "{}: files that user {told} makes there belong to user {}: the server maps users (root squash); members of \
             other owners cannot be changed",
            store.describe(),
            made.uid
        );
    }
    let linked = store.hard_link(&first, &second);
    let counted = store.stat(&first).map(|stat| stat.links);
    if linked.is_ok() {
        store.remove_file(&second)?;
    }
    store.remove_file(&first)?;
    let hard_links = match linked {
        Ok(()) => counted? == 2,
        Err(error) if error.is_unsupported() => false,
        Err(error) => return Err(error),
    };
    Ok(Capabilities { hard_links, ..NOTHING })
}

/// Refuses a server whose names are too short.
fn check_names(store: &Nfs3Store, scratch: &StorePath) -> Result<()> {
    let told =
        store.ask("probe", scratch, async |shared: std::sync::Arc<super::Shared>, path: StorePath| {
            let once = async || {
                let args = PATHCONF3args { object: shared.directory(&path).await? };
                let procedure = NFS_PROGRAM::NFSPROC3_PATHCONF;
                shared.pool.ask::<_, PATHCONF3resok, PATHCONF3resfail>(procedure, &args).await
            };
            let told = renewed!(shared, once())?;
            if told.name_max < LONGEST_NAME {
                let text = format!(
                    "names have at most {} bytes there, and {LONGEST_NAME} are needed",
                    told.name_max
                );
                return Err(Fault::Lacking(text));
            }
            Ok(told.case_insensitive)
        })?;
    if told {
        tracing::warn!("{}: it does not tell upper and lower case apart", store.describe());
    }
    Ok(())
}
