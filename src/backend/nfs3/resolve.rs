//! Names to handles: component by component from the export's root, no link followed.
//!
//! The server looks up one name in one directory at a time, so a link is seen and never followed. Handles of
//! directories are kept for a moment, like a kernel's client does it: whoever renames a directory is seen by then.
//! Names of files are always looked up. A handle that the server does not know any more is looked up again, once,
//! from a root that is mounted afresh.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nfs3_client::nfs3_types::nfs3::{
    GETATTR3args, GETATTR3resok, LOOKUP3args, LOOKUP3resfail, NFS_PROGRAM, diropargs3, fattr3, ftype3,
    nfs_fh3, nfsstat3,
};
use nfs3_client::nfs3_types::xdr_codec::Void;

use super::fault::{Fault, Result};
use super::pool::{Pool, lock};
use super::wire::Looked;
use crate::backend::{FileId, FileKind, Stat};
use crate::ids::StorePath;

/// How long the handle of a directory is kept.
const KEPT: Duration = Duration::from_secs(3);
/// How many of them at most.
const MOST_KEPT: usize = 65_536;

/// Something that has a name.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub handle: nfs_fh3,
    pub stat: Stat,
}

/// A name in a directory, whether or not anything has it.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub directory: nfs_fh3,
    pub name: Vec<u8>,
}

impl Place {
    /// As calls name it.
    pub(super) fn args(&self) -> diropargs3<'_> {
        diropargs3 { dir: self.directory.clone(), name: self.name.as_slice().into() }
    }
}

/// The handles that are known.
#[derive(Debug)]
pub(super) struct Names {
    root: Mutex<nfs_fh3>,
    directories: Mutex<HashMap<StorePath, (nfs_fh3, Instant)>>,
}

impl Names {
    pub(super) fn new(root: nfs_fh3) -> Self {
        Self { root: Mutex::new(root), directories: Mutex::default() }
    }

    /// Another root, and nothing known below it.
    pub(super) fn begin_again(&self, root: nfs_fh3) {
        *lock(&self.root) = root;
        lock(&self.directories).clear();
    }

    /// What has that name; links and special files, too.
    pub(super) async fn find(&self, pool: &Pool, path: &StorePath) -> Result<Found> {
        if path.is_root() {
            let handle = lock(&self.root).clone();
            let stat = stat(pool, &handle).await?;
            return Ok(Found { handle, stat });
        }
        let name = path.file_name().as_bytes();
        match self.find_in(pool, &path.parent(), true, name).await {
            // Of a directory that is gone some servers say that it is empty.
            Err(Fault::Status(nfsstat3::NFS3ERR_NOENT)) if !path.parent().is_root() => {
                self.find_in(pool, &path.parent(), false, name).await
            }
            found => found,
        }
    }

    async fn find_in(&self, pool: &Pool, directory: &StorePath, kept: bool, name: &[u8]) -> Result<Found> {
        let directory = self.walk_to(pool, directory, kept).await?;
        look_up(pool, &directory, name).await
    }

    /// The handle of a directory as it is now. A link in its place or before it is [`Fault::NotPlain`], any other
    /// file as if the directory were missing.
    pub(super) async fn directory(&self, pool: &Pool, path: &StorePath) -> Result<nfs_fh3> {
        self.walk_to(pool, path, false).await
    }

    /// The directory of a name, as it is now, and the name in it. Of the root, which has none, [`Fault::NotPlain`].
    /// With `kept`, where it was a moment ago.
    pub(super) async fn place(&self, pool: &Pool, path: &StorePath, kept: bool) -> Result<Place> {
        if path.is_root() {
            return Err(Fault::NotPlain);
        }
        let directory = self.walk_to(pool, &path.parent(), kept).await?;
        Ok(Place { directory, name: path.file_name().as_bytes().to_vec() })
    }

    /// Forgets what is known of directories: one of them is moved or removed.
    pub(super) fn forget(&self) {
        lock(&self.directories).clear();
    }

    /// The same as [`Names::directory`]; with `kept`, what was known a moment ago will do.
    async fn walk_to(&self, pool: &Pool, path: &StorePath, kept: bool) -> Result<nfs_fh3> {
        let mut at = lock(&self.root).clone();
        let mut here = StorePath::root();
        for name in path.components() {
            here = here.join(name).map_err(|_| Fault::Status(nfsstat3::NFS3ERR_INVAL))?;
            let known = if kept { self.known(&here) } else { None };
            at = if let Some(handle) = known {
                handle
            } else {
                let found = look_up(pool, &at, name.as_bytes()).await?;
                let handle = as_directory(found)?;
                self.keep(&here, &handle);
                handle
            };
        }
        Ok(at)
    }

    fn known(&self, path: &StorePath) -> Option<nfs_fh3> {
        let known = lock(&self.directories);
        known.get(path).filter(|(_, since)| since.elapsed() < KEPT).map(|(handle, _)| handle.clone())
    }

    /// Remembers a directory that was just seen.
    pub(super) fn keep(&self, path: &StorePath, handle: &nfs_fh3) {
        let mut known = lock(&self.directories);
        if known.len() >= MOST_KEPT {
            known.clear();
        }
        known.insert(path.clone(), (handle.clone(), Instant::now()));
    }
}

fn as_directory(found: Found) -> Result<nfs_fh3> {
    match found.stat.kind {
        FileKind::Directory => Ok(found.handle),
        FileKind::Symlink => Err(Fault::NotPlain),
        FileKind::File | FileKind::Special => Err(Fault::Status(nfsstat3::NFS3ERR_NOTDIR)),
    }
}

/// One name in one directory.
pub(super) async fn look_up(pool: &Pool, directory: &nfs_fh3, name: &[u8]) -> Result<Found> {
    let what = diropargs3 { dir: directory.clone(), name: name.into() };
    let looked: Looked =
        pool.ask::<_, _, LOOKUP3resfail>(NFS_PROGRAM::NFSPROC3_LOOKUP, &LOOKUP3args { what }).await?;
    let stat = match &looked.attributes {
        Some(attributes) => stat_of(attributes),
        None => stat(pool, &looked.handle).await?,
    };
    Ok(Found { handle: looked.handle, stat })
}

/// Facts about what a handle stands for.
pub(super) async fn stat(pool: &Pool, handle: &nfs_fh3) -> Result<Stat> {
    let args = GETATTR3args { object: handle.clone() };
    let told: GETATTR3resok = pool.ask::<_, _, Void>(NFS_PROGRAM::NFSPROC3_GETATTR, &args).await?;
    Ok(stat_of(&told.obj_attributes))
}

pub(super) fn kind_of(kind: ftype3) -> FileKind {
    match kind {
        ftype3::NF3REG => FileKind::File,
        ftype3::NF3DIR => FileKind::Directory,
        ftype3::NF3LNK => FileKind::Symlink,
        ftype3::NF3BLK | ftype3::NF3CHR | ftype3::NF3SOCK | ftype3::NF3FIFO => FileKind::Special,
    }
}

pub(super) fn stat_of(attributes: &fattr3) -> Stat {
    let at = |seconds: u32, nanoseconds: u32| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    Stat {
        kind: kind_of(attributes.type_),
        id: FileId { device: attributes.fsid, inode: attributes.fileid },
        length: attributes.size,
        allocated_bytes: attributes.used,
        modified_ns: at(attributes.mtime.seconds, attributes.mtime.nseconds),
        changed_ns: at(attributes.ctime.seconds, attributes.ctime.nseconds),
        links: u64::from(attributes.nlink),
        uid: attributes.uid,
        gid: attributes.gid,
        mode: attributes.mode & 0o7777,
    }
}
