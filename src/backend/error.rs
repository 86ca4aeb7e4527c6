//! Errors of a store.

use std::io;

use crate::failure::{Code, Failure, Kind};

/// What a call of a backend gives.
pub type Result<T> = std::result::Result<T, BackendError>;

/// A store call that failed. Each names the path, as the user would write it.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// There is nothing of that name.
    #[error("{path} does not exist")]
    NotFound {
        /// The path.
        path: String,
    },
    /// The name is taken.
    #[error("{path} exists already")]
    AlreadyExists {
        /// The path.
        path: String,
    },
    /// A symbolic link or special file is in the way.
    #[error("{path} is a symbolic link or no regular file; it was not followed")]
    NotPlain {
        /// The path.
        path: String,
    },
    /// No room, or no quota.
    #[error("no space left for {path}")]
    NoSpace {
        /// The path.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Extents cannot be shared here.
    #[error("cannot clone into {path}")]
    CannotClone {
        /// The target's path.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The store does not let us give a file its owner or attributes.
    #[error("{path} cannot be given {what}")]
    Squashed {
        /// The path.
        path: String,
        /// What did not take.
        what: String,
    },
    /// Anything else that the system said.
    #[error("failed to {action} {path}")]
    Io {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// The path.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl BackendError {
    /// Whether two names lie on different file systems, so that neither a rename nor a link can join them.
    #[must_use]
    pub fn is_cross_device(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::CrossesDevices)
    }

    /// Sorts a system error by what it means for the caller.
    #[must_use]
    #[expect(clippy::needless_pass_by_value, reason = "paths, references and formatted texts alike")]
    pub fn from_io(action: &'static str, path: impl ToString, source: io::Error) -> Self {
        let path = path.to_string();
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound { path },
            io::ErrorKind::AlreadyExists => Self::AlreadyExists { path },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { path, source },
            _ => Self::Io { action, path, source },
        }
    }
}

impl Failure for BackendError {
    fn kind(&self) -> Kind {
        match self {
            Self::NotFound { .. } => Kind::NotFound,
            Self::AlreadyExists { .. } | Self::NotPlain { .. } | Self::Squashed { .. } => Kind::Refused,
            Self::NoSpace { .. } => Kind::NoSpace,
            Self::CannotClone { .. } | Self::Io { .. } => Kind::Io,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } => Code::NotFound,
            Self::AlreadyExists { .. } => Code::ChangedMeanwhile,
            Self::NotPlain { .. } => Code::SpecialFile,
            Self::Squashed { .. } => Code::Squashed,
            Self::NoSpace { .. } => Code::NoSpace,
            Self::CannotClone { .. } => Code::ModeImpossible,
            Self::Io { .. } => Code::Io,
        }
    }

    fn member(&self) -> Option<&str> {
        match self {
            Self::NotFound { path }
            | Self::AlreadyExists { path }
            | Self::NotPlain { path }
            | Self::NoSpace { path, .. }
            | Self::CannotClone { path, .. }
            | Self::Squashed { path, .. }
            | Self::Io { path, .. } => Some(path),
        }
    }
}
