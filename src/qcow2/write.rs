//! Writes a planned image into an empty file.
//!
//! Data first, tables after, the header last: a file that was cut off by a crash has no magic and is taken
//! for no image. Nothing here syncs or names the file; the caller seals and publishes it.

use std::sync::Arc;

use rayon::prelude::*;

use crate::backend::{BackendError, Means, Move, Moved, StoreFile};
use crate::progress::{Cancel, Progress};
use crate::qcow2::error::{ImageError, Result};
use crate::qcow2::image::Image;
use crate::qcow2::layout::{Emit, Fill, Layout, Part};
use crate::qcow2::map::Run;
use crate::units::GuestOffset;

/// Moves that are given to the store in one go: between batches the work can be stopped.
const BATCH_MOVES: usize = 4096;
/// Bytes of moves in one batch, about.
const BATCH_BYTES: u64 = 256 << 20;
/// Bytes of composed clusters held in memory at once, about.
const COMPOSE_BYTES: u64 = 32 << 20;

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

/// Writes the image. `runs` must be the very map the layout was planned from. After an error the file is of
/// no use.
pub fn write(
    layout: &Layout,
    target: &dyn StoreFile,
    sources: &Sources<'_>,
    runs: impl Iterator<Item = Result<Run>>,
) -> Result<Written> {
    let name = target.path().to_string();
    let store = |source: BackendError| ImageError::Store { image: name.clone(), source };
    target.set_length(layout.file_length()).map_err(store)?;
    let mut written = Written::default();
    let moved = move_all(layout, target, sources)?;
    written.cloned_bytes = moved.cloned_bytes;
    written.data_bytes = moved.copied_bytes;
    let mut pending = Vec::new();
    let mut pending_bytes = 0;
    for emit in layout.emit(runs) {
        match emit? {
            Emit::Table { to, bytes } => {
                flush(&mut pending, &mut pending_bytes, target, sources)?;
                target.write_at(to.0, &bytes).map_err(store)?;
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

fn move_all(layout: &Layout, target: &dyn StoreFile, sources: &Sources<'_>) -> Result<Moved> {
    let files: Vec<Arc<dyn StoreFile>> = sources.layers.iter().map(|layer| layer.file().clone()).collect();
    let mut done = Moved::default();
    let mut moves = layout.moves().peekable();
    while moves.peek().is_some() {
        check(sources.cancel, target)?;
        let (mut clones, mut copies) = (Vec::new(), Vec::new());
        let mut bytes = 0;
        while bytes < BATCH_BYTES
            && clones.len() + copies.len() < BATCH_MOVES
            && let Some(next) = moves.next()
        {
            bytes += next.length;
            if clonable(&next, sources.clone_alignment) { clones.push(next) } else { copies.push(next) }
        }
        for (runs, means) in [(&clones, Means::Clone), (&copies, Means::Copy)] {
            if !runs.is_empty() {
                done += target
                    .move_runs(&files, runs, means)
                    .map_err(|source| ImageError::Store { image: target.path().to_string(), source })?;
            }
        }
        sources.progress.advance(bytes);
    }
    Ok(done)
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
    pending.par_iter().try_for_each(|emit| write_data(emit, target, sources))?;
    sources.progress.advance(*bytes);
    pending.clear();
    *bytes = 0;
    Ok(())
}

fn write_data(emit: &Emit, target: &dyn StoreFile, sources: &Sources<'_>) -> Result<()> {
    let (to, buffer) = match emit {
        Emit::Table { to, bytes } => (to, bytes.clone()),
        Emit::Composed { to, length, parts } => (to, compose(*length, parts, sources)?),
        Emit::Compressed { to, length, layer, cluster } => {
            let layer = layer_at(sources, *layer)?;
            let mut buffer = vec![0; usize::try_from(*length).unwrap_or_default()];
            let stored = usize::try_from(cluster.stored_bytes).unwrap_or(usize::MAX).min(buffer.len());
            if let Some(place) = buffer.get_mut(..stored) {
                layer.read_data(cluster.host, place)?;
            }
            (to, buffer)
        }
    };
    target
        .write_at(to.0, &buffer)
        .map_err(|source| ImageError::Store { image: target.path().to_string(), source })
}

/// Puts one cluster together.
fn compose(length: u64, parts: &[Part], sources: &Sources<'_>) -> Result<Vec<u8>> {
    let mut buffer = vec![0; usize::try_from(length).unwrap_or_default()];
    for part in parts {
        let from = usize::try_from(part.within).unwrap_or(usize::MAX);
        let to = from.saturating_add(usize::try_from(part.piece.length).unwrap_or(usize::MAX));
        let Some(place) = buffer.get_mut(from..to) else { continue };
        match part.piece.fill {
            Fill::Data { layer, host } => layer_at(sources, layer)?.read_data(host, place)?,
            Fill::Below => (sources.below)(part.piece.start, place)?,
            Fill::Compressed { layer, cluster } => {
                let inflated = layer_at(sources, layer)?.read_compressed(&cluster)?;
                let skip = usize::try_from(part.piece.start.0 - cluster.guest.0).unwrap_or(usize::MAX);
                let bytes = inflated.get(skip..).unwrap_or_default();
                place.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            }
            Fill::Zero | Fill::Nothing => {}
        }
    }
    Ok(buffer)
}

fn layer_at<'a>(sources: &Sources<'a>, layer: usize) -> Result<&'a Image> {
    sources.layers.get(layer).ok_or_else(|| ImageError::Bad {
        image: "the map".to_owned(),
        code: crate::failure::Code::BadEntry,
        detail: format!("layer {layer} does not exist"),
    })
}
