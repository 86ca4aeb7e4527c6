//! Reads a range of an image in order, batch by batch: one thread finds out what comes next, all processors read and
//! check it. [`read`] gives one batch away while the next one is read; a [`Cursor`] is for whoever asks for each.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};

use rayon::prelude::*;

use crate::digest::{TreeBuilder, block_count, leaf};
use crate::ids::Digest;
use crate::qcow2::layout::canonical::{Canonical, Part};
use crate::qcow2::{Content, ImageError, Run};
use crate::store::buffers::Buffers;
use crate::store::error::{Result, StoreError};
use crate::store::measure::Job;
use crate::store::stream::Source;
use crate::units::{BLOCK_BYTES, BLOCK_LENGTH, GuestOffset};

/// The most that one thread reads in one go; a unit of the image may be longer.
const ITEM_BYTES: u64 = 256 << 10;
/// How much is read in parallel before it is given away, about.
const BATCH_BYTES: u64 = 2 << 20;
/// How much is planned beyond what is read, and told to the stores.
const AHEAD_BYTES: u64 = 24 << 20;
/// The most items that are planned, zeros among them.
const MOST_PLANNED: usize = 1024;
/// The most items that are read in parallel before they are given away.
const MOST_ITEMS: usize = 64;
/// How many batches may wait to be given away.
const AHEAD: usize = 2;

/// Bytes of an image for as long as somebody needs them; then their memory is used again.
#[derive(Debug)]
pub struct Held {
    bytes: Vec<u8>,
    wanted: Range<usize>,
    home: Arc<Buffers>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        self.bytes.get(self.wanted.clone()).unwrap_or_default()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.home.put(std::mem::take(&mut self.bytes));
    }
}

/// Some of an image, to be kept.
#[derive(Debug)]
pub enum Taken {
    /// Its bytes.
    Bytes(Held),
    /// So many zeros that the image does not store.
    Zeros(u64),
}

/// A place in an image, moving up; it knows where in the members it is, so that going on costs no look at what lies
/// before. For [`Stream::next`](super::Stream::next).
pub struct Cursor {
    plan: Plan,
    buffers: Arc<Buffers>,
}

impl Cursor {
    pub(super) fn new(range: Range<u64>) -> Self {
        Self { plan: Plan::new(range), buffers: Arc::default() }
    }

    /// What is still to come.
    #[must_use]
    pub fn rest(&self) -> Range<u64> {
        self.plan.next_offset()..self.plan.end
    }

    /// As [`Stream::next`](super::Stream::next).
    pub(super) fn next(
        &mut self,
        source: &Source,
        layout: &Canonical,
        most: u64,
        job: &Job<'_>,
    ) -> Result<Vec<Taken>> {
        self.buffers.shrink(usize::try_from(most.div_ceil(ITEM_BYTES)).unwrap_or(usize::MAX));
        let reading = Reading { source, layout, hash: false, buffers: &self.buffers };
        let taken = |item: Item| match item.what {
            What::Zeros => Taken::Zeros(item.take),
            What::Metadata | What::Data { .. } => {
                let wanted = item.wanted();
                Taken::Bytes(Held { bytes: item.bytes, wanted, home: self.buffers.clone() })
            }
        };
        Ok(self.plan.read(&reading, most, job)?.into_iter().map(taken).collect())
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

impl Item {
    /// How many bytes are made for it.
    fn read_bytes(&self) -> u64 {
        if matches!(self.what, What::Zeros) { 0 } else { self.take }
    }

    /// Where in its bytes those are that are wanted.
    fn wanted(&self) -> Range<usize> {
        self.skip..self.skip.saturating_add(usize::try_from(self.take).unwrap_or(usize::MAX))
    }
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
                        give(item.offset, Piece::Bytes(item.bytes.get(item.wanted()).unwrap_or_default()))?;
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
    let mut plan = Plan::new(range);
    loop {
        let batch = plan.read(reading, BATCH_BYTES, job);
        let last = batch.as_ref().map_or(true, Vec::is_empty);
        if sender.send(batch).is_err() || last {
            return;
        }
    }
}

/// What comes next.
struct Plan {
    at: u64,
    end: u64,
    /// The map of the view, from the first byte on that was wanted.
    map: Option<Box<dyn Iterator<Item = std::result::Result<Run, ImageError>> + Send>>,
    /// The run of it that reaches furthest so far.
    held: Option<Run>,
    /// What was planned and is not read yet, the stores know of it; and how many bytes that is.
    planned: VecDeque<Item>,
    planned_bytes: u64,
    /// Why no more can be planned: told when what comes before it was given.
    failed: Option<StoreError>,
}

impl Plan {
    fn new(range: Range<u64>) -> Self {
        Self {
            at: range.start,
            end: range.end,
            map: None,
            held: None,
            planned: VecDeque::new(),
            planned_bytes: 0,
            failed: None,
        }
    }

    /// Where what was not given yet begins.
    fn next_offset(&self) -> u64 {
        self.planned.front().map_or(self.at, |item| item.offset)
    }

    /// The next items of about so many bytes, read; none at the end.
    fn read(&mut self, reading: &Reading<'_>, most: u64, job: &Job<'_>) -> Result<Vec<Item>> {
        let cancelled = |_| {
            let name = reading.source.member().to_owned();
            image(reading.source, ImageError::Cancelled { image: name })
        };
        job.cancel.check().map_err(cancelled)?;
        if self.failed.is_none() {
            self.failed = self.plan(reading, most.saturating_add(AHEAD_BYTES)).err();
        }
        if self.planned.is_empty()
            && let Some(error) = self.failed.take()
        {
            return Err(error);
        }
        let mut batch = Vec::new();
        let mut bytes = 0;
        while bytes < most
            && batch.len() < MOST_ITEMS
            && let Some(item) = self.planned.pop_front()
        {
            bytes += item.read_bytes();
            batch.push(item);
        }
        self.planned_bytes -= bytes;
        job.pace.spend(bytes, job.cancel);
        batch.par_iter_mut().with_max_len(1).try_for_each(|item| fill(reading, item))?;
        Ok(batch)
    }

    /// Plans so far that so many bytes are planned and not read, and tells the stores of them.
    fn plan(&mut self, reading: &Reading<'_>, most: u64) -> Result<()> {
        let new = self.planned.len();
        while self.planned_bytes < most
            && self.planned.len() < MOST_PLANNED
            && self.at < self.end
            && let Some((part, length)) = reading.layout.part(self.at)
        {
            let item = self.item(reading, part, length.min(self.end - self.at))?;
            self.at += item.take;
            self.planned_bytes += item.read_bytes();
            self.planned.push_back(item);
        }
        announce(reading, self.planned.iter().skip(new));
        Ok(())
    }

    fn item(&mut self, reading: &Reading<'_>, part: Part, length: u64) -> Result<Item> {
        let unit = reading.layout.form().unit_bytes();
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
                let runs = self.runs(reading, start, start + whole)?;
                let expected = reading.source.leaves(start / BLOCK_BYTES, whole / BLOCK_BYTES)?;
                What::Data { guest: start, length: whole, runs, expected }
            }
        };
        let skip = usize::try_from(skip).unwrap_or_default();
        Ok(Item { offset: self.at, skip, take, what, bytes: Vec::new(), leaves: Vec::new() })
    }

    /// The map of `[start, end)`, which begins at or behind the end of what was asked for before, or in its last unit.
    fn runs(&mut self, reading: &Reading<'_>, start: u64, end: u64) -> Result<Vec<Run>> {
        let (start, end) = (GuestOffset(start), GuestOffset(end.min(reading.layout.virtual_size())));
        let chain = reading.source.chain();
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
                Some(run) => Some(run.map_err(|error| image(reading.source, error))?),
                None => return Ok(runs),
            };
        }
    }
}

/// Tells the stores what is going to be read: what lies one behind the other in a file as one range. Long ones they may
/// foresee by themselves; of chains of many members, and of scattered ones, short ones are all that there is.
fn announce<'a>(reading: &Reading<'_>, items: impl Iterator<Item = &'a Item>) {
    let images: Vec<_> = reading.source.chain().images().collect();
    let tell = |(layer, start, end): (usize, u64, u64)| {
        if let Some(image) = images.get(layer) {
            image.will_read(start, end - start);
        }
    };
    let mut held: Option<(usize, u64, u64)> = None;
    for item in items {
        let What::Data { runs, .. } = &item.what else { continue };
        for run in runs {
            let (layer, start, length) = match run.content {
                Content::Data { layer, host } => (layer, host.0, run.length),
                Content::Compressed { layer, cluster } => (layer, cluster.host.0, cluster.stored_bytes),
                Content::Zero | Content::Below => continue,
            };
            let end = start.saturating_add(length);
            held = match held {
                Some((of, from, to)) if of == layer && to == start => Some((of, from, end)),
                other => {
                    other.into_iter().for_each(tell);
                    Some((layer, start, end))
                }
            };
        }
    }
    held.into_iter().for_each(tell);
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
