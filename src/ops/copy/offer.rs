//! A member as its side of a copy gives it: the line that it stands on, its leaf table, its blocks.
//!
//! All files of the line are open and stay so: names may get other files meanwhile, what is offered stays what it was.
//! Every block is held against its leaf before it is given away, so damage does not travel.

use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::backend::{BackendError, StoreFile};
use crate::chain::graph::NodeId;
use crate::digest::table::Shape;
use crate::digest::{block_count, leaf};
use crate::failure::Code;
use crate::ids::{Digest, StorePath};
use crate::ops::{OpError, Result};
use crate::qcow2::{Content, ImageError, Run};
use crate::store::buffers::Buffers;
use crate::store::manifest::{Blocks, Manifest, leaves};
use crate::store::scan::{Incoming, Scan};
use crate::store::stream::Source;
use crate::store::{StoreError, Stores};
use crate::units::{BLOCK_BYTES, BLOCK_LENGTH, GuestOffset};

/// The most blocks that are asked for at once: 4 MiB.
pub const MOST_BLOCKS: u64 = 64;
/// The most bytes of a leaf table that are asked for at once.
pub const MOST_TABLE_BYTES: u64 = 4 << 20;
/// How many blocks one thread reads in one go.
const ITEM_BLOCKS: usize = 4;
/// How many buffers are kept that nobody needs just now: 16 MiB.
const MOST_BUFFERS: usize = 64;

/// One member of a line, as manifests have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LineMember {
    /// By which name to ask for it.
    pub name: String,
    /// Its install path.
    #[schema(value_type = String)]
    pub member: StorePath,
    /// The size of its view.
    pub virtual_bytes: u64,
    /// Its cluster size is 2 to this.
    pub cluster_bits: u32,
    /// The digest of its view.
    pub view_digest: Digest,
    /// The BLAKE3 of its leaf table.
    pub table_blake3: Digest,
    /// The length of that.
    pub table_bytes: u64,
    /// How many leaves that stores.
    pub leaves: u64,
    /// How many runs it has.
    pub runs: u64,
}

impl LineMember {
    fn of(name: String, manifest: &Manifest) -> Self {
        let table = &manifest.leaves;
        let shape = Shape { virtual_size: manifest.virtual_bytes, leaves: table.leaves, runs: table.runs };
        Self {
            name,
            member: manifest.member.clone(),
            virtual_bytes: manifest.virtual_bytes,
            cluster_bits: manifest.qcow2.cluster_bytes.trailing_zeros(),
            view_digest: manifest.view_digest,
            table_blake3: table.blake3,
            table_bytes: shape.length().unwrap_or_default(),
            leaves: table.leaves,
            runs: table.runs,
        }
    }
}

/// What is read into, whoever asks: one for each that reads at the same time.
static BUFFERS: Buffers = Buffers::new();

/// A member that is offered.
#[derive(Debug)]
pub struct Offer {
    source: Source,
    /// Base first; the member is the last.
    line: Vec<LineMember>,
    table: Arc<dyn StoreFile>,
}

impl Offer {
    /// Opens a member and all that it stands on, and its leaf table.
    ///
    /// # Errors
    ///
    /// `incoming` while QEMU writes one of them; `not-adopted` unless each is adopted and is what it was; what
    /// [`Source::open`] fails with.
    pub fn open(stores: &Stores, scan: &Scan, id: NodeId) -> Result<Self> {
        let ancestors = scan.graph.ancestors(id).unwrap_or_default();
        for id in std::iter::once(id).chain(ancestors) {
            if scan.member(id).is_some_and(|member| member.incoming == Some(Incoming::Writer)) {
                let member = stores.display(&scan.graph.node(id).key);
                let message = "QEMU has it open for writing".to_owned();
                return Err(OpError::Refused { code: Code::Incoming, member, message });
            }
        }
        let source = Source::open(stores, scan, id, false)?;
        let Some(own) = source.manifests().first() else {
            let message = format!(
                "{}: only adopted members are copied; adopt it there first",
                source.missing().unwrap_or("it is not adopted")
            );
            let member = source.member().to_owned();
            return Err(OpError::Refused { code: Code::NotAdopted, member, message });
        };
        let key = &scan.graph.node(id).key;
        let store = stores.get(key.store)?;
        let table = store.backend().open(&leaves::path(&own.leaves.name));
        let table = table.map_err(|source| StoreError::backend(store, source))?;
        let names = source.keys().iter().map(|key| stores.display(key));
        let mut line: Vec<LineMember> =
            names.zip(source.manifests()).map(|(name, manifest)| LineMember::of(name, manifest)).collect();
        line.reverse();
        Ok(Self { source, line, table })
    }

    /// The members of its line, base first, itself last.
    #[must_use]
    pub fn line(&self) -> &[LineMember] {
        &self.line
    }

    /// Itself in that.
    #[must_use]
    pub fn own(&self) -> Option<&LineMember> {
        self.line.last()
    }

    /// The open files of its line.
    #[must_use]
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Bytes of its leaf table, at most [`MOST_TABLE_BYTES`] of them.
    ///
    /// # Errors
    ///
    /// A usage error for bytes that it does not have.
    pub fn table(&self, offset: u64, length: u64) -> Result<Vec<u8>> {
        let bytes = self.own().map_or(0, |own| own.table_bytes);
        let inside = offset.checked_add(length).is_some_and(|end| end <= bytes);
        if !inside || length > MOST_TABLE_BYTES {
            let detail =
                format!("the table has {bytes} bytes, of which {MOST_TABLE_BYTES} are given at once");
            return Err(StoreError::Usage { detail }.into());
        }
        let mut buffer = vec![0; usize::try_from(length).unwrap_or_default()];
        let read = self.table.read_at(offset, &mut buffer);
        let count = read.map_err(|source: BackendError| StoreError::Backend {
            store: self.source.member().to_owned(),
            source,
        })?;
        buffer.truncate(count);
        Ok(buffer)
    }

    /// Reads blocks of its view, in the order in which they lie in the files: a disk that has to move its head does so in
    /// one direction, and neighbours come with one read. What is going to be read is told to the stores first, so that all
    /// of it is under way at once. `make` turns some blocks into whatever is given on, on all processors; each block
    /// has so many bytes of room before it.
    ///
    /// # Errors
    ///
    /// A usage error for blocks that it does not have, or too many of them; `data-damaged`, naming the member, before
    /// a block is given that is not what it was; `changed-meanwhile` if somebody wrote to one of the files.
    pub fn blocks<T: Send>(
        &self,
        ranges: &[Blocks],
        room: usize,
        make: impl Fn(Given) -> T + Sync,
        give: impl FnMut(T) -> Result<()>,
    ) -> Result<()> {
        let mut wanted = Vec::new();
        let mut total = 0_u64;
        let blocks = block_count(self.source.virtual_size());
        for range in ranges {
            total = total.saturating_add(range.count);
            let inside = range.first.checked_add(range.count).is_some_and(|end| end <= blocks);
            if !inside || range.count == 0 || total > MOST_BLOCKS {
                let detail =
                    format!("the view has {blocks} blocks, of which {MOST_BLOCKS} are given at once");
                return Err(StoreError::Usage { detail }.into());
            }
            self.find(range, &mut wanted)?;
        }
        wanted.sort_by_key(Wanted::place);
        self.announce(&wanted);
        let read = wanted.par_chunks(ITEM_BLOCKS).with_max_len(1);
        let done = read.map(|some| self.read(some, room).map(&make)).collect::<Result<Vec<T>>>()?;
        self.source.unchanged()?;
        done.into_iter().try_for_each(give)
    }

    /// Finds out where the blocks of a range are, and what they hash to.
    fn find(&self, range: &Blocks, wanted: &mut Vec<Wanted>) -> Result<()> {
        let at = |block: u64| GuestOffset(block.saturating_mul(BLOCK_BYTES));
        let end = range.first + range.count;
        let map = self.source.chain().map_range(at(range.first), at(end));
        let runs: Vec<Run> =
            map.collect::<std::result::Result<_, _>>().map_err(|source| self.failed(source))?;
        let expected = self.source.leaves(range.first, range.count)?.unwrap_or_default();
        for (block, expected) in (range.first..end).zip(expected) {
            let runs = runs.iter().filter_map(|run| run.clip(at(block), at(block + 1))).collect();
            wanted.push(Wanted { block, expected, runs });
        }
        Ok(())
    }

    /// Tells the stores what is going to be read, neighbours as one.
    fn announce(&self, wanted: &[Wanted]) {
        let images: Vec<_> = self.source.chain().images().collect();
        let mut held: Option<(usize, u64, u64)> = None;
        let tell = |held: Option<(usize, u64, u64)>| {
            if let Some((layer, from, to)) = held
                && let Some(image) = images.get(layer)
            {
                image.will_read(from, to - from);
            }
        };
        for (layer, from, to) in wanted.iter().flat_map(|one| &one.runs).filter_map(stored) {
            held = match held {
                Some((before, start, end)) if before == layer && (start..=end).contains(&from) => {
                    Some((layer, start, end.max(to)))
                }
                before => {
                    tell(before);
                    Some((layer, from, to))
                }
            };
        }
        tell(held);
    }

    fn read(&self, some: &[Wanted], room: usize) -> Result<Given> {
        let length = some.len() * (room + BLOCK_LENGTH);
        let mut given =
            Given { bytes: BUFFERS.take(length), room, blocks: some.iter().map(|one| one.block).collect() };
        for (one, (_, framed)) in some.iter().zip(given.iter_mut()) {
            let Some(bytes) = framed.get_mut(room..) else { continue };
            let start = one.block * BLOCK_BYTES;
            // Runs follow each other; what is behind the view's end is zero.
            let mut filled = 0;
            for run in &one.runs {
                let from = usize::try_from(run.start.0.saturating_sub(start)).unwrap_or(usize::MAX);
                let to = from.saturating_add(usize::try_from(run.length).unwrap_or(usize::MAX));
                if let Some(gap) = bytes.get_mut(filled..from) {
                    gap.fill(0);
                }
                if let Some(place) = bytes.get_mut(from..to) {
                    self.source.chain().read_run(run, place).map_err(|source| self.failed(source))?;
                    filled = to;
                }
            }
            if let Some(rest) = bytes.get_mut(filled..) {
                rest.fill(0);
            }
            if leaf(bytes) != one.expected {
                return Err(self.source.blame(one.block).into());
            }
        }
        Ok(given)
    }

    fn failed(&self, source: ImageError) -> StoreError {
        StoreError::Image { member: self.source.member().to_owned(), source }
    }
}

/// A block that is wanted.
#[derive(Debug)]
struct Wanted {
    block: u64,
    expected: Digest,
    runs: Vec<Run>,
}

impl Wanted {
    /// Where it lies, or the first part of it that lies somewhere; zeros come last.
    fn place(&self) -> (usize, u64) {
        let first = self.runs.iter().find_map(stored);
        first.map_or((usize::MAX, self.block), |(layer, from, _)| (layer, from))
    }
}

/// The layer whose file stores a run, and from where to where.
fn stored(run: &Run) -> Option<(usize, u64, u64)> {
    match run.content {
        Content::Data { layer, host } => Some((layer, host.0, host.0.saturating_add(run.length))),
        Content::Compressed { layer, cluster } => {
            let from = cluster.host.0;
            Some((layer, from, from.saturating_add(cluster.stored_bytes)))
        }
        Content::Zero | Content::Below => None,
    }
}

/// Some blocks that were read, each with room before it; their memory is used again.
#[derive(Debug)]
pub struct Given {
    bytes: Vec<u8>,
    room: usize,
    blocks: Vec<u64>,
}

impl Given {
    /// The blocks' numbers, and the bytes of each: the room, then the block, padded with zeros.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut [u8])> {
        self.blocks.iter().copied().zip(self.bytes.chunks_mut(self.room + BLOCK_LENGTH))
    }
}

impl AsRef<[u8]> for Given {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        BUFFERS.put(std::mem::take(&mut self.bytes));
        BUFFERS.shrink(MOST_BUFFERS);
    }
}
