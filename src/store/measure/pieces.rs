//! Which blocks a member decides, and where their bytes are.

use std::ops::Range;

use crate::digest::block_count;
use crate::qcow2::{Extent, ExtentKind, Image, ImageError};
use crate::units::{BLOCK_BYTES, GuestOffset, HostOffset};

/// Neighbouring blocks of one kind, in the order of the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The first block.
    pub first: u64,
    /// How many, above 0.
    pub count: u64,
    /// Where they are.
    pub place: Place,
}

/// Where the bytes of blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// One behind the other in the member's file, whole.
    Data(HostOffset),
    /// Zeros by the member's own word.
    Zeros,
    /// In compressed clusters, whole.
    Compressed,
    /// Put together from parts, or cut by the virtual end.
    Mixed,
}

/// What is known of one block so far.
#[derive(Clone, Copy)]
enum Open {
    /// Nothing of it is the member's.
    Untouched,
    /// Some of it is.
    Touched,
}

/// Lists the blocks of a range that the image decides. Memory: 32 bytes for each that is not like its neighbour.
pub fn pieces(image: &Image, blocks: Range<u64>) -> Result<Vec<Piece>, ImageError> {
    let size = image.header().virtual_size;
    let mut list = List { pieces: Vec::new() };
    let mut open: Option<(u64, Open)> = None;
    let start = GuestOffset(blocks.start.saturating_mul(BLOCK_BYTES));
    let end = blocks.end.saturating_mul(BLOCK_BYTES).min(size);
    for extent in image.extents(start) {
        let Extent { start, length, kind } = extent?;
        if start.0 >= end {
            break;
        }
        let stop = (start.0 + length).min(end);
        let touched = kind != ExtentKind::Below;
        let mut at = start.0;
        while at < stop {
            let block = at / BLOCK_BYTES;
            let whole_blocks = if at.is_multiple_of(BLOCK_BYTES) { (stop - at) / BLOCK_BYTES } else { 0 };
            if whole_blocks > 0 {
                list.close(&mut open);
                match kind {
                    ExtentKind::Data { host } => {
                        list.add(block, whole_blocks, Place::Data(host.plus(at - start.0)));
                    }
                    ExtentKind::Zero => list.add(block, whole_blocks, Place::Zeros),
                    ExtentKind::Compressed(_) => list.add(block, whole_blocks, Place::Compressed),
                    ExtentKind::Below => {}
                }
                at += whole_blocks * BLOCK_BYTES;
                continue;
            }
            if open.is_none_or(|(other, _)| other != block) {
                list.close(&mut open);
                open = Some((block, Open::Untouched));
            }
            if touched && let Some((_, state)) = &mut open {
                *state = Open::Touched;
            }
            at = stop.min((block + 1) * BLOCK_BYTES);
        }
    }
    // The block that the virtual end cuts is decided here, whatever lies below.
    if let Some((block, state)) = &mut open
        && (*block + 1).saturating_mul(BLOCK_BYTES) > size
        && *block + 1 == block_count(size)
    {
        *state = Open::Touched;
    }
    list.close(&mut open);
    Ok(list.pieces)
}

struct List {
    pieces: Vec<Piece>,
}

impl List {
    fn close(&mut self, open: &mut Option<(u64, Open)>) {
        if let Some((block, Open::Touched)) = open.take() {
            self.add(block, 1, Place::Mixed);
        }
    }

    fn add(&mut self, first: u64, count: u64, place: Place) {
        if let Some(last) = self.pieces.last_mut()
            && last.first + last.count == first
        {
            let goes_on = match (last.place, place) {
                (Place::Data(host), Place::Data(next)) => host.plus(last.count * BLOCK_BYTES) == next,
                (Place::Zeros, Place::Zeros)
                | (Place::Compressed, Place::Compressed)
                | (Place::Mixed, Place::Mixed) => true,
                _ => false,
            };
            if goes_on {
                last.count += count;
                return;
            }
        }
        self.pieces.push(Piece { first, count, place });
    }
}
