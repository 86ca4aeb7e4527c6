//! Leases: who works on a tree now.
//!
//! A lease is a file with an owner and a counter. While its owner works the counter goes up; whoever wants
//! the tree and sees the counter stand still for the whole lease, on his own clock, takes it over. That only
//! saves work that would be in vain: safety rests on the claim of a number. A flock on the same file says
//! at once that an owner on this host is dead.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, BackendError, LockKind};
use crate::change::error::{ChangeError, Result};
use crate::change::places;
use crate::change::record::TreeId;
use crate::change::site::Site;
use crate::ids::StorePath;
use crate::store::facts::read_whole;

/// The largest lease that is read, in bytes.
const MAX_BYTES: u64 = 4096;

/// How long a look at a lease may be put off, however long that is: its owner may be about to give it back, or
/// have just died, which its lock tells at once.
const LONGEST_STEP: Duration = Duration::from_secs(1);

/// What a lease's file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Content {
    host: String,
    process: String,
    nonce: String,
    counter: u64,
    /// Given back: nobody works on the tree.
    free: bool,
}

/// A lease that is held. Dropping it gives it back.
#[derive(Debug)]
pub struct Lease(Arc<Held>);

struct Held {
    backend: Arc<dyn Backend>,
    path: StorePath,
    host: String,
    process: String,
    nonce: String,
    counter: AtomicU64,
    lost: AtomicBool,
    /// Kept for its lock.
    _local: Option<Box<dyn Send + Sync>>,
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held").field("path", &self.path).field("nonce", &self.nonce).finish_non_exhaustive()
    }
}

impl Lease {
    /// Takes the lease of a tree, waiting for as long as it takes to see whether its owner lives: at most
    /// the lease's time.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Busy`] if the owner lives.
    pub fn take(site: &Site<'_>, store: usize, tree: &TreeId) -> Result<Self> {
        Self::take_file(site, store, &places::lease(tree))
    }

    /// Takes the lease that is a given file of qchain's own: that of a job. Otherwise as [`Lease::take`].
    pub fn take_file(site: &Site<'_>, store: usize, path: &StorePath) -> Result<Self> {
        let backend = site.stores.get(store)?.backend();
        let host = backend.seen_from(&site.owner.host);
        let failed = |source| ChangeError::Store { action: "lease", member: path.to_string(), source };
        let takes = |seen: &Option<Content>| match seen {
            None => true,
            Some(content) => content.free || content.host == host,
        };
        let (local, seen) = {
            let _one = site.leases.taking.lock().unwrap_or_else(PoisonError::into_inner);
            // Trees that were one have one id: this process may work on several of them.
            if let Some(held) = site.leases.find(backend, path) {
                return Ok(Self(held));
            }
            let local = backend.try_lock(path, LockKind::Exclusive).map_err(failed)?;
            let seen = read(backend, path).map_err(failed)?;
            if local.is_some() && takes(&seen) {
                return Self::hold(site, backend, path.clone(), local).map_err(failed);
            }
            (local, seen)
        };
        let local = watch(site, backend, path, seen.as_ref(), local, &takes)?;
        let _one = site.leases.taking.lock().unwrap_or_else(PoisonError::into_inner);
        Self::hold(site, backend, path.clone(), local).map_err(failed)
    }

    /// Writes the lease's file and has it renewed.
    fn hold(
        site: &Site<'_>,
        backend: &Arc<dyn Backend>,
        path: StorePath,
        local: Option<Box<dyn Send + Sync>>,
    ) -> std::result::Result<Self, BackendError> {
        let held = Held {
            backend: backend.clone(),
            path,
            host: backend.seen_from(&site.owner.host),
            process: site.owner.process.clone(),
            nonce: format!("{:032x}", site.clock.unique()),
            counter: AtomicU64::new(0),
            lost: AtomicBool::new(false),
            _local: local,
        };
        held.write(false)?;
        let lease = Self(Arc::new(held));
        site.leases.add(&lease);
        Ok(lease)
    }

    /// Whether it is still held: somebody who saw it stand still may have taken it over.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.0.renew();
        !self.0.lost.load(Ordering::Relaxed)
    }
}

/// Waits until the owner shows that he lives, or has not for the whole lease.
fn watch(
    site: &Site<'_>,
    backend: &Arc<dyn Backend>,
    path: &StorePath,
    first: Option<&Content>,
    mut local: Option<Box<dyn Send + Sync>>,
    takes: &dyn Fn(&Option<Content>) -> bool,
) -> Result<Option<Box<dyn Send + Sync>>> {
    let failed = |source| ChangeError::Store { action: "lease", member: path.to_string(), source };
    let owner = first.map(|content| format!("{} on {}", content.process, content.host));
    let busy = || ChangeError::Busy { owner: owner.clone().unwrap_or_else(|| "another qchain".to_owned()) };
    let begun = site.clock.elapsed();
    let step = (site.lease / 20).clamp(Duration::from_millis(5), LONGEST_STEP);
    while site.clock.elapsed().saturating_sub(begun) < site.lease {
        site.cancel.check().map_err(|_| ChangeError::Cancelled)?;
        site.clock.sleep(step);
        if local.is_none() {
            local = backend.try_lock(path, LockKind::Exclusive).map_err(failed)?;
        }
        let now = read(backend, path).map_err(failed)?;
        if local.is_some() && takes(&now) {
            break;
        }
        if now.as_ref() != first {
            return Err(busy());
        }
    }
    Ok(local)
}

fn read(backend: &Arc<dyn Backend>, path: &StorePath) -> std::result::Result<Option<Content>, BackendError> {
    match read_whole(backend, path, MAX_BYTES) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(BackendError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Held {
    /// Writes the lease as it is now. Opened and closed each time, so that other hosts of a network mount
    /// see it.
    fn write(&self, free: bool) -> std::result::Result<(), BackendError> {
        let content = Content {
            host: self.host.clone(),
            process: self.process.clone(),
            nonce: self.nonce.clone(),
            counter: self.counter.load(Ordering::Relaxed),
            free,
        };
        let bytes = serde_json::to_vec(&content).unwrap_or_default();
        let file = match self.backend.open_writable(&self.path) {
            Err(BackendError::NotFound { .. }) => self.backend.create(&self.path)?,
            opened => opened?,
        };
        // White space up to a length that only grows: no reader ever sees the end of an older text.
        let length = file.stat()?.length.max(bytes.len() as u64).min(MAX_BYTES);
        let mut padded = bytes;
        padded.resize(usize::try_from(length).unwrap_or_default(), b' ');
        file.write_at(0, &padded)
    }

    /// Moves the counter on, or finds that the lease is another's. A store that does not answer is no proof
    /// of anything.
    fn renew(&self) {
        match read(&self.backend, &self.path) {
            Ok(Some(content)) if content.nonce == self.nonce => {
                self.counter.fetch_add(1, Ordering::Relaxed);
                let _ = self.write(false);
            }
            Ok(_) => self.lost.store(true, Ordering::Relaxed),
            Err(_) => {}
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Best effort: a lease that stays is taken over.
        if !self.lost.load(Ordering::Relaxed)
            && let Ok(Some(content)) = read(&self.backend, &self.path)
            && content.nonce == self.nonce
        {
            let _ = self.write(true);
        }
    }
}

/// The leases that this process holds, and the thread that renews them.
#[derive(Debug)]
pub struct Leases {
    held: Arc<Mutex<Vec<Weak<Held>>>>,
    renewal: Option<Duration>,
    /// Held while one is taken that is free.
    taking: Mutex<()>,
    /// Closed when this goes, which ends the thread.
    stop: Mutex<Option<mpsc::Sender<()>>>,
}

impl Leases {
    /// None are held yet. Without a time between renewals nobody renews them by himself.
    #[must_use]
    pub fn new(renewal: Option<Duration>) -> Self {
        Self { held: Arc::default(), renewal, taking: Mutex::new(()), stop: Mutex::new(None) }
    }

    /// The lease of that file, if this process has it.
    fn find(&self, backend: &Arc<dyn Backend>, path: &StorePath) -> Option<Arc<Held>> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let mut live = held.iter().filter_map(Weak::upgrade);
        live.find(|held| Arc::ptr_eq(&held.backend, backend) && held.path == *path)
    }

    fn add(&self, lease: &Lease) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&lease.0));
        let Some(renewal) = self.renewal else { return };
        let mut stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        if stop.is_none() {
            let (sender, receiver) = mpsc::channel();
            *stop = Some(sender);
            let held = Arc::clone(&self.held);
            std::thread::spawn(move || {
                while receiver.recv_timeout(renewal) == Err(RecvTimeoutError::Timeout) {
                    let live: Vec<Arc<Held>> = {
                        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
                        held.retain(|lease| lease.strong_count() > 0);
                        held.iter().filter_map(Weak::upgrade).collect()
                    };
                    for lease in &live {
                        lease.renew();
                    }
                }
            });
        }
    }
}
