//! Stores on which one process tries its luck: in memory, with or without what file systems may lack, or on
//! a real directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qchain::backend::memory::MemoryStore;
use qchain::backend::posix::PosixStore;
use qchain::backend::{Backend, FileKind};
use qchain::ids::StorePath;
use qchain::store::record::{DIRECTORIES, StoreRecord};

use super::crash::{Chain, Files};
use super::store::{adopt_in, open_with, record};

/// A kind of store.
#[derive(Clone, Debug)]
pub enum Ground {
    /// In memory.
    Memory {
        /// It can exchange names.
        exchange: bool,
        /// It has hard links.
        links: bool,
    },
    /// On that directory.
    Disk(PathBuf),
}

/// One with a chain on it.
pub struct Place {
    /// It, without faults.
    pub backend: Arc<dyn Backend>,
}

fn path(text: &str) -> StorePath {
    StorePath::parse(text).unwrap()
}

impl Ground {
    /// Puts a chain there, and nothing else.
    pub fn place(&self, chain: &Chain) -> Place {
        match self {
            Self::Disk(root) => {
                chain.put(root);
                Place { backend: Arc::new(PosixStore::open(root).unwrap()) }
            }
            Self::Memory { exchange, links } => {
                let store = MemoryStore::new().with_exchange(*exchange).with_hard_links(*links);
                for directory in DIRECTORIES {
                    make(&store, &path(&format!(".qchain/{directory}")));
                }
                let scratch = path(".qchain/tmp");
                let says = record("memory", chain.shape.store_kind());
                let says = StoreRecord { capabilities: store.probe(&scratch).ok(), ..says }.encode();
                let own = (".qchain/store.json".to_owned(), says);
                for (name, bytes) in
                    chain.files.iter().map(|(name, bytes)| (name.clone(), bytes.clone())).chain([own])
                {
                    let name = path(&name);
                    make(&store, &name.parent());
                    let file = store.create(&name).unwrap();
                    file.write_at(0, &bytes).unwrap();
                    file.sync().unwrap();
                }
                let place = Place { backend: Arc::new(store) };
                if chain.adopted {
                    let report =
                        adopt_in(&open_with(Path::new("/nowhere"), Arc::clone(&place.backend)), false);
                    assert!(report.failure.is_none() && report.findings.is_empty(), "{report:?}");
                }
                place
            }
        }
    }
}

fn make(store: &MemoryStore, directory: &StorePath) {
    if !directory.is_root() && store.stat(directory).is_err() {
        make(store, &directory.parent());
        store.create_dir(directory, true).unwrap();
    }
}

impl Place {
    fn read(&self, path: &StorePath) -> Vec<u8> {
        let file = self.backend.open(path).unwrap();
        let mut bytes = vec![0; usize::try_from(file.stat().unwrap().length).unwrap()];
        assert_eq!(file.read_at(0, &mut bytes).unwrap(), bytes.len());
        bytes
    }

    /// All of its files that are not qchain's.
    pub fn files(&self) -> Files {
        let found = self.below(&StorePath::root(), &|path| path.file_name().starts_with(".qchain"));
        found.into_iter().map(|path| (path.to_string(), self.read(&path))).collect()
    }

    fn below(&self, directory: &StorePath, skip: &dyn Fn(&StorePath) -> bool) -> Vec<StorePath> {
        let found = self.backend.walk(directory, 16, skip).into_iter().map(Result::unwrap);
        found.filter(|entry| entry.kind == FileKind::File).map(|entry| entry.path.unwrap()).collect()
    }

    /// What operations must not leave in `.qchain`, or beside members.
    pub fn left(&self) -> Vec<String> {
        let directories = ["tmp", "trash", "intents"].map(|name| path(&format!(".qchain/{name}")));
        let names = |directory: &StorePath| -> Vec<String> {
            let entries = self.backend.read_dir(directory).unwrap();
            entries.into_iter().map(|entry| format!("{directory}/{}", entry.name.unwrap())).collect()
        };
        let beside = self.below(&StorePath::root(), &|path| path.as_str() == ".qchain");
        let beside = beside.iter().map(ToString::to_string).filter(|path| path.contains("/.qchain-tmp/"));
        directories.iter().flat_map(names).chain(beside).collect()
    }
}
