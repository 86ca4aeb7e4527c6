//! The jobs that are known, and who is next.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::request::{JobRequest, excludes, rank};
use super::watch::{Meter, Pulse};
use super::worker;
use crate::failure::{Code, Kind};
use crate::progress::Cancel;
use crate::service::problem::Problem;
use crate::service::state::Service;
use crate::service::view::{View, now_ns};
use crate::store::connect::connect;
use crate::store::jobs::{JobId, JobRecord, JobShelf, JobState, MAX_JOBS};
use crate::store::{Store, Stores};

/// From which rank on jobs never take all workers.
const PATIENT: u8 = 2;

/// A job that this process works on.
#[derive(Debug, Default)]
pub struct Running {
    pub meter: Meter,
    pub cancel: Cancel,
    /// Somebody asked for the stop; else it is the service that ends.
    pub asked: AtomicBool,
}

/// One job, as far as it is known.
#[derive(Clone, Debug)]
pub struct Entry {
    pub record: JobRecord,
    /// The id of the store that has the record.
    pub home: String,
    /// If this process works on it.
    pub running: Option<Arc<Running>>,
    /// How it comes along, as the instance that works on it told last.
    pub heard: Option<Pulse>,
}

impl Entry {
    /// One that this process does not work on.
    fn new(record: JobRecord, home: &str) -> Self {
        Self { record, home: home.to_owned(), running: None, heard: None }
    }

    /// How it comes along, if somebody works on it and that is known.
    pub fn pulse(&self) -> Option<Pulse> {
        match &self.running {
            Some(running) => Some(running.meter.pulse()),
            None => self.heard.clone().filter(|_| self.record.state == JobState::Running),
        }
    }
}

/// What is to become a job.
pub struct New {
    pub request: JobRequest,
    /// The name of the token.
    pub made_by: String,
    /// The idempotency key.
    pub key: Option<String>,
}

/// A job that was asked for.
pub struct Made {
    pub entry: Entry,
    /// False: an earlier request with this key made it.
    pub new: bool,
}

/// What became of the wish to stop a job.
pub struct Cancelled(pub Entry);

#[derive(Default)]
struct Inner {
    entries: BTreeMap<JobId, Entry>,
    /// Not to be begun before.
    put_off: BTreeMap<JobId, Instant>,
    /// When each chain was served last, by a count of turns.
    served: BTreeMap<String, u64>,
    turns: u64,
}

/// All jobs.
#[derive(Default)]
pub struct Jobs {
    inner: Mutex<Inner>,
    wake: Condvar,
    stop: AtomicBool,
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a job, durably, or finds the one that an earlier request with the key made. Blocks.
    pub fn make(&self, service: &Service, new: New) -> Result<Made, Problem> {
        let New { mut request, made_by, key } = new;
        let stores = connect(service.config.stores.clone())?;
        let (home, jobs) = home_of(&stores)?;
        let as_asked = serde_json::to_vec(&request).unwrap_or_default();
        let key_of = key.as_ref().map(|_| blake3::hash(&as_asked).to_hex().to_string());
        let id = key.map_or_else(JobId::random, |key| JobId::of_key(&made_by, &key));
        if key_of.is_some()
            && let Some(record) = jobs.get(&id)?
        {
            return self.made_before(record, home, key_of.as_ref());
        }
        if service.config.read_only && request.changes() {
            return Err(Problem::new(Kind::Refused, Code::ReadOnly, "the service changes no store"));
        }
        if self.lock().entries.len() >= MAX_JOBS {
            return Err(Problem::new(Kind::Busy, Code::QueueFull, format!("there are {MAX_JOBS} jobs"))
                .with_status(axum::http::StatusCode::TOO_MANY_REQUESTS));
        }
        let chains = resolve(service, &mut request)?;
        let value = serde_json::to_value(&request).unwrap_or(Value::Null);
        let mut record = JobRecord::new(id, request.kind(), value, chains, &made_by, now_ns());
        record.key_of.clone_from(&key_of);
        if jobs.add(&record)?.is_none() {
            let record =
                jobs.get(&record.id)?.ok_or_else(|| Problem::unavailable("the job is being made"))?;
            return self.made_before(record, home, key_of.as_ref());
        }
        let entry = Entry::new(record, home.id().as_str());
        self.lock().entries.insert(entry.record.id.clone(), entry.clone());
        self.wake.notify_one();
        Ok(Made { entry, new: true })
    }

    fn made_before(&self, record: JobRecord, home: &Store, key_of: Option<&String>) -> Result<Made, Problem> {
        if record.key_of.as_ref() != key_of {
            let detail = format!("the key is that of job {}, which asks for something else", record.id);
            let problem = Problem::new(Kind::Refused, Code::KeyReused, detail);
            return Err(problem.with_status(axum::http::StatusCode::UNPROCESSABLE_ENTITY));
        }
        let mut inner = self.lock();
        let entry = inner.entries.entry(record.id.clone());
        let entry = entry.or_insert_with(|| Entry::new(record, home.id().as_str()));
        Ok(Made { entry: entry.clone(), new: false })
    }

    /// One job; one that another instance just made is looked for on the stores. Blocks.
    pub fn get(&self, service: &Service, id: &JobId) -> Result<Option<Entry>, Problem> {
        if let Some(entry) = self.lock().entries.get(id) {
            return Ok(Some(entry.clone()));
        }
        let stores = connect(service.config.stores.clone())?;
        for (_, store) in stores.iter().filter(|(_, store)| store.record().is_some()) {
            let Ok(jobs) = JobShelf::new(store) else { continue };
            if let Some(record) = jobs.get(id)? {
                return Ok(Some(Entry::new(record, store.id().as_str())));
            }
        }
        Ok(None)
    }

    /// What is known of a job, without a look at the stores.
    pub fn known(&self, id: &JobId) -> Option<Entry> {
        self.lock().entries.get(id).cloned()
    }

    /// All of them, oldest first.
    pub fn all(&self) -> Vec<Entry> {
        let mut all: Vec<Entry> = self.lock().entries.values().cloned().collect();
        all.sort_by(|a, b| (a.record.made_ns, &a.record.id).cmp(&(b.record.made_ns, &b.record.id)));
        all
    }

    /// Asks for a job to be stopped. Nothing happens to one that is over. Blocks.
    pub fn cancel(&self, service: &Service, id: &JobId) -> Result<Option<Cancelled>, Problem> {
        let Some(entry) = self.get(service, id)? else { return Ok(None) };
        if entry.record.state.is_over() {
            return Ok(Some(Cancelled(entry)));
        }
        let stores = connect(service.config.stores.clone())?;
        if let Some((index, store)) = stores.named(&entry.home) {
            JobShelf::new(store)?.ask_to_cancel(id)?;
            match &entry.running {
                Some(running) => stop(running),
                None if entry.record.state == JobState::Queued => {
                    worker::end_waiting(service, &stores, index, id);
                }
                // Another instance works on it, and looks for that wish.
                None => {}
            }
        }
        Ok(self.get(service, id)?.map(Cancelled))
    }

    /// Takes over what a look at the stores found; `seen` has the records of stores that could be read.
    pub fn merge(&self, homes: &[String], seen: Vec<(String, JobRecord)>, cancelled: &BTreeSet<JobId>) {
        let mut inner = self.lock();
        let ids: BTreeSet<JobId> = seen.iter().map(|(_, record)| record.id.clone()).collect();
        let since = now_ns() - 10_000_000_000;
        // One made while the look was on is not in it.
        inner.entries.retain(|id, entry| {
            ids.contains(id)
                || entry.running.is_some()
                || entry.record.made_ns > since
                || !homes.contains(&entry.home)
        });
        for (home, record) in seen {
            match inner.entries.get_mut(&record.id) {
                // What this process does it knows best; what is over stays over.
                Some(entry) if entry.running.is_some() || entry.record.state.is_over() => {}
                Some(entry) => entry.record = record,
                None => {
                    inner.entries.insert(record.id.clone(), Entry::new(record, &home));
                }
            }
        }
        for id in cancelled {
            if let Some(running) = inner.entries.get(id).and_then(|entry| entry.running.as_ref()) {
                stop(running);
            }
        }
        drop(inner);
        self.wake.notify_all();
    }

    /// Keeps what became of a job's record.
    pub fn set(&self, record: &JobRecord) {
        if let Some(entry) = self.lock().entries.get_mut(&record.id) {
            entry.record = record.clone();
        }
    }

    /// How a job comes along that another instance works on.
    pub fn hear(&self, id: &JobId, heard: Option<Pulse>) {
        if let Some(entry) = self.lock().entries.get_mut(id) {
            entry.heard = heard;
        }
    }

    /// A job is gone.
    pub fn forget(&self, id: &JobId) {
        self.lock().entries.remove(id);
    }

    /// The next job, which is the caller's until he gives it back; waits a while for one.
    pub fn claim(&self, workers: usize, wait: Duration) -> Option<(Entry, Arc<Running>)> {
        if self.is_stopped() {
            return None;
        }
        let mut inner = self.lock();
        let mut next = choose(&inner, workers);
        if next.is_none() {
            inner = self.wake.wait_timeout(inner, wait).unwrap_or_else(PoisonError::into_inner).0;
            next = choose(&inner, workers).filter(|_| !self.is_stopped());
        }
        let id = next?;
        inner.turns += 1;
        let turn = inner.turns;
        let entry = inner.entries.get_mut(&id)?;
        let running = Arc::new(Running::default());
        entry.running = Some(running.clone());
        let entry = entry.clone();
        for chain in &entry.record.chains {
            inner.served.insert(chain.clone(), turn);
        }
        if inner.served.len() > MAX_JOBS {
            inner.served.clear();
        }
        Some((entry, running))
    }

    /// Gives a job back; it is not begun again before that time has passed.
    pub fn release(&self, id: &JobId, put_off: Duration) {
        let mut inner = self.lock();
        if let Some(entry) = inner.entries.get_mut(id) {
            entry.running = None;
        }
        inner.put_off.remove(id);
        if let Some(until) = Instant::now().checked_add(put_off).filter(|_| !put_off.is_zero()) {
            inner.put_off.insert(id.clone(), until);
        }
        drop(inner);
        self.wake.notify_all();
    }

    /// No job is begun any more, and those that run stop at their next safe point.
    pub fn stop_all(&self) {
        self.stop.store(true, Ordering::Relaxed);
        for entry in self.lock().entries.values() {
            if let Some(running) = &entry.running {
                running.cancel.request();
            }
        }
        self.wake.notify_all();
    }

    /// Whether the service ends.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

fn stop(running: &Running) {
    running.asked.store(true, Ordering::Relaxed);
    running.cancel.request();
}

/// The store that keeps new jobs: the first that is opted in.
fn home_of(stores: &Stores) -> Result<(&Store, JobShelf), Problem> {
    let found = stores.iter().map(|(_, store)| store).find(|store| store.writable_record().is_ok());
    match found.or_else(|| stores.iter().map(|(_, store)| store).next()) {
        Some(store) => Ok((store, JobShelf::new(store)?)),
        None => Err(Problem::usage("the service has no store")),
    }
}

/// Gives the request its members' full names; the lowest members of their chains.
fn resolve(service: &Service, request: &mut JobRequest) -> Result<Vec<String>, Problem> {
    if let JobRequest::Delete(delete) = &*request
        && delete.members.is_empty()
    {
        return Err(Problem::usage("no member is named"));
    }
    if request.members().is_empty() {
        return Ok(Vec::new());
    }
    let view = View::read(&service.config)?;
    let ids = if let JobRequest::Flatten(flatten) = &*request {
        vec![view.member(&flatten.member)?]
    } else {
        let texts: Result<Vec<String>, _> =
            request.members().iter().map(|name| name.text(&view.stores)).collect();
        view.members(&texts?)?
    };
    let chains: BTreeSet<String> = ids.iter().map(|id| view.base(*id)).collect();
    request.set_members(ids.iter().map(|id| view.name(*id)).collect());
    Ok(chains.into_iter().collect())
}

/// Who is next: by rank, then the one whose chains were left alone for longest, then the oldest. Jobs of one chain do
/// not run beside one that changes it, whichever instance runs that; patient ones leave a worker free.
fn choose(inner: &Inner, workers: usize) -> Option<JobId> {
    let now = Instant::now();
    let runs = |entry: &&Entry| entry.running.is_some() || entry.record.state == JobState::Running;
    let running: Vec<&Entry> = inner.entries.values().filter(runs).collect();
    let patient =
        running.iter().filter(|entry| entry.running.is_some() && rank(&entry.record.kind) >= PATIENT).count();
    let full = patient >= workers.saturating_sub(1).max(1);
    let meets = |record: &JobRecord| {
        running.iter().map(|entry| &entry.record).any(|other| {
            let shared = other.chains.iter().any(|chain| record.chains.contains(chain));
            shared && excludes(&other.kind, &record.kind)
        })
    };
    let waits = |entry: &&Entry| {
        let record = &entry.record;
        record.state == JobState::Queued
            && entry.running.is_none()
            && inner.put_off.get(&record.id).is_none_or(|until| *until <= now)
            && !(full && rank(&record.kind) >= PATIENT)
            && !meets(record)
    };
    let place = |entry: &&Entry| {
        let served = entry.record.chains.iter().filter_map(|chain| inner.served.get(chain)).max();
        (
            rank(&entry.record.kind),
            served.copied().unwrap_or(0),
            entry.record.made_ns,
            entry.record.id.clone(),
        )
    };
    inner.entries.values().filter(waits).min_by_key(place).map(|entry| entry.record.id.clone())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::Value;

    use super::{Entry, Inner, choose};
    use crate::store::jobs::{JobId, JobRecord};

    fn add(inner: &mut Inner, kind: &str, chain: &str, made_ns: i64) -> JobId {
        let id = JobId::of_key(kind, &format!("{chain}{made_ns}"));
        let record = JobRecord::new(id.clone(), kind, Value::Null, vec![chain.to_owned()], "t", made_ns);
        inner.entries.insert(id.clone(), Entry::new(record, "s"));
        id
    }

    fn run(inner: &mut Inner, id: &JobId) {
        inner.turns += 1;
        let (turn, entry) = (inner.turns, inner.entries.get_mut(id).unwrap());
        entry.running = Some(Arc::default());
        inner.served.insert(entry.record.chains[0].clone(), turn);
    }

    #[test]
    fn what_somebody_waits_for_comes_first_and_chains_take_turns() {
        let mut inner = Inner::default();
        let scrub = add(&mut inner, "verify", "a", 1);
        let first = add(&mut inner, "delete", "a", 2);
        let second = add(&mut inner, "delete", "a", 3);
        let other = add(&mut inner, "delete", "b", 4);
        let flat = add(&mut inner, "flatten", "c", 5);
        assert_eq!(choose(&inner, 4), Some(flat.clone()));
        run(&mut inner, &flat);
        assert_eq!(choose(&inner, 4), Some(first.clone()));
        run(&mut inner, &first);
        assert_eq!(choose(&inner, 4), Some(other.clone()), "one at a time on a chain");
        run(&mut inner, &other);
        assert_eq!(choose(&inner, 4), None, "the scrub of a chain waits for its delete");
        inner.entries.remove(&first);
        assert_eq!(choose(&inner, 4), Some(second.clone()));
        inner.entries.remove(&second);
        assert_eq!(choose(&inner, 4), Some(scrub));
    }

    #[test]
    fn a_chain_with_many_jobs_does_not_keep_others_waiting() {
        let mut inner = Inner::default();
        let first = add(&mut inner, "delete", "a", 1);
        add(&mut inner, "delete", "a", 2);
        let late = add(&mut inner, "delete", "b", 9);
        run(&mut inner, &first);
        inner.entries.remove(&first);
        assert_eq!(choose(&inner, 1), Some(late));
    }

    #[test]
    fn patient_jobs_leave_a_worker_free() {
        let mut inner = Inner::default();
        let ids: Vec<JobId> =
            ["a", "b", "c"].iter().map(|chain| add(&mut inner, "verify", chain, 1)).collect();
        run(&mut inner, &ids[0]);
        assert!(choose(&inner, 3).is_some());
        run(&mut inner, &ids[1]);
        assert_eq!(choose(&inner, 3), None);
        let urgent = add(&mut inner, "delete", "d", 5);
        assert_eq!(choose(&inner, 3), Some(urgent));
    }
}
