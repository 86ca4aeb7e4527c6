//! The claims *digest* and *data* for a merge: what is known of the members carries over to their survivor's new file.
//!
//! The new file, sealed and parsed again, tells which blocks it decides. The leaf of each is looked up in the tables of
//! the old chain; where a block is put together from several places it is read and hashed. Over the tables of what
//! stays below, these must give the very view digest that the survivor had. What was copied, rather than shared, is
//! read back from the store and must hash to its leaves.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::backend::StoreFile;
use crate::chain::delete::Merge;
use crate::chain::graph::NodeId;
use crate::digest::view::{Seen, view_digest, walk};
use crate::digest::{block_count, zero_leaf};
use crate::failure::Code;
use crate::ids::{Digest, StorePath};
use crate::progress::{Cancel, Pace, Silent};
use crate::qcow2::check::Limits;
use crate::qcow2::fingerprint::fingerprint;
use crate::qcow2::layout::Layout;
use crate::qcow2::write::clonable;
use crate::qcow2::{ExtentKind, Image};
use crate::store::chain::OpenChain;
use crate::store::error::{Result, StoreError};
use crate::store::manifest::leaves::{self, LeafError, LeafFile, LeafSink};
use crate::store::manifest::reads::{self, Reads};
use crate::store::manifest::shelf::{self, Known, Shelf};
use crate::store::manifest::{Binding, FileMark, Manifest, TableMark, stem};
use crate::store::measure::{Decided, Job, Part, decided, measure};
use crate::store::merge::MergeInput;
use crate::store::scan::Scan;
use crate::store::{Store, Stores};
use crate::units::{BLOCK_BYTES, GuestOffset};

/// What is known of a merge's members before it.
#[derive(Debug)]
pub struct Attestor {
    /// The survivor's manifest.
    survivor: Manifest,
    /// What the survivor will stand on.
    parent: Option<Binding>,
    /// The tables of the survivor, of what is merged into it, and of what stays below, newest first.
    tables: Vec<LeafFile>,
    /// How many of them stay below.
    below: usize,
    /// When the byte of the members that was left alone for longest was read.
    oldest_ns: Option<i64>,
}

/// What was proved beside the plan, and what is to be written down once the file has its name.
#[derive(Clone, Debug)]
pub struct Attested {
    /// The survivor's view digest, before and after.
    pub view_digest: Digest,
    /// Bytes of view whose digest is proved equal.
    pub digest_bytes: u64,
    /// Bytes that were read back from the store and hash to their leaves.
    pub data_bytes: u64,
}

/// A merge's new file, and how it came about.
#[derive(Clone, Copy)]
pub struct Made<'a> {
    /// What was merged.
    pub input: &'a MergeInput,
    /// How the new file is laid out.
    pub layout: &'a Layout,
    /// It, sealed and opened again.
    pub new: &'a Image,
    /// The alignment that cloning from each layer needed, as it was written with.
    pub alignment: &'a [u64],
    /// The time, nanoseconds since 1970.
    pub now_ns: i64,
    /// Asked to stop.
    pub cancel: &'a Cancel,
    /// The limit on bytes a second.
    pub pace: &'a Pace,
}

/// What the members' manifests were good for.
#[derive(Clone, Debug)]
pub enum Carried {
    /// The survivor's view digest was proved equal, and its new file is adopted.
    Attested(Attested),
    /// The survivor was adopted, and its new file is not: why.
    Lost(String),
    /// The survivor was not adopted.
    Nothing,
}

/// How an attestor is had.
#[derive(Debug)]
pub enum Knowledge {
    /// All members concerned are adopted, and are what they were.
    All(Box<Attestor>),
    /// The survivor is, and another one is not, so only the plan can be proved: which, and why.
    Missing(String),
    /// The survivor was never adopted.
    Nothing,
}

impl Knowledge {
    /// Carries what is known of the members over to the new file, as [`Attestor::attest`] does.
    pub fn carry(self, store: &Store, made: &Made<'_>) -> Result<Carried> {
        Ok(match self {
            Self::All(mut attestor) => Carried::Attested(attestor.attest(store, made)?),
            Self::Missing(why) => Carried::Lost(why),
            Self::Nothing => Carried::Nothing,
        })
    }
}

impl Attestor {
    /// Looks up what is known of a merge's members, and that their tables are what they were when they were adopted.
    /// `grown` is what the lowest one's file was before a merge in place wrote behind its end.
    ///
    /// # Errors
    ///
    /// [`StoreError::Damaged`] for a member that was found damaged, or whose metadata is not what it was.
    pub fn open(
        stores: &Stores,
        scan: &Scan,
        shelves: &[Shelf],
        merge: &Merge,
        input: &MergeInput,
        grown: Option<FileMark>,
    ) -> Result<Knowledge> {
        let upper: Vec<NodeId> =
            std::iter::once(merge.survivor).chain(merge.merged.iter().rev().copied()).collect();
        let ancestors = |parent| scan.graph.ancestors(parent).unwrap_or_default();
        let lower: Vec<NodeId> = merge
            .new_parent
            .into_iter()
            .flat_map(|parent| std::iter::once(parent).chain(ancestors(parent)))
            .collect();
        let images: Vec<&Image> = input.upper.images().collect();
        let line: Vec<NodeId> = upper.iter().chain(&lower).copied().collect();
        // Tables and headers of them all, from a store that may take its time: all are asked at once.
        let looked: Vec<Look> = line
            .par_iter()
            .with_max_len(1)
            .enumerate()
            .map(|(index, id)| {
                let image = images.get(index).map(|image| (*image).clone());
                let grown = grown.filter(|_| index + 1 == upper.len());
                look(stores, scan, shelves, *id, image, grown)
            })
            .collect::<Result<_>>()?;
        if looked.first().is_some_and(|survivor| matches!(survivor, Look::Nothing(_))) {
            return Ok(Knowledge::Nothing);
        }
        let mut manifests = Vec::new();
        let mut tables = Vec::new();
        let mut oldest_ns = Some(i64::MAX);
        for (index, look) in looked.into_iter().enumerate() {
            match look {
                Look::Good { manifest, table, oldest_ns: read } => {
                    if index < upper.len() {
                        oldest_ns = oldest_ns.min(read);
                    }
                    tables.push(table);
                    manifests.push(*manifest);
                }
                Look::Nothing(why) | Look::Missing(why) => return Ok(Knowledge::Missing(why)),
            }
        }
        let parent = manifests.get(upper.len()).map(|manifest| Binding {
            member: manifest.member.clone(),
            id: manifest.id.clone(),
            digest: manifest.view_digest,
        });
        let Some(survivor) = manifests.into_iter().next() else {
            return Ok(Knowledge::Missing("nothing is merged".to_owned()));
        };
        Ok(Knowledge::All(Box::new(Self { survivor, parent, tables, below: lower.len(), oldest_ns })))
    }

    /// Proves that `new`, the survivor's sealed file opened again, has the view that the survivor had, and writes its
    /// leaf table and manifest, durably: they are in force as soon as the file has the survivor's name.
    ///
    /// # Errors
    ///
    /// [`StoreError::Proof`] if it does not.
    ///
    /// # After a crash
    ///
    /// A table and a manifest of a file that never got the name may be left; a later sweep removes them.
    pub fn attest(&mut self, store: &Store, made: &Made<'_>) -> Result<Attested> {
        let Made { input, layout, new, alignment, now_ns, cancel, pace } = *made;
        let member = self.survivor.member.to_string();
        let image = |source| StoreError::Image { member: member.clone(), source };
        let unread = |source| StoreError::Leaves { member: member.clone(), source };
        let failed = |detail: String| StoreError::Proof {
            member: member.clone(),
            message: format!("the new file was thrown away: {detail}"),
        };
        let size = new.header().virtual_size;
        let chain =
            OpenChain::of(std::iter::once(new.clone()).chain(input.lower.images().cloned()).collect());
        let read = read_back(layout, new, alignment).map_err(image)?;
        let job = Job { progress: &Silent, cancel, pace, tolerant: false };
        let (taken, made) = rayon::join(
            || fingerprint(new, &Limits::default()),
            || {
                let data_bytes = self.compare(&chain, &read, &job)?;
                let sink = LeafSink::create(store.backend().as_ref(), size).map_err(unread)?;
                Ok::<_, StoreError>((data_bytes, self.table(sink, new, size)?))
            },
        );
        let ((report, taken), (data_bytes, table)) = (taken.map_err(image)?, made?);
        let Some(taken) = taken.filter(|_| !report.is_damaged()) else {
            return Err(failed("its structure is not sound".to_owned()));
        };
        let mut file = leaves::open(store, &member, &table)?;
        let lower = self.tables.len() - self.below.min(self.tables.len());
        let below = self.tables.iter_mut().skip(lower);
        let mut layers: Vec<&mut LeafFile> = std::iter::once(&mut file).chain(below).collect();
        let digest = view_digest(&mut layers).map_err(unread)?;
        if digest != self.survivor.view_digest {
            return Err(failed(format!(
                "its view digest is {digest}, the survivor's {}",
                self.survivor.view_digest
            )));
        }
        let stat = new.file().stat().map_err(|source| StoreError::backend(store, source))?;
        let manifest = Manifest {
            file: FileMark::from(&stat),
            file_blake3: None,
            meta_blake3: taken.meta,
            start_blake3: taken.start,
            parent: self.parent.clone(),
            leaves: table,
            qcow2: new.header().into(),
            made_ns: now_ns,
            quarantine: None,
            ..self.survivor.clone()
        };
        shelf::write_beside(store, &manifest)?;
        let mut noted = self
            .oldest_ns
            .filter(|oldest| *oldest < i64::MAX)
            .map_or_else(Reads::default, |oldest| Reads::whole(block_count(size), oldest));
        for range in &read {
            noted.mark(range.clone(), now_ns);
        }
        reads::save(store.backend().as_ref(), &manifest.member, stat.id.inode, &noted)
            .map_err(|source| StoreError::backend(store, source))?;
        Ok(Attested { view_digest: digest, digest_bytes: size, data_bytes })
    }

    /// The leaf table of the new file: the leaves of the blocks that it decides, as the old chain has them.
    fn table(&mut self, mut sink: LeafSink<'_>, new: &Image, size: u64) -> Result<TableMark> {
        let member = self.survivor.member.to_string();
        let leaves = |source| StoreError::Leaves { member: member.clone(), source };
        let decided = decided(new, 0..block_count(size));
        for Decided { first, count, .. } in
            decided.map_err(|source| StoreError::Image { member: member.clone(), source })?
        {
            walk(&mut self.tables, first, first + count, |block, seen| match seen {
                Seen::Zeros(count) => sink.zeros(block, count),
                Seen::Leaf(leaf) => sink.leaves(block, &[leaf]),
            })
            .map_err(leaves)?;
        }
        sink.finish(&stem(&self.survivor.member)).map_err(leaves)
    }

    /// Reads blocks of the new chain, and holds them against what the old one shows.
    fn compare(&mut self, chain: &OpenChain, ranges: &[Range<u64>], job: &Job<'_>) -> Result<u64> {
        let member = self.survivor.member.to_string();
        let mut bytes = 0;
        let mut bad = None;
        let tables = &mut self.tables;
        measure::<Failed>(chain, ranges, job, None, |part| {
            let (first, found): (u64, &[Digest]) = match part {
                // Zeros by the new file's word: the claim "digest" looks at them.
                Part::Zeros { .. } => return Ok(()),
                Part::Leaves { first, leaves } => (first, leaves),
            };
            bytes += found.len() as u64 * BLOCK_BYTES;
            walk(tables, first, first + found.len() as u64, |block, seen| {
                let differs = |block: u64, wanted: Digest| {
                    let index = usize::try_from(block - first).unwrap_or(usize::MAX);
                    found.get(index) != Some(&wanted)
                };
                let wrong = match seen {
                    Seen::Leaf(leaf) => differs(block, leaf).then_some(block),
                    Seen::Zeros(count) => (block..block + count).find(|block| differs(*block, zero_leaf())),
                };
                bad = bad.or(wrong);
                Ok(())
            })?;
            Ok(())
        })
        .map_err(|failed| match failed {
            Failed::Image(source) => StoreError::Image { member: member.clone(), source },
            Failed::Leaves(source) => StoreError::Leaves { member: member.clone(), source },
        })?;
        match bad {
            Some(block) => {
                let message = format!(
                    "the bytes at {} do not hash to what was kept of them; verify --level data tells which member is damaged",
                    block * BLOCK_BYTES
                );
                Err(StoreError::Damaged { code: Code::DataDamaged, member, message })
            }
            None => Ok(bytes),
        }
    }
}

/// Puts the manifest of a member's file in force again, after a write of qchain's own that changed nothing of what it
/// says; `false` if the file has none, or is not what it says.
pub fn mark_again(store: &Store, member: &StorePath, file: &Arc<dyn StoreFile>) -> Result<bool> {
    let stat = file.stat().map_err(|source| StoreError::backend(store, source))?;
    let Some(Ok(manifest)) = shelf::read(store, member, stat.id.inode)? else { return Ok(false) };
    if manifest.file == FileMark::from(&stat) {
        return Ok(true);
    }
    let failed = |source| StoreError::Image { member: member.to_string(), source };
    let image = Image::open(Arc::clone(file), member.as_str()).map_err(failed)?;
    let (_, taken) = fingerprint(&image, &Limits::default()).map_err(failed)?;
    if taken.map(|taken| (taken.meta, taken.start)) != Some((manifest.meta_blake3, manifest.start_blake3)) {
        return Ok(false);
    }
    shelf::write(store, &Manifest { file: FileMark::from(&stat), ..manifest })?;
    Ok(true)
}

/// The blocks of the new file whose bytes are no shared extents: copied, recompressed or put together.
pub fn read_back(
    layout: &Layout,
    new: &Image,
    alignment: &[u64],
) -> std::result::Result<Vec<Range<u64>>, crate::qcow2::ImageError> {
    let size = new.header().virtual_size;
    let mut cloned: Vec<Range<u64>> = layout
        .moves()
        .filter(|run| clonable(run, alignment))
        .map(|run| run.to..run.to.saturating_add(run.length))
        .collect();
    // What a merge in place keeps lies before all that it writes.
    cloned.extend(layout.kept().map(|(_, base)| 0..base));
    cloned.sort_by_key(|range| range.start);
    let shared = |from: u64, to: u64| {
        let behind = cloned.partition_point(|range| range.start <= from);
        behind.checked_sub(1).and_then(|at| cloned.get(at)).is_some_and(|range| to <= range.end)
    };
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut add = |first: u64, end: u64| match ranges.last_mut() {
        Some(last) if first <= last.end => last.end = last.end.max(end),
        _ => ranges.push(first..end),
    };
    for extent in new.extents(GuestOffset(0)) {
        let extent = extent?;
        let end = extent.end().0.min(size);
        let read = match extent.kind {
            ExtentKind::Below | ExtentKind::Zero => false,
            ExtentKind::Compressed(cluster) => {
                !shared(cluster.host.0, cluster.host.0.saturating_add(cluster.stored_bytes))
            }
            ExtentKind::Data { host } => {
                // Parts of an extent may be shared and others not.
                let mut at = extent.start.0;
                while at < end {
                    let stop = end.min((at / BLOCK_BYTES + 1) * BLOCK_BYTES);
                    let from = host.0 + (at - extent.start.0);
                    if !shared(from, from + (stop - at)) {
                        add(at / BLOCK_BYTES, stop.div_ceil(BLOCK_BYTES));
                    }
                    at = stop;
                }
                false
            }
        };
        if read {
            add(extent.start.0 / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
        }
    }
    // Blocks put together from several places.
    for Decided { first, count, whole } in decided(new, 0..block_count(size))? {
        if !whole {
            ranges.push(first..first + count);
        }
    }
    ranges.sort_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let one = next.start <= last.end;
        if one {
            last.end = last.end.max(next.end);
        }
        one
    });
    Ok(ranges)
}

/// What comparing fails with.
enum Failed {
    Image(crate::qcow2::ImageError),
    Leaves(LeafError),
}

impl From<crate::qcow2::ImageError> for Failed {
    fn from(error: crate::qcow2::ImageError) -> Self {
        Self::Image(error)
    }
}

impl From<LeafError> for Failed {
    fn from(error: LeafError) -> Self {
        Self::Leaves(error)
    }
}

/// What there is of one member.
enum Look {
    Good {
        manifest: Box<Manifest>,
        table: LeafFile,
        /// When the byte of it that was left alone for longest was read.
        oldest_ns: Option<i64>,
    },
    /// It was never adopted, in words.
    Nothing(String),
    /// What there is cannot be built on: why.
    Missing(String),
}

/// Looks up what is known of a member; `image` is it, if it is merged.
fn look(
    stores: &Stores,
    scan: &Scan,
    shelves: &[Shelf],
    id: NodeId,
    image: Option<Image>,
    grown: Option<FileMark>,
) -> Result<Look> {
    let key = &scan.graph.node(id).key;
    let (store, name) = (stores.get(key.store)?, stores.display(key));
    let known = shelf::known(stores, scan, shelves, id)?;
    let nothing = known == Known::Nothing;
    let (known, image) = before(known, image, grown);
    let manifest = match judge(&known, image.as_ref(), &name)? {
        Judged::Good(manifest) => manifest,
        Judged::Missing(why) if nothing => return Ok(Look::Nothing(why)),
        Judged::Missing(why) => return Ok(Look::Missing(why)),
    };
    let table = match leaves::usable(store, &name, &manifest.leaves)? {
        Ok(table) => table,
        Err(why) => return Ok(Look::Missing(why)),
    };
    let read = reads::load(store.backend(), &key.path, manifest.file.inode)
        .map_err(|source| StoreError::backend(store, source))?;
    let oldest_ns = read.oldest_ns(block_count(manifest.virtual_bytes));
    Ok(Look::Good { manifest, table, oldest_ns })
}

enum Judged {
    Good(Box<Manifest>),
    Missing(String),
}

/// What was known of a member, and its image, before a merge in place wrote behind its end.
fn before(known: Known, image: Option<Image>, grown: Option<FileMark>) -> (Known, Option<Image>) {
    match (known, image, grown) {
        (Known::Changed(manifest), Some(image), Some(mark)) if manifest.file == mark => {
            (Known::Current(manifest), Some(image.ending_at(mark.length)))
        }
        (known, image, _) => (known, image),
    }
}

/// Whether what is known of a member can be built on. The metadata of one that is merged (`image`) must be what it was.
fn judge(known: &Known, image: Option<&Image>, name: &str) -> Result<Judged> {
    let refused =
        |code: Code, message: String| Err(StoreError::Damaged { code, member: name.to_owned(), message });
    let (manifest, changed) = match known {
        Known::Nothing => return Ok(Judged::Missing(format!("{name} is not adopted"))),
        Known::Damaged(_) => return Ok(Judged::Missing(format!("the manifest of {name} is damaged"))),
        Known::Current(manifest) => (manifest, false),
        Known::Changed(manifest) => (manifest, true),
    };
    if let Some(quarantine) = &manifest.quarantine {
        return refused(Code::Quarantined, format!("it was found damaged: {}", quarantine.message));
    }
    let Some(image) = image else {
        return Ok(if changed {
            Judged::Missing(format!("{name} was changed since it was adopted"))
        } else {
            Judged::Good(manifest.clone())
        });
    };
    if changed {
        let message = "its file was changed or replaced since it was adopted; adopt it again, which reads it";
        return refused(Code::ChangedSinceAdoption, message.to_owned());
    }
    let (_, taken) = fingerprint(image, &Limits::default())
        .map_err(|source| StoreError::Image { member: name.to_owned(), source })?;
    if taken.map(|taken| (taken.meta, taken.start)) != Some((manifest.meta_blake3, manifest.start_blake3)) {
        let message = "its header or tables changed, although nothing wrote to the file";
        return refused(Code::MetadataDamaged, message.to_owned());
    }
    Ok(Judged::Good(manifest.clone()))
}
