//! Jobs: what is asked for ([`request`]), who is next ([`queue`]), who runs it ([`worker`]), what each kind does
//! ([`kinds`]), how it comes along ([`watch`]) and how others hear of that ([`tell`]).
//!
//! A job is a record on a store ([`crate::store::jobs`]); what is kept here is a picture of it that every poll renews.
//! Only who holds a job's lease, a file beside the record, writes the record. So any number of instances may look at one
//! store: each begins what waits and what nobody renews.

mod kinds;
mod queue;
pub mod request;
mod tell;
pub mod watch;
mod worker;

pub use kinds::{DeleteDocument, FLATTENED_SUFFIX, Outcome, ReclaimDocument, plan};
pub use queue::{Entry, Jobs, New};
pub use worker::start;
