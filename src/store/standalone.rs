//! Images that belong to no configured store: a file, and what it names as backing file beside it.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::backend::{Backend, BackendError};
use crate::chain::graph::{ChainError, Key, Parent};
use crate::cloudstack::backing::{At, NameMap, StoreNames, Target};
use crate::failure::Code;
use crate::ids::{StoreId, StorePath};
use crate::qcow2::{Image, ImageError};
use crate::store::chain::{MAX_DEPTH, OpenChain};
use crate::store::error::{Result, StoreError};

/// Opens the chain of the image `file` in a directory: backing names are mapped to files of that directory,
/// whose absolute path is `root`, and to nothing outside it.
pub fn open(backend: &Arc<dyn Backend>, root: &str, file: &StorePath) -> Result<OpenChain> {
    let id = StoreId::parse("directory").map_err(|error| StoreError::Usage { detail: error.to_string() })?;
    let names = NameMap::new(vec![StoreNames::new(id, Some(root), None, &[])]);
    let exists = |_: usize, path: &StorePath| backend.stat(path).is_ok();
    let mut seen = BTreeSet::new();
    let mut images = Vec::new();
    let mut path = file.clone();
    loop {
        let fail = |source| StoreError::Chain { member: file.to_string(), source };
        if !seen.insert(path.clone()) {
            return Err(fail(ChainError::Cycle { member: key(file) }));
        }
        if images.len() > MAX_DEPTH {
            let detail = format!("its chain has more than {MAX_DEPTH} members");
            return Err(bad(file, Code::TooDeep, detail));
        }
        let image = open_one(backend, &path)?;
        let backing = image.header().backing.clone();
        images.push(image);
        let Some(backing) = backing else { return Ok(OpenChain::of(images)) };
        if let Some(format) = backing.format.filter(|format| format != "qcow2") {
            let detail = format!("its backing format is {format:?}, not qcow2");
            return Err(bad(&path, Code::WrongFormat, detail));
        }
        let text = String::from_utf8_lossy(&backing.name).into_owned();
        let broken = |parent| fail(ChainError::Broken { member: key(file), at: key(&path), parent });
        let below = match names.resolve(&backing.name, At { store: 0, path: &path }, &exists) {
            Target::Member { path, .. } => path,
            Target::Missing => return Err(broken(Parent::Missing(text))),
            Target::Ambiguous(_) => return Err(broken(Parent::Ambiguous(text))),
            Target::Outside(_) => return Err(broken(Parent::Outside(text))),
        };
        path = below;
    }
}

fn key(path: &StorePath) -> Key {
    Key { store: 0, path: path.clone() }
}

fn bad(path: &StorePath, code: Code, detail: String) -> StoreError {
    let image = path.to_string();
    StoreError::Image { member: image.clone(), source: ImageError::Bad { image, code, detail } }
}

fn open_one(backend: &Arc<dyn Backend>, path: &StorePath) -> Result<Image> {
    let member = path.to_string();
    match backend.open(path) {
        Ok(file) => Image::open(file, path.as_str()).map_err(|source| StoreError::Image { member, source }),
        Err(BackendError::NotFound { .. }) => Err(StoreError::NotFound { name: member }),
        Err(source) => Err(StoreError::Backend { store: backend.describe(), source }),
    }
}
