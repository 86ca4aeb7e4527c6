//! Calls that give, move and take away names; each takes effect once, whatever becomes of its answer.
//!
//! What is known before a call (the file id of what has the name) is held against what is there after a try without an
//! answer. If that shows it done, it is; else the call is made again, and only while the name is still that file's.
//!
//! | call | is known to be done when |
//! |---|---|
//! | CREATE | the server, asked again with the same verifier, says so; without verifiers it is never taken for ours |
//! | MKDIR | an empty directory of this user has the name that was free before |
//! | REMOVE, RMDIR | nothing, or another file, has the name |
//! | RENAME | the new name is the file's |
//! | LINK | the new name is the file's |
//!
//! A server that dies within a CREATE may have made the file without its verifier: it is nobody's then, and the name is
//! taken. That is never guessed at; a temporary file is swept by its name.
//!
//! RFC 1813 (section 4.8) has the server make each of them stable before it answers: there is nothing to be synced.

use nfs3_client::nfs3_types::nfs3::{
    CREATE3args, CREATE3resfail, LINK3args, LINK3resfail, LINK3resok, MKDIR3args, MKDIR3resfail, NFS_PROGRAM,
    REMOVE3args, REMOVE3resfail, REMOVE3resok, RENAME3args, RENAME3resfail, RENAME3resok, RMDIR3args,
    RMDIR3resfail, RMDIR3resok, createhow3, createverf3, fattr3, nfs_fh3, nfsstat3, sattr3, set_atime,
    set_mtime,
};

use super::effort::Tried;
use super::fault::{Fault, Result};
use super::list::Budget;
use super::resolve::{self, Found, Place, look_up};
use super::wire::Made;
use super::{Shared, attributes, list};
use crate::backend::{FileId, FileKind, Stat};
use crate::ids::StorePath;

/// The mode of a new file.
const FILE_MODE: u32 = 0o600;

/// Makes a new empty file of mode 0600. `EXIST` if something has the name.
pub(super) async fn create(shared: &Shared, path: &StorePath) -> Result<Found> {
    let made = renewed!(shared, create_at(shared, path))?;
    let stat = match tidied(shared, &made.handle).await {
        // It is there already: not the call for it is made again, but what makes it ours is looked for.
        Err(fault) if fault.is_stale() => {
            let found = look(shared, path).await?;
            if made.attributes.is_none_or(|of_made| found.stat.id != resolve::stat_of(&of_made).id) {
                return Err(fault);
            }
            return Ok(Found { stat: tidied(shared, &found.handle).await?, ..found });
        }
        stat => stat?,
    };
    Ok(Found { handle: made.handle, stat })
}

/// A file that was made, and what the server told of it then.
struct New {
    handle: nfs_fh3,
    attributes: Option<fattr3>,
}

async fn create_at(shared: &Shared, path: &StorePath) -> Result<New> {
    let place = shared.place(path).await?;
    let verifier = uuid::Uuid::new_v4().as_u64_pair().0.to_be_bytes();
    let made = match create_as(shared, &place, createhow3::EXCLUSIVE(createverf3(verifier))).await {
        Err(Fault::Status(nfsstat3::NFS3ERR_NOTSUPP)) => {
            create_as(shared, &place, createhow3::GUARDED(attributes::mode(FILE_MODE))).await?
        }
        made => made?,
    };
    let handle = match made.handle {
        Some(handle) => handle,
        None => look_up(&shared.pool, &place.directory, &place.name).await?.handle,
    };
    Ok(New { handle, attributes: made.attributes })
}

/// Gives a new file what every new one has, and says what it is then.
async fn tidied(shared: &Shared, handle: &nfs_fh3) -> Result<Stat> {
    // Before that it has the verifier where its times belong, and no mode that is known.
    let wanted = sattr3 {
        atime: set_atime::SET_TO_SERVER_TIME,
        mtime: set_mtime::SET_TO_SERVER_TIME,
        ..attributes::mode(FILE_MODE)
    };
    let stat = match attributes::set(&shared.pool, handle, &wanted).await? {
        Some(stat) => stat,
        None => resolve::stat(&shared.pool, handle).await?,
    };
    if stat.kind == FileKind::File { Ok(stat) } else { Err(Fault::NotPlain) }
}

async fn create_as(shared: &Shared, place: &Place, how: createhow3) -> Result<Made> {
    let verified = matches!(how, createhow3::EXCLUSIVE(_));
    let args = CREATE3args { where_: place.args(), how };
    let mut effort = shared.pool.effort()?;
    let mut doubted = false;
    loop {
        match effort.call::<_, Made, CREATE3resfail>(NFS_PROGRAM::NFSPROC3_CREATE, &args).await? {
            Tried::Done(made) => return Ok(made),
            // Two tries at the same time: the verifier of the first was not there yet.
            Tried::Refused(nfsstat3::NFS3ERR_EXIST) if verified && effort.has_lost() && !doubted => {
                doubted = true;
            }
            Tried::Refused(status) => return Err(Fault::Status(status)),
            Tried::Lost => {}
        }
    }
}

/// Makes a directory with these permission bits. `EXIST` if something has the name.
pub(super) async fn create_dir(shared: &Shared, path: &StorePath, bits: u32) -> Result<()> {
    renewed!(shared, create_dir_at(shared, path, bits))
}

async fn create_dir_at(shared: &Shared, path: &StorePath, bits: u32) -> Result<()> {
    let place = shared.place(path).await?;
    let found = match look_up(&shared.pool, &place.directory, &place.name).await {
        Ok(_) => Err(Fault::Status(nfsstat3::NFS3ERR_EXIST)),
        Err(Fault::Status(nfsstat3::NFS3ERR_NOENT)) => make_dir(shared, &place, bits).await,
        Err(fault) => Err(fault),
    }?;
    // What the server took away (a mask of its own) is given back; what it added (set-group-id) stays.
    if found.stat.mode & 0o777 != bits {
        let mode = attributes::mode(found.stat.mode & 0o7000 | bits);
        attributes::set(&shared.pool, &found.handle, &mode).await?;
    }
    Ok(())
}

async fn make_dir(shared: &Shared, place: &Place, bits: u32) -> Result<Found> {
    let args = MKDIR3args { where_: place.args(), attributes: attributes::mode(bits) };
    let mut effort = shared.pool.effort()?;
    loop {
        let refused = match effort.call::<_, Made, MKDIR3resfail>(NFS_PROGRAM::NFSPROC3_MKDIR, &args).await? {
            Tried::Done(Made { handle: Some(handle), attributes: Some(attributes) }) => {
                return Ok(Found { handle, stat: resolve::stat_of(&attributes) });
            }
            Tried::Done(_) => return look_up(&shared.pool, &place.directory, &place.name).await,
            Tried::Refused(status) => Some(status),
            Tried::Lost => None,
        };
        if effort.has_lost()
            && let Some(found) = own_empty_dir(shared, place).await?
        {
            return Ok(found);
        }
        if let Some(status) = refused {
            return Err(Fault::Status(status));
        }
    }
}

/// What has the name now, if it is as we would have made it.
async fn own_empty_dir(shared: &Shared, place: &Place) -> Result<Option<Found>> {
    let found = match look_up(&shared.pool, &place.directory, &place.name).await {
        Err(Fault::Status(nfsstat3::NFS3ERR_NOENT)) => return Ok(None),
        found => found?,
    };
    let own = found.stat.kind == FileKind::Directory && shared.is_own(&found.stat);
    Ok((own && list::list(shared, &found.handle, &Budget::default()).await?.is_empty()).then_some(found))
}

/// Removes the name of a file, or of an empty directory.
pub(super) async fn remove(shared: &Shared, path: &StorePath, kind: FileKind) -> Result<()> {
    renewed!(shared, remove_at(shared, path, kind))
}

async fn remove_at(shared: &Shared, path: &StorePath, kind: FileKind) -> Result<()> {
    let place = shared.place(path).await?;
    let found = look_up(&shared.pool, &place.directory, &place.name).await?;
    if found.stat.kind != kind {
        return Err(Fault::NotPlain);
    }
    let mut effort = shared.pool.effort()?;
    loop {
        let tried = if kind == FileKind::Directory {
            let args = RMDIR3args { object: place.args() };
            let tried = effort.call::<_, RMDIR3resok, RMDIR3resfail>(NFS_PROGRAM::NFSPROC3_RMDIR, &args);
            tried.await?.without_reply()
        } else {
            let args = REMOVE3args { object: place.args() };
            let tried = effort.call::<_, REMOVE3resok, REMOVE3resfail>(NFS_PROGRAM::NFSPROC3_REMOVE, &args);
            tried.await?.without_reply()
        };
        let refused = match tried {
            Tried::Done(()) => {
                shared.writers.forget_given_up(&found.handle);
                return Ok(());
            }
            Tried::Refused(status) => Some(status),
            Tried::Lost => None,
        };
        // Nobody else's file goes with the next try.
        if effort.has_lost() && has(shared, path).await? != Some(found.stat.id) {
            return Ok(());
        }
        if let Some(status) = refused {
            return Err(Fault::Status(status));
        }
    }
}

/// Moves what has a name, a file or a directory known by `id`, to another one, over what has that.
pub(super) async fn rename(shared: &Shared, from: &StorePath, to: &StorePath, id: FileId) -> Result<()> {
    renewed!(shared, rename_at(shared, from, to, id))
}

async fn rename_at(shared: &Shared, from: &StorePath, to: &StorePath, id: FileId) -> Result<()> {
    // Both were looked at a moment ago.
    let (source, target) = (shared.known_place(from).await?, shared.known_place(to).await?);
    let args = RENAME3args { from: source.args(), to: target.args() };
    let mut effort = shared.pool.effort()?;
    loop {
        let tried = effort.call::<_, RENAME3resok, RENAME3resfail>(NFS_PROGRAM::NFSPROC3_RENAME, &args);
        let refused = match tried.await? {
            Tried::Done(_) => return Ok(()),
            Tried::Refused(status) => Some(status),
            Tried::Lost => None,
        };
        if effort.has_lost() {
            if has(shared, to).await? == Some(id) {
                return Ok(());
            }
            // Nobody else's file is moved by the next try.
            if has(shared, from).await? != Some(id) {
                return Err(Fault::Status(nfsstat3::NFS3ERR_NOENT));
            }
        }
        if let Some(status) = refused {
            return Err(Fault::Status(status));
        }
    }
}

/// Gives a file one more name.
pub(super) async fn link(shared: &Shared, file: &Found, to: &StorePath) -> Result<()> {
    renewed!(shared, link_at(shared, &file.handle, file.stat.id, to))
}

async fn link_at(shared: &Shared, file: &nfs_fh3, id: FileId, to: &StorePath) -> Result<()> {
    let target = shared.place(to).await?;
    let args = LINK3args { file: file.clone(), link: target.args() };
    let mut effort = shared.pool.effort()?;
    loop {
        let tried = effort.call::<_, LINK3resok, LINK3resfail>(NFS_PROGRAM::NFSPROC3_LINK, &args);
        let refused = match tried.await? {
            Tried::Done(_) => return Ok(()),
            Tried::Refused(status) => Some(status),
            Tried::Lost => None,
        };
        if effort.has_lost() && has(shared, to).await? == Some(id) {
            return Ok(());
        }
        match refused {
            // As systems say it of file systems that have none.
            Some(status @ (nfsstat3::NFS3ERR_NOTSUPP | nfsstat3::NFS3ERR_PERM)) => {
                return Err(Fault::Lacking(format!("the server has no hard links here ({status})")));
            }
            Some(status) => return Err(Fault::Status(status)),
            None => {}
        }
    }
}

/// Which file has a name now.
async fn has(shared: &Shared, path: &StorePath) -> Result<Option<FileId>> {
    match look(shared, path).await {
        Ok(found) => Ok(Some(found.stat.id)),
        Err(Fault::Status(nfsstat3::NFS3ERR_NOENT | nfsstat3::NFS3ERR_NOTDIR)) => Ok(None),
        Err(fault) => Err(fault),
    }
}

/// What has a name. Nothing is taken from what was known before, and a handle that the server lost is found again here: a
/// call that this is asked for must not be begun anew because of it.
pub(super) async fn look(shared: &Shared, path: &StorePath) -> Result<Found> {
    renewed!(shared, look_at(shared, path))
}

async fn look_at(shared: &Shared, path: &StorePath) -> Result<Found> {
    if path.is_root() {
        return shared.find(path).await;
    }
    let place = shared.place(path).await?;
    look_up(&shared.pool, &place.directory, &place.name).await
}
