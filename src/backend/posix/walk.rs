//! All names below a directory.
//!
//! Each directory is resolved from the root by the names that were found, so nobody who swaps one for a link leads it
//! elsewhere, and only the one that is being read is open.

use std::vec;

use crate::backend::{DirEntry, FileKind, Result, WalkEntry};
use crate::ids::StorePath;

/// A directory that is being walked: where it is, and what was not looked at yet.
struct Level {
    path: StorePath,
    entries: vec::IntoIter<DirEntry>,
}

impl Level {
    fn read(path: StorePath, list: impl Fn(&StorePath) -> Result<Vec<DirEntry>>) -> Result<Self> {
        let mut entries = list(&path)?;
        entries.sort_by(|a, b| name(a).cmp(name(b)));
        Ok(Self { path, entries: entries.into_iter() })
    }

    /// The store's path of an entry, or its lossy text.
    fn below(&self, entry: &DirEntry) -> std::result::Result<StorePath, String> {
        let whole = |text: &String| {
            if self.path.is_root() { text.clone() } else { format!("{}/{text}", self.path) }
        };
        match &entry.name {
            Ok(name) => self.path.join(name).map_err(|_| whole(name)),
            Err(lossy) => Err(whole(lossy)),
        }
    }
}

fn name(entry: &DirEntry) -> &str {
    match &entry.name {
        Ok(name) | Err(name) => name,
    }
}

pub(super) fn walk(
    list: impl Fn(&StorePath) -> Result<Vec<DirEntry>>,
    path: &StorePath,
    max_depth: usize,
    skip: &dyn Fn(&StorePath) -> bool,
) -> Vec<Result<WalkEntry>> {
    let mut found = Vec::new();
    let mut levels: Vec<Level> = Vec::new();
    let mut next = (max_depth > 0).then(|| path.clone());
    loop {
        match next.take().map(|path| Level::read(path, &list)) {
            Some(Ok(level)) => levels.push(level),
            Some(Err(error)) => found.push(Err(error)),
            None => {}
        }
        let Some(level) = levels.last_mut() else { return found };
        let Some(entry) = level.entries.next() else {
            levels.pop();
            continue;
        };
        let here = level.below(&entry);
        if let (FileKind::Directory, Ok(path)) = (entry.kind, &here)
            && levels.len() < max_depth
            && !skip(path)
        {
            next = Some(path.clone());
        }
        found.push(Ok(WalkEntry { path: here, kind: entry.kind }));
    }
}
