//! An open image: a file, its header, windows of its tables.

mod extents;
mod holes;
#[cfg(test)]
pub(crate) mod testing;
mod window;

use std::sync::Arc;

pub use extents::Extents;
pub(in crate::qcow2) use holes::Holes;
pub(crate) use window::Window;

use crate::backend::{BackendError, Stat, StoreFile, read_padded};
use crate::failure::Code;
use crate::qcow2::compressed::decompress;
use crate::qcow2::error::{ImageError, Result};
use crate::qcow2::header::{Header, parse_prefix};
use crate::qcow2::layout::Switch;
use crate::qcow2::map::CompressedCluster;
use crate::qcow2::tables::{L1_ENTRY_BYTES, L1Entry, word};
use crate::units::{ClusterBits, GuestOffset, HostOffset};

/// How much of a file is read for its header at first; all that QEMU puts there fits.
const FIRST_READ_BYTES: u64 = 4096;

/// The window on each table that [`Image::extents`] takes, in bytes.
pub const DEFAULT_WINDOW_BYTES: usize = 64 * 1024;

/// How many tables of one image are told to the store at once.
const MOST_ANNOUNCED: u64 = 8192;

/// The least window on a table, in bytes.
pub const MIN_WINDOW_BYTES: usize = 4096;

/// An image opened for reading. A clone shares the file and the header.
#[derive(Clone, Debug)]
pub struct Image {
    file: Arc<dyn StoreFile>,
    name: Arc<str>,
    header: Arc<Header>,
    file_length: u64,
    allocated_bytes: u64,
    /// What its header will be.
    switch: Option<Arc<Switch>>,
}

impl Image {
    /// Reads and checks the header of `file`; `name` is what errors call the image.
    ///
    /// Reads 4 KiB, and the rest of the first cluster (at most 2 MiB) only if the header goes on there.
    /// Errors as [`Header::parse`], or the store's.
    pub fn open(file: Arc<dyn StoreFile>, name: &str) -> Result<Self> {
        Self::open_over(file, name, None)
    }

    /// Opens the image that `file` will be when its header is switched; nothing is written. For proofs.
    pub fn open_switched(file: Arc<dyn StoreFile>, name: &str, switch: &Switch) -> Result<Self> {
        Self::open_over(file, name, Some(Arc::new(switch.clone())))
    }

    /// Opens a file, with its first bytes as `switch` makes them.
    fn open_over(file: Arc<dyn StoreFile>, name: &str, switch: Option<Arc<Switch>>) -> Result<Self> {
        let failed = |source: BackendError| ImageError::Store { image: name.to_owned(), source };
        let start = |length: u64| {
            let mut bytes = read_start(&*file, length).map_err(failed)?;
            if let Some(switch) = &switch {
                switch.lay_over(0, &mut bytes);
            }
            Ok(bytes)
        };
        let Stat { length: file_length, allocated_bytes, .. } = file.stat().map_err(failed)?;
        let first = start(file_length.min(FIRST_READ_BYTES))?;
        let header = if let Some(header) = parse_prefix(name, file_length, &first)? {
            header
        } else {
            let whole = file_length.min(ClusterBits::new(21).map_or(0, ClusterBits::bytes));
            Header::parse(name, file_length, &start(whole)?)?
        };
        let (name, header) = (Arc::from(name), Arc::new(header));
        Ok(Self { file, name, header, file_length, allocated_bytes, switch })
    }

    /// The same image as if its file ended at `length` bytes, if it is longer: for one that was grown.
    #[must_use]
    pub fn ending_at(&self, length: u64) -> Self {
        Self { file_length: self.file_length.min(length), ..self.clone() }
    }

    /// What errors call it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &Arc<dyn StoreFile> {
        &self.file
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The file's length in bytes when it was opened. Data at or behind it reads as zeros; a data cluster
    /// that begins a whole cluster or more behind it was lost.
    #[must_use]
    pub fn file_length(&self) -> u64 {
        self.file_length
    }

    /// What the file took on its store when it was opened, in bytes: much less than its length if it is sparse.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        self.allocated_bytes
    }

    /// Where the first bytes at or behind `offset` are that may be something else than zeros.
    pub(crate) fn data_from(&self, offset: u64) -> Result<u64> {
        self.file.data_from(offset).map_err(|source| self.store_error(source))
    }

    /// The image's allocation of `[from, virtual_size)`, in order, without gaps, in maximal runs (a
    /// compressed cluster is a run of its own). Starts at once wherever `from` is.
    ///
    /// Memory: two windows of at most 64 KiB. After an error the iterator is at its end.
    #[must_use]
    pub fn extents(&self, from: GuestOffset) -> Extents {
        self.extents_windowed(from, DEFAULT_WINDOW_BYTES)
    }

    /// As [`Image::extents`] with windows of `window_bytes` on the L1 table and on one L2 table, clamped to
    /// 4 to 64 KiB: for chains of many members.
    #[must_use]
    pub fn extents_windowed(&self, from: GuestOffset, window_bytes: usize) -> Extents {
        Extents::new(self.clone(), from, window_bytes.clamp(MIN_WINDOW_BYTES, DEFAULT_WINDOW_BYTES))
    }

    /// Reads `buffer.len()` bytes at `host`, zeros behind the end that the file had when it was opened.
    pub fn read_data(&self, host: HostOffset, buffer: &mut [u8]) -> Result<()> {
        let there = self.file_length.saturating_sub(host.0);
        let (there, behind) =
            buffer.split_at_mut(usize::try_from(there).unwrap_or(usize::MAX).min(buffer.len()));
        behind.fill(0);
        self.read_file(host.0, there)
    }

    /// Reads the file itself at `offset`, zeros behind its end.
    pub(crate) fn read_file(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if buffer.is_empty() {
            return Ok(());
        }
        read_padded(&*self.file, offset, buffer).map_err(|source| self.store_error(source))?;
        if let Some(switch) = &self.switch {
            switch.lay_over(offset, buffer);
        }
        Ok(())
    }

    /// Tells the store that so many bytes at `offset` of the file are going to be read soon.
    pub(crate) fn will_read(&self, offset: u64, length: u64) {
        self.file.will_read(offset, length.min(self.file_length.saturating_sub(offset)));
    }

    /// Tells the store that the tables are going to be read soon, at most so many bytes of them. Reads the beginning of
    /// the L1 table for that, and says nothing of what is wrong with it: whoever reads the tables does.
    pub fn announce_tables(&self, most: u64) -> Result<()> {
        let format = self.header.entry_format();
        let table = self.header.cluster_bits.bytes();
        let entries = (most / table).min(self.header.l1_bytes() / L1_ENTRY_BYTES).min(MOST_ANNOUNCED);
        let mut l1 = vec![0; usize::try_from(entries * L1_ENTRY_BYTES).unwrap_or_default()];
        self.read_data(self.header.l1_offset, &mut l1)?;
        let mut range = 0..0;
        for index in 0..l1.len() / 8 {
            let entry = L1Entry::decode(word(&l1, index).unwrap_or_default(), format.cluster_bits);
            let Ok(L1Entry::Table { host, .. }) = entry else { continue };
            if host.0 != range.end {
                self.will_read(range.start, range.end - range.start);
                range.start = host.0;
            }
            range.end = host.0.saturating_add(table);
        }
        self.will_read(range.start, range.end - range.start);
        Ok(())
    }

    /// Reads and decompresses a cluster of this image to exactly one cluster of bytes, also where the
    /// virtual size cuts it. Errors: `bad-compression`, or the store's.
    pub fn read_compressed(&self, cluster: &CompressedCluster) -> Result<Vec<u8>> {
        let bits = self.header.cluster_bits;
        // A descriptor cannot say more; a caller's value might.
        let length = cluster.stored_bytes.min(2 * bits.bytes());
        let mut stored = vec![0; usize::try_from(length).unwrap_or_default()];
        self.read_data(cluster.host, &mut stored)?;
        decompress(self.header.compression, &stored, bits).map_err(|fault| {
            let CompressedCluster { guest, host, .. } = cluster;
            self.bad(Code::BadCompression, format!("the compressed cluster of {guest} at {host}: {fault}"))
        })
    }

    pub(crate) fn bad(&self, code: Code, detail: String) -> ImageError {
        ImageError::Bad { image: self.name.to_string(), code, detail }
    }

    pub(crate) fn store_error(&self, source: BackendError) -> ImageError {
        ImageError::Store { image: self.name.to_string(), source }
    }
}

/// The first `length` bytes, at most 2 MiB, or as many as there are.
fn read_start(file: &dyn StoreFile, length: u64) -> std::result::Result<Vec<u8>, BackendError> {
    let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
    let count = file.read_at(0, &mut bytes)?;
    bytes.truncate(count);
    Ok(bytes)
}

#[cfg(test)]
mod tests;
