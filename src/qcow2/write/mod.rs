//! Writes a planned image into an empty file, or ([`write_onto`]) behind the end of one that is kept.
//!
//! In an empty file data and tables are written side by side (moving data waits for the store, tables for the
//! processor), and the header comes last: one that was cut off by a crash has no magic and is taken for no
//! image. Nothing but [`write_onto`] and [`switch`] syncs, and nothing names the file; the caller seals and
//! publishes it.

mod onto;

use std::ops::Add;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use onto::{switch, switch_state, write_onto};
use rayon::prelude::*;

use crate::backend::{BackendError, Means, Move, Moved, StoreFile};
use crate::failure::Code;
use crate::progress::{Cancel, Pace, Progress};
use crate::qcow2::error::{ImageError, Result};
use crate::qcow2::image::Image;
use crate::qcow2::layout::{Emit, Fill, Layout, Part, TableKind};
use crate::qcow2::map::{CompressedCluster, Run};
use crate::units::{GuestOffset, HostOffset};

/// Moves that are given to the store in one go: between batches the work can be stopped.
const BATCH_MOVES: usize = 4096;
/// Bytes of moves in one batch, about.
const BATCH_BYTES: u64 = 256 << 20;
/// Bytes of composed clusters held in memory at once, about.
const COMPOSE_BYTES: u64 = 32 << 20;
/// Bytes of composed clusters that are written in one go, about, and share what was decompressed for them.
const CHUNK_BYTES: u64 = 512 << 10;

/// Reads what the new image's backing file shows at a guest offset.
pub type ReadBelow<'a> = dyn Fn(GuestOffset, &mut [u8]) -> Result<()> + Sync + 'a;

/// Where the bytes come from and who watches.
pub struct Sources<'a> {
    /// The layers that the map's indices name.
    pub layers: &'a [Image],
    /// For each layer, the alignment in bytes that cloning from it into the target needs; 0: copy.
    pub clone_alignment: &'a [u64],
    /// The view below the lowest layer.
    pub below: &'a ReadBelow<'a>,
    /// Told of bytes done.
    pub progress: &'a dyn Progress,
    /// Looked at between batches.
    pub cancel: &'a Cancel,
    /// The limit on bytes a second.
    pub pace: &'a Pace,
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Bytes shared by cloning.
    pub cloned_bytes: u64,
    /// Bytes of data written: copied, composed, compressed.
    pub data_bytes: u64,
    /// Bytes of header and tables written.
    pub metadata_bytes: u64,
}

impl Add for Written {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            cloned_bytes: self.cloned_bytes + other.cloned_bytes,
            data_bytes: self.data_bytes + other.data_bytes,
            metadata_bytes: self.metadata_bytes + other.metadata_bytes,
        }
    }
}

/// Writes the image into an empty file. `runs` must be the very map the layout was planned from. After an
/// error the file is of no use.
pub fn write(
    layout: &Layout,
    target: &dyn StoreFile,
    sources: &Sources<'_>,
    runs: impl Iterator<Item = Result<Run>> + Send,
) -> Result<Written> {
    target.set_length(layout.file_length()).map_err(|source| store_error(target, source))?;
    let (mut written, header) = fill(layout, target, sources, runs)?;
    if let Some((to, bytes)) = header {
        check(sources.cancel, target)?;
        target.write_at(to.0, &bytes).map_err(|source| store_error(target, source))?;
        written.metadata_bytes += bytes.len() as u64;
    }
    Ok(written)
}

/// The first cluster of a new file, and where it goes.
type Head = (HostOffset, Vec<u8>);

/// Writes all but the header, which is given back; `None` for a file that is kept.
fn fill(
    layout: &Layout,
    target: &dyn StoreFile,
    sources: &Sources<'_>,
    runs: impl Iterator<Item = Result<Run>> + Send,
) -> Result<(Written, Option<Head>)> {
    // When one half fails the other one stops, too.
    let failed = AtomicBool::new(false);
    let half = |result: Result<Written>| {
        failed.fetch_or(result.is_err(), Ordering::Relaxed);
        result
    };
    let go_on = || !failed.load(Ordering::Relaxed);
    let mut header = None;
    let (moved, tables) = rayon::join(
        || half(move_all(layout, target, sources, go_on)),
        || {
            let emits = layout.emit(runs).take_while(|_| go_on()).filter_map(|emit| match emit {
                Ok(Emit::Table { kind: TableKind::Header, to, bytes }) => {
                    header = Some((to, bytes));
                    None
                }
                other => Some(other),
            });
            half(write_all(emits, target, sources))
        },
    );
    Ok((moved? + tables?, header))
}

/// Writes what a layout emits, in its order but for the data, which gathers.
fn write_all(
    emits: impl Iterator<Item = Result<Emit>>,
    target: &dyn StoreFile,
    sources: &Sources<'_>,
) -> Result<Written> {
    let mut written = Written::default();
    let mut pending = Vec::new();
    let mut pending_bytes = 0;
    for emit in emits {
        match emit? {
            Emit::Table { to, bytes, .. } => {
                check(sources.cancel, target)?;
                target.write_at(to.0, &bytes).map_err(|source| store_error(target, source))?;
                written.metadata_bytes += bytes.len() as u64;
            }
            data @ (Emit::Composed { .. } | Emit::Compressed { .. }) => {
                if let Emit::Composed { length, .. } | Emit::Compressed { length, .. } = &data {
                    written.data_bytes += length;
                    pending_bytes += length;
                }
                pending.push(data);
                if pending_bytes >= COMPOSE_BYTES {
                    flush(&mut pending, &mut pending_bytes, target, sources)?;
                }
            }
        }
    }
    flush(&mut pending, &mut pending_bytes, target, sources)?;
    Ok(written)
}

fn store_error(target: &dyn StoreFile, source: BackendError) -> ImageError {
    ImageError::Store { image: target.path().to_string(), source }
}

fn move_all(
    layout: &Layout,
    target: &dyn StoreFile,
    sources: &Sources<'_>,
    go_on: impl Fn() -> bool,
) -> Result<Written> {
    let files: Vec<Arc<dyn StoreFile>> = sources.layers.iter().map(|layer| layer.file().clone()).collect();
    let mut done = Moved::default();
    let most = sources.pace.at_once(BATCH_BYTES);
    let mut moves = layout.moves().flat_map(|run| in_batches(run, most)).peekable();
    while moves.peek().is_some() && go_on() {
        check(sources.cancel, target)?;
        let (mut clones, mut copies) = (Vec::new(), Vec::new());
        let mut bytes = 0;
        while bytes < most
            && clones.len() + copies.len() < BATCH_MOVES
            && let Some(next) = moves.next()
        {
            bytes += next.length;
            if clonable(&next, sources.clone_alignment) { clones.push(next) } else { copies.push(next) }
        }
        sources.pace.spend(copies.iter().map(|copy: &Move| copy.length).sum(), sources.cancel);
        for (runs, means) in [(&clones, Means::Clone), (&copies, Means::Copy)] {
            if !runs.is_empty() {
                done +=
                    target.move_runs(&files, runs, means).map_err(|source| store_error(target, source))?;
            }
        }
        sources.progress.advance(bytes);
    }
    Ok(Written { cloned_bytes: done.cloned_bytes, data_bytes: done.copied_bytes, metadata_bytes: 0 })
}

/// A run in parts of at most a batch: a run may be as long as a disk.
fn in_batches(run: Move, most: u64) -> impl Iterator<Item = Move> {
    (0..run.length.div_ceil(most)).map(move |index| {
        let done = index * most;
        let length = (run.length - done).min(most);
        Move { from: run.from + done, to: run.to + done, length, ..run }
    })
}

/// Whether a run meets the alignment that clones need.
#[must_use]
pub fn clonable(run: &Move, alignment: &[u64]) -> bool {
    alignment
        .get(run.source)
        .is_some_and(|align| *align > 0 && [run.from, run.to, run.length].iter().all(|at| at % align == 0))
}

fn check(cancel: &Cancel, target: &dyn StoreFile) -> Result<()> {
    cancel.check().map_err(|_| ImageError::Cancelled { image: target.path().to_string() })
}

/// Puts together and writes what has gathered, in parallel.
fn flush(
    pending: &mut Vec<Emit>,
    bytes: &mut u64,
    target: &dyn StoreFile,
    sources: &Sources<'_>,
) -> Result<()> {
    if pending.is_empty() {
        return Ok(());
    }
    check(sources.cancel, target)?;
    sources.pace.spend(*bytes, sources.cancel);
    let each = (*bytes / pending.len() as u64).max(1);
    let chunk = usize::try_from(CHUNK_BYTES / each).unwrap_or_default().max(1);
    pending.par_chunks(chunk).try_for_each(|emits| write_chunk(emits, target, sources))?;
    sources.progress.advance(*bytes);
    pending.clear();
    *bytes = 0;
    Ok(())
}

/// Puts together and writes some neighbouring clusters: what follows each other in the file in one call.
fn write_chunk(emits: &[Emit], target: &dyn StoreFile, sources: &Sources<'_>) -> Result<()> {
    let store = |source| store_error(target, source);
    let mut composer = Composer { sources, inflated: None };
    let mut held: Option<(u64, Vec<u8>)> = None;
    for emit in emits {
        let (to, bytes) = composer.bytes(emit)?;
        match &mut held {
            Some((start, buffer)) if *start + buffer.len() as u64 == to => buffer.extend_from_slice(&bytes),
            _ => {
                if let Some((start, buffer)) = held.replace((to, bytes)) {
                    target.write_at(start, &buffer).map_err(store)?;
                }
            }
        }
    }
    held.map_or(Ok(()), |(start, buffer)| target.write_at(start, &buffer).map_err(store))
}

/// Reads what clusters are made of.
struct Composer<'a> {
    sources: &'a Sources<'a>,
    /// What was decompressed last: a large compressed cluster goes into many small ones.
    inflated: Option<(usize, CompressedCluster, Vec<u8>)>,
}

impl Composer<'_> {
    /// Where bytes go, and which.
    fn bytes(&mut self, emit: &Emit) -> Result<(u64, Vec<u8>)> {
        match emit {
            Emit::Table { to, bytes, .. } => Ok((to.0, bytes.clone())),
            Emit::Composed { to, length, parts } => {
                let mut buffer = vec![0; usize::try_from(*length).unwrap_or_default()];
                for part in parts {
                    self.lay(part, &mut buffer)?;
                }
                Ok((to.0, buffer))
            }
            Emit::Compressed { to, length, layer, cluster } => {
                let mut buffer = vec![0; usize::try_from(*length).unwrap_or_default()];
                let place = range(&mut buffer, 0, cluster.stored_bytes)?;
                layer_at(self.sources, *layer)?.read_data(cluster.host, place)?;
                Ok((to.0, buffer))
            }
        }
    }

    /// Lays one part over a cluster's zeros.
    fn lay(&mut self, part: &Part, buffer: &mut [u8]) -> Result<()> {
        let place = range(buffer, part.within, part.piece.length)?;
        match part.piece.fill {
            Fill::Data { layer, host } => layer_at(self.sources, layer)?.read_data(host, place)?,
            Fill::Below => (self.sources.below)(part.piece.start, place)?,
            Fill::Compressed { layer, cluster } => {
                let skip = part.piece.start.0.saturating_sub(cluster.guest.0);
                let inflated = self.inflate(layer, &cluster)?;
                let skip = usize::try_from(skip).unwrap_or(usize::MAX);
                let end = skip.saturating_add(place.len());
                place.copy_from_slice(inflated.get(skip..end).ok_or_else(outside)?);
            }
            Fill::Zero | Fill::Nothing => {}
        }
        Ok(())
    }

    fn inflate(&mut self, layer: usize, cluster: &CompressedCluster) -> Result<&[u8]> {
        let (_, _, bytes) = match self.inflated.take() {
            Some(held) if held.0 == layer && held.1 == *cluster => self.inflated.insert(held),
            _ => {
                let bytes = layer_at(self.sources, layer)?.read_compressed(cluster)?;
                self.inflated.insert((layer, *cluster, bytes))
            }
        };
        Ok(bytes)
    }
}

fn range(buffer: &mut [u8], at: u64, length: u64) -> Result<&mut [u8]> {
    let start = usize::try_from(at).unwrap_or(usize::MAX);
    let end = start.saturating_add(usize::try_from(length).unwrap_or(usize::MAX));
    buffer.get_mut(start..end).ok_or_else(outside)
}

fn layer_at<'a>(sources: &Sources<'a>, layer: usize) -> Result<&'a Image> {
    sources.layers.get(layer).ok_or_else(|| bad(format!("layer {layer} does not exist")))
}

fn outside() -> ImageError {
    bad("a part of a cluster lies outside of it".to_owned())
}

fn bad(detail: String) -> ImageError {
    ImageError::Bad { image: "the map".to_owned(), code: Code::BadEntry, detail }
}
