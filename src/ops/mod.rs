//! The verbs: one folder each, with `plan.rs` (pure), `run.rs` and `report.rs` as far as it has them.
//!
//! Verbs take opened [`Stores`](crate::store::Stores) and a scan and give reports, values that the edges
//! render; nothing here knows a terminal or HTTP. Verbs never import each other; what two need moves down a
//! layer.

pub mod adopt;
pub mod audit;
pub mod copy;
pub mod delete;
pub mod digest;
pub mod document;
mod error;
pub mod flatten;
pub mod init;
pub mod list;
pub mod map;
pub mod policy;
pub mod reclaim;
pub mod recover;
pub mod repair;
pub mod verify;
mod work;

pub use error::{OpError, Result};
pub use work::Work;
