//! The level *data*: the bytes that a member decides, against the leaves that were kept of them.

use std::ops::Range;
use std::time::Instant;

use super::Options;
use crate::chain::graph::{Key, NodeId};
use crate::digest::view::{Leaves, Says, Seen, look, walk};
use crate::digest::{block_count, zero_leaf};
use crate::ids::Digest;
use crate::ops::{OpError, Result};
use crate::store::chain::OpenChain;
use crate::store::manifest::Manifest;
use crate::store::manifest::leaves::{LeafError, LeafFile};
use crate::store::manifest::reads::Reads;
use crate::store::measure::{Job, Part, measure};
use crate::store::{StoreError, Stores};
use crate::units::BLOCK_BYTES;

/// How much is read between two looks at the time, in blocks: 512 MiB.
const STEP_BLOCKS: u64 = 8192;
/// The unit of samples, in blocks: 1 MiB.
const SAMPLE_BLOCKS: u64 = 16;

/// What reading a member told.
#[derive(Debug, Default)]
pub(super) struct Compared {
    /// Blocks that are not what they were, ascending.
    pub bad: Vec<u64>,
    /// Blocks of which it cannot be told what they were.
    pub unknown: u64,
    /// What was looked at.
    pub read: Vec<Range<u64>>,
    /// How many bytes of that had to be read.
    pub bytes: u64,
    /// Whether that was all.
    pub complete: bool,
}

/// A member's own leaf table.
pub(super) fn table(stores: &Stores, store: usize, name: &str, manifest: &Manifest) -> Result<LeafFile> {
    let opened = LeafFile::open(stores.get(store)?.backend().as_ref(), &manifest.leaves);
    Ok(opened.map_err(|source| StoreError::Leaves { member: name.to_owned(), source })?)
}

/// The tables of members, in their order, as far as all are adopted; whether that is all of them.
pub(super) fn tables(context: &super::Context<'_>, line: &[NodeId]) -> Result<(Vec<LeafFile>, bool)> {
    let mut tables = Vec::new();
    for member in line {
        let key = &context.scan.graph.node(*member).key;
        match context.known(*member)?.manifest() {
            Some(manifest) => tables.push(table(context.stores, key.store, &context.stores.display(key), manifest)?),
            None => return Ok((tables, false)),
        }
    }
    Ok((tables, true))
}

/// A member and what it stood on when it was adopted, by the ids that their manifests have; whether that goes down to
/// a full base.
pub(super) fn bound_line(context: &super::Context<'_>, id: NodeId) -> Result<(Vec<NodeId>, bool)> {
    let graph = &context.scan.graph;
    let mut line = vec![id];
    let mut known = context.known(id)?;
    while let Some(binding) = known.manifest().and_then(|manifest| manifest.parent.clone()) {
        let mut next = None;
        for (store, _) in context.stores.iter() {
            let Some(found) = graph.find(&Key { store, path: binding.member.clone() }) else { continue };
            let is = context.known(found)?;
            if is.manifest().is_some_and(|manifest| manifest.id == binding.id) {
                next = Some((found, is));
            }
        }
        match next {
            Some((found, is)) if !line.contains(&found) => {
                line.push(found);
                known = is;
            }
            _ => return Ok((line, false)),
        }
    }
    Ok((line, known.manifest().is_some()))
}

/// What a member's bytes are held against.
pub(super) enum Expected {
    /// The very file that was adopted: its own table.
    Same(LeafFile),
    /// Another file: all that the old one showed, whoever decided it.
    Other {
        /// The tables of the member and of what it stood on, newest first.
        old: Vec<LeafFile>,
        /// Whether these go down to a full base.
        deep: bool,
        /// The tables of what it stands on today, newest first, if all of that is adopted.
        below: Option<Vec<LeafFile>>,
    },
}

impl Expected {
    /// For a member that is another file than it was.
    pub fn other(context: &super::Context<'_>, id: NodeId) -> Result<Self> {
        let (line, whole) = bound_line(context, id)?;
        let (old, all) = tables(context, &line)?;
        let today = context.scan.graph.ancestors(id).unwrap_or_default();
        let (below, known) = tables(context, &today)?;
        Ok(Self::Other { old, deep: whole && all, below: known.then_some(below) })
    }
}

/// Which blocks are read, in which order: all, or a sample, or as far as the time goes those that were left alone for
/// longest first.
pub(super) fn agenda(blocks: u64, reads: &Reads, options: &Options) -> Vec<Vec<Range<u64>>> {
    let whole = std::iter::once(0..blocks).collect();
    let all: Vec<Range<u64>> = if options.deadline.is_some() { reads.by_age(blocks) } else { whole };
    let mut steps = Vec::new();
    for range in all {
        let picked = match options.fraction {
            Some(fraction) => sample(range, fraction, options.seed),
            None => vec![range],
        };
        if options.deadline.is_none() {
            steps.push(picked);
            continue;
        }
        for range in picked {
            let mut at = range.start;
            while at < range.end {
                let end = range.end.min(at + STEP_BLOCKS);
                steps.push(std::iter::once(at..end).collect());
                at = end;
            }
        }
    }
    steps
}

/// Each MiB with the same chance, decided by its number and the seed.
fn sample(range: Range<u64>, fraction: f64, seed: u64) -> Vec<Range<u64>> {
    let mut picked: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let unit = at / SAMPLE_BLOCKS;
        let end = range.end.min((unit + 1) * SAMPLE_BLOCKS);
        let hash = blake3::hash(&[unit.to_le_bytes(), seed.to_le_bytes()].concat());
        let number = hash.as_bytes().iter().take(4).fold(0_u32, |number, byte| number << 8 | u32::from(*byte));
        if f64::from(number) < fraction * f64::from(u32::MAX) {
            match picked.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => picked.push(at..end),
            }
        }
        at = end;
    }
    picked
}

/// Reads what the newest member of `chain` decides, and compares.
pub(super) fn compare(
    chain: &OpenChain,
    expected: &mut Expected,
    agenda: &[Vec<Range<u64>>],
    options: &Options,
    job: &Job<'_>,
) -> Result<Compared> {
    let blocks = block_count(chain.virtual_size());
    let mut compared = Compared::default();
    for ranges in agenda {
        if options.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            break;
        }
        let mut compare = Compare { expected, compared: &mut compared };
        let mut at = ranges.first().map_or(0, |range| range.start);
        let mut open = ranges.iter().peekable();
        measure::<OpError>(chain, ranges, job, None, |part| {
            let (first, count) = match part {
                Part::Zeros { first, count } => (first, count),
                Part::Leaves { first, leaves } => (first, leaves.len() as u64),
            };
            while let Some(range) = open.next_if(|range| range.end <= first) {
                compare.passed_over(at.max(range.start)..range.end)?;
                at = range.end;
            }
            if let Some(range) = open.peek() {
                compare.passed_over(at.max(range.start)..first)?;
            }
            at = first + count;
            compare.part(part)
        })?;
        for range in open {
            compare.passed_over(at.max(range.start)..range.end)?;
        }
        compared.read.extend(ranges.iter().cloned());
    }
    let read: u64 = compared.read.iter().map(|range| range.end - range.start).sum();
    compared.complete = read >= blocks;
    compared.bad.sort_unstable();
    compared.bad.dedup();
    Ok(compared)
}

struct Compare<'a> {
    expected: &'a mut Expected,
    compared: &'a mut Compared,
}

impl Compare<'_> {
    /// Blocks that the member decides now.
    fn part(&mut self, part: Part<'_>) -> Result<()> {
        match part {
            Part::Zeros { first, count } => self.hold(first..first + count, |_| zero_leaf()),
            Part::Leaves { first, leaves } => {
                self.compared.bytes += leaves.len() as u64 * BLOCK_BYTES;
                self.hold(first..first + leaves.len() as u64, |block| {
                    let index = usize::try_from(block - first).unwrap_or(usize::MAX);
                    leaves.get(index).copied().unwrap_or(Digest([0; 32]))
                })
            }
        }
    }

    /// What the view should have is what was found.
    fn hold(&mut self, blocks: Range<u64>, found: impl Fn(u64) -> Digest) -> Result<()> {
        let Compared { bad, unknown, .. } = &mut *self.compared;
        let (tables, deep) = match &mut *self.expected {
            Expected::Same(own) => (std::slice::from_mut(own), false),
            Expected::Other { old, deep, .. } => (old.as_mut_slice(), *deep),
        };
        let mut at = blocks.start;
        while at < blocks.end {
            let Some(own) = tables.first_mut() else { return Ok(()) };
            let stretch = own.stretch(at).map_err(leaves_failed)?;
            let end = stretch.end.min(blocks.end);
            if stretch.says == Says::Nothing && !deep {
                // It was not the member's to decide, and who decided it is not known.
                *unknown += end - at;
                at = end;
                continue;
            }
            walk(tables, at, end, |first, seen| {
                match seen {
                    Seen::Zeros(count) => {
                        bad.extend((first..first + count).filter(|block| found(*block) != zero_leaf()));
                    }
                    Seen::Leaf(leaf) if leaf != found(first) => bad.push(first),
                    Seen::Leaf(_) => {}
                }
                Ok(())
            })
            .map_err(leaves_failed)?;
            at = end;
        }
        Ok(())
    }

    /// Blocks that the member does not decide now: what it stands on today must show there what it showed.
    fn passed_over(&mut self, blocks: Range<u64>) -> Result<()> {
        let Expected::Other { old, deep, below } = &mut *self.expected else { return Ok(()) };
        let Some(below) = below.as_mut().filter(|_| *deep) else {
            self.compared.unknown += blocks.end.saturating_sub(blocks.start);
            return Ok(());
        };
        let mut at = blocks.start;
        while at < blocks.end {
            let (was, owner) = look(old, at, blocks.end).map_err(leaves_failed)?;
            let (is, shower) = look(below, at, blocks.end).map_err(leaves_failed)?;
            let end = was.end.min(is.end);
            if owner.is_some() || shower.is_some() {
                for block in at..end {
                    if leaf_of(old, owner, was.says, block)? != leaf_of(below, shower, is.says, block)? {
                        self.compared.bad.push(block);
                    }
                }
            }
            at = end;
        }
        Ok(())
    }
}

/// The leaf of a block that a look has just been taken at.
fn leaf_of(tables: &mut [LeafFile], layer: Option<usize>, says: Says, block: u64) -> Result<Digest> {
    match layer.and_then(|layer| tables.get_mut(layer)).filter(|_| says == Says::Leaf) {
        Some(table) => table.leaf(block).map_err(leaves_failed),
        None => Ok(zero_leaf()),
    }
}

pub(super) fn leaves_failed(source: LeafError) -> OpError {
    StoreError::Leaves { member: String::new(), source }.into()
}
