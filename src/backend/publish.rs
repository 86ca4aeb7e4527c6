//! The one place that gives a file the name of another.
//!
//! The order is always the same: the new file's bytes are made durable under a name of their own, then the
//! name changes, then the directories are made durable. So a name stands for the whole old file or the
//! whole new one, at every instant and after a crash. What a crash can leave besides is a temporary file;
//! its name ends in `.tmp`, and nothing ever reads one by its ending.
//!
//! Identity (owner, mode, attributes) is taken over before, by [`take_identity`], so that nobody ever sees
//! the new bytes under the wrong owner.

use std::io;
use std::sync::Arc;

use super::{Backend, BackendError, FileKind, Result, StoreFile};
use crate::ids::StorePath;

/// A new name for a temporary file: random, ending in `.tmp`, without a leading dot.
#[must_use]
pub fn temporary_name() -> String {
    format!("{}.tmp", uuid::Uuid::new_v4().simple())
}

/// A new path for a temporary file in `directory`. Fails only if the path gets too long.
pub fn temporary_in(directory: &StorePath) -> Result<StorePath> {
    directory.join(&temporary_name()).map_err(|error| {
        BackendError::from_io("name a file in", directory, io::Error::new(io::ErrorKind::InvalidInput, error))
    })
}

/// Gives the finished file at `temporary` the name `target`, which may be taken by another file or free.
///
/// Makes its bytes durable, renames it, makes both directories durable. The caller has closed it for
/// writing and has given it its identity. If both names are one file already (a redo of a publication that
/// was cut off), only `temporary` goes. Blocks for as long as the store needs to write all bytes out.
///
/// # Errors
///
/// [`BackendError::NotPlain`] if anything but a regular file has either name: nothing was changed. After
/// any other error `target` stands for the old file or the new one; only if the error is about the
/// directories' durability, the new one. Calling again is safe as long as `temporary` exists.
///
/// # After a crash
///
/// `target` stands for the old file or for the whole new one; `temporary` may or may not be there still.
pub fn publish(backend: &dyn Backend, temporary: &StorePath, target: &StorePath) -> Result<()> {
    let file = backend.open(temporary)?;
    file.sync()?;
    move_over(backend, file.as_ref(), temporary, target)?;
    sync_directories(backend, temporary, target)
}

/// Gives a durable file the name `target`, free or not; that is not durable yet.
fn move_over(
    backend: &dyn Backend,
    file: &dyn StoreFile,
    temporary: &StorePath,
    target: &StorePath,
) -> Result<()> {
    let new = file.stat()?.id;
    match backend.stat(target) {
        Ok(old) if old.kind != FileKind::File => Err(BackendError::NotPlain { path: target.to_string() }),
        // A rename would do nothing, report success, and leave both names.
        Ok(old) if old.id == new => backend.remove_file(temporary),
        Ok(_) | Err(BackendError::NotFound { .. }) => match backend.rename(temporary, target) {
            // A server that was asked twice, because its first answer was lost, says that the old name
            // does not exist: then the new one tells.
            Err(BackendError::NotFound { .. }) if backend.stat(target).is_ok_and(|is| is.id == new) => Ok(()),
            done => done,
        },
        Err(error) => Err(error),
    }
}

/// Gives the finished file at `temporary` the name `target`, which must be free. Otherwise as [`publish`]. Where the
/// store has no hard links, a file that somebody puts there in this very moment is replaced.
///
/// # Errors
///
/// [`BackendError::AlreadyExists`] if the name is taken: nothing was changed.
///
/// # After a crash
///
/// `target` is free or stands for the whole new file; `temporary` may or may not be there still.
pub fn publish_new(backend: &dyn Backend, temporary: &StorePath, target: &StorePath) -> Result<()> {
    let file = backend.open(temporary)?;
    file.sync()?;
    match give_name(backend, file.as_ref(), temporary, target) {
        Err(error) if error.is_unsupported() => match backend.stat(target) {
            Ok(_) => return Err(BackendError::AlreadyExists { path: target.to_string() }),
            Err(BackendError::NotFound { .. }) => backend.rename(temporary, target)?,
            Err(error) => return Err(error),
        },
        done => {
            done?;
            let rest =
                backend.remove_file(temporary).and_then(|()| sync_directories(backend, temporary, target));
            if rest.is_err() {
                // Best effort: what is reported as failed should not be there.
                let _ = backend.remove_file(target);
            }
            return rest;
        }
    }
    sync_directories(backend, temporary, target)
}

/// Gives a directory of finished, durable files another name: all of them appear at once. The name is free, or stands
/// for an empty directory.
///
/// # Errors
///
/// [`BackendError::AlreadyExists`] if there is something in that directory, [`BackendError::is_unsupported`] where
/// directories cannot be moved: nothing was changed.
///
/// # After a crash
///
/// The directory has one of both names, with all that is in it.
pub fn publish_directory(backend: &dyn Backend, temporary: &StorePath, target: &StorePath) -> Result<()> {
    backend.sync_dir(temporary)?;
    backend.rename_dir(temporary, target)?;
    sync_directories(backend, temporary, target)
}

/// Publishes a small file under a name that must be free: an exclusive create that is decided by the store
/// and whole from its first instant. `directory` takes the temporary file; it must be on the same file
/// system as `path`. Returns once the file and its name are durable. Blocks.
///
/// # Errors
///
/// [`BackendError::AlreadyExists`] if somebody else has the name. After any other error the name may have
/// been taken by this call or not: read it to find out.
///
/// # After a crash
///
/// The name is free, or stands for all of `bytes`; a temporary file may be left. Where the store has no
/// hard links the name is taken first and the bytes follow: there a crash can also leave the name with a
/// part of the bytes, so a reader must treat a record that does not parse as being written still.
pub fn write_new(backend: &dyn Backend, directory: &StorePath, path: &StorePath, bytes: &[u8]) -> Result<()> {
    claim(backend, &temporary_in(directory)?, path, bytes)
}

/// Publishes a small file over a name, free or not. `directory` takes the temporary file; it must be on
/// the same file system as `path`. With `keep_identity` the new file takes over owner, mode and attributes
/// of the old one, which must exist; else it has mode 0600 and this process's owner. Blocks.
///
/// # Errors
///
/// As [`publish`]; [`BackendError::Squashed`] before anything was changed.
///
/// # After a crash
///
/// As [`publish`].
pub fn replace(
    backend: &dyn Backend,
    directory: &StorePath,
    path: &StorePath,
    bytes: &[u8],
    keep_identity: bool,
) -> Result<()> {
    let old = if keep_identity { Some(backend.open(path)?) } else { None };
    let temporary = temporary_in(directory)?;
    // A power cut may bring the temporary's name back, which is swept: its directory is not made durable.
    let done = stage(backend, &temporary, bytes, old.as_deref())
        .and_then(|file| move_over(backend, file.as_ref(), &temporary, path))
        .and_then(|()| backend.sync_dir(&path.parent()));
    if done.is_err() {
        // Best effort: the first error is the one to report, and a leftover is swept by its name.
        let _ = backend.remove_file(&temporary);
    }
    done
}

/// Swaps the files of two names, atomically. Whose bytes they are is the caller's to check, before and after;
/// so is making the directories durable.
///
/// # Errors
///
/// [`BackendError::is_unsupported`] where the store cannot swap, [`BackendError::NotPlain`] if one of them
/// is no regular file, [`BackendError::NotFound`]: nothing was changed. After any other error they were
/// swapped or not: their ids tell. Never call again without looking: that would swap them back.
///
/// # After a crash
///
/// Both were swapped or neither.
pub fn swap(backend: &dyn Backend, a: &StorePath, b: &StorePath) -> Result<()> {
    backend.exchange(a, b)
}

/// Moves a file from one name to another, over whatever has that. The caller has looked at both: if they are
/// one file, nothing happens, and this says that it did. Making the directories durable is the caller's.
///
/// # Errors
///
/// [`BackendError::NotFound`] if nothing has the first name, perhaps because an earlier call did it already.
///
/// # After a crash
///
/// It was moved or not.
pub fn take_name(backend: &dyn Backend, from: &StorePath, to: &StorePath) -> Result<()> {
    backend.rename(from, to)
}

/// Gives the file at `from` one more name, `to`. If `to` is a name of that file already (a redo), this
/// succeeds. Making the directory durable is the caller's.
///
/// # Errors
///
/// [`BackendError::AlreadyExists`] if another file has the name, [`BackendError::is_unsupported`] where a
/// file can have one name only: nothing was changed. After any other error it has the name or not.
///
/// # After a crash
///
/// `to` is free or stands for the file.
pub fn link(backend: &dyn Backend, from: &StorePath, to: &StorePath) -> Result<()> {
    match backend.hard_link(from, to) {
        Err(BackendError::AlreadyExists { path: taken }) => match (backend.stat(to), backend.stat(from)) {
            (Ok(is), Ok(ours)) if is.id == ours.id => Ok(()),
            _ => Err(BackendError::AlreadyExists { path: taken }),
        },
        done => done,
    }
}

/// Publishes a small file under a name that must be free, by way of `temporary`: an exclusive create that is
/// decided by the store. Durable when it returns. Otherwise as [`write_new`].
pub fn claim(backend: &dyn Backend, temporary: &StorePath, path: &StorePath, bytes: &[u8]) -> Result<()> {
    let written = stage(backend, temporary, bytes, None)
        .and_then(|file| link_new(backend, file.as_ref(), temporary, path, bytes));
    // Also after an error: what is left is swept by its name otherwise.
    let removed = backend.remove_file(temporary);
    written?;
    removed?;
    backend.sync_dir(&path.parent())
}

/// As [`claim`], and whole from its first instant on every store. Where a file can have one name only the record gets
/// its name within a directory of its own: [`decided`] finds it either way. (Written under its name it would be torn for as
/// long as its writer is stopped, and nobody could say whether he will go on.) A store that cannot move directories either
/// writes it in place.
///
/// # After a crash
///
/// The name is free, or stands for all of `bytes`; `temporary`, or a directory of its name with `.d`, may be left.
pub fn decide(backend: &dyn Backend, temporary: &StorePath, path: &StorePath, bytes: &[u8]) -> Result<()> {
    let written = stage(backend, temporary, bytes, None).and_then(|file| {
        match give_name(backend, file.as_ref(), temporary, path) {
            Err(error) if error.is_unsupported() => {
                match within_directory(backend, temporary, path) {
                    Err(error) if error.is_unsupported() => {}
                    done => return done,
                }
                let named = backend.create(path)?;
                named.write_at(0, bytes)?;
                named.sync()
            }
            done => done,
        }
    });
    // Also after an error: what is left is swept by its name otherwise.
    let removed = match backend.remove_file(temporary) {
        Err(BackendError::NotFound { .. }) => Ok(()),
        done => done,
    };
    written?;
    removed?;
    backend.sync_dir(&path.parent())
}

/// The name of a record in a directory of its own.
const RECORD: &str = "record";

/// Where the bytes lie of what [`decide`] gave that name, if they are not there: in a directory of that name.
#[must_use]
pub fn decided(path: &StorePath) -> StorePath {
    path.join(RECORD).unwrap_or_else(|_| path.clone())
}

/// Moves a durable file into a directory, which gets the name; one that has something in it keeps it.
fn within_directory(backend: &dyn Backend, temporary: &StorePath, path: &StorePath) -> Result<()> {
    let name = format!("{}.d", temporary.file_name());
    let directory = temporary.parent().join(&name).map_err(|error| {
        BackendError::from_io("name", temporary, io::Error::new(io::ErrorKind::InvalidInput, error))
    })?;
    backend.create_dir(&directory, true)?;
    let inside = decided(&directory);
    let done = backend
        .rename(temporary, &inside)
        .and_then(|()| backend.sync_dir(&directory))
        .and_then(|()| backend.rename_dir(&directory, path));
    if done.is_err() {
        // Back for whoever can do without, or to be removed by its caller.
        let _ = backend.rename(&inside, temporary);
        let _ = backend.remove_dir(&directory);
    }
    done
}

/// As [`claim`], but nothing is made durable: readers see nothing or all of it, and a power cut may leave the
/// name without its bytes. For records that can be done without.
pub fn offer(backend: &dyn Backend, temporary: &StorePath, path: &StorePath, bytes: &[u8]) -> Result<()> {
    let file = backend.create(temporary)?;
    let offered =
        file.write_at(0, bytes).and_then(|()| link_new(backend, file.as_ref(), temporary, path, bytes));
    let removed = backend.remove_file(temporary);
    offered?;
    removed
}

/// Gives `new` the owner, group, mode, ACL and attributes of `old`, and reads them back.
///
/// # Errors
///
/// [`BackendError::Squashed`] names the first that did not take; `new` may have some of them then.
pub fn take_identity(old: &dyn StoreFile, new: &dyn StoreFile) -> Result<()> {
    new.set_identity(&old.identity()?)
}

/// A temporary file with these bytes, durable, and with the identity of `like`.
fn stage(
    backend: &dyn Backend,
    temporary: &StorePath,
    bytes: &[u8],
    like: Option<&dyn StoreFile>,
) -> Result<Arc<dyn StoreFile>> {
    let file = backend.create(temporary)?;
    file.write_at(0, bytes)?;
    if let Some(old) = like {
        take_identity(old, file.as_ref())?;
    }
    file.sync()?;
    Ok(file)
}

/// Gives a durable file a second name that must be free.
fn link_new(
    backend: &dyn Backend,
    file: &dyn StoreFile,
    temporary: &StorePath,
    path: &StorePath,
    bytes: &[u8],
) -> Result<()> {
    match give_name(backend, file, temporary, path) {
        Err(error) if error.is_unsupported() => {
            let named = backend.create(path)?;
            named.write_at(0, bytes)?;
            named.sync()
        }
        done => done,
    }
}

/// A hard link, made once even if a server is asked for it twice: as in [`publish`], its second answer is
/// that the name is taken, by our file then.
fn give_name(backend: &dyn Backend, file: &dyn StoreFile, from: &StorePath, to: &StorePath) -> Result<()> {
    match backend.hard_link(from, to) {
        Err(BackendError::AlreadyExists { path: taken }) => match (backend.stat(to), file.stat()) {
            (Ok(is), Ok(ours)) if is.id == ours.id => Ok(()),
            _ => Err(BackendError::AlreadyExists { path: taken }),
        },
        done => done,
    }
}

fn sync_directories(backend: &dyn Backend, temporary: &StorePath, target: &StorePath) -> Result<()> {
    backend.sync_dir(&target.parent())?;
    if temporary.parent() != target.parent() {
        backend.sync_dir(&temporary.parent())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{link, publish, replace, swap, write_new};
    use crate::backend::faulty::{Faulty, Lasting};
    use crate::backend::memory::MemoryStore;
    use crate::backend::{Backend, BackendError, Result};
    use crate::ids::StorePath;

    const EIO: i32 = 5;

    fn path(text: &str) -> StorePath {
        StorePath::parse(text).unwrap()
    }

    fn content(store: &MemoryStore, name: &str) -> Option<Vec<u8>> {
        let file = store.open(&path(name)).ok()?;
        let mut bytes = vec![0; usize::try_from(file.stat().unwrap().length).unwrap()];
        file.read_at(0, &mut bytes).unwrap();
        Some(bytes)
    }

    fn durable(store: &dyn Backend, name: &str, bytes: &[u8]) {
        let file = store.create(&path(name)).unwrap();
        file.write_at(0, bytes).unwrap();
        file.sync().unwrap();
        store.sync_dir(&path(name).parent()).unwrap();
    }

    /// Runs an action on a fresh store, cut off at each of its mutating calls, with each kind of power cut
    /// after it: the name must stand for one of `allowed`, and for the last of them after a success.
    fn cut_off_everywhere(target: bool, allowed: &[Option<&[u8]>], action: fn(&dyn Backend) -> Result<()>) {
        for keep_names in [false, true] {
            for n in 0.. {
                let memory = Arc::new(MemoryStore::new());
                memory.create_dir(&path("d"), true).unwrap();
                memory.create_dir(&path("tmp"), true).unwrap();
                memory.sync_dir(&StorePath::root()).unwrap();
                if target {
                    durable(memory.as_ref(), "d/a", b"old");
                }
                let faulty = Faulty::new(Arc::clone(&memory) as Arc<dyn Backend>);
                faulty.fail_halfway_at(n, EIO, Lasting::Dead);
                let done = action(&faulty).is_ok();
                if keep_names {
                    memory.crash_keeping_names();
                } else {
                    memory.crash();
                }
                let is = content(&memory, "d/a");
                assert!(allowed.contains(&is.as_deref()), "cut off at {n}: {is:?}");
                if done {
                    assert_eq!(is.as_deref(), allowed[allowed.len() - 1], "done, then crashed");
                    assert!(n > 3, "the fault at {n} was not noticed");
                    break;
                }
            }
        }
    }

    #[test]
    fn publish_is_old_or_new() {
        cut_off_everywhere(true, &[Some(b"old"), Some(b"new")], |store| {
            let file = store.create(&path("tmp/t"))?;
            file.write_at(0, b"new")?;
            publish(store, &path("tmp/t"), &path("d/a"))
        });
    }

    #[test]
    fn replace_is_old_or_new() {
        cut_off_everywhere(true, &[Some(b"old"), Some(b"new")], |store| {
            replace(store, &path("tmp"), &path("d/a"), b"new", true)
        });
    }

    #[test]
    fn write_new_is_nothing_or_all() {
        cut_off_everywhere(false, &[None, Some(b"new")], |store| {
            write_new(store, &path("tmp"), &path("d/a"), b"new")
        });
    }

    #[test]
    fn a_lost_answer_is_not_an_error() {
        // The server did it, its answer was lost, and the call that was sent again failed.
        let memory = Arc::new(MemoryStore::new());
        let faulty = Faulty::new(Arc::clone(&memory) as Arc<dyn Backend>);
        durable(memory.as_ref(), "t", b"new");
        let other = Arc::clone(&memory);
        // Calls: open, sync, stat of the file, stat of the target, rename.
        faulty.before(4, move || other.rename(&path("t"), &path("a")).unwrap());
        publish(&faulty, &path("t"), &path("a")).unwrap();
        assert_eq!(content(&memory, "a").unwrap(), b"new");
    }

    #[test]
    fn what_decides_is_whole_or_not_there() {
        use super::{decide, decided};
        let read = |store: &MemoryStore| content(store, "d/a").or_else(|| content(store, "d/a/record"));
        for links in [true, false] {
            for n in 0.. {
                let memory = Arc::new(MemoryStore::new().with_hard_links(links));
                for directory in ["d", "tmp"] {
                    memory.create_dir(&path(directory), true).unwrap();
                }
                memory.sync_dir(&StorePath::root()).unwrap();
                let faulty = Faulty::new(Arc::clone(&memory) as Arc<dyn Backend>);
                faulty.fail_halfway_at(n, EIO, Lasting::Dead);
                let done = decide(&faulty, &path("tmp/t"), &path("d/a"), b"first").is_ok();
                let there = read(&memory);
                assert!(there.is_none() || there.as_deref() == Some(b"first"), "{links} {n}: {there:?}");
                let second = decide(memory.as_ref(), &path("tmp/u"), &path("d/a"), b"second");
                assert_eq!(second.is_ok(), there.is_none(), "{links} {n}: {second:?}");
                memory.crash();
                assert!(!done || read(&memory).as_deref() == Some(b"first"), "{links} {n}: it did not last");
                assert_eq!(decided(&path("d/a")), path("d/a/record"));
                if done {
                    assert!(n > 4, "the fault at {n} was not noticed");
                    break;
                }
            }
        }
    }

    /// Two durable files in two directories.
    fn two() -> Arc<MemoryStore> {
        let memory = Arc::new(MemoryStore::new());
        for (directory, name) in [("d", "d/a"), ("e", "e/b")] {
            memory.create_dir(&path(directory), true).unwrap();
            durable(memory.as_ref(), name, name.as_bytes());
        }
        memory.sync_dir(&StorePath::root()).unwrap();
        memory
    }

    #[test]
    fn a_swap_is_never_half() {
        let (old, new) = ([&b"d/a"[..], b"e/b"], [&b"e/b"[..], b"d/a"]);
        for n in 0..2 {
            for seed in 0..64 {
                let memory = two();
                let faulty = Faulty::new(Arc::clone(&memory) as Arc<dyn Backend>);
                faulty.fail_at(n, EIO, Lasting::Dead);
                let done = swap(&faulty, &path("d/a"), &path("e/b")).is_ok();
                assert_eq!(done, n == 1, "one call, made durable by the caller");
                memory.crash_seeded(seed);
                let is = ["d/a", "e/b"].map(|name| content(&memory, name).unwrap());
                assert!(is == new || is == old, "cut off at {n}, {seed}: {is:?}");
            }
        }
    }

    #[test]
    fn a_link_asked_for_twice_is_one() {
        let memory = two();
        let faulty = Faulty::new(Arc::clone(&memory) as Arc<dyn Backend>);
        let other = Arc::clone(&memory);
        // The server did it, its answer was lost.
        faulty.before_mutation(0, move || other.hard_link(&path("d/a"), &path("e/c")).unwrap());
        link(&faulty, &path("d/a"), &path("e/c")).unwrap();
        memory.sync_dir(&path("e")).unwrap();
        memory.crash();
        assert_eq!(memory.stat(&path("e/c")).unwrap().links, 2);
        let taken = link(memory.as_ref(), &path("d/a"), &path("e/b"));
        assert!(matches!(taken, Err(BackendError::AlreadyExists { .. })), "{taken:?}");
    }
}
