//! By sharing extents: the data is not read, but for what cannot be shared.

use std::ops::Range;

use rayon::prelude::*;

use super::copy::write_sparse;
use super::report::{How, Made};
use super::target::{Output, failed};
use crate::backend::{BackendError, Means, Move, read_padded};
use crate::digest::{TreeBuilder, block_count, leaf};
use crate::failure::{Code, Failure as _};
use crate::ops::{OpError, Result, Work};
use crate::qcow2::layout::Layout;
use crate::qcow2::layout::canonical::Form;
use crate::qcow2::write::{Sources, write};
use crate::qcow2::{CompressionType, Content, Image, ImageError, Run};
use crate::store::StoreError;
use crate::store::attest::read_back;
use crate::store::chain::OpenChain;
use crate::store::measure::{Decided, decided};
use crate::store::merge::MergeInput;
use crate::store::prove::prove;
use crate::store::stream::Source;
use crate::units::{BLOCK_BYTES, BLOCK_LENGTH, GuestOffset};

/// How many clones are asked for at once.
const BATCH: usize = 4096;
/// How many blocks are read back at once by one thread.
const CHECK_BLOCKS: u64 = 16;
/// The most runs of the map that are kept from planning for writing, some 15 MiB: the tables of a chain of many members
/// take longer to read than what they say takes to write.
const KEPT_RUNS: usize = 1 << 18;
/// How much is copied at once.
const COPY_BYTES: u64 = 1 << 20;

/// Writes the image, seals and proves it; `None`, and an empty file, if most of the data could not be shared.
pub(super) fn try_write(
    source: &Source,
    form: Form,
    output: &Output,
    work: &Work<'_>,
) -> Result<Option<Made>> {
    let device = output.file().stat().map_err(failed(output.shown()))?.id.device;
    let same: Vec<bool> = source.files().map(|id| id.device == device).collect();
    if !same.contains(&true) {
        return Ok(None);
    }
    // What cannot be tried cannot be done.
    let Ok(can) = output.backend().probe(&output.scratch()) else { return Ok(None) };
    if !can.clone || can.clone_alignment == 0 {
        return Ok(None);
    }
    let filled = match source.digest() {
        Some(_) => Some((source.units(form)?, form.unit_bytes())),
        None => None,
    };
    let kind =
        source.chain().images().next().map_or(CompressionType::Zlib, |image| image.header().compression);
    let options = form.options(source.virtual_size(), kind);
    let input = MergeInput::standalone(source.chain().clone(), options, same, filled);
    let alignment = input.alignments(can.clone_alignment);
    let job = Clone { source, input, alignment, output, work };
    let made = match form {
        Form::Qcow2(_) => job.qcow2(),
        Form::Raw => job.raw(),
    };
    match made {
        Err(OpError::Image(ImageError::Store { source: BackendError::CannotClone { .. }, .. })) => {
            output.file().set_length(0).map_err(failed(output.shown()))?;
            Ok(None)
        }
        made => made,
    }
}

struct Clone<'a> {
    source: &'a Source,
    input: MergeInput,
    alignment: Vec<u64>,
    output: &'a Output,
    work: &'a Work<'a>,
}

impl Clone<'_> {
    fn qcow2(&self) -> Result<Option<Made>> {
        let Self { source, input, alignment, output, work } = self;
        let (layout, map) = match input.layout_with_map(KEPT_RUNS) {
            // Readable, and not to be shared twice.
            Err(error) if error.code() == Code::SharedCluster => return Ok(None),
            planned => planned?,
        };
        let cost = input.cost(&layout, alignment);
        if cost.clone_bytes <= cost.data_bytes {
            return Ok(None);
        }
        output.need(cost.written_bytes())?;
        source.sound_metadata()?;
        work.progress
            .phase("cloning", layout.moved_bytes() + layout.composed_bytes() + layout.compressed_bytes());
        let layers: Vec<Image> = input.upper.images().cloned().collect();
        let below = |_: GuestOffset, buffer: &mut [u8]| {
            buffer.fill(0);
            Ok(())
        };
        let sources = Sources {
            layers: &layers,
            clone_alignment: alignment,
            below: &below,
            progress: work.progress,
            cancel: work.cancel,
            pace: work.pace,
        };
        let written = match map {
            Some(runs) => write(&layout, output.file(), &sources, runs.into_iter().map(Ok))?,
            None => write(&layout, output.file(), &sources, input.map())?,
        };
        output.seal()?;
        let image = Image::open(output.reopen()?, output.shown())?;
        let proof = prove(&layout, input, &image, source.member())?;
        let checked_bytes = self.attest(&layout, &image)?;
        Ok(Some(Made {
            how: Some(How::Clone),
            digest: None,
            data_bytes: written.data_bytes,
            metadata_bytes: written.metadata_bytes,
            cloned_bytes: written.cloned_bytes,
            planned_bytes: proof.planned_bytes + proof.compared_bytes,
            compared_bytes: proof.compared_bytes,
            checked_bytes,
        }))
    }

    /// For adopted members: the leaves of what the new image decides give the view digest, and what was copied hashes
    /// to its leaves. Gives the bytes read.
    fn attest(&self, layout: &Layout, image: &Image) -> Result<u64> {
        let Some(digest) = self.source.digest() else { return Ok(0) };
        let size = image.header().virtual_size;
        let mut tree = TreeBuilder::new();
        for Decided { first, count, .. } in decided(image, 0..block_count(size))? {
            tree.push_zero_blocks(first.saturating_sub(tree.blocks()));
            let mut done = 0;
            while done < count {
                let step = (count - done).min(4096);
                for leaf in self.source.leaves(first + done, step)?.unwrap_or_default() {
                    tree.push_leaf(leaf);
                }
                done += step;
            }
        }
        tree.push_zero_blocks(block_count(size).saturating_sub(tree.blocks()));
        let is = tree.finish(size);
        if is != digest {
            let member = self.source.member().to_owned();
            let message =
                format!("the new file was thrown away: its view digest is {is}, the member's {digest}");
            return Err(StoreError::Proof { member, message }.into());
        }
        let chain = OpenChain::of(vec![image.clone()]);
        let ranges = read_back(layout, image, &self.alignment)?;
        self.compare(&ranges, |at, buffer| chain.read(GuestOffset(at), buffer).map_err(OpError::from))
    }

    /// Reads blocks of the new image and holds them against their leaves; gives the bytes.
    fn compare(
        &self,
        ranges: &[Range<u64>],
        read: impl Fn(u64, &mut [u8]) -> Result<()> + Sync,
    ) -> Result<u64> {
        let end = block_count(self.source.virtual_size());
        let mut tasks = Vec::new();
        for range in ranges {
            let mut at = range.start;
            while at < range.end.min(end) {
                let count = CHECK_BLOCKS.min(range.end.min(end) - at);
                tasks.push((at, self.source.leaves(at, count)?.unwrap_or_default()));
                at += count;
            }
        }
        tasks.par_iter().try_for_each_init(Vec::new, |buffer: &mut Vec<u8>, (first, expected)| {
            buffer.resize(expected.len() * BLOCK_LENGTH, 0);
            buffer.fill(0);
            read(first * BLOCK_BYTES, buffer)?;
            let wrong =
                buffer.chunks(BLOCK_LENGTH).zip(expected).position(|(block, was)| leaf(block) != *was);
            match wrong {
                Some(index) => Err(OpError::Store(self.source.blame(first + index as u64))),
                None => Ok(()),
            }
        })?;
        Ok(tasks.iter().map(|(_, leaves)| leaves.len() as u64 * BLOCK_BYTES).sum())
    }

    fn raw(&self) -> Result<Option<Made>> {
        let Self { source, input, output, work, .. } = self;
        let failed = failed(output.shown());
        let (mut shared, mut copied) = (0, 0);
        for run in input.map() {
            for (part, clones) in self.parts(&run?) {
                if clones {
                    shared += part.length;
                } else {
                    copied += part.length;
                }
            }
        }
        if shared <= copied {
            return Ok(None);
        }
        output.need(copied)?;
        source.sound_metadata()?;
        work.progress.phase("cloning", shared + copied);
        output.file().set_length(source.virtual_size()).map_err(&failed)?;
        let files: Vec<_> = input.upper.images().map(|image| image.file().clone()).collect();
        let mut batch = Vec::new();
        let flush = |batch: &mut Vec<Move>| {
            work.cancel.check()?;
            if !batch.is_empty() {
                output.file().move_runs(&files, batch, Means::Clone).map_err(&failed)?;
                work.progress.advance(batch.iter().map(|run| run.length).sum());
                batch.clear();
            }
            Ok::<_, OpError>(())
        };
        let mut made = Made { how: Some(How::Clone), cloned_bytes: shared, ..Made::default() };
        let mut blocks: Vec<Range<u64>> = Vec::new();
        for run in input.map() {
            for (part, clones) in self.parts(&run?) {
                match part.content {
                    Content::Data { layer, host } if clones => {
                        batch.push(Move {
                            source: layer,
                            from: host.0,
                            to: part.start.0,
                            length: part.length,
                        });
                        if batch.len() >= BATCH {
                            flush(&mut batch)?;
                        }
                    }
                    _ => {
                        made.data_bytes += self.copy(&part)?;
                        let (first, end) = (part.start.0 / BLOCK_BYTES, part.end().0.div_ceil(BLOCK_BYTES));
                        match blocks.last_mut() {
                            Some(last) if first <= last.end => last.end = last.end.max(end),
                            _ => blocks.push(first..end),
                        }
                    }
                }
            }
        }
        flush(&mut batch)?;
        output.seal()?;
        if source.digest().is_some() {
            let file = output.file();
            made.checked_bytes =
                self.compare(&blocks, |at, buffer| read_padded(file, at, buffer).map_err(failed_of(output)))?;
        }
        Ok(Some(made))
    }

    /// A run of data in parts that can be shared, and others; nothing for zeros.
    fn parts(&self, run: &Run) -> Vec<(Run, bool)> {
        let (layer, host) = match run.content {
            Content::Zero | Content::Below => return Vec::new(),
            Content::Compressed { .. } => return vec![(*run, false)],
            Content::Data { layer, host } => (layer, host),
        };
        let align = self.alignment.get(layer).copied().unwrap_or_default();
        let length = self.input.upper.images().nth(layer).map_or(0, Image::file_length);
        if align == 0 || host.0 % align != run.start.0 % align || host.0 + run.length > length {
            return vec![(*run, false)];
        }
        let from = GuestOffset(run.start.0.div_ceil(align) * align);
        let to = GuestOffset(run.end().0 / align * align);
        if from >= to {
            return vec![(*run, false)];
        }
        let head = run.clip(run.start, from).map(|part| (part, false));
        let middle = run.clip(from, to).map(|part| (part, true));
        let tail = run.clip(to, run.end()).map(|part| (part, false));
        [head, middle, tail].into_iter().flatten().collect()
    }

    /// Copies a run into a raw file; gives the bytes written.
    fn copy(&self, run: &Run) -> Result<u64> {
        let mut written = 0;
        let mut at = run.start;
        // One cluster is decompressed once.
        let most = if matches!(run.content, Content::Compressed { .. }) { run.length } else { COPY_BYTES };
        while let Some(part) = run.clip(at, at.plus(most)) {
            self.work.cancel.check()?;
            self.work.pace.spend(part.length, self.work.cancel);
            let mut bytes = vec![0; usize::try_from(part.length).unwrap_or_default()];
            self.input.upper.read_run(&part, &mut bytes)?;
            let write = |at, bytes: &[u8]| self.output.file().write_at(at, bytes);
            written += write_sparse(write, part.start.0, &bytes).map_err(failed(self.output.shown()))?;
            self.work.progress.advance(part.length);
            at = part.end();
        }
        Ok(written)
    }
}

fn failed_of(output: &Output) -> impl Fn(BackendError) -> OpError + '_ {
    failed(output.shown())
}
