//! The export as the trait has it: what is looked at before a call, and what its errors mean.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use nfs3_client::nfs3_types::nfs3::{FSSTAT3args, FSSTAT3resfail, FSSTAT3resok, NFS_PROGRAM, nfsstat3};

use super::access::Access;
use super::fault::Fault;
use super::file::NfsFile;
use super::list::{Budget, Walk};
use super::resolve::Found;
use super::{Nfs3Store, Shared, list, locks, naming, probe, unstable};
use crate::backend::{
    Backend, BackendError, Capabilities, DirEntry, FileKind, LockKind, Result, Space, Stat, StoreFile,
    WalkEntry,
};
use crate::ids::StorePath;

/// Looks at a file; once more, if this process wrote to it and the server had not answered all of that before.
macro_rules! once_answered {
    ($shared:expr, $path:expr, $look:expr) => {{
        let before = $shared.writers.ended();
        let found = $look.await?;
        if answered(&$shared, &$path, &found, before).await? { $look.await } else { Ok(found) }
    }};
}

impl Nfs3Store {
    /// What has a name, for a look at it. If this process writes to it, as it is once the server has answered.
    fn find(&self, action: &'static str, path: &StorePath) -> Result<Found> {
        self.ask(action, path, async |shared: Arc<Shared>, path: StorePath| {
            once_answered!(shared, path, shared.find(&path))
        })
    }

    /// What has a name, before something is changed; likewise.
    fn look(&self, action: &'static str, path: &StorePath) -> Result<Found> {
        self.ask(action, path, async |shared: Arc<Shared>, path: StorePath| {
            once_answered!(shared, path, naming::look(&shared, &path))
        })
    }

    /// The same; it must be a regular file.
    fn plain(&self, action: &'static str, path: &StorePath) -> Result<Found> {
        plain(self.look(action, path)?, path)
    }

    /// Who this is for the server.
    pub(super) fn user(&self) -> u32 {
        self.core.shared.uid
    }

    /// Moves what is known by `found`. What has no name any more is the old name's fault.
    fn move_to(&self, from: &StorePath, to: &StorePath, found: &Found) -> Result<()> {
        let (old, id) = (from.clone(), found.stat.id);
        let moved = self.ask("replace", to, async move |shared: Arc<Shared>, to: StorePath| {
            naming::rename(&shared, &old, &to, id).await
        });
        moved.map_err(|error| match error {
            BackendError::NotFound { .. } if self.stat(&to.parent()).is_ok() => {
                BackendError::NotFound { path: from.to_string() }
            }
            error => error,
        })
    }
}

/// Waits for the answers to what this process wrote to a file. Gives whether the file is to be looked at again: if there was
/// anything to wait for, or came while it was looked at (as many writes were answered `before` that).
async fn answered(
    shared: &Arc<Shared>,
    path: &StorePath,
    found: &Found,
    before: usize,
) -> super::Asked<bool> {
    let Some(file) = shared.writers.under_way(&found.handle) else {
        return Ok(shared.writers.ended() != before);
    };
    let handle = Arc::new(Mutex::new(found.handle.clone()));
    let access = Access { shared: shared.clone(), path: path.clone(), id: found.stat.id, handle };
    unstable::answered(&access, &file).await?;
    Ok(true)
}

fn plain(found: Found, path: &StorePath) -> Result<Found> {
    if found.stat.kind != FileKind::File {
        return Err(BackendError::NotPlain { path: path.to_string() });
    }
    Ok(found)
}

impl Backend for Nfs3Store {
    fn describe(&self) -> String {
        self.core.shared.shown.clone()
    }

    fn read_only(&self) -> bool {
        self.core.shared.read_only
    }

    fn open(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        let found = plain(self.find("open", path)?, path)?;
        Ok(Arc::new(NfsFile::new(self.core.clone(), path.clone(), &found)))
    }

    fn open_writable(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        let action = "open for writing";
        let found = self.plain(action, path)?;
        let handle = found.handle.clone();
        let may = self.ask(action, path, async move |shared: Arc<Shared>, _: StorePath| {
            probe::may_write(&shared.pool, &handle).await
        })?;
        if may {
            return Ok(Arc::new(NfsFile::writable(self.core.clone(), path.clone(), &found)));
        }
        let status = if self.read_only() { nfsstat3::NFS3ERR_ROFS } else { nfsstat3::NFS3ERR_ACCES };
        Err(self.core.shared.explain(Fault::Status(status)).at(action, path))
    }

    fn create(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        let found = self.ask("create", path, async |shared: Arc<Shared>, path: StorePath| {
            naming::create(&shared, &path).await
        })?;
        Ok(Arc::new(NfsFile::writable(self.core.clone(), path.clone(), &found)))
    }

    fn stat(&self, path: &StorePath) -> Result<Stat> {
        self.find("look at", path).map(|found| found.stat)
    }

    fn read_dir(&self, path: &StorePath) -> Result<Vec<DirEntry>> {
        let listed = self.ask("list", path, async |shared: Arc<Shared>, path: StorePath| {
            shared.list(&path, &Budget::default()).await
        })?;
        Ok(listed.into_iter().map(|listed| listed.entry).collect())
    }

    fn walk(
        &self,
        path: &StorePath,
        max_depth: usize,
        skip: &dyn Fn(&StorePath) -> bool,
    ) -> Vec<Result<WalkEntry>> {
        let start = self
            .ask("list", path, async |shared: Arc<Shared>, path: StorePath| shared.directory(&path).await);
        let start = match start {
            Ok(handle) => (path.clone(), handle),
            Err(error) => return vec![Err(error)],
        };
        let shared = &self.core.shared;
        let level = |level: list::Level| self.core.wait(level.list()).unwrap_or_default();
        Walk::run(shared, start, max_depth, skip, level).entries()
    }

    fn create_dir(&self, path: &StorePath, private: bool) -> Result<()> {
        if path.is_root() {
            return Err(BackendError::AlreadyExists { path: path.to_string() });
        }
        let bits = if private { 0o700 } else { 0o755 };
        self.ask("create", path, async move |shared: Arc<Shared>, path: StorePath| {
            naming::create_dir(&shared, &path, bits).await
        })
    }

    fn remove_file(&self, path: &StorePath) -> Result<()> {
        self.ask("remove", path, async |shared: Arc<Shared>, path: StorePath| {
            naming::remove(&shared, &path, FileKind::File).await
        })
    }

    fn remove_dir(&self, path: &StorePath) -> Result<()> {
        self.ask("remove", path, async |shared: Arc<Shared>, path: StorePath| {
            naming::remove(&shared, &path, FileKind::Directory).await?;
            shared.names.forget();
            Ok(())
        })
    }

    fn rename(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        let found = self.plain("rename", from)?;
        match self.plain("replace", to) {
            // Two names of one file stay, as on every store.
            Ok(target) if target.stat.id == found.stat.id => Ok(()),
            Ok(_) | Err(BackendError::NotFound { .. }) => self.move_to(from, to, &found),
            Err(error) => Err(error),
        }
    }

    fn exchange(&self, a: &StorePath, _b: &StorePath) -> Result<()> {
        let lacking = Fault::Lacking("NFSv3 cannot exchange names".to_owned());
        Err(lacking.at("exchange", a))
    }

    fn rename_dir(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        let found = self.look("rename", from)?;
        if found.stat.kind != FileKind::Directory {
            return Err(BackendError::NotPlain { path: from.to_string() });
        }
        match self.look("replace", to) {
            Ok(target) if target.stat.kind != FileKind::Directory => {
                return Err(BackendError::AlreadyExists { path: to.to_string() });
            }
            Ok(_) | Err(BackendError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        let moved = self.move_to(from, to, &found);
        self.core.shared.names.forget();
        moved.map_err(|error| match error {
            BackendError::Io { source, .. } if source.kind() == io::ErrorKind::DirectoryNotEmpty => {
                BackendError::AlreadyExists { path: to.to_string() }
            }
            error => error,
        })
    }

    fn hard_link(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        let found = self.plain("link", from)?;
        if !self.core.shared.links {
            let lacking = Fault::Lacking("the server says that it has no hard links".to_owned());
            return Err(lacking.at("link", to));
        }
        self.ask("create", to, async move |shared: Arc<Shared>, to: StorePath| {
            naming::link(&shared, &found, &to).await
        })
    }

    /// They are durable since the server answered (RFC 1813, section 4.8): this only looks whether the directory is there.
    fn sync_dir(&self, path: &StorePath) -> Result<()> {
        self.ask("sync", path, async |shared: Arc<Shared>, path: StorePath| shared.directory(&path).await)
            .map(drop)
    }

    fn space(&self) -> Result<Space> {
        let root = StorePath::root();
        let told = self.ask("ask the space of", &root, async |shared: Arc<Shared>, path: StorePath| {
            let once = async || {
                let args = FSSTAT3args { fsroot: shared.find(&path).await?.handle };
                shared.pool.ask::<_, FSSTAT3resok, FSSTAT3resfail>(NFS_PROGRAM::NFSPROC3_FSSTAT, &args).await
            };
            renewed!(shared, once())
        })?;
        Ok(Space { free_bytes: told.abytes, total_bytes: told.tbytes })
    }

    fn try_lock(&self, path: &StorePath, kind: LockKind) -> Result<Option<Box<dyn Send + Sync>>> {
        match self.plain("lock", path) {
            Err(BackendError::NotFound { .. }) => match self.create(path) {
                Ok(_) | Err(BackendError::AlreadyExists { .. }) => {}
                Err(error) => return Err(error),
            },
            found => drop(found?),
        }
        Ok(locks::try_lock(&self.core.shared.url, path, kind))
    }

    /// A mount has its own locks.
    fn seen_from(&self, host: &str) -> String {
        format!("{host}, by {}", self.core.shared.shown)
    }

    fn local_path(&self, _path: &StorePath) -> Option<PathBuf> {
        None
    }

    fn of_known(&self, found: Capabilities) -> Capabilities {
        Capabilities { hard_links: found.hard_links && self.core.shared.links, ..probe::NOTHING }
    }

    fn probe(&self, scratch: &StorePath) -> Result<Capabilities> {
        probe::probe(self, scratch)
    }
}
