//! By copying: the canonical image, from its first byte to its last.
//!
//! Blocks of data that turn out to be zeros when they are read, which a chain that is not adopted may have, are not written:
//! the file has a hole there, and the same bytes.

use super::report::{How, Made};
use super::target::{Output, failed};
use crate::digest::is_zero;
use crate::ops::{OpError, Result, Work};
use crate::qcow2::Image;
use crate::qcow2::check::{Limits, check};
use crate::qcow2::layout::canonical::{Canonical, Form};
use crate::qcow2::layout::placed::misplaced;
use crate::store::StoreError;
use crate::store::stream::{Piece, Stream, Wanted};
use crate::units::{BLOCK_BYTES, BLOCK_LENGTH};

/// How much is written before it is dropped from the cache.
const DROP_BYTES: u64 = 256 << 20;
/// How much is written before what was read is dropped: less often, as what was read ahead goes with it.
const DROP_SOURCES_BYTES: u64 = 1 << 30;

/// Writes the image, seals it, and proves that its tables say what was planned.
pub(super) fn write(stream: &Stream, output: &Output, work: &Work<'_>, keep_cache: bool) -> Result<Made> {
    let layout = stream.layout();
    let source = stream.source();
    output.need(layout.stored_bytes())?;
    let file = output.file();
    let failed = failed(output.shown());
    file.set_length(layout.length()).map_err(&failed)?;
    work.progress.phase("copying", layout.length());
    let raw = layout.form() == Form::Raw;
    let metadata_bytes = layout.metadata_bytes();
    let (mut tables, mut data, mut last_drop, mut last_sources) = (0, 0, 0, 0);
    let digest =
        stream.read::<OpError>(0..layout.length(), Wanted::Digest, &work.job(), |offset, piece| {
            let Piece::Bytes(bytes) = piece else { return Ok(()) };
            if offset < metadata_bytes {
                file.write_at(offset, bytes).map_err(&failed)?;
                tables += bytes.len() as u64;
            } else {
                data += write_sparse(|at, part| file.write_at(at, part), offset, bytes).map_err(&failed)?;
            }
            let written = tables + data;
            if !keep_cache && written >= last_drop + DROP_BYTES {
                last_drop = written;
                let _ = file.drop_cache();
            }
            if !keep_cache && written >= last_sources + DROP_SOURCES_BYTES {
                last_sources = written;
                source.drop_caches();
            }
            Ok(())
        })?;
    if let (Some(is), Some(was)) = (digest, source.digest())
        && is != was
    {
        let message = format!("it reads as {is}; it was {was} when it was adopted");
        let member = source.member().to_owned();
        return Err(StoreError::Damaged { code: crate::failure::Code::DataDamaged, member, message }.into());
    }
    output.seal()?;
    let planned_bytes = if raw { 0 } else { prove(layout, output)? };
    Ok(Made {
        how: Some(How::Copy),
        digest,
        data_bytes: data,
        metadata_bytes: tables,
        planned_bytes,
        ..Made::default()
    })
}

/// Writes what is not zeros; gives how many bytes that was.
pub(super) fn write_sparse<E>(
    mut write: impl FnMut(u64, &[u8]) -> std::result::Result<(), E>,
    offset: u64,
    bytes: &[u8],
) -> std::result::Result<u64, E> {
    let mut written = 0;
    let mut held: Option<(usize, usize)> = None;
    for (index, block) in bytes.chunks(BLOCK_LENGTH).enumerate() {
        let start = index * BLOCK_LENGTH;
        if !is_zero(block) {
            held = Some((held.map_or(start, |(from, _)| from), start + block.len()));
            continue;
        }
        if let Some((from, to)) = held.take() {
            write(offset + from as u64, bytes.get(from..to).unwrap_or_default())?;
            written += (to - from) as u64;
        }
    }
    if let Some((from, to)) = held {
        write(offset + from as u64, bytes.get(from..to).unwrap_or_default())?;
        written += (to - from) as u64;
    }
    Ok(written)
}

/// Parses the sealed file again: sound, and each unit where it was planned. Gives the bytes of view.
fn prove(layout: &Canonical, output: &Output) -> Result<u64> {
    let image = Image::open(output.reopen()?, output.shown())?;
    let wrong = |what: &str| {
        let message = format!("the new file was thrown away: {what}");
        OpError::Store(StoreError::Proof { member: output.shown().to_owned(), message })
    };
    let report = check(&image, &Limits::default())?;
    if report.is_damaged() || report.leaked_clusters > 0 || report.incomplete {
        return Err(wrong("its structure is not sound"));
    }
    if let Some(what) = misplaced(layout, &image)? {
        return Err(wrong(what));
    }
    debug_assert!(layout.form().unit_bytes() >= BLOCK_BYTES);
    Ok(layout.virtual_size())
}
