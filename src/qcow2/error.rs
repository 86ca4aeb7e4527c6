//! Errors of one image.

use crate::backend::BackendError;
use crate::failure::{Code, Failure, Kind};

/// What reading or laying out an image gives.
pub type Result<T> = std::result::Result<T, ImageError>;

/// An image that cannot be read, or cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file does not begin with the magic.
    #[error("{image} is no qcow2 image")]
    NotQcow2 {
        /// The image.
        image: String,
    },
    /// The image breaks the format, or a limit of QEMU or of qchain.
    #[error("{image}: {detail}")]
    Bad {
        /// The image.
        image: String,
        /// The reason code: one of `bad-header`, `huge-table`, `bad-entry`, `truncated`, `shared-cluster`,
        /// `overlap`, `bad-compression`, `marked-corrupt`, `outside-name`, `wrong-format`.
        code: Code,
        /// What is wrong, with its offset.
        detail: String,
    },
    /// The image uses something that is refused.
    #[error("{image}: {feature} is not supported")]
    Unsupported {
        /// The image.
        image: String,
        /// The reason code: `encrypted`, `data-file`, `unknown-feature`.
        code: Code,
        /// The feature.
        feature: String,
    },
    /// The work was stopped on request.
    #[error("stopped while working on {image}")]
    Cancelled {
        /// The image.
        image: String,
    },
    /// The store failed.
    #[error("failed to use {image}")]
    Store {
        /// The image.
        image: String,
        /// The cause.
        #[source]
        source: BackendError,
    },
}

impl Failure for ImageError {
    fn kind(&self) -> Kind {
        match self {
            Self::NotQcow2 { .. } | Self::Bad { .. } | Self::Unsupported { .. } => Kind::Corrupt,
            Self::Cancelled { .. } => Kind::Cancelled,
            Self::Store { source, .. } => source.kind(),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotQcow2 { .. } => Code::NotQcow2,
            Self::Bad { code, .. } | Self::Unsupported { code, .. } => *code,
            Self::Cancelled { .. } => Code::Cancelled,
            Self::Store { source, .. } => source.code(),
        }
    }

    fn member(&self) -> Option<&str> {
        match self {
            Self::NotQcow2 { image }
            | Self::Bad { image, .. }
            | Self::Unsupported { image, .. }
            | Self::Cancelled { image }
            | Self::Store { image, .. } => Some(image),
        }
    }
}
