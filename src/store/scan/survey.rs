//! What lies on stores beside members: checkpoint files, and snapshots of other hypervisors.
//!
//! Names and sizes only; nothing is opened.

use crate::backend::{BackendError, FileKind, Stat};
use crate::chain::graph::Key;
use crate::cloudstack::paths::{SNAPSHOTS, VMWARE, foreign_hypervisor};
use crate::ids::StorePath;
use crate::store::error::{Result, StoreError};
use crate::store::record::StoreKind;
use crate::store::scan::list::{checkpoint_files, walk};
use crate::store::{Store, Stores};

/// How deep a snapshot of VMware lies: `snapshots/<account>/<volume>/<its directory>/<file>`.
const VMWARE_COMPONENTS: usize = 5;

/// One file of another hypervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// What names it.
    pub key: Key,
    /// Whose it is.
    pub hypervisor: &'static str,
    /// What it takes on the store, in bytes.
    pub allocated_bytes: u64,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// All checkpoint files, store by store, in the order of their paths.
    pub checkpoints: Vec<(Key, Stat)>,
    /// All files of other hypervisors.
    pub foreign: Vec<Foreign>,
}

impl Survey {
    /// Looks through all stores of CloudStack's layouts. What vanishes meanwhile is as if it had not been there.
    pub fn run(stores: &Stores) -> Result<Self> {
        let mut survey = Self::default();
        for (index, store) in stores.iter() {
            if store.kind() == StoreKind::Plain {
                continue;
            }
            let key = |path: StorePath| Key { store: index, path };
            for path in checkpoint_files(store)? {
                if let Some(stat) = stat(store, &path)? {
                    survey.checkpoints.push((key(path), stat));
                }
            }
            for (path, hypervisor) in foreign(store)? {
                if let Some(stat) = stat(store, &path)? {
                    let allocated_bytes = stat.allocated_bytes;
                    survey.foreign.push(Foreign { key: key(path), hypervisor, allocated_bytes });
                }
            }
        }
        Ok(survey)
    }
}

/// The files of other hypervisors on one store: told by their extension, or by a directory where the file of a
/// KVM snapshot would be.
fn foreign(store: &Store) -> Result<Vec<(StorePath, &'static str)>> {
    let mut found = Vec::new();
    let areas: &[(&str, usize)] = match store.kind() {
        StoreKind::Primary => &[(SNAPSHOTS, 1)],
        StoreKind::Cloudstack | StoreKind::Plain => &[(SNAPSHOTS, 4), ("template/tmpl", 3), ("volumes", 3)],
    };
    for (area, depth) in areas {
        let Ok(root) = StorePath::parse(area) else { continue };
        for entry in walk(store, &root, *depth)? {
            let (FileKind::File, Ok(path)) = (entry.kind, entry.path) else { continue };
            let inside = path.components().count() == VMWARE_COMPONENTS && *area == SNAPSHOTS;
            let hypervisor = if inside { Some(VMWARE) } else { foreign_hypervisor(path.file_name()) };
            found.extend(hypervisor.map(|hypervisor| (path, hypervisor)));
        }
    }
    Ok(found)
}

fn stat(store: &Store, path: &StorePath) -> Result<Option<Stat>> {
    match store.backend().stat(path) {
        Ok(stat) => Ok(Some(stat)),
        Err(BackendError::NotFound { .. }) => Ok(None),
        Err(source) => Err(StoreError::backend(store, source)),
    }
}
