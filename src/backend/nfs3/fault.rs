//! What can be wrong with a call, before it is known which name it was for.

use std::io;

use nfs3_client::RpcError;
use nfs3_client::nfs3_types::nfs3::nfsstat3;

use crate::backend::BackendError;

pub(super) type Result<T> = std::result::Result<T, Fault>;

/// Why a call gave nothing.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// The server says so.
    Status(nfsstat3),
    /// A symbolic link or special file is where something plain was wanted.
    NotPlain,
    /// The server does not take our word for who we are.
    Denied(String),
    /// No answer in time, however often it was asked.
    Silent {
        /// The store.
        store: String,
        /// What happened last, and how long that went on.
        detail: String,
    },
    /// The server or the protocol has no such thing; nothing was changed.
    Lacking(String),
    /// An answer that makes no sense.
    Garbled(String),
}

/// What the system would call it.
fn kind_of(status: nfsstat3) -> io::ErrorKind {
    match status {
        nfsstat3::NFS3ERR_NOTEMPTY => io::ErrorKind::DirectoryNotEmpty,
        nfsstat3::NFS3ERR_XDEV => io::ErrorKind::CrossesDevices,
        nfsstat3::NFS3ERR_FBIG => io::ErrorKind::FileTooLarge,
        nfsstat3::NFS3ERR_MLINK => io::ErrorKind::TooManyLinks,
        nfsstat3::NFS3ERR_INVAL => io::ErrorKind::InvalidInput,
        nfsstat3::NFS3ERR_NAMETOOLONG => io::ErrorKind::InvalidFilename,
        _ => io::ErrorKind::Other,
    }
}

impl Fault {
    /// Whether a handle is none any more: what it stood for is gone, or the server lost it.
    pub(super) fn is_stale(&self) -> bool {
        matches!(self, Self::Status(nfsstat3::NFS3ERR_STALE | nfsstat3::NFS3ERR_BADHANDLE))
    }

    /// The error of a call for `path`.
    #[expect(clippy::needless_pass_by_value, reason = "paths, references and formatted texts alike")]
    pub(super) fn at(self, action: &'static str, path: impl ToString) -> BackendError {
        let path = path.to_string();
        let io = |kind, text: String| io::Error::new(kind, text);
        let source = match self {
            Self::NotPlain | Self::Status(nfsstat3::NFS3ERR_ISDIR) => return BackendError::NotPlain { path },
            // A file stands where a directory was wanted.
            Self::Status(nfsstat3::NFS3ERR_NOENT | nfsstat3::NFS3ERR_NOTDIR) => {
                return BackendError::NotFound { path };
            }
            Self::Status(nfsstat3::NFS3ERR_EXIST) => return BackendError::AlreadyExists { path },
            Self::Status(nfsstat3::NFS3ERR_ROFS) => return BackendError::ReadOnly { action, path },
            Self::Status(status @ (nfsstat3::NFS3ERR_NOSPC | nfsstat3::NFS3ERR_DQUOT)) => {
                let source = io(io::ErrorKind::StorageFull, format!("the server answered {status}"));
                return BackendError::NoSpace { path, source };
            }
            Self::Lacking(text) => {
                let source = io(io::ErrorKind::Unsupported, text);
                return BackendError::Unsupported { action, path, source };
            }
            Self::Silent { store, detail } => return BackendError::Unreachable { store, detail },
            Self::Status(status @ (nfsstat3::NFS3ERR_ACCES | nfsstat3::NFS3ERR_PERM)) => {
                io(io::ErrorKind::PermissionDenied, format!("the server refuses it to this user ({status})"))
            }
            Self::Status(status @ (nfsstat3::NFS3ERR_STALE | nfsstat3::NFS3ERR_BADHANDLE)) => {
                let text = format!("it was removed or replaced on the server while it was open ({status})");
                io(io::ErrorKind::StaleNetworkFileHandle, text)
            }
            Self::Status(status) => io(kind_of(status), format!("the server answered {status}")),
            Self::Denied(text) => io(io::ErrorKind::PermissionDenied, text),
            Self::Garbled(text) => io(io::ErrorKind::InvalidData, text),
        };
        BackendError::Io { action, path, source }
    }
}

/// A failed call whose connection is of no use any more, or that no other connection would help.
pub(super) enum Broken {
    /// Worth another try.
    Lost(io::Error),
    /// For good.
    Final(Fault),
}

impl From<RpcError> for Broken {
    fn from(error: RpcError) -> Self {
        match error {
            RpcError::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
                Self::Final(Fault::Garbled(format!("the server cannot be understood: {error}")))
            }
            RpcError::Io(error) => Self::Lost(error),
            RpcError::Auth(status) => Self::Final(Fault::Denied(format!(
                "the server does not accept this user's credentials, AUTH_UNIX from this host and port ({status})"
            ))),
            error => Self::Final(Fault::Garbled(format!("the server cannot be understood: {error}"))),
        }
    }
}
