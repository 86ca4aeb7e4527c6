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
use crate::qcow2::{ImageError, Run};
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
/// How many neighbouring blocks one thread reads in one go.
const ITEM_BLOCKS: u64 = 4;

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

    /// Reads blocks of its view, in the order of the ranges. `make` turns each into whatever is given on, on all
    /// processors; blocks are 64 KiB, the last one padded with zeros.
    ///
    /// # Errors
    ///
    /// A usage error for blocks that it does not have, or too many of them; `data-damaged`, naming the member, before
    /// a block is given that is not what it was; `changed-meanwhile` if somebody wrote to one of the files.
    pub fn blocks<T: Send>(
        &self,
        ranges: &[Blocks],
        make: impl Fn(u64, &[u8]) -> T + Sync,
        mut give: impl FnMut(T) -> Result<()>,
    ) -> Result<()> {
        let mut items = Vec::new();
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
            items.extend(self.items(range)?);
        }
        let read = items.par_iter().with_max_len(1).map(|item| self.read(item, &make));
        let done = read.collect::<Result<Vec<Vec<T>>>>()?;
        self.source.unchanged()?;
        done.into_iter().flatten().try_for_each(&mut give)
    }

    /// The pieces of a range that one thread each reads.
    fn items(&self, range: &Blocks) -> Result<Vec<Item>> {
        let end = range.first + range.count;
        let (from, to) = (GuestOffset(range.first * BLOCK_BYTES), GuestOffset(end * BLOCK_BYTES));
        let runs: Vec<Run> = self
            .source
            .chain()
            .map_range(from, to)
            .collect::<std::result::Result<_, _>>()
            .map_err(|source| self.failed(source))?;
        let mut items = Vec::new();
        let mut first = range.first;
        while first < end {
            let count = ITEM_BLOCKS.min(end - first);
            let (from, to) = (GuestOffset(first * BLOCK_BYTES), GuestOffset((first + count) * BLOCK_BYTES));
            let expected = self.source.leaves(first, count)?.unwrap_or_default();
            let runs = runs.iter().filter_map(|run| run.clip(from, to)).collect();
            items.push(Item { first, expected, runs });
            first += count;
        }
        Ok(items)
    }

    fn read<T>(&self, item: &Item, make: &impl Fn(u64, &[u8]) -> T) -> Result<Vec<T>> {
        BUFFERS.with(|bytes| self.read_into(item, make, bytes))
    }

    fn read_into<T>(
        &self,
        item: &Item,
        make: &impl Fn(u64, &[u8]) -> T,
        bytes: &mut Vec<u8>,
    ) -> Result<Vec<T>> {
        let start = item.first * BLOCK_BYTES;
        bytes.clear();
        bytes.resize(item.expected.len() * BLOCK_LENGTH, 0);
        for run in &item.runs {
            let from = usize::try_from(run.start.0.saturating_sub(start)).unwrap_or(usize::MAX);
            let to = from.saturating_add(usize::try_from(run.length).unwrap_or(usize::MAX));
            if let Some(place) = bytes.get_mut(from..to) {
                self.source.chain().read_run(run, place).map_err(|source| self.failed(source))?;
            }
        }
        let mut done = Vec::with_capacity(item.expected.len());
        for ((block, bytes), expected) in (item.first..).zip(bytes.chunks(BLOCK_LENGTH)).zip(&item.expected) {
            if leaf(bytes) != *expected {
                return Err(self.source.blame(block).into());
            }
            done.push(make(block, bytes));
        }
        Ok(done)
    }

    fn failed(&self, source: ImageError) -> StoreError {
        StoreError::Image { member: self.source.member().to_owned(), source }
    }
}

/// Some neighbouring blocks.
struct Item {
    first: u64,
    expected: Vec<Digest>,
    runs: Vec<Run>,
}
