//! Directories: page by page, several at once.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nfs3_client::nfs3_types::nfs3::{
    NFS_PROGRAM, READDIR3args, READDIR3resfail, READDIRPLUS3args, READDIRPLUS3resfail, cookieverf3, nfs_fh3,
    nfsstat3,
};
use tokio::task::JoinSet;

use super::Shared;
use super::fault::{Fault, Result};
use super::resolve::{Found, kind_of, look_up};
use super::wire::{Name, Page, PlainPage};
use crate::backend::{BackendError, DirEntry, FileKind, WalkEntry};
use crate::ids::StorePath;

/// How large a page may be, with all that is told of its names.
const PAGE_BYTES: u32 = 256 << 10;
/// The most names of one directory, and of all that are walked through at once: a server that makes them up must end
/// somewhere.
const MOST_NAMES: usize = 2_000_000;
/// The most bytes that all those names have.
const MOST_NAME_BYTES: usize = 128 << 20;
/// How often a directory is begun again because it changed while it was read.
const TRIES: usize = 4;

/// One name, and the handle of a directory.
#[derive(Debug)]
pub(super) struct Listed {
    pub entry: DirEntry,
    pub handle: Option<nfs_fh3>,
}

/// How much a server may still tell in one listing, or in all those of a walk.
#[derive(Debug)]
pub(super) struct Budget {
    names: AtomicUsize,
    bytes: AtomicUsize,
}

impl Default for Budget {
    fn default() -> Self {
        Self { names: MOST_NAMES.into(), bytes: MOST_NAME_BYTES.into() }
    }
}

impl Budget {
    fn take(&self, page: &Page) -> Result<()> {
        let less = |left: &AtomicUsize, count: usize| {
            left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(count)).is_ok()
        };
        let bytes = page.names.iter().map(|name| name.text.len()).sum();
        if less(&self.names, page.names.len()) && less(&self.bytes, bytes) {
            return Ok(());
        }
        Err(Fault::Garbled("the server lists more names than can be".to_owned()))
    }
}

/// All names of a directory, each once, in order.
pub(super) async fn list(shared: &Shared, directory: &nfs_fh3, budget: &Budget) -> Result<Vec<Listed>> {
    let mut tries = 1;
    let mut found = loop {
        match pages(shared, directory, budget).await {
            // Cookies of before a change.
            Err(Fault::Status(nfsstat3::NFS3ERR_BAD_COOKIE | nfsstat3::NFS3ERR_NOT_SYNC))
                if tries < TRIES =>
            {
                tries += 1;
            }
            done => break done?,
        }
    };
    // A name that is given while the directory is read may come twice.
    found.sort_by(|left, right| left.entry.name.cmp(&right.entry.name));
    found.dedup_by(|left, right| left.entry.name.is_ok() && left.entry.name == right.entry.name);
    Ok(found)
}

async fn pages(shared: &Shared, directory: &nfs_fh3, budget: &Budget) -> Result<Vec<Listed>> {
    let mut found = Vec::new();
    let (mut cookie, mut verifier, mut plain) = (0, cookieverf3::default(), false);
    let mut ends = HashSet::from([cookie]);
    loop {
        let page = match page(shared, directory, (cookie, verifier), plain).await {
            // Exports may be without it.
            Err(Fault::Status(nfsstat3::NFS3ERR_NOTSUPP)) if !plain => {
                plain = true;
                continue;
            }
            page => page?,
        };
        budget.take(&page)?;
        let last = page.names.last().map(|name| name.cookie);
        for name in page.names {
            found.extend(listed(shared, directory, name).await?);
        }
        if page.eof {
            return Ok(found);
        }
        cookie = match last {
            Some(last) if ends.insert(last) => last,
            _ => return Err(Fault::Garbled("the server lists a directory without end".to_owned())),
        };
        verifier = page.verifier;
    }
}

/// The names that follow a cookie; of a plain page nothing else is known.
async fn page(
    shared: &Shared,
    directory: &nfs_fh3,
    (cookie, cookieverf): (u64, cookieverf3),
    plain: bool,
) -> Result<Page> {
    let dir = directory.clone();
    if plain {
        let args = READDIR3args { dir, cookie, cookieverf, count: PAGE_BYTES };
        let told = shared.pool.ask::<_, PlainPage, READDIR3resfail>(NFS_PROGRAM::NFSPROC3_READDIR, &args);
        return told.await.map(|PlainPage(page)| page);
    }
    let args = READDIRPLUS3args { dir, cookie, cookieverf, dircount: PAGE_BYTES, maxcount: PAGE_BYTES };
    shared.pool.ask::<_, _, READDIRPLUS3resfail>(NFS_PROGRAM::NFSPROC3_READDIRPLUS, &args).await
}

/// What a name stands for; nothing if it is gone by now.
async fn listed(shared: &Shared, directory: &nfs_fh3, name: Name) -> Result<Option<Listed>> {
    let raw = name.text;
    if raw == b"." || raw == b".." {
        return Ok(None);
    }
    let told = name.attributes.map(|attributes| kind_of(attributes.type_));
    let (kind, handle) = match (told, name.handle) {
        (Some(FileKind::Directory), Some(handle)) => (FileKind::Directory, Some(handle)),
        (Some(kind), _) if kind != FileKind::Directory => (kind, None),
        // Servers may leave either out.
        _ => match look_up(&shared.pool, directory, &raw).await {
            Ok(Found { handle, stat }) => (stat.kind, Some(handle)),
            Err(Fault::Status(nfsstat3::NFS3ERR_NOENT)) => return Ok(None),
            Err(fault) => return Err(fault),
        },
    };
    let text = String::from_utf8(raw).map_err(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
    let name = text.and_then(|name| if StorePath::root().join(&name).is_ok() { Ok(name) } else { Err(name) });
    Ok(Some(Listed { entry: DirEntry { name, kind }, handle }))
}

/// A directory of a walk: its names in order, each with the directory that it is, if that was entered.
struct Entered {
    path: StorePath,
    names: std::result::Result<Vec<(DirEntry, Option<usize>)>, Option<BackendError>>,
}

/// A directory that is being told, with what is left of it.
type Told = (StorePath, std::vec::IntoIter<(DirEntry, Option<usize>)>);

/// A walk, level by level: all directories of a level are asked at once, as many as there are connections.
pub(super) struct Walk {
    entered: Vec<Entered>,
}

impl Walk {
    /// Walks; `wait` runs futures and blocks until they are done.
    pub(super) fn run(
        shared: &Arc<Shared>,
        start: (StorePath, nfs_fh3),
        max_depth: usize,
        skip: &dyn Fn(&StorePath) -> bool,
        wait: impl Fn(Level) -> LevelNames,
    ) -> Self {
        let mut walk = Self { entered: Vec::new() };
        let mut level = vec![start];
        let budget = Arc::new(Budget::default());
        for depth in 1..=max_depth {
            if level.is_empty() {
                break;
            }
            let first = walk.entered.len();
            let mut listings =
                wait(Level { shared: shared.clone(), directories: level.clone(), budget: budget.clone() });
            let mut next = Vec::new();
            // Places of the directories of the next level.
            let mut place = first + level.len();
            for (index, (path, _)) in level.into_iter().enumerate() {
                let names = match listings.remove(&index) {
                    Some(Ok(listed)) => Ok(sorted(listed, |entry, handle| {
                        let inside = entry.path_in(&path).filter(|inside| depth < max_depth && !skip(inside));
                        let (inside, handle) = inside.zip(handle)?;
                        shared.names.keep(&inside, &handle);
                        next.push((inside, handle));
                        place += 1;
                        Some(place - 1)
                    })),
                    Some(Err(fault)) => Err(Some(fault.at("list", &path))),
                    None => Err(None),
                };
                walk.entered.push(Entered { path, names });
            }
            level = next;
        }
        walk
    }

    /// All that was found: parents before children, by name within a directory.
    pub(super) fn entries(mut self) -> Vec<crate::backend::Result<WalkEntry>> {
        let mut found = Vec::new();
        let mut open: Vec<Told> = Vec::new();
        self.open(0, &mut open, &mut found);
        while let Some((path, names)) = open.last_mut() {
            let Some((entry, child)) = names.next() else {
                open.pop();
                continue;
            };
            let inside = entry.path_in(path).ok_or_else(|| {
                let name = entry.name.clone().unwrap_or_else(|lossy| lossy);
                if path.is_root() { name } else { format!("{path}/{name}") }
            });
            found.push(Ok(WalkEntry { path: inside, kind: entry.kind }));
            if let Some(child) = child {
                self.open(child, &mut open, &mut found);
            }
        }
        found
    }

    fn open(
        &mut self,
        index: usize,
        open: &mut Vec<Told>,
        found: &mut Vec<crate::backend::Result<WalkEntry>>,
    ) {
        let Some(entered) = self.entered.get_mut(index) else { return };
        match std::mem::replace(&mut entered.names, Err(None)) {
            Ok(names) => open.push((entered.path.clone(), names.into_iter())),
            Err(Some(error)) => found.push(Err(error)),
            Err(None) => {}
        }
    }
}

/// By name; directories get what `enter` says of them.
fn sorted(
    mut listed: Vec<Listed>,
    mut enter: impl FnMut(&DirEntry, Option<nfs_fh3>) -> Option<usize>,
) -> Vec<(DirEntry, Option<usize>)> {
    fn text(entry: &DirEntry) -> &str {
        match &entry.name {
            Ok(name) | Err(name) => name,
        }
    }
    listed.sort_by(|left, right| text(&left.entry).cmp(text(&right.entry)));
    let each = listed.into_iter().map(|Listed { entry, handle }| {
        let child = if entry.kind == FileKind::Directory { enter(&entry, handle) } else { None };
        (entry, child)
    });
    each.collect()
}

/// The directories of one level.
pub(super) struct Level {
    shared: Arc<Shared>,
    directories: Vec<(StorePath, nfs_fh3)>,
    budget: Arc<Budget>,
}

/// What each directory of a level holds, by its index.
pub(super) type LevelNames = HashMap<usize, Result<Vec<Listed>>>;

impl Level {
    /// Lists them all, some at a time.
    pub(super) async fn list(self) -> LevelNames {
        let Self { shared, directories, budget } = self;
        let mut waiting = directories.into_iter().enumerate();
        let mut running = JoinSet::new();
        let mut done = LevelNames::new();
        loop {
            while running.len() < shared.connections {
                let Some((index, (path, handle))) = waiting.next() else { break };
                let (shared, budget) = (shared.clone(), budget.clone());
                running.spawn(async move {
                    let listed = match list(&shared, &handle, &budget).await {
                        // Not the directory any more that had the name a moment ago.
                        Err(fault) if fault.is_stale() => shared.list(&path, &budget).await,
                        listed => listed,
                    };
                    (index, listed)
                });
            }
            match running.join_next().await {
                Some(Ok((index, listed))) => {
                    done.insert(index, listed);
                }
                // Nothing is cancelled, and nothing panics.
                Some(Err(_)) => {}
                None => return done,
            }
        }
    }
}
