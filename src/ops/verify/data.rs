//! The level *data*: what is read of a member, and what it is held against.

use std::ops::Range;

use super::Options;
use crate::chain::graph::{Key, NodeId};
use crate::ops::{OpError, Result};
use crate::store::StoreError;
use crate::store::compare::Expected;
use crate::store::manifest::leaves::{self, LeafError, LeafFile};
use crate::store::manifest::reads::Reads;

/// How much is read between two looks at the time, in blocks: 512 MiB.
const STEP_BLOCKS: u64 = 8192;
/// The unit of samples, in blocks: 1 MiB.
const SAMPLE_BLOCKS: u64 = 16;

/// The tables of members, in their order, as far as all are adopted; whether that is all of them.
pub(super) fn tables(context: &super::Context<'_>, line: &[NodeId]) -> Result<(Vec<LeafFile>, bool)> {
    let mut tables = Vec::new();
    for member in line {
        let key = &context.scan.graph.node(*member).key;
        match context.known(*member)?.manifest() {
            Some(manifest) => {
                let store = context.stores.get(key.store)?;
                tables.push(leaves::open(store, &context.stores.display(key), &manifest.leaves)?);
            }
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

/// What a member that is another file than it was is held against.
pub(super) fn other(context: &super::Context<'_>, id: NodeId) -> Result<Expected> {
    let (line, whole) = bound_line(context, id)?;
    let (old, all) = tables(context, &line)?;
    let today = context.scan.graph.ancestors(id).unwrap_or_default();
    let (below, known) = tables(context, &today)?;
    Ok(Expected::Other { old, deep: whole && all, below: known.then_some(below) })
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
        let number =
            hash.as_bytes().iter().take(4).fold(0_u32, |number, byte| number << 8 | u32::from(*byte));
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

pub(super) fn leaves_failed(source: LeafError) -> OpError {
    StoreError::Leaves { member: String::new(), source }.into()
}
