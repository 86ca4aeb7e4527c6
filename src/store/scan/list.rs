//! Which files of a store are looked at.

use crate::backend::{BackendError, FileKind, WalkEntry};
use crate::chain::graph::Key;
use crate::cloudstack::paths::{NameKind, name_kind};
use crate::failure::Code;
use crate::ids::StorePath;
use crate::store::error::{Result, StoreError};
use crate::store::record::{BESIDE_DIRECTORY, OWN_DIRECTORY, StoreKind};
use crate::store::scan::Finding;
use crate::store::{Store, Stores};

/// Where CloudStack keeps images, and how deep: `<area>/<account>/<volume or id>/<file>`.
const AREAS: &[(&str, usize)] = &[("snapshots", 3), ("template/tmpl", 3), ("volumes", 3)];
/// The same on primary storage: `snapshots/<file>`.
const PRIMARY_AREAS: &[(&str, usize)] = &[("snapshots", 1)];
/// How deep a plain store is looked through.
const PLAIN_DEPTH: usize = 16;

/// Appends the store's candidates, in the order of their paths.
pub fn members(
    stores: &Stores,
    index: usize,
    store: &Store,
    found: &mut Vec<Key>,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let plain = [("", PLAIN_DEPTH)];
    let areas = match store.kind() {
        StoreKind::Cloudstack => AREAS,
        StoreKind::Primary => PRIMARY_AREAS,
        StoreKind::Plain => &plain,
    };
    for (area, depth) in areas {
        let Ok(root) = StorePath::parse(area) else { continue };
        for entry in walk(store, &root, *depth)? {
            let mut tell = |path: &str, code: Code, message: &str| {
                let member = match StorePath::parse(path) {
                    Ok(path) => stores.display(&Key { store: index, path }),
                    Err(_) => path.to_owned(),
                };
                findings.push(Finding { member, code, message: message.to_owned() });
            };
            let path = match entry.path {
                Ok(path) => path,
                Err(text) => {
                    tell(&text, Code::BadName, "its name is no valid name of a member; it is left alone");
                    continue;
                }
            };
            let at_depth = store.kind() == StoreKind::Plain
                || path.components().count() == root.components().count() + depth;
            match entry.kind {
                FileKind::File if at_depth => {}
                FileKind::Symlink | FileKind::Special if at_depth => {
                    tell(path.as_str(), Code::SpecialFile, "it is no regular file; it was not opened");
                    continue;
                }
                _ => continue,
            }
            if store.kind() != StoreKind::Plain && !wanted(area, path.file_name()) {
                continue;
            }
            found.push(Key { store: index, path });
        }
    }
    Ok(())
}

/// Whether a file of an area may be an image: beside templates and volumes lie properties files.
fn wanted(area: &str, name: &str) -> bool {
    let foreign = name_kind(name) == NameKind::Foreign;
    let named_otherwise = ["properties", "log", "iso", "raw"]
        .iter()
        .any(|extension| name.rsplit_once('.').is_some_and(|(_, found)| found == *extension));
    !foreign && (area == "snapshots" || !named_otherwise)
}

/// All checkpoint files of a store.
pub fn checkpoint_files(store: &Store) -> Result<Vec<StorePath>> {
    let Ok(root) = StorePath::parse("checkpoints") else { return Ok(Vec::new()) };
    let depth = if store.kind() == StoreKind::Primary { 1 } else { 3 };
    let entries = walk(store, &root, depth)?.into_iter();
    let files = entries.filter(|entry| entry.kind == FileKind::File).filter_map(|entry| entry.path.ok());
    Ok(files.filter(|path| path.components().count() == 1 + depth).collect())
}

/// Walks a directory that may be missing; what vanishes meanwhile is as if it had not been there.
pub fn walk(store: &Store, root: &StorePath, depth: usize) -> Result<Vec<WalkEntry>> {
    let own = |path: &StorePath| [OWN_DIRECTORY, BESIDE_DIRECTORY].contains(&path.file_name());
    let mut entries = Vec::new();
    for entry in store.backend().walk(root, depth, &own) {
        match entry {
            Ok(entry) => entries.push(entry),
            Err(BackendError::NotFound { .. }) => {}
            Err(source) => return Err(StoreError::backend(store, source)),
        }
    }
    Ok(entries)
}
