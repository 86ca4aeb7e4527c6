//! The threads that run jobs, and the one that looks at the stores.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::kinds::{self, Outcome, Work, job_error};
use super::queue::{Entry, Running};
use super::request::JobRequest;
use super::tell::tell;
use crate::change::{Lease, Site, SystemClock};
use crate::failure::{Code, Failure, Kind, with_causes};
use crate::ops::OpError;
use crate::progress::Cancel;
use crate::service::state::{Service, Shared};
use crate::service::view::now_ns;
use crate::store::Stores;
use crate::store::connect::connect;
use crate::store::jobs::{JobError, JobId, JobRecord, JobShelf, JobState, MAX_RESULT_BYTES};

/// How often the stores are looked at for jobs of others.
const POLL: Duration = Duration::from_secs(2);
/// How long a worker sleeps when there is nothing to do.
const IDLE: Duration = Duration::from_millis(500);
/// When a job is tried again that could not be begun.
const LATER: Duration = Duration::from_secs(3);
/// How often a job may be begun and not ended.
const MOST_ATTEMPTS: u32 = 5;
/// The most jobs that are over and kept.
const MOST_FINISHED: usize = 1000;
/// How many looks lie between two sweeps.
const SWEEP_EVERY: u64 = 300;

/// Starts the threads. They end when the service drains.
pub fn start(service: &Shared) -> std::io::Result<Vec<JoinHandle<()>>> {
    let workers = service.config.jobs.max(1);
    let mut threads = Vec::with_capacity(workers + 2);
    let spawn = |name: String, run: fn(&Service, usize)| {
        let service = service.clone();
        std::thread::Builder::new().name(name).spawn(move || run(&service, workers))
    };
    threads.push(spawn("jobs-poll".to_owned(), poll)?);
    threads.push(spawn("jobs-tell".to_owned(), tell)?);
    for number in 0..workers {
        threads.push(spawn(format!("jobs-{number}"), work)?);
    }
    Ok(threads)
}

fn work(service: &Service, workers: usize) {
    while !service.jobs.is_stopped() {
        let Some((entry, running)) = service.jobs.claim(workers, IDLE) else { continue };
        let id = entry.record.id.clone();
        let span = tracing::info_span!("job", job = %id, kind = %entry.record.kind);
        let _in = span.enter();
        let put_off = match run(service, &entry, &running) {
            Ok(put_off) => put_off,
            Err(error) => {
                tracing::warn!(code = %error.code(), "the job waits: {}", with_causes(&error));
                LATER
            }
        };
        service.jobs.release(&id, put_off);
    }
}

/// Runs one job, if nobody else does; says how long it is put off if it is not over.
fn run(service: &Service, entry: &Entry, running: &Arc<Running>) -> Result<Duration, OpError> {
    let config = &service.config;
    let stores = connect(config.stores.clone())?;
    let Some((home, store)) = stores.named(&entry.home) else {
        return Ok(LATER);
    };
    let shelf = JobShelf::new(store)?;
    let id = &entry.record.id;
    let mut site = Site::new(&stores, &SystemClock, &running.cancel, config.lease);
    site.pace = service.pace.clone();
    let lease = match Lease::take_file(&site, home, &JobShelf::lease(id)) {
        Err(error) if error.kind() == Kind::Busy => return Ok(LATER),
        taken => taken?,
    };
    let Some(mut record) = shelf.get(id)?.filter(|record| !record.state.is_over()) else {
        if let Some(record) = shelf.get(id)? {
            service.jobs.set(&record);
        }
        return Ok(Duration::ZERO);
    };
    let started = Instant::now();
    if shelf.is_cancel_asked(id)? {
        record.end(JobState::Cancelled, None, now_ns());
        return keep(service, &shelf, &record, started);
    }
    if record.attempts >= MOST_ATTEMPTS {
        record.end(JobState::Failed, Some(interrupted(record.attempts)), now_ns());
        return keep(service, &shelf, &record, started);
    }
    let again = record.begun_ns.is_some();
    record.begin(&format!("{} {}", site.owner.host, site.owner.process), now_ns());
    shelf.replace(&record)?;
    service.jobs.set(&record);
    tracing::info!(attempt = record.attempts, "the job runs");
    let done = {
        let work = Work {
            config,
            stores: &stores,
            site: &site,
            cancel: &running.cancel,
            meter: &running.meter,
            record: &record,
            again,
        };
        verb(&work)
    };
    if !lease.is_held() {
        // Somebody took it for abandoned and continues it: the record is his.
        tracing::warn!("the job's lease was taken over");
        return Ok(LATER);
    }
    let put_off = end(service, &shelf, &mut record, running, done)?;
    keep(service, &shelf, &record, started).map(|_| put_off)
}

fn verb(work: &Work<'_>) -> Result<Outcome, JobError> {
    let request: JobRequest = serde_json::from_value(work.record.request.clone()).map_err(|error| {
        let message = format!("the request is not understood, perhaps it is a newer instance's: {error}");
        error_of(Kind::Usage, Code::Usage, message)
    })?;
    match catch_unwind(AssertUnwindSafe(|| kinds::run(work, &request))) {
        Ok(done) => done.map_err(|error| job_error(&error)),
        Err(_) => Err(error_of(Kind::Io, Code::Io, "the verb ended by a panic: see the log".to_owned())),
    }
}

fn error_of(kind: Kind, code: Code, message: String) -> JobError {
    JobError { kind: kind.word().to_owned(), code: code.as_str().to_owned(), message, member: None }
}

fn interrupted(attempts: u32) -> JobError {
    let message = format!("it was begun {attempts} times, and each time the service ended before it did");
    error_of(Kind::Io, Code::JobInterrupted, message)
}

/// Gives the record its end, or puts the job back; says for how long.
fn end(
    service: &Service,
    shelf: &JobShelf,
    record: &mut JobRecord,
    running: &Running,
    done: Result<Outcome, JobError>,
) -> Result<Duration, OpError> {
    match done {
        Ok(outcome) => {
            service.metrics.count_bytes(&outcome);
            let bytes = serde_json::to_vec(&outcome.document).unwrap_or_default();
            let mut error = outcome.error;
            if bytes.len() as u64 <= MAX_RESULT_BYTES {
                shelf.put_result(&record.id, &bytes)?;
            } else {
                let message = format!("its report has {} bytes, more than are kept", bytes.len());
                error = error.or(Some(error_of(Kind::Refused, Code::TooLarge, message)));
            }
            let state = if error.is_some() { JobState::Failed } else { JobState::Done };
            record.end(state, error, now_ns());
        }
        Err(error) if error.kind == Kind::Cancelled.word() => {
            if running.asked.load(Ordering::Relaxed) || shelf.is_cancel_asked(&record.id)? {
                record.end(JobState::Cancelled, None, now_ns());
            } else {
                record.put_back();
            }
        }
        // Nothing was begun: somebody has the store for himself for a moment.
        Err(error) if error.code == Code::StoreBusy.as_str() && !service.jobs.is_stopped() => {
            tracing::info!("the job waits: {}", error.message);
            record.put_back();
            return Ok(LATER);
        }
        Err(error) => record.end(JobState::Failed, Some(error), now_ns()),
    }
    Ok(Duration::ZERO)
}

/// Makes what became of a job durable, and known.
fn keep(
    service: &Service,
    shelf: &JobShelf,
    record: &JobRecord,
    started: Instant,
) -> Result<Duration, OpError> {
    shelf.replace(record)?;
    service.jobs.set(record);
    if record.state.is_over() {
        // Else it goes with the record.
        let _ = shelf.remove_progress(&record.id);
        service.metrics.count_job(record, started.elapsed());
        let code = record.error.as_ref().map(|error| error.code.as_str());
        tracing::info!(state = record.state.word(), code, "the job is over");
    }
    Ok(Duration::ZERO)
}

/// Ends a job that waits and that somebody wants stopped. Best effort: whoever takes it up next does the same.
pub fn end_waiting(service: &Service, stores: &Stores, home: usize, id: &JobId) {
    let cancel = Cancel::default();
    let site = Site::new(stores, &SystemClock, &cancel, service.config.lease);
    let end = || -> Result<(), OpError> {
        let shelf = JobShelf::new(stores.get(home)?)?;
        let _lease = Lease::take_file(&site, home, &JobShelf::lease(id))?;
        if let Some(mut record) = shelf.get(id)?.filter(|record| record.state == JobState::Queued) {
            record.end(JobState::Cancelled, None, now_ns());
            keep(service, &shelf, &record, Instant::now())?;
        }
        Ok(())
    };
    if let Err(error) = end() {
        tracing::info!(job = %id, "not stopped at once: {}", with_causes(&error));
    }
}

/// Looks at the stores for jobs of others, until the service drains.
fn poll(service: &Service, _: usize) {
    let mut looks = 0_u64;
    while !service.jobs.is_stopped() {
        if let Err(error) = look(service, looks.is_multiple_of(SWEEP_EVERY)) {
            tracing::warn!(code = %error.code(), "the jobs could not be looked at: {}", with_causes(&error));
        }
        looks += 1;
        let begun = Instant::now();
        while begun.elapsed() < POLL && !service.jobs.is_stopped() {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn look(service: &Service, sweep: bool) -> Result<(), OpError> {
    let stores = connect(service.config.stores.clone())?;
    let known: BTreeMap<JobId, JobRecord> =
        service.jobs.all().into_iter().map(|entry| (entry.record.id.clone(), entry.record)).collect();
    let (mut homes, mut seen, mut cancelled) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (index, store) in stores.iter().filter(|(_, store)| store.writable_record().is_ok()) {
        let shelf = JobShelf::new(store)?;
        if sweep {
            shelf.sweep(i128::from(now_ns()))?;
        }
        let mut listed = shelf.list(&known)?;
        for (name, why) in &listed.unreadable {
            tracing::warn!(store = %store.id(), name, "no record of a job, left alone: {why}");
        }
        prune(service, &shelf, &mut listed.records)?;
        for record in &mut listed.records {
            if record.state == JobState::Running && !is_ours(service, &record.id) {
                free(service, &stores, index, record)?;
            }
        }
        homes.push(store.id().to_string());
        seen.extend(listed.records.into_iter().map(|record| (store.id().to_string(), record)));
        cancelled.append(&mut listed.cancelled);
    }
    service.jobs.merge(&homes, seen, &cancelled);
    Ok(())
}

fn is_ours(service: &Service, id: &JobId) -> bool {
    service.jobs.known(id).is_some_and(|entry| entry.running.is_some())
}

/// Puts a job back whose owner died. Waits for as long as it takes to see that he lives.
fn free(service: &Service, stores: &Stores, home: usize, record: &mut JobRecord) -> Result<(), OpError> {
    let cancel = Cancel::default();
    let site = Site::new(stores, &SystemClock, &cancel, service.config.lease);
    let _lease = match Lease::take_file(&site, home, &JobShelf::lease(&record.id)) {
        Err(error) if error.kind() == Kind::Busy => return Ok(()),
        taken => taken?,
    };
    let shelf = JobShelf::new(stores.get(home)?)?;
    // It may have ended meanwhile, or run here.
    if let Some(mut now) = shelf.get(&record.id)?
        && !is_ours(service, &record.id)
    {
        if now.state == JobState::Running {
            tracing::info!(job = %now.id, owner = now.owner, "nobody works on the job any more");
            now.state = JobState::Queued;
            shelf.replace(&now)?;
        }
        *record = now;
    }
    Ok(())
}

/// Removes jobs that were over long ago, and the oldest of too many.
fn prune(service: &Service, shelf: &JobShelf, records: &mut Vec<JobRecord>) -> Result<(), OpError> {
    let keep = i64::try_from(service.config.keep_jobs.as_nanos()).unwrap_or(i64::MAX);
    let since = now_ns().saturating_sub(keep);
    let mut over: Vec<(i64, JobId)> = records
        .iter()
        .filter(|record| record.state.is_over())
        .map(|record| (record.ended_ns.unwrap_or(record.made_ns), record.id.clone()))
        .collect();
    over.sort();
    let too_many = over.len().saturating_sub(MOST_FINISHED);
    let goes = over.iter().enumerate().filter(|(at, (ended, _))| *at < too_many || *ended < since);
    let goes: BTreeSet<JobId> = goes.map(|(_, (_, id))| id.clone()).collect();
    for id in &goes {
        shelf.remove(id)?;
        service.jobs.forget(id);
    }
    records.retain(|record| !goes.contains(&record.id));
    Ok(())
}
