//! Figures for Prometheus: `GET /metrics`.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::holdings::{Held, Holdings};
use super::jobs::Entry;
use super::jobs::request::JobRequest;
use super::problem::Problem;
use super::state::Service;
use super::view::now_ns;
use crate::failure::{Code, Kind};
use crate::ops::recover::state;
use crate::store::connect::connect;
use crate::store::jobs::{JobRecord, JobState};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfJob {
    kind: String,
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfKind {
    kind: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfBytes {
    what: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfCode {
    code: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfRequest {
    route: String,
    method: String,
    status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfStore {
    store: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfKnowledge {
    store: String,
    known: &'static str,
}

/// All figures.
pub struct Metrics {
    registry: Registry,
    jobs: Family<OfJob, Gauge>,
    finished: Family<OfJob, Counter>,
    job_seconds: Family<OfKind, Histogram>,
    bytes: Family<OfBytes, Counter>,
    errors: Family<OfCode, Counter>,
    requests: Family<OfRequest, Counter>,
    request_seconds: Histogram,
    connections: Gauge,
    refused_connections: Counter,
    queue_age: Gauge,
    rate: Gauge,
    downloads: Gauge,
    downloaded: Counter,
    store_up: Family<OfStore, Gauge>,
    trash: Family<OfStore, Gauge>,
    open_operations: Family<OfStore, Gauge>,
    frozen: Family<OfStore, Gauge>,
    leaving: Family<OfStore, Gauge>,
    pinned: Family<OfStore, Gauge>,
    members: Family<OfKnowledge, Gauge>,
    verification_age: Family<OfStore, Gauge>,
    holdings: Holdings,
}

/// From 10 ms to some 11 days.
fn job_buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.01, 4.0, 14))
}

impl Metrics {
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("qchain"),
            jobs: Family::default(),
            finished: Family::default(),
            job_seconds: Family::new_with_constructor(job_buckets),
            bytes: Family::default(),
            errors: Family::default(),
            requests: Family::default(),
            request_seconds: Histogram::new(exponential_buckets(0.001, 4.0, 9)),
            connections: Gauge::default(),
            refused_connections: Counter::default(),
            queue_age: Gauge::default(),
            rate: Gauge::default(),
            downloads: Gauge::default(),
            downloaded: Counter::default(),
            store_up: Family::default(),
            trash: Family::default(),
            open_operations: Family::default(),
            frozen: Family::default(),
            leaving: Family::default(),
            pinned: Family::default(),
            members: Family::default(),
            verification_age: Family::default(),
            holdings: Holdings::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let all = &mut self.registry;
        all.register("jobs", "Jobs that are kept, by kind and state", self.jobs.clone());
        all.register("jobs_finished", "Jobs that ended in this process", self.finished.clone());
        let (help, seconds) = ("How long jobs took in this process", self.job_seconds.clone());
        all.register_with_unit("job_duration", help, Unit::Seconds, seconds);
        let help = "Bytes that jobs of this process read, wrote, cloned and freed";
        all.register_with_unit("job", help, Unit::Bytes, self.bytes.clone());
        all.register("errors", "Requests and jobs that failed, by code", self.errors.clone());
        all.register("http_requests", "Requests that were answered", self.requests.clone());
        let (help, seconds) = ("How long answers took", self.request_seconds.clone());
        all.register_with_unit("http_request_duration", help, Unit::Seconds, seconds);
        all.register("http_connections", "Connections that are open", self.connections.clone());
        let help = "Connections that were closed at once, as there were too many";
        all.register("http_connections_refused", help, self.refused_connections.clone());
        let help = "How long the oldest waiting job has waited";
        all.register_with_unit("queue_age", help, Unit::Seconds, self.queue_age.clone());
        let help = "The limit on bytes a second of all jobs; 0 for none";
        all.register("rate_limit_bytes_per_second", help, self.rate.clone());
        all.register("downloads", "Downloads that are being sent", self.downloads.clone());
        let help = "Bytes of images that were given to clients";
        all.register_with_unit("downloaded", help, Unit::Bytes, self.downloaded.clone());
        let help = "Whether the store is mounted and answers";
        all.register("store_up", help, self.store_up.clone());
        let help = "Old files that are kept for an undo, by their allocation";
        all.register_with_unit("trash", help, Unit::Bytes, self.trash.clone());
        let help = "Operations that are not over: half done, or with old files kept";
        all.register("open_operations", help, self.open_operations.clone());
        let help = "Trees that nothing is done to until somebody has looked";
        all.register("frozen_trees", help, self.frozen.clone());
        let help = "What members take that are deleted and keep their names until the grace ends";
        all.register_with_unit("leaving", help, Unit::Bytes, self.leaving.clone());
        let help = "What members take that CloudStack's rows have given up; only with rows";
        all.register_with_unit("pinned", help, Unit::Bytes, self.pinned.clone());
        let help = "Members of chains: all bytes read since they were adopted, not all, not adopted";
        all.register("members", help, self.members.clone());
        let help = "Since when the byte that was left alone for longest was not read";
        all.register_with_unit("verification_age", help, Unit::Seconds, self.verification_age.clone());
    }

    /// A job ended here.
    pub fn count_job(&self, record: &JobRecord, took: Duration) {
        let kind = record.kind.clone();
        self.finished.get_or_create(&OfJob { kind: kind.clone(), state: record.state.word() }).inc();
        self.job_seconds.get_or_create(&OfKind { kind }).observe(took.as_secs_f64());
        if let Some(error) = &record.error {
            self.count_error(&error.code);
        }
    }

    /// What a job moved.
    pub fn count_bytes(&self, outcome: &super::jobs::Outcome) {
        for (what, bytes) in [
            ("read", outcome.read_bytes),
            ("written", outcome.written_bytes),
            ("cloned", outcome.cloned_bytes),
            ("freed", outcome.freed_bytes),
        ] {
            self.bytes.get_or_create(&OfBytes { what }).inc_by(bytes);
        }
    }

    /// Something failed.
    pub fn count_error(&self, code: &str) {
        self.errors.get_or_create(&OfCode { code: code.to_owned() }).inc();
    }

    /// A request was answered. The route is that of the router, so that there are few of them.
    pub fn count_request(&self, route: &str, method: &str, status: u16, took: Duration) {
        let label = OfRequest { route: route.to_owned(), method: method.to_owned(), status };
        self.requests.get_or_create(&label).inc();
        self.request_seconds.observe(took.as_secs_f64());
    }

    pub fn download_began(&self) {
        self.downloads.inc();
    }

    pub fn download_ended(&self) {
        self.downloads.dec();
    }

    pub fn downloaded(&self, bytes: u64) {
        self.downloaded.inc_by(bytes);
    }

    pub fn connection_opened(&self) {
        self.connections.inc();
    }

    pub fn connection_closed(&self) {
        self.connections.dec();
    }

    pub fn connection_refused(&self) {
        self.refused_connections.inc();
    }

    /// The text. Blocks: the stores are asked what waits on them.
    pub fn text(&self, service: &Service) -> Result<String, Problem> {
        self.jobs.clear();
        let entries = service.jobs.all();
        for kind in JobRequest::KINDS {
            for state in JobState::ALL {
                let of = |entry: &&Entry| entry.record.kind == kind && entry.record.state == state;
                let label = OfJob { kind: kind.to_owned(), state: state.word() };
                let count = entries.iter().filter(of).count();
                self.jobs.get_or_create(&label).set(i64::try_from(count).unwrap_or(i64::MAX));
            }
        }
        let waits = entries.iter().filter(|entry| entry.record.state == JobState::Queued);
        let oldest = waits.map(|entry| entry.record.made_ns).min();
        self.queue_age.set(oldest.map_or(0, |made| (now_ns() - made).max(0) / 1_000_000_000));
        self.rate.set(i64::try_from(service.pace.bytes_per_second()).unwrap_or(i64::MAX));
        for store in service.health.last(&service.config) {
            self.store_up.get_or_create(&OfStore { store: store.store }).set(i64::from(store.ready));
        }
        // Figures of stores that cannot be read are left out: whether they can is a figure of its own.
        let states = connect(service.config.stores.clone()).map_err(crate::ops::OpError::from);
        self.trash.clear();
        for waiting in states.and_then(|stores| state(&stores)).unwrap_or_default() {
            let label = OfStore { store: waiting.store };
            let set = |family: &Family<OfStore, Gauge>, value: u64| {
                family.get_or_create(&label).set(i64::try_from(value).unwrap_or(i64::MAX));
            };
            set(&self.trash, waiting.trash_bytes);
            set(&self.open_operations, waiting.open_operations);
            set(&self.frozen, waiting.frozen_trees);
        }
        self.tell_holdings(service);
        let mut text = String::new();
        encode(&mut text, &self.registry)
            .map_err(|error| Problem::new(Kind::Io, Code::Io, format!("no figures: {error}")))?;
        Ok(text)
    }

    /// What a look at all members says; nothing of stores that cannot be read.
    fn tell_holdings(&self, service: &Service) {
        self.leaving.clear();
        self.pinned.clear();
        self.members.clear();
        self.verification_age.clear();
        let found = self.holdings.get(&service.config, &service.rows).unwrap_or_else(|problem| {
            tracing::debug!("no look at all members: {}", problem.detail());
            std::collections::BTreeMap::default()
        });
        let value = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        for (store, held) in found {
            let Held { leaving_bytes, pinned_bytes, read, never_read, not_adopted, age_seconds } = held;
            let label = OfStore { store: store.clone() };
            self.leaving.get_or_create(&label).set(value(leaving_bytes));
            if let Some(pinned) = pinned_bytes {
                self.pinned.get_or_create(&label).set(value(pinned));
            }
            for (known, count) in [("read", read), ("never-read", never_read), ("not-adopted", not_adopted)] {
                let label = OfKnowledge { store: store.clone(), known };
                self.members.get_or_create(&label).set(value(count as u64));
            }
            if let Some(age) = age_seconds {
                self.verification_age.get_or_create(&label).set(value(age));
            }
        }
    }
}
