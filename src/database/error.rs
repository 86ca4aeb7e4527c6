//! Why CloudStack's database could not be used.

use std::io;
use std::time::Duration;

use crate::cloudstack::records::RecordsError;
use crate::failure::{Code, Failure, Kind};

/// A result of this layer.
pub type Result<T> = std::result::Result<T, DatabaseError>;

/// Why CloudStack's database could not be used. No text has a password.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// The URL says nothing that can be connected to.
    #[error("the URL of the database cannot be used: {detail}")]
    Url {
        /// What is wrong.
        detail: String,
    },
    /// No runtime for the connection could be started.
    #[error("failed to start what talks to the database")]
    Runtime {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The server could not be reached, or refused.
    #[error("failed to {action} CloudStack's database")]
    Server {
        /// What was done.
        action: &'static str,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
    /// The server took too long.
    #[error("failed to {action} CloudStack's database: no answer within {} s", .patience.as_secs())]
    Slow {
        /// What was done.
        action: &'static str,
        /// How long it was waited for.
        patience: Duration,
    },
    /// Its rows are not CloudStack's.
    #[error("the rows of the database are not CloudStack's")]
    Records {
        /// What is wrong with them; lines count rows.
        #[source]
        source: RecordsError,
    },
}

impl Failure for DatabaseError {
    fn kind(&self) -> Kind {
        match self {
            Self::Url { .. } => Kind::Usage,
            Self::Records { .. } => Kind::Refused,
            Self::Runtime { .. } | Self::Server { .. } | Self::Slow { .. } => Kind::Io,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Url { .. } => Code::BadUrl,
            Self::Records { .. } => Code::BadRecords,
            Self::Runtime { .. } | Self::Server { .. } | Self::Slow { .. } => Code::Database,
        }
    }
}
