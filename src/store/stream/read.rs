//! Reads a range of an image in order: one thread finds out what comes next, all processors read and check, and what
//! is done is given away meanwhile.

use std::ops::Range;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::digest::{TreeBuilder, block_count, leaf};
use crate::ids::Digest;
use crate::qcow2::layout::canonical::{Canonical, Part};
use crate::qcow2::{ImageError, Run};
use crate::store::error::{Result, StoreError};
use crate::store::measure::Job;
use crate::store::stream::Source;
use crate::units::{BLOCK_BYTES, BLOCK_LENGTH, GuestOffset};

/// The most that one thread reads in one go; a unit of the image may be longer.
const ITEM_BYTES: u64 = 256 << 10;
/// How much is read in parallel before it is given away, about.
const BATCH_BYTES: u64 = 2 << 20;
/// How many batches may wait to be given away.
const AHEAD: usize = 2;

/// Buffers that were given away, to be filled again: a fresh one of this size costs as much in page faults as reading it.
#[derive(Debug, Default)]
struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// So many bytes, of whatever content.
    fn take(&self, length: usize) -> Vec<u8> {
        let mut buffer = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        buffer.resize(length, 0);
        buffer
    }

    fn put(&self, buffer: Vec<u8>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}

/// Some of an image.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// Its bytes.
    Bytes(&'a [u8]),
    /// So many zeros that the image does not store.
    Zeros(u64),
}

/// What a reading is to find out beside the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing. What is known of the bytes is held against them all the same.
    Bytes,
    /// The digest of the view, too: the whole image is read.
    Digest,
}

/// Neighbouring bytes of the image, worked on by one thread.
struct Item {
    /// Where in the image they begin.
    offset: u64,
    /// How many of the bytes read come before those wanted.
    skip: usize,
    /// How many are wanted.
    take: u64,
    what: What,
    bytes: Vec<u8>,
    /// Of the blocks read.
    leaves: Vec<Digest>,
}

enum What {
    Zeros,
    Metadata,
    /// Whole units of the view, from `guest` on, and what their blocks hash to.
    Data {
        guest: u64,
        length: u64,
        runs: Vec<Run>,
        expected: Option<Vec<Digest>>,
    },
}

/// As [`Stream::read`](super::Stream::read); the range ends with the image.
pub(super) fn read<E: From<StoreError> + Send>(
    source: &Source,
    layout: &Canonical,
    range: Range<u64>,
    wanted: Wanted,
    job: &Job<'_>,
    mut give: impl FnMut(u64, Piece<'_>) -> std::result::Result<(), E>,
) -> std::result::Result<Option<Digest>, E> {
    let whole = range.start <= layout.metadata_bytes() && range.end == layout.length();
    let mut tree = (wanted == Wanted::Digest && whole).then(TreeBuilder::new);
    let hash = tree.is_some();
    let buffers = Buffers::default();
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(AHEAD);
        let reading = Reading { source, layout, hash, buffers: &buffers };
        // Ends by itself when nobody receives any more.
        scope.spawn(move || produce(&reading, range, job, &sender));
        for batch in receiver {
            for item in batch? {
                if let (Some(tree), What::Data { guest, .. }) = (&mut tree, &item.what) {
                    tree.push_zero_blocks((guest / BLOCK_BYTES).saturating_sub(tree.blocks()));
                    item.leaves.iter().for_each(|leaf| tree.push_leaf(*leaf));
                }
                match &item.what {
                    What::Zeros => give(item.offset, Piece::Zeros(item.take))?,
                    What::Metadata | What::Data { .. } => {
                        let end = item.skip.saturating_add(usize::try_from(item.take).unwrap_or(usize::MAX));
                        give(item.offset, Piece::Bytes(item.bytes.get(item.skip..end).unwrap_or_default()))?;
                    }
                }
                job.progress.advance(item.take);
                if item.bytes.capacity() > 0 {
                    buffers.put(item.bytes);
                }
            }
        }
        let blocks = block_count(layout.virtual_size());
        Ok(tree.map(|mut tree| {
            tree.push_zero_blocks(blocks.saturating_sub(tree.blocks()));
            tree.finish(layout.virtual_size())
        }))
    })
}

/// What all threads of a reading share.
#[derive(Clone, Copy)]
struct Reading<'a> {
    source: &'a Source,
    layout: &'a Canonical,
    /// Whether the digest is wanted of what is read.
    hash: bool,
    buffers: &'a Buffers,
}

/// Reads batch after batch and sends them, the last one perhaps an error.
fn produce(reading: &Reading<'_>, range: Range<u64>, job: &Job<'_>, sender: &SyncSender<Result<Vec<Item>>>) {
    let Reading { source, layout, .. } = *reading;
    let mut plan = Plan { source, layout, at: range.start, end: range.end, map: None, held: None };
    loop {
        let batch = plan.batch(job).and_then(|mut batch| {
            batch.par_iter_mut().with_max_len(1).try_for_each(|item| fill(reading, item))?;
            Ok(batch)
        });
        let last = batch.as_ref().map_or(true, Vec::is_empty);
        if sender.send(batch).is_err() || last {
            return;
        }
    }
}

/// What comes next.
struct Plan<'a> {
    source: &'a Source,
    layout: &'a Canonical,
    at: u64,
    end: u64,
    /// The map of the view, from the first byte on that was wanted.
    map: Option<Box<dyn Iterator<Item = std::result::Result<Run, ImageError>> + Send + 'a>>,
    /// The run of it that reaches furthest so far.
    held: Option<Run>,
}

impl Plan<'_> {
    /// Some items; none at the end.
    fn batch(&mut self, job: &Job<'_>) -> Result<Vec<Item>> {
        let cancelled = |_| StoreError::Image {
            member: self.source.member().to_owned(),
            source: ImageError::Cancelled { image: self.source.member().to_owned() },
        };
        job.cancel.check().map_err(cancelled)?;
        let mut items = Vec::new();
        let mut bytes = 0;
        while bytes < BATCH_BYTES
            && items.len() < 64
            && self.at < self.end
            && let Some((part, length)) = self.layout.part(self.at)
        {
            let item = self.item(part, length.min(self.end - self.at))?;
            self.at += item.take;
            bytes += if matches!(item.what, What::Zeros) { 0 } else { item.take };
            items.push(item);
        }
        job.pace.spend(bytes, job.cancel);
        Ok(items)
    }

    fn item(&mut self, part: Part, length: u64) -> Result<Item> {
        let unit = self.layout.form().unit_bytes();
        let (mut skip, mut take) = (0, length);
        let what = match part {
            Part::Zeros => What::Zeros,
            Part::Metadata => {
                take = length.min(ITEM_BYTES);
                What::Metadata
            }
            Part::Data { guest } => {
                let start = guest / unit * unit;
                skip = guest - start;
                let most = (ITEM_BYTES / unit).max(1) * unit;
                take = length.min(most - skip);
                let whole = (skip + take).div_ceil(unit) * unit;
                let runs = self.runs(start, start + whole)?;
                let expected = self.source.leaves(start / BLOCK_BYTES, whole / BLOCK_BYTES)?;
                What::Data { guest: start, length: whole, runs, expected }
            }
        };
        let skip = usize::try_from(skip).unwrap_or_default();
        Ok(Item { offset: self.at, skip, take, what, bytes: Vec::new(), leaves: Vec::new() })
    }

    /// The map of `[start, end)`, which begins at or behind the end of what was asked for before, or in its last unit.
    fn runs(&mut self, start: u64, end: u64) -> Result<Vec<Run>> {
        let (start, end) = (GuestOffset(start), GuestOffset(end.min(self.layout.virtual_size())));
        let chain = self.source.chain();
        let map = self.map.get_or_insert_with(|| Box::new(chain.map_range(start, GuestOffset(u64::MAX))));
        let mut runs = Vec::new();
        loop {
            if let Some(held) = self.held {
                runs.extend(held.clip(start, end));
                if held.end() >= end {
                    return Ok(runs);
                }
            }
            self.held = match map.next() {
                Some(run) => Some(run.map_err(|source| image(self.source, source))?),
                None => return Ok(runs),
            };
        }
    }
}

fn image(source: &Source, error: ImageError) -> StoreError {
    StoreError::Image { member: source.member().to_owned(), source: error }
}

/// Reads what an item is made of, and holds it against what is known.
fn fill(reading: &Reading<'_>, item: &mut Item) -> Result<()> {
    let Reading { source, layout, hash, buffers } = *reading;
    let What::Data { guest, length, runs, expected } = &item.what else {
        if matches!(item.what, What::Metadata) {
            item.bytes = buffers.take(usize::try_from(item.take).unwrap_or_default());
            item.bytes.fill(0);
            layout.metadata(item.offset, &mut item.bytes);
        }
        return Ok(());
    };
    item.bytes = buffers.take(usize::try_from(*length).unwrap_or_default());
    // Runs follow each other; what is behind the view's end is zero.
    let mut filled = 0;
    for run in runs {
        let from = usize::try_from(run.start.0 - guest).unwrap_or(usize::MAX);
        let to = from.saturating_add(usize::try_from(run.length).unwrap_or(usize::MAX));
        if let Some(gap) = item.bytes.get_mut(filled..from) {
            gap.fill(0);
        }
        if let Some(place) = item.bytes.get_mut(from..to) {
            source.chain().read_run(run, place).map_err(|error| image(source, error))?;
            filled = to;
        }
    }
    if let Some(rest) = item.bytes.get_mut(filled..) {
        rest.fill(0);
    }
    if !hash && expected.is_none() {
        return Ok(());
    }
    let first = guest / BLOCK_BYTES;
    let blocks =
        usize::try_from(block_count(layout.virtual_size()).saturating_sub(first)).unwrap_or(usize::MAX);
    item.leaves = item.bytes.chunks(BLOCK_LENGTH).take(blocks).map(leaf).collect();
    if let Some(expected) = expected
        && let Some(bad) = item.leaves.iter().zip(expected).position(|(is, was)| is != was)
    {
        return Err(source.blame(first + bad as u64));
    }
    Ok(())
}
