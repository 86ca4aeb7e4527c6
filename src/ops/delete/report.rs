//! What a delete did.

use crate::chain::graph::NodeId;
use crate::failure::Kind;
use crate::ids::Digest;
use crate::ops::OpError;
use crate::ops::delete::plan::Mode;

/// How one entry ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// As planned.
    Done,
    /// It failed: the old state stands, or, with the code `decided`, recovery finishes it.
    Failed,
    /// Not begun, because it would be unsafe.
    Refused,
    /// Not begun, because something is in use.
    Busy,
}

impl Status {
    /// The word in reports.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Refused => "refused",
            Self::Busy => "busy",
        }
    }

    /// The status that an error of that kind leads to.
    #[must_use]
    pub fn of(kind: Kind) -> Self {
        match kind {
            Kind::Busy => Self::Busy,
            Kind::Refused => Self::Refused,
            Kind::Damage
            | Kind::Usage
            | Kind::NotFound
            | Kind::Corrupt
            | Kind::NoSpace
            | Kind::Io
            | Kind::Cancelled => Self::Failed,
        }
    }
}

/// What became of one entry of the plan.
#[derive(Debug)]
pub struct Outcome {
    /// Random; one for all entries of a tree.
    pub operation: String,
    /// How it ended.
    pub status: Status,
    /// Why it did not end well.
    pub error: Option<OpError>,
    /// The deleted members, lowest first.
    pub members: Vec<NodeId>,
    /// The survivor.
    pub into: Option<NodeId>,
    /// How data was moved; `None` if it did not come to that.
    pub mode: Option<Mode>,
    /// Bytes of data written: copied, composed, compressed.
    pub bytes_written: u64,
    /// Bytes of tables written.
    pub metadata_bytes_written: u64,
    /// Bytes shared by cloning.
    pub bytes_cloned: u64,
    /// Bytes given back to the store, by the allocation of the files before and after.
    pub bytes_freed_now: u64,
    /// Bytes that come back when what is kept for an undo goes.
    pub bytes_held_until_purge: u64,
    /// Until when it can be undone, nanoseconds since 1970; `None` if it cannot.
    pub undo_until_ns: Option<i64>,
    /// Worth telling, although it ended well: a deleted member that stays for a while, a rehearsal.
    pub note: Option<String>,
    /// The allocation of the new file, in bytes.
    pub new_bytes: u64,
    /// Guest bytes for which the new image was proved to resolve to the old sources.
    pub planned_bytes: u64,
    /// Guest bytes that were read on both sides and compared.
    pub compared_bytes: u64,
    /// Guest bytes whose view digest was proved equal from the members' leaf tables.
    pub digest_bytes: u64,
    /// Bytes that were read back from the store and hash to their leaves.
    pub data_bytes: u64,
    /// The survivor's view digest, if that was proved.
    pub view_digest: Option<Digest>,
    /// How long it took, in nanoseconds.
    pub elapsed_ns: u64,
}

/// What a delete did, in the order of the plan.
#[derive(Debug, Default)]
pub struct Report {
    /// One for each entry, and one for each refused tree.
    pub outcomes: Vec<Outcome>,
}

impl Report {
    /// The first that did not end well.
    #[must_use]
    pub fn first_failure(&self) -> Option<&OpError> {
        self.outcomes.iter().find_map(|outcome| outcome.error.as_ref())
    }
}
