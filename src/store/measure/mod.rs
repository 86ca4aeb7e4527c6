//! Reads what one member decides of its view, and gives the leaves of those blocks in order.
//!
//! A member decides the blocks that its allocated or zero clusters touch, and the block that its virtual end cuts.
//! Most of them lie in its file as they are in the view: those are read in the order of the file, in large pieces, on
//! all processors. What is known to be zero is not read. A block that only parts of it decide, or that is compressed,
//! is read through the chain. Asked for the digest of the whole file too, the file is read once, from its
//! beginning to its end, and each byte is hashed for both.
//!
//! Memory: for each [`SLICE_BLOCKS`] of view, at a time, 32 bytes a block and some 40 bytes a run; and a few buffers.

mod pieces;
mod whole;

use std::ops::Range;

use rayon::prelude::*;

pub use whole::WholeFile;

use crate::digest::leaf;
use crate::failure::{Code, Failure as _};
use crate::ids::Digest;
use crate::progress::{Cancel, Pace, Progress};
use crate::qcow2::{ExtentKind, Image, ImageError};
use crate::store::ahead::at_once;
use crate::store::buffers::Buffers;
use crate::store::chain::OpenChain;
use crate::units::{BLOCK_BYTES, BLOCK_LENGTH, GuestOffset, HostOffset};
use pieces::{Piece, Place, pieces};

/// How many blocks of view are worked on at a time: 64 GiB.
pub const SLICE_BLOCKS: u64 = 1 << 20;
/// The most that is read and hashed in one go.
const TASK_BLOCKS: u64 = 16;
/// How many of those reads are worked on between two looks at the pace and the request to stop.
const BATCH_READS: usize = 64;

type Result<T> = std::result::Result<T, ImageError>;

/// What reading goes by.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// Told of bytes read.
    pub progress: &'a dyn Progress,
    /// Asked to stop.
    pub cancel: &'a Cancel,
    /// The limit on bytes a second.
    pub pace: &'a Pace,
    /// Whether a block that cannot be decompressed has the leaf [`UNREADABLE`], and is no failure.
    pub tolerant: bool,
}

/// The leaf of a block that cannot be read: no bytes are known to hash to that.
pub const UNREADABLE: Digest = Digest([0xff; 32]);

/// Neighbouring blocks that the member decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// Zeros by the member's own word: nothing was read.
    Zeros {
        /// The first block.
        first: u64,
        /// How many.
        count: u64,
    },
    /// What their bytes hash to.
    Leaves {
        /// The first block.
        first: u64,
        /// The leaf of each.
        leaves: &'a [Digest],
    },
}

/// Something to be read and hashed: neighbouring blocks of one piece.
#[derive(Clone, Copy, Debug)]
struct Task {
    /// The index of the first one's leaf.
    rank: usize,
    first: u64,
    count: u64,
    /// Where they lie in the file; `None`: read through the chain.
    host: Option<HostOffset>,
}

impl Task {
    fn bytes(&self) -> u64 {
        self.count * BLOCK_BYTES
    }
}

/// Gives the parts of `ranges` (ascending blocks of the view of the newest of `chain`) that this newest member decides,
/// in order.
///
/// With `whole` the file is read from beginning to end, in the same pass if all ranges fit in a slice, and its
/// digest is left there. Blocks; fails with [`ImageError::Cancelled`] if that was asked for, or what `give` fails with.
pub fn measure<E: From<ImageError>>(
    chain: &OpenChain,
    ranges: &[Range<u64>],
    job: &Job<'_>,
    mut whole: Option<&mut WholeFile>,
    mut give: impl FnMut(Part<'_>) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let Some(image) = chain.images().next() else { return Ok(()) };
    let mut slices = Slices { image, rest: ranges, at: 0 };
    let mut next = slices.next()?;
    let mut one_slice = true;
    while let Some(slice) = next {
        next = slices.next()?;
        one_slice &= next.is_none();
        let mut list = Vec::new();
        for range in slice {
            list.extend(pieces(image, range)?);
        }
        let mut leaves = Vec::new();
        let mut tasks = tasks(&list, &mut leaves);
        // In the order of the file; what is read through the chain last.
        tasks.sort_by_key(|task| (task.host.is_none(), task.host, task.first));
        match whole.as_deref_mut().filter(|_| one_slice) {
            Some(whole) => whole.read(chain, image, &tasks, &mut leaves, job)?,
            None => read(chain, image, &tasks, &mut leaves, job)?,
        }
        let mut rank = 0;
        for Piece { first, count, place } in list {
            match place {
                Place::Zeros => give(Part::Zeros { first, count })?,
                Place::Data(_) | Place::Compressed | Place::Mixed => {
                    let next = rank + usize::try_from(count).unwrap_or_default();
                    give(Part::Leaves { first, leaves: leaves.get(rank..next).unwrap_or_default() })?;
                    rank = next;
                }
            }
        }
    }
    if let Some(whole) = whole.filter(|whole| whole.digest.is_none()) {
        whole.read_alone(image, job)?;
    }
    Ok(())
}

/// Neighbouring blocks that an image decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decided {
    /// The first block.
    pub first: u64,
    /// How many, above 0.
    pub count: u64,
    /// Each lies in one place: plain in the file, zeros, or in compressed clusters. Else it is put together from parts.
    pub whole: bool,
}

/// The blocks of a range that an image decides. Reads tables only.
pub fn decided(image: &Image, blocks: Range<u64>) -> Result<impl Iterator<Item = Decided> + use<>> {
    let list = pieces(image, blocks)?;
    Ok(list.into_iter().map(|Piece { first, count, place }| Decided {
        first,
        count,
        whole: place != Place::Mixed,
    }))
}

/// Puts ranges together to slices, one at a time, cutting long ones and leaving out where the image decides nothing.
struct Slices<'a> {
    image: &'a Image,
    rest: &'a [Range<u64>],
    /// The first block that is not in a slice yet.
    at: u64,
}

impl Slices<'_> {
    fn next(&mut self) -> Result<Option<Vec<Range<u64>>>> {
        let mut slice = Vec::new();
        let mut room = SLICE_BLOCKS;
        while let Some((range, rest)) = self.rest.split_first() {
            let from = self.at.max(range.start);
            // A disk of exabytes may hold nothing for a long way.
            let at = if room == SLICE_BLOCKS { first_decided(self.image, from..range.end)? } else { from };
            if at >= range.end {
                self.rest = rest;
                continue;
            }
            if room == 0 {
                break;
            }
            self.at = range.end.min(at.saturating_add(room));
            room -= self.at - at;
            slice.push(at..self.at);
        }
        Ok((!slice.is_empty()).then_some(slice))
    }
}

/// The first block of a range that the image may decide; the range's end if none.
fn first_decided(image: &Image, blocks: Range<u64>) -> Result<u64> {
    let size = image.header().virtual_size;
    for extent in image.extents(GuestOffset(blocks.start.saturating_mul(BLOCK_BYTES))) {
        let extent = extent?;
        // The block that the virtual end cuts is decided whatever it holds.
        let end = if extent.kind == ExtentKind::Below { extent.end().0.min(size) } else { extent.start.0 };
        let cut = end >= size && !size.is_multiple_of(BLOCK_BYTES);
        if extent.kind != ExtentKind::Below || cut {
            return Ok((end / BLOCK_BYTES).clamp(blocks.start, blocks.end));
        }
    }
    Ok(blocks.end)
}

/// Cuts pieces into tasks, at whole MiB of the file where they lie there, and makes room for their leaves.
fn tasks(pieces: &[Piece], leaves: &mut Vec<Digest>) -> Vec<Task> {
    let mut tasks = Vec::new();
    let mut rank = 0;
    for piece in pieces {
        let host = match piece.place {
            Place::Zeros => continue,
            Place::Data(host) => Some(host),
            Place::Compressed | Place::Mixed => None,
        };
        let mut done = 0;
        while done < piece.count {
            let start = host.map_or(piece.first, |host| host.0 / BLOCK_BYTES) + done;
            let count = (TASK_BLOCKS - start % TASK_BLOCKS).min(piece.count - done);
            let host = host.map(|host| host.plus(done * BLOCK_BYTES));
            tasks.push(Task { rank, first: piece.first + done, count, host });
            rank += usize::try_from(count).unwrap_or_default();
            done += count;
        }
    }
    leaves.resize(rank, Digest([0; 32]));
    tasks
}

/// Reads and hashes tasks, a batch at a time.
fn read(
    chain: &OpenChain,
    image: &Image,
    tasks: &[Task],
    leaves: &mut [Digest],
    job: &Job<'_>,
) -> Result<()> {
    let readers = image.file().reads_at_once();
    let buffers = Buffers::default();
    let reads: Vec<&[Task]> = reads(tasks).collect();
    for batch in reads.chunks(BATCH_READS) {
        let bytes = batch.iter().copied().flatten().map(Task::bytes).sum();
        job.pace.spend(bytes, job.cancel);
        job.cancel.check().map_err(|_| ImageError::Cancelled { image: image.name().to_owned() })?;
        let tolerant = job.tolerant;
        let hash = |tasks: &&[Task]| buffers.with(|buffer| hash(chain, image, tasks, buffer, tolerant));
        let hashed: Vec<Vec<Digest>> =
            at_once(readers, || batch.par_iter().with_max_len(1).map(hash).collect::<Result<_>>())?;
        for (tasks, hashed) in batch.iter().zip(hashed) {
            place(leaves, tasks, &hashed);
        }
        job.progress.advance(bytes);
    }
    Ok(())
}

/// Puts tasks together that lie one behind the other in the file, whatever they are in the view, so that clusters which came
/// in no order are read in large pieces too.
fn reads(tasks: &[Task]) -> impl Iterator<Item = &[Task]> {
    let mut rest = tasks;
    std::iter::from_fn(move || {
        let first = rest.first()?;
        let mut end = first.host.map(|host| host.plus(first.bytes()));
        let mut blocks = first.count;
        let more = rest.iter().skip(1).take_while(|task| {
            blocks += task.count;
            let goes_on = end.is_some() && task.host == end && blocks <= TASK_BLOCKS;
            end = task.host.map(|host| host.plus(task.bytes()));
            goes_on
        });
        let (read, left) = rest.split_at(1 + more.count());
        rest = left;
        Some(read)
    })
}

/// Puts the leaves of tasks, one behind the other, to where those of each belong.
fn place(leaves: &mut [Digest], tasks: &[Task], hashed: &[Digest]) {
    let mut hashed = hashed.iter();
    for task in tasks {
        let count = usize::try_from(task.count).unwrap_or_default();
        let to = leaves.iter_mut().skip(task.rank).take(count);
        to.zip(hashed.by_ref()).for_each(|(to, from)| *to = *from);
    }
}

/// Reads and hashes some tasks: one, or more that lie one behind the other in the file.
fn hash(
    chain: &OpenChain,
    image: &Image,
    tasks: &[Task],
    buffer: &mut Vec<u8>,
    tolerant: bool,
) -> Result<Vec<Digest>> {
    let Some(first) = tasks.first() else { return Ok(Vec::new()) };
    buffer.resize(usize::try_from(tasks.iter().map(Task::bytes).sum::<u64>()).unwrap_or_default(), 0);
    let start = GuestOffset(first.first * BLOCK_BYTES);
    match first.host {
        Some(host) => image.read_data(host, buffer)?,
        // Past the view's end it reads zeros, as its last block is padded.
        None => match chain.read(start, buffer) {
            Err(error) if tolerant && error.code() == Code::BadCompression => {
                let blocks = buffer.chunks_mut(BLOCK_LENGTH).enumerate();
                let each = |(index, block): (usize, &mut [u8])| match chain
                    .read(start.plus(index as u64 * BLOCK_BYTES), block)
                {
                    Err(error) if error.code() == Code::BadCompression => Ok(UNREADABLE),
                    read => read.map(|()| leaf(block)),
                };
                return blocks.map(each).collect();
            }
            read => read?,
        },
    }
    Ok(buffer.chunks(BLOCK_LENGTH).map(leaf).collect())
}
