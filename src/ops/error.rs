//! How a verb fails.

use crate::chain::delete::DeleteError;
use crate::change::ChangeError;
use crate::failure::{Code, Failure, Kind, with_causes};
use crate::progress::Cancelled;
use crate::qcow2::ImageError;
use crate::store::StoreError;

/// What a verb gives.
pub type Result<T> = std::result::Result<T, OpError>;

/// A verb that could not be done, or was refused.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// Reading the stores failed, or a name does not fit.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An image failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The members to delete cannot be taken out of their tree.
    #[error(transparent)]
    Delete(#[from] DeleteError),
    /// Changing the stores failed.
    #[error(transparent)]
    Change(Box<ChangeError>),
    /// Understood and not done.
    #[error("{}{message}", lead(member))]
    Refused {
        /// The reason; decides the kind.
        code: Code,
        /// The member, as it can be written; empty if it is about none.
        member: String,
        /// Why, in a sentence.
        message: String,
    },
    /// The store failed after the decision: it is done, by whoever recovers it.
    #[error("{}{message}", lead(member))]
    Decided {
        /// What kind of failure it was.
        kind: Kind,
        /// The member; empty if it is about none.
        member: String,
        /// What failed, and what is to be done.
        message: String,
    },
    /// Too little room.
    #[error("{store} has {free_bytes} bytes free; {needed_bytes} are needed")]
    NoSpace {
        /// The store.
        store: String,
        /// Bytes free.
        free_bytes: u64,
        /// Bytes needed.
        needed_bytes: u64,
    },
    /// Another zone, or what is between, failed or refused.
    #[error("{peer}: {message}")]
    Peer {
        /// The zone or store, as it is called here.
        peer: String,
        /// What kind of failure it is.
        kind: Kind,
        /// The reason: the peer's own, or what it is to blame for.
        code: Code,
        /// What happened.
        message: String,
        /// Whether the same may be asked again.
        again: bool,
    },
    /// Stopped on request.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

impl From<ChangeError> for OpError {
    fn from(error: ChangeError) -> Self {
        Self::Change(Box::new(error))
    }
}

impl OpError {
    /// An error between the decision and the end. The store's own failures pass, and recovery does what is left;
    /// it is not tried again here, as a sync that failed may say nothing the second time. Other reasons stand
    /// against the end as long as they are there.
    pub(super) fn after_decision(error: &dyn Failure) -> Self {
        let member = error.member().unwrap_or_default().to_owned();
        let message = with_causes(error);
        match error.kind() {
            kind @ (Kind::Io | Kind::NoSpace | Kind::Busy | Kind::Cancelled) => {
                let message = format!("it is decided, and qchain recover finishes it: {message}");
                Self::Decided { kind, member, message }
            }
            Kind::Damage | Kind::Usage | Kind::Refused | Kind::NotFound | Kind::Corrupt => {
                let message = format!("it is decided, and goes no further: {message}");
                Self::Refused { code: error.code(), member, message }
            }
        }
    }
}

/// How a message about a member begins.
fn lead(member: &str) -> String {
    if member.is_empty() { String::new() } else { format!("{member}: ") }
}

impl Failure for OpError {
    fn kind(&self) -> Kind {
        match self {
            Self::Store(error) => error.kind(),
            Self::Image(error) => error.kind(),
            Self::Delete(error) => error.kind(),
            Self::Change(error) => error.kind(),
            Self::Refused { code, .. } => refusal_kind(*code),
            Self::Decided { kind, .. } | Self::Peer { kind, .. } => *kind,
            Self::NoSpace { .. } => Kind::NoSpace,
            Self::Cancelled(_) => Kind::Cancelled,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Store(error) => error.code(),
            Self::Image(error) => error.code(),
            Self::Delete(error) => error.code(),
            Self::Change(error) => error.code(),
            Self::Refused { code, .. } | Self::Peer { code, .. } => *code,
            Self::Decided { .. } => Code::Decided,
            Self::NoSpace { .. } => Code::NoSpace,
            Self::Cancelled(_) => Code::Cancelled,
        }
    }

    fn member(&self) -> Option<&str> {
        match self {
            Self::Store(error) => error.member(),
            Self::Image(error) => error.member(),
            Self::Delete(error) => error.member(),
            Self::Change(error) => error.member(),
            Self::Refused { member, .. } | Self::Decided { member, .. } => {
                Some(member.as_str()).filter(|member| !member.is_empty())
            }
            Self::NoSpace { .. } | Self::Peer { .. } | Self::Cancelled(_) => None,
        }
    }
}

/// The kind of a refusal: what is in use is busy, what is broken is corrupt, all else is refused.
fn refusal_kind(code: Code) -> Kind {
    match code {
        Code::Incoming | Code::Locked | Code::StoreBusy => Kind::Busy,
        Code::NotFound => Kind::NotFound,
        Code::Usage | Code::Ambiguous => Kind::Usage,
        Code::Truncated
        | Code::NotQcow2
        | Code::BadHeader
        | Code::BadEntry
        | Code::HugeTable
        | Code::Encrypted
        | Code::DataFile
        | Code::UnknownFeature
        | Code::MarkedCorrupt
        | Code::SharedCluster
        | Code::Overlap
        | Code::BadCompression
        | Code::WrongFormat
        | Code::MissingParent
        | Code::Cycle
        | Code::OutsideName
        | Code::AmbiguousParent => Kind::Corrupt,
        Code::DataDamaged | Code::MetadataDamaged | Code::ChangedSinceAdoption | Code::ParentChanged => {
            Kind::Damage
        }
        Code::NoSpace => Kind::NoSpace,
        Code::Io | Code::Unreachable => Kind::Io,
        Code::Cancelled => Kind::Cancelled,
        _ => Kind::Refused,
    }
}
