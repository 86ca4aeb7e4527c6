//! The directories of a store in memory: as calls see them, and what a crash may leave of them.
//!
//! What is durable is kept as a base and the changes since, in order; a change goes into the base once
//! every directory that it touches was synced. What a crash does with the rest is the crash's choice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rustix::io::Errno;

use super::dice::Dice;
use super::failed;
use super::file::Inode;
use crate::backend::{BackendError, FileKind, Result};
use crate::ids::StorePath;

/// What a name stands for.
#[derive(Clone, Debug)]
pub(super) enum Entry {
    File(Arc<Inode>),
    /// Inode number and mode.
    Directory(u64, u32),
    Other(FileKind, u64),
}

impl Entry {
    pub(super) fn kind(&self) -> FileKind {
        match self {
            Self::File(_) => FileKind::File,
            Self::Directory(..) => FileKind::Directory,
            Self::Other(kind, _) => *kind,
        }
    }
}

type Directory = BTreeMap<String, Entry>;
/// All directories by inode number.
type Directories = BTreeMap<u64, Directory>;

/// A name given or taken away.
#[derive(Debug)]
struct Edit {
    directory: u64,
    name: String,
    entry: Option<Entry>,
    /// Whether its directory was synced since.
    synced: bool,
}

/// One call's change of names.
#[derive(Debug)]
struct Change {
    edits: Vec<Edit>,
    /// Whether no crash at all takes it apart. (Of a rename between two directories, a store may lose the
    /// half that was not synced.)
    whole: bool,
}

#[derive(Debug)]
pub(super) struct Names {
    root: u64,
    live: Directories,
    base: Directories,
    since: Vec<Change>,
}

impl Edit {
    fn new(directory: u64, path: &StorePath, entry: Option<Entry>) -> Self {
        Self { directory, name: path.file_name().to_owned(), entry, synced: false }
    }

    fn place(&self) -> (u64, String) {
        (self.directory, self.name.clone())
    }

    fn apply(&self, directories: &mut Directories) {
        let directory = directories.entry(self.directory).or_default();
        match &self.entry {
            Some(entry) => directory.insert(self.name.clone(), entry.clone()),
            None => directory.remove(&self.name),
        };
    }
}

impl Change {
    fn apply(&self, directories: &mut Directories) {
        self.edits.iter().for_each(|edit| edit.apply(directories));
    }

    fn is_synced(&self) -> bool {
        self.edits.iter().all(|edit| edit.synced)
    }

    /// Whether a store that keeps changes whole must have it: if one of its directories was synced.
    fn is_promised(&self) -> bool {
        self.edits.iter().any(|edit| edit.synced)
    }
}

impl Names {
    pub(super) fn new(root: u64) -> Self {
        let only_root = Directories::from([(root, Directory::new())]);
        Self { root, live: only_root.clone(), base: only_root, since: Vec::new() }
    }

    pub(super) fn get(&self, path: &StorePath) -> Result<Entry> {
        let mut at = Entry::Directory(self.root, 0o755);
        for component in path.components() {
            let found = match &at {
                Entry::Directory(number, _) => self.live.get(number).and_then(|names| names.get(component)),
                Entry::File(_) => None,
                Entry::Other(..) => return Err(BackendError::NotPlain { path: path.to_string() }),
            };
            at = found.cloned().ok_or_else(|| failed("find", path, Errno::NOENT))?;
        }
        Ok(at)
    }

    pub(super) fn list(&self, path: &StorePath) -> Result<&Directory> {
        let number = self.number(path)?;
        self.live.get(&number).ok_or_else(|| failed("list", path, Errno::NOENT))
    }

    fn number(&self, path: &StorePath) -> Result<u64> {
        match self.get(path)? {
            Entry::Directory(number, _) => Ok(number),
            Entry::File(_) => Err(failed("list", path, Errno::NOTDIR)),
            Entry::Other(..) => Err(BackendError::NotPlain { path: path.to_string() }),
        }
    }

    /// The number of the directory that `path` lies in, for changing it.
    fn parent(&self, path: &StorePath) -> Result<u64> {
        if path.is_root() {
            return Err(BackendError::NotPlain { path: path.to_string() });
        }
        match self.get(&path.parent())? {
            Entry::Directory(number, _) => Ok(number),
            Entry::File(_) => Err(failed("find", path, Errno::NOENT)),
            Entry::Other(..) => Err(BackendError::NotPlain { path: path.to_string() }),
        }
    }

    fn change(&mut self, edits: Vec<Edit>, whole: bool) {
        let change = Change { edits, whole };
        change.apply(&mut self.live);
        self.since.push(change);
    }

    /// Adds a name that must be free.
    pub(super) fn add(&mut self, path: &StorePath, entry: Entry) -> Result<()> {
        if path.is_root() {
            return Err(failed("create", path, Errno::EXIST));
        }
        let parent = self.parent(path)?;
        if self.live.get(&parent).is_some_and(|names| names.contains_key(path.file_name())) {
            return Err(failed("create", path, Errno::EXIST));
        }
        if let Entry::Directory(number, _) = entry {
            self.live.insert(number, Directory::new());
        }
        self.change(vec![Edit::new(parent, path, Some(entry))], false);
        Ok(())
    }

    fn file(&self, path: &StorePath) -> Result<Arc<Inode>> {
        match self.get(path)? {
            Entry::File(inode) => Ok(inode),
            _ => Err(BackendError::NotPlain { path: path.to_string() }),
        }
    }

    pub(super) fn remove_file(&mut self, path: &StorePath, now: i128) -> Result<()> {
        let inode = self.file(path)?;
        self.change(vec![Edit::new(self.parent(path)?, path, None)], false);
        inode.change_links(-1, now);
        Ok(())
    }

    pub(super) fn remove_dir(&mut self, path: &StorePath) -> Result<()> {
        if !self.list(path)?.is_empty() {
            return Err(failed("remove", path, Errno::NOTEMPTY));
        }
        self.change(vec![Edit::new(self.parent(path)?, path, None)], false);
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &StorePath, to: &StorePath, now: i128) -> Result<()> {
        let inode = self.file(from)?;
        let (source, target) = (self.parent(from)?, self.parent(to)?);
        match self.file(to) {
            // As POSIX has it: two names of one file both stay.
            Ok(old) if Arc::ptr_eq(&old, &inode) => return Ok(()),
            Ok(old) => old.change_links(-1, now),
            Err(BackendError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        let given = Edit::new(target, to, Some(Entry::File(Arc::clone(&inode))));
        self.change(vec![Edit::new(source, from, None), given], false);
        inode.change_links(0, now);
        Ok(())
    }

    pub(super) fn rename_dir(&mut self, from: &StorePath, to: &StorePath) -> Result<()> {
        let entry = self.get(from)?;
        if entry.kind() != FileKind::Directory {
            return Err(BackendError::NotPlain { path: from.to_string() });
        }
        let (source, target) = (self.parent(from)?, self.parent(to)?);
        match self.get(to) {
            Ok(Entry::Directory(number, _)) if self.live.get(&number).is_none_or(BTreeMap::is_empty) => {}
            Ok(_) => return Err(failed("create", to, Errno::EXIST)),
            Err(BackendError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        let edits = vec![Edit::new(source, from, None), Edit::new(target, to, Some(entry))];
        self.change(edits, false);
        Ok(())
    }

    pub(super) fn exchange(&mut self, a: &StorePath, b: &StorePath, now: i128) -> Result<()> {
        let (first, second) = (self.file(a)?, self.file(b)?);
        if Arc::ptr_eq(&first, &second) {
            return Ok(());
        }
        let edits = vec![
            Edit::new(self.parent(a)?, a, Some(Entry::File(Arc::clone(&second)))),
            Edit::new(self.parent(b)?, b, Some(Entry::File(Arc::clone(&first)))),
        ];
        self.change(edits, true);
        first.change_links(0, now);
        second.change_links(0, now);
        Ok(())
    }

    /// Paths and kinds below a directory, parents before children, by name.
    pub(super) fn walk(&self, path: &StorePath, max_depth: usize) -> Result<Vec<(StorePath, FileKind)>> {
        let mut found = Vec::new();
        let mut pending = self.below(path)?;
        if max_depth == 0 {
            return Ok(found);
        }
        let base = path.components().count();
        while let Some((path, kind)) = pending.pop() {
            if kind == FileKind::Directory && path.components().count() < base + max_depth {
                pending.extend(self.below(&path)?);
            }
            found.push((path, kind));
        }
        Ok(found)
    }

    /// The entries of a directory, last name first.
    fn below(&self, path: &StorePath) -> Result<Vec<(StorePath, FileKind)>> {
        let entries = self.list(path)?.iter().rev();
        Ok(entries.filter_map(|(name, entry)| Some((path.join(name).ok()?, entry.kind()))).collect())
    }

    pub(super) fn sync(&mut self, path: &StorePath) -> Result<()> {
        let number = self.number(path)?;
        let edits = self.since.iter_mut().flat_map(|change| &mut change.edits);
        edits.filter(|edit| edit.directory == number).for_each(|edit| edit.synced = true);
        // Into the base goes what does not overtake an earlier change of the same name.
        let mut waiting = BTreeSet::new();
        let mut rest = Vec::new();
        for change in std::mem::take(&mut self.since) {
            let overtakes = || change.edits.iter().any(|edit| waiting.contains(&edit.place()));
            if change.is_synced() && !overtakes() {
                change.apply(&mut self.base);
            } else {
                waiting.extend(change.edits.iter().map(Edit::place));
                rest.push(change);
            }
        }
        self.since = rest;
        Ok(())
    }

    /// Only what was synced is left, directory by directory.
    pub(super) fn crash(&mut self) -> Vec<Arc<Inode>> {
        for change in std::mem::take(&mut self.since) {
            if change.whole && change.is_promised() {
                change.apply(&mut self.base);
            } else {
                let synced = change.edits.iter().filter(|edit| edit.synced);
                synced.for_each(|edit| edit.apply(&mut self.base));
            }
        }
        self.restart()
    }

    /// All names are left as they were last.
    pub(super) fn crash_keeping_all(&mut self) -> Vec<Arc<Inode>> {
        self.since.clear();
        self.base = self.live.clone();
        self.restart()
    }

    /// What was not promised is left or lost, each change whole, and changes of one name in their order.
    pub(super) fn crash_by(&mut self, dice: &mut Dice) -> Vec<Arc<Inode>> {
        let mut lost = BTreeSet::new();
        for change in std::mem::take(&mut self.since) {
            let overtakes = change.edits.iter().any(|edit| lost.contains(&edit.place()));
            if change.is_promised() || (dice.keeps() && !overtakes) {
                change.apply(&mut self.base);
            } else {
                lost.extend(change.edits.iter().map(Edit::place));
            }
        }
        self.restart()
    }

    /// Makes the base the live state, as far as it can be reached by name; gives the files in it.
    fn restart(&mut self) -> Vec<Arc<Inode>> {
        let mut reached = Directories::new();
        let mut links: BTreeMap<u64, (Arc<Inode>, u64)> = BTreeMap::new();
        let mut pending = vec![self.root];
        while let Some(number) = pending.pop() {
            let names = self.base.get(&number).cloned().unwrap_or_default();
            for entry in names.values() {
                match entry {
                    Entry::Directory(below, _) if !reached.contains_key(below) => pending.push(*below),
                    Entry::File(inode) => {
                        links.entry(inode.number()).or_insert_with(|| (Arc::clone(inode), 0)).1 += 1;
                    }
                    _ => {}
                }
            }
            reached.insert(number, names);
        }
        self.live = reached.clone();
        self.base = reached;
        let relinked = links.into_values().map(|(inode, count)| {
            inode.set_links(count);
            inode
        });
        relinked.collect()
    }
}
