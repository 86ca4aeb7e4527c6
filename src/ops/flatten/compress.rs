//! By compressing: clusters are read in the order of the guest, compressed on all processors, packed behind each other.

use rayon::prelude::*;

use super::report::{How, Made};
use super::target::{Output, failed};
use crate::backend::BackendError;
use crate::digest::is_zero;
use crate::ops::{OpError, Result, Work};
use crate::qcow2::check::{Limits, check};
use crate::qcow2::compressed::Compressor;
use crate::qcow2::layout::canonical::Part;
use crate::qcow2::layout::packed::{Packed, Stored, Table};
use crate::qcow2::{CompressionType, Image};
use crate::store::StoreError;
use crate::store::stream::{Piece, Stream, Wanted};

/// How much is compressed in one go.
const BATCH_BYTES: usize = 8 << 20;
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
    let mut writer = Writer {
        output,
        packed: Packed::new(options, layout.table_count()),
        held: (0, Vec::new()),
        tables: 0,
        data: 0,
    };
    let mut batch = Batch { kind, level, size, clusters: Vec::new(), bytes: 0 };
    work.progress.phase("compressing", layout.length());
    // The tables of the canonical image are not those of this one.
    let data = layout.metadata_bytes()..layout.length();
    let digest = stream.read::<OpError>(data, Wanted::Digest, &work.job(), |offset, piece| {
        let (Piece::Bytes(bytes), Some((Part::Data { guest }, _))) = (piece, layout.part(offset)) else {
            return Ok(());
        };
        batch.add(guest, bytes);
        if batch.bytes >= BATCH_BYTES { batch.flush(&mut writer) } else { Ok(()) }
    })?;
    batch.flush(&mut writer)?;
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

/// Clusters that wait to be compressed.
struct Batch {
    kind: CompressionType,
    level: i32,
    size: usize,
    /// Number in the guest, and bytes.
    clusters: Vec<(u64, Vec<u8>)>,
    bytes: usize,
}

impl Batch {
    fn add(&mut self, guest: u64, bytes: &[u8]) {
        let first = guest / self.size as u64;
        for (number, part) in (first..).zip(bytes.chunks(self.size)) {
            let mut cluster = part.to_vec();
            cluster.resize(self.size, 0);
            self.bytes += cluster.len();
            self.clusters.push((number, cluster));
        }
    }

    fn flush(&mut self, writer: &mut Writer<'_>) -> Result<()> {
        let (kind, level) = (self.kind, self.level);
        let clusters = std::mem::take(&mut self.clusters);
        self.bytes = 0;
        let done: Vec<(u64, Option<Stored>, Vec<u8>)> = clusters
            .into_par_iter()
            .map_init(
                || Compressor::new(kind, level),
                |compressor, (number, cluster)| {
                    if is_zero(&cluster) {
                        return (number, None, Vec::new());
                    }
                    match compressor.compress(&cluster) {
                        Some(bytes) => (number, Some(Stored::Compressed(bytes.len() as u64)), bytes),
                        None => (number, Some(Stored::Plain), cluster),
                    }
                },
            )
            .collect();
        done.into_iter().try_for_each(|(number, stored, bytes)| match stored {
            Some(stored) => writer.put(number, stored, &bytes),
            None => Ok(()),
        })
    }
}

/// Writes what is placed; neighbours in one call.
struct Writer<'a> {
    output: &'a Output,
    packed: Packed,
    held: (u64, Vec<u8>),
    tables: u64,
    data: u64,
}

impl Writer<'_> {
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
