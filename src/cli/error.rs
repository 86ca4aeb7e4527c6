//! How a command fails, and what it exits with.

use std::io;

use crate::database::{DatabaseError, RowsError};
use crate::failure::{Code, Failure, Kind};
use crate::ops::OpError;
use crate::progress::Cancelled;
use crate::service::ServiceError;
use crate::store::StoreError;

/// What a command gives.
pub type Result<T> = std::result::Result<T, CliError>;

/// The exit code of a command that did what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit(pub u8);

impl Exit {
    /// All done.
    pub const DONE: Self = Self(0);
}

impl From<Kind> for Exit {
    fn from(kind: Kind) -> Self {
        Self(kind.exit_code())
    }
}

/// A command that could not be done.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The call or the configuration is wrong.
    #[error("{message}")]
    Usage {
        /// `usage`, or what is more exact.
        code: Code,
        /// What is wrong.
        message: String,
    },
    /// Understood and not done.
    #[error("{message}")]
    Refused {
        /// Why.
        code: Code,
        /// Why, in a sentence.
        message: String,
    },
    /// The verb failed.
    #[error(transparent)]
    Op(#[from] OpError),
    /// A file that the call names cannot be read.
    #[error("failed to read {file}")]
    Read {
        /// The file.
        file: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// CloudStack's rows could not be read, or changed.
    #[error(transparent)]
    Rows(#[from] RowsError),
    /// The service could not be started.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// Standard output is gone, or full.
    #[error("failed to write the output")]
    Write {
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl CliError {
    /// A call that makes no sense.
    pub fn usage(message: String) -> Self {
        Self::Usage { code: Code::Usage, message }
    }

    /// Whether whoever reads the output has gone, which is no reason to complain.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Write { source } if source.kind() == io::ErrorKind::BrokenPipe)
    }
}

impl From<DatabaseError> for CliError {
    fn from(error: DatabaseError) -> Self {
        Self::Rows(error.into())
    }
}

impl From<StoreError> for CliError {
    fn from(error: StoreError) -> Self {
        Self::Op(error.into())
    }
}

impl From<Cancelled> for CliError {
    fn from(error: Cancelled) -> Self {
        Self::Op(error.into())
    }
}

impl Failure for CliError {
    fn kind(&self) -> Kind {
        match self {
            Self::Usage { .. } => Kind::Usage,
            Self::Refused { .. } => Kind::Refused,
            Self::Op(error) => error.kind(),
            Self::Rows(error) => error.kind(),
            Self::Service(error) => error.kind(),
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => Kind::NotFound,
            Self::Read { .. } | Self::Write { .. } => Kind::Io,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Usage { code, .. } | Self::Refused { code, .. } => *code,
            Self::Op(error) => error.code(),
            Self::Rows(error) => error.code(),
            Self::Service(error) => error.code(),
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => Code::NotFound,
            Self::Read { .. } | Self::Write { .. } => Code::Io,
        }
    }

    fn member(&self) -> Option<&str> {
        match self {
            Self::Op(error) => error.member(),
            Self::Rows(error) => error.member(),
            Self::Read { file, .. } => Some(file),
            _ => None,
        }
    }
}
