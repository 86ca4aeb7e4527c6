//! A member that comes: its temporary file, what of it lies there from an earlier try, its proof, its name.
//!
//! The temporary's name follows from the member's and the view that is wanted, its layout from what it has to hold. So
//! the next try finds each block where this one would put it, and keeps those that hash to their leaves; another layout
//! (of another parent, say) has another name. The header is written last: until then the file is no image.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::Destination;
use super::fetch::failed;
use super::need::{Need, Tables};
use crate::backend::publish::{publish_new, take_identity, write_new};
use crate::backend::{Backend, BackendError, Identity, StoreFile};
use crate::change::Lease;
use crate::change::yard::Yard;
use crate::digest::{is_zero, leaf};
use crate::failure::Code;
use crate::ids::{Digest, StorePath};
use crate::ops::{OpError, Result, Work};
use crate::qcow2::layout::canonical::Canonical;
use crate::qcow2::layout::hostset::{Collecting, HostSet};
use crate::store::manifest::{TableMark, stem};
use crate::store::record::own;
use crate::store::{Store, StoreError};
use crate::units::{BLOCK_BYTES, BLOCK_LENGTH};

/// What the names of copies in the making begin with.
pub use crate::change::sweep::COPY_PREFIX;

/// How many neighbouring blocks are looked at in one go.
const STEP_BLOCKS: u64 = 64;
/// How much of the tables is written in one go.
const STEP_BYTES: u64 = 1 << 20;
/// How many bytes are written before they are sent to the disk.
const MOST_PENDING: u64 = 64 << 20;
/// Permissions of a new file: as hypervisors make them.
const MODE: u32 = 0o644;

/// A member that comes.
pub struct Arrival<'a> {
    store: &'a Store,
    /// Its name.
    pub target: StorePath,
    directory: StorePath,
    name: String,
    lock: StorePath,
    lease: Lease,
}

impl<'a> Arrival<'a> {
    /// Takes the right to bring a member: one at a time.
    ///
    /// # Errors
    ///
    /// `store-busy` if somebody else brings it.
    pub fn begin(to: &Destination<'a>, target: StorePath, view: Digest) -> Result<Self> {
        let store = to.site.stores.get(to.store)?;
        let backend = store.backend();
        let error = |source| StoreError::backend(store, source);
        let lock = own(&["locks", &lock_name(&target)]);
        let lease = Lease::take_file(to.site, to.store, &lock)?;
        let yard = Yard::of(backend.as_ref(), &beside(backend.as_ref(), &target)).map_err(error)?;
        let directory = yard.temporaries();
        let digits = view.to_string();
        let name = format!("{COPY_PREFIX}.{}.{}", stem(&target), digits.get(..16).unwrap_or_default());
        Ok(Self { store, target, directory, name, lock, lease })
    }

    fn path(&self, what: &str) -> StorePath {
        self.directory.join(&format!("{}.{what}", self.name)).unwrap_or_else(|_| self.directory.clone())
    }

    fn error(&self, source: BackendError) -> OpError {
        StoreError::backend(self.store, source).into()
    }

    fn backend(&self) -> &Arc<dyn Backend> {
        self.store.backend()
    }

    /// A temporary of that length, and whether it is new; else what an earlier try left in it is there.
    pub fn file(&self, what: &str, length: u64) -> Result<(Arc<dyn StoreFile>, bool)> {
        let path = self.path(what);
        let (opened, is_new) = match self.backend().open_writable(&path) {
            Err(BackendError::NotFound { .. }) => {
                self.room(length)?;
                (self.backend().create(&path), true)
            }
            opened => (opened, false),
        };
        let file = opened.map_err(|source| self.error(source))?;
        if file.stat().map_err(failed(file.as_ref()))?.length != length {
            file.set_length(length).map_err(failed(file.as_ref()))?;
        }
        Ok((file, is_new))
    }

    /// Refuses what has no room.
    pub fn room(&self, needed_bytes: u64) -> Result<()> {
        let free_bytes = self.backend().space().map_err(|source| self.error(source))?.free_bytes;
        if free_bytes < needed_bytes {
            let store = self.backend().describe();
            return Err(OpError::NoSpace { store, free_bytes, needed_bytes });
        }
        Ok(())
    }

    /// Opens a leaf table that came, if it is the one that was announced.
    pub fn open_table(
        &self,
        what: &str,
        of: &super::LineMember,
    ) -> Result<std::result::Result<crate::store::manifest::leaves::LeafFile, String>> {
        use crate::store::manifest::leaves::{LeafError, LeafFile};
        let mark = TableMark {
            name: of.member.to_string(),
            blake3: of.table_blake3,
            leaves: of.leaves,
            runs: of.runs,
        };
        match LeafFile::open_at(self.backend().as_ref(), &self.path(what), &mark) {
            Ok(table) if table.shape().virtual_size == of.virtual_bytes => Ok(Ok(table)),
            Ok(_) => Ok(Err("its leaf table is of another view".to_owned())),
            Err(LeafError::Fault { source, .. }) => Ok(Err(format!("its leaf table is wrong: {source}"))),
            Err(LeafError::Store { source, .. }) => Err(self.error(source)),
        }
    }

    /// Fails if somebody else took over what seemed abandoned. Whoever goes on all the same writes the very bytes that the
    /// other one does, to the same places.
    ///
    /// # Errors
    ///
    /// `store-busy`.
    pub fn check(&self) -> Result<()> {
        if self.lease.is_held() {
            return Ok(());
        }
        let message = "another qchain took over to bring it".to_owned();
        Err(OpError::Refused { code: Code::StoreBusy, member: self.target.to_string(), message })
    }

    /// Removes all that an attempt left whose kind begins so; best effort.
    pub fn clear(&self, kind: &str) {
        let entries = self.backend().read_dir(&self.directory).unwrap_or_default();
        for name in entries.into_iter().filter_map(|entry| entry.name.ok()) {
            let rest = name.strip_prefix(&self.name).and_then(|rest| rest.strip_prefix('.'));
            if rest.is_some_and(|rest| rest.starts_with(kind))
                && let Ok(path) = self.directory.join(&name)
            {
                let _ = self.backend().remove_file(&path);
            }
        }
        let _ = self.backend().remove_file(&self.lock);
    }

    /// Makes the directories that lead to the member, and gives the finished file its name, which must be free.
    ///
    /// # After a crash
    ///
    /// The name is free, or stands for the whole file.
    pub fn name(&self, what: &str) -> Result<()> {
        let backend = self.backend().as_ref();
        self.directories(&self.target)?;
        publish_new(backend, &self.path(what), &self.target).map_err(|source| match source {
            BackendError::AlreadyExists { .. } => OpError::Refused {
                code: Code::OtherView,
                member: self.target.to_string(),
                message: "somebody else gave the name to another file meanwhile".to_owned(),
            },
            source => self.error(source),
        })
    }

    /// Takes the name back from the file with this inode number, which it was given to. Somebody else's file keeps it.
    pub fn take_back(&self, inode: u64) -> Result<()> {
        let backend = self.backend().as_ref();
        let taken = match backend.stat(&self.target) {
            Ok(stat) if stat.id.inode == inode => backend.remove_file(&self.target),
            Ok(_) | Err(BackendError::NotFound { .. }) => return Ok(()),
            Err(source) => Err(source),
        };
        taken.and_then(|()| backend.sync_dir(&self.target.parent())).map_err(|source| self.error(source))
    }

    /// Whether there is anything in the directory of a name.
    pub fn has_beside(&self, name: &StorePath) -> bool {
        self.backend().read_dir(&name.parent()).is_ok_and(|entries| !entries.is_empty())
    }

    /// Makes a member's checkpoint file, unless there is one.
    pub fn checkpoint(&self, path: &StorePath, bytes: &[u8]) -> Result<()> {
        self.directories(path)?;
        match write_new(self.backend().as_ref(), &own(&["tmp"]), path, bytes) {
            Ok(()) | Err(BackendError::AlreadyExists { .. }) => Ok(()),
            Err(source) => Err(self.error(source)),
        }
    }

    /// Makes the directories that lead to a name.
    fn directories(&self, name: &StorePath) -> Result<()> {
        let backend = self.backend().as_ref();
        let mut at = StorePath::root();
        for part in name.parent().components() {
            let above = at.clone();
            at = at.join(part).map_err(|error| super::plan::usage(error.to_string()))?;
            match backend.create_dir(&at, false) {
                Ok(()) => backend.sync_dir(&above).map_err(|source| self.error(source))?,
                Err(BackendError::AlreadyExists { .. }) => {}
                Err(source) => return Err(self.error(source)),
            }
        }
        Ok(())
    }

    /// Opens the sealed file anew.
    pub fn reopen(&self, what: &str) -> Result<Arc<dyn StoreFile>> {
        self.backend().open(&self.path(what)).map_err(|source| self.error(source))
    }

    /// Gives the file the owner and mode of the member that it stands on, or of its directory. Where the server allows
    /// none of that it stays ours.
    pub fn identify(&self, file: &dyn StoreFile, like: Option<&dyn StoreFile>) -> Result<()> {
        let own = file.identity().map_err(|source| self.error(source))?;
        let done = if let Some(like) = like {
            take_identity(like, file)
        } else {
            let above = beside(self.backend().as_ref(), &self.target).parent();
            let stat = self.backend().stat(&above).map_err(|source| self.error(source))?;
            file.set_identity(&Identity { uid: stat.uid, gid: stat.gid, mode: MODE, ..own.clone() })
        };
        match done {
            Err(BackendError::Squashed { .. }) => match file.set_identity(&Identity { mode: MODE, ..own }) {
                Ok(()) | Err(BackendError::Squashed { .. }) => Ok(()),
                Err(source) => Err(self.error(source)),
            },
            done => done.map_err(|source| self.error(source)),
        }
    }
}

/// Removes what lies about still of members that have their names: of a try that ended between the two. Best effort, and
/// shared among the hosts of one site: where another one's lease is in the way it waits until that is given back or lapses.
pub fn tidy<'t>(to: &Destination<'_>, named: impl Iterator<Item = (&'t StorePath, Digest)>) {
    let Ok(store) = to.site.stores.get(to.store) else { return };
    // The lock goes last.
    let entries = store.backend().read_dir(&own(&["locks"])).unwrap_or_default();
    let locks: BTreeSet<String> = entries.into_iter().filter_map(|entry| entry.name.ok()).collect();
    for (target, view) in named.filter(|(target, _)| locks.contains(&lock_name(target))) {
        if let Ok(arrival) = Arrival::begin(to, target.clone(), view) {
            arrival.clear("");
        }
    }
}

/// The lock of who brings a member.
fn lock_name(target: &StorePath) -> String {
    format!("copy-{}", stem(target))
}

/// A name in the lowest directory on the way to a member that is there.
fn beside(backend: &dyn Backend, target: &StorePath) -> StorePath {
    let mut at = target.clone();
    while !at.parent().is_root() && backend.stat(&at.parent()).is_err() {
        at = at.parent();
    }
    at
}

/// The file of a member that comes, while its blocks are put where they belong.
pub struct Image<'a> {
    pub layout: &'a Canonical,
    pub file: &'a dyn StoreFile,
    /// Whether no earlier try left anything in it.
    is_new: bool,
    /// Blocks that are in their place.
    there: Mutex<Collecting>,
    count: AtomicU64,
    /// Bytes that were written since they were last sent to the disk.
    pending: AtomicU64,
}

impl<'a> Image<'a> {
    /// Nothing is known to be in its place.
    pub fn new(layout: &'a Canonical, file: &'a dyn StoreFile, is_new: bool) -> Self {
        Self { layout, file, is_new, there: Mutex::default(), count: 0.into(), pending: 0.into() }
    }

    /// How many blocks are in their place.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    fn note(&self, block: u64) {
        let mut there = self.there.lock().unwrap_or_else(PoisonError::into_inner);
        if there.insert(block, 1) {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Puts a block in its place: one that hashes to its leaf.
    pub fn put(&self, block: u64, bytes: &[u8]) -> Result<()> {
        let guest = block * BLOCK_BYTES;
        let inside = self.layout.virtual_size().saturating_sub(guest).min(BLOCK_BYTES);
        let bytes = bytes.get(..usize::try_from(inside).unwrap_or_default()).unwrap_or_default();
        let Some(place) = self.layout.place(guest) else { return Ok(()) };
        self.file.write_at(place, bytes).map_err(failed(self.file))?;
        self.note(block);
        // The disk works while more comes: else most of it would be left to the end. Whoever comes to this waits, the
        // others go on.
        let pending = self.pending.fetch_add(inside, Ordering::Relaxed) + inside;
        if pending >= MOST_PENDING && self.pending.swap(0, Ordering::Relaxed) >= MOST_PENDING {
            self.file.sync().map_err(failed(self.file))?;
        }
        Ok(())
    }

    /// Reads a block from its place.
    pub fn get(&self, block: u64, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(0);
        let guest = block * BLOCK_BYTES;
        let inside = self.layout.virtual_size().saturating_sub(guest).min(BLOCK_BYTES);
        if let (Some(place), Some(bytes)) =
            (self.layout.place(guest), bytes.get_mut(..usize::try_from(inside).unwrap_or_default()))
        {
            crate::backend::read_padded(self.file, place, bytes).map_err(failed(self.file))?;
        }
        Ok(())
    }

    /// Finds the blocks that an earlier try put in their place; holes are passed over.
    pub fn find(
        &self,
        need: &Need,
        tables: &mut Tables<'_>,
        member: &str,
        work: &Work<'_>,
    ) -> Result<HostSet> {
        let leaves = |source| StoreError::Leaves { member: member.to_owned(), source };
        let mut found = Collecting::default();
        if self.is_new {
            return Ok(found.finish());
        }
        for set in [&need.wanted, &need.filled] {
            for (first, count) in set.runs() {
                let mut at = first;
                while at < first + count {
                    work.cancel.check()?;
                    let step = STEP_BLOCKS.min(first + count - at);
                    let place = self.layout.place(at * BLOCK_BYTES).unwrap_or_default();
                    let data = self.file.data_from(place).map_err(failed(self.file))?;
                    if data < place + step * BLOCK_BYTES {
                        let expected = tables.leaves(at, step).map_err(leaves)?;
                        for block in self.right(at, place, &expected)? {
                            let _ = found.insert(block, 1);
                            self.note(block);
                        }
                    }
                    at += step;
                }
            }
        }
        Ok(found.finish())
    }

    /// Which of neighbouring blocks, which lie one after the other, hash to their leaves.
    fn right(&self, first: u64, place: u64, expected: &[Digest]) -> Result<Vec<u64>> {
        let inside = self.layout.virtual_size().saturating_sub(first * BLOCK_BYTES);
        let mut bytes = vec![0; expected.len() * BLOCK_LENGTH];
        let count = bytes.len().min(usize::try_from(inside).unwrap_or(usize::MAX));
        crate::backend::read_padded(self.file, place, &mut bytes[..count]).map_err(failed(self.file))?;
        let blocks: Vec<(u64, (&Digest, &[u8]))> =
            (first..).zip(expected.iter().zip(bytes.chunks(BLOCK_LENGTH))).collect();
        let right = blocks
            .into_par_iter()
            .with_min_len(4)
            .filter(|(_, (expected, bytes))| !is_zero(bytes) && leaf(bytes) == **expected);
        Ok(right.map(|(block, _)| block).collect())
    }

    /// Writes header and tables, and makes all of it durable.
    pub fn seal(&self) -> Result<()> {
        let end = self.layout.metadata_bytes();
        let mut buffer = Vec::new();
        // The first cluster, which makes it an image, last.
        let mut steps: Vec<u64> = (0..end.div_ceil(STEP_BYTES)).map(|step| step * STEP_BYTES).collect();
        steps.reverse();
        for at in steps {
            buffer.resize(usize::try_from(STEP_BYTES.min(end - at)).unwrap_or_default(), 0);
            buffer.fill(0);
            self.layout.metadata(at, &mut buffer);
            self.file.write_at(at, &buffer).map_err(failed(self.file))?;
        }
        self.file.sync().map_err(failed(self.file))
    }
}
