//! One open file of a mount.

use std::any::Any;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use rustix::fs::{self, Advice, FallocateFlags};
use rustix::io::{Errno, retry_on_intr};

use super::{failed, identity, locks, moves, probe, stat_of};
use crate::backend::error::{NO_FALLOCATE, NO_LOCKS};
use crate::backend::{BackendError, Identity, ImageLocks, Means, Move, Moved, Result, Stat, StoreFile};
use crate::ids::StorePath;

#[derive(Debug)]
pub(super) struct PosixFile {
    file: File,
    path: StorePath,
    /// The file system's block size in bytes, asked once.
    block: OnceLock<u64>,
    /// Whether it is a network file system, asked once.
    network: OnceLock<bool>,
    /// Who holds QEMU's image locks through this open file.
    holders: locks::Holders,
    /// Who is shown as a reader through it.
    readers: locks::Holders,
}

impl PosixFile {
    pub(super) fn new(file: File, path: StorePath) -> Self {
        Self {
            file,
            path,
            block: OnceLock::new(),
            network: OnceLock::new(),
            holders: locks::Holders::default(),
            readers: locks::Holders::default(),
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn into_file(self) -> File {
        self.file
    }

    /// Whether the file lies on a network file system, where waiting is what calls cost.
    pub(super) fn is_on_network(&self) -> Result<bool> {
        if let Some(&network) = self.network.get() {
            return Ok(network);
        }
        let network = probe::is_network(&self.file).map_err(|error| failed("look at", &self.path, error))?;
        Ok(*self.network.get_or_init(|| network))
    }

    /// The alignment that clones on this file system need, in bytes: its block size. Where that is no
    /// sensible one (network mounts give their transfer size), 4096 is tried and the system has the say.
    pub(super) fn clone_alignment(&self) -> Result<u64> {
        if let Some(&block) = self.block.get() {
            return Ok(block);
        }
        let told = fs::fstatfs(&self.file).map_err(|errno| failed("look at", &self.path, errno))?.f_bsize;
        let block = u64::try_from(told).unwrap_or(0);
        let sensible = block.is_power_of_two() && (512..=65_536).contains(&block);
        Ok(*self.block.get_or_init(|| if sensible { block } else { 4096 }))
    }

    /// Takes or gives back space without changing the length; `false` if the file system cannot.
    fn allocate(&self, action: &'static str, flags: FallocateFlags, at: u64, length: u64) -> Result<bool> {
        if length == 0 {
            return Ok(true);
        }
        let flags = flags | FallocateFlags::KEEP_SIZE;
        match retry_on_intr(|| fs::fallocate(&self.file, flags, at, length)) {
            Ok(()) => Ok(true),
            Err(errno) if NO_FALLOCATE.contains(&errno) => Ok(false),
            Err(errno) => Err(failed(action, &self.path, errno)),
        }
    }
}

/// Reads until `buffer` is full or the file ends.
fn read_full(file: &File, mut offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset) {
            Ok(0) => break,
            Ok(count) => {
                done += count;
                offset += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

impl StoreFile for PosixFile {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn path(&self) -> &StorePath {
        &self.path
    }

    fn stat(&self) -> Result<Stat> {
        retry_on_intr(|| fs::fstat(&self.file))
            .map(|stat| stat_of(&stat))
            .map_err(|errno| failed("look at", &self.path, errno))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        read_full(&self.file, offset, buffer).map_err(|error| failed("read", &self.path, error))
    }

    fn will_read(&self, offset: u64, length: u64) {
        if let Some(length) = NonZeroU64::new(length) {
            // A hint: whoever reads notices what is wrong.
            let _ = fs::fadvise(&self.file, offset, Some(length), Advice::WillNeed);
        }
    }

    fn data_from(&self, offset: u64) -> Result<u64> {
        // The cursor that this moves is nobody's: all reading is by position.
        match retry_on_intr(|| fs::seek(&self.file, fs::SeekFrom::Data(offset))) {
            Ok(data) => Ok(data),
            Err(Errno::NXIO) => Ok(u64::MAX),
            // Not every file system has it.
            Err(_) => Ok(offset),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.file.write_all_at(data, offset).map_err(|error| failed("write", &self.path, error))
    }

    fn set_length(&self, length: u64) -> Result<()> {
        self.file.set_len(length).map_err(|error| failed("set the length of", &self.path, error))
    }

    fn reserve(&self, offset: u64, length: u64) -> Result<bool> {
        self.allocate("reserve space for", FallocateFlags::empty(), offset, length)
    }

    fn punch(&self, offset: u64, length: u64) -> Result<bool> {
        self.allocate("punch a hole into", FallocateFlags::PUNCH_HOLE, offset, length)
    }

    fn move_runs(&self, sources: &[Arc<dyn StoreFile>], runs: &[Move], means: Means) -> Result<Moved> {
        moves::move_runs(self, sources, runs, means)
    }

    fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|error| failed("sync", &self.path, error))
    }

    fn drop_cache(&self) -> Result<()> {
        // Pages that are not on the disk yet stay.
        fs::fadvise(&self.file, 0, None, Advice::DontNeed)
            .map_err(|errno| failed("drop the cache of", &self.path, errno))
    }

    fn identity(&self) -> Result<Identity> {
        identity::read(&self.file).map_err(|error| failed("read the attributes of", &self.path, error))
    }

    fn set_identity(&self, identity: &Identity) -> Result<()> {
        identity::give(&self.file, &self.path, identity)
    }

    fn image_locks(&self) -> Result<ImageLocks> {
        locks::image_locks(&self.file).map_err(|error| failed("ask the locks of", &self.path, error))
    }

    fn hold_image_locks(&self) -> Result<Option<Box<dyn Send + Sync>>> {
        let held = locks::hold(&self.file, &self.holders).map_err(|error| {
            BackendError::from_io_of(NO_LOCKS, "take the image locks of", &self.path, error)
        })?;
        Ok(held.map(|held| Box::new(held) as Box<dyn Send + Sync>))
    }

    fn hold_reader_lock(&self) -> Result<Box<dyn Send + Sync>> {
        let held = locks::hold_reader(&self.file, &self.readers).map_err(|error| {
            BackendError::from_io_of(NO_LOCKS, "take a reader's lock of", &self.path, error)
        })?;
        Ok(Box::new(held))
    }
}
