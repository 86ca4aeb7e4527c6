//! Images in memory for unit tests.

use std::any::Any;
use std::sync::Arc;

use crate::backend::{
    BackendError, FileId, FileKind, Identity, ImageLocks, Means, Move, Moved, Result, Stat, StoreFile,
};
use crate::ids::StorePath;
use crate::qcow2::format as f;
use crate::qcow2::image::Image;
use crate::units::SECTOR_BYTES;

/// A file of these bytes, and zeros up to `length`. Read only.
#[derive(Debug)]
pub(crate) struct Bytes {
    path: StorePath,
    content: Vec<u8>,
    length: u64,
}

/// Opens an image of these bytes, with a hole up to `length` behind them.
pub(crate) fn open(bytes: Vec<u8>, length: u64) -> crate::qcow2::Result<Image> {
    let length = length.max(bytes.len() as u64);
    Image::open(Arc::new(Bytes { path: StorePath::root(), content: bytes, length }), "test")
}

fn refuse<T>() -> Result<T> {
    Err(BackendError::NotPlain { path: "test".to_owned() })
}

impl StoreFile for Bytes {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn path(&self) -> &StorePath {
        &self.path
    }
    fn stat(&self) -> Result<Stat> {
        Ok(Stat {
            kind: FileKind::File,
            id: FileId { device: 0, inode: 0 },
            length: self.length,
            allocated_bytes: self.length / SECTOR_BYTES * SECTOR_BYTES,
            modified_ns: 0,
            changed_ns: 0,
            links: 1,
            uid: 0,
            gid: 0,
            mode: 0o600,
        })
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let count = usize::try_from(self.length.saturating_sub(offset)).unwrap().min(buffer.len());
        buffer[..count].fill(0);
        if let Some(rest) = usize::try_from(offset).ok().and_then(|offset| self.content.get(offset..)) {
            let stored = rest.len().min(count);
            buffer[..stored].copy_from_slice(&rest[..stored]);
        }
        Ok(count)
    }
    fn write_at(&self, _: u64, _: &[u8]) -> Result<()> {
        refuse()
    }
    fn set_length(&self, _: u64) -> Result<()> {
        refuse()
    }
    fn reserve(&self, _: u64, _: u64) -> Result<bool> {
        refuse()
    }
    fn punch(&self, _: u64, _: u64) -> Result<bool> {
        refuse()
    }
    fn move_runs(&self, _: &[Arc<dyn StoreFile>], _: &[Move], _: Means) -> Result<Moved> {
        refuse()
    }
    fn sync(&self) -> Result<()> {
        refuse()
    }
    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }
    fn identity(&self) -> Result<Identity> {
        refuse()
    }
    fn set_identity(&self, _: &Identity) -> Result<()> {
        refuse()
    }
    fn image_locks(&self) -> Result<ImageLocks> {
        Ok(ImageLocks::default())
    }
    fn hold_image_locks(&self) -> Result<Option<Box<dyn Send + Sync>>> {
        refuse()
    }
}

/// The bytes of an image to be: header in cluster 0, refcount table in 1, its block in 2, L1 table from
/// cluster 3 on. Refcounts of 16 bits.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    pub(crate) bytes: Vec<u8>,
    pub(crate) cluster: u64,
}

impl Draft {
    pub(crate) fn new(cluster_bits: u32, virtual_size: u64, extended: bool) -> Self {
        let cluster = 1_u64 << cluster_bits;
        let mut draft = Self { bytes: vec![0; usize::try_from(4 * cluster).unwrap()], cluster };
        let entries_per_table = cluster / if extended { 16 } else { 8 };
        let l1_entries = virtual_size.div_ceil(entries_per_table * cluster);
        draft.put32(f::AT_MAGIC, f::MAGIC);
        draft.put32(f::AT_VERSION, 3);
        draft.put32(f::AT_CLUSTER_BITS, cluster_bits);
        draft.put(f::AT_VIRTUAL_SIZE as u64, virtual_size);
        draft.put32(f::AT_L1_ENTRIES, u32::try_from(l1_entries).unwrap());
        draft.put(f::AT_L1_OFFSET as u64, 3 * cluster);
        draft.put(f::AT_REFCOUNT_TABLE_OFFSET as u64, cluster);
        draft.put32(f::AT_REFCOUNT_TABLE_CLUSTERS, 1);
        draft.put32(f::AT_REFCOUNT_ORDER, 4);
        draft.put32(f::AT_HEADER_LENGTH, 112);
        draft.put(f::AT_INCOMPATIBLE as u64, if extended { f::INCOMPATIBLE_EXTENDED_L2 } else { 0 });
        draft.put(cluster, 2 * cluster);
        let end = (3 * cluster + l1_entries * 8).next_multiple_of(cluster).max(4 * cluster);
        draft.bytes.resize(usize::try_from(end).unwrap(), 0);
        for index in 0..(end / cluster).min(cluster / 2) {
            draft.put_refcount(index, 1);
        }
        draft
    }

    pub(crate) fn put32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }

    /// Puts a word, growing the file by whole clusters.
    pub(crate) fn put(&mut self, at: u64, value: u64) {
        let at = usize::try_from(at).unwrap();
        if self.bytes.len() < at + 8 {
            let length = (at as u64 + 8).next_multiple_of(self.cluster);
            self.bytes.resize(usize::try_from(length).unwrap(), 0);
        }
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    pub(crate) fn put_l1(&mut self, index: u64, value: u64) {
        self.put(3 * self.cluster + 8 * index, value);
    }

    /// Sets the refcount of one cluster.
    pub(crate) fn put_refcount(&mut self, cluster: u64, count: u16) {
        let at = usize::try_from(2 * self.cluster + 2 * cluster).unwrap();
        self.bytes[at..at + 2].copy_from_slice(&count.to_be_bytes());
    }

    pub(crate) fn open(&self) -> Image {
        open(self.bytes.clone(), 0).unwrap()
    }
}
