//! The byte-exact plan of a qcow2 file to be, as a pure function of a map and options.
//!
//! [`Layout::plan`] reads the map once and decides where everything goes; [`Layout::moves`] lists the data
//! that moves as it is, in source order; [`Layout::emit`] reads the map once more and gives the rest: tables,
//! composed and compressed clusters. The same map and options always give the same bytes. The parts of the
//! file follow each other without gaps: header, L1 table, refcount table, refcount blocks, L2 tables, data
//! moved from each source (in the order it has there), composed clusters, compressed clusters.
//!
//! [`Layout::plan_onto`] plans the same image into the file of one of its sources, the *kept* one: what that
//! holds plain stays where it is, and all other parts follow behind the file's end, the header excepted.
//!
//! [`canonical`] is the plan of an image that stands alone and is the same wherever its view is.
//!
//! Memory: one bit per host cluster moved (see [`hostset`]), two bytes per host cluster of compressed data,
//! the pieces of one cluster, one L2 table. Never a list of clusters.

pub mod canonical;
pub(crate) mod clusters;
mod emit;
mod geometry;
mod header;
pub mod hostset;
mod onto;
pub mod packed;
mod packing;
pub mod placed;
mod shape;

pub use clusters::{Fill, Piece};
pub use emit::{Emit, Part, TableKind};
pub use onto::{Kept, Sector, Switch, Switched, Unfit, in_place_possible};

use crate::backend::Move;
use crate::failure::Code;
use crate::qcow2::error::{ImageError, Result};
use crate::qcow2::format;
use crate::qcow2::header::{CompressionType, Header};
use crate::qcow2::layout::clusters::{Clusters, Span};
use crate::qcow2::layout::geometry::{Amounts, Geometry};
use crate::qcow2::layout::hostset::{Collecting, HostSet};
use crate::qcow2::layout::packing::Packing;
use crate::qcow2::layout::shape::{Shape, Shaper};
use crate::qcow2::map::Run;
use crate::qcow2::refcount::RefcountWidth;
use crate::qcow2::tables::EntryFormat;
use crate::units::{ClusterBits, HostOffset, SECTOR_BYTES};

/// The image wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageOptions {
    /// 2 or 3; 2 becomes 3 if the map needs a zero cluster, since version 2 has none.
    pub version: u32,
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// Log2 of the refcount width in bits, 0 to 6.
    pub refcount_order: u32,
    /// 16-byte L2 entries with subclusters.
    pub extended_l2: bool,
    /// The compression type: of compressed clusters that are moved as they are.
    pub compression: CompressionType,
    /// The compatible feature bit that QEMU may write refcounts late.
    pub lazy_refcounts: bool,
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// The backing file, if it is to have one.
    pub backing: Option<Backing>,
    /// Without a backing file: zeros get entries all the same, so that it reads as it does over any image that has
    /// nothing but zeros where this one has no entry.
    pub opaque: bool,
    /// The store on which it stands in for a deleted member: its own extension says so.
    pub stub: Option<String>,
}

/// The backing file of an image to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name to write, at most 1,023 bytes.
    pub name: Vec<u8>,
    /// Its format, always written.
    pub format: String,
    /// Its virtual size in bytes: at and past it, zeros need no entry.
    pub virtual_size: u64,
}

impl ImageOptions {
    /// The options that keep what `header` has, with another backing file.
    #[must_use]
    pub fn like(header: &Header, backing: Option<Backing>) -> Self {
        Self {
            version: header.version,
            cluster_bits: header.cluster_bits,
            refcount_order: header.refcount_order,
            extended_l2: header.extended_l2,
            compression: header.compression,
            lazy_refcounts: header.lazy_refcounts,
            virtual_size: header.virtual_size,
            backing,
            opaque: false,
            stub: None,
        }
    }

    fn entry_format(&self, version: u32) -> EntryFormat {
        EntryFormat { cluster_bits: self.cluster_bits, extended: self.extended_l2, zero_flag: version >= 3 }
    }

    /// Where what lies below ends, in bytes: from there on zeros need no entry.
    #[must_use]
    pub fn below_end(&self) -> u64 {
        match &self.backing {
            Some(backing) => backing.virtual_size,
            None if self.opaque => self.virtual_size,
            None => 0,
        }
    }
}

/// What a layout must know of a layer whose data it moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceFacts {
    /// Its cluster size.
    pub cluster_bits: ClusterBits,
    /// Its compression type.
    pub compression: CompressionType,
    /// Its virtual size in bytes.
    pub virtual_size: u64,
    /// Its file's length in bytes.
    pub file_length: u64,
}

impl SourceFacts {
    /// The unit in which its data is moved into clusters of `target` bits: the smaller of both.
    fn unit_bits(&self, target: ClusterBits) -> ClusterBits {
        self.cluster_bits.min(target)
    }
}

/// A planned file.
#[derive(Debug)]
pub struct Layout {
    options: ImageOptions,
    version: u32,
    refcounts: RefcountWidth,
    sources: Vec<SourceFacts>,
    moved: Vec<HostSet>,
    /// How many compressed clusters touch each host cluster of their area.
    compressed_counts: Vec<u16>,
    amounts: Amounts,
    /// Bytes moved that their files have; what lies behind a file's end stays a hole.
    moved_bytes: u64,
    compressed_bytes: u64,
    geometry: Geometry,
    head: Head,
}

/// What becomes of the file's beginning.
#[derive(Debug)]
enum Head {
    /// It is written: the whole first cluster.
    New(Vec<u8>),
    /// The file of this layer is kept; its header is switched.
    Kept { layer: usize, switch: Switch },
}

/// Where a place of the new file has its bytes from: the inverse of the placement, for the proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Moved from `host` of a layer, or kept there; so are the next `length` bytes.
    Moved {
        /// Which source.
        layer: usize,
        /// Where there.
        host: HostOffset,
        /// For how many bytes this holds, above 0.
        length: u64,
    },
    /// Written by the plan itself: composed, compressed or metadata.
    Written,
    /// Not part of the image: behind its end, or free in a file that is kept.
    Outside,
}

impl Layout {
    /// Plans the file. `runs` cover exactly `[0, virtual_size)`; their layers index `sources`. Fails if a
    /// source refers twice to one host cluster (`shared-cluster`) or to one that begins behind its end
    /// (`truncated`: the data is lost), if the map has gaps or names no source (`bad-entry`), or if the
    /// format's limits do not allow the file (`bad-header`, `huge-table`).
    pub fn plan(
        options: &ImageOptions,
        sources: &[SourceFacts],
        runs: impl Iterator<Item = Result<Run>>,
    ) -> Result<Self> {
        Self::plan_any(options, sources, None, runs)
    }

    /// Plans the image into the file of the kept layer. All as [`Layout::plan`], but that layer's plain
    /// clusters stay at their host offsets and are counted nowhere, and everything else lies from
    /// [`Kept::base`] on. As long as the kept file has its old header, the same map gives the same plan,
    /// whatever was written behind the base; of the kept source, `file_length` must be at most the base.
    ///
    /// Fails besides if the kept image is none that this is possible with (`mode-impossible`), if its header
    /// was changed since it was read or has tables behind the base (`changed-meanwhile`), or if a table ends
    /// there (`truncated`).
    pub fn plan_onto(
        options: &ImageOptions,
        sources: &[SourceFacts],
        kept: &Kept,
        runs: impl Iterator<Item = Result<Run>>,
    ) -> Result<Self> {
        kept.check(options)?;
        let fits = |source: &SourceFacts| {
            source.cluster_bits == options.cluster_bits && source.file_length <= kept.base
        };
        if !sources.get(kept.layer).is_some_and(fits) {
            let detail = "the kept layer is no source, another one, or longer than its base".to_owned();
            return Err(bad(Code::BadEntry, detail));
        }
        Self::plan_any(options, sources, Some(kept), runs)
    }

    fn plan_any(
        options: &ImageOptions,
        sources: &[SourceFacts],
        kept: Option<&Kept>,
        runs: impl Iterator<Item = Result<Run>>,
    ) -> Result<Self> {
        let refcounts = check_options(options)?;
        let mut count = Counting::new(options, sources, kept, refcounts);
        let clusters = Clusters::new(runs, options.cluster_bits, options.below_end());
        let shaper = Shaper { options, sources };
        let mut covered = 0;
        for span in clusters {
            match span? {
                Span::Same { first, count: clusters, piece } => {
                    covered = piece.end();
                    within_file(&piece, sources)?;
                    count.add(first, clusters, shaper.same(&piece))?;
                }
                Span::Mixed { cluster, pieces } => {
                    covered = pieces.last().map_or(covered, Piece::end);
                    pieces.iter().try_for_each(|piece| within_file(piece, sources))?;
                    count.add(cluster, 1, shaper.mixed(cluster, &pieces))?;
                }
            }
        }
        if covered != options.virtual_size {
            return Err(bad(Code::BadEntry, format!("the map ends at {covered}, not at the disk's end")));
        }
        count.finish(refcounts)
    }

    /// The length of the file in bytes.
    #[must_use]
    pub fn file_length(&self) -> u64 {
        self.geometry.end
    }

    /// The memory that the layout takes, in bytes, about.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let sets: u64 = self.moved.iter().map(HostSet::memory_bytes).sum();
        let head = match &self.head {
            Head::New(bytes) => bytes.len(),
            Head::Kept { .. } => 0,
        };
        sets + (2 * self.compressed_counts.len() + head) as u64
    }

    /// Bytes of header and tables that are written; without the switch of a kept header.
    #[must_use]
    pub fn metadata_bytes(&self) -> u64 {
        let size = self.options.cluster_bits.bytes();
        let header = match &self.head {
            Head::New(bytes) => bytes.len() as u64,
            Head::Kept { .. } => 0,
        };
        header + self.geometry.l2_tables - self.geometry.l1 + self.amounts.l2_tables * size
    }

    /// The layer whose file is kept, if there is one, and where in it the new bytes begin.
    #[must_use]
    pub fn kept(&self) -> Option<(usize, u64)> {
        self.kept_layer().map(|layer| (layer, self.geometry.l1))
    }

    /// The write that makes a kept file the new image; `None` for a file of its own.
    #[must_use]
    pub fn switch(&self) -> Option<&Switch> {
        match &self.head {
            Head::New(_) => None,
            Head::Kept { switch, .. } => Some(switch),
        }
    }

    /// The ranges of a kept file, `(start, length)` in bytes, ascending, that belong to nothing once its
    /// header is switched: old tables, data that something above replaced. The last one ends at the base, and
    /// may reach behind the old end. Whoever opened the file before may still read them.
    pub fn superseded(&self) -> impl Iterator<Item = (HostOffset, u64)> + '_ {
        let size = self.options.cluster_bits.bytes();
        let layer = self.kept_layer();
        let used = layer.and_then(|layer| self.moved.get(layer)).into_iter().flat_map(HostSet::runs);
        // Without a kept file all ends where it begins.
        let end = if layer.is_some() { self.geometry.l1 / size } else { 1 };
        let mut free = 1;
        used.chain([(end, 0)]).filter_map(move |(first, count)| {
            let gap = (HostOffset(free * size), first.saturating_sub(free) * size);
            free = first + count;
            (gap.1 > 0).then_some(gap)
        })
    }

    fn kept_layer(&self) -> Option<usize> {
        match &self.head {
            Head::New(_) => None,
            Head::Kept { layer, .. } => Some(*layer),
        }
    }

    /// Whether something lies in a cluster before the compressed ones.
    fn is_used(&self, cluster: u64) -> bool {
        let behind = cluster >= self.geometry.l1 / self.options.cluster_bits.bytes();
        let kept = || self.kept_layer().and_then(|layer| self.moved.get(layer));
        cluster == 0 || behind || kept().is_some_and(|set| set.contains(cluster))
    }

    /// Bytes of data that move as they are, without those that lie behind the end of a source.
    #[must_use]
    pub fn moved_bytes(&self) -> u64 {
        self.moved_bytes
    }

    /// Bytes of clusters put together in memory.
    #[must_use]
    pub fn composed_bytes(&self) -> u64 {
        self.amounts.composed * self.options.cluster_bits.bytes()
    }

    /// Bytes of compressed clusters, as placed: whole sectors.
    #[must_use]
    pub fn compressed_bytes(&self) -> u64 {
        self.compressed_bytes
    }

    /// The version it will have.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The options it was planned with.
    #[must_use]
    pub fn options(&self) -> &ImageOptions {
        &self.options
    }

    /// The data that moves as it is: maximal runs, in source order, one source after the other; targets go
    /// up without gaps. What is kept does not move.
    pub fn moves(&self) -> impl Iterator<Item = Move> + '_ {
        let bits = self.options.cluster_bits;
        let kept = self.kept_layer();
        let all = self.moved.iter().zip(&self.sources).zip(&self.geometry.moved).enumerate();
        all.filter(move |(source, _)| Some(*source) != kept).flat_map(
            move |(source, ((set, facts), base))| {
                let unit = facts.unit_bits(bits).bytes();
                let mut to = *base;
                set.runs().map(move |(first, count)| {
                    let moved = Move { source, from: first * unit, to, length: count * unit };
                    to += moved.length;
                    moved
                })
            },
        )
    }

    /// Reads the map a second time (it must be the same) and gives everything else that is to be written.
    pub fn emit<I: Iterator<Item = Result<Run>>>(
        &self,
        runs: I,
    ) -> impl Iterator<Item = Result<Emit>> + use<'_, I> {
        emit::emit(self, runs)
    }

    /// Where the bytes at `host` of the new file come from.
    #[must_use]
    pub fn origin(&self, host: HostOffset) -> Origin {
        if host.0 >= self.geometry.end {
            return Origin::Outside;
        }
        if host.0 < self.geometry.l1 {
            return self.origin_kept(host);
        }
        let area = self.geometry.moved.partition_point(|start| *start <= host.0);
        let moved = area.checked_sub(1).filter(|layer| Some(*layer) != self.kept_layer());
        let found = moved.and_then(|layer| {
            let start = self.geometry.moved.get(layer)?;
            let unit = self.sources.get(layer)?.unit_bits(self.options.cluster_bits);
            let offset = host.0 - start;
            let set = self.moved.get(layer)?;
            let from = set.select(offset >> unit.bits())?;
            let within = unit.within(offset);
            let host = HostOffset((from << unit.bits()) + within);
            Some(Origin::Moved { layer, host, length: (set.run_from(from) << unit.bits()) - within })
        });
        found.unwrap_or(Origin::Written)
    }

    /// The same before the first byte that is placed: the header, and what is kept.
    fn origin_kept(&self, host: HostOffset) -> Origin {
        let bits = self.options.cluster_bits;
        if host.0 < bits.bytes() {
            return Origin::Written;
        }
        let kept = self.kept_layer().and_then(|layer| Some((layer, self.moved.get(layer)?)));
        match kept.map(|(layer, set)| (layer, set.run_from(host.0 / bits.bytes()))) {
            Some((layer, count)) if count > 0 => {
                Origin::Moved { layer, host, length: count * bits.bytes() - bits.within(host.0) }
            }
            _ => Origin::Outside,
        }
    }

    /// Where the cluster at `host` of a source goes.
    fn placed(&self, layer: usize, host: HostOffset) -> Option<HostOffset> {
        let unit = self.sources.get(layer)?.unit_bits(self.options.cluster_bits);
        let rank = self.moved.get(layer)?.rank(host.0 >> unit.bits())?;
        if Some(layer) == self.kept_layer() {
            return Some(host);
        }
        Some(HostOffset(self.geometry.moved.get(layer)? + rank * unit.bytes()))
    }
}

fn check_options(options: &ImageOptions) -> Result<RefcountWidth> {
    let wrong = |detail: String| Err(bad(Code::BadHeader, detail));
    let extended_fits = options.cluster_bits.bits() >= format::EXTENDED_L2_MIN_CLUSTER_BITS;
    if options.extended_l2 && !extended_fits {
        return wrong("extended L2 entries need clusters of 16 KiB or more".to_owned());
    }
    let needs_3 = options.extended_l2
        || options.compression != CompressionType::Zlib
        || options.refcount_order != format::DEFAULT_REFCOUNT_ORDER;
    if !matches!(options.version, 2 | 3) || (options.version == 2 && needs_3) {
        return wrong(format!("version {} has no such images", options.version));
    }
    if let Some(Backing { name, format, .. }) = &options.backing {
        if name.is_empty() || name.len() as u64 > format::MAX_BACKING_NAME_BYTES {
            return wrong(format!("a backing name of {} bytes; 1 to 1,023 are allowed", name.len()));
        }
        if format.len() as u64 > format::MAX_BACKING_FORMAT_BYTES {
            return wrong(format!("the backing format {format:?} is too long"));
        }
    }
    RefcountWidth::new(options.refcount_order)
        .ok_or_else(|| bad(Code::BadHeader, "refcounts are at most 64 bits wide".to_owned()))
}

fn bad(code: Code, detail: String) -> ImageError {
    ImageError::Bad { image: "the new image".to_owned(), code, detail }
}

/// Refuses data of which nothing can be left: its host cluster, or its compressed stream, begins behind the
/// file's end. The last cluster of a file may be cut: the rest of it reads as zeros, as in QEMU.
fn within_file(piece: &Piece, sources: &[SourceFacts]) -> Result<()> {
    let (layer, host) = match piece.fill {
        Fill::Data { layer, host } => (layer, host),
        Fill::Compressed { layer, cluster } => (layer, cluster.host),
        Fill::Zero | Fill::Below | Fill::Nothing => return Ok(()),
    };
    let Some(source) = sources.get(layer) else {
        return Err(bad(Code::BadEntry, format!("the map names layer {layer}, which there is not")));
    };
    let last_cluster = match piece.fill {
        Fill::Compressed { .. } => host.0,
        _ => source.cluster_bits.round_down(host.plus(piece.length.saturating_sub(1)).0),
    };
    if last_cluster >= source.file_length {
        return Err(bad(Code::Truncated, format!("layer {layer} ends before its data at {host}")));
    }
    Ok(())
}

/// How many compressed clusters may touch one host cluster. They are counted in 16 bits here; a wider refcount
/// could say more, which no cluster size needs.
fn pieces_limit(width: RefcountWidth) -> u64 {
    width.max().min(u64::from(u16::MAX))
}

/// The first pass.
struct Counting<'a> {
    options: &'a ImageOptions,
    sources: &'a [SourceFacts],
    kept: Option<&'a Kept>,
    moved: Vec<Collecting>,
    moved_bytes: u64,
    packing: Packing,
    compressed_counts: Vec<u16>,
    compressed_bytes: u64,
    composed: u64,
    l2_tables: u64,
    /// The L2 table that the last entry lies in.
    last_table: Option<u64>,
    needs_zero: bool,
}

impl<'a> Counting<'a> {
    fn new(
        options: &'a ImageOptions,
        sources: &'a [SourceFacts],
        kept: Option<&'a Kept>,
        refcounts: RefcountWidth,
    ) -> Self {
        Self {
            options,
            sources,
            kept,
            moved: sources.iter().map(|_| Collecting::default()).collect(),
            moved_bytes: 0,
            packing: Packing::new(options.cluster_bits, pieces_limit(refcounts)),
            compressed_counts: Vec::new(),
            compressed_bytes: 0,
            composed: 0,
            l2_tables: 0,
            last_table: None,
            needs_zero: false,
        }
    }

    fn add(&mut self, first: u64, count: u64, shape: Shape) -> Result<()> {
        match shape {
            Shape::Nothing => return Ok(()),
            Shape::Zero(_) => self.needs_zero = true,
            Shape::Whole { layer, host, .. } => self.take(layer, host, count)?,
            Shape::Compressed { cluster, .. } => {
                let counts = &mut self.compressed_counts;
                let place = self.packing.place(cluster.stored_bytes, |touched| {
                    let at = usize::try_from(touched).unwrap_or(usize::MAX);
                    if counts.len() <= at {
                        counts.resize(at + 1, 0);
                    }
                    if let Some(count) = counts.get_mut(at) {
                        *count += 1;
                    }
                });
                self.compressed_bytes += place.sectors * SECTOR_BYTES;
            }
            Shape::Composed(_) => self.composed += count,
        }
        let per_table = self.options.entry_format(3).entries_per_table();
        let (from, to) = (first / per_table, (first + count - 1) / per_table);
        self.l2_tables += to - from + u64::from(self.last_table != Some(from));
        self.last_table = Some(to);
        Ok(())
    }

    fn take(&mut self, layer: usize, host: HostOffset, count: u64) -> Result<()> {
        let target = self.options.cluster_bits;
        let (Some(source), Some(set)) = (self.sources.get(layer), self.moved.get_mut(layer)) else {
            return Err(bad(Code::BadEntry, format!("the map names layer {layer}, which there is not")));
        };
        let unit = source.unit_bits(target).bytes();
        let bytes = count * target.bytes();
        if self.kept.is_none_or(|kept| kept.layer != layer) {
            self.moved_bytes += bytes.min(source.file_length.saturating_sub(host.0));
        }
        if !set.insert(host.0 / unit, bytes / unit) {
            return Err(bad(
                Code::SharedCluster,
                format!("layer {layer} uses {host} for two guest clusters"),
            ));
        }
        Ok(())
    }

    fn finish(self, refcounts: RefcountWidth) -> Result<Layout> {
        let (options, sources) = (self.options, self.sources);
        let moved: Vec<HostSet> = self.moved.into_iter().map(Collecting::finish).collect();
        let version = if self.needs_zero { options.version.max(3) } else { options.version };
        let format = options.entry_format(version);
        let needed = options.virtual_size.div_ceil(format.bytes_per_table());
        let l1_entries = self.kept.map_or(needed, |kept| needed.max(kept.header.l1_entries));
        if l1_entries * 8 > format::MAX_L1_BYTES {
            return Err(geometry::too_large("its L1 table would pass 32 MiB"));
        }
        let clusters = moved.iter().zip(sources).enumerate().map(|(layer, (set, source))| {
            if self.kept.is_some_and(|kept| kept.layer == layer) {
                return 0;
            }
            let ratio = options.cluster_bits.bytes() / source.unit_bits(options.cluster_bits).bytes();
            set.len() / ratio
        });
        let amounts = Amounts {
            l1_entries,
            l2_tables: self.l2_tables,
            moved: clusters.collect(),
            composed: self.composed,
            compressed: self.packing.clusters(),
        };
        let base = self.kept.map_or(options.cluster_bits.bytes(), |kept| kept.base);
        let geometry = Geometry::new(&amounts, base, options.cluster_bits, refcounts)?;
        let head = match self.kept {
            None => Head::New(header::encode(options, version, l1_entries, &geometry)?),
            Some(kept) => Head::Kept { layer: kept.layer, switch: Switch::plan(kept, l1_entries, &geometry) },
        };
        Ok(Layout {
            options: options.clone(),
            version,
            refcounts,
            sources: sources.to_vec(),
            moved,
            compressed_counts: self.compressed_counts,
            amounts,
            moved_bytes: self.moved_bytes,
            compressed_bytes: self.compressed_bytes,
            geometry,
            head,
        })
    }
}
