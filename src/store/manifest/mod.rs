//! Manifests: what is known of a member's content, and how it is known. See `LAYOUT.md`.
//!
//! A manifest belongs to one file, by inode, length and time of last change: its name holds the hash of the member's
//! path and the inode. So a merge can write that of its result before it is decided, and it is in force in the very
//! instant in which the new file gets the name; an undo puts the old one in force again with the old file. One
//! whose file is not the one under the name says what *was* there: that is a reason to look, never to trust.
//!
//! - [`Manifest`], its bytes and names: here.
//! - [`leaves`]: leaf tables as files.
//! - [`shelf`]: all manifests of a store, found, written, swept.
//! - [`reads`]: when which blocks were last read.

pub mod leaves;
pub mod reads;
pub mod shelf;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::backend::Stat;
use crate::ids::{Digest, StorePath};
use crate::qcow2::{CompressionType, Header};
use crate::store::record::own;

/// The version of a manifest's form.
pub const SCHEMA: u32 = 1;
/// The largest manifest that is read, in bytes.
pub const MAX_BYTES: u64 = 4 << 20;
/// How many damaged ranges a manifest lists; neighbours are joined beyond.
pub const MAX_DAMAGED: usize = 10_000;

/// Which version of which file a manifest is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMark {
    /// The inode.
    pub inode: u64,
    /// The length in bytes.
    pub length: u64,
    /// The time of last change of its bytes, nanoseconds since 1970.
    pub modified_ns: i128,
}

impl From<&Stat> for FileMark {
    fn from(stat: &Stat) -> Self {
        Self { inode: stat.id.inode, length: stat.length, modified_ns: stat.modified_ns }
    }
}

/// What a member stood on when it was adopted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// The parent's path then, on its store.
    pub member: StorePath,
    /// The parent's id.
    pub id: String,
    /// The parent's view digest.
    pub digest: Digest,
}

/// A member's leaf table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableMark {
    /// Its name in `leaves/`.
    pub name: String,
    /// The BLAKE3 of the whole file.
    pub blake3: Digest,
    /// How many leaves it stores.
    pub leaves: u64,
    /// How many runs it has.
    pub runs: u64,
}

/// Neighbouring blocks of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Blocks {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// What a member's header says, for people and for `relinked`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFacts {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size in bytes.
    pub cluster_bytes: u64,
    /// 16-byte L2 entries.
    pub extended_l2: bool,
    /// Compressed clusters are zstd.
    pub zstd: bool,
    /// The backing name as text; what is no UTF-8 is replaced.
    pub backing: Option<String>,
    /// The backing format.
    pub backing_format: Option<String>,
}

impl From<&Header> for ImageFacts {
    fn from(header: &Header) -> Self {
        let backing = header.backing.as_ref();
        Self {
            version: header.version,
            cluster_bytes: header.cluster_bits.bytes(),
            extended_l2: header.extended_l2,
            zstd: header.compression == CompressionType::Zstd,
            backing: backing.map(|backing| String::from_utf8_lossy(&backing.name).into_owned()),
            backing_format: backing.and_then(|backing| backing.format.clone()),
        }
    }
}

/// Damage that was found, until a look finds none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    /// When it was found, nanoseconds since 1970.
    pub since_ns: i64,
    /// The code of the finding.
    pub code: String,
    /// What was found.
    pub message: String,
    /// The blocks of the member's view that do not read as they did; none if it is its metadata.
    pub blocks: Vec<Blocks>,
}

/// Where a member was copied from. No row of CloudStack's here need name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// The zone or store, as it is called here.
    pub from: String,
    /// The member there.
    pub member: String,
}

/// What is known of a member's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The member's path on this store.
    pub member: StorePath,
    /// Random, made when it was adopted; it stays when a merge gives the member another file.
    pub id: String,
    /// The tree it was in, if that had an id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree: Option<String>,
    /// The file.
    pub file: FileMark,
    /// The size of its view.
    pub virtual_bytes: u64,
    /// Over the whole file; `None` after a merge, until it is read again.
    pub file_blake3: Option<Digest>,
    /// Over its metadata, whatever it calls its parent ([`crate::qcow2::fingerprint`]).
    pub meta_blake3: Digest,
    /// Over its header cluster as it was.
    pub start_blake3: Digest,
    /// What it stood on; `None` for a full base.
    pub parent: Option<Binding>,
    /// Of its view.
    pub view_digest: Digest,
    /// Its leaf table.
    pub leaves: TableMark,
    /// What its header says.
    pub qcow2: ImageFacts,
    /// When this was made, nanoseconds since 1970.
    pub made_ns: i64,
    /// Known damage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quarantine: Option<Quarantine>,
    /// Where it was copied from, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<Replica>,
}

/// The form on disk: the body as text, and its BLAKE3.
#[derive(Serialize, Deserialize)]
struct Envelope<'a> {
    schema: u32,
    blake3: Digest,
    #[serde(borrow)]
    manifest: &'a RawValue,
}

impl Manifest {
    /// As it is written. Fails only if a value cannot be said in JSON, which none can.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let body = serde_json::value::to_raw_value(self).unwrap_or_default();
        let blake3 = Digest(*blake3::hash(body.get().as_bytes()).as_bytes());
        let mut bytes =
            serde_json::to_vec(&Envelope { schema: SCHEMA, blake3, manifest: &body }).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// Reads one. Keys that a newer version added are passed over; the error says what is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let envelope: Envelope<'_> = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if envelope.schema != SCHEMA {
            return Err(format!("its schema is {}, not {SCHEMA}", envelope.schema));
        }
        if *blake3::hash(envelope.manifest.get().as_bytes()).as_bytes() != envelope.blake3.0 {
            return Err("its checksum is wrong".to_owned());
        }
        serde_json::from_str(envelope.manifest.get()).map_err(|error| error.to_string())
    }
}

/// What the names of a member's manifests begin with.
#[must_use]
pub fn stem(member: &StorePath) -> String {
    blake3::hash(member.as_str().as_bytes()).to_hex().get(..32).unwrap_or_default().to_owned()
}

/// Where the manifest of a file lies.
#[must_use]
pub fn path(member: &StorePath, inode: u64) -> StorePath {
    own(&["manifests", &format!("{}.{inode}.json", stem(member))])
}

/// Reads the stem and the inode from a manifest's name.
#[must_use]
pub fn parse_name(name: &str) -> Option<(&str, u64)> {
    let (stem, rest) = name.split_once('.')?;
    Some((stem, rest.strip_suffix(".json")?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::{Binding, FileMark, ImageFacts, Manifest, TableMark, parse_name, path, stem};
    use crate::ids::{Digest, StorePath};

    pub(super) fn manifest(member: &str) -> Manifest {
        let digest = |value| Digest([value; 32]);
        Manifest {
            member: StorePath::parse(member).unwrap(),
            id: "0123".to_owned(),
            tree: None,
            file: FileMark { inode: 7, length: 10, modified_ns: 12 },
            virtual_bytes: 1 << 30,
            file_blake3: Some(digest(1)),
            meta_blake3: digest(2),
            start_blake3: digest(3),
            parent: Some(Binding {
                member: StorePath::parse("a/p").unwrap(),
                id: "4567".to_owned(),
                digest: digest(4),
            }),
            view_digest: digest(5),
            leaves: TableMark { name: "x".to_owned(), blake3: digest(6), leaves: 1, runs: 2 },
            qcow2: ImageFacts {
                version: 3,
                cluster_bytes: 65536,
                extended_l2: false,
                zstd: false,
                backing: Some("p".to_owned()),
                backing_format: None,
            },
            made_ns: 1,
            quarantine: None,
            replica: None,
        }
    }

    #[test]
    fn it_is_read_as_it_was_written() {
        let one = manifest("a/b");
        assert_eq!(Manifest::decode(&one.encode()), Ok(one));
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let bytes = manifest("a/b").encode();
        for bit in 0..(bytes.len() - 1) * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let read = Manifest::decode(&flipped);
            assert!(read.is_err() || read == Ok(manifest("a/b")), "bit {bit}");
        }
        for length in 0..bytes.len() - 1 {
            assert!(Manifest::decode(&bytes[..length]).is_err());
        }
    }

    #[test]
    fn names_say_whose_they_are() {
        let member = StorePath::parse("snapshots/2/7/x").unwrap();
        let path = path(&member, 42);
        assert_eq!(parse_name(path.file_name()), Some((stem(&member).as_str(), 42)));
        // That of a tree, which lies beside.
        assert_eq!(parse_name(&format!("{}.json", stem(&member))), None);
    }
}
