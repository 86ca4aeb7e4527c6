//! What lies on a share: stores, members, names, opened chains.
//!
//! Owns: turning files into [`chain::Graph`](crate::chain::graph::Graph) nodes and names into members, and
//! qchain's own directory (`LAYOUT.md`). Does not own: what may be changed (`change`, `ops`). Reading needs no
//! opt-in and writes nothing to a store.
//!
//! Who may do what at the same time (a guard is an exclusive lock on a store's `locks/change`):
//!
//! | | read (list, map, digest, verify) | delete | init, deinit |
//! |---|---|---|---|
//! | read | no interaction | reads old or new files, never a mix: open files stay | no interaction |
//! | delete | as left | guard; the second one is busy | guard |
//! | init, deinit | no interaction | guard | guard |
#![doc = include_str!("LAYOUT.md")]

pub mod ahead;
pub mod attest;
pub mod buffers;
pub mod cache;
pub mod caches;
pub mod chain;
pub mod compare;
pub mod connect;
pub mod digest;
mod error;
pub mod facts;
pub mod jobs;
pub mod manifest;
pub mod measure;
pub mod merge;
pub mod names;
mod open;
pub mod prove;
pub mod record;
pub mod rows;
pub mod scan;
pub mod standalone;
pub mod stream;
pub mod url_key;

pub use error::{Result, StoreError};
pub use open::{Store, StoreConfig, Stores};
