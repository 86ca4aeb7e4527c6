//! Jobs of the service as durable records in `.qchain/jobs/`: any instance on the store sees and continues them.
//!
//! Owns: the form of a record ([`JobRecord`]), its states, and its files ([`JobShelf`]). Does not own: what a job does, or
//! who runs it: the request is opaque here, and whoever writes a record holds the job's lease, except the one who makes
//! it. `LAYOUT.md` has the files.
//!
//! Crash rule: a record is the whole old one or the whole new one. Its result is durable before the record says that it
//! has one. A job that was running when its owner died is continued by whoever takes the lease.

mod record;
mod shelf;

pub use record::{JobError, JobId, JobRecord, JobState};
pub use shelf::{JobShelf, MAX_JOBS, MAX_RESULT_BYTES};
