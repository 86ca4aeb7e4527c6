//! A member's new file while it is being made.

use std::sync::Arc;

use crate::backend::publish::{publish, take_identity, temporary_in};
use crate::backend::{Backend, BackendError, StoreFile};
use crate::change::error::{ChangeError, Result};
use crate::change::guard::Guard;
use crate::ids::StorePath;
use crate::store::facts::Stamp;
use crate::store::record::{BESIDE_DIRECTORY, own};

/// A new file that is to take the name of an old one. Dropped before it is published, it goes away.
pub struct Staged<'a> {
    backend: Arc<dyn Backend>,
    target: &'a StorePath,
    /// The old file as it was when the change began.
    old: Stamp,
    temporary: StorePath,
    file: Arc<dyn StoreFile>,
    /// A directory that was made for the temporary, to be removed with it.
    beside: Option<StorePath>,
    published: bool,
}

impl<'a> Staged<'a> {
    /// Makes an empty file with the identity of `old`, the open file at `target`: if the store does not allow
    /// that identity, this is where it shows (`squashed`), before any byte.
    pub fn create(
        _guard: &Guard,
        backend: &Arc<dyn Backend>,
        target: &'a StorePath,
        old: &dyn StoreFile,
    ) -> Result<Self> {
        let fail = |action| move |source| failed(action, target, source);
        let stamp = Stamp::from(&old.stat().map_err(fail("look at"))?);
        let (directory, beside) =
            directory_for(backend.as_ref(), target).map_err(fail("make room beside"))?;
        let temporary = temporary_in(&directory).map_err(fail("name a temporary for"))?;
        let file = backend.create(&temporary).map_err(fail("make a temporary for"))?;
        let backend = backend.clone();
        let staged = Self { backend, target, old: stamp, temporary, file, beside, published: false };
        take_identity(old, staged.file.as_ref()).map_err(fail("give owner and attributes to"))?;
        Ok(staged)
    }

    /// The file, to be written.
    #[must_use]
    pub fn file(&self) -> &dyn StoreFile {
        self.file.as_ref()
    }

    /// Makes the bytes durable and opens the file again as a reader would: what is read from it comes from
    /// the store, as far as the store allows. Nothing may be written after.
    pub fn seal(&self) -> Result<Arc<dyn StoreFile>> {
        let fail = |action| move |source| failed(action, self.target, source);
        self.file.sync().map_err(fail("make durable the new file of"))?;
        self.file.drop_cache().map_err(fail("drop from the cache the new file of"))?;
        self.backend.open(&self.temporary).map_err(fail("open again the new file of"))
    }

    /// Gives the new file the name, if that still stands for the old file as it was; returns once the name
    /// is durable.
    pub fn publish(mut self) -> Result<()> {
        let fail = |action| move |source| failed(action, self.target, source);
        let now = self.backend.stat(self.target).map_err(fail("look at"))?;
        if Stamp::from(&now) != self.old {
            return Err(ChangeError::ChangedMeanwhile { member: self.target.to_string() });
        }
        publish(self.backend.as_ref(), &self.temporary, self.target).map_err(fail("publish"))?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        // Best effort: a leftover has a name of its own under qchain's directory and is nobody's data.
        if !self.published {
            let _ = self.backend.remove_file(&self.temporary);
        }
        if let Some(beside) = &self.beside {
            let _ = self.backend.remove_dir(beside);
        }
    }
}

/// Where a temporary for `target` can lie so that a rename reaches it: `.qchain/tmp` if that is on the same
/// file system, else a directory beside it, made if need be.
fn directory_for(
    backend: &dyn Backend,
    target: &StorePath,
) -> std::result::Result<(StorePath, Option<StorePath>), BackendError> {
    let own = own(&["tmp"]);
    if backend.stat(&own)?.id.device == backend.stat(&target.parent())?.id.device {
        return Ok((own, None));
    }
    let Ok(beside) = target.parent().join(BESIDE_DIRECTORY) else { return Ok((own, None)) };
    match backend.create_dir(&beside, true) {
        Ok(()) | Err(BackendError::AlreadyExists { .. }) => Ok((beside.clone(), Some(beside))),
        Err(error) => Err(error),
    }
}

fn failed(action: &'static str, target: &StorePath, source: BackendError) -> ChangeError {
    ChangeError::Store { action, member: target.to_string(), source }
}
