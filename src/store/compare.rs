//! The bytes that a member decides, held against the leaves that were kept of them.

use std::ops::Range;
use std::time::Instant;

use crate::digest::view::{Leaves, Says, Seen, look, walk};
use crate::digest::{block_count, leaf, zero_leaf};
use crate::failure::{Code, Failure as _};
use crate::ids::Digest;
use crate::qcow2::ImageError;
use crate::store::chain::OpenChain;
use crate::store::error::{Result, StoreError};
use crate::store::manifest::leaves::{LeafError, LeafFile};
use crate::store::measure::{Job, Part, measure};
use crate::units::{BLOCK_BYTES, BLOCK_LENGTH, GuestOffset};

/// What reading a member told.
#[derive(Debug, Default)]
pub struct Compared {
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

/// What a member's bytes are held against.
#[derive(Debug)]
pub enum Expected {
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

/// Reads what the newest member of `chain` decides of the blocks of the agenda, and compares; nothing more after the
/// deadline. Blocks; fails with what reading fails with, or as cancelled.
pub fn compare(
    chain: &OpenChain,
    expected: &mut Expected,
    agenda: &[Vec<Range<u64>>],
    deadline: Option<Instant>,
    job: &Job<'_>,
) -> Result<Compared> {
    let blocks = block_count(chain.virtual_size());
    let mut compared = Compared::default();
    for ranges in agenda {
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            break;
        }
        let mut compare = Compare { expected, compared: &mut compared };
        let mut at = ranges.first().map_or(0, |range| range.start);
        let mut open = ranges.iter().peekable();
        let measured = measure::<Failed>(chain, ranges, job, None, |part| {
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
            Ok(compare.part(part)?)
        });
        measured.map_err(|failed| match failed {
            Failed::Store(error) => error,
            Failed::Image(source) => {
                StoreError::Image { member: source.member().unwrap_or_default().to_owned(), source }
            }
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

fn leaves_failed(source: LeafError) -> StoreError {
    StoreError::Leaves { member: String::new(), source }
}

/// The lowest member of a chain whose own block is not what it was, of those that a bad block of the chain's view is put
/// together from; 0 is the newest. `tables` are the members', newest first.
pub fn blame(chain: &OpenChain, tables: &mut [LeafFile], block: u64) -> Result<usize> {
    let mut buffer = vec![0; BLOCK_LENGTH];
    for (layer, table) in tables.iter_mut().enumerate().skip(1).rev() {
        if block >= block_count(table.virtual_size()) {
            continue;
        }
        let wanted = match table.stretch(block).map_err(leaves_failed)?.says {
            Says::Nothing => continue,
            Says::Zeros => zero_leaf(),
            Says::Leaf => table.leaf(block).map_err(leaves_failed)?,
        };
        let (_, below) = chain.split(layer);
        match below.read(GuestOffset(block * BLOCK_BYTES), &mut buffer) {
            Ok(()) if leaf(&buffer) == wanted => {}
            Err(source) if source.code() != Code::BadCompression => {
                let member = source.member().unwrap_or_default().to_owned();
                return Err(StoreError::Image { member, source });
            }
            Ok(()) | Err(_) => return Ok(layer),
        }
    }
    Ok(0)
}

/// What measuring fails with.
enum Failed {
    Image(ImageError),
    Store(StoreError),
}

impl From<ImageError> for Failed {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}
