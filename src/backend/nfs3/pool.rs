//! Calls over a few connections, until there is an answer or the time is up.
//!
//! A connection has one call in flight; there are up to eight, made as they are needed. One that failed, or whose call
//! was given up, is dropped: what comes on it later would be taken for the answer to something else. Calls that change
//! nothing are sent again by themselves; what becomes of the others is in `effort`.
//!
//! Time: a call ends within the time-out, whatever happens. Within it a silent connection is given up after a
//! quarter, and the call sent again on a new one, as a server that was replaced never answers on the old one; that of
//! a call that changes something only if the new one is answered. When a
//! call found nobody in all that time, those that follow fail at once for a moment, and soon after it, until one is
//! answered: a scan of thousands of files does not wait for each.

use std::fmt::Debug;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nfs3_client::nfs3_types::nfs3::{NFS_PROGRAM, Nfs3Result, PROGRAM, VERSION};
use nfs3_client::nfs3_types::rpc::opaque_auth;
use nfs3_client::nfs3_types::xdr_codec::{Pack, Unpack, Void};
use nfs3_client::rpc::RpcClient;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use super::connection::{self, Rpc};
use super::effort::{Effort, Tried};
use super::fault::{Broken, Fault, Result};

/// How long a try may take at least; the time-out may be shorter.
const LEAST_TRY: Duration = Duration::from_secs(1);
/// How long a call that changes something is waited for once the server is known to answer others.
const LAST_WAIT: Duration = Duration::from_secs(1);
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
    pub(super) peer: Peer,
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

    /// Makes a call that changes nothing: again and again until there is an answer. Ends within the time-out.
    pub(super) async fn ask<C, T, E>(&self, procedure: NFS_PROGRAM, args: &C) -> Result<T>
    where
        C: Pack + Send + Sync,
        T: Send,
        E: Send,
        Nfs3Result<T, E>: Unpack,
    {
        let mut effort = Effort::new(self, Waits::ATry)?;
        loop {
            match effort.call::<C, T, E>(procedure, args).await? {
                Tried::Done(reply) => return Ok(reply),
                Tried::Refused(status) => return Err(Fault::Status(status)),
                Tried::Lost => {}
            }
        }
    }

    /// The tries of one call that changes something, all within the time-out; [`Effort::call`] makes one.
    pub(super) fn effort(&self) -> Result<Effort<'_>> {
        Effort::new(self, Waits::ForTheServer)
    }

    pub(super) async fn once<C, T, E>(
        &self,
        procedure: NFS_PROGRAM,
        args: &C,
        deadline: Instant,
        waits: Waits,
    ) -> std::result::Result<Nfs3Result<T, E>, Failed>
    where
        C: Pack + Send + Sync,
        T: Send,
        E: Send,
        Nfs3Result<T, E>: Unpack,
    {
        let late = |what: &str| Broken::Lost(io::Error::new(io::ErrorKind::TimedOut, what));
        let unsent = |broken| Failed { broken, reused: false, sent: false };
        let Ok(Ok(_slot)) = timeout_at(deadline, self.slots.acquire()).await else {
            return Err(unsent(late("all connections wait for it")));
        };
        let pooled = lock(&self.idle).pop();
        let reused = pooled.is_some();
        let mut rpc = match pooled {
            Some(rpc) => rpc,
            None => match timeout_at(self.end_of_try(deadline), self.connect()).await {
                Ok(connected) => connected.map_err(|error| unsent(Broken::Lost(error)))?,
                Err(_) => return Err(unsent(late("no answer"))),
            },
        };
        let call = async {
            let reply = rpc.call(PROGRAM, VERSION, procedure as u32, args).await;
            reply.map(|reply| (rpc, reply))
        };
        let done = match waits {
            Waits::ATry => timeout_at(self.end_of_try(deadline), call).await.ok(),
            Waits::ForTheServer => self.watched(call, deadline).await,
        };
        match done {
            Some(Ok((rpc, reply))) => {
                lock(&self.idle).push(rpc);
                if let Some((since, _)) = lock(&self.silent).take() {
                    tracing::info!("{}: it answers again, after {:?}", self.peer.store, since.elapsed());
                }
                Ok(reply)
            }
            Some(Err(error)) => Err(Failed { broken: error.into(), reused, sent: true }),
            None => Err(Failed { broken: late("no answer"), reused: false, sent: true }),
        }
    }

    fn end_of_try(&self, deadline: Instant) -> Instant {
        deadline.min(Instant::now() + (self.timeout / 4).max(LEAST_TRY))
    }

    /// Waits for the answer to a call that changes something. A server that stands still does it when it goes on, also
    /// after it was made again: so the call keeps its connection until a new one is answered and it still is not.
    async fn watched<T>(&self, call: impl Future<Output = T>, deadline: Instant) -> Option<T> {
        let mut call = pin!(call);
        loop {
            let until = self.end_of_try(deadline);
            if let Ok(done) = timeout_at(until, &mut call).await {
                return Some(done);
            }
            if until >= deadline {
                return None;
            }
            if let Ok(true) = timeout_at(self.end_of_try(deadline), self.answers()).await {
                return timeout_at(deadline.min(Instant::now() + LAST_WAIT), &mut call).await.ok();
            }
        }
    }

    /// Whether the server answers on a new connection.
    async fn answers(&self) -> bool {
        let Ok(mut rpc) = self.connect().await else { return false };
        let procedure = NFS_PROGRAM::NFSPROC3_NULL as u32;
        rpc.call::<Void, Void>(PROGRAM, VERSION, procedure, &Void).await.is_ok()
    }

    async fn connect(&self) -> io::Result<Rpc> {
        let wire = connection::connect(&self.peer.addresses, self.peer.reserved).await?;
        Ok(RpcClient::new_with_auth(wire, self.peer.credential.clone(), opaque_auth::default()))
    }

    /// How long a call may take now; fails at once right after one that found nobody.
    pub(super) fn patience(&self) -> Result<Duration> {
        match &*lock(&self.silent) {
            Some((since, why)) if since.elapsed() < AFTER_SILENCE => {
                Err(Fault::Silent { store: self.peer.store.clone(), detail: why.clone() })
            }
            Some(_) => Ok(self.timeout.min(AFTER_SILENCE)),
            None => Ok(self.timeout),
        }
    }

    pub(super) fn give_up(&self, waited: Duration, why: &str) -> Fault {
        let detail = format!("no answer within {} s: {why}", waited.as_secs());
        *lock(&self.silent) = Some((Instant::now(), detail.clone()));
        Fault::Silent { store: self.peer.store.clone(), detail }
    }
}

/// How long a try waits for its answer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Waits {
    /// A part of the time, to leave some for the next one.
    ATry,
    /// As long as the server answers nobody.
    ForTheServer,
}

/// A try that gave nothing.
pub(super) struct Failed {
    pub broken: Broken,
    /// The connection had been used before.
    pub reused: bool,
    /// The call may have reached the server.
    pub sent: bool,
}

/// What is behind it is whole between any two statements.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
