//! Errors of the store layer.

use crate::backend::BackendError;
use crate::chain::graph::ChainError;
use crate::failure::{Code, Failure, Kind};
use crate::qcow2::ImageError;
use crate::store::manifest::leaves::LeafError;

/// What the store layer gives.
pub type Result<T> = std::result::Result<T, StoreError>;

/// Something on a store could not be read or understood.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system failed.
    #[error("failed to read the store {store}")]
    Backend {
        /// The store.
        store: String,
        /// The cause.
        #[source]
        source: BackendError,
    },
    /// An image failed.
    #[error("failed to read member {member}")]
    Image {
        /// The member's install path.
        member: String,
        /// The cause.
        #[source]
        source: ImageError,
    },
    /// The members below one cannot be told.
    #[error("failed to follow the chain of {member}")]
    Chain {
        /// The member.
        member: String,
        /// The cause.
        #[source]
        source: ChainError,
    },
    /// The store was never opted in, or is not mounted.
    #[error("{store} has no .qchain/store.json: not initialised, not mounted, or another mount")]
    NotInitialised {
        /// The store.
        store: String,
    },
    /// `store.json` is not for this user.
    #[error("{store}/.qchain/store.json may not be read by this user, who may not change the store")]
    Closed {
        /// The store.
        store: String,
    },
    /// `store.json` asks older programs to keep off.
    #[error("{store} asks for a qchain that writes layout version {needed}; this one writes {known}")]
    Newer {
        /// The store.
        store: String,
        /// Version asked for.
        needed: u32,
        /// Version known.
        known: u32,
    },
    /// The store is primary storage.
    #[error("{store} is primary storage, which is only read; name the other stores alone with --store")]
    Primary {
        /// The store.
        store: String,
    },
    /// The export may only be read.
    #[error("{store} can only be read: the export is read-only, or this user may not write to its root")]
    ReadOnly {
        /// The store.
        store: String,
    },
    /// `store.json` cannot be understood.
    #[error("{store}/.qchain/store.json is damaged: {detail}")]
    BadRecord {
        /// The store.
        store: String,
        /// What is wrong.
        detail: String,
    },
    /// A store of the zone is missing.
    #[error("the zone's store {name} ({id}) is not configured or not present")]
    Absent {
        /// Its name when it was listed.
        name: String,
        /// Its id.
        id: String,
    },
    /// Another process changes the store.
    #[error("another qchain is changing {store}")]
    Busy {
        /// The store.
        store: String,
    },
    /// Nothing has that name.
    #[error("no member is called {name}")]
    NotFound {
        /// The name.
        name: String,
    },
    /// Several members have that name.
    #[error("{name} fits several members: {}", .candidates.join(", "))]
    Ambiguous {
        /// The name.
        name: String,
        /// The members, as they can be written, at most 10.
        candidates: Vec<String>,
    },
    /// A new image does not replace the old chain.
    #[error("{member}: {message}")]
    Proof {
        /// The survivor.
        member: String,
        /// What is wrong.
        message: String,
    },
    /// A member is not what is known of it.
    #[error("{member}: {message}")]
    Damaged {
        /// What is so.
        code: Code,
        /// The member.
        member: String,
        /// In a sentence.
        message: String,
    },
    /// A leaf table failed.
    #[error("failed to use what is known of member {member}")]
    Leaves {
        /// The member.
        member: String,
        /// The cause.
        #[source]
        source: LeafError,
    },
    /// The call does not make sense.
    #[error("{detail}")]
    Usage {
        /// Why.
        detail: String,
    },
}

impl StoreError {
    /// Wraps a backend's error.
    #[must_use]
    pub fn backend(store: &super::Store, source: BackendError) -> Self {
        Self::Backend { store: store.backend().describe(), source }
    }
}

impl Failure for StoreError {
    fn kind(&self) -> Kind {
        match self {
            Self::Backend { source, .. } | Self::Leaves { source: LeafError::Store { source, .. }, .. } => {
                source.kind()
            }
            Self::Image { source, .. } => source.kind(),
            Self::Chain { source, .. } => source.kind(),
            Self::NotInitialised { .. }
            | Self::Newer { .. }
            | Self::Primary { .. }
            | Self::ReadOnly { .. }
            | Self::BadRecord { .. }
            | Self::Absent { .. }
            | Self::Leaves { source: LeafError::Fault { .. }, .. }
            | Self::Damaged { code: Code::Quarantined, .. }
            | Self::Proof { .. } => Kind::Refused,
            Self::Damaged { .. } => Kind::Damage,
            Self::Closed { .. } => Kind::Io,
            Self::Busy { .. } => Kind::Busy,
            Self::NotFound { .. } => Kind::NotFound,
            Self::Ambiguous { .. } | Self::Usage { .. } => Kind::Usage,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Backend { source, .. } | Self::Leaves { source: LeafError::Store { source, .. }, .. } => {
                source.code()
            }
            Self::Image { source, .. } => source.code(),
            Self::Chain { source, .. } => source.code(),
            Self::NotInitialised { .. } | Self::BadRecord { .. } => Code::NotInitialised,
            Self::Closed { .. } => Code::Io,
            Self::Newer { .. } => Code::NewerStore,
            Self::Primary { .. } => Code::PrimaryStorage,
            Self::ReadOnly { .. } => Code::ReadOnly,
            Self::Absent { .. } => Code::StoreAbsent,
            Self::Busy { .. } => Code::StoreBusy,
            Self::Proof { .. } => Code::ProofFailed,
            Self::Damaged { code, .. } => *code,
            Self::Leaves { source: LeafError::Fault { .. }, .. } => Code::LeavesDamaged,
            Self::NotFound { .. } => Code::NotFound,
            Self::Ambiguous { .. } => Code::Ambiguous,
            Self::Usage { .. } => Code::Usage,
        }
    }

    fn member(&self) -> Option<&str> {
        match self {
            Self::Image { member, .. }
            | Self::Chain { member, .. }
            | Self::Leaves { member, .. }
            | Self::Damaged { member, .. }
            | Self::Proof { member, .. } => Some(member),
            Self::NotFound { name } | Self::Ambiguous { name, .. } => Some(name),
            _ => None,
        }
    }
}
