//! Changing a share.
//!
//! Owns: the exclusive right to change ([`Guard`]), files in the making ([`Staged`]), the order in which names
//! change. Does not own: what the new bytes are (`ops`, `qcow2::layout`).
//!
//! A survivor's new file is built beside it under `.qchain/tmp`, given the old one's identity before its first
//! byte, sealed, proved by the caller, and takes the survivor's name by one rename; then the survivor's
//! checkpoint file follows; then deleted names go, each with its checkpoint file after it.
//!
//! Crash rule: at every instant each survivor's name stands for the whole old file or the whole new one, and
//! both have the same view; a deleted member keeps its name until all that read through it are published. What
//! a crash can leave: a temporary file; a survivor whose checkpoint file still names the deleted parent; a
//! deleted member that nobody reads any more. None of them changes what any snapshot restores to.

pub mod checkpoint;
mod error;
mod guard;
mod staged;

pub use error::{ChangeError, Result};
pub use guard::Guard;
pub use staged::Staged;
