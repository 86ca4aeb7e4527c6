//! One member, adopted: read, hashed, bound to its parent, written down.

use super::{Context, Step};
use crate::backend::Stat;
use crate::chain::graph::NodeId;
use crate::digest::block_count;
use crate::digest::view::view_digest;
use crate::failure::{Code, Failure as _, Severity};
use crate::ids::Digest;
use crate::ops::{OpError, Result};
use crate::qcow2::Image;
use crate::qcow2::check::Limits;
use crate::qcow2::fingerprint::{Fingerprint, fingerprint};
use crate::store::chain::OpenChain;
use crate::store::manifest::leaves::{self, LeafError, LeafFile, LeafSink};
use crate::store::manifest::reads::{self, Reads};
use crate::store::manifest::shelf::{self, Known};
use crate::store::manifest::{Binding, FileMark, ImageFacts, Manifest, TableMark, stem};
use crate::store::measure::{Part, WholeFile, measure};
use crate::store::{Store, StoreError};

/// A member whose manifest is in force.
pub(super) struct Taken {
    pub manifest: Manifest,
    pub leaves: LeafFile,
    /// Whether this run wrote the manifest.
    pub new: bool,
}

/// What reading a member gave.
struct Measured {
    fingerprint: Fingerprint,
    table: TableMark,
    file_blake3: Option<Digest>,
    stat: Stat,
    facts: ImageFacts,
}

impl Context<'_> {
    /// Makes the manifest of a member be in force. `path` are its ancestors, all adopted, base first.
    pub(super) fn take(&self, id: NodeId, known: &Known, path: &mut [Step]) -> Result<Taken> {
        let key = &self.scan.graph.node(id).key;
        let name = self.stores.display(key);
        let store = self.stores.get(key.store)?;
        let parent = path.last().and_then(|step| step.known.as_ref());
        let parent = parent.map(|(manifest, _)| Binding {
            member: manifest.member.clone(),
            id: manifest.id.clone(),
            digest: manifest.view_digest,
        });
        if let Some(manifest) = known.current() {
            if let Some(quarantine) = manifest.quarantine.as_ref().filter(|_| !self.request.accept_changed) {
                let message = format!("it was found damaged: {}", quarantine.message);
                return Err(OpError::Refused { code: Code::Quarantined, member: name, message });
            }
            if let Ok(leaves) = leaves::open(store, &name, &manifest.leaves)
                && manifest.quarantine.is_none()
            {
                match self.bind(id, manifest, parent.clone(), leaves, path) {
                    // Blocks that it decides in part show what lies below: they are others now.
                    Err(error) if error.code() == Code::ParentChanged && self.request.accept_changed => {}
                    bound => {
                        self.job.progress.advance(manifest.file.length);
                        return bound;
                    }
                }
            }
        }
        let measured = self.measure(id, store)?;
        let mut leaves = leaves::open(store, &name, &measured.table)?;
        let digest = digest_over(&mut leaves, path)
            .map_err(|source| StoreError::Leaves { member: name.clone(), source })?;
        let before = match known {
            Known::Current(manifest) | Known::Changed(manifest) => Some(manifest),
            Known::Nothing | Known::Damaged(_) => None,
        };
        if let Some(before) = before
            && before.view_digest != digest
            && !self.request.accept_changed
        {
            let message = format!(
                "its view digest is {digest}; it was {} when it was adopted, and somebody has changed it since",
                before.view_digest
            );
            return Err(OpError::Refused { code: Code::ChangedSinceAdoption, member: name, message });
        }
        let manifest = Manifest {
            member: key.path.clone(),
            id: before.map_or_else(|| uuid::Uuid::new_v4().simple().to_string(), |before| before.id.clone()),
            tree: self.tree_id(id)?,
            file: FileMark::from(&measured.stat),
            virtual_bytes: leaves.shape().virtual_size,
            file_blake3: measured.file_blake3,
            meta_blake3: measured.fingerprint.meta,
            start_blake3: measured.fingerprint.start,
            parent,
            view_digest: digest,
            leaves: measured.table,
            qcow2: measured.facts,
            made_ns: self.request.now_ns,
            quarantine: None,
            replica: before.and_then(|before| before.replica.clone()),
        };
        self.write(store, &manifest)?;
        Ok(Taken { manifest, leaves, new: true })
    }

    /// A member whose file is known: only its parent may be another one than it was.
    fn bind(
        &self,
        id: NodeId,
        manifest: &Manifest,
        parent: Option<Binding>,
        mut leaves: LeafFile,
        path: &mut [Step],
    ) -> Result<Taken> {
        if manifest.parent == parent {
            return Ok(Taken { manifest: manifest.clone(), leaves, new: false });
        }
        let key = &self.scan.graph.node(id).key;
        let name = self.stores.display(key);
        let digest = digest_over(&mut leaves, path)
            .map_err(|source| StoreError::Leaves { member: name.clone(), source })?;
        if digest != manifest.view_digest {
            let message = format!(
                "under its parent of today its view digest is {digest}; it was {} when it was adopted",
                manifest.view_digest
            );
            return Err(OpError::Refused { code: Code::ParentChanged, member: name, message });
        }
        let manifest =
            Manifest { parent, view_digest: digest, made_ns: self.request.now_ns, ..manifest.clone() };
        self.write(self.stores.get(key.store)?, &manifest)?;
        Ok(Taken { manifest, leaves, new: true })
    }

    /// Checks the structure, reads all that the member decides, and writes its table.
    fn measure(&self, id: NodeId, store: &Store) -> Result<Measured> {
        let key = &self.scan.graph.node(id).key;
        let name = self.stores.display(key);
        let chain = OpenChain::of_member(self.stores, self.scan, id)?;
        let Some(image) = chain.images().next() else { return Err(StoreError::NotFound { name }.into()) };
        let changed = || OpError::Refused {
            code: Code::ChangedMeanwhile,
            member: name.clone(),
            message: "it was changed or replaced by somebody else meanwhile".to_owned(),
        };
        let stat = |image: &Image| image.file().stat().map_err(|source| StoreError::backend(store, source));
        let before = stat(image)?;
        if self.scan.member(id).is_none_or(|member| FileMark::from(&member.stat) != FileMark::from(&before)) {
            return Err(changed());
        }
        let (report, taken) = fingerprint(image, &Limits::default())?;
        let Some(taken) = taken.filter(|_| !report.is_damaged()) else {
            let first = report.findings.iter().find(|finding| finding.code.severity() == Severity::Error);
            let (code, message) = first
                .map_or((Code::Unsupported, "it is too large to be checked".to_owned()), |first| {
                    (first.code, first.message.clone())
                });
            return Err(OpError::Refused { code, member: name, message });
        };
        let size = image.header().virtual_size;
        let failed = |source| OpError::from(StoreError::Leaves { member: name.clone(), source });
        let mut sink = LeafSink::create(store.backend().as_ref(), size).map_err(failed)?;
        let mut whole = WholeFile::default();
        let all = 0..block_count(size);
        measure(&chain, std::slice::from_ref(&all), &self.job, Some(&mut whole), |part| match part {
            Part::Zeros { first, count } => sink.zeros(first, count).map_err(failed),
            Part::Leaves { first, leaves } => sink.leaves(first, leaves).map_err(failed),
        })?;
        let named = store.backend().stat(&key.path).map_err(|source| StoreError::backend(store, source))?;
        let after = stat(image)?;
        if FileMark::from(&after) != FileMark::from(&before)
            || FileMark::from(&named) != FileMark::from(&before)
        {
            return Err(changed());
        }
        let table = sink.finish(&stem(&key.path)).map_err(failed)?;
        Ok(Measured {
            fingerprint: taken,
            table,
            file_blake3: whole.digest,
            stat: after,
            facts: image.header().into(),
        })
    }

    /// Writes a manifest, and that all of it was just read.
    fn write(&self, store: &Store, manifest: &Manifest) -> Result<()> {
        shelf::write(store, manifest)?;
        let reads = Reads::whole(block_count(manifest.virtual_bytes), self.request.now_ns);
        reads::save(store.backend().as_ref(), &manifest.member, manifest.file.inode, &reads)
            .map_err(|source| StoreError::backend(store, source))?;
        Ok(())
    }
}

/// The view digest of a member with that table, over those of its ancestors.
fn digest_over(leaves: &mut LeafFile, path: &mut [Step]) -> std::result::Result<Digest, LeafError> {
    let below = path.iter_mut().rev().filter_map(|step| step.known.as_mut().map(|(_, leaves)| leaves));
    let mut layers: Vec<&mut LeafFile> = std::iter::once(leaves).chain(below).collect();
    view_digest(&mut layers)
}
