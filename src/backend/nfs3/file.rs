//! One file that was looked up.
//!
//! NFS knows no open files: a file that loses its last name is gone for its readers, too, and reads of it fail.

use std::any::Any;
use std::io;
use std::sync::{Arc, Mutex};

use nfs3_client::nfs3_types::nfs3::{NFS_PROGRAM, READ3args, READ3resfail, nfs_fh3};
use tokio::task::JoinSet;

use super::fault::{Fault, Result as Asked};
use super::pool::lock;
use super::resolve::{self, Found};
use super::wire::Data;
use super::{Core, Shared, read_only};
use crate::backend::{
    BackendError, FileId, Identity, ImageLocks, Means, Move, Moved, Result, Stat, StoreFile,
};
use crate::ids::StorePath;

/// How many reads of one call are in flight.
const IN_FLIGHT: usize = 8;

/// A file open for reading.
#[derive(Debug)]
pub(super) struct NfsFile {
    core: Arc<Core>,
    path: StorePath,
    id: FileId,
    handle: Arc<Mutex<nfs_fh3>>,
    /// What came with the look-up: it answers one question.
    first: Mutex<Option<Stat>>,
}

impl NfsFile {
    pub(super) fn new(core: Arc<Core>, path: StorePath, found: Found) -> Self {
        let Found { handle, stat } = found;
        let handle = Arc::new(Mutex::new(handle));
        Self { core, path, id: stat.id, handle, first: Mutex::new(Some(stat)) }
    }

    fn reader(&self) -> Reader {
        let (path, id, handle) = (self.path.clone(), self.id, self.handle.clone());
        Reader { shared: self.core.shared.clone(), path, id, handle }
    }

    /// Reads the parts of a range that is no longer than some parts, all at once.
    fn read_round(&self, offset: u64, buffer: &mut [u8], part: usize) -> Result<usize> {
        let reader = self.reader();
        let length = buffer.len();
        let parts = self.core.wait(async move { reader.parts(offset, length, part).await });
        let parts = parts.and_then(|parts| parts).map_err(|fault| fault.at("read", &self.path))?;
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

    fn refused<T>(&self, action: &'static str) -> Result<T> {
        Err(read_only(action, &self.path))
    }
}

/// What a task needs to read.
#[derive(Clone)]
struct Reader {
    shared: Arc<Shared>,
    path: StorePath,
    id: FileId,
    handle: Arc<Mutex<nfs_fh3>>,
}

impl Reader {
    /// Reads `length` bytes in parts; each is shorter only if the file ends there.
    async fn parts(self, offset: u64, length: usize, part: usize) -> Asked<Vec<Vec<u8>>> {
        if length <= part {
            return Ok(vec![self.read(offset, length).await?]);
        }
        let mut running = JoinSet::new();
        for index in 0..length.div_ceil(part) {
            let (reader, skip) = (self.clone(), index * part);
            let size = part.min(length - skip);
            let at = offset.saturating_add(skip as u64);
            running.spawn(async move { (index, reader.read(at, size).await) });
        }
        let mut parts = vec![Vec::new(); running.len()];
        while let Some(done) = running.join_next().await {
            let (index, data) = done.map_err(|error| Fault::Garbled(format!("a read was lost: {error}")))?;
            if let Some(place) = parts.get_mut(index) {
                *place = data?;
            }
        }
        Ok(parts)
    }

    /// Reads until there are `length` bytes or the file ends.
    async fn read(&self, offset: u64, length: usize) -> Asked<Vec<u8>> {
        let mut data: Vec<u8> = Vec::new();
        loop {
            let at = offset.saturating_add(data.len() as u64);
            let more = self.read_once(at, length - data.len()).await?;
            let (ended, none) = (more.eof, more.data.is_empty());
            if data.is_empty() {
                data = more.data;
            } else {
                data.extend(more.data);
            }
            if data.len() > length {
                return Err(Fault::Garbled("the server gave more bytes than it was asked for".to_owned()));
            }
            if ended || data.len() == length {
                return Ok(data);
            }
            if none {
                return Err(Fault::Garbled("the server gave no bytes of a file that goes on".to_owned()));
            }
        }
    }

    async fn read_once(&self, offset: u64, length: usize) -> Asked<Data> {
        match self.ask(offset, length).await {
            Err(fault) if fault.is_stale() => {
                self.renew(fault).await?;
                self.ask(offset, length).await
            }
            done => done,
        }
    }

    async fn ask(&self, offset: u64, length: usize) -> Asked<Data> {
        let count = u32::try_from(length).unwrap_or(u32::MAX);
        let args = READ3args { file: lock(&self.handle).clone(), offset, count };
        self.shared.pool.ask::<_, _, READ3resfail>(NFS_PROGRAM::NFSPROC3_READ, &args).await
    }

    async fn stat(&self) -> Asked<Stat> {
        let handle = lock(&self.handle).clone();
        match resolve::stat(&self.shared.pool, &handle).await {
            Err(fault) if fault.is_stale() => {
                self.renew(fault).await?;
                let handle = lock(&self.handle).clone();
                resolve::stat(&self.shared.pool, &handle).await
            }
            done => done,
        }
    }

    /// Looks the file up again; another one of its name is not taken for it.
    async fn renew(&self, stale: Fault) -> Asked<()> {
        match self.shared.find_afresh(&self.path).await {
            Ok(found) if found.stat.id == self.id => {
                *lock(&self.handle) = found.handle;
                Ok(())
            }
            Err(fault @ Fault::Silent { .. }) => Err(fault),
            Ok(_) | Err(_) => Err(stale),
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
        let reader = self.reader();
        let told = self.core.wait(async move { reader.stat().await });
        told.and_then(|told| told).map_err(|fault| fault.at("look at", &self.path))
    }

    fn reads_at_once(&self) -> usize {
        self.core.shared.connections
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let part = self.core.shared.read_bytes;
        let mut done = 0;
        for round in buffer.chunks_mut(part.saturating_mul(IN_FLIGHT)) {
            let wanted = round.len();
            let count = self.read_round(offset.saturating_add(done as u64), round, part)?;
            done += count;
            if count < wanted {
                break;
            }
        }
        Ok(done)
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> Result<()> {
        self.refused("write")
    }

    fn set_length(&self, _length: u64) -> Result<()> {
        self.refused("set the length of")
    }

    fn reserve(&self, _offset: u64, _length: u64) -> Result<bool> {
        self.refused("reserve space for")
    }

    fn punch(&self, _offset: u64, _length: u64) -> Result<bool> {
        self.refused("punch a hole into")
    }

    fn move_runs(&self, _sources: &[Arc<dyn StoreFile>], _runs: &[Move], _means: Means) -> Result<Moved> {
        self.refused("write")
    }

    /// Nothing was written through it.
    fn sync(&self) -> Result<()> {
        Ok(())
    }

    /// Nothing is kept here; the server's caches are its own.
    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }

    /// Extended attributes are not part of the protocol.
    fn identity(&self) -> Result<Identity> {
        let Stat { uid, gid, mode, .. } = self.stat()?;
        Ok(Identity { uid, gid, mode, attributes: Vec::new() })
    }

    fn set_identity(&self, _identity: &Identity) -> Result<()> {
        self.refused("change the attributes of")
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
