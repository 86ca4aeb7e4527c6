//! One file that was looked up, as the trait has it.

use std::any::Any;
use std::io;
use std::sync::{Arc, Mutex};

use nfs3_client::nfs3_types::nfs3::{nfs_fh3, sattr3};

use super::access::Access;
use super::ahead::Ahead;
use super::fault::{Fault, Result as Asked};
use super::pool::lock;
use super::resolve::Found;
use super::unstable::{self, Unstable};
use super::{Core, attributes, moves};
use crate::backend::{
    BackendError, FileId, Identity, ImageLocks, Means, Move, Moved, Result, Stat, StoreFile,
};
use crate::ids::StorePath;

/// How many reads of one call are in flight.
const IN_FLIGHT: usize = 8;

/// An open file.
#[derive(Debug)]
pub(super) struct NfsFile {
    core: Arc<Core>,
    path: StorePath,
    id: FileId,
    handle: Arc<Mutex<nfs_fh3>>,
    /// The handle of then, by which the store knows who writes.
    key: nfs_fh3,
    /// What is not durable yet, if it is open for writing.
    writes: Option<Arc<Unstable>>,
    /// What came with the look-up: it answers one question.
    first: Mutex<Option<Stat>>,
    ahead: Arc<Ahead>,
}

impl NfsFile {
    /// Open for reading.
    pub(super) fn new(core: Arc<Core>, path: StorePath, found: &Found) -> Self {
        Self::opened(core, path, found, None, Some(found.stat))
    }

    /// Open for reading and writing.
    pub(super) fn writable(core: Arc<Core>, path: StorePath, found: &Found) -> Self {
        let writes = core.shared.writers.enter(&found.handle);
        Self::opened(core, path, found, Some(writes), None)
    }

    fn opened(
        core: Arc<Core>,
        path: StorePath,
        found: &Found,
        writes: Option<Arc<Unstable>>,
        first: Option<Stat>,
    ) -> Self {
        let handle = Arc::new(Mutex::new(found.handle.clone()));
        let key = found.handle.clone();
        Self {
            core,
            path,
            id: found.stat.id,
            handle,
            key,
            writes,
            first: Mutex::new(first),
            ahead: Arc::default(),
        }
    }

    fn access(&self) -> Access {
        let (path, id, handle) = (self.path.clone(), self.id, self.handle.clone());
        Access { shared: self.core.shared.clone(), path, id, handle }
    }

    /// Makes calls about the file, and waits for them.
    fn ask<T, F>(&self, action: &'static str, call: impl FnOnce(Access) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Asked<T>> + Send + 'static,
    {
        let done = self.core.wait(call(self.access()));
        done.and_then(|done| done).map_err(|fault| self.core.shared.explain(fault).at(action, &self.path))
    }

    /// What this process wrote to the file, by whatever open one, and is not durable yet.
    fn kept(&self) -> Option<Arc<Unstable>> {
        self.writes.clone().or_else(|| self.core.shared.writers.of(&self.key))
    }

    /// The same of a file that is open for writing.
    fn to_write(&self, action: &'static str) -> Result<Arc<Unstable>> {
        self.writes.clone().ok_or_else(|| {
            let source = io::Error::new(io::ErrorKind::PermissionDenied, "it is open for reading only");
            BackendError::Io { action, path: self.path.to_string(), source }
        })
    }

    /// Reads the parts of a range that is no longer than some parts, all at once.
    fn read_round(&self, offset: u64, buffer: &mut [u8], part: usize) -> Result<usize> {
        let length = buffer.len();
        let parts = self.ask("read", async move |access: Access| access.parts(offset, length, part).await)?;
        let mut done = 0;
        for (place, data) in buffer.chunks_mut(part).zip(parts) {
            let Some(place) = place.get_mut(..data.len()) else { break };
            place.copy_from_slice(&data);
            done += data.len();
            // The file ends in this part.
            if data.len() < part {
                break;
            }
        }
        Ok(done)
    }

    fn refused_identity(&self, fault: Fault, what: String) -> BackendError {
        if attributes::is_policy(&fault) {
            return BackendError::Squashed { path: self.path.to_string(), what };
        }
        fault.at("give its owner and attributes to", &self.path)
    }

    fn set(&self, wanted: sattr3, what: String) -> Result<()> {
        let access = self.access();
        let done = self.core.wait(async move { access.set(&wanted).await }).and_then(|done| done);
        done.map_err(|fault| self.refused_identity(fault, what))
    }
}

impl Drop for NfsFile {
    fn drop(&mut self) {
        if self.writes.is_none() {
            return;
        }
        // As closing a file does it on a mount: others see what was written, also if this process ends now. What failed, whoever
        // syncs it hears.
        if let Some(file) = self.core.shared.writers.under_way(&self.key) {
            let access = self.access();
            let _ = self.core.wait(async move { unstable::answered(&access, &file).await });
        }
        // Nobody waits until it is durable: who wants that syncs it, by any open one.
        if let Some(kept) = self.core.shared.writers.leave(&self.key) {
            let (access, key) = (self.access(), self.key.clone());
            self.core.spawn(async move {
                match unstable::sync(&access, &kept).await {
                    // It was removed meanwhile.
                    Err(fault) if fault.is_stale() => access.shared.writers.drop_kept(&key),
                    // Whoever syncs it hears of it.
                    Err(fault) => access.shared.writers.give_up(&key, fault),
                    Ok(()) => access.shared.writers.tidy(&key),
                }
            });
        }
    }
}

impl StoreFile for NfsFile {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn path(&self) -> &StorePath {
        &self.path
    }

    fn stat(&self) -> Result<Stat> {
        if let Some(first) = lock(&self.first).take() {
            return Ok(first);
        }
        let under_way = self.core.shared.writers.under_way(&self.key);
        let stat = self.ask("look at", async move |access: Access| {
            if let Some(file) = under_way {
                unstable::answered(&access, &file).await?;
            }
            access.stat().await
        })?;
        let reaches = self.kept().map(|kept| kept.reaches()).unwrap_or_default();
        Ok(Stat { length: stat.length.max(reaches), ..stat })
    }

    fn reads_at_once(&self) -> usize {
        self.core.shared.connections
    }

    fn will_read(&self, offset: u64, length: u64) {
        if self.kept().is_some() {
            return;
        }
        let part = self.core.shared.read_bytes as u64;
        for index in 0..length.div_ceil(part) {
            let skip = index * part;
            let count = usize::try_from(part.min(length - skip)).unwrap_or_default();
            if let Some(work) = self.ahead.announce(self.access(), offset.saturating_add(skip), count) {
                self.core.spawn(work);
            }
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let part = self.core.shared.read_bytes;
        let mut done = match self.kept() {
            None => self.ahead.take(self.core.shared.writers.begun(), offset, buffer),
            Some(_) => 0,
        };
        let rest = buffer.get_mut(done..).unwrap_or_default();
        for round in rest.chunks_mut(part.saturating_mul(IN_FLIGHT)) {
            let wanted = round.len();
            let at = offset.saturating_add(done as u64);
            let layer = self.kept().map(|kept| kept.over(at, wanted));
            let mut count = self.read_round(at, round, part)?;
            if let Some(layer) = layer {
                count = layer.lay(round, count);
            }
            done += count;
            if count < wanted {
                break;
            }
        }
        Ok(done)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let writes = self.to_write("write")?;
        if data.is_empty() {
            return Ok(());
        }
        let (part, data) = (self.core.shared.write_bytes, data.to_vec());
        self.ask("write", async move |access: Access| {
            unstable::write(access, writes, offset, data, part).await
        })
    }

    fn set_length(&self, length: u64) -> Result<()> {
        let action = "set the length of";
        let writes = self.to_write(action)?;
        self.ask(action, async move |access: Access| unstable::set_length(&access, &writes, length).await)
    }

    /// The protocol has no call for it.
    fn reserve(&self, _offset: u64, _length: u64) -> Result<bool> {
        self.to_write("reserve space for").map(|_| false)
    }

    /// The protocol has no call for it.
    fn punch(&self, _offset: u64, _length: u64) -> Result<bool> {
        self.to_write("punch a hole into").map(|_| false)
    }

    fn move_runs(&self, sources: &[Arc<dyn StoreFile>], runs: &[Move], means: Means) -> Result<Moved> {
        self.to_write("move runs into")?;
        moves::move_runs(self, sources, runs, means)
    }

    /// All that this process wrote to the file, by whatever open one.
    fn sync(&self) -> Result<()> {
        let Some(kept) = self.kept() else {
            // What another process wrote, that ended before it could.
            if self.core.shared.read_only {
                return Ok(());
            }
            return self.ask("sync", async |access: Access| access.commit().await).map(drop);
        };
        self.ask("sync", async move |access: Access| unstable::sync(&access, &kept).await)?;
        self.core.shared.writers.tidy(&self.key);
        Ok(())
    }

    /// Nothing is kept here of what is durable; the server's caches are its own.
    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }

    /// Extended attributes are not part of the protocol.
    fn identity(&self) -> Result<Identity> {
        let Stat { uid, gid, mode, .. } = self.stat()?;
        Ok(Identity { uid, gid, mode, attributes: Vec::new() })
    }

    /// Owner first: a change of owner takes set-user-id bits away.
    fn set_identity(&self, identity: &Identity) -> Result<()> {
        self.to_write("change the attributes of")?;
        let squashed = |what| Err(BackendError::Squashed { path: self.path.to_string(), what });
        if let Some((name, _)) = identity.attributes.first() {
            return squashed(format!("attribute {name}, as NFSv3 has none"));
        }
        let owner = format!("owner {}:{}", identity.uid, identity.gid);
        let mode = format!("mode {:04o}", identity.mode);
        let mut is = self.stat()?;
        if let Some(wanted) = attributes::owner(&is, identity) {
            self.set(wanted, owner.clone())?;
            is = self.stat()?;
        }
        if is.mode != identity.mode {
            self.set(attributes::mode(identity.mode), mode.clone())?;
            is = self.stat()?;
        }
        if (is.uid, is.gid) != (identity.uid, identity.gid) {
            return squashed(owner);
        }
        if is.mode == identity.mode { Ok(()) } else { squashed(mode) }
    }

    /// Locks are another protocol's, and not asked for: none is seen.
    fn image_locks(&self) -> Result<ImageLocks> {
        Ok(ImageLocks::default())
    }

    fn hold_image_locks(&self) -> Result<Option<Box<dyn Send + Sync>>> {
        let source = io::ErrorKind::Unsupported.into();
        let path = self.path.to_string();
        Err(BackendError::Unsupported { action: "take the image locks of", path, source })
    }
}
