//! `store.json`: what a store says of itself, and the names of qchain's own directory. See `LAYOUT.md`.

use serde::{Deserialize, Serialize};

use crate::backend::Capabilities;
use crate::ids::StorePath;

/// The version of `store.json`'s form.
pub const SCHEMA: u32 = 1;
/// The layout version that this program writes.
pub const FORMAT: u32 = 1;
/// The directory of everything that is qchain's.
pub const OWN_DIRECTORY: &str = ".qchain";
/// The directory of temporaries beside a member, where `.qchain/tmp` is on another file system.
pub const BESIDE_DIRECTORY: &str = ".qchain-tmp";
/// The directories that `init` makes in it.
pub const DIRECTORIES: &[&str] =
    &["manifests", "leaves", "intents", "generations", "trash", "tmp", "locks", "jobs", "rows", "log"];
/// The largest `store.json` that is read, in bytes.
pub const MAX_RECORD_BYTES: u64 = 1 << 20;

/// What a store holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// CloudStack's secondary storage.
    Cloudstack,
    /// Any tree of qcow2 files.
    Plain,
    /// A pool of CloudStack's primary storage. The configuration says so, never `store.json`: it is only read.
    #[serde(skip_deserializing)]
    Primary,
}

impl StoreKind {
    /// The word on the command line and in `store.json`.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Cloudstack => "cloudstack",
            Self::Plain => "plain",
            Self::Primary => "primary",
        }
    }
}

/// One store of a zone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZoneStore {
    /// Its id.
    pub id: String,
    /// What it was called when it was listed.
    pub name: String,
}

/// The content of `store.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreRecord {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Random, made once.
    pub id: String,
    /// [`FORMAT`] of the program that wrote it.
    pub format: u32,
    /// The least format that a program must know to change the store.
    pub least_writer: u32,
    /// What it holds.
    pub kind: StoreKind,
    /// All stores of the zone, this one among them.
    pub zone: Vec<ZoneStore>,
    /// What the store could do when it was opted in last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Capabilities>,
}

impl StoreRecord {
    /// Reads the record; the error says what is wrong with the text.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes).map_err(|error| error.to_string())
    }

    /// The record as it is written.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }
}

/// A path below the own directory; the parts are constants or ids, so a bad one cannot occur and falls back
/// to the directory itself.
#[must_use]
pub fn own(parts: &[&str]) -> StorePath {
    parts.iter().fold(StorePath::parse(OWN_DIRECTORY).unwrap_or_default(), |path, part| {
        path.join(part).unwrap_or(path)
    })
}

#[cfg(test)]
mod tests {
    use super::{StoreKind, StoreRecord, own};

    #[test]
    fn a_record_survives_and_unknown_keys_are_read() {
        let record = StoreRecord {
            schema: 1,
            id: "x".to_owned(),
            format: 1,
            least_writer: 1,
            kind: StoreKind::Cloudstack,
            zone: Vec::new(),
            capabilities: None,
        };
        assert_eq!(StoreRecord::decode(&record.encode()), Ok(record.clone()));
        let newer = String::from_utf8(record.encode()).unwrap().replacen('{', "{\"future\": [1],", 1);
        assert_eq!(StoreRecord::decode(newer.as_bytes()), Ok(record.clone()));
        assert!(StoreRecord::decode(b"{}").is_err());
        let primary = StoreRecord { kind: StoreKind::Primary, ..record };
        assert!(StoreRecord::decode(&primary.encode()).is_err(), "primary storage is never opted in");
    }

    #[test]
    fn own_paths() {
        assert_eq!(own(&["locks", "change"]).as_str(), ".qchain/locks/change");
    }
}
