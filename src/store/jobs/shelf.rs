//! The files of jobs on one store: `<id>.json`, `<id>.result`, `<id>.progress`, `<id>.cancel`,
//! `<id>.lease`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::backend::{Backend, BackendError, publish};
use crate::ids::StorePath;
use crate::store::facts::read_whole;
use crate::store::jobs::record::{JobId, JobRecord, MAX_BYTES};
use crate::store::record::own;
use crate::store::{Result, Store, StoreError};

/// The most jobs that one store keeps; more are not taken.
pub const MAX_JOBS: usize = 10_000;
/// The largest result that is kept, in bytes.
pub const MAX_RESULT_BYTES: u64 = 16 << 20;
/// The largest note of how a job comes along, in bytes.
const MAX_PROGRESS_BYTES: u64 = 4096;
/// Temporaries that are older belong to nobody any more, in nanoseconds: one day.
const OLD_NS: i128 = 86_400_000_000_000;

const RECORD: &str = ".json";
const RESULT: &str = ".result";
const PROGRESS: &str = ".progress";
const CANCEL: &str = ".cancel";
const LEASE: &str = ".lease";
const TEMPORARY: &str = ".tmp";

/// All jobs of a store, as they were found.
#[derive(Clone, Debug, Default)]
pub struct Listed {
    /// Those that can be read, by id.
    pub records: Vec<JobRecord>,
    /// Names of records that cannot, and why: left alone.
    pub unreadable: Vec<(String, String)>,
    /// Those somebody asked to stop.
    pub cancelled: BTreeSet<JobId>,
}

/// The jobs of one store.
#[derive(Clone, Debug)]
pub struct JobShelf {
    backend: Arc<dyn Backend>,
    shown: String,
}

impl JobShelf {
    /// Of a store that is opted in; any other is refused.
    pub fn new(store: &Store) -> Result<Self> {
        store.writable_record()?;
        Ok(Self { backend: store.backend().clone(), shown: store.backend().describe() })
    }

    fn failed(&self, source: BackendError) -> StoreError {
        StoreError::Backend { store: self.shown.clone(), source }
    }

    /// The file of a job's lease.
    #[must_use]
    pub fn lease(id: &JobId) -> StorePath {
        file(id, LEASE)
    }

    /// Keeps a new job, durably. Blocks.
    ///
    /// # Errors
    ///
    /// `None` if there is a job of that id already: nothing was changed.
    ///
    /// # After a crash
    ///
    /// The job is there, whole, or it is not.
    pub fn add(&self, record: &JobRecord) -> Result<Option<()>> {
        let bytes = self.encoded(record)?;
        match publish::write_new(self.backend.as_ref(), &directory(), &file(&record.id, RECORD), &bytes) {
            Ok(()) => Ok(Some(())),
            Err(BackendError::AlreadyExists { .. }) => Ok(None),
            Err(source) => Err(self.failed(source)),
        }
    }

    /// Keeps what became of a job. Only for who holds its lease. Blocks.
    ///
    /// # After a crash
    ///
    /// The old record or the new one.
    pub fn replace(&self, record: &JobRecord) -> Result<()> {
        let bytes = self.encoded(record)?;
        let path = file(&record.id, RECORD);
        publish::replace(self.backend.as_ref(), &directory(), &path, &bytes, false)
            .map_err(|source| self.failed(source))
    }

    fn encoded(&self, record: &JobRecord) -> Result<Vec<u8>> {
        record.encode().map_err(|detail| StoreError::Usage { detail: format!("{}: {detail}", self.shown) })
    }

    /// One job; `None` if there is none, or none that can be read.
    pub fn get(&self, id: &JobId) -> Result<Option<JobRecord>> {
        Ok(self.read(id, RECORD, MAX_BYTES)?.and_then(|bytes| JobRecord::decode(id, &bytes).ok()))
    }

    fn read(&self, id: &JobId, what: &str, most: u64) -> Result<Option<Vec<u8>>> {
        match read_whole(&self.backend, &file(id, what), most) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(BackendError::NotFound { .. } | BackendError::NotPlain { .. }) => Ok(None),
            Err(source) => Err(self.failed(source)),
        }
    }

    /// All jobs. At most [`MAX_JOBS`] records are read; those of whom `known` gives a record that is over are not read
    /// again.
    pub fn list(&self, known: &BTreeMap<JobId, JobRecord>) -> Result<Listed> {
        let mut listed = Listed::default();
        let mut ids = Vec::new();
        for name in self.names()? {
            if let Some(id) = name.strip_suffix(RECORD).and_then(JobId::parse) {
                ids.push(id);
            } else if let Some(id) = name.strip_suffix(CANCEL).and_then(JobId::parse) {
                listed.cancelled.insert(id);
            }
        }
        ids.sort();
        for id in ids.into_iter().take(MAX_JOBS) {
            if let Some(record) = known.get(&id).filter(|record| record.state.is_over()) {
                listed.records.push(record.clone());
                continue;
            }
            let Some(bytes) = self.read(&id, RECORD, MAX_BYTES)? else { continue };
            match JobRecord::decode(&id, &bytes) {
                Ok(record) => listed.records.push(record),
                Err(why) => listed.unreadable.push((format!("{id}{RECORD}"), why)),
            }
        }
        Ok(listed)
    }

    fn names(&self) -> Result<Vec<String>> {
        match self.backend.read_dir(&directory()) {
            Ok(entries) => Ok(entries.into_iter().filter_map(|entry| entry.name.ok()).collect()),
            // A store that was opted in before there were jobs.
            Err(BackendError::NotFound { .. }) => match self.backend.create_dir(&directory(), true) {
                Ok(()) | Err(BackendError::AlreadyExists { .. }) => Ok(Vec::new()),
                Err(source) => Err(self.failed(source)),
            },
            Err(source) => Err(self.failed(source)),
        }
    }

    /// Keeps the document of a job that is ending, durably. Only for who holds its lease.
    pub fn put_result(&self, id: &JobId, bytes: &[u8]) -> Result<()> {
        publish::replace(self.backend.as_ref(), &directory(), &file(id, RESULT), bytes, false)
            .map_err(|source| self.failed(source))
    }

    /// The document of a job, if it has one that is not too long.
    pub fn result(&self, id: &JobId) -> Result<Option<Vec<u8>>> {
        let read = self.read(id, RESULT, MAX_RESULT_BYTES)?;
        Ok(read.filter(|bytes| bytes.len() as u64 <= MAX_RESULT_BYTES))
    }

    /// Notes how a job comes along, for the other instances. Only for who works on it.
    pub fn put_progress(&self, id: &JobId, bytes: &[u8]) -> Result<()> {
        publish::replace(self.backend.as_ref(), &directory(), &file(id, PROGRESS), bytes, false)
            .map_err(|source| self.failed(source))
    }

    /// How a job came along when that was noted last; whoever reads it parses it.
    pub fn progress(&self, id: &JobId) -> Result<Option<Vec<u8>>> {
        let read = self.read(id, PROGRESS, MAX_PROGRESS_BYTES)?;
        Ok(read.filter(|bytes| bytes.len() as u64 <= MAX_PROGRESS_BYTES))
    }

    /// Removes that note: the job is over.
    pub fn remove_progress(&self, id: &JobId) -> Result<()> {
        self.remove_file(&file(id, PROGRESS))
    }

    /// Asks whoever runs a job, or is going to, to stop it. Lasts; asking again changes nothing.
    pub fn ask_to_cancel(&self, id: &JobId) -> Result<()> {
        match publish::write_new(self.backend.as_ref(), &directory(), &file(id, CANCEL), b"{}\n") {
            Ok(()) | Err(BackendError::AlreadyExists { .. }) => Ok(()),
            Err(source) => Err(self.failed(source)),
        }
    }

    /// Whether somebody asked.
    pub fn is_cancel_asked(&self, id: &JobId) -> Result<bool> {
        match self.backend.stat(&file(id, CANCEL)) {
            Ok(_) => Ok(true),
            Err(BackendError::NotFound { .. }) => Ok(false),
            Err(source) => Err(self.failed(source)),
        }
    }

    /// Removes a job that is over, its record last.
    pub fn remove(&self, id: &JobId) -> Result<()> {
        for what in [RESULT, PROGRESS, CANCEL, LEASE, RECORD] {
            self.remove_file(&file(id, what))?;
        }
        Ok(())
    }

    /// Removes what belongs to no job: files whose record is gone, and old temporaries. Gives how many went.
    pub fn sweep(&self, now_ns: i128) -> Result<u64> {
        let names = self.names()?;
        let ids: BTreeSet<&str> = names.iter().filter_map(|name| name.strip_suffix(RECORD)).collect();
        let mut removed = 0;
        for name in &names {
            let Ok(path) = directory().join(name) else { continue };
            let of_job = [RESULT, PROGRESS, CANCEL, LEASE].iter().find_map(|end| name.strip_suffix(end));
            let goes = match of_job.filter(|id| JobId::parse(id).is_some()) {
                Some(id) => !ids.contains(id),
                None => name.strip_suffix(TEMPORARY).is_some() && self.is_old(&path, now_ns),
            };
            if goes {
                self.remove_file(&path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn is_old(&self, path: &StorePath, now_ns: i128) -> bool {
        self.backend.stat(path).is_ok_and(|stat| stat.modified_ns + OLD_NS < now_ns)
    }

    fn remove_file(&self, path: &StorePath) -> Result<()> {
        match self.backend.remove_file(path) {
            Ok(()) | Err(BackendError::NotFound { .. }) => Ok(()),
            Err(source) => Err(self.failed(source)),
        }
    }
}

fn directory() -> StorePath {
    own(&["jobs"])
}

fn file(id: &JobId, what: &str) -> StorePath {
    own(&["jobs", &format!("{id}{what}")])
}
