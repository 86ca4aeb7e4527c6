//! Stores as they are configured, and as they are found.

use std::sync::Arc;

use crate::backend::{Backend, BackendError, read_padded};
use crate::cloudstack::backing::{StoreNames, Style};
use crate::cloudstack::paths::Layout;
use crate::cloudstack::prefix::StoreUrl;
use crate::ids::{StoreId, StorePath};
use crate::store::error::{Result, StoreError};
use crate::store::record::{FORMAT, MAX_RECORD_BYTES, StoreKind, StoreRecord, own};

/// What the configuration or `--store` says of a store.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Its name on the command line.
    pub id: StoreId,
    /// The directory as text, absolute: also a prefix that backing names may carry. Or the URL of an export that
    /// is reached without a mount.
    pub root: String,
    /// CloudStack's URL of it.
    pub url: Option<StoreUrl>,
    /// More prefixes that backing names may carry.
    pub aliases: Vec<String>,
    /// How backing names are written.
    pub backing: Style,
    /// Where it keeps its snapshots. Primary storage is only read.
    pub layout: Layout,
}

/// One store, opened.
#[derive(Clone, Debug)]
pub struct Store {
    config: StoreConfig,
    backend: Arc<dyn Backend>,
    record: Option<StoreRecord>,
    /// It may have a record, which this user may not read.
    closed: bool,
    kind: StoreKind,
}

impl Store {
    /// Opens a store for reading: reads its `store.json` if there is one. Where that is not for this user, who
    /// then can change nothing, members can be read all the same.
    pub fn open(config: StoreConfig, backend: Arc<dyn Backend>) -> Result<Self> {
        let (record, closed) = match read_record(backend.as_ref()) {
            Err(StoreError::Backend { source, .. }) if source.is_denied() => (None, true),
            read => (read?, false),
        };
        let kind = match &record {
            _ if config.layout == Layout::Primary => StoreKind::Primary,
            Some(record) => record.kind,
            None if StorePath::parse("snapshots").is_ok_and(|path| backend.stat(&path).is_ok()) => {
                StoreKind::Cloudstack
            }
            None => StoreKind::Plain,
        };
        Ok(Self { config, backend, record, closed, kind })
    }

    /// Its name on the command line.
    #[must_use]
    pub fn id(&self) -> &StoreId {
        &self.config.id
    }

    /// The prefixes that backing names may carry for it.
    #[must_use]
    pub fn names(&self) -> StoreNames {
        let StoreConfig { id, root, url, aliases, .. } = &self.config;
        let directory = root.starts_with('/').then_some(root.as_str());
        StoreNames::new(id.clone(), directory, url.as_ref(), aliases)
    }

    /// What the configuration says of it.
    #[must_use]
    pub fn config(&self) -> &StoreConfig {
        &self.config
    }

    /// The files.
    #[must_use]
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// Its `store.json`, if it was opted in.
    #[must_use]
    pub fn record(&self) -> Option<&StoreRecord> {
        self.record.as_ref()
    }

    /// What it holds; guessed if it was not opted in.
    #[must_use]
    pub fn kind(&self) -> StoreKind {
        self.kind
    }

    /// Refuses what is never changed from here: an export that is read-only for this user, and primary storage, which
    /// hypervisors alone change.
    pub fn check_changeable(&self) -> Result<()> {
        if self.backend.read_only() {
            return Err(StoreError::ReadOnly { store: self.backend.describe() });
        }
        match self.kind {
            StoreKind::Primary => Err(StoreError::Primary { store: self.backend.describe() }),
            StoreKind::Cloudstack | StoreKind::Plain => Ok(()),
        }
    }

    /// The record, if this program may change the store.
    pub fn writable_record(&self) -> Result<&StoreRecord> {
        self.check_changeable()?;
        let store = self.backend.describe();
        if self.closed {
            return Err(StoreError::Closed { store });
        }
        let record = self.record.as_ref().ok_or(StoreError::NotInitialised { store })?;
        if record.least_writer > FORMAT {
            let store = self.backend.describe();
            return Err(StoreError::Newer { store, needed: record.least_writer, known: FORMAT });
        }
        Ok(record)
    }
}

/// Reads `store.json`; `None` if there is none.
fn read_record(backend: &dyn Backend) -> Result<Option<StoreRecord>> {
    let store = backend.describe();
    let file = match backend.open(&own(&["store.json"])) {
        Ok(file) => file,
        Err(BackendError::NotFound { .. }) => return Ok(None),
        Err(source) => return Err(StoreError::Backend { store, source }),
    };
    let fail = |source| StoreError::Backend { store: store.clone(), source };
    let length = file.stat().map_err(fail)?.length.min(MAX_RECORD_BYTES);
    let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
    read_padded(file.as_ref(), 0, &mut bytes).map_err(fail)?;
    StoreRecord::decode(&bytes).map(Some).map_err(|detail| StoreError::BadRecord { store, detail })
}

/// How many files are read at once by a scan, at most.
const READERS: usize = 64;

/// All stores of a call, in the order they were configured.
#[derive(Clone, Debug)]
pub struct Stores {
    stores: Vec<Store>,
    readers: usize,
}

impl Default for Stores {
    fn default() -> Self {
        Self { stores: Vec::new(), readers: READERS }
    }
}

impl Stores {
    /// Takes opened stores; two with one id are a usage error.
    pub fn new(stores: Vec<Store>) -> Result<Self> {
        let mut ids = std::collections::BTreeSet::new();
        for store in &stores {
            if !ids.insert(store.id().as_str()) {
                let detail = format!("two stores are called {}; give one another name", store.id());
                return Err(StoreError::Usage { detail });
            }
        }
        Ok(Self { stores, readers: READERS })
    }

    /// The same stores, of which at most so many files are read at once: with one, calls come in one order.
    #[must_use]
    pub fn with_readers(self, readers: usize) -> Self {
        Self { readers: readers.max(1), ..self }
    }

    /// How many files may be read at once.
    #[must_use]
    pub fn readers(&self) -> usize {
        self.readers
    }

    /// Does what spreads over threads with as many as are good for so many jobs that wait for small reads, of disks
    /// or of a server: many at once, whatever the cores, up to [`Stores::readers`]. With one only the work is done by
    /// the caller's own threads.
    pub fn spread<T: Send>(&self, jobs: usize, work: impl FnOnce() -> T + Send) -> Result<T> {
        let threads = jobs.clamp(1, self.readers);
        if threads == 1 {
            return Ok(work());
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.map_err(|error| StoreError::Usage { detail: format!("no threads: {error}") })?;
        Ok(pool.install(work))
    }

    /// Each with its index.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Store)> {
        self.stores.iter().enumerate()
    }

    /// One by its index.
    pub fn get(&self, index: usize) -> Result<&Store> {
        self.stores
            .get(index)
            .ok_or_else(|| StoreError::Usage { detail: format!("there is no store {index}") })
    }

    /// One by its id, with its index.
    #[must_use]
    pub fn named(&self, id: &str) -> Option<(usize, &Store)> {
        self.iter().find(|(_, store)| store.id().as_str() == id)
    }

    /// Takes `STORE:` off a name, if what is before its first colon is a store's id.
    #[must_use]
    pub fn split_name<'a>(&self, name: &'a str) -> (Option<usize>, &'a str) {
        let split = name.split_once(':').and_then(|(id, rest)| Some((Some(self.named(id)?.0), rest)));
        split.unwrap_or((None, name))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.stores.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.stores.is_empty()
    }

    /// Whether a change may be planned: each store opted in, none newer, the whole zone present.
    pub fn check_writable(&self) -> Result<()> {
        let mut present = std::collections::BTreeSet::new();
        for store in &self.stores {
            present.insert(store.writable_record()?.id.clone());
        }
        for store in &self.stores {
            for member in store.record.iter().flat_map(|record| &record.zone) {
                if !present.contains(&member.id) {
                    let (name, id) = (member.name.clone(), member.id.clone());
                    return Err(StoreError::Absent { name, id });
                }
            }
        }
        Ok(())
    }

    /// `STORE:install/path`, or the bare path where there is one store only: how a member is written.
    #[must_use]
    pub fn display(&self, key: &crate::chain::graph::Key) -> String {
        match self.stores.get(key.store) {
            Some(store) if self.stores.len() > 1 => format!("{}:{}", store.id(), key.path),
            _ => key.path.as_str().to_owned(),
        }
    }
}
