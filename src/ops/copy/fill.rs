//! Every block of a new file into its place: what an earlier try left there, what is here already, and the rest from the
//! peer, in the order of the guest; in what order one answer's blocks come is up to the peer.

use std::ops::Range;

use super::arrival::Image;
use super::need::{Found, Here, Need, Tables};
use super::offer::{LineMember, MOST_BLOCKS};
use super::reuse::Account;
use super::{Below, Run, fetch};
use crate::digest::leaf;
use crate::ids::Digest;
use crate::ops::Result;
use crate::qcow2::layout::hostset::{Collecting, HostSet};
use crate::store::StoreError;
use crate::store::chain::OpenChain;
use crate::units::{BLOCK_BYTES, BLOCK_LENGTH, GuestOffset};

/// What is here already.
pub(super) struct Ours<'a> {
    /// The line that the member is put on.
    pub below: &'a Below,
    /// The rest of the account, if that is looked at.
    pub account: Option<Account<'a>>,
    /// The view of the line's member that was read last.
    chain: Option<(u32, OpenChain)>,
}

impl<'a> Ours<'a> {
    pub fn new(below: &'a Below, account: Option<Account<'a>>) -> Self {
        Self { below, account, chain: None }
    }

    /// Reads a block; whether that could be done.
    fn read(&mut self, place: Here, bytes: &mut [u8]) -> bool {
        match (place, &mut self.account) {
            (Here::Below(layer, block), _) => {
                if self.chain.as_ref().is_none_or(|(at, _)| *at != layer) {
                    let chain = self.below.chain(usize::try_from(layer).unwrap_or(usize::MAX));
                    self.chain = Some((layer, chain));
                }
                let at = GuestOffset(block * BLOCK_BYTES);
                self.chain.as_ref().is_some_and(|(_, chain)| chain.read(at, bytes).is_ok())
            }
            (Here::Other(number, block), Some(account)) => account.read(number, block, bytes),
            (Here::Other(..) | Here::Itself(_), _) => false,
        }
    }
}

impl Run<'_> {
    /// Puts every block in its place; gives how many the peer sent.
    pub(super) fn fill(
        &self,
        image: &Image<'_>,
        one: &LineMember,
        need: &Need,
        tables: &mut Tables<'_>,
        ours: &mut Ours<'_>,
    ) -> Result<u64> {
        let work = self.work;
        work.progress.phase("copying", (need.wanted.len() + need.filled.len()) * BLOCK_BYTES);
        let there = image.find(need, tables, &one.name, work)?;
        work.progress.advance(there.len() * BLOCK_BYTES);
        self.fill_up(image, one, need, tables, ours, &there)?;
        let mut sent = 0;
        for window in need.windows() {
            let here = self.here(one, need, tables, ours, &window, &there)?;
            let repeated = here.partition_point(|(_, _, here)| !matches!(here, Here::Itself(_)));
            let (here, repeated) = here.split_at_checked(repeated).unwrap_or_default();
            let local = self.take(image, ours, here.iter().copied())?;
            let mut later = Collecting::default();
            for (block, _, _) in repeated {
                let _ = later.insert(*block, 1);
            }
            let (local, later) = (local.finish(), later.finish());
            let have = |block| there.contains(block) || local.contains(block) || later.contains(block);
            sent += self.ask(image, one, need, tables, &window, &have)?;
            self.repeat(image, one, repeated)?;
        }
        if image.count() != need.wanted.len() + need.filled.len() {
            let message =
                "a block that it shares with what is here cannot be read; verify it first".to_owned();
            return Err(StoreError::Proof { member: one.name.clone(), message }.into());
        }
        Ok(sent)
    }

    /// How many blocks need not be asked for.
    pub(super) fn count_here(
        &self,
        one: &LineMember,
        need: &Need,
        tables: &mut Tables<'_>,
        ours: &Ours<'_>,
    ) -> Result<u64> {
        let mut count = 0;
        for window in need.windows() {
            count += self.here(one, need, tables, ours, &window, &HostSet::default())?.len() as u64;
        }
        Ok(count)
    }

    /// Where blocks of a window may be had without asking. Of a member that stands alone the line below is the peer's.
    fn here(
        &self,
        one: &LineMember,
        need: &Need,
        tables: &mut Tables<'_>,
        ours: &Ours<'_>,
        window: &Range<u64>,
        there: &HostSet,
    ) -> Result<Vec<Found>> {
        let index = tables.index(need, window, there, self.request.flatten);
        let mut index = index.map_err(|source| StoreError::Leaves { member: one.name.clone(), source })?;
        if let Some(account) = &ours.account {
            account.look_for(&mut index)?;
        }
        Ok(index.finish())
    }

    /// Puts blocks in their places that are as below, in units of which others differ.
    fn fill_up(
        &self,
        image: &Image<'_>,
        one: &LineMember,
        need: &Need,
        tables: &mut Tables<'_>,
        ours: &mut Ours<'_>,
        there: &HostSet,
    ) -> Result<()> {
        let Some(parent) = ours.below.images.len().checked_sub(1) else { return Ok(()) };
        let parent = u32::try_from(parent).unwrap_or(u32::MAX);
        for (first, count) in need.filled.runs() {
            let leaves = tables.leaves(first, count);
            let leaves = leaves.map_err(|source| StoreError::Leaves { member: one.name.clone(), source })?;
            let blocks = (first..).zip(leaves).filter(|(block, _)| !there.contains(*block));
            self.take(image, ours, blocks.map(|(block, leaf)| (block, leaf, Here::Below(parent, block))))?;
        }
        Ok(())
    }

    /// Puts blocks in their places that are here; gives those that were right.
    fn take(
        &self,
        image: &Image<'_>,
        ours: &mut Ours<'_>,
        here: impl Iterator<Item = Found>,
    ) -> Result<Collecting> {
        let mut taken = Collecting::default();
        let mut bytes = vec![0; BLOCK_LENGTH];
        for (block, expected, place) in here {
            self.work.cancel.check()?;
            // What is damaged here, or another block by now, is asked for.
            if ours.read(place, &mut bytes) && leaf(&bytes) == expected {
                image.put(block, &bytes)?;
                let _ = taken.insert(block, 1);
                self.work.progress.advance(BLOCK_BYTES);
            }
        }
        Ok(taken)
    }

    /// Puts blocks in their places that are others of the same file.
    fn repeat(&self, image: &Image<'_>, one: &LineMember, repeated: &[Found]) -> Result<()> {
        let mut bytes = vec![0; BLOCK_LENGTH];
        for (block, expected, place) in repeated {
            let Here::Itself(from) = *place else { continue };
            image.get(from, &mut bytes)?;
            if leaf(&bytes) != *expected {
                let message = format!("block {from} of the new file is not what was written there");
                return Err(StoreError::Proof { member: one.name.clone(), message }.into());
            }
            image.put(*block, &bytes)?;
            self.work.progress.advance(BLOCK_BYTES);
        }
        Ok(())
    }

    /// Asks for all blocks of a window that are not there; gives how many that were.
    fn ask(
        &self,
        image: &Image<'_>,
        one: &LineMember,
        need: &Need,
        tables: &mut Tables<'_>,
        window: &Range<u64>,
        have: &(dyn Fn(u64) -> bool + Sync),
    ) -> Result<u64> {
        let missing = || need.blocks(window).filter(|block| !have(*block));
        let answers = fetch::Answers::of(missing().count() as u64);
        let mut blocks = missing().peekable();
        let mut left: Vec<Digest> = Vec::new();
        let mut at = 0;
        let pieces = std::iter::from_fn(|| {
            // Small ones under a limit, so that it is kept to.
            let room = self.work.pace.at_once(MOST_BLOCKS * BLOCK_BYTES) / BLOCK_BYTES;
            let mut piece = fetch::Piece::new(room.min(answers.blocks()));
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
            fetch::blocks(self.peer, one, &piece, &answers, self.work, |block, bytes| {
                image.put(block, bytes)?;
                self.work.progress.advance(BLOCK_BYTES);
                Ok(())
            })
        })?;
        Ok(answers.came())
    }
}
