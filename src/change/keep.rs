//! Keeping files under names of our own, and letting them go.

use crate::backend::BackendError;
use crate::backend::publish::{link, swap, take_name};
use crate::change::error::Result;
use crate::change::publication::stat;
use crate::change::record::Mark;
use crate::change::site::At;
use crate::change::yard;
use crate::ids::StorePath;

/// Whether a file has its second name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It has.
    Here,
    /// The store has no hard links.
    Impossible,
    /// Another file has the first name now; it was not kept.
    Another,
}

/// Gives the file of a name one more name, under which it is kept. The link is compared after it was made: if
/// it is another file than thought it is removed again, which leaves that file its own name.
pub fn keep(at: &At<'_>, name: &StorePath, kept: &StorePath, mark: &Mark) -> Result<Kept> {
    yard::ensure(at.backend, kept).map_err(at.failed("make room beside"))?;
    match link(at.backend, name, kept) {
        Ok(()) | Err(BackendError::AlreadyExists { .. }) => {}
        Err(BackendError::NotFound { .. }) => return Ok(Kept::Another),
        Err(error) if error.is_unsupported() => return Ok(Kept::Impossible),
        Err(source) => return Err(at.failed("keep the old file of")(source)),
    }
    match stat(at, kept)? {
        Some(found) if mark.is(&found) => Ok(Kept::Here),
        Some(found) => {
            if stat(at, name)?.is_some_and(|named| named.id == found.id) {
                release(at, kept)?;
            }
            Ok(Kept::Another)
        }
        None => Ok(Kept::Another),
    }
}

/// Gives a file another name, if that is free; where a file can have one name only, its only one. Never over another
/// file. Gives whether it has both names now.
///
/// # After a crash
///
/// The name is free, or stands for the file; calling again does the rest.
pub fn name_if_free(at: &At<'_>, from: &StorePath, name: &StorePath, action: &'static str) -> Result<bool> {
    match link(at.backend, from, name) {
        Ok(()) => return Ok(true),
        // Somebody has the name, or another instance was faster.
        Err(BackendError::AlreadyExists { .. } | BackendError::NotFound { .. }) => return Ok(false),
        Err(error) if error.is_unsupported() => {}
        Err(source) => return Err(at.failed(action)(source)),
    }
    if stat(at, name)?.is_none() {
        match take_name(at.backend, from, name) {
            Ok(()) | Err(BackendError::NotFound { .. }) => {}
            Err(source) => return Err(at.failed(action)(source)),
        }
    }
    Ok(false)
}

/// Gives a file the name back that the exchange for ours took from it. It may have come to its present one by a link,
/// where names cannot be exchanged: then ours goes.
pub fn take_back(at: &At<'_>, from: &StorePath, name: &StorePath) -> Result<()> {
    match swap(at.backend, from, name) {
        Err(error) if error.is_unsupported() => take_name(at.backend, from, name),
        done => done,
    }
    .map_err(at.failed("take back"))
}

/// Removes a name that may be gone already.
pub fn release(at: &At<'_>, path: &StorePath) -> Result<()> {
    match at.backend.remove_file(path) {
        Ok(()) | Err(BackendError::NotFound { .. }) => Ok(()),
        Err(source) => Err(at.failed("remove a second name of")(source)),
    }
}

/// Makes the names in directories durable, each directory once.
pub fn sync_all<'a>(directories: impl Iterator<Item = (&'a At<'a>, StorePath)>) -> Result<()> {
    let mut done = std::collections::BTreeSet::new();
    for (at, directory) in directories {
        if done.insert((at.key.store, directory.clone())) {
            match at.backend.sync_dir(&directory) {
                // A volume's directory that somebody removed has nothing to keep.
                Ok(()) | Err(BackendError::NotFound { .. }) => {}
                Err(source) => return Err(at.failed("sync the directory of")(source)),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Kept, keep};
    use crate::backend::Backend;
    use crate::backend::faulty::Faulty;
    use crate::backend::memory::MemoryStore;
    use crate::chain::graph::Key;
    use crate::change::record::Mark;
    use crate::change::site::At;
    use crate::change::trial::{opted_in, path, write};

    /// Others put their file in its place right before any call: theirs is left alone.
    #[test]
    fn only_the_file_that_was_meant_is_kept() {
        let (name, kept) = (path("m"), path(".qchain/trash/m"));
        let mut instead = 0;
        for meets in 0.. {
            let memory = opted_in(MemoryStore::new());
            let mark = write(memory.as_ref(), "m", b"meant");
            let faulty = Faulty::new(Arc::clone(&memory) as Arc<dyn Backend>);
            let other = Arc::clone(&memory);
            faulty.before(meets, move || {
                write(other.as_ref(), "other", b"another");
                other.rename(&path("other"), &path("m")).unwrap();
            });
            let at = At { backend: &faulty, key: Key { store: 0, path: name.clone() }, name: "m".to_owned() };
            let done = keep(&at, &name, &kept, &mark).unwrap();
            let named = memory.stat(&name).unwrap();
            let second = memory.stat(&kept).ok();
            match done {
                Kept::Here => assert_eq!(second.as_ref().map(Mark::from), Some(mark), "{meets}"),
                Kept::Another => {
                    instead += 1;
                    assert_eq!(second.map(|found| found.id), None, "{meets}");
                }
                Kept::Impossible => panic!("{meets}: there are hard links"),
            }
            if faulty.calls() <= meets {
                assert!(mark.is(&named) && instead > 0, "{meets}");
                break;
            }
            assert!(!mark.is(&named), "{meets}: what others put there is gone");
        }
    }
}
