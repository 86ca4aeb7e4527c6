//! By compressing: clusters are read in the order of the guest, compressed on all processors, packed behind each other.
//!
//! A batch is written while the next one is compressed and the one behind it is read: no processor waits for one of the
//! others. What is compressed, and what that becomes, lies in memory that is used again.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::report::{How, Made};
use super::target::{Output, failed};
use crate::backend::BackendError;
use crate::digest::is_zero;
use crate::ops::{OpError, Result, Work};
use crate::progress::Cancelled;
use crate::qcow2::check::{Limits, check};
use crate::qcow2::compressed::Compressor;
use crate::qcow2::layout::canonical::Part;
use crate::qcow2::layout::packed::{Packed, Stored, Table};
use crate::qcow2::{CompressionType, Image};
use crate::store::StoreError;
use crate::store::stream::{Piece, Stream, Wanted};

/// How much is compressed in one go.
const BATCH_BYTES: usize = 8 << 20;
/// How much of that by one thread, before it asks for more.
const SHARE_BYTES: usize = 256 << 10;
/// How many batches may wait to be written.
const AHEAD: usize = 1;
/// How much of the file is written in one call.
const WRITE_BYTES: usize = 1 << 20;

/// Writes the image, seals it, and sees that it is sound.
pub(super) fn write(
    stream: &Stream,
    kind: CompressionType,
    level: i32,
    output: &Output,
    work: &Work<'_>,
) -> Result<Made> {
    let layout = stream.layout();
    // Nobody knows how much smaller it gets; it is never larger than this.
    output.need(layout.stored_bytes() / 4)?;
    let options = layout.form().options(layout.virtual_size(), kind);
    let size = usize::try_from(options.cluster_bits.bytes()).unwrap_or(usize::MAX);
    let packed = Packed::new(options, layout.table_count());
    let mut writer = Writer { output, size, packed, held: (0, Vec::new()), tables: 0, data: 0 };
    let coders = Coders { kind, level, size, idle: Mutex::default() };
    let spare = Mutex::default();
    let (sender, receiver) = sync_channel(AHEAD);
    work.progress.phase("compressing", layout.length());
    // The tables of the canonical image are not those of this one.
    let data = layout.metadata_bytes()..layout.length();
    let mut written = Ok(());
    let read: Result<_> = std::thread::scope(|scope| {
        // Ends when the last batch is in, or by an error, of which the reader learns by his next one.
        scope.spawn(|| written = writer.put_all(receiver, &spare));
        let mut batch = Batch { sender, coders: &coders, spare: &spare, shares: Vec::new(), bytes: 0 };
        let digest = stream.read::<OpError>(data, Wanted::Digest, &work.job(), |offset, piece| {
            let (Piece::Bytes(bytes), Some((Part::Data { guest }, _))) = (piece, layout.part(offset)) else {
                return Ok(());
            };
            batch.add(guest, bytes);
            if batch.bytes >= BATCH_BYTES { batch.flush() } else { Ok(()) }
        })?;
        batch.flush()?;
        Ok(digest)
    });
    // It is why nobody took what was read.
    written?;
    let digest = read?;
    let (data_bytes, metadata_bytes) = writer.finish()?;
    output.seal()?;
    let image = Image::open(output.reopen()?, output.shown())?;
    let report = check(&image, &Limits::default())?;
    if report.is_damaged() || report.leaked_clusters > 0 || report.incomplete {
        let what = report.findings.first().map(|finding| finding.message.clone()).unwrap_or_default();
        let message = format!("the new file was thrown away: its structure is not sound: {what}");
        return Err(StoreError::Proof { member: output.shown().to_owned(), message }.into());
    }
    Ok(Made { how: Some(How::Compress), digest, data_bytes, metadata_bytes, ..Made::default() })
}

/// Compressors that nobody uses now: making one costs as much as some clusters.
struct Coders {
    kind: CompressionType,
    level: i32,
    /// The size of a cluster.
    size: usize,
    idle: Mutex<Vec<Compressor>>,
}

/// Clusters that one thread compresses.
#[derive(Default)]
struct Share {
    /// Their numbers in the guest, and how each is stored; nothing for zeros.
    clusters: Vec<(u64, Option<Stored>)>,
    plain: Vec<u8>,
    /// What goes into the file, one behind the other.
    stored: Vec<u8>,
}

impl Share {
    fn compress(&mut self, coders: &Coders) {
        let idle = || coders.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = idle().pop();
        let mut coder = taken.unwrap_or_else(|| Compressor::new(coders.kind, coders.level));
        for ((_, how), cluster) in self.clusters.iter_mut().zip(self.plain.chunks(coders.size)) {
            if is_zero(cluster) {
                continue;
            }
            let compressed = coder.compress_onto(cluster, &mut self.stored);
            if compressed.is_none() {
                self.stored.extend_from_slice(cluster);
            }
            *how = Some(compressed.map_or(Stored::Plain, |bytes| Stored::Compressed(bytes as u64)));
        }
        idle().push(coder);
    }
}

/// Clusters that wait to be compressed.
struct Batch<'a> {
    sender: SyncSender<Vec<Share>>,
    coders: &'a Coders,
    spare: &'a Spare,
    shares: Vec<Share>,
    bytes: usize,
}

/// Shares that were written, for their memory.
type Spare = Mutex<Vec<Share>>;

impl Batch<'_> {
    fn add(&mut self, guest: u64, bytes: &[u8]) {
        let size = self.coders.size;
        let first = guest / size as u64;
        for (number, part) in (first..).zip(bytes.chunks(size)) {
            if self.shares.last().is_none_or(|share| share.plain.len() >= SHARE_BYTES) {
                let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
                self.shares.push(spare.unwrap_or_default());
            }
            let Some(share) = self.shares.last_mut() else { return };
            let end = share.plain.len() + size;
            share.plain.extend_from_slice(part);
            share.plain.resize(end, 0);
            share.clusters.push((number, None));
            self.bytes += size;
        }
    }

    fn flush(&mut self) -> Result<()> {
        let mut shares = std::mem::take(&mut self.shares);
        self.bytes = 0;
        let coders = self.coders;
        shares.par_iter_mut().with_max_len(1).for_each(|share| share.compress(coders));
        // Nobody takes it if writing has failed, whose error is the one to tell.
        self.sender.send(shares).map_err(|_| OpError::Cancelled(Cancelled))
    }
}

/// Writes what is placed; neighbours in one call.
struct Writer<'a> {
    output: &'a Output,
    /// The size of a cluster.
    size: usize,
    packed: Packed,
    held: (u64, Vec<u8>),
    tables: u64,
    data: u64,
}

impl Writer<'_> {
    fn put_all(&mut self, batches: Receiver<Vec<Share>>, spare: &Spare) -> Result<()> {
        for mut share in batches.into_iter().flatten() {
            let mut rest = share.stored.as_slice();
            for (number, how) in share.clusters.drain(..) {
                let Some(how) = how else { continue };
                let length = match how {
                    Stored::Compressed(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX),
                    Stored::Plain => self.size,
                };
                let Some((bytes, behind)) = rest.split_at_checked(length) else { break };
                self.put(number, how, bytes)?;
                rest = behind;
            }
            share.plain.clear();
            share.stored.clear();
            spare.lock().unwrap_or_else(PoisonError::into_inner).push(share);
        }
        Ok(())
    }

    fn put(&mut self, number: u64, stored: Stored, bytes: &[u8]) -> Result<()> {
        let (at, table) = self.packed.put(number, stored)?;
        if let Some(table) = table {
            self.table(&table)?;
        }
        self.data += bytes.len() as u64;
        let end = self.held.0 + self.held.1.len() as u64;
        if end != at || self.held.1.len() >= WRITE_BYTES {
            self.flush()?;
            self.held.0 = at;
        }
        self.held.1.extend_from_slice(bytes);
        Ok(())
    }

    fn table(&mut self, (at, bytes): &Table) -> Result<()> {
        self.tables += bytes.len() as u64;
        self.output.file().write_at(*at, bytes).map_err(self.failed())
    }

    fn flush(&mut self) -> Result<()> {
        if !self.held.1.is_empty() {
            self.output.file().write_at(self.held.0, &self.held.1).map_err(self.failed())?;
            self.held.1.clear();
        }
        Ok(())
    }

    fn failed(&self) -> impl Fn(BackendError) -> OpError + use<'_> {
        failed(self.output.shown())
    }

    /// Writes the rest of the tables; gives the bytes of data and of tables.
    fn finish(mut self) -> Result<(u64, u64)> {
        self.flush()?;
        let (writes, length) = self.packed.finish()?;
        let failed = failed(self.output.shown());
        self.output.file().set_length(length).map_err(&failed)?;
        for (at, bytes) in writes {
            self.tables += bytes.len() as u64;
            self.output.file().write_at(at, &bytes).map_err(&failed)?;
        }
        Ok((self.data, self.tables))
    }
}
