//! All manifests of one store: found by member, written, swept.

use std::collections::{BTreeMap, BTreeSet};

use crate::backend::publish::replace;
use crate::backend::{Backend, BackendError, FileKind, Stat};
use crate::chain::graph::NodeId;
use crate::ids::StorePath;
use crate::store::error::{Result, StoreError};
use crate::store::facts::read_whole;
use crate::store::manifest::{FileMark, MAX_BYTES, Manifest, leaves, parse_name, path, reads, stem};
use crate::store::record::own;
use crate::store::scan::Scan;
use crate::store::{Store, Stores};

/// What is known of a member's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known {
    /// Nothing: it was never adopted.
    Nothing,
    /// It is the very file that was adopted, or that a merge of adopted ones made.
    Current(Box<Manifest>),
    /// Something has written to the file, or put another one there, since.
    Changed(Box<Manifest>),
    /// There is a manifest, and it cannot be read: what is wrong with it.
    Damaged(String),
}

impl Known {
    /// The manifest, if it is in force.
    #[must_use]
    pub fn current(&self) -> Option<&Manifest> {
        match self {
            Self::Current(manifest) => Some(manifest),
            Self::Nothing | Self::Changed(_) | Self::Damaged(_) => None,
        }
    }

    /// What the member was when it was adopted.
    #[must_use]
    pub fn manifest(&self) -> Option<&Manifest> {
        match self {
            Self::Current(manifest) | Self::Changed(manifest) => Some(manifest),
            Self::Nothing | Self::Damaged(_) => None,
        }
    }
}

/// Which manifests a store has, when it was listed.
#[derive(Clone, Debug, Default)]
pub struct Shelf {
    inodes: BTreeMap<String, Vec<u64>>,
}

impl Shelf {
    /// Lists them; none where there is no such directory, or it is not for this user.
    pub fn load(store: &Store) -> Result<Self> {
        let entries = match store.backend().read_dir(&own(&["manifests"])) {
            Ok(entries) => entries,
            Err(BackendError::NotFound { .. }) => Vec::new(),
            Err(error) if error.is_denied() => Vec::new(),
            Err(source) => return Err(StoreError::backend(store, source)),
        };
        let mut inodes: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for entry in entries.iter().filter(|entry| entry.kind == FileKind::File) {
            if let Some((stem, inode)) = entry.name.as_deref().ok().and_then(parse_name) {
                inodes.entry(stem.to_owned()).or_default().push(inode);
            }
        }
        Ok(Self { inodes })
    }

    /// Those of all stores, by index.
    pub fn load_all(stores: &Stores) -> Result<Vec<Self>> {
        stores.iter().map(|(_, store)| Self::load(store)).collect()
    }

    /// Whether there is a manifest of that file of a member.
    #[must_use]
    pub fn has(&self, member: &StorePath, inode: u64) -> bool {
        self.inodes.get(&stem(member)).is_some_and(|inodes| inodes.contains(&inode))
    }

    /// What is known of a member whose name stands for the file `stat`.
    pub fn find(&self, store: &Store, member: &StorePath, stat: &Stat) -> Result<Known> {
        let Some(inodes) = self.inodes.get(&stem(member)) else { return Ok(Known::Nothing) };
        let mut damaged = None;
        let mut latest: Option<Manifest> = None;
        // That of the file itself first.
        let own = |inode: &&u64| **inode == stat.id.inode;
        for inode in inodes.iter().filter(own).chain(inodes.iter().filter(|inode| !own(inode))) {
            match read(store, member, *inode)? {
                Some(Ok(manifest)) if manifest.file == FileMark::from(stat) => {
                    return Ok(Known::Current(Box::new(manifest)));
                }
                Some(Ok(manifest))
                    if latest.as_ref().is_none_or(|latest| latest.made_ns < manifest.made_ns) =>
                {
                    latest = Some(manifest);
                }
                Some(Err(detail)) => damaged = Some(detail),
                Some(Ok(_)) | None => {}
            }
        }
        Ok(match (latest, damaged) {
            (Some(manifest), _) => Known::Changed(Box::new(manifest)),
            (None, Some(detail)) => Known::Damaged(detail),
            (None, None) => Known::Nothing,
        })
    }

    /// The members of manifests whose stems are not among those given.
    pub fn others(&self, store: &Store, stems: &BTreeSet<String>) -> Result<Vec<StorePath>> {
        let mut members = Vec::new();
        for (stem, inodes) in self.inodes.iter().filter(|(stem, _)| !stems.contains(*stem)) {
            for inode in inodes {
                if let Some(Ok(manifest)) = read_named(store, stem, *inode)? {
                    members.push(manifest.member);
                    break;
                }
            }
        }
        Ok(members)
    }
}

/// The manifests and leaf tables of a store, listed to see which nothing can need.
#[derive(Debug)]
pub struct Sweep {
    shelf: Shelf,
    tables: Vec<String>,
}

impl Sweep {
    /// Lists them. Whether an operation is open is to be looked at after this: its files are listed only if it was
    /// announced before.
    pub fn list(store: &Store) -> Result<Self> {
        let tables = match store.backend().read_dir(&own(&["leaves"])) {
            Ok(entries) => entries.into_iter().filter_map(|entry| entry.name.ok()).collect(),
            Err(BackendError::NotFound { .. }) => Vec::new(),
            Err(source) => return Err(StoreError::backend(store, source)),
        };
        Ok(Self { shelf: Shelf::load(store)?, tables })
    }

    /// Removes what nothing can need: manifests, tables and notes of files that no name stands for any more, of members
    /// that are gone or have a manifest in force. `current` gives the file under a member's name. Only while no
    /// operation is open on any store, which might put an old file back. Tables that no manifest of the member names may
    /// be about to get one; `forgotten` says of one that this is not so.
    pub fn carry_out(
        &self,
        store: &Store,
        current: &dyn Fn(&StorePath) -> Result<Option<Stat>>,
        forgotten: &dyn Fn(&StorePath) -> bool,
    ) -> Result<u64> {
        let failed = |source| StoreError::backend(store, source);
        let backend = store.backend().as_ref();
        let mut wanted = BTreeSet::new();
        let mut removed = 0;
        for (stem, inodes) in &self.shelf.inodes {
            let (mut found, mut unreadable) = (Vec::new(), Vec::new());
            for inode in inodes {
                match read_named(store, stem, *inode)? {
                    Some(Ok(manifest)) => found.push((*inode, manifest)),
                    // Nothing refers to its table.
                    Some(Err(_)) => unreadable.push(*inode),
                    None => {}
                }
            }
            let Some(member) = found.first().map(|(_, manifest)| manifest.member.clone()) else { continue };
            let stat = current(&member)?;
            let is = |manifest: &Manifest| stat.is_some_and(|stat| manifest.file == FileMark::from(&stat));
            let in_force = found.iter().any(|(_, manifest)| is(manifest));
            for (inode, manifest) in found {
                if is(&manifest) || stat.is_some() && !in_force {
                    wanted.insert(manifest.leaves.name);
                    continue;
                }
                forget(backend, &member, inode).map_err(failed)?;
                removed += 1;
            }
            // Torn, of a file that was never published; one of the member's own file is told of.
            for inode in
                unreadable.into_iter().filter(|inode| stat.is_none_or(|stat| stat.id.inode != *inode))
            {
                forget(backend, &member, inode).map_err(failed)?;
                removed += 1;
            }
        }
        Ok(removed + self.tables(backend, &wanted, forgotten).map_err(failed)?)
    }

    /// Removes leaf tables that no manifest names; but those of a stem that has no manifest at all may be about to get
    /// one, as may temporaries: these only if they are forgotten.
    fn tables(
        &self,
        backend: &dyn Backend,
        wanted: &BTreeSet<String>,
        forgotten: &dyn Fn(&StorePath) -> bool,
    ) -> std::result::Result<u64, BackendError> {
        let mut removed = 0;
        for name in &self.tables {
            let known = name.split_once('.').is_some_and(|(stem, _)| self.shelf.inodes.contains_key(stem));
            if !wanted.contains(name) && (known || forgotten(&leaves::path(name))) {
                backend.remove_file(&leaves::path(name))?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

/// What is known of a scanned member; `shelves` are those of all stores, by index.
pub fn known(stores: &Stores, scan: &Scan, shelves: &[Shelf], id: NodeId) -> Result<Known> {
    let key = &scan.graph.node(id).key;
    match (shelves.get(key.store), scan.member(id)) {
        (Some(shelf), Some(member)) => shelf.find(stores.get(key.store)?, &key.path, &member.stat),
        _ => Ok(Known::Nothing),
    }
}

/// The manifest in force of a member whose name stands for the file `stat`. Lists nothing.
pub fn current(store: &Store, member: &StorePath, stat: &Stat) -> Result<Option<Manifest>> {
    let found = read(store, member, stat.id.inode)?.and_then(std::result::Result::ok);
    Ok(found.filter(|manifest| manifest.file == FileMark::from(stat)))
}

/// Reads the manifest of one file; the inner error says what is wrong with it.
pub fn read(
    store: &Store,
    member: &StorePath,
    inode: u64,
) -> Result<Option<std::result::Result<Manifest, String>>> {
    let found = read_named(store, &stem(member), inode)?;
    // Two names with one hash: none of ours.
    Ok(found.filter(|found| found.as_ref().map_or(true, |manifest| manifest.member == *member)))
}

fn read_named(
    store: &Store,
    stem: &str,
    inode: u64,
) -> Result<Option<std::result::Result<Manifest, String>>> {
    let path = own(&["manifests", &format!("{stem}.{inode}.json")]);
    match read_whole(store.backend(), &path, MAX_BYTES) {
        Ok(bytes) if bytes.len() as u64 > MAX_BYTES => Ok(Some(Err("it is too long".to_owned()))),
        Ok(bytes) => Ok(Some(Manifest::decode(&bytes))),
        Err(BackendError::NotFound { .. }) => Ok(None),
        Err(BackendError::NotPlain { .. }) => Ok(Some(Err("it is no regular file".to_owned()))),
        Err(error) if error.is_denied() => Ok(None),
        Err(source) => Err(StoreError::backend(store, source)),
    }
}

/// Writes a manifest under its name, over one of the same file. Durable when it returns.
///
/// # After a crash
///
/// There is the old one, or none, or the whole new one.
pub fn write(store: &Store, manifest: &Manifest) -> Result<()> {
    let path = path(&manifest.member, manifest.file.inode);
    replace(store.backend().as_ref(), &own(&["tmp"]), &path, &manifest.encode(), false)
        .map_err(|source| StoreError::backend(store, source))
}

/// Writes the manifest of a file that has no member's name yet, durably. Nobody looks for it before.
///
/// # After a crash
///
/// There is none, or a torn one, which nobody believes, or the whole.
pub fn write_beside(store: &Store, manifest: &Manifest) -> Result<()> {
    let backend = store.backend().as_ref();
    let path = path(&manifest.member, manifest.file.inode);
    let write = || {
        // Of a file that had this inode once.
        match backend.remove_file(&path) {
            Ok(()) | Err(BackendError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        let file = backend.create(&path)?;
        file.write_at(0, &manifest.encode())?;
        file.sync()?;
        backend.sync_dir(&path.parent())
    };
    write().map_err(|source| StoreError::backend(store, source))
}

/// Removes the manifest of a file with its notes; its table goes with the next sweep.
pub fn forget(
    backend: &dyn Backend,
    member: &StorePath,
    inode: u64,
) -> std::result::Result<(), BackendError> {
    reads::forget(backend, member, inode)?;
    match backend.remove_file(&path(member, inode)) {
        Ok(()) | Err(BackendError::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
