//! Why the service does not start, or ends.

use std::io;

use crate::failure::{Code, Failure, Kind};

/// The service could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The address cannot be listened on.
    #[error("failed to listen on {address}")]
    Listen {
        /// The address.
        address: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file that the configuration names cannot be used.
    #[error("failed to use {file}: {detail}")]
    File {
        /// The file.
        file: String,
        /// Why.
        detail: String,
    },
    /// The system gives no threads or signals.
    #[error("failed to start")]
    Start {
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl Failure for ServiceError {
    fn kind(&self) -> Kind {
        match self {
            Self::File { .. } => Kind::Usage,
            Self::Listen { .. } | Self::Start { .. } => Kind::Io,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::File { .. } => Code::Usage,
            Self::Listen { .. } | Self::Start { .. } => Code::Io,
        }
    }
}
