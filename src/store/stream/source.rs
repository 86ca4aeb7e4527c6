//! A member's chain, opened, and what is known of its bytes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use crate::backend::FileId;
use crate::chain::graph::{Key, NodeId};
use crate::digest::view::{Seen, walk};
use crate::digest::{TreeBuilder, block_count, zero_leaf};
use crate::failure::Code;
use crate::ids::Digest;
use crate::qcow2::check::Limits;
use crate::qcow2::fingerprint::fingerprint;
use crate::qcow2::layout::canonical::{Filled, Form};
use crate::qcow2::layout::hostset::HostSet;
use crate::qcow2::{Content, Image, ImageError};
use crate::store::Stores;
use crate::store::chain::OpenChain;
use crate::store::compare::blame;
use crate::store::error::{Result, StoreError};
use crate::store::manifest::leaves::{self, LeafError, LeafFile};
use crate::store::manifest::shelf::{Known, Shelf};
use crate::store::manifest::{FileMark, Manifest};
use crate::store::scan::Scan;
use crate::store::stream::pins::Pins;
use crate::units::BLOCK_BYTES;

/// A member and all below it, opened.
#[derive(Debug)]
pub struct Source {
    chain: OpenChain,
    /// What the members are called, and their stores, newest first.
    names: Vec<String>,
    keys: Vec<Key>,
    /// Which files they are, and which versions of them.
    stamps: Vec<(FileId, FileMark)>,
    known: Option<Leaves>,
    /// Why not all of it is known.
    missing: Option<String>,
    forced: bool,
    _pins: Pins,
}

/// The leaf tables of all members, newest first, and the digest of the view.
#[derive(Debug)]
struct Leaves {
    tables: Mutex<Vec<LeafFile>>,
    manifests: Vec<Manifest>,
    digest: Digest,
}

impl Source {
    /// Opens a scanned member. All files are opened before anything is read, and nothing is merged into one of them as
    /// long as this is there (see `pins.rs`).
    ///
    /// With `force`, members in quarantine are taken, and nothing is held against what is known.
    ///
    /// # Errors
    ///
    /// `quarantined` for a member that was found damaged; `parent-changed` if what is known of the members does not
    /// fit together; as [`OpenChain::of_member`].
    pub fn open(stores: &Stores, scan: &Scan, id: NodeId, force: bool) -> Result<Self> {
        let chain = OpenChain::of_member(stores, scan, id)?;
        chain.announce_tables();
        let line: Vec<NodeId> =
            std::iter::once(id).chain(scan.graph.ancestors(id).unwrap_or_default()).collect();
        let keys: Vec<Key> = line.iter().map(|id| scan.graph.node(*id).key.clone()).collect();
        // Before it is noted what they are: from here on they stay that.
        let pins = Pins::hold(&chain);
        let names: Vec<String> = keys.iter().map(|key| stores.display(key)).collect();
        let stamps = chain.images().map(stamp).collect::<Result<Vec<_>>>()?;
        let mut source =
            Self { chain, names, keys, stamps, known: None, missing: None, forced: false, _pins: pins };
        source.learn(stores, scan, &line, force)?;
        Ok(source)
    }

    /// Looks up what is known of the members.
    fn learn(&mut self, stores: &Stores, scan: &Scan, line: &[NodeId], force: bool) -> Result<()> {
        let shelves = Shelf::load_all(stores)?;
        let (mut tables, mut found) = (Vec::new(), Vec::new());
        for ((id, name), image) in line.iter().zip(&self.names).zip(self.chain.images()) {
            let key = &scan.graph.node(*id).key;
            let store = stores.get(key.store)?;
            let stat = image.file().stat().map_err(|source| StoreError::backend(store, source))?;
            let known = match shelves.get(key.store) {
                Some(manifests) => manifests.find(store, &key.path, &stat)?,
                None => Known::Nothing,
            };
            if let Some(quarantine) = known.manifest().and_then(|manifest| manifest.quarantine.as_ref()) {
                if !force {
                    let message = format!(
                        "it was found damaged: {}; --force takes it all the same",
                        quarantine.message
                    );
                    return Err(StoreError::Damaged {
                        code: Code::Quarantined,
                        member: name.clone(),
                        message,
                    });
                }
                self.forced = true;
            }
            if force || self.missing.is_some() {
                continue;
            }
            match judge(known, image, name)? {
                Ok(manifest) => match leaves::usable(store, name, &manifest.leaves)? {
                    Ok(table) => {
                        tables.push(table);
                        found.push(*manifest);
                    }
                    Err(why) => self.missing = Some(why),
                },
                Err(why) => self.missing = Some(why),
            }
        }
        if force {
            self.missing = Some("it was forced".to_owned());
        }
        if self.missing.is_none()
            && let Some(digest) = found.first().map(|manifest| manifest.view_digest)
        {
            self.known = Some(Leaves { tables: Mutex::new(tables), manifests: found, digest });
        }
        Ok(())
    }

    /// What messages call the member.
    #[must_use]
    pub fn member(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// The chain, newest first.
    #[must_use]
    pub fn chain(&self) -> &OpenChain {
        &self.chain
    }

    /// Where the members lie, newest first.
    #[must_use]
    pub fn keys(&self) -> &[Key] {
        &self.keys
    }

    /// The size of the view in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.chain.virtual_size()
    }

    /// The view digest, if every member is adopted and is what it was.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.known.as_ref().map(|known| known.digest)
    }

    /// What is known of the members, newest first; nothing unless every member is adopted and is what it was.
    #[must_use]
    pub fn manifests(&self) -> &[Manifest] {
        self.known.as_ref().map_or(&[], |known| &known.manifests)
    }

    /// Why there is no digest.
    #[must_use]
    pub fn missing(&self) -> Option<&str> {
        self.missing.as_deref()
    }

    /// Whether a member in quarantine was taken.
    #[must_use]
    pub fn is_forced(&self) -> bool {
        self.forced
    }

    /// The files of the members.
    pub fn files(&self) -> impl Iterator<Item = FileId> {
        self.stamps.iter().map(|(id, _)| *id)
    }

    /// Asks that what was read of the members leave the memory; does what it can.
    pub fn drop_caches(&self) {
        for image in self.chain.images() {
            let _ = image.file().drop_cache();
        }
    }

    /// Fails if a member's file was written to since it was opened (`changed-meanwhile`): whoever read it may have seen
    /// neither the old nor the new.
    pub fn unchanged(&self) -> Result<()> {
        for ((image, was), name) in self.chain.images().zip(&self.stamps).zip(&self.names) {
            if stamp(image)? != *was {
                let detail = "it was written to while it was read".to_owned();
                let source = ImageError::Bad { image: name.clone(), code: Code::ChangedMeanwhile, detail };
                return Err(StoreError::Image { member: name.clone(), source });
            }
        }
        Ok(())
    }

    /// Fails if header or tables of an adopted member are not what they were: for whoever does not read the data.
    pub fn sound_metadata(&self) -> Result<()> {
        let Some(known) = &self.known else { return Ok(()) };
        let members: Vec<_> = self.chain.images().zip(&known.manifests).zip(&self.names).collect();
        members.into_par_iter().with_max_len(1).try_for_each(|((image, manifest), name)| {
            if fingerprint_of(image, name)? != Some(manifest.meta_blake3) {
                let message = "its header or tables changed, although nothing wrote to the file".to_owned();
                return Err(StoreError::Damaged {
                    code: Code::MetadataDamaged,
                    member: name.clone(),
                    message,
                });
            }
            Ok(())
        })
    }

    fn tables(known: &Leaves) -> MutexGuard<'_, Vec<LeafFile>> {
        known.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, source: LeafError) -> StoreError {
        StoreError::Leaves { member: self.member().to_owned(), source }
    }

    /// Which units of the view hold something: by the leaves, or by the map where a member is not adopted.
    pub fn units(&self, form: Form) -> Result<HostSet> {
        let size = self.virtual_size();
        let mut filled = Filled::new(size, form);
        let Some(known) = &self.known else {
            for run in self.chain.map() {
                let run =
                    run.map_err(|source| StoreError::Image { member: self.member().to_owned(), source })?;
                if matches!(run.content, Content::Data { .. } | Content::Compressed { .. }) {
                    filled.add(run.start.0, run.end().0);
                }
            }
            return Ok(filled.finish());
        };
        let mut tree = TreeBuilder::new();
        walk(&mut Self::tables(known), 0, block_count(size), |block, seen| {
            match seen {
                Seen::Leaf(leaf) if leaf != zero_leaf() => {
                    tree.push_leaf(leaf);
                    filled.add(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
                }
                Seen::Leaf(leaf) => tree.push_leaf(leaf),
                Seen::Zeros(count) => tree.push_zero_blocks(count),
            }
            Ok(())
        })
        .map_err(|source| self.failed(source))?;
        if tree.finish(size) != known.digest {
            let message =
                "what is known of it does not fit what is known of the members below: adopt it again"
                    .to_owned();
            return Err(StoreError::Damaged {
                code: Code::ParentChanged,
                member: self.member().to_owned(),
                message,
            });
        }
        Ok(filled.finish())
    }

    /// The leaves of neighbouring blocks of the view; `None` while a member is not adopted.
    pub fn leaves(&self, first: u64, count: u64) -> Result<Option<Vec<Digest>>> {
        let Some(known) = &self.known else { return Ok(None) };
        let mut leaves = Vec::with_capacity(usize::try_from(count).unwrap_or_default());
        let end = first.saturating_add(count).min(block_count(self.virtual_size()));
        walk(&mut Self::tables(known), first, end, |_, seen| {
            match seen {
                Seen::Leaf(leaf) => leaves.push(leaf),
                Seen::Zeros(count) => {
                    leaves
                        .extend(std::iter::repeat_n(zero_leaf(), usize::try_from(count).unwrap_or_default()));
                }
            }
            Ok(())
        })
        .map_err(|source| self.failed(source))?;
        Ok(Some(leaves))
    }

    /// What to say of a block whose bytes are not what they were: the lowest member of which that can be said is to
    /// blame.
    #[must_use]
    pub fn blame(&self, block: u64) -> StoreError {
        let layer =
            self.known.as_ref().map_or(Ok(0), |known| blame(&self.chain, &mut Self::tables(known), block));
        let member = self.names.get(layer.unwrap_or(0)).map_or("", String::as_str);
        let at = block * BLOCK_BYTES;
        let message = format!("its bytes at guest offset {at} are not what they were when it was adopted");
        StoreError::Damaged { code: Code::DataDamaged, member: member.to_owned(), message }
    }
}

/// A hard link that a change makes is no other version: the time of last change of the bytes counts.
fn stamp(image: &Image) -> Result<(FileId, FileMark)> {
    let member = image.name().to_owned();
    match image.file().stat() {
        Ok(stat) => Ok((stat.id, FileMark::from(&stat))),
        Err(source) => {
            Err(StoreError::Image { source: ImageError::Store { image: member.clone(), source }, member })
        }
    }
}

/// Over all that says where the image's bytes are; `None` if it is too large to be told.
fn fingerprint_of(image: &Image, name: &str) -> Result<Option<Digest>> {
    let (_, taken) = fingerprint(image, &Limits::default())
        .map_err(|source| StoreError::Image { member: name.to_owned(), source })?;
    Ok(taken.map(|taken| taken.meta))
}

/// The manifest that holds for a member, or why there is none. One whose file was touched holds as long as its tables
/// are what they were: then the bytes must be, too.
fn judge(known: Known, image: &Image, name: &str) -> Result<std::result::Result<Box<Manifest>, String>> {
    Ok(match known {
        Known::Current(manifest) => Ok(manifest),
        Known::Changed(manifest) if fingerprint_of(image, name)? == Some(manifest.meta_blake3) => {
            Ok(manifest)
        }
        Known::Changed(_) => Err(format!("{name} was changed since it was adopted")),
        Known::Nothing => Err(format!("{name} is not adopted")),
        Known::Damaged(_) => Err(format!("the manifest of {name} is damaged")),
    })
}
