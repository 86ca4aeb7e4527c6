//! Digests of whole views, read through their chains.
//!
//! The map is cut into pieces of work along its data; what is known to be zero costs nothing. Work is read and
//! hashed on all processors, and of files of a server on more threads than that, a batch at a time; leaves are taken in
//! order. Memory: one buffer of `PIECE_BYTES` a thread, and the runs and leaves of a batch.

use rayon::prelude::*;

use crate::backend::{StoreFile, read_padded};
use crate::digest::{TreeBuilder, block_count, leaf};
use crate::ids::Digest;
use crate::progress::{Cancel, Progress};
use crate::qcow2::image::MIN_WINDOW_BYTES;
use crate::qcow2::{Content, ImageError, Run};
use crate::store::ahead::at_once;
use crate::store::buffers::Buffers;
use crate::store::chain::OpenChain;
use crate::units::{BLOCK_BYTES, BLOCK_LENGTH, GuestOffset, HostOffset};

/// The most that is read and hashed in one go: whole clusters of any size, so that no compressed one is
/// decompressed for two pieces.
const PIECE_BYTES: u64 = 2 << 20;
/// How much data a batch has at least before it is worked on.
const BATCH_BYTES: u64 = 128 << 20;
/// How many runs a batch has at most.
const BATCH_RUNS: usize = 65_536;
const _: () = assert!(MIN_WINDOW_BYTES <= BLOCK_LENGTH);

type Result<T> = std::result::Result<T, ImageError>;

/// The digest of the view of a chain's newest member; what lies below the chain reads as zeros.
///
/// Fails with [`ImageError::Cancelled`] if that was asked for, between two pieces.
pub fn view_digest(chain: &OpenChain, progress: &dyn Progress, cancel: &Cancel) -> Result<Digest> {
    let name = chain.images().next().map_or_else(String::new, |image| image.name().to_owned());
    let read = |run: &Run, buffer: &mut [u8]| chain.read_run(run, buffer);
    let readers = chain.images().map(|image| image.file().reads_at_once()).max().unwrap_or(0);
    let reading = Reading { read: &read, readers, cancel };
    digest_runs(&name, chain.virtual_size(), chain.map(), &reading, progress)
}

/// The digest of a file as a raw image.
pub fn raw_digest(file: &dyn StoreFile, progress: &dyn Progress, cancel: &Cancel) -> Result<(Digest, u64)> {
    let name = file.path().to_string();
    let failed = |source| ImageError::Store { image: name.clone(), source };
    let length = file.stat().map_err(failed)?.length;
    let content = Content::Data { layer: 0, host: HostOffset(0) };
    let whole = (length > 0).then_some(Ok(Run { start: GuestOffset(0), length, content }));
    let read = |run: &Run, buffer: &mut [u8]| read_padded(file, run.start.0, buffer).map_err(failed);
    let reading = Reading { read: &read, readers: file.reads_at_once(), cancel };
    let digest = digest_runs(&name, length, whole.into_iter(), &reading, progress)?;
    Ok((digest, length))
}

/// How runs are read.
struct Reading<'a> {
    read: &'a (dyn Fn(&Run, &mut [u8]) -> Result<()> + Sync),
    /// By how many threads, if more than there are processors.
    readers: usize,
    cancel: &'a Cancel,
}

/// The digest of a view from its map: `runs` cover exactly `[0, virtual_size)`.
fn digest_runs(
    name: &str,
    virtual_size: u64,
    runs: impl Iterator<Item = Result<Run>>,
    reading: &Reading<'_>,
    progress: &dyn Progress,
) -> Result<Digest> {
    progress.phase("hashing", virtual_size);
    let mut tree = TreeBuilder::new();
    let mut batch = Batch { end: virtual_size, ..Batch::default() };
    for run in runs {
        let mut rest = run?;
        while rest.length > 0 {
            let taken = batch.take(&rest);
            progress.advance(taken);
            let left = rest.clip(rest.start.plus(taken), rest.end());
            if batch.is_full() {
                batch.work(&mut tree, name, reading)?;
            }
            match left {
                Some(left) => rest = left,
                None => break,
            }
        }
    }
    batch.close();
    batch.work(&mut tree, name, reading)?;
    // A map that ends early is none; blocks that nobody told of would be taken for zeros.
    if tree.blocks() != block_count(virtual_size) {
        let detail = format!("its map tells of {} blocks of {}", tree.blocks(), block_count(virtual_size));
        return Err(ImageError::Bad { image: name.to_owned(), code: crate::failure::Code::BadEntry, detail });
    }
    Ok(tree.finish(virtual_size))
}

/// What comes next in a view, in order.
enum Item {
    /// Whole blocks of zeros.
    Zeros(u64),
    /// Blocks that must be read: runs that follow each other, from a block's start.
    Blocks(Vec<Run>),
}

/// Some of a view, to be worked on together.
#[derive(Default)]
struct Batch {
    /// The view's end.
    end: u64,
    items: Vec<Item>,
    /// Runs that do not make whole blocks, or a whole piece, yet.
    open: Vec<Run>,
    bytes: u64,
    runs: usize,
    buffers: Buffers,
}

impl Batch {
    /// Takes the beginning of a run; gives how many bytes of it.
    fn take(&mut self, run: &Run) -> u64 {
        let zero = matches!(run.content, Content::Zero | Content::Below);
        let aligned = run.start.0.is_multiple_of(BLOCK_BYTES);
        if zero && aligned {
            let ends = run.end().0;
            let whole = if ends == self.end { run.length } else { run.length - ends % BLOCK_BYTES };
            if ends == self.end || run.length >= BLOCK_BYTES {
                self.close();
                self.items.push(Item::Zeros(block_count(whole)));
                self.runs += 1;
                return whole;
            }
        }
        let unit = if zero { BLOCK_BYTES } else { PIECE_BYTES };
        let until = (run.start.0 / unit + 1).saturating_mul(unit);
        let piece = run.clip(run.start, GuestOffset(until)).unwrap_or(*run);
        self.bytes += piece.length;
        self.runs += 1;
        self.open.push(piece);
        if piece.end().0.is_multiple_of(PIECE_BYTES) {
            self.close();
        }
        piece.length
    }

    /// Ends the piece that is open: the next run begins at a block's start, or there is none.
    fn close(&mut self) {
        if !self.open.is_empty() {
            self.items.push(Item::Blocks(std::mem::take(&mut self.open)));
        }
    }

    fn is_full(&self) -> bool {
        self.bytes >= BATCH_BYTES || self.runs >= BATCH_RUNS
    }

    /// Reads and hashes all that is closed.
    fn work(&mut self, tree: &mut TreeBuilder, name: &str, reading: &Reading<'_>) -> Result<()> {
        let items = std::mem::take(&mut self.items);
        self.runs = self.open.len();
        self.bytes = 0;
        let Reading { read, readers, cancel } = *reading;
        let buffers = &self.buffers;
        let hash = |item: &Item| match item {
            Item::Zeros(count) => Ok((*count, Vec::new())),
            Item::Blocks(runs) => {
                cancel.check().map_err(|_| ImageError::Cancelled { image: name.to_owned() })?;
                Ok((0, buffers.with(|buffer| leaves(runs, buffer, read))?))
            }
        };
        let hashed: Vec<(u64, Vec<Digest>)> =
            at_once(readers, || items.par_iter().map(hash).collect::<Result<_>>())?;
        for (zeros, leaves) in hashed {
            tree.push_zero_blocks(zeros);
            for leaf in leaves {
                tree.push_leaf(leaf);
            }
        }
        Ok(())
    }
}

/// The leaves of the blocks that some runs fill.
fn leaves(
    runs: &[Run],
    buffer: &mut Vec<u8>,
    read: &(dyn Fn(&Run, &mut [u8]) -> Result<()> + Sync),
) -> Result<Vec<Digest>> {
    let total: u64 = runs.iter().map(|run| run.length).sum();
    buffer.resize(usize::try_from(total).unwrap_or_default(), 0);
    let mut rest = buffer.as_mut_slice();
    for run in runs {
        let length = usize::try_from(run.length).unwrap_or_default().min(rest.len());
        let (place, behind) = rest.split_at_mut(length);
        read(run, place)?;
        rest = behind;
    }
    Ok(buffer.chunks(BLOCK_LENGTH).map(leaf).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Reading, digest_runs, raw_digest};
    use crate::backend::memory::MemoryStore;
    use crate::backend::{Backend, StoreFile};
    use crate::digest::{TreeBuilder, leaf};
    use crate::ids::{Digest, StorePath};
    use crate::progress::{Cancel, Silent};
    use crate::qcow2::{Content, Run};
    use crate::units::{GuestOffset, HostOffset};

    fn plain(view: &[u8]) -> Digest {
        let mut tree = TreeBuilder::new();
        view.chunks(65536).for_each(|block| tree.push_leaf(leaf(block)));
        tree.finish(view.len() as u64)
    }

    fn of_parts(parts: &[(u8, u64)]) -> (Digest, Digest) {
        let mut view = Vec::new();
        let mut runs = Vec::new();
        for (value, length) in parts {
            let content = match value {
                0 => Content::Zero,
                1 => Content::Below,
                _ => Content::Data { layer: 0, host: HostOffset(view.len() as u64) },
            };
            runs.push(Ok(Run { start: GuestOffset(view.len() as u64), length: *length, content }));
            view.resize(view.len() + usize::try_from(*length).unwrap(), value & !1);
        }
        let read = |run: &Run, buffer: &mut [u8]| {
            match run.content {
                Content::Data { host, .. } => {
                    let from = usize::try_from(host.0).unwrap();
                    buffer.copy_from_slice(&view[from..from + buffer.len()]);
                }
                _ => buffer.fill(0),
            }
            Ok(())
        };
        let size = view.len() as u64;
        let cancel = Cancel::default();
        let reading = Reading { read: &read, readers: 0, cancel: &cancel };
        let got = digest_runs("x", size, runs.into_iter(), &reading, &Silent).unwrap();
        (got, plain(&view))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_runs_hash_to_their_bytes(
            parts in prop::collection::vec(
                (0u8..6, prop_oneof![1u64..5000, Just(65536), 60_000u64..300_000, 1_900_000u64..2_300_000]), 0..12)
        ) {
            let (got, expected) = of_parts(&parts);
            prop_assert_eq!(got, expected);
        }
    }

    #[test]
    fn a_map_that_ends_early_is_refused() {
        let none = std::iter::empty();
        let read = |_: &Run, _: &mut [u8]| Ok(());
        let reading = Reading { read: &read, readers: 0, cancel: &Cancel::default() };
        assert!(digest_runs("x", 1, none, &reading, &Silent).is_err());
    }

    #[test]
    fn a_stop_is_heard() {
        let cancel = Cancel::default();
        cancel.request();
        let content = Content::Data { layer: 0, host: HostOffset(0) };
        let run = Run { start: GuestOffset(0), length: 64 << 20, content };
        let read = |_: &Run, buffer: &mut [u8]| {
            buffer.fill(1);
            Ok(())
        };
        let reading = Reading { read: &read, readers: 0, cancel: &cancel };
        assert!(digest_runs("x", 64 << 20, std::iter::once(Ok(run)), &reading, &Silent).is_err());
    }

    #[test]
    fn raw_files() {
        let store = MemoryStore::new();
        let file = store.create(&StorePath::parse("a").unwrap()).unwrap();
        file.write_at(0, &vec![7; 100_000]).unwrap();
        let file: &dyn StoreFile = file.as_ref();
        let (digest, length) = raw_digest(file, &Silent, &Cancel::default()).unwrap();
        assert_eq!((digest, length), (plain(&vec![7; 100_000]), 100_000));
    }
}
