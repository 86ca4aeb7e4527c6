//! `repair`: a damaged member gets its bad blocks back from any other place that has them.
//!
//! What a block should be is known by its leaf, so it does not matter where the bytes come from: a copy of the chain, a
//! template, a volume, a raw image. The member's file is copied (or its extents shared), the bad blocks are written
//! into the copy, the copy is held against all that is known of the member, and only then takes its name, as any
//! change does: it can be undone. If header or tables are damaged the copy starts from a file that has the right ones.

mod source;

use std::cell::OnceCell;
use std::collections::BTreeMap;

use serde::Serialize;

use crate::backend::{BackendError, Means, Move, StoreFile};
use crate::chain::graph::{Key, NodeId};
use crate::change::log::Did;
use crate::change::publication::Published;
use crate::change::record::{Commit, Publication, Purpose};
use crate::change::recover::{Extent, finish};
use crate::change::witness::Witness;
use crate::change::yard::Yard;
use crate::change::{Guard, Operation, Site, tree};
use crate::digest::view::{Leaves as _, Says};
use crate::digest::{block_count, leaf};
use crate::failure::Code;
use crate::ops::{OpError, Result};
use crate::progress::{Cancel, Progress};
use crate::qcow2::check::Limits;
use crate::qcow2::fingerprint::{Fingerprint, fingerprint};
use crate::qcow2::{ExtentKind, Image};
use crate::store::chain::{OpenChain, open_image};
use crate::store::compare::{Expected, compare};
use crate::store::manifest::leaves::{self, LeafFile};
use crate::store::manifest::shelf::{self, Known, Shelf};
use crate::store::manifest::{FileMark, Manifest};
use crate::store::measure::Job;
use crate::store::scan::Scan;
use crate::store::{Store, StoreError, Stores};
use crate::units::{BLOCK_BYTES, BLOCK_LENGTH, GuestOffset};

pub use source::Source;

/// What is to be repaired, and from what.
pub struct Request {
    /// The member.
    pub target: NodeId,
    /// Where good blocks may be found, in the order in which they are asked.
    pub sources: Vec<Source>,
    /// How long the old file is kept, in nanoseconds.
    pub retention_ns: i64,
}

/// What was repaired.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RepairReport {
    /// The member.
    pub member: String,
    /// The operation, which can be undone; none if nothing was changed.
    pub operation: Option<String>,
    /// `sound` (nothing was wrong), `repaired`, or `repairable` after a dry run.
    pub status: &'static str,
    /// Whether header and tables were taken from a source.
    pub metadata: bool,
    /// How many blocks were bad.
    pub blocks: u64,
    /// Where good ones came from.
    pub from: BTreeMap<String, u64>,
    /// The member's view digest.
    pub digest: String,
}

/// Where the copy starts from.
struct Base {
    image: Image,
    /// Another file than the member's own.
    foreign: bool,
}

/// Repairs a member, or says why that cannot be; without the right to change the stores (`guard`), only says what would be
/// done. Blocks for as long as it takes to read the member twice.
///
/// # Errors
///
/// `locked` (busy) if QEMU has the member open for writing; `data-damaged` if a bad block is nowhere to be found;
/// `no-space`, with the bytes that are needed, if there is less room: nothing was changed. `changed-meanwhile` if
/// somebody else changed the member or opened it for writing since: it was left as it was.
///
/// # After a crash
///
/// The member has its old file or the repaired one.
pub fn repair(
    site: &Site<'_>,
    scan: &Scan,
    request: &Request,
    guard: Option<&Guard>,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<RepairReport> {
    let work = Work::open(site, scan, request, progress, cancel)?;
    let base = work.base()?;
    let chain =
        OpenChain::of(std::iter::once(base.image.clone()).chain(work.lower.iter().cloned()).collect());
    let bad = work.bad(&chain)?;
    let mut report = RepairReport {
        member: work.name.clone(),
        operation: None,
        status: if bad.is_empty() && !base.foreign { "sound" } else { "repairable" },
        metadata: base.foreign,
        blocks: bad.len() as u64,
        from: BTreeMap::new(),
        digest: work.manifest.view_digest.to_string(),
    };
    let mut table = work.table()?;
    if guard.is_none() || report.status == "sound" {
        for block in bad {
            let (source, _) = work.find(&mut table, block)?;
            *report.from.entry(source).or_default() += 1;
        }
        return Ok(report);
    }
    let key = &scan.graph.node(request.target).key;
    work.need_room(key, &base, bad.len() as u64)?;
    let root = scan.graph.node(tree::root(&scan.graph, request.target)).key.clone();
    let operation = Operation::begin(site, &root, vec![site.place(key)?])?;
    let old =
        work.store.backend().open(&key.path).map_err(|source| StoreError::backend(work.store, source))?;
    let staged = operation.stage(key, "0.image", old.as_ref())?;
    copy(base.image.file(), staged.file()).map_err(|source| StoreError::backend(work.store, source))?;
    for block in bad {
        cancel.check()?;
        let (source, bytes) = work.find(&mut table, block)?;
        work.patch(&base.image, staged.file(), block, &bytes)?;
        *report.from.entry(source).or_default() += 1;
    }
    let sealed = staged.seal(site)?;
    work.prove(&sealed.file)?;
    let commit = commit(request, sealed.publication);
    let decided = operation.decide(commit, &[])?;
    let published = decided.publish().map_err(|error| OpError::after_decision(&error))?;
    let nobody = Witness::None;
    finish(site, &decided, &published, &[], Extent::default(), nobody, &mut Vec::new())
        .map_err(|error| OpError::after_decision(&error))?;
    let taken_back = published.iter().find_map(|one| match one {
        Published::TakenBack { code, reason } => Some((*code, reason.clone())),
        Published::Done => None,
    });
    if let Some((code, message)) = taken_back {
        return Err(OpError::Refused { code, member: work.name.clone(), message });
    }
    let digest = Some(work.manifest.view_digest);
    let did = Did { into: Some(work.name.clone()), digest_after: digest, ..Did::default() };
    // It was done all the same; the log is for people.
    let _ = site.log(decided.home(), decided.id(), "repair", vec![did]);
    report.operation = Some(decided.id().to_string());
    report.status = "repaired";
    Ok(report)
}

fn commit(request: &Request, publication: Publication) -> Commit {
    Commit {
        purpose: Purpose::Delete,
        grace_ns: 0,
        retention_ns: request.retention_ns,
        restores: Vec::new(),
        publications: vec![publication],
        checkpoints: Vec::new(),
        departures: Vec::new(),
        repairs: true,
    }
}

/// Makes `to` the same bytes as `from`, sharing extents where that works.
fn copy(from: &std::sync::Arc<dyn StoreFile>, to: &dyn StoreFile) -> std::result::Result<(), BackendError> {
    let length = from.stat()?.length;
    to.set_length(length)?;
    if length == 0 {
        return Ok(());
    }
    let whole = [Move { source: 0, from: 0, to: 0, length }];
    let sources = [std::sync::Arc::clone(from)];
    match to.move_runs(&sources, &whole, Means::Clone) {
        Err(error) if error.is_unsupported() => to.move_runs(&sources, &whole, Means::Copy).map(|_| ()),
        done => done.map(|_| ()),
    }
}

/// A member being repaired.
struct Work<'a> {
    store: &'a Store,
    name: String,
    manifest: Manifest,
    /// What lies below it, newest first.
    lower: Vec<Image>,
    /// Its own image, if its header and tables are right.
    own: Option<Image>,
    request: &'a Request,
    job: Job<'a>,
    /// Looked up when they are needed.
    twins: OnceCell<Vec<(&'a Image, Fingerprint)>>,
}

impl<'a> Work<'a> {
    fn open(
        site: &'a Site<'_>,
        scan: &Scan,
        request: &'a Request,
        progress: &'a dyn Progress,
        cancel: &'a Cancel,
    ) -> Result<Self> {
        let stores: &Stores = site.stores;
        let key = &scan.graph.node(request.target).key;
        let store = stores.get(key.store)?;
        let name = stores.display(key);
        let member =
            scan.member(request.target).ok_or_else(|| StoreError::NotFound { name: name.clone() })?;
        if member.locks.writer {
            let message = "QEMU has it open for writing".to_owned();
            return Err(OpError::Refused { code: Code::Locked, member: name, message });
        }
        let known = Shelf::load(store)?.find(store, &key.path, &member.stat)?;
        let (manifest, same) = match known {
            Known::Current(manifest) => (*manifest, true),
            Known::Changed(manifest) => (*manifest, false),
            Known::Nothing | Known::Damaged(_) => {
                let message = "it is not adopted, so nobody knows what it should be".to_owned();
                return Err(OpError::Refused { code: Code::NotAdopted, member: name, message });
            }
        };
        let own = open_image(stores, key).ok().filter(|image| {
            fingerprint(image, &Limits::default()).is_ok_and(|(report, taken)| {
                let right = |taken: Fingerprint| {
                    is_right(&manifest, &taken) && (!same || taken.start == manifest.start_blake3)
                };
                !report.is_damaged() && taken.is_some_and(right)
            })
        });
        let lower = match &manifest.parent {
            None => Vec::new(),
            Some(parent) => {
                let below = stores.iter().find_map(|(index, _)| {
                    let key = Key { store: index, path: parent.member.clone() };
                    scan.graph.find(&key)
                });
                let below = below.ok_or_else(|| OpError::Refused {
                    code: Code::MissingParent,
                    member: name.clone(),
                    message: format!("its parent {} is missing", parent.member),
                })?;
                OpenChain::of_member(stores, scan, below)?.images().cloned().collect()
            }
        };
        progress.phase("repairing", 2 * member.stat.length);
        let job = Job { progress, cancel, pace: &site.pace, tolerant: true };
        Ok(Self { store, name, manifest, lower, own, request, job, twins: OnceCell::new() })
    }

    /// The file to start from: the member's own, or one that has the right header and tables.
    fn base(&self) -> Result<Base> {
        if let Some(image) = &self.own {
            return Ok(Base { image: image.clone(), foreign: false });
        }
        let copy = self.twins().iter().find(|(_, taken)| taken.start == self.manifest.start_blake3);
        if let Some((image, _)) = copy {
            return Ok(Base { image: (*image).clone(), foreign: true });
        }
        let message = "its header or tables are damaged, and none of the sources is a copy of its very file";
        Err(OpError::Refused {
            code: Code::MetadataDamaged,
            member: self.name.clone(),
            message: message.to_owned(),
        })
    }

    /// The sources that have the member's very tables: what they store lies where it does in the member's file.
    fn twins(&self) -> &[(&'a Image, Fingerprint)] {
        self.twins.get_or_init(|| {
            let images = self.request.sources.iter().filter_map(Source::image);
            let judged = images.filter_map(|image| {
                let (_, taken) = fingerprint(image, &Limits::default()).ok()?;
                Some((image, taken.filter(|taken| is_right(&self.manifest, taken))?))
            });
            judged.collect()
        })
    }

    /// Refuses if there is less room than the new file takes: all of it, or just the bad blocks where it shares the
    /// extents of the old one.
    fn need_room(&self, key: &Key, base: &Base, bad: u64) -> Result<()> {
        let backend = self.store.backend().as_ref();
        let failed = |source| StoreError::backend(self.store, source);
        let yard = Yard::of(backend, &key.path).map_err(failed)?;
        let shares = !base.foreign && backend.probe(&yard.temporaries()).map_err(failed)?.clone;
        let copied = if shares { 0 } else { base.image.file_length() };
        let needed_bytes = copied.saturating_add(bad.saturating_mul(BLOCK_BYTES));
        let free_bytes = backend.space().map_err(failed)?.free_bytes;
        if free_bytes < needed_bytes {
            return Err(OpError::NoSpace { store: backend.describe(), free_bytes, needed_bytes });
        }
        Ok(())
    }

    fn table(&self) -> Result<LeafFile> {
        Ok(leaves::open(self.store, &self.name, &self.manifest.leaves)?)
    }

    /// The blocks that are not what they were.
    fn bad(&self, chain: &OpenChain) -> Result<Vec<u64>> {
        let all = vec![std::iter::once(0..block_count(self.manifest.virtual_bytes)).collect()];
        Ok(compare(chain, &mut Expected::Same(self.table()?), &all, None, &self.job)?.bad)
    }

    /// The right bytes of a block, and where they are.
    fn find(&self, table: &mut LeafFile, block: u64) -> Result<(String, Vec<u8>)> {
        let failed = |source| StoreError::Leaves { member: self.name.clone(), source };
        let mut bytes = vec![0; BLOCK_LENGTH];
        if table.stretch(block).map_err(failed)?.says != Says::Leaf {
            return Ok(("zeros".to_owned(), bytes));
        }
        let wanted = table.leaf(block).map_err(failed)?;
        for source in &self.request.sources {
            if source.read(block * BLOCK_BYTES, &mut bytes) && leaf(&bytes) == wanted {
                return Ok((source.name().to_owned(), bytes));
            }
        }
        let at = block * BLOCK_BYTES;
        let message = format!("none of the sources has the block at {at}; nothing was changed");
        Err(OpError::Refused { code: Code::DataDamaged, member: self.name.clone(), message })
    }

    /// Writes a block where the image has it.
    fn patch(&self, image: &Image, to: &dyn StoreFile, block: u64, bytes: &[u8]) -> Result<()> {
        let (start, end) = (block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
        let failed = |source| StoreError::backend(self.store, source);
        for extent in image.extents(GuestOffset(start)) {
            let extent = extent?;
            if extent.start.0 >= end {
                break;
            }
            let (from, until) = (extent.start.0.max(start), extent.end().0.min(end));
            match extent.kind {
                ExtentKind::Below | ExtentKind::Zero => {}
                ExtentKind::Data { host } => {
                    let at = host.0 + (from - extent.start.0);
                    let range = usize::try_from(from - start).unwrap_or(0)
                        ..usize::try_from(until - start).unwrap_or(0);
                    to.write_at(at, bytes.get(range).unwrap_or_default()).map_err(failed)?;
                }
                ExtentKind::Compressed(cluster) => {
                    // Only the same stored bytes are the same in the file.
                    let length = cluster.stored_bytes.min(image.file_length().saturating_sub(cluster.host.0));
                    let mut stored = vec![0; usize::try_from(length).unwrap_or_default()];
                    let mut twins = self.twins().iter();
                    if twins.any(|(twin, _)| twin.read_data(cluster.host, &mut stored).is_ok()) {
                        to.write_at(cluster.host.0, &stored).map_err(failed)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Holds the new file against all that is known, and writes its manifest.
    fn prove(&self, file: &std::sync::Arc<dyn StoreFile>) -> Result<()> {
        let refused = |code: Code, message: &str| {
            let message = format!("the new file was thrown away: {message}");
            OpError::Refused { code, member: self.name.clone(), message }
        };
        let image = Image::open(std::sync::Arc::clone(file), &format!("the new file of {}", self.name))?;
        let (report, taken) = fingerprint(&image, &Limits::default())?;
        let right = |taken: &Fingerprint| !report.is_damaged() && is_right(&self.manifest, taken);
        let Some(taken) = taken.filter(right) else {
            return Err(refused(Code::MetadataDamaged, "its header or tables are not what they were"));
        };
        let chain = OpenChain::of(std::iter::once(image.clone()).chain(self.lower.iter().cloned()).collect());
        let bad = self.bad(&chain)?;
        if let Some(block) = bad.first() {
            let message = format!(
                "{} blocks, the first at {}, could not be written right: compressed ones need a copy of the very file, \
                 and those that show a damaged parent need that one repaired first",
                bad.len(),
                block * BLOCK_BYTES
            );
            return Err(refused(Code::DataDamaged, &message));
        }
        let stat = file.stat().map_err(|source| StoreError::backend(self.store, source))?;
        let manifest = Manifest {
            file: FileMark::from(&stat),
            start_blake3: taken.start,
            qcow2: image.header().into(),
            file_blake3: None,
            quarantine: None,
            ..self.manifest.clone()
        };
        Ok(shelf::write_beside(self.store, &manifest)?)
    }
}

/// Whether metadata is what it was.
fn is_right(manifest: &Manifest, taken: &Fingerprint) -> bool {
    taken.meta == manifest.meta_blake3
}
