//! Errors of changing a share.

use crate::backend::BackendError;
use crate::cloudstack::checkpoint::CheckpointError;
use crate::failure::{Code, Failure, Kind};

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
        /// The member.
        member: String,
        /// The cause.
        #[source]
        source: BackendError,
    },
    /// Somebody else changed or replaced a file.
    #[error("{member} was changed or replaced by somebody else meanwhile")]
    ChangedMeanwhile {
        /// The member.
        member: String,
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
}

impl Failure for ChangeError {
    fn kind(&self) -> Kind {
        match self {
            Self::Store { source, .. } => source.kind(),
            Self::ChangedMeanwhile { .. } | Self::Checkpoint { .. } => Kind::Refused,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Store { source, .. } => source.code(),
            Self::ChangedMeanwhile { .. } => Code::ChangedMeanwhile,
            Self::Checkpoint { .. } => Code::CheckpointUnreadable,
        }
    }

    fn member(&self) -> Option<&str> {
        match self {
            Self::Store { member, .. } | Self::ChangedMeanwhile { member } => Some(member),
            Self::Checkpoint { path, .. } => Some(path),
        }
    }
}
