//! `reclaim`: what CloudStack keeps as Hidden only because something reads through it, and what merging that away
//! means for its rows.
//!
//! A snapshot that was deleted while it had children stays at full size until they are gone. Merging it into its
//! children is a `delete` like any other; this module finds the members ([`find`]), and works out the changes of
//! rows that follow ([`row_changes`]). Values only: it reads nothing but the scan and the rows given.

mod changes;
mod select;

pub use changes::{Happening, row_changes};
pub use select::{Bounds, Found, find, still};
