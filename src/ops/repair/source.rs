//! Where good blocks may be found.

use std::sync::Arc;

use crate::backend::{Backend, StoreFile, read_padded};
use crate::ids::StorePath;
use crate::ops::Result;
use crate::qcow2::Image;
use crate::qcow2::format::MAGIC;
use crate::store::chain::OpenChain;
use crate::store::scan::Scan;
use crate::store::{StoreError, Stores, names, standalone};
use crate::units::GuestOffset;

/// A view that may have what another one lost. Nothing that it gives is believed: each block must hash to its leaf.
#[derive(Debug)]
pub struct Source {
    name: String,
    view: View,
}

#[derive(Debug)]
enum View {
    Chain(OpenChain),
    Raw(Arc<dyn StoreFile>),
}

impl Source {
    /// The member of that name in other stores, with what lies below it there.
    pub fn of_store(name: &str, stores: &Stores, scan: &Scan, member: &StorePath) -> Result<Self> {
        let id = names::resolve_one(stores, scan, member.as_str())?;
        let view = match OpenChain::of_member(stores, scan, id) {
            Ok(chain) => chain,
            // Its own blocks are good for all that.
            Err(_) => OpenChain::of(vec![crate::store::chain::open_image(stores, &scan.graph.node(id).key)?]),
        };
        Ok(Self { name: name.to_owned(), view: View::Chain(view) })
    }

    /// A file in a directory whose absolute path is `root`: a qcow2 image, with what lies below it there if that is
    /// there; or, if it does not begin as one, a raw image.
    pub fn of_file(name: &str, backend: &Arc<dyn Backend>, root: &str, file: &StorePath) -> Result<Self> {
        let failed = |source| StoreError::Backend { store: name.to_owned(), source };
        let opened = backend.open(file).map_err(failed)?;
        let mut magic = [0; 4];
        opened.read_at(0, &mut magic).map_err(failed)?;
        let view = if u32::from_be_bytes(magic) == MAGIC {
            View::Chain(match standalone::open(backend, root, file) {
                Ok(chain) => chain,
                Err(_) => OpenChain::of(vec![Image::open(opened, name)?]),
            })
        } else {
            View::Raw(opened)
        };
        Ok(Self { name: name.to_owned(), view })
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The image itself, if it is one: perhaps a copy of the very file.
    #[must_use]
    pub fn image(&self) -> Option<&Image> {
        match &self.view {
            View::Chain(chain) => chain.images().next(),
            View::Raw(_) => None,
        }
    }

    /// Reads a block; `false` if that fails, which is no reason to stop.
    #[must_use]
    pub fn read(&self, at: u64, buffer: &mut [u8]) -> bool {
        match &self.view {
            View::Chain(chain) => chain.read(GuestOffset(at), buffer).is_ok(),
            View::Raw(file) => read_padded(file.as_ref(), at, buffer).is_ok(),
        }
    }
}
