//! What a scan reads of one member: its header and its checkpoint file, as small values that can be kept.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, BackendError, FileId, ImageLocks, Stat, StoreFile, read_padded};
use crate::cloudstack::checkpoint::{Checkpoint, MAX_BYTES};
use crate::failure::{Code, Failure};
use crate::ids::StorePath;
use crate::qcow2::{CompressionType, Header, Image, ImageError};

/// A version of a file, as well as it can be told without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Stamp {
    /// The device.
    pub device: u64,
    /// The inode.
    pub inode: u64,
    /// The length in bytes.
    pub length: u64,
    /// The time of last change of bytes or attributes, nanoseconds since 1970.
    pub changed_ns: i128,
}

impl From<&Stat> for Stamp {
    fn from(stat: &Stat) -> Self {
        let FileId { device, inode } = stat.id;
        Self { device, inode, length: stat.length, changed_ns: stat.changed_ns }
    }
}

/// What a header says, as far as chains are concerned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderFacts {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size in bytes.
    pub cluster_bytes: u64,
    /// Virtual size in bytes.
    pub virtual_bytes: u64,
    /// The backing name's bytes.
    pub backing: Option<Vec<u8>>,
    /// The backing format.
    pub backing_format: Option<String>,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Number of persistent bitmaps.
    pub bitmaps: u32,
    /// The dirty bit.
    pub dirty: bool,
    /// 16-byte L2 entries.
    pub extended_l2: bool,
    /// Compressed clusters are zstd.
    pub zstd: bool,
    /// The store on which it was made as a stand-in for a deleted member.
    pub stub: Option<String>,
}

impl From<&Header> for HeaderFacts {
    fn from(header: &Header) -> Self {
        Self {
            version: header.version,
            cluster_bytes: header.cluster_bits.bytes(),
            virtual_bytes: header.virtual_size,
            backing: header.backing.as_ref().map(|backing| backing.name.clone()),
            backing_format: header.backing.as_ref().and_then(|backing| backing.format.clone()),
            snapshots: header.snapshot_count,
            bitmaps: header.bitmaps.map_or(0, |bitmaps| bitmaps.count),
            dirty: header.dirty,
            extended_l2: header.extended_l2,
            zstd: header.compression == CompressionType::Zstd,
            stub: header.stub.clone(),
        }
    }
}

/// What reading the beginning of a file gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reading {
    /// A qcow2 image.
    Image(HeaderFacts),
    /// No qcow2 image.
    NotQcow2,
    /// A qcow2 image that cannot be used.
    Bad {
        /// The reason code's text.
        code: String,
        /// What is wrong.
        message: String,
    },
}

impl Reading {
    /// The header, if it could be read.
    #[must_use]
    pub fn header(&self) -> Option<&HeaderFacts> {
        match self {
            Self::Image(facts) => Some(facts),
            Self::NotQcow2 | Self::Bad { .. } => None,
        }
    }

    /// The reason code and message of a file that is no usable image.
    #[must_use]
    pub fn fault(&self) -> Option<(Code, String)> {
        match self {
            Self::Image(_) => None,
            Self::NotQcow2 => Some((Code::NotQcow2, "it does not begin as a qcow2 image".to_owned())),
            Self::Bad { code, message } => {
                Some((Code::parse(code).unwrap_or(Code::BadHeader), message.clone()))
            }
        }
    }
}

/// What is known of a member's checkpoint file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CheckpointFacts {
    /// There is none.
    None,
    /// It names that parent, or none.
    Parent(Option<String>),
    /// It cannot be read as libvirt's XML.
    Unreadable(String),
}

/// What opening a file for its header told.
#[derive(Debug)]
pub struct Opened {
    /// The header.
    pub reading: Reading,
    /// QEMU's locks on it.
    pub locks: ImageLocks,
}

/// Opens a member and reads its header. Only a failing store is an error.
pub fn read_member(backend: &Arc<dyn Backend>, path: &StorePath) -> Result<Opened, BackendError> {
    let file = backend.open(path)?;
    let locks = file.image_locks()?;
    let reading = read_header(&file, path.as_str())?;
    Ok(Opened { reading, locks })
}

fn read_header(file: &Arc<dyn StoreFile>, name: &str) -> Result<Reading, BackendError> {
    match Image::open(file.clone(), name) {
        Ok(image) => Ok(Reading::Image(image.header().into())),
        Err(ImageError::NotQcow2 { .. }) => Ok(Reading::NotQcow2),
        Err(ImageError::Store { source, .. }) => Err(source),
        Err(error) => {
            let code = error.code().as_str().to_owned();
            // Whoever shows it names the member.
            let message = match error {
                ImageError::Bad { detail, .. } => detail,
                ImageError::Unsupported { feature, .. } => format!("{feature} is not supported"),
                other => other.to_string(),
            };
            Ok(Reading::Bad { code, message })
        }
    }
}

/// Reads a checkpoint file. Only a failing store is an error.
pub fn read_checkpoint(
    backend: &Arc<dyn Backend>,
    path: &StorePath,
) -> Result<CheckpointFacts, BackendError> {
    match read_whole(backend, path, MAX_BYTES as u64) {
        Ok(bytes) => Ok(match Checkpoint::parse(&bytes) {
            Ok(checkpoint) => CheckpointFacts::Parent(checkpoint.parent),
            Err(error) => CheckpointFacts::Unreadable(error.to_string()),
        }),
        Err(BackendError::NotFound { .. }) => Ok(CheckpointFacts::None),
        Err(BackendError::NotPlain { .. }) => Ok(CheckpointFacts::Unreadable("no regular file".to_owned())),
        Err(error) => Err(error),
    }
}

/// Reads a small file whole; what is beyond `limit` bytes is one byte that makes any parser refuse it as too
/// long.
pub fn read_whole(backend: &Arc<dyn Backend>, path: &StorePath, limit: u64) -> Result<Vec<u8>, BackendError> {
    let file = backend.open(path)?;
    let length = file.stat()?.length.min(limit + 1);
    let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
    read_padded(file.as_ref(), 0, &mut bytes)?;
    Ok(bytes)
}
