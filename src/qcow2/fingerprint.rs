//! The fingerprint of an image's metadata: which bytes say what its clusters mean.
//!
//! `meta` is over all that says where a guest's bytes are, and nothing that `qemu-img rebase -u` changes: the
//! header's fields but for the place and length of the backing name, its extensions but for the backing format and
//! the feature names (which another version of QEMU may write differently), what else stands in the header's
//! cluster, and, in the order of their host offsets, L1 and L2 tables, refcount table and blocks, snapshot table,
//! bitmaps. `start` is over the whole header cluster as it is, backing name and all: it may only be compared
//! as long as nothing has written to the file.

use std::ops::Range;

use crate::ids::Digest;
use crate::qcow2::check::{Limits, Report, check_with};
use crate::qcow2::error::Result;
use crate::qcow2::format::{
    AT_BACKING_LENGTH, AT_BACKING_OFFSET, AT_HEADER_LENGTH, AT_VERSION, EXTENSION_BACKING_FORMAT,
    EXTENSION_END, EXTENSION_FEATURE_NAMES, EXTENSION_HEAD_BYTES, HEADER_V2_BYTES,
};
use crate::qcow2::image::Image;

/// How much is read at once, in bytes.
const WINDOW_BYTES: u64 = 1 << 20;

/// How many tables an image has at most: an L1 table of the largest size full of them, twice. 64 MiB of memory.
const MAX_RANGES: usize = 4 << 20;

/// How many tables a file may have that takes next to nothing of its store: each takes 512 bytes and more.
const LEAST_RANGES: usize = 128 << 10;

/// How many bytes of metadata may be holes.
const MAX_HOLE_BYTES: u64 = 256 << 20;

/// What an image's metadata is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// Of what the clusters mean, whoever is the parent.
    pub meta: Digest,
    /// Of the header's cluster, byte by byte.
    pub start: Digest,
}

/// Checks an image's structure and takes its fingerprint. Reads all metadata twice, no data. Memory: as
/// [`check`](crate::qcow2::check::check()), 16 bytes a table, and a window of 1 MiB.
///
/// There is no fingerprint if the check was not complete, or if most of the metadata is no more than a hole.
pub fn fingerprint(image: &Image, limits: &Limits) -> Result<(Report, Option<Fingerprint>)> {
    let taken = image.allocated_bytes();
    let room = usize::try_from(taken / 512).unwrap_or(usize::MAX).clamp(LEAST_RANGES, MAX_RANGES);
    let mut ranges = Ranges { room, ..Ranges::default() };
    let report = check_with(image, limits, &mut |range| ranges.push(range))?;
    let bytes = ranges.list.iter().fold(0_u64, |sum, range| sum.saturating_add(range.end - range.start));
    if report.incomplete || ranges.overflowed || bytes > taken.saturating_add(MAX_HOLE_BYTES) {
        return Ok((report, None));
    }
    let mut ranges = ranges.list;
    let cluster = image.header().cluster_bits.bytes();
    let mut start = vec![0; usize::try_from(cluster.min(image.file_length())).unwrap_or_default()];
    image.read_file(0, &mut start)?;
    let mut hasher = blake3::Hasher::new();
    canonical_header(&start, &mut hasher);
    ranges.sort_by_key(|range| (range.start, range.end));
    let mut done = cluster;
    let mut buffer = Vec::new();
    for range in ranges {
        let from = range.start.max(done);
        let to = range.end.min(image.file_length());
        done = done.max(to);
        hash_range(image, from..to, &mut buffer, &mut hasher)?;
    }
    let meta = Digest(*hasher.finalize().as_bytes());
    Ok((report, Some(Fingerprint { meta, start: Digest(*blake3::hash(&start).as_bytes()) })))
}

/// Where metadata lies: more often told of than there are places, if the image is hostile.
#[derive(Default)]
struct Ranges {
    list: Vec<Range<u64>>,
    /// How many are kept.
    room: usize,
    overflowed: bool,
}

impl Ranges {
    fn push(&mut self, range: Range<u64>) {
        if self.list.len() >= self.room && !self.overflowed {
            self.list.sort_by_key(|range| (range.start, range.end));
            self.list.dedup();
            self.overflowed |= self.list.len() > self.room / 2;
        }
        if !self.overflowed {
            self.list.push(range);
        }
    }
}

fn hash_range(
    image: &Image,
    range: Range<u64>,
    buffer: &mut Vec<u8>,
    hasher: &mut blake3::Hasher,
) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let step = (range.end - at).min(WINDOW_BYTES);
        buffer.resize(usize::try_from(step).unwrap_or_default(), 0);
        image.read_file(at, buffer)?;
        hasher.update(&at.to_le_bytes());
        hasher.update(&step.to_le_bytes());
        hasher.update(buffer);
        at += step;
    }
    Ok(())
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// Feeds the header's cluster without what may change under a sound image.
fn canonical_header(start: &[u8], hasher: &mut blake3::Hasher) {
    let header_bytes = match number(start, AT_VERSION) {
        Some(2) => usize::try_from(HEADER_V2_BYTES).unwrap_or_default(),
        _ => number(start, AT_HEADER_LENGTH)
            .and_then(|length| usize::try_from(length).ok())
            .unwrap_or_default(),
    };
    let header_bytes = header_bytes.min(start.len());
    let mut fixed = start.get(..header_bytes).unwrap_or_default().to_vec();
    let name_end = number(&fixed, AT_BACKING_OFFSET + 4)
        .zip(number(&fixed, AT_BACKING_LENGTH))
        .and_then(|(offset, length)| usize::try_from(offset.checked_add(length)?).ok())
        .unwrap_or_default();
    if let Some(link) = fixed.get_mut(AT_BACKING_OFFSET..AT_BACKING_LENGTH + 4) {
        link.fill(0);
    }
    field(&fixed, hasher);
    let mut at = header_bytes;
    while let (Some(kind), Some(length)) = (number(start, at), number(start, at.saturating_add(4))) {
        let from = at.saturating_add(EXTENSION_HEAD_BYTES);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        at = from;
        if kind == EXTENSION_END {
            break;
        }
        let data = start.get(from..from.saturating_add(length)).unwrap_or_default();
        if kind != EXTENSION_BACKING_FORMAT && kind != EXTENSION_FEATURE_NAMES {
            field(&kind.to_be_bytes(), hasher);
            field(data, hasher);
        }
        at = from.saturating_add(length.next_multiple_of(8));
    }
    // Nothing should stand behind them; if something does, it was there before.
    let rest = start.get(at.max(name_end)..).unwrap_or_default();
    let used = rest.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    field(rest.get(..used).unwrap_or_default(), hasher);
}

/// A field with its length, so that no two lists of fields are the same bytes.
fn field(bytes: &[u8], hasher: &mut blake3::Hasher) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}
