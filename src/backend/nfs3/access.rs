//! The calls about one file that was looked up, whoever makes them.
//!
//! NFS knows no open files: one that loses its last name is gone for whoever has it open, too. A handle that the server
//! does not know any more is looked up again, once, by the name; another file of that name is not taken for it.

use std::sync::{Arc, Mutex};

use nfs3_client::nfs3_types::nfs3::{
    COMMIT3args, COMMIT3resfail, COMMIT3resok, NFS_PROGRAM, READ3args, READ3resfail, WRITE3args,
    WRITE3resfail, WRITE3resok, nfs_fh3, nfsstat3, sattr3, stable_how, writeverf3,
};
use nfs3_client::nfs3_types::xdr_codec::Opaque;
use tokio::task::JoinSet;

use super::effort::Tried;
use super::fault::{Fault, Result};
use super::pool::lock;
use super::wire::Data;
use super::{Shared, attributes, resolve};
use crate::backend::{FileId, Stat};
use crate::ids::StorePath;

/// What a task needs to call.
#[derive(Clone, Debug)]
pub(super) struct Access {
    pub shared: Arc<Shared>,
    pub path: StorePath,
    pub id: FileId,
    pub handle: Arc<Mutex<nfs_fh3>>,
}

/// What the server has of a WRITE.
#[derive(Clone, Copy, Debug)]
pub(super) struct Written {
    /// Whether it is durable already.
    pub stable: bool,
    /// The server's incarnation; that of a later COMMIT must be the same.
    pub verifier: writeverf3,
}

/// Makes a call; once more, if the handle was none any more, with the one that the file has now.
macro_rules! looked_up_again {
    ($access:expr, $call:expr) => {
        match $call.await {
            Err(fault) if fault.is_stale() => {
                $access.renew(fault).await?;
                $call.await
            }
            done => done,
        }
    };
}

impl Access {
    /// Reads `length` bytes in parts; each is shorter only if the file ends there.
    pub(super) async fn parts(self, offset: u64, length: usize, part: usize) -> Result<Vec<Vec<u8>>> {
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
    pub(super) async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut data: Vec<u8> = Vec::new();
        loop {
            let at = offset.saturating_add(data.len() as u64);
            let more = looked_up_again!(self, self.ask(at, length - data.len()))?;
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

    async fn ask(&self, offset: u64, length: usize) -> Result<Data> {
        let count = u32::try_from(length).unwrap_or(u32::MAX);
        let args = READ3args { file: self.now(), offset, count };
        self.shared.pool.ask::<_, _, READ3resfail>(NFS_PROGRAM::NFSPROC3_READ, &args).await
    }

    /// Facts about the file.
    pub(super) async fn stat(&self) -> Result<Stat> {
        looked_up_again!(self, self.stat_once())
    }

    async fn stat_once(&self) -> Result<Stat> {
        resolve::stat(&self.shared.pool, &self.now()).await
    }

    /// Sets attributes.
    pub(super) async fn set(&self, wanted: &sattr3) -> Result<()> {
        looked_up_again!(self, self.set_once(wanted))
    }

    async fn set_once(&self, wanted: &sattr3) -> Result<()> {
        attributes::set(&self.shared.pool, &self.now(), wanted).await.map(drop)
    }

    /// Writes all of `data`, which is no more than one WRITE takes, and does not wait until it is durable. If the server
    /// takes it in pieces, and is another one after the first, that counts as lost.
    pub(super) async fn write(&self, offset: u64, data: &[u8]) -> Result<Written> {
        let mut first: Option<Written> = None;
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            let at = offset.checked_add(done as u64).ok_or_else(too_far)?;
            let told = looked_up_again!(self, self.write_once(at, rest))?;
            let count = usize::try_from(told.count).unwrap_or(usize::MAX);
            if count == 0 || count > rest.len() {
                let text = format!("the server took {count} bytes of {}", rest.len());
                return Err(Fault::Garbled(text));
            }
            done += count;
            let stable = told.committed == stable_how::FILE_SYNC;
            first = Some(match first {
                None => Written { stable, verifier: told.verf },
                Some(first) => Written { stable: first.stable && stable, ..first },
            });
        }
        first.ok_or_else(|| Fault::Garbled("nothing was written".to_owned()))
    }

    /// A try whose answer was lost is made again as it is: the same bytes in the same place.
    async fn write_once(&self, offset: u64, data: &[u8]) -> Result<WRITE3resok> {
        let args = WRITE3args {
            file: self.now(),
            offset,
            count: u32::try_from(data.len()).unwrap_or(u32::MAX),
            stable: stable_how::UNSTABLE,
            data: Opaque::borrowed(data),
        };
        let mut effort = self.shared.pool.effort()?;
        loop {
            let tried = effort.call::<_, _, WRITE3resfail>(NFS_PROGRAM::NFSPROC3_WRITE, &args);
            match tried.await? {
                Tried::Done(reply) => return Ok(reply),
                Tried::Refused(status) => return Err(Fault::Status(status)),
                Tried::Lost => {}
            }
        }
    }

    /// Makes durable what the server has of the file; which incarnation of it did.
    pub(super) async fn commit(&self) -> Result<writeverf3> {
        looked_up_again!(self, self.commit_once())
    }

    async fn commit_once(&self) -> Result<writeverf3> {
        // All of the file.
        let args = COMMIT3args { file: self.now(), offset: 0, count: 0 };
        let procedure = NFS_PROGRAM::NFSPROC3_COMMIT;
        let told: COMMIT3resok = self.shared.pool.ask::<_, _, COMMIT3resfail>(procedure, &args).await?;
        Ok(told.verf)
    }

    /// The handle as it is now.
    fn now(&self) -> nfs_fh3 {
        lock(&self.handle).clone()
    }

    /// Looks the file up again; another one of its name is not taken for it.
    async fn renew(&self, stale: Fault) -> Result<()> {
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

/// Where no file can go.
pub(super) fn too_far() -> Fault {
    Fault::Status(nfsstat3::NFS3ERR_FBIG)
}
