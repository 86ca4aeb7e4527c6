//! All names below a directory.
//!
//! `walkdir` goes by path, starting at the directory that was opened. Somebody who swaps a directory for a
//! link at the right moment can make it list names of elsewhere; they are only names. Whatever is done with
//! one resolves it again from the root.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use walkdir::WalkDir;

use super::failed;
use crate::backend::{BackendError, FileKind, Result, WalkEntry};
use crate::ids::StorePath;

pub(super) fn walk(
    directory: &OwnedFd,
    root: &Path,
    path: &StorePath,
    max_depth: usize,
    skip: &dyn Fn(&StorePath) -> bool,
) -> Vec<Result<WalkEntry>> {
    if max_depth == 0 {
        return Vec::new();
    }
    let start = start(directory, root, path);
    let mut found = Vec::new();
    let mut names = WalkDir::new(&start)
        .follow_links(false)
        .min_depth(1)
        .max_depth(max_depth)
        .sort_by_file_name()
        .into_iter();
    while let Some(item) = names.next() {
        let entry = match item {
            Ok(entry) => entry,
            Err(error) => {
                found.push(Err(unreadable(error, &start, path)));
                continue;
            }
        };
        let here = below(path, &start, entry.path());
        let kind = kind_of(entry.file_type());
        if kind == FileKind::Directory && here.as_ref().map_or(true, skip) {
            names.skip_current_dir();
        }
        found.push(Ok(WalkEntry { path: here, kind }));
    }
    found
}

/// The opened directory by a name that cannot be swapped under us; its path where there is no `/proc`.
fn start(directory: &OwnedFd, root: &Path, path: &StorePath) -> PathBuf {
    let pinned = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    if pinned.exists() { pinned } else { root.join(path.as_str()) }
}

/// The store's path of what was found, or its lossy text.
fn below(path: &StorePath, start: &Path, found: &Path) -> std::result::Result<StorePath, String> {
    let rest = found.strip_prefix(start).unwrap_or(found);
    let parsed = rest
        .iter()
        .map(OsStr::to_str)
        .try_fold(path.clone(), |at, name| name.and_then(|name| at.join(name).ok()));
    parsed.ok_or_else(|| {
        let rest = rest.to_string_lossy();
        if path.is_root() { rest.into_owned() } else { format!("{path}/{rest}") }
    })
}

fn unreadable(error: walkdir::Error, start: &Path, path: &StorePath) -> BackendError {
    let shown = match error.path().map(|found| below(path, start, found)) {
        Some(Ok(found)) => found.to_string(),
        Some(Err(text)) => text,
        None => path.to_string(),
    };
    let source = error.into_io_error().unwrap_or_else(|| io::Error::other("a directory contains itself"));
    failed("list", shown, source)
}

fn kind_of(kind: std::fs::FileType) -> FileKind {
    if kind.is_file() {
        FileKind::File
    } else if kind.is_dir() {
        FileKind::Directory
    } else if kind.is_symlink() {
        FileKind::Symlink
    } else {
        FileKind::Special
    }
}
