//! The service: verbs as durable jobs over HTTP, for CloudStack's system VMs, copy jobs and operators.
//!
//! | module | owns |
//! |---|---|
//! | [`config`] | what `qchain serve` is told, as values |
//! | `server` `patient` | sockets: TLS, limits on connections and slow clients, draining |
//! | `routes` | one file a group of routes: requests in, documents out; no rule about images |
//! | `extract` | what handlers take: who asks (`auth`), bodies, queries; each refusal a [`problem`] |
//! | `jobs` | the queue, the workers, what each kind of job does |
//! | `downloads` | images at signed URLs, by any range, with no file in between |
//! | `peers` | members that other zones copy, kept open |
//! | [`schedule`] | the jobs that the service makes by itself |
//! | `rows` | CloudStack's rows, for jobs and to be shown |
//! | `view` | stores opened, scanned, resolved, off the asynchronous threads |
//! | `page` | the page at `/`: static files that use the API |
//! | `health` `holdings` `metrics` `openapi` | what watchers and clients read |
//!
//! Does not own: what a verb does (`ops`), or what a record looks like (`store::jobs`). The service keeps nothing of its
//! own but caches: jobs and the key of signed URLs are records on the stores, so that any instance continues them.
//!
//! tokio lives here. Verbs run on threads of their own, never on its threads; a request that reads a store does so on
//! the blocking pool, so many at once and no more.
//!
//! Crash rule: whenever the process ends, a job is queued, running or over on its store. One that was running is
//! continued by the next instance that finds nobody renewing its lease.

pub mod auth;
pub mod config;
mod downloads;
mod error;
mod extract;
mod health;
mod holdings;
mod jobs;
mod metrics;
mod openapi;
mod page;
mod patient;
mod peers;
pub mod problem;
mod routes;
mod rows;
pub mod schedule;
mod server;
mod state;
mod view;
mod words;

pub use config::Config;
pub use error::ServiceError;
pub use openapi::document as openapi_document;
pub use server::run;
