//! A store that is an NFSv3 export, read without a mount.
//!
//! For looks from a machine that may not mount: `list`, `map`, `digest`, `verify`, `audit`. Everything that would
//! change the store is refused ([`BackendError::ReadOnly`]), so nothing has to be known of what became of a call
//! without an answer: every call made can be made again.
//!
//! | file | owns |
//! |---|---|
//! | `url` | `nfs://host[:port]/export?...` |
//! | `wire` | replies, each length held against what may be |
//! | `connection` | TCP and records |
//! | `pool` | connections, time limits, tries |
//! | `mount` | from the export's name to a handle |
//! | `resolve` | names to handles, no link followed |
//! | `list` | directories |
//! | `file` | reads |
//!
//! All calls block, none for longer than the URL's `timeout` (60 s) for each call of the protocol in it; tokio's two
//! threads do the input and output, and nobody outside sees them. Credentials are `AUTH_UNIX`: this process's user and
//! groups, or those of the URL. Root comes from a port below 1024, as servers may insist on; anybody else cannot.
//!
//! What a mount has and this has not: locks of any kind, extended attributes, files that stay while they are open.
//! Facts are asked afresh each time, but for the place of a directory, which is known for three seconds.

mod connection;
mod fault;
mod file;
mod list;
mod mount;
mod pool;
mod resolve;
mod url;
mod wire;

use std::fmt::Debug;
use std::net::ToSocketAddrs as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;

use nfs3_client::nfs3_types::nfs3::{
    FSINFO3args, FSINFO3resfail, FSINFO3resok, FSSTAT3args, FSSTAT3resfail, FSSTAT3resok, NFS_PROGRAM,
    nfs_fh3,
};
use nfs3_client::nfs3_types::rpc::{auth_unix, opaque_auth};
use nfs3_client::nfs3_types::xdr_codec::Opaque;
use rustix::process;
use tokio::runtime::{Builder, Runtime};

pub use self::url::{NfsUrl, UrlError};

use self::fault::{Fault, Result as Asked};
use self::file::NfsFile;
use self::list::{Listed, Walk};
use self::pool::{Peer, Pool};
use self::resolve::{Found, Names};
use super::{
    Backend, BackendError, Capabilities, DirEntry, FileKind, LockKind, Result, Space, Stat, StoreFile,
    WalkEntry,
};
use crate::ids::StorePath;

/// How many threads do input and output.
const THREADS: usize = 2;
/// The most groups that `AUTH_UNIX` can name.
const MOST_GROUPS: usize = 16;
/// The least that is asked for in one read, whatever the server prefers.
const LEAST_READ_BYTES: usize = 4096;

/// An export, read without a mount.
#[derive(Debug)]
pub struct Nfs3Store {
    core: Arc<Core>,
}

/// The threads, and what they work with.
#[derive(Debug)]
struct Core {
    shared: Arc<Shared>,
    /// There until the end.
    runtime: Option<Runtime>,
}

/// What tasks share.
#[derive(Debug)]
struct Shared {
    shown: String,
    url: NfsUrl,
    peer: Peer,
    pool: Pool,
    names: Names,
    connections: usize,
    /// How much is asked for in one read.
    read_bytes: usize,
}

impl Nfs3Store {
    /// Mounts the export for this process: asks for its root's handle and for what the server prefers.
    ///
    /// Blocks, at most for the URL's time-out, and for as long as the system takes to resolve the host's name.
    /// [`BackendError::Unreachable`] if there is no server, [`BackendError::NotFound`] if it has no such export, an
    /// input/output error with the server's reason if it refuses.
    pub fn open(url: &NfsUrl) -> Result<Self> {
        let shown = url.to_string();
        let unreachable = |detail: String| BackendError::Unreachable { store: shown.clone(), detail };
        let found = (url.host.as_str(), url.port).to_socket_addrs();
        let addresses = found.map_err(|error| unreachable(format!("{} is not known: {error}", url.host)))?;
        let peer = Peer {
            store: shown.clone(),
            addresses: addresses.collect(),
            reserved: process::geteuid().is_root(),
            credential: credential(url),
        };
        let started =
            Builder::new_multi_thread().worker_threads(THREADS).thread_name("nfs3").enable_all().build();
        let runtime = started.map_err(|source| BackendError::Io {
            action: "start threads for",
            path: shown.clone(),
            source,
        })?;
        let pool = Pool::new(peer.clone(), url.timeout, url.connections);
        let begun = wait(&runtime, begin(url.clone(), peer.clone(), pool));
        let (root, pool, read_bytes) = begun.map_err(|fault| fault.at("mount", &shown))??;
        let names = Names::new(root);
        let (url, connections) = (url.clone(), url.connections);
        let shared = Shared { shown, url, peer, pool, names, connections, read_bytes };
        Ok(Self { core: Arc::new(Core { shared: Arc::new(shared), runtime: Some(runtime) }) })
    }

    /// Makes a call for a path, and waits for it.
    fn ask<T, F>(
        &self,
        action: &'static str,
        path: &StorePath,
        call: impl FnOnce(Arc<Shared>, StorePath) -> F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Asked<T>> + Send + 'static,
    {
        let done = self.core.wait(call(self.core.shared.clone(), path.clone()));
        done.and_then(|done| done).map_err(|fault| fault.at(action, path))
    }
}

/// The root's handle, and how much to ask for in one read.
async fn begin(url: NfsUrl, peer: Peer, pool: Pool) -> Result<(nfs_fh3, Pool, usize)> {
    let root = mount::root(&url, &peer).await?;
    pool.begin().await.map_err(|error| BackendError::Unreachable {
        store: peer.store.clone(),
        detail: format!("the NFS service of {}, port {}, cannot be reached: {error}", url.host, url.port),
    })?;
    let args = FSINFO3args { fsroot: root.clone() };
    let told = pool.ask::<_, FSINFO3resok, FSINFO3resfail>(NFS_PROGRAM::NFSPROC3_FSINFO, &args).await;
    let told = told.map_err(|fault| fault.at("look at", &peer.store))?;
    // Some prefer little and can do more.
    let most = usize::try_from(told.rtmax).unwrap_or(usize::MAX);
    Ok((root, pool, most.clamp(LEAST_READ_BYTES, wire::MAX_DATA_BYTES)))
}

/// Who we are, for the server.
fn credential(url: &NfsUrl) -> opaque_auth<'static> {
    let own = url.uid.is_none() && url.gid.is_none();
    let groups = if own { process::getgroups().unwrap_or_default() } else { Vec::new() };
    let host = rustix::system::uname().nodename().to_bytes().to_vec();
    opaque_auth::auth_unix(&auth_unix {
        stamp: std::process::id(),
        machinename: Opaque::owned(host.into_iter().take(255).collect()),
        uid: url.uid.unwrap_or_else(|| process::geteuid().as_raw()),
        gid: url.gid.unwrap_or_else(|| process::getegid().as_raw()),
        gids: groups.into_iter().map(process::Gid::as_raw).take(MOST_GROUPS).collect(),
    })
}

/// Runs a future on the threads of the runtime, and blocks until it is done. (Run on the calling thread it is a
/// fourth as fast.)
fn wait<T: Send + 'static>(runtime: &Runtime, work: impl Future<Output = T> + Send + 'static) -> Asked<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    runtime.spawn(async move {
        // Whoever waited has gone only if the process ends.
        let _ = sender.send(work.await);
    });
    receiver.recv().map_err(|_| Fault::Garbled("the call's thread has ended".to_owned()))
}

impl Core {
    fn wait<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Asked<T> {
        match &self.runtime {
            Some(runtime) => wait(runtime, work),
            None => Err(Fault::Garbled("the store was closed".to_owned())),
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // Waits for nobody: there is nothing left to be done.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Shared {
    /// What has a name; looked up once more, from a new root, if the server lost a handle on the way.
    async fn find(&self, path: &StorePath) -> Asked<Found> {
        match self.names.find(&self.pool, path).await {
            Err(fault) if fault.is_stale() => self.find_afresh(path).await,
            found => found,
        }
    }

    async fn find_afresh(&self, path: &StorePath) -> Asked<Found> {
        self.mount_again().await?;
        self.names.find(&self.pool, path).await
    }

    /// The names in a directory.
    async fn list(&self, path: &StorePath) -> Asked<Vec<Listed>> {
        let once = async || list::list(self, &self.names.directory(&self.pool, path).await?).await;
        match once().await {
            Err(fault) if fault.is_stale() => {
                self.mount_again().await?;
                once().await
            }
            listed => listed,
        }
    }

    async fn directory(&self, path: &StorePath) -> Asked<nfs_fh3> {
        match self.names.directory(&self.pool, path).await {
            Err(fault) if fault.is_stale() => {
                self.mount_again().await?;
                self.names.directory(&self.pool, path).await
            }
            found => found,
        }
    }

    async fn mount_again(&self) -> Asked<()> {
        let root = mount::root(&self.url, &self.peer).await.map_err(|error| Fault::Silent {
            store: self.shown.clone(),
            detail: format!("the export could not be mounted again: {error}"),
        })?;
        self.names.begin_again(root);
        Ok(())
    }
}

/// The refusal of all that changes something.
fn read_only(action: &'static str, path: &StorePath) -> BackendError {
    BackendError::ReadOnly { action, path: path.to_string() }
}

impl Backend for Nfs3Store {
    fn describe(&self) -> String {
        self.core.shared.shown.clone()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn open(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        let found =
            self.ask("open", path, async |shared: Arc<Shared>, path: StorePath| shared.find(&path).await)?;
        if found.stat.kind != FileKind::File {
            return Err(BackendError::NotPlain { path: path.to_string() });
        }
        Ok(Arc::new(NfsFile::new(self.core.clone(), path.clone(), found)))
    }

    fn open_writable(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        Err(read_only("open for writing", path))
    }

    fn create(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        Err(read_only("create", path))
    }

    fn stat(&self, path: &StorePath) -> Result<Stat> {
        let found =
            self.ask("look at", path, async |shared: Arc<Shared>, path: StorePath| shared.find(&path).await);
        found.map(|found| found.stat)
    }

    fn read_dir(&self, path: &StorePath) -> Result<Vec<DirEntry>> {
        let listed =
            self.ask("list", path, async |shared: Arc<Shared>, path: StorePath| shared.list(&path).await)?;
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

    fn create_dir(&self, path: &StorePath, _private: bool) -> Result<()> {
        Err(read_only("create", path))
    }

    fn remove_file(&self, path: &StorePath) -> Result<()> {
        Err(read_only("remove", path))
    }

    fn remove_dir(&self, path: &StorePath) -> Result<()> {
        Err(read_only("remove", path))
    }

    fn rename(&self, from: &StorePath, _to: &StorePath) -> Result<()> {
        Err(read_only("rename", from))
    }

    fn exchange(&self, a: &StorePath, _b: &StorePath) -> Result<()> {
        Err(read_only("exchange", a))
    }

    fn hard_link(&self, from: &StorePath, _to: &StorePath) -> Result<()> {
        Err(read_only("link", from))
    }

    fn sync_dir(&self, path: &StorePath) -> Result<()> {
        Err(read_only("sync", path))
    }

    fn space(&self) -> Result<Space> {
        let root = StorePath::root();
        let told = self.ask("ask the space of", &root, async |shared: Arc<Shared>, path: StorePath| {
            let fsroot = shared.find(&path).await?.handle;
            let args = FSSTAT3args { fsroot };
            shared.pool.ask::<_, FSSTAT3resok, FSSTAT3resfail>(NFS_PROGRAM::NFSPROC3_FSSTAT, &args).await
        })?;
        Ok(Space { free_bytes: told.abytes, total_bytes: told.tbytes })
    }

    fn try_lock(&self, path: &StorePath, _kind: LockKind) -> Result<Option<Box<dyn Send + Sync>>> {
        Err(read_only("lock", path))
    }

    fn local_path(&self, _path: &StorePath) -> Option<PathBuf> {
        None
    }

    fn probe(&self, scratch: &StorePath) -> Result<Capabilities> {
        Err(read_only("try out", scratch))
    }
}
