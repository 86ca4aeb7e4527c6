//! Calls over a few connections, until there is an answer or the time is up.
//!
//! Only calls that change nothing are made, so each may be sent again. A connection has one call in flight; there
//! are up to eight, made as they are needed. One that failed, or whose call was given up, is dropped: what comes on
//! it later would be taken for the answer to something else.
//!
//! Time: a call ends within the time-out, whatever happens. Within it a silent connection is given up after a
//! quarter, and the call sent again on a new one, as a server that was replaced never answers on the old one. When a
//! call found nobody in all that time, those that follow fail at once for a moment, and soon after it, until one is
//! answered: a scan of thousands of files does not wait for each.

use std::fmt::Debug;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nfs3_client::nfs3_types::nfs3::{NFS_PROGRAM, Nfs3Result, PROGRAM, VERSION, nfsstat3};
use nfs3_client::nfs3_types::rpc::opaque_auth;
use nfs3_client::nfs3_types::xdr_codec::{Pack, Unpack};
use nfs3_client::rpc::RpcClient;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout_at};

use super::connection::{self, Rpc};
use super::fault::{Broken, Fault, Result};

/// Between two tries, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// How long a try may take at least; the time-out may be shorter.
const LEAST_TRY: Duration = Duration::from_secs(1);
/// After a call that found nobody: how long others are not even tried, and how long they may take then.
const AFTER_SILENCE: Duration = Duration::from_secs(5);

/// Who is called, and as whom.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// What messages call the store.
    pub store: String,
    /// Where the server listens.
    pub addresses: Vec<SocketAddr>,
    /// Whether to come from a port that only root may take.
    pub reserved: bool,
    /// Who we say we are.
    pub credential: opaque_auth<'static>,
}

/// The connections to one server.
pub(super) struct Pool {
    peer: Peer,
    timeout: Duration,
    slots: Semaphore,
    idle: Mutex<Vec<Rpc>>,
    /// Since when, and why, the server is held for dead.
    silent: Mutex<Option<(Instant, String)>>,
}

impl Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("peer", &self.peer.addresses).finish_non_exhaustive()
    }
}

impl Pool {
    /// Connects to nobody yet.
    pub(super) fn new(peer: Peer, timeout: Duration, connections: usize) -> Self {
        let slots = Semaphore::new(connections);
        Self { peer, timeout, slots, idle: Mutex::default(), silent: Mutex::default() }
    }

    /// Makes the first connection. Fails at once if there is nobody.
    pub(super) async fn begin(&self) -> io::Result<()> {
        let connected = tokio::time::timeout(self.timeout, self.connect()).await;
        let rpc = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        lock(&self.idle).push(rpc);
        Ok(())
    }

    /// Makes a call that changes nothing. Ends within the time-out.
    pub(super) async fn ask<C, T, E>(&self, procedure: NFS_PROGRAM, args: &C) -> Result<T>
    where
        C: Pack + Send + Sync,
        T: Send,
        E: Send,
        Nfs3Result<T, E>: Unpack,
    {
        let timeout = self.patience()?;
        let deadline = Instant::now() + timeout;
        let mut pause = PAUSES.0;
        loop {
            let why = match self.once::<C, T, E>(procedure, args, deadline).await {
                Ok(Nfs3Result::Ok(reply)) => return Ok(reply),
                Ok(Nfs3Result::Err((status @ nfsstat3::NFS3ERR_JUKEBOX, _))) => {
                    if Instant::now() + PAUSES.0 >= deadline {
                        return Err(Fault::Status(status));
                    }
                    "it asked to be asked later".to_owned()
                }
                Ok(Nfs3Result::Err((status, _))) => return Err(Fault::Status(status)),
                Err(Failed { broken: Broken::Final(fault), .. }) => return Err(fault),
                // It had died before, with the server of then.
                Err(Failed { reused: true, .. }) if Instant::now() < deadline => continue,
                Err(Failed { broken: Broken::Lost(error), .. }) => error.to_string(),
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left < PAUSES.0 {
                return Err(self.give_up(timeout, &why));
            }
            tracing::debug!("{}: {why}; trying again", self.peer.store);
            // Towards the end more often, so that the last try is not long before it.
            sleep(pause.min(left / 2)).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    async fn once<C, T, E>(
        &self,
        procedure: NFS_PROGRAM,
        args: &C,
        deadline: Instant,
    ) -> std::result::Result<Nfs3Result<T, E>, Failed>
    where
        C: Pack + Send + Sync,
        T: Send,
        E: Send,
        Nfs3Result<T, E>: Unpack,
    {
        let late = |what: &str| Broken::Lost(io::Error::new(io::ErrorKind::TimedOut, what));
        let fresh = |broken| Failed { broken, reused: false };
        let Ok(Ok(_slot)) = timeout_at(deadline, self.slots.acquire()).await else {
            return Err(fresh(late("all connections wait for it")));
        };
        let pooled = lock(&self.idle).pop();
        let reused = pooled.is_some();
        let until = deadline.min(Instant::now() + (self.timeout / 4).max(LEAST_TRY));
        let call = async {
            let mut rpc = match pooled {
                Some(rpc) => rpc,
                None => self.connect().await.map_err(Broken::Lost)?,
            };
            let reply = rpc.call(PROGRAM, VERSION, procedure as u32, args).await;
            Ok::<_, Broken>((rpc, reply?))
        };
        match timeout_at(until, call).await {
            Ok(Ok((rpc, reply))) => {
                lock(&self.idle).push(rpc);
                if let Some((since, _)) = lock(&self.silent).take() {
                    tracing::info!("{}: it answers again, after {:?}", self.peer.store, since.elapsed());
                }
                Ok(reply)
            }
            Ok(Err(broken)) => Err(Failed { broken, reused }),
            Err(_) => Err(fresh(late("no answer"))),
        }
    }

    async fn connect(&self) -> io::Result<Rpc> {
        let wire = connection::connect(&self.peer.addresses, self.peer.reserved).await?;
        Ok(RpcClient::new_with_auth(wire, self.peer.credential.clone(), opaque_auth::default()))
    }

    /// How long a call may take now; fails at once right after one that found nobody.
    fn patience(&self) -> Result<Duration> {
        match &*lock(&self.silent) {
            Some((since, why)) if since.elapsed() < AFTER_SILENCE => {
                Err(Fault::Silent { store: self.peer.store.clone(), detail: why.clone() })
            }
            Some(_) => Ok(self.timeout.min(AFTER_SILENCE)),
            None => Ok(self.timeout),
        }
    }

    fn give_up(&self, waited: Duration, why: &str) -> Fault {
        let detail = format!("no answer within {} s: {why}", waited.as_secs());
        *lock(&self.silent) = Some((Instant::now(), detail.clone()));
        Fault::Silent { store: self.peer.store.clone(), detail }
    }
}

/// A try that gave nothing.
struct Failed {
    broken: Broken,
    /// The connection had been used before.
    reused: bool,
}

/// What is behind it is whole between any two statements.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
