//! The second pass over the map: composed and compressed clusters and every table, in an order in which the
//! header comes last, so that a half-written file is no image. A file that is kept has its header already.

use crate::failure::Code;
use crate::qcow2::error::{ImageError, Result};
use crate::qcow2::layout::clusters::{Clusters, Fill, Piece, Span};
use crate::qcow2::layout::packing::Packing;
use crate::qcow2::layout::shape::{Shape, Shaper};
use crate::qcow2::layout::{Head, Layout, pieces_limit};
use crate::qcow2::map::{CompressedCluster, Run};
use crate::qcow2::tables::{EntryFormat, L1Entry, L2Entry, Subclusters};
use crate::units::{HostOffset, SECTOR_BYTES};

/// Something to write besides the moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Emit {
    /// Bytes of a table or of the header.
    Table {
        /// Of which.
        kind: TableKind,
        /// Where.
        to: HostOffset,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// A cluster to put together: zeros, with parts laid over.
    Composed {
        /// Where.
        to: HostOffset,
        /// Its length: one cluster.
        length: u64,
        /// The parts that are not zero.
        parts: Vec<Part>,
    },
    /// A compressed cluster to copy as it is, zero-padded to whole sectors.
    Compressed {
        /// Where.
        to: HostOffset,
        /// Bytes to write.
        length: u64,
        /// From which source.
        layer: usize,
        /// What to read there.
        cluster: CompressedCluster,
    },
}

/// What metadata there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableKind {
    /// An L2 table, or the L1 table.
    Entries,
    /// A refcount block, or the refcount table.
    Refcounts,
    /// The header.
    Header,
}

/// A part of a composed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Offset in the cluster in bytes.
    pub within: u64,
    /// The guest range and where its bytes are: data, compressed or below, never zero.
    pub piece: Piece,
}

/// Walks the map and the layout together.
pub fn emit<I: Iterator<Item = Result<Run>>>(
    layout: &Layout,
    runs: I,
) -> impl Iterator<Item = Result<Emit>> + use<'_, I> {
    let options = &layout.options;
    Emitter {
        layout,
        spans: Clusters::new(runs, options.cluster_bits, options.below_end()),
        format: options.entry_format(layout.version),
        packing: Packing::new(options.cluster_bits, pieces_limit(layout.refcounts)),
        current: None,
        table: None,
        tables_done: 0,
        composed: 0,
        l1: Vec::new(),
        stage: Stage::Clusters,
    }
}

/// What is being emitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Clusters,
    RefcountBlocks(u64),
    RefcountTable,
    L1,
    Header,
    Done,
}

/// The L2 table that is being filled.
struct Table {
    index: u64,
    bytes: Vec<u8>,
}

struct Emitter<'a, I> {
    layout: &'a Layout,
    spans: Clusters<I>,
    format: EntryFormat,
    packing: Packing,
    /// Clusters of a span that are not done: first, count, shape of the first, pieces of a mixed one.
    current: Option<Pending>,
    table: Option<Table>,
    tables_done: u64,
    composed: u64,
    /// L1 entries so far, `(index, entry)`: one per L2 table.
    l1: Vec<(u64, u64)>,
    stage: Stage,
}

struct Pending {
    first: u64,
    count: u64,
    shape: Shape,
    pieces: Vec<Piece>,
}

impl<I: Iterator<Item = Result<Run>>> Emitter<'_, I> {
    /// Goes on until something is to be written; `None` at the end of the clusters.
    fn clusters(&mut self) -> Result<Option<Emit>> {
        loop {
            if self.current.is_none() {
                let Some(span) = self.spans.next() else { return Ok(self.flush()) };
                self.current = self.pending(span?);
            }
            let Some(pending) = &self.current else { continue };
            let per_table = self.format.entries_per_table();
            let index = pending.first / per_table;
            if self.table.as_ref().is_some_and(|table| table.index != index) {
                return Ok(self.flush());
            }
            if let Some(emit) = self.step(index)? {
                return Ok(Some(emit));
            }
        }
    }

    fn pending(&self, span: Span) -> Option<Pending> {
        let shaper = Shaper { options: &self.layout.options, sources: &self.layout.sources };
        let pending = match span {
            Span::Same { first, count, piece } => {
                Pending { first, count, shape: shaper.same(&piece), pieces: vec![piece] }
            }
            Span::Mixed { cluster, pieces } => {
                Pending { first: cluster, count: 1, shape: shaper.mixed(cluster, &pieces), pieces }
            }
        };
        (pending.shape != Shape::Nothing).then_some(pending)
    }

    /// Writes entries of the pending span into its table: as many as fit, or one if it emits something.
    fn step(&mut self, index: u64) -> Result<Option<Emit>> {
        let Some(mut pending) = self.current.take() else { return Ok(None) };
        let size = self.layout.options.cluster_bits.bytes();
        let per_table = self.format.entries_per_table();
        let room = (index + 1) * per_table - pending.first;
        let slot = pending.first % per_table;
        let single = matches!(pending.shape, Shape::Composed(_) | Shape::Compressed { .. });
        let count = if single { 1 } else { pending.count.min(room) };
        let (entry, emit) = self.entry(&pending)?;
        let step = if matches!(pending.shape, Shape::Whole { .. }) { size } else { 0 };
        self.write_entries(index, slot, count, entry, step)?;
        pending.first += count;
        pending.count -= count;
        if let Shape::Whole { layer, host, subclusters } = pending.shape {
            pending.shape = Shape::Whole { layer, host: host.plus(count * size), subclusters };
        }
        if let Some(piece) = pending.pieces.first_mut()
            && pending.count > 0
        {
            piece.start = piece.start.plus(count * size);
            piece.length -= count * size;
            if let Fill::Data { layer, host } = piece.fill {
                piece.fill = Fill::Data { layer, host: host.plus(count * size) };
            }
        }
        self.current = (pending.count > 0).then_some(pending);
        Ok(emit)
    }

    /// The entry of the pending span's first cluster, and what to write for it.
    fn entry(&mut self, pending: &Pending) -> Result<(L2Entry, Option<Emit>)> {
        let size = self.layout.options.cluster_bits.bytes();
        match pending.shape {
            Shape::Nothing => Ok((L2Entry::Unallocated, None)),
            Shape::Zero(subclusters) => Ok((self.plain(None, subclusters), None)),
            Shape::Whole { layer, host, subclusters } => {
                let to = self.layout.placed(layer, host).ok_or_else(map_changed)?;
                Ok((self.plain(Some(to), subclusters), None))
            }
            Shape::Composed(_) if self.composed >= self.layout.amounts.composed => Err(map_changed()),
            Shape::Composed(subclusters) => {
                let to = HostOffset(self.layout.geometry.composed + self.composed * size);
                self.composed += 1;
                let start = pending.first * size;
                let parts = parts(&pending.pieces, start, size);
                let emit = Emit::Composed { to, length: size, parts };
                Ok((self.plain(Some(to), subclusters), Some(emit)))
            }
            Shape::Compressed { layer, cluster } => {
                let place = self.packing.place(cluster.stored_bytes, |_| {});
                let to = HostOffset(self.layout.geometry.compressed + place.offset);
                let length = place.sectors * SECTOR_BYTES;
                if self.packing.clusters() > self.layout.amounts.compressed {
                    return Err(map_changed());
                }
                let emit = Emit::Compressed { to, length, layer, cluster };
                Ok((L2Entry::Compressed { host: to, stored_bytes: length }, Some(emit)))
            }
        }
    }

    fn plain(&self, host: Option<HostOffset>, subclusters: Subclusters) -> L2Entry {
        let copied = host.is_some();
        match host {
            _ if self.format.extended => L2Entry::Extended { host, copied, subclusters },
            Some(host) => L2Entry::Data { host, copied },
            None => L2Entry::Zero { host, copied },
        }
    }

    fn write_entries(&mut self, index: u64, slot: u64, count: u64, entry: L2Entry, step: u64) -> Result<()> {
        let size = usize::try_from(self.layout.options.cluster_bits.bytes()).unwrap_or_default();
        let table = self.table.get_or_insert_with(|| Table { index, bytes: vec![0; size] });
        let width = usize::try_from(self.format.entry_bytes()).unwrap_or_default();
        let mut entry = entry;
        for number in 0..count {
            let (low, high) = self.format.encode(entry).ok_or_else(map_changed)?;
            let at = usize::try_from(slot + number).unwrap_or(usize::MAX).saturating_mul(width);
            let words = [low.to_be_bytes(), high.to_be_bytes()].concat();
            let (Some(place), Some(bytes)) = (table.bytes.get_mut(at..at + width), words.get(..width)) else {
                return Err(map_changed());
            };
            place.copy_from_slice(bytes);
            entry = advanced(entry, step);
        }
        Ok(())
    }

    /// Ends the table that is being filled.
    fn flush(&mut self) -> Option<Emit> {
        let table = self.table.take()?;
        let size = self.layout.options.cluster_bits.bytes();
        let host = HostOffset(self.layout.geometry.l2_tables + self.tables_done * size);
        self.tables_done += 1;
        self.l1.push((table.index, L1Entry::Table { host, copied: true }.encode()));
        Some(Emit::Table { kind: TableKind::Entries, to: host, bytes: table.bytes })
    }

    /// Whether all was there again that the plan has room for.
    fn as_planned(&self) -> bool {
        let amounts = &self.layout.amounts;
        let seen = (self.tables_done, self.composed, self.packing.clusters());
        seen == (amounts.l2_tables, amounts.composed, amounts.compressed)
    }

    fn l1_table(&self) -> Emit {
        let geometry = &self.layout.geometry;
        let mut bytes = vec![0; usize::try_from(geometry.refcount_table - geometry.l1).unwrap_or_default()];
        for (index, entry) in &self.l1 {
            let at = usize::try_from(*index).unwrap_or(usize::MAX).saturating_mul(8);
            if let Some(place) = bytes.get_mut(at..at.saturating_add(8)) {
                place.copy_from_slice(&entry.to_be_bytes());
            }
        }
        Emit::Table { kind: TableKind::Entries, to: HostOffset(geometry.l1), bytes }
    }

    fn step_stage(&mut self) -> Result<Option<Emit>> {
        loop {
            match self.stage {
                Stage::Clusters => match self.clusters()? {
                    Some(emit) => return Ok(Some(emit)),
                    None if !self.as_planned() => return Err(map_changed()),
                    None => self.stage = Stage::RefcountBlocks(0),
                },
                Stage::RefcountBlocks(index) if index < self.layout.geometry.refcount_block_count => {
                    self.stage = Stage::RefcountBlocks(index + 1);
                    return Ok(Some(refcount_block(self.layout, index)));
                }
                Stage::RefcountBlocks(_) => self.stage = Stage::RefcountTable,
                Stage::RefcountTable => {
                    let empty = self.layout.amounts.l1_entries == 0;
                    self.stage = if empty { Stage::Header } else { Stage::L1 };
                    return Ok(Some(refcount_table(self.layout)));
                }
                Stage::L1 => {
                    self.stage = Stage::Header;
                    return Ok(Some(self.l1_table()));
                }
                Stage::Header => {
                    self.stage = Stage::Done;
                    // That of a kept file is switched by itself, when all else is durable.
                    if let Head::New(bytes) = &self.layout.head {
                        let (kind, to) = (TableKind::Header, HostOffset(0));
                        return Ok(Some(Emit::Table { kind, to, bytes: bytes.clone() }));
                    }
                }
                Stage::Done => return Ok(None),
            }
        }
    }
}

impl<I: Iterator<Item = Result<Run>>> Iterator for Emitter<'_, I> {
    type Item = Result<Emit>;

    fn next(&mut self) -> Option<Self::Item> {
        let emitted = self.step_stage().transpose();
        if matches!(emitted, Some(Err(_))) {
            self.stage = Stage::Done;
        }
        emitted
    }
}

/// Block `index` of the refcounts.
fn refcount_block(layout: &Layout, index: u64) -> Emit {
    let size = layout.options.cluster_bits.bytes();
    let width = layout.refcounts;
    let per_block = width.entries_per_block(layout.options.cluster_bits);
    let total = layout.geometry.end / size;
    let compressed = layout.geometry.compressed / size;
    let mut bytes = vec![0; usize::try_from(size).unwrap_or_default()];
    let first = index * per_block;
    for cluster in first..(first + per_block).min(total) {
        let count = match cluster.checked_sub(compressed) {
            Some(at) => usize::try_from(at)
                .ok()
                .and_then(|at| layout.compressed_counts.get(at))
                .map_or(0, |count| u64::from(*count)),
            None => u64::from(layout.is_used(cluster)),
        };
        // In range by the loop's bounds; a count passed its limit when it was placed.
        let _ = width.set(&mut bytes, usize::try_from(cluster - first).unwrap_or(usize::MAX), count);
    }
    let to = HostOffset(layout.geometry.refcount_blocks + index * size);
    Emit::Table { kind: TableKind::Refcounts, to, bytes }
}

fn refcount_table(layout: &Layout) -> Emit {
    let geometry = &layout.geometry;
    let size = layout.options.cluster_bits.bytes();
    let mut bytes: Vec<u8> = (0..geometry.refcount_block_count)
        .flat_map(|index| (geometry.refcount_blocks + index * size).to_be_bytes())
        .collect();
    bytes.resize(usize::try_from(geometry.refcount_table_clusters * size).unwrap_or_default(), 0);
    Emit::Table { kind: TableKind::Refcounts, to: HostOffset(geometry.refcount_table), bytes }
}

/// The parts of a composed cluster that have bytes.
fn parts(pieces: &[Piece], start: u64, size: u64) -> Vec<Part> {
    let end = start + size;
    let has_bytes = |piece: &&Piece| !matches!(piece.fill, Fill::Zero | Fill::Nothing);
    let clip = |piece: &Piece| {
        // Only the last piece of a long span reaches past the cluster.
        let length = piece.length.min(end.saturating_sub(piece.start.0));
        Part { within: piece.start.0 - start, piece: Piece { length, ..*piece } }
    };
    pieces.iter().filter(has_bytes).map(clip).collect()
}

/// The same entry for the next cluster.
fn advanced(entry: L2Entry, step: u64) -> L2Entry {
    match entry {
        L2Entry::Data { host, copied } => L2Entry::Data { host: host.plus(step), copied },
        L2Entry::Extended { host: Some(host), copied, subclusters } => {
            L2Entry::Extended { host: Some(host.plus(step)), copied, subclusters }
        }
        other => other,
    }
}

fn map_changed() -> ImageError {
    ImageError::Bad {
        image: "the new image".to_owned(),
        code: Code::ChangedMeanwhile,
        detail: "the map was another one when it was read again".to_owned(),
    }
}
