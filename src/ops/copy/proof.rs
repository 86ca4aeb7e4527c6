//! The sealed file, parsed again: what it holds where, what its view is, its manifest, its name.

use super::arrival::Arrival;
use super::need::{Need, Tables};
use super::offer::LineMember;
use super::{Below, Run};
use crate::backend::BackendError;
use crate::change::{Lease, tree};
use crate::digest::block_count;
use crate::digest::view::{Seen, view_digest};
use crate::failure::Code;
use crate::ids::Digest;
use crate::ops::{OpError, Result};
use crate::qcow2::Image;
use crate::qcow2::check::Limits;
use crate::qcow2::fingerprint::{Fingerprint, fingerprint};
use crate::qcow2::layout::Backing;
use crate::qcow2::layout::canonical::Canonical;
use crate::qcow2::layout::placed::misplaced;
use crate::store::StoreError;
use crate::store::chain::OpenChain;
use crate::store::manifest::leaves::{self, LeafFile, LeafSink};
use crate::store::manifest::reads::{self, Reads};
use crate::store::manifest::shelf;
use crate::store::manifest::{FileMark, Manifest, Replica, TableMark, stem};
use crate::store::measure::{Part, decided, measure};

/// How much of an image's tables is hashed at once.
const STEP_BYTES: u64 = 1 << 20;

/// What was made.
pub(super) struct Made<'a> {
    pub one: &'a LineMember,
    pub layout: &'a Canonical,
    pub backing: Option<&'a Backing>,
    pub what: &'a str,
    pub need: &'a Need,
}

/// Digits that two layouts have in common only if all is in the same place in both.
pub(super) fn shape(layout: &Canonical) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = Vec::new();
    let mut at = 0;
    while at < layout.metadata_bytes() {
        let step = STEP_BYTES.min(layout.metadata_bytes() - at);
        buffer.resize(usize::try_from(step).unwrap_or_default(), 0);
        buffer.fill(0);
        layout.metadata(at, &mut buffer);
        hasher.update(&buffer);
        at += step;
    }
    hasher.finalize().to_hex().get(..16).unwrap_or_default().to_owned()
}

/// Proves the sealed file and writes down what is known of it; gives that, and the file as an image.
///
/// # Errors
///
/// `proof-failed`; with `--read`, `data-damaged` if it does not read as it was written.
pub(super) fn attest(
    run: &Run<'_>,
    arrival: &Arrival<'_>,
    made: &Made<'_>,
    tables: &mut Tables<'_>,
    below: &Below,
) -> Result<(Manifest, Image)> {
    let store = run.to.site.stores.get(run.to.store)?;
    let shown = run.display(&arrival.target);
    let failed = |source| StoreError::Leaves { member: shown.clone(), source };
    let image = Image::open(arrival.reopen(made.what)?, &shown)?;
    let taken = prove(made, &image, &shown)?;
    let table = table(store, &shown, arrival, &image, tables)?;
    let mut own = leaves::open(store, &shown, &table)?;
    let digest = {
        let alone = run.request.flatten;
        let lower = tables.below.iter_mut().rev().filter(|_| !alone);
        let mut layers: Vec<&mut LeafFile> = std::iter::once(&mut own).chain(lower).collect();
        view_digest(&mut layers).map_err(failed)?
    };
    if digest != made.one.view_digest {
        return Err(unproved(&shown, &format!("its view digest is {digest}")));
    }
    let read = run.request.read;
    if read {
        read_back(run, &image, &mut own, below, &shown)?;
    }
    let stat = image.file().stat().map_err(|source| StoreError::backend(store, source))?;
    let root = below.keys.first().filter(|_| made.backing.is_some());
    let tree = match root {
        Some(root) => tree::find(run.to.site.stores.get(root.store)?.backend(), &root.path)?,
        None => None,
    };
    let now_ns = run.to.site.clock.wall_ns();
    let manifest = Manifest {
        member: arrival.target.clone(),
        id: uuid::Uuid::new_v4().simple().to_string(),
        tree: tree.map(|tree| tree.to_string()),
        file: FileMark::from(&stat),
        virtual_bytes: made.one.virtual_bytes,
        file_blake3: None,
        meta_blake3: taken.meta,
        start_blake3: taken.start,
        parent: below.binding().filter(|_| made.backing.is_some()),
        view_digest: digest,
        leaves: table,
        qcow2: image.header().into(),
        made_ns: now_ns,
        quarantine: None,
        replica: Some(Replica { from: run.peer.name().to_owned(), member: made.one.name.clone() }),
    };
    shelf::write_beside(store, &manifest)?;
    let reads =
        if read { Reads::whole(block_count(made.one.virtual_bytes), now_ns) } else { Reads::default() };
    reads::save(store.backend().as_ref(), &manifest.member, manifest.file.inode, &reads)
        .map_err(|source| StoreError::backend(store, source))?;
    Ok((manifest, image))
}

/// Gives the proved file its name, if what it stands on is still there with that view.
///
/// A lease keeps others from merging that away meanwhile; but whoever is stopped for longer than it lasts does not know. So
/// what it stands on is looked at once more when the name is given, and the name is taken back if it is not what it was. A merge in
/// turn looks for readers when its member has gone: one of both sees the other.
///
/// # Errors
///
/// `changed-meanwhile`: the name is free, or somebody else's.
///
/// # After a crash
///
/// The name is free, or stands for the file with its manifest in force. Only if what it stands on went in that very moment is
/// it there without it: `verify` says so, and an undo of that merge brings it back.
pub(super) fn publish(
    run: &Run<'_>,
    arrival: &Arrival<'_>,
    made: &Made<'_>,
    manifest: &Manifest,
    below: &Below,
) -> Result<()> {
    let site = run.to.site;
    let store = site.stores.get(run.to.store)?;
    run.work.cancel.check()?;
    let stands = made.backing.is_some();
    // Nobody merges what it stands on away in this very moment.
    let mut _lease = None;
    if stands && let Some(root) = below.keys.first() {
        if let Some(tree) = tree::find(site.stores.get(root.store)?.backend(), &root.path)? {
            _lease = Some(Lease::take(site, root.store, &tree)?);
        }
        is_there(run, below)?;
    }
    arrival.check()?;
    arrival.name(made.what)?;
    if stands && let Err(error) = is_there(run, below) {
        arrival.take_back(manifest.file.inode)?;
        return Err(error);
    }
    // A sweep that saw the manifest without its member took it for forgotten.
    if shelf::read(store, &manifest.member, manifest.file.inode)?.is_none() {
        shelf::write(store, manifest)?;
    }
    Ok(())
}

/// Whether the member that a new one stands on has its name, and the view that the new one was made for.
fn is_there(run: &Run<'_>, below: &Below) -> Result<()> {
    let stores = run.to.site.stores;
    let (Some(parent), Some(known)) = (below.keys.last(), below.manifests.last()) else { return Ok(()) };
    let home = stores.get(parent.store)?;
    let changed = |what: &str| OpError::Refused {
        code: Code::ChangedMeanwhile,
        member: stores.display(parent),
        message: format!("it {what} while a member came that stands on it"),
    };
    let stat = match home.backend().stat(&parent.path) {
        Ok(stat) => stat,
        Err(BackendError::NotFound { .. }) => return Err(changed("went away")),
        Err(source) => return Err(StoreError::backend(home, source).into()),
    };
    match shelf::current(home, &parent.path, &stat)? {
        Some(now) if now.view_digest == known.view_digest => Ok(()),
        _ => Err(changed("became another one")),
    }
}

fn unproved(shown: &str, what: &str) -> OpError {
    let message = format!("the new file was not given its name: {what}");
    StoreError::Proof { member: shown.to_owned(), message }.into()
}

/// Sound, and each unit where it was planned, and nothing else.
fn prove(made: &Made<'_>, image: &Image, shown: &str) -> Result<Fingerprint> {
    let Made { layout, backing, one, .. } = *made;
    let (report, taken) = fingerprint(image, &Limits::default())?;
    let sound = !report.is_damaged() && report.leaked_clusters == 0 && !report.incomplete;
    let Some(taken) = taken.filter(|_| sound) else {
        return Err(unproved(shown, "its structure is not sound"));
    };
    let header = image.header();
    let name = header.backing.as_ref().map(|backing| (&backing.name, backing.format.as_deref()));
    let wanted = backing.map(|backing| (&backing.name, Some(backing.format.as_str())));
    if name != wanted || header.virtual_size != one.virtual_bytes {
        return Err(unproved(shown, "its header is not what was planned"));
    }
    if let Some(what) = misplaced(layout, image)? {
        return Err(unproved(shown, what));
    }
    if made.need.units.len() != layout.units().len() {
        return Err(unproved(shown, "it has other units than are needed"));
    }
    Ok(taken)
}

/// The leaf table of the new file: of the blocks that it decides, as its view has them.
fn table(
    store: &crate::store::Store,
    shown: &str,
    arrival: &Arrival<'_>,
    image: &Image,
    tables: &mut Tables<'_>,
) -> Result<TableMark> {
    let size = image.header().virtual_size;
    let failed = |source| StoreError::Leaves { member: shown.to_owned(), source };
    let mut sink = LeafSink::create(store.backend().as_ref(), size).map_err(failed)?;
    for one in decided(image, 0..block_count(size))? {
        tables
            .decided(one.first, one.count, |block, seen| match seen {
                Seen::Zeros(count) => sink.zeros(block, count),
                Seen::Leaf(leaf) => sink.leaves(block, &[leaf]),
            })
            .map_err(failed)?;
    }
    Ok(sink.finish(&stem(&arrival.target)).map_err(failed)?)
}

/// Reads what the new file decides from the store, and holds it against its leaves.
fn read_back(run: &Run<'_>, image: &Image, own: &mut LeafFile, below: &Below, shown: &str) -> Result<()> {
    // Best effort: what comes from memory proves less.
    let _ = image.file().drop_cache();
    let alone = run.request.flatten;
    let lower = below.images.iter().rev().filter(|_| !alone).cloned();
    let chain = OpenChain::of(std::iter::once(image.clone()).chain(lower).collect());
    let all = 0..block_count(image.header().virtual_size);
    let job = run.work.job();
    let mut bad: Option<u64> = None;
    measure::<OpError>(&chain, std::slice::from_ref(&all), &job, None, |part| {
        let Part::Leaves { first, leaves } = part else { return Ok(()) };
        for (block, found) in (first..).zip(leaves) {
            if expected(own, block, shown)? != *found {
                bad.get_or_insert(block);
            }
        }
        Ok(())
    })?;
    match bad {
        None => Ok(()),
        Some(block) => {
            let message = format!("block {block} of the new file does not read as it was written");
            Err(StoreError::Damaged { code: Code::DataDamaged, member: shown.to_owned(), message }.into())
        }
    }
}

fn expected(own: &mut LeafFile, block: u64, shown: &str) -> Result<Digest> {
    use crate::digest::view::{Leaves as _, Says};
    let failed = |source| StoreError::Leaves { member: shown.to_owned(), source };
    Ok(match own.stretch(block).map_err(failed)?.says {
        Says::Leaf => own.leaf(block).map_err(failed)?,
        Says::Zeros | Says::Nothing => crate::digest::zero_leaf(),
    })
}
