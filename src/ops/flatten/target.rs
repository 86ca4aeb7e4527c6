//! Where an image goes: what stands in its way, its temporary, and its name at the end.

use std::sync::Arc;

use super::place::Place;
use super::properties;
use crate::backend::publish::{publish, publish_directory, publish_new, take_identity, temporary_in};
use crate::backend::{Backend, BackendError, FileId, FileKind, Identity, StoreFile};
use crate::chain::graph::NodeId;
use crate::failure::Code;
use crate::ids::StorePath;
use crate::ops::{OpError, Result};
use crate::qcow2::layout::canonical::Form;
use crate::store::scan::Scan;
use crate::store::stream::Source;
use crate::store::{StoreError, Stores};

/// Permissions of a new image, and of the file beside it: the web server of the system VM reads them.
const MODE: u32 = 0o644;

/// A file in some directory.
#[derive(Clone, Debug)]
pub struct FileTarget {
    /// The directory.
    pub backend: Arc<dyn Backend>,
    /// The name in it.
    pub path: StorePath,
    /// What reports call it.
    pub shown: String,
    /// Whether it may replace a file.
    pub overwrite: bool,
}

/// Where an image goes.
#[derive(Clone, Debug)]
pub enum Target {
    /// A file.
    File(FileTarget),
    /// A place of CloudStack's.
    Place(Place),
}

impl Target {
    /// Refuses what is in the way: a file that may not be replaced, a member, one that QEMU has open.
    pub(super) fn check(&self, stores: &Stores, scan: &Scan, source: &Source) -> Result<()> {
        let exists = |name: &str| OpError::Refused {
            code: Code::TargetExists,
            member: String::new(),
            message: format!("{name} exists already"),
        };
        let target = match self {
            Self::File(target) => target,
            Self::Place(place) => {
                let store = stores.get(place.store)?;
                store.writable_record()?;
                let free = place.is_free(store.backend().as_ref())?;
                return if free { Ok(()) } else { Err(exists(place.directory()?.as_str())) };
            }
        };
        let stat = match target.backend.stat(&target.path) {
            Ok(stat) if stat.kind == FileKind::File => stat,
            Ok(_) => {
                return Err(failed(&target.shown)(BackendError::NotPlain { path: target.shown.clone() }));
            }
            Err(BackendError::NotFound { .. }) => return Ok(()),
            Err(error) => return Err(failed(&target.shown)(error)),
        };
        if !target.overwrite {
            return Err(exists(&target.shown));
        }
        let is = |id: FileId| id == stat.id;
        // CloudStack's own flattened copy is written anew at any time, and nobody stands on it.
        let bare = |id: &NodeId| scan.graph.children(*id).is_empty();
        let member = scan.graph.ids().find(|id| scan.member(*id).is_some_and(|member| is(member.stat.id)));
        let copy = member.filter(bare).and_then(|id| scan.member(id)).is_some_and(|member| member.temporary);
        if source.files().any(is) || member.is_some() && !copy {
            let message = format!("{} is a member of a chain, which is not overwritten", target.shown);
            return Err(OpError::Refused { code: Code::TargetExists, member: String::new(), message });
        }
        let file = target.backend.open(&target.path).map_err(failed(&target.shown))?;
        match file.image_locks() {
            Ok(locks) if locks.any => {
                let message = format!("QEMU has {} open", target.shown);
                Err(OpError::Refused { code: Code::Locked, member: String::new(), message })
            }
            // A store without locks has nobody to tell of.
            _ => Ok(()),
        }
    }
}

pub(super) fn failed(name: &str) -> impl Fn(BackendError) -> OpError + '_ {
    move |source| match source {
        BackendError::NotFound { .. } => StoreError::NotFound { name: name.to_owned() }.into(),
        source => OpError::Image(crate::qcow2::ImageError::Store { image: name.to_owned(), source }),
    }
}

/// An image in the making, under a temporary name. Dropped unpublished it goes.
pub(super) struct Output {
    backend: Arc<dyn Backend>,
    shown: String,
    /// The directory that becomes the place, if it is one of CloudStack's.
    directory: Option<StorePath>,
    path: StorePath,
    file: Arc<dyn StoreFile>,
    done: bool,
}

impl Output {
    /// Makes the temporary.
    pub(super) fn create(stores: &Stores, target: &Target, form: Form) -> Result<Self> {
        match target {
            Target::File(target) => {
                let failed = failed(&target.shown);
                let path = temporary_in(&target.path.parent()).map_err(&failed)?;
                let file = target.backend.create(&path).map_err(&failed)?;
                let (backend, shown) = (Arc::clone(&target.backend), target.shown.clone());
                Ok(Self { backend, shown, directory: None, path, file, done: false })
            }
            Target::Place(place) => {
                let backend = Arc::clone(stores.get(place.store)?.backend());
                let name = place.file_name(form);
                let shown = format!("{}/{name}", place.directory()?);
                let failed = failed(&shown);
                let directory = place.staging(backend.as_ref()).map_err(&failed)?;
                backend.create_dir(&directory, false).map_err(&failed)?;
                let path =
                    directory.join(&name).map_err(|error| StoreError::Usage { detail: error.to_string() })?;
                let file = backend.create(&path).map_err(&failed)?;
                Ok(Self {
                    backend,
                    shown: shown.clone(),
                    directory: Some(directory),
                    path,
                    file,
                    done: false,
                })
            }
        }
    }

    pub(super) fn file(&self) -> &dyn StoreFile {
        self.file.as_ref()
    }

    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    pub(super) fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    /// The directory of the temporary.
    pub(super) fn scratch(&self) -> StorePath {
        self.path.parent()
    }

    /// The file as a reader finds it.
    pub(super) fn reopen(&self) -> Result<Arc<dyn StoreFile>> {
        self.backend.open(&self.path).map_err(failed(&self.shown))
    }

    pub(super) fn length(&self) -> Result<u64> {
        Ok(self.file.stat().map_err(failed(&self.shown))?.length)
    }

    /// Refuses if there is less room than so many bytes.
    pub(super) fn need(&self, needed_bytes: u64) -> Result<()> {
        let free_bytes = self.backend.space().map_err(failed(&self.shown))?.free_bytes;
        if free_bytes < needed_bytes {
            return Err(OpError::NoSpace { store: self.backend.describe(), free_bytes, needed_bytes });
        }
        Ok(())
    }

    /// Makes the bytes durable.
    pub(super) fn seal(&self) -> Result<()> {
        self.file.sync().map_err(failed(&self.shown))
    }

    fn readable(&self, file: &dyn StoreFile) -> std::result::Result<(), BackendError> {
        let own = file.identity()?;
        let _ = self;
        file.set_identity(&Identity { mode: MODE, ..own })
    }

    /// Gives the image its name; says what that is.
    pub(super) fn publish(
        mut self,
        stores: &Stores,
        target: &Target,
        facts: &properties::Facts,
    ) -> Result<String> {
        let failed = failed(&self.shown);
        let named = match target {
            Target::File(target) => self.publish_file(target),
            Target::Place(place) => {
                stores.get(place.store)?.writable_record()?;
                let at = place.directory()?;
                self.publish_place(place, &at, facts)
            }
        };
        match named {
            Ok(()) => {
                self.done = true;
                Ok(self.shown.clone())
            }
            Err(BackendError::AlreadyExists { .. }) => {
                let message = format!("{} exists already: somebody made it meanwhile", self.shown);
                Err(OpError::Refused { code: Code::TargetExists, member: String::new(), message })
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn publish_file(&self, target: &FileTarget) -> std::result::Result<(), BackendError> {
        let old =
            if target.overwrite { target.backend.open(&target.path) } else { Err(missing(&target.path)) };
        match old {
            Ok(old) => {
                take_identity(old.as_ref(), self.file.as_ref())?;
                publish(self.backend.as_ref(), &self.path, &target.path)
            }
            Err(BackendError::NotFound { .. }) => {
                self.readable(self.file.as_ref())?;
                publish_new(self.backend.as_ref(), &self.path, &target.path)
            }
            Err(error) => Err(error),
        }
    }

    fn publish_place(
        &self,
        place: &Place,
        at: &StorePath,
        facts: &properties::Facts,
    ) -> std::result::Result<(), BackendError> {
        let Some(directory) = &self.directory else { return Err(missing(at)) };
        let text = properties::text(place, self.path.file_name(), facts);
        let named = directory.join(place.properties_name()).map_err(|_| missing(at))?;
        let file = self.backend.create(&named)?;
        file.write_at(0, text.as_bytes())?;
        self.readable(file.as_ref())?;
        file.sync()?;
        self.readable(self.file.as_ref())?;
        self.file.sync()?;
        publish_directory(self.backend.as_ref(), directory, at)
    }
}

fn missing(path: &StorePath) -> BackendError {
    BackendError::NotFound { path: path.to_string() }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        // Best effort: what is left has a temporary's name.
        let _ = self.backend.remove_file(&self.path);
        if let Some(directory) = &self.directory {
            for name in ["template.properties", "volume.properties"] {
                let _ = directory.join(name).map(|path| self.backend.remove_file(&path));
            }
            let _ = self.backend.remove_dir(directory);
        }
    }
}
