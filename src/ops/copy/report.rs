//! What came.

use serde::Serialize;

use crate::ids::Digest;

/// What became of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It was here with an equal view.
    Present,
    /// It came.
    Copied,
    /// It would come.
    Planned,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Copied {
    /// Its name here.
    pub member: String,
    /// Its name there.
    pub source: String,
    /// What it stands on here.
    pub parent: Option<String>,
    /// What became of it.
    pub outcome: Outcome,
    /// The digest of its view.
    pub digest: Digest,
    /// The size of its view in bytes.
    pub virtual_bytes: u64,
    /// The length of its file here.
    pub file_bytes: u64,
    /// Whether its checkpoint file came, or was here.
    pub checkpoint: bool,
    /// Blocks of 64 KiB that were asked for, or would be.
    pub blocks_sent: u64,
    /// Blocks that it needs and that were here already, in its chain or from an earlier try.
    pub blocks_present: u64,
    /// Bytes that came for it, of whatever kind. Of one that is only planned: at most, without what compression saves.
    pub bytes_on_wire: u64,
}

/// What was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct CopyReport {
    /// The zone or store that the members came from.
    pub from: String,
    /// The members, each behind those that it stands on.
    pub copied: Vec<Copied>,
    /// All bytes that came.
    pub bytes_on_wire: u64,
    /// How long it took.
    pub elapsed_milliseconds: u64,
}
