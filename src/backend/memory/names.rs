//! The directories of a store in memory, live and durable.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustix::io::Errno;

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
#[derive(Debug)]
pub(super) struct Names {
    root: u64,
    live: BTreeMap<u64, Directory>,
    durable: BTreeMap<u64, Directory>,
}

impl Names {
    pub(super) fn new(root: u64) -> Self {
        let only_root = BTreeMap::from([(root, Directory::new())]);
        Self { root, live: only_root.clone(), durable: only_root }
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

    /// The directory that `path` lies in, for changing it.
    fn parent(&mut self, path: &StorePath) -> Result<&mut Directory> {
        if path.is_root() {
            return Err(BackendError::NotPlain { path: path.to_string() });
        }
        match self.get(&path.parent())? {
            Entry::Directory(number, _) => Ok(self.live.entry(number).or_default()),
            Entry::File(_) => Err(failed("find", path, Errno::NOENT)),
            Entry::Other(..) => Err(BackendError::NotPlain { path: path.to_string() }),
        }
    }

    /// Adds a name that must be free.
    pub(super) fn add(&mut self, path: &StorePath, entry: Entry) -> Result<()> {
        if path.is_root() {
            return Err(failed("create", path, Errno::EXIST));
        }
        let directory = self.parent(path)?;
        if directory.contains_key(path.file_name()) {
            return Err(failed("create", path, Errno::EXIST));
        }
        if let Entry::Directory(number, _) = entry {
            directory.insert(path.file_name().to_owned(), entry);
            self.live.insert(number, Directory::new());
            self.durable.insert(number, Directory::new());
        } else {
            directory.insert(path.file_name().to_owned(), entry);
        }
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
        self.parent(path)?.remove(path.file_name());
        inode.change_links(-1, now);
        Ok(())
    }

    pub(super) fn remove_dir(&mut self, path: &StorePath) -> Result<()> {
        if !self.list(path)?.is_empty() {
            return Err(failed("remove", path, Errno::NOTEMPTY));
        }
        self.parent(path)?.remove(path.file_name());
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &StorePath, to: &StorePath, now: i128) -> Result<()> {
        let inode = self.file(from)?;
        self.parent(to)?;
        match self.file(to) {
            // As POSIX has it: two names of one file both stay.
            Ok(old) if Arc::ptr_eq(&old, &inode) => return Ok(()),
            Ok(old) => old.change_links(-1, now),
            Err(BackendError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        self.parent(from)?.remove(from.file_name());
        self.parent(to)?.insert(to.file_name().to_owned(), Entry::File(Arc::clone(&inode)));
        inode.change_links(0, now);
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
        let names = self.list(path)?.clone();
        self.durable.insert(number, names);
        Ok(())
    }

    pub(super) fn sync_all(&mut self) {
        self.durable = self.live.clone();
    }

    /// Makes the durable state the live one, for all that can be reached by name.
    pub(super) fn crash(&mut self) {
        let mut reached = BTreeMap::new();
        let mut links: BTreeMap<u64, (Arc<Inode>, u64)> = BTreeMap::new();
        let mut pending = vec![self.root];
        while let Some(number) = pending.pop() {
            let names = self.durable.get(&number).cloned().unwrap_or_default();
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
        for (inode, count) in links.into_values() {
            inode.crash(count);
        }
        self.live = reached.clone();
        self.durable = reached;
    }
}
