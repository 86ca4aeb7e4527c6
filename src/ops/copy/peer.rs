//! Who gives members: another zone, or stores of this host. What a peer says is never believed: lengths are checked
//! before anything is taken, digests after.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::offer::{LineMember, Offer};
use crate::backend::BackendError;
use crate::cloudstack::checkpoint::MAX_BYTES as MAX_CHECKPOINT;
use crate::cloudstack::paths::checkpoint_of;
use crate::failure::{Code, Kind};
use crate::ids::Digest;
use crate::ops::{OpError, Result};
use crate::store::facts::read_whole;
use crate::store::manifest::Blocks;
use crate::store::names::resolve_one;
use crate::store::scan::{Scan, ScanOptions};
use crate::store::{StoreError, Stores};

/// Takes blocks as they come, each whole: 64 KiB, padded with zeros.
pub type Take<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<()>;

/// Somebody who has members.
pub trait Peer: Send + Sync {
    /// What messages call it.
    fn name(&self) -> &str;

    /// The members that a member stands on, base first, itself last. Not believed, and perhaps empty.
    fn line(&self, member: &str) -> Result<Vec<LineMember>>;

    /// Bytes of a member's leaf table: as many as were asked for, whatever they are.
    fn table(&self, of: &LineMember, offset: u64, length: u64) -> Result<Vec<u8>>;

    /// Blocks of a member's view. They come in the order that suits who gives them; whether they are those that were asked
    /// for, and what they hold, is not looked at. Those that were taken before a failure stay taken.
    fn blocks(&self, of: &LineMember, ranges: &[Blocks], take: Take<'_>) -> Result<()>;

    /// The member's checkpoint file, if it has one.
    fn checkpoint(&self, of: &LineMember) -> Result<Option<Vec<u8>>>;

    /// How many requests are best in flight.
    fn at_once(&self) -> usize;

    /// The bytes that came from it so far, of whatever kind.
    fn received_bytes(&self) -> u64;
}

/// What a peer, or whatever is in between, is to blame for: asked again it may do better.
#[must_use]
pub fn wrong(peer: &str, message: impl Into<String>) -> OpError {
    let (code, message) = (Code::PeerWrong, message.into());
    OpError::Peer { peer: peer.to_owned(), kind: Kind::Refused, code, message, again: true }
}

/// How many members a peer of this host keeps open.
const OPEN: usize = 4;

/// Stores of this host.
pub struct LocalPeer {
    name: String,
    stores: Stores,
    open: Mutex<VecDeque<(String, Digest, Arc<Offer>)>>,
    bytes: AtomicU64,
}

impl LocalPeer {
    /// Of opened stores.
    #[must_use]
    pub fn new(name: String, stores: Stores) -> Self {
        Self { name, stores, open: Mutex::default(), bytes: AtomicU64::new(0) }
    }

    fn find(&self, member: &str) -> Result<Offer> {
        let progress = &crate::progress::Silent;
        let options = ScanOptions { now_ns: 0, settle_ns: 0, caches: &[], progress };
        let scan = Scan::run(&self.stores, &options)?;
        Offer::open(&self.stores, &scan, resolve_one(&self.stores, &scan, member)?)
    }

    fn keep(&self, name: &str, offer: Offer) -> Arc<Offer> {
        let offer = Arc::new(offer);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = offer.own() {
            open.push_front((name.to_owned(), own.view_digest, offer.clone()));
            open.truncate(OPEN);
        }
        offer
    }

    /// The member with that view: as it was opened, whatever its name stands for by now.
    fn offer(&self, of: &LineMember) -> Result<Arc<Offer>> {
        let known = {
            let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            let found = open.iter().find(|(name, digest, _)| *name == of.name && *digest == of.view_digest);
            found.map(|(_, _, offer)| offer.clone())
        };
        let offer = match known {
            Some(offer) => offer,
            None => self.keep(&of.name, self.find(&of.name)?),
        };
        if offer.own().is_none_or(|own| own.view_digest != of.view_digest) {
            let message = "its view is another one by now".to_owned();
            return Err(OpError::Refused { code: Code::ChangedMeanwhile, member: of.name.clone(), message });
        }
        Ok(offer)
    }

    fn count(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Peer for LocalPeer {
    fn name(&self) -> &str {
        &self.name
    }

    fn line(&self, member: &str) -> Result<Vec<LineMember>> {
        let offer = self.find(member)?;
        let line = offer.line().to_vec();
        if let Some(name) = line.last().map(|own| own.name.clone()) {
            self.keep(&name, offer);
        }
        Ok(line)
    }

    fn table(&self, of: &LineMember, offset: u64, length: u64) -> Result<Vec<u8>> {
        let bytes = self.offer(of)?.table(offset, length)?;
        self.count(bytes.len());
        Ok(bytes)
    }

    fn blocks(&self, of: &LineMember, ranges: &[Blocks], take: Take<'_>) -> Result<()> {
        self.offer(of)?.blocks(
            ranges,
            0,
            |given| given,
            |mut given| {
                given.iter_mut().try_for_each(|(block, bytes)| {
                    self.count(bytes.len());
                    take(block, bytes)
                })
            },
        )
    }

    fn checkpoint(&self, of: &LineMember) -> Result<Option<Vec<u8>>> {
        let offer = self.offer(of)?;
        let Some(key) = offer.source().keys().first() else { return Ok(None) };
        checkpoint(&self.stores, key.store, &key.path)
    }

    fn at_once(&self) -> usize {
        2
    }

    fn received_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// The checkpoint file of a member, if it has one.
pub fn checkpoint(stores: &Stores, store: usize, member: &crate::ids::StorePath) -> Result<Option<Vec<u8>>> {
    let store = stores.get(store)?;
    let Some(path) = checkpoint_of(member) else { return Ok(None) };
    match read_whole(store.backend(), &path, MAX_CHECKPOINT as u64) {
        Ok(bytes) if bytes.len() <= MAX_CHECKPOINT => Ok(Some(bytes)),
        Ok(_) | Err(BackendError::NotFound { .. }) => Ok(None),
        Err(source) => Err(StoreError::backend(store, source).into()),
    }
}
