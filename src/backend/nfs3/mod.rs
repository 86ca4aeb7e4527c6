//! A store that is an NFSv3 export, without a mount.
//!
//! For machines that may not mount: a workstation, a container. All that a mount of the export can be used for by
//! qchain can be done this way, with what NFSv3 has: neither locks nor clones.
//!
//! | file | owns |
//! |---|---|
//! | `url` | `nfs://host[:port]/export?...` |
//! | `wire` | replies, each length held against what may be |
//! | `connection` | TCP and records |
//! | `pool` | connections and time limits |
//! | `effort` | the tries of one call, and whether one of them may have been done |
//! | `mount` | from the export's name to a handle |
//! | `resolve` | names to handles, no link followed |
//! | `list` | directories |
//! | `naming` | calls that give and take names, each of which takes effect once |
//! | `access` | calls about one file |
//! | `ahead` | what is read before it is asked for |
//! | `unstable` | what is written and not durable yet, written again if the server lost it |
//! | `writers` | the files of which there is any of that |
//! | `attributes` | owner, mode, length |
//! | `store`, `file`, `moves` | the traits |
//! | `locks` | locks that this host alone sees |
//! | `probe` | what the server can do |
//!
//! All calls block, none for longer than the URL's `timeout` (60 s) for each call of the protocol in it; tokio's two
//! threads do the input and output, and nobody outside sees them. Credentials are `AUTH_UNIX`: this process's user and
//! groups, or those of the URL. Root comes from a port below 1024, as servers may insist on; anybody else cannot.
//!
//! Crash rule: names are durable when the server answers (RFC 1813, section 4.8, has it so; an export with `async` lies
//! about it), bytes when [`StoreFile::sync`](super::StoreFile::sync) returns: after a COMMIT by the very incarnation of the server that took
//! them. A server that ends in between loses nothing, as all is kept and written again; a process that ends before does,
//! as with every store. A write is under way when [`StoreFile::write_at`](super::StoreFile::write_at) returns, up to eight of a file at once, or held until
//! what follows it comes; what becomes of it is told by a later one or by the sync. Whoever closes a file waits until the server has answered.
//!
//! What a mount has and this has not: locks that others see ([`Backend::try_lock`](super::Backend::try_lock) excludes processes of this user on this host),
//! extended attributes and ACLs (a file that is replaced loses those that the server has), reserved space, holes punched,
//! names exchanged, files that stay while they are open. A call that a stalled server was asked and that was given up
//! after the time-out may still be done when it goes on: whoever got [`BackendError::Unreachable`] has to look, as after a
//! crash. Facts are asked afresh each time, but for the place of a directory, which reads know for three seconds.

/// Makes a call; once more, with handles from a new root, if the server lost one on the way.
macro_rules! renewed {
    ($shared:expr, $call:expr) => {
        match $call.await {
            Err(fault) if fault.is_stale() => {
                $shared.mount_again().await?;
                $call.await
            }
            done => done,
        }
    };
}

mod access;
mod ahead;
mod attributes;
mod connection;
mod effort;
mod fault;
mod file;
mod list;
mod locks;
mod mount;
mod moves;
mod naming;
mod pool;
mod probe;
mod resolve;
mod store;
mod unstable;
mod url;
mod wire;
mod writers;

use std::fmt::Debug;
use std::net::ToSocketAddrs as _;
use std::sync::Arc;
use std::sync::mpsc;

use nfs3_client::nfs3_types::nfs3::{
    FSF3_LINK, FSINFO3args, FSINFO3resfail, FSINFO3resok, NFS_PROGRAM, nfs_fh3, nfsstat3,
};
use nfs3_client::nfs3_types::rpc::{auth_unix, opaque_auth};
use nfs3_client::nfs3_types::xdr_codec::Opaque;
use rustix::process;
use tokio::runtime::{Builder, Runtime};

pub use self::url::{NfsUrl, UrlError};

use self::fault::{Fault, Result as Asked};
use self::list::{Budget, Listed};
use self::pool::{Peer, Pool};
use self::resolve::{Found, Names, Place};
use self::writers::Writers;
use super::{BackendError, Result, Stat};
use crate::ids::StorePath;

/// How many threads do input and output.
const THREADS: usize = 2;
/// The most groups that `AUTH_UNIX` can name.
const MOST_GROUPS: usize = 16;
/// The least that is asked for in one read, whatever the server says.
const LEAST_READ_BYTES: usize = 4096;
/// The least that is sent in one write: a server that says less says nothing.
const LEAST_WRITE_BYTES: usize = 512;

/// An export, without a mount.
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
    /// How much is sent in one write.
    write_bytes: usize,
    /// Whether the server has hard links, as far as it says.
    links: bool,
    /// Whether this user may not write to the root: the export is one that is only read, or it is not his.
    read_only: bool,
    /// Who this is for the server.
    uid: u32,
    writers: Writers,
    /// How much is read ahead.
    ahead: ahead::Held,
}

/// What is known once an export is mounted.
struct Begun {
    root: nfs_fh3,
    pool: Pool,
    read_bytes: usize,
    write_bytes: usize,
    links: bool,
    read_only: bool,
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
        let Begun { root, pool, read_bytes, write_bytes, links, read_only } =
            begun.map_err(|fault| fault.at("mount", &shown))??;
        let shared = Shared {
            names: Names::new(root),
            uid: user(url),
            url: url.clone(),
            connections: url.connections,
            writers: Writers::default(),
            ahead: ahead::Held::default(),
            shown,
            peer,
            pool,
            read_bytes,
            write_bytes,
            links,
            read_only,
        };
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
        done.and_then(|done| done).map_err(|fault| self.core.shared.explain(fault).at(action, path))
    }
}

/// Mounts, and asks what the server can take.
async fn begin(url: NfsUrl, peer: Peer, pool: Pool) -> Result<Begun> {
    let root = mount::root(&url, &peer).await?;
    pool.begin().await.map_err(|error| BackendError::Unreachable {
        store: peer.store.clone(),
        detail: format!("the NFS service of {}, port {}, cannot be reached: {error}", url.host, url.port),
    })?;
    let args = FSINFO3args { fsroot: root.clone() };
    let told = pool.ask::<_, FSINFO3resok, FSINFO3resfail>(NFS_PROGRAM::NFSPROC3_FSINFO, &args).await;
    let told = told.map_err(|fault| fault.at("look at", &peer.store))?;
    let may_write = probe::may_write(&pool, &root).await.map_err(|fault| fault.at("look at", &peer.store))?;
    // Some prefer little and can do more.
    let most =
        |told: u32, least| usize::try_from(told).unwrap_or(usize::MAX).clamp(least, wire::MAX_DATA_BYTES);
    Ok(Begun {
        root,
        pool,
        read_bytes: most(told.rtmax, LEAST_READ_BYTES),
        write_bytes: most(told.wtmax, LEAST_WRITE_BYTES),
        links: told.properties & FSF3_LINK != 0,
        read_only: !may_write,
    })
}

/// Who this is for the server.
fn user(url: &NfsUrl) -> u32 {
    url.uid.unwrap_or_else(|| process::geteuid().as_raw())
}

/// Who we are, for the server.
fn credential(url: &NfsUrl) -> opaque_auth<'static> {
    let own = url.uid.is_none() && url.gid.is_none();
    let groups = if own { process::getgroups().unwrap_or_default() } else { Vec::new() };
    let host = rustix::system::uname().nodename().to_bytes().to_vec();
    opaque_auth::auth_unix(&auth_unix {
        stamp: std::process::id(),
        machinename: Opaque::owned(host.into_iter().take(255).collect()),
        uid: user(url),
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

    /// Leaves work to the threads.
    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(runtime) = &self.runtime {
            runtime.spawn(work);
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
    /// What has a name.
    async fn find(&self, path: &StorePath) -> Asked<Found> {
        renewed!(self, self.names.find(&self.pool, path))
    }

    async fn find_afresh(&self, path: &StorePath) -> Asked<Found> {
        self.mount_again().await?;
        self.names.find(&self.pool, path).await
    }

    /// The names in a directory.
    async fn list(&self, path: &StorePath, budget: &Budget) -> Asked<Vec<Listed>> {
        let once = async || list::list(self, &self.names.directory(&self.pool, path).await?, budget).await;
        renewed!(self, once())
    }

    async fn directory(&self, path: &StorePath) -> Asked<nfs_fh3> {
        renewed!(self, self.names.directory(&self.pool, path))
    }

    async fn mount_again(&self) -> Asked<()> {
        let root = mount::root(&self.url, &self.peer).await.map_err(|error| Fault::Silent {
            store: self.shown.clone(),
            detail: format!("the export could not be mounted again: {error}"),
        })?;
        self.names.begin_again(root);
        Ok(())
    }

    /// The directory of a name, and the name in it.
    async fn place(&self, path: &StorePath) -> Asked<Place> {
        self.names.place(&self.pool, path, false).await
    }

    /// The same, as it was a moment ago.
    async fn known_place(&self, path: &StorePath) -> Asked<Place> {
        self.names.place(&self.pool, path, true).await
    }

    /// Whether it belongs to who we are for the server, or to whom it makes of root.
    fn is_own(&self, stat: &Stat) -> bool {
        stat.uid == self.uid || self.uid == 0
    }

    /// With what may be behind it.
    fn explain(&self, fault: Fault) -> Fault {
        match fault {
            Fault::Status(status @ (nfsstat3::NFS3ERR_ACCES | nfsstat3::NFS3ERR_PERM)) if self.uid == 0 => {
                Fault::Denied(format!(
                    "the server refuses it to this user ({status}), who is root here: it may map root to somebody else \
                     (root squash)"
                ))
            }
            fault => fault,
        }
    }
}
