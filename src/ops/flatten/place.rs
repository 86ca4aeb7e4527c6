//! Places of CloudStack's where an image may go: `template/tmpl/<account>/<id>/`, `volumes/<account>/<id>/`.

use crate::backend::publish::temporary_in;
use crate::backend::{Backend, BackendError, FileKind};
use crate::cloudstack::paths::Area;
use crate::ids::StorePath;
use crate::ops::Result;
use crate::qcow2::layout::canonical::Form;
use crate::store::record::own;
use crate::store::{StoreError, Stores};

/// What an image is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A template, with `template.properties`.
    Template,
    /// A volume of secondary storage, with `volume.properties`.
    Volume,
}

/// `ACCOUNT/ID/NAME` on a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// What it is to be.
    pub purpose: Purpose,
    /// The store's index.
    pub store: usize,
    /// The account's number.
    pub account: u64,
    /// The template's or volume's number.
    pub id: u64,
    /// The file's name; the format's extension is added if it has not got it.
    pub name: String,
}

impl Place {
    /// Reads `[STORE:]ACCOUNT/ID/NAME`; without a store it is `store`.
    ///
    /// # Errors
    ///
    /// `usage`.
    pub fn parse(stores: &Stores, purpose: Purpose, text: &str, store: usize) -> Result<Self> {
        let (named, rest) = stores.split_name(text);
        let store = named.unwrap_or(store);
        let mut parts = rest.split('/');
        let number = |part: Option<&str>| {
            let part = part.filter(|part| !part.starts_with(['0', '+']))?;
            part.parse::<u64>().ok()
        };
        let (account, id, name) = (number(parts.next()), number(parts.next()), parts.next());
        let valid = |name: &&str| StorePath::root().join(name).is_ok() && !name.starts_with('.');
        if let (Some(account), Some(id), Some(name), None) = (account, id, name.filter(valid), parts.next()) {
            return Ok(Self { purpose, store, account, id, name: name.to_owned() });
        }
        let detail = format!("{text:?} is not ACCOUNT/ID/NAME, two numbers and a file name");
        Err(StoreError::Usage { detail }.into())
    }

    fn area(&self) -> Area {
        match self.purpose {
            Purpose::Template => Area::Template,
            Purpose::Volume => Area::Volumes,
        }
    }

    /// The name of the file that CloudStack reads.
    #[must_use]
    pub fn properties_name(&self) -> &'static str {
        match self.purpose {
            Purpose::Template => "template.properties",
            Purpose::Volume => "volume.properties",
        }
    }

    /// The directory.
    pub fn directory(&self) -> Result<StorePath> {
        let text = format!("{}/{}/{}", self.area().directory(), self.account, self.id);
        StorePath::parse(&text).map_err(|error| StoreError::Usage { detail: error.to_string() }.into())
    }

    /// The image's file name.
    #[must_use]
    pub fn file_name(&self, form: Form) -> String {
        let extension = format!(".{}", form.word());
        if self.name.ends_with(&extension) { self.name.clone() } else { format!("{}{extension}", self.name) }
    }

    /// Whether nothing is there: no directory, or an empty one.
    pub(super) fn is_free(&self, backend: &dyn Backend) -> Result<bool> {
        let directory = self.directory()?;
        let failed = |source| StoreError::Backend { store: backend.describe(), source };
        match backend.stat(&directory) {
            Ok(stat) if stat.kind == FileKind::Directory => {
                Ok(backend.read_dir(&directory).map_err(failed)?.is_empty())
            }
            Ok(_) => Ok(false),
            Err(BackendError::NotFound { .. }) => Ok(true),
            Err(source) => Err(failed(source).into()),
        }
    }

    /// Makes the directories above the place, durably.
    pub(super) fn make_parents(&self, backend: &dyn Backend) -> std::result::Result<StorePath, BackendError> {
        let account = self.account.to_string();
        let mut path = StorePath::root();
        for part in self.area().directory().split('/').chain([account.as_str()]) {
            let above = path.clone();
            path = path.join(part).unwrap_or(path);
            match backend.create_dir(&path, false) {
                Ok(()) => backend.sync_dir(&above)?,
                Err(BackendError::AlreadyExists { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(path)
    }

    /// Where the directory is made: among qchain's temporaries, if the place can be reached from there.
    pub(super) fn staging(&self, backend: &dyn Backend) -> std::result::Result<StorePath, BackendError> {
        let (parent, own) = (self.make_parents(backend)?, own(&["tmp"]));
        temporary_in(if backend.same_mount(&own, &parent)? { &own } else { &parent })
    }
}
