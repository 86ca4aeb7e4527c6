//! Changing a share: how names get new files and old ones go, so that a crash, a second instance or somebody
//! else's hand at any moment leaves every view as it was. `PROTOCOL.md` has the protocol and its crash table.
//!
//! Owns: leases, intents, the one deciding claim, publication, checkpoint files, trash, undo, recovery. Does
//! not own: what the new bytes are (`ops`, `qcow2::layout`).
//!
//! An [`Operation`] announces itself and builds files that nobody knows of. [`Operation::decide`] claims the
//! tree's next number by one exclusive create; from then on it is [`Decided`], and everything that follows is
//! worked out from that record and from what lies on the stores, by this process or any other: names are
//! published ([`publication`]), checkpoint files follow ([`checkpoint`]), deleted members go after their grace
//! ([`departure`]), and what was kept goes after its time ([`purge`]). [`recover`] does the same for what it
//! finds, and takes back what was never decided.
//!
//! Nothing here needs clones, locks or exchange for its safety; where they are they narrow the moments in
//! which somebody else's hand can only be noticed after the fact.

pub mod checkpoint;
mod clock;
mod decided;
pub mod departure;
mod error;
mod guard;
pub mod history;
pub mod in_place;
pub mod journal;
mod keep;
mod lease;
pub mod leaving;
pub mod log;
mod operation;
pub mod pending_rows;
pub mod places;
pub mod publication;
pub mod purge;
pub mod record;
pub mod recover;
mod site;
mod standing;
mod stub;
pub mod sweep;
pub mod tree;
#[cfg(test)]
mod trial;
pub mod undo;
pub mod witness;
pub mod yard;

pub use clock::{Clock, SystemClock};
pub use decided::{Decided, Grown};
pub use error::{ChangeError, Result};
pub use guard::Guard;
pub use lease::Lease;
pub use operation::{Operation, Sealed, Staged};
pub use site::{At, Owner, Site};
