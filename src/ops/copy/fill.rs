//! Every block of a new file into its place: what an earlier try left there, what is here already, and the rest from the
//! peer, in the order of the guest.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use super::arrival::Image;
use super::need::{Here, Need, Tables};
use super::offer::{LineMember, MOST_BLOCKS};
use super::{Below, Run, fetch};
use crate::digest::leaf;
use crate::ids::Digest;
use crate::ops::Result;
use crate::qcow2::layout::hostset::{Collecting, HostSet};
use crate::store::StoreError;
use crate::store::chain::OpenChain;
use crate::store::manifest::leaves::LeafError;
use crate::units::{BLOCK_BYTES, BLOCK_LENGTH, GuestOffset};

impl Run<'_> {
    /// Puts every block in its place; gives how many the peer sent.
    pub(super) fn fill(
        &self,
        image: &Image<'_>,
        one: &LineMember,
        need: &Need,
        tables: &mut Tables<'_>,
        below: &Below,
    ) -> Result<u64> {
        let failed = |source| StoreError::Leaves { member: one.name.clone(), source };
        let work = self.work;
        work.progress.phase("copying", (need.wanted.len() + need.filled.len()) * BLOCK_BYTES);
        let there = image.find(need, tables, &one.name, work)?;
        work.progress.advance(there.len() * BLOCK_BYTES);
        let here = self.here(need, tables, &there, below).map_err(failed)?;
        let (mut repeated, mut local) = (Vec::new(), Collecting::default());
        let mut chain: Option<(usize, OpenChain)> = None;
        let mut bytes = vec![0; BLOCK_LENGTH];
        for (block, place) in here {
            work.cancel.check()?;
            let (layer, from) = match place {
                Here::Itself(from) => {
                    let _ = local.insert(block, 1);
                    repeated.push((block, from));
                    continue;
                }
                Here::Below(layer, from) => (layer, from),
            };
            if chain.as_ref().is_none_or(|(at, _)| *at != layer) {
                chain = Some((layer, below.chain(layer)));
            }
            let Some((_, chain)) = &chain else { continue };
            let read = chain.read(GuestOffset(from * BLOCK_BYTES), &mut bytes);
            // What is damaged here is asked for.
            if read.is_ok() && tables.leaves(block, 1).map_err(failed)?.first() == Some(&leaf(&bytes)) {
                image.put(block, &bytes)?;
                let _ = local.insert(block, 1);
                work.progress.advance(BLOCK_BYTES);
            }
        }
        let local = local.finish();
        let have = |block| there.contains(block) || local.contains(block);
        let sent = self.ask(image, one, need, tables, &have)?;
        let unproved = |message: String| StoreError::Proof { member: one.name.clone(), message };
        for (block, from) in repeated {
            image.get(from, &mut bytes)?;
            if tables.leaves(block, 1).map_err(failed)?.first() != Some(&leaf(&bytes)) {
                return Err(
                    unproved(format!("block {from} of the new file is not what was written there")).into()
                );
            }
            image.put(block, &bytes)?;
            work.progress.advance(BLOCK_BYTES);
        }
        if image.count() != need.wanted.len() + need.filled.len() {
            let message = "a block that it shares with what is here cannot be read; verify it first";
            return Err(unproved(message.to_owned()).into());
        }
        Ok(sent)
    }

    /// Where blocks may be had without asking. Of a member that stands alone nothing is here but what it has twice.
    fn here(
        &self,
        need: &Need,
        tables: &mut Tables<'_>,
        there: &HostSet,
        below: &Below,
    ) -> std::result::Result<BTreeMap<u64, Here>, LeafError> {
        let mut here = tables.here(&need.wanted, there)?;
        if self.request.flatten {
            here.retain(|_, place| matches!(place, Here::Itself(_)));
        }
        if let Some(parent) = below.images.len().checked_sub(1) {
            let filled = need.filled.runs().flat_map(|(first, count)| first..first + count);
            let missing = filled.filter(|block| !there.contains(*block));
            here.extend(missing.map(|block| (block, Here::Below(parent, block))));
        }
        Ok(here)
    }

    /// Asks for all blocks that are not there.
    fn ask(
        &self,
        image: &Image<'_>,
        one: &LineMember,
        need: &Need,
        tables: &mut Tables<'_>,
        have: &(dyn Fn(u64) -> bool + Sync),
    ) -> Result<u64> {
        let sent = AtomicU64::new(0);
        let wanted = need.wanted.runs().flat_map(|(first, count)| first..first + count);
        let mut blocks = wanted.filter(|block| !have(*block)).peekable();
        let mut left: Vec<Digest> = Vec::new();
        let mut at = 0;
        let pieces = std::iter::from_fn(|| {
            // Small ones under a limit, so that it is kept to.
            let room = self.work.pace.at_once(MOST_BLOCKS * BLOCK_BYTES) / BLOCK_BYTES;
            let mut piece = fetch::Piece::new(room);
            loop {
                if left.is_empty() {
                    let Some(first) = blocks.next() else { break };
                    let mut count = 1;
                    while count < MOST_BLOCKS && blocks.next_if_eq(&(first + count)).is_some() {
                        count += 1;
                    }
                    match tables.leaves(first, count) {
                        Ok(leaves) => (at, left) = (first, leaves),
                        Err(source) => {
                            let member = one.name.clone();
                            return Some(Err(StoreError::Leaves { member, source }.into()));
                        }
                    }
                }
                let over = piece.add(at, &left);
                let taken = left.len() - over;
                at += taken as u64;
                left.drain(..taken);
                if over > 0 {
                    break;
                }
            }
            (!piece.is_empty()).then_some(Ok(piece))
        });
        fetch::at_once(self.peer.at_once(), pieces, |piece| {
            fetch::blocks(self.peer, one, &piece, self.work, |block, bytes| {
                image.put(block, bytes)?;
                sent.fetch_add(1, Ordering::Relaxed);
                self.work.progress.advance(BLOCK_BYTES);
                Ok(())
            })
        })?;
        Ok(sent.into_inner())
    }
}
