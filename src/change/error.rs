//! Errors of changing a share.

use crate::backend::BackendError;
use crate::cloudstack::checkpoint::CheckpointError;
use crate::failure::{Code, Failure, Kind};
use crate::store::StoreError;

/// What a change gives.
pub type Result<T> = std::result::Result<T, ChangeError>;

/// A step of a change that failed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The store failed.
    #[error("failed to {action} {member}")]
    Store {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// The member, or the file of qchain's own.
        member: String,
        /// The cause.
        #[source]
        source: BackendError,
    },
    /// The stores could not be read.
    #[error(transparent)]
    Stores(#[from] StoreError),
    /// Somebody else changed or replaced a file.
    #[error("{member} was changed or replaced by somebody else meanwhile")]
    ChangedMeanwhile {
        /// The member.
        member: String,
    },
    /// Somebody put a member over one that is being merged in place.
    #[error("{member} got a child meanwhile, {child}")]
    NewChild {
        /// The member.
        member: String,
        /// What reads through it.
        child: String,
    },
    /// A checkpoint file cannot follow the change.
    #[error("the checkpoint file {path} cannot be edited")]
    Checkpoint {
        /// The file.
        path: String,
        /// The cause.
        #[source]
        source: CheckpointError,
    },
    /// Somebody else works on the tree.
    #[error("its tree is being changed by {owner}")]
    Busy {
        /// Who.
        owner: String,
    },
    /// Somebody else decided first.
    #[error("generation {generation} of tree {tree} was decided by somebody else")]
    Decided {
        /// The tree.
        tree: String,
        /// The number.
        generation: u64,
    },
    /// The tree is frozen.
    #[error("its tree {tree} is frozen: {reason}")]
    Frozen {
        /// The tree.
        tree: String,
        /// Why.
        reason: String,
    },
    /// A store that a record names is not configured.
    #[error("a record names {path} on the store {id}, which is not configured or not present")]
    StoreAbsent {
        /// The store's id in `store.json`.
        id: String,
        /// The name there.
        path: String,
    },
    /// A record is damaged.
    #[error("the record {path} is damaged: {detail}")]
    BadRecord {
        /// Where it lies.
        path: String,
        /// What is wrong.
        detail: String,
    },
    /// An operation cannot be undone.
    #[error("{operation} cannot be undone: {reason}")]
    NotUndoable {
        /// The operation.
        operation: String,
        /// What is in the way.
        reason: String,
    },
    /// The store failed while the number was claimed: it may have been taken, and may not last.
    #[error(
        "whether {operation} was decided is not certain; qchain recover finds out, and finishes it or takes it back"
    )]
    Uncertain {
        /// The operation.
        operation: String,
        /// The cause.
        #[source]
        source: Box<ChangeError>,
    },
    /// A merge in place failed after its decision.
    #[error("merging in place into {member} failed: {detail}")]
    InPlace {
        /// The member written into.
        member: String,
        /// The reason's code.
        code: Code,
        /// What happened.
        detail: String,
    },
    /// The witness could not look.
    #[error("qemu-img could not compare {member} with what it replaced: {detail}")]
    Witness {
        /// The survivor.
        member: String,
        /// What happened.
        detail: String,
    },
    /// Stopped on request.
    #[error("stopped on request")]
    Cancelled,
}

impl Failure for ChangeError {
    fn kind(&self) -> Kind {
        match self {
            Self::Store { source, .. } => source.kind(),
            Self::Stores(source) => source.kind(),
            Self::ChangedMeanwhile { .. }
            | Self::NewChild { .. }
            | Self::Checkpoint { .. }
            | Self::Frozen { .. }
            | Self::StoreAbsent { .. }
            | Self::BadRecord { .. }
            | Self::NotUndoable { .. } => Kind::Refused,
            Self::Busy { .. } | Self::Decided { .. } => Kind::Busy,
            Self::InPlace { code, .. } => match code {
                Code::NoSpace => Kind::NoSpace,
                Code::Io => Kind::Io,
                _ => Kind::Refused,
            },
            Self::Witness { .. } => Kind::Io,
            Self::Uncertain { source, .. } => source.kind(),
            Self::Cancelled => Kind::Cancelled,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Store { source, .. } => source.code(),
            Self::Stores(source) => source.code(),
            Self::ChangedMeanwhile { .. } | Self::NewChild { .. } => Code::ChangedMeanwhile,
            Self::Checkpoint { .. } => Code::CheckpointUnreadable,
            Self::Busy { .. } | Self::Decided { .. } => Code::StoreBusy,
            Self::Frozen { .. } => Code::Frozen,
            Self::StoreAbsent { .. } => Code::StoreAbsent,
            Self::BadRecord { .. } => Code::BadChangeRecord,
            Self::NotUndoable { .. } => Code::NotUndoable,
            Self::InPlace { code, .. } => *code,
            Self::Uncertain { .. } => Code::Decided,
            Self::Witness { .. } => Code::Io,
            Self::Cancelled => Code::Cancelled,
        }
    }

    fn member(&self) -> Option<&str> {
        match self {
            Self::Store { member, .. }
            | Self::ChangedMeanwhile { member }
            | Self::NewChild { member, .. }
            | Self::InPlace { member, .. }
            | Self::Witness { member, .. } => Some(member),
            Self::Checkpoint { path, .. } => Some(path),
            Self::Stores(source) => source.member(),
            Self::Uncertain { source, .. } => source.member(),
            _ => None,
        }
    }
}
