//! Where damage is, whose it is, and which snapshots show it.

use std::collections::BTreeSet;

use serde::Serialize;

use super::Context;
use super::data::{leaves_failed, table};
use crate::chain::graph::NodeId;
use crate::digest::leaf;
use crate::digest::view::{Leaves, Says, Seen, walk};
use crate::failure::{Code, Failure as _};
use crate::ops::Result;
use crate::qcow2::{ExtentKind, Image};
use crate::store::chain::OpenChain;
use crate::store::manifest::Blocks;
use crate::store::manifest::leaves::LeafFile;
use crate::units::{BLOCK_BYTES, GuestOffset};

/// Ranges listed of one member.
const MAX_RANGES: usize = 1000;

/// A guest range that does not read as it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
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
        let dependents = dependents(context, id, *range)?;
        let dependents = dependents.into_iter().map(|id| stores.display(&scan.graph.node(id).key)).collect();
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

/// The members above that show any of these blocks of a member: all up to those whose own tables cover them.
pub(super) fn dependents(context: &Context<'_>, id: NodeId, range: Blocks) -> Result<Vec<NodeId>> {
    let Context { stores, scan, .. } = context;
    let mut found = BTreeSet::new();
    let mut open: Vec<NodeId> = scan.graph.children(id).to_vec();
    while let Some(child) = open.pop() {
        let key = &scan.graph.node(child).key;
        let shows = match context.known(child)?.manifest() {
            Some(manifest) => match table(stores, key.store, &stores.display(key), manifest) {
                Ok(mut table) => !covers(&mut table, range)?,
                // What cannot be told is told of.
                Err(_) => true,
            },
            None => true,
        };
        // Members above a circle are met again and again.
        if shows && child != id && found.insert(child) {
            open.extend(scan.graph.children(child));
        }
    }
    Ok(found.into_iter().collect())
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

/// The lowest member whose own block is not what it was, of those that a bad block of `chain`'s view is put together
/// from; 0 is the chain's newest. `tables` are its and those below it, newest first.
pub(super) fn blame(chain: &OpenChain, tables: &mut [LeafFile], block: u64) -> Result<usize> {
    let images: Vec<Image> = chain.images().cloned().collect();
    let mut buffer = vec![0; usize::try_from(BLOCK_BYTES).unwrap_or_default()];
    for layer in (1..tables.len().min(images.len())).rev() {
        let Some(from) = tables.get_mut(layer..) else { continue };
        let Some((own, _)) = from.split_first_mut() else { continue };
        if own.stretch(block).map_err(leaves_failed)?.says == Says::Nothing {
            continue;
        }
        let mut wanted = crate::digest::zero_leaf();
        walk(from, block, block + 1, |_, seen| {
            if let Seen::Leaf(leaf) = seen {
                wanted = leaf;
            }
            Ok(())
        })
        .map_err(leaves_failed)?;
        let below = OpenChain::of(images.get(layer..).unwrap_or_default().to_vec());
        let read = below.read(GuestOffset(block * BLOCK_BYTES), &mut buffer);
        let unreadable = read.as_ref().is_err_and(|error| error.code() == Code::BadCompression);
        if !unreadable {
            read?;
        }
        if unreadable || leaf(&buffer) != wanted {
            return Ok(layer);
        }
    }
    Ok(0)
}
