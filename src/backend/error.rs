//! Errors of a store.

use std::io;

use rustix::io::Errno;

use crate::failure::{Code, Failure, Kind};

/// What a call of a backend gives.
pub type Result<T> = std::result::Result<T, BackendError>;

/// How systems say that a file system has no hard links. EPERM is Linux's own word for it.
pub(super) const NO_LINKS: &[Errno] = &[Errno::PERM, Errno::NOTSUP, Errno::NOSYS];
/// How systems say that a file system or the kernel has no RENAME_EXCHANGE. EINVAL: an unknown flag.
pub(super) const NO_EXCHANGE: &[Errno] = &[Errno::INVAL, Errno::NOTSUP, Errno::NOSYS];
/// How systems say that there are no byte-range locks. ENOLCK: an NFS mount without a lock server.
pub(super) const NO_LOCKS: &[Errno] = &[Errno::INVAL, Errno::NOTSUP, Errno::NOSYS, Errno::NOLCK];
/// How systems say that space can be neither reserved nor given back.
pub(super) const NO_FALLOCATE: &[Errno] = &[Errno::NOTSUP, Errno::NOSYS];

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
    /// The store has no such operation; nothing was changed.
    #[error("this store cannot {action} {path}")]
    Unsupported {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// The path.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The store can only be read.
    #[error("this store is only read: cannot {action} {path}")]
    ReadOnly {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// The path.
        path: String,
    },
    /// The store's server does not answer.
    #[error("{store} cannot be reached: {detail}")]
    Unreachable {
        /// The store.
        store: String,
        /// What was tried, and what happened.
        detail: String,
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

    /// Whether this user has no right to it.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
    }

    /// Whether the store can only be read.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        match self {
            Self::ReadOnly { .. } => true,
            Self::Io { source, .. } => source.kind() == io::ErrorKind::ReadOnlyFilesystem,
            _ => false,
        }
    }

    /// Whether the store lacks the operation (hard links, exchange, image locks, clones), so that another way
    /// to the same end is worth a try.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Self::Unsupported { .. } | Self::CannotClone { .. })
    }

    /// Whether nothing of the store can be had, as its server does not answer: no matter of the one path.
    #[must_use]
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }

    /// As [`BackendError::from_io`], for an operation that a store may lack; `lacking` is how systems say so.
    #[must_use]
    pub(super) fn from_io_of(
        lacking: &[Errno],
        action: &'static str,
        path: impl ToString,
        source: io::Error,
    ) -> Self {
        if Errno::from_io_error(&source).is_some_and(|errno| lacking.contains(&errno)) {
            return Self::Unsupported { action, path: path.to_string(), source };
        }
        Self::from_io(action, path, source)
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
            Self::AlreadyExists { .. }
            | Self::NotPlain { .. }
            | Self::Squashed { .. }
            | Self::ReadOnly { .. } => Kind::Refused,
            Self::NoSpace { .. } => Kind::NoSpace,
            Self::CannotClone { .. }
            | Self::Unsupported { .. }
            | Self::Unreachable { .. }
            | Self::Io { .. } => Kind::Io,
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
            Self::ReadOnly { .. } => Code::ReadOnly,
            Self::Unreachable { .. } => Code::Unreachable,
            Self::Unsupported { .. } | Self::Io { .. } => Code::Io,
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
            | Self::Unsupported { path, .. }
            | Self::ReadOnly { path, .. }
            | Self::Io { path, .. } => Some(path),
            Self::Unreachable { .. } => None,
        }
    }
}
