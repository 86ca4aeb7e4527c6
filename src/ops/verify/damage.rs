//! Where damage is, whose it is, and which snapshots show it.

use std::collections::{BTreeSet, HashMap};

use serde::Serialize;

use super::Context;
use super::data::leaves_failed;
use crate::chain::graph::NodeId;
use crate::digest::view::{Leaves as _, Says};
use crate::ops::Result;
use crate::qcow2::{ExtentKind, Image};
use crate::store::manifest::Blocks;
use crate::store::manifest::leaves::{self, LeafFile};
use crate::units::{BLOCK_BYTES, GuestOffset};

/// Ranges listed of one member.
const MAX_RANGES: usize = 1000;

/// A guest range that does not read as it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Damage {
    /// Whose bytes they are.
    pub member: String,
    /// Where the range begins in its view, in bytes.
    pub start: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Where its bytes lie in the member's file; several or none if they are put together.
    pub host: Vec<HostRange>,
    /// The other snapshots that show it.
    pub dependents: Vec<String>,
}

/// Bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct HostRange {
    /// The first.
    pub offset: u64,
    /// How many.
    pub length: u64,
}

/// Joins neighbouring blocks.
pub(super) fn join(bad: &[u64]) -> Vec<Blocks> {
    let mut joined: Vec<Blocks> = Vec::new();
    for block in bad {
        match joined.last_mut() {
            Some(last) if last.first + last.count == *block => last.count += 1,
            _ => joined.push(Blocks { first: *block, count: 1 }),
        }
    }
    joined
}

/// Tells of the ranges of one member, with who shows them.
pub(super) fn describe(
    context: &Context<'_>,
    dependents: &mut Dependents<'_>,
    id: NodeId,
    image: &Image,
    ranges: &[Blocks],
) -> Result<Vec<Damage>> {
    let Context { stores, scan, .. } = context;
    let member = stores.display(&scan.graph.node(id).key);
    let size = image.header().virtual_size;
    let mut damages = Vec::new();
    for range in ranges.iter().take(MAX_RANGES) {
        let start = range.first * BLOCK_BYTES;
        let length = (range.count * BLOCK_BYTES).min(size.saturating_sub(start));
        let dependents = dependents.of(id, *range)?.into_iter();
        let dependents = dependents.map(|id| stores.display(&scan.graph.node(id).key)).collect();
        damages.push(Damage {
            member: member.clone(),
            start,
            length,
            host: hosts(image, start, length)?,
            dependents,
        });
    }
    Ok(damages)
}

fn hosts(image: &Image, start: u64, length: u64) -> Result<Vec<HostRange>> {
    let mut hosts: Vec<HostRange> = Vec::new();
    let end = start + length;
    for extent in image.extents(GuestOffset(start)) {
        let extent = extent?;
        if extent.start.0 >= end || hosts.len() >= MAX_RANGES {
            break;
        }
        let stop = extent.end().0.min(end);
        match extent.kind {
            ExtentKind::Data { host } => {
                hosts.push(HostRange { offset: host.0, length: stop - extent.start.0 });
            }
            ExtentKind::Compressed(cluster) => {
                hosts.push(HostRange { offset: cluster.host.0, length: cluster.stored_bytes });
            }
            ExtentKind::Zero | ExtentKind::Below => {}
        }
    }
    Ok(hosts)
}

/// Who shows what of whom. Each leaf table that is asked is opened once.
pub(super) struct Dependents<'a> {
    context: &'a Context<'a>,
    /// `None` for a member of which nothing is known.
    tables: HashMap<NodeId, Option<LeafFile>>,
}

impl<'a> Dependents<'a> {
    pub fn new(context: &'a Context<'a>) -> Self {
        Self { context, tables: HashMap::new() }
    }

    /// The members above that show any of these blocks of a member: all up to those whose own tables cover them.
    pub fn of(&mut self, id: NodeId, range: Blocks) -> Result<Vec<NodeId>> {
        let graph = &self.context.scan.graph;
        let mut found = BTreeSet::new();
        let mut open: Vec<NodeId> = graph.children(id).to_vec();
        while let Some(child) = open.pop() {
            // Members above a circle are met again and again.
            if child != id && !self.covers(child, range)? && found.insert(child) {
                open.extend(graph.children(child));
            }
        }
        Ok(found.into_iter().collect())
    }

    /// Whether a member decides all of these blocks itself, as far as that can be told.
    fn covers(&mut self, id: NodeId, range: Blocks) -> Result<bool> {
        if !self.tables.contains_key(&id) {
            let key = &self.context.scan.graph.node(id).key;
            let (stores, known) = (self.context.stores, self.context.known(id)?);
            let opened = known
                .manifest()
                .map(|manifest| leaves::open(stores.get(key.store)?, &stores.display(key), &manifest.leaves));
            self.tables.insert(id, opened.and_then(std::result::Result::ok));
        }
        match self.tables.get_mut(&id) {
            Some(Some(table)) => covers(table, range),
            _ => Ok(false),
        }
    }
}

/// Whether a table tells of every one of these blocks.
fn covers(table: &mut LeafFile, range: Blocks) -> Result<bool> {
    let end = range.first.saturating_add(range.count);
    let mut at = range.first;
    while at < end {
        let stretch = table.stretch(at).map_err(leaves_failed)?;
        if stretch.says == Says::Nothing {
            return Ok(false);
        }
        at = stretch.end;
    }
    Ok(true)
}
