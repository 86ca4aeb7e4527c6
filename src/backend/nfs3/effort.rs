//! A call until it is known what became of it.
//!
//! A lost answer says nothing: the call was done, or will be, or never reached the server. Reads are simply made again.
//! Of what changes something each try is told apart, and its caller looks between two of them, by file ids, whether it
//! was done already; an error of a later try is believed only after that, as it may be about what the first one did (the
//! name it removed does not exist).

use std::time::Duration;

use nfs3_client::nfs3_types::nfs3::{NFS_PROGRAM, Nfs3Result, nfsstat3};
use nfs3_client::nfs3_types::xdr_codec::{Pack, Unpack};
use tokio::time::{Instant, sleep};

use super::fault::{Broken, Fault, Result};
use super::pool::{Failed, Pool, Waits};

/// Between two tries, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// What a try came to.
pub(super) enum Tried<T> {
    /// It was done, by this try or, if one was lost, by that.
    Done(T),
    /// The server says no. If [`Effort::has_lost`], the one that was lost may have been done.
    Refused(nfsstat3),
    /// There is no answer. The pause before the next try is over.
    Lost,
}

impl<T> Tried<T> {
    /// Of calls whose reply says no more.
    pub(super) fn without_reply(self) -> Tried<()> {
        match self {
            Self::Done(_) => Tried::Done(()),
            Self::Refused(status) => Tried::Refused(status),
            Self::Lost => Tried::Lost,
        }
    }
}

/// The tries of one call, within the time-out.
pub(super) struct Effort<'p> {
    pool: &'p Pool,
    waits: Waits,
    timeout: Duration,
    deadline: Instant,
    pause: Duration,
    lost: bool,
}

impl<'p> Effort<'p> {
    /// Fails at once if the server was silent a moment ago.
    pub(super) fn new(pool: &'p Pool, waits: Waits) -> Result<Self> {
        let timeout = pool.patience()?;
        let deadline = Instant::now() + timeout;
        Ok(Self { pool, waits, timeout, deadline, pause: PAUSES.0, lost: false })
    }

    /// Whether a try was lost that may have reached the server.
    pub(super) fn has_lost(&self) -> bool {
        self.lost
    }

    /// Makes a try. Those that did not reach the server, or that it asks to make later, are none.
    pub(super) async fn call<C, T, E>(&mut self, procedure: NFS_PROGRAM, args: &C) -> Result<Tried<T>>
    where
        C: Pack + Send + Sync,
        T: Send,
        E: Send,
        Nfs3Result<T, E>: Unpack,
    {
        loop {
            match self.pool.once::<C, T, E>(procedure, args, self.deadline, self.waits).await {
                Ok(Nfs3Result::Ok(reply)) => return Ok(Tried::Done(reply)),
                Ok(Nfs3Result::Err((status @ nfsstat3::NFS3ERR_JUKEBOX, _))) => {
                    if Instant::now() + PAUSES.0 >= self.deadline {
                        return Err(Fault::Status(status));
                    }
                    self.rest("it asked to be asked later").await?;
                }
                Ok(Nfs3Result::Err((status, _))) => return Ok(Tried::Refused(status)),
                Err(Failed { broken: Broken::Final(fault), .. }) => return Err(fault),
                Err(Failed { broken: Broken::Lost(error), reused, sent }) => {
                    // It had died before, with the server of then.
                    if !reused || Instant::now() >= self.deadline {
                        self.rest(&error.to_string()).await?;
                    }
                    if sent {
                        self.lost = true;
                        return Ok(Tried::Lost);
                    }
                }
            }
        }
    }

    /// Pauses before the next try; fails if there is no time for one.
    async fn rest(&mut self, why: &str) -> Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left < PAUSES.0 {
            return Err(self.pool.give_up(self.timeout, why));
        }
        tracing::debug!("{}: {why}; trying again", self.pool.peer.store);
        // Towards the end more often, so that the last try is not long before it.
        sleep(self.pause.min(left / 2)).await;
        self.pause = (self.pause * 2).min(PAUSES.1);
        Ok(())
    }
}
