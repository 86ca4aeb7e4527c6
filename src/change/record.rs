//! The durable records of a change: intents, claims, freezes. See `PROTOCOL.md`.
//!
//! All are JSON with a `schema`, read with a bound on their size; one that does not parse is told from one
//! that is not there, as a power cut can leave a name without its bytes.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::backend::Stat;
use crate::ids::StorePath;
use crate::qcow2::layout::Switch;

/// The version of the records' form.
pub const SCHEMA: u32 = 1;
/// The largest record that is read, in bytes: some hundred bytes a member, and chains have thousands.
pub const MAX_BYTES: u64 = 64 << 20;

/// A tree's id: random, never derived from a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TreeId(String);

/// An operation's id: random; all of its temporaries and everything it keeps in trash begin with it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct OperationId(String);

macro_rules! random_id {
    ($name:ident) => {
        impl $name {
            /// A new one.
            #[must_use]
            pub fn random() -> Self {
                Self::of(uuid::Uuid::new_v4().as_u128())
            }

            /// The one made of a random number.
            #[must_use]
            pub fn of(number: u128) -> Self {
                Self(format!("{number:032x}"))
            }

            /// Reads one: 32 lower-case hex digits.
            #[must_use]
            pub fn parse(text: &str) -> Option<Self> {
                let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
                (text.len() == 32 && text.bytes().all(digit)).then(|| Self(text.to_owned()))
            }

            /// Its text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                Self::parse(&text).ok_or_else(|| format!("{text:?} is no id"))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

random_id!(TreeId);
random_id!(OperationId);

/// Which version of which file: the inode as long as the file lives, and what any write to it changes. Renames
/// and links leave it as it is; the device is left out, as its number is another after the next mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The inode number.
    pub inode: u64,
    /// The length in bytes.
    pub length: u64,
    /// Last change of its bytes, nanoseconds since 1970.
    pub modified_ns: i64,
}

impl From<&Stat> for Mark {
    fn from(stat: &Stat) -> Self {
        let modified_ns = i64::try_from(stat.modified_ns).unwrap_or_default();
        Self { inode: stat.id.inode, length: stat.length, modified_ns }
    }
}

impl Mark {
    /// Whether a file is this version.
    #[must_use]
    pub fn is(&self, stat: &Stat) -> bool {
        *self == Self::from(stat)
    }
}

/// A name on one of the zone's stores.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The id in the store's `store.json`.
    pub store: String,
    /// The name.
    pub path: StorePath,
}

/// Says that a change is being made. Only a hint: what decides is the claim of its number. Its file's name
/// says all that recovery needs, so its content may be lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The tree.
    pub tree: TreeId,
    /// The number it will claim.
    pub generation: u64,
    /// Which operation.
    pub operation: OperationId,
    /// Who makes it.
    pub owner: String,
    /// When it began, nanoseconds since 1970.
    pub begun_ns: i64,
    /// What was asked away.
    pub members: Vec<Place>,
}

/// What a number was claimed for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The tree.
    pub tree: TreeId,
    /// The number.
    pub generation: u64,
    /// The operation that the number was for.
    pub operation: OperationId,
    /// Random: tells the claimant from anybody who took the same number.
    pub nonce: String,
    /// When it was decided, nanoseconds since 1970.
    pub decided_ns: i64,
    /// The tree's root when it began, and members that become roots. By them the tree is found again if a power
    /// cut took their manifests, which are not made durable.
    #[serde(default)]
    pub roots: Vec<Place>,
    /// What was decided.
    pub decision: Decision,
}

/// Done or not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// What follows is done, by whoever finds it.
    Commit(Commit),
    /// Nothing of it is done; the number is used up.
    Abort,
}

/// Why names change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// Members are deleted.
    Delete,
    /// An earlier operation of the tree is taken back.
    Undo {
        /// Which.
        operation: OperationId,
        /// Its number.
        generation: u64,
    },
}

/// All that is needed to carry a decision out, as often as need be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Why.
    pub purpose: Purpose,
    /// How long deleted members keep their names after the publication, in nanoseconds.
    pub grace_ns: i64,
    /// How long old files are kept after that, in nanoseconds.
    pub retention_ns: i64,
    /// Names that come back, in order.
    pub restores: Vec<Restore>,
    /// Names that get new files.
    pub publications: Vec<Publication>,
    /// Checkpoint files that follow, after the publications.
    pub checkpoints: Vec<CheckpointEdit>,
    /// Names that go, in order.
    pub departures: Vec<Departure>,
    /// The old files were damaged, and the new ones are not: they differ on purpose.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub repairs: bool,
}

impl Commit {
    /// Whether it takes back the operation of that number.
    #[must_use]
    pub fn undoes(&self, number: u64) -> bool {
        matches!(self.purpose, Purpose::Undo { generation, .. } if generation == number)
    }
}

/// A name that comes back from trash. It is never taken from another file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// The name.
    pub at: Place,
    /// Where the file is kept, on the same store.
    pub kept: StorePath,
    /// The file.
    pub mark: Mark,
}

/// A name that stands for a new file from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// The name.
    pub at: Place,
    /// Where the new file is, on the same store. Publishing uses this name up.
    pub from: StorePath,
    /// The new file. Of one changed in place only the inode is known.
    pub new: Mark,
    /// The file that had the name when the decision was made.
    pub old: Mark,
    /// Where the old file is kept.
    pub kept: StorePath,
    /// If the new file is a deleted member, changed in place: how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_place: Option<InPlace>,
}

impl Publication {
    /// Whether a file is the new one.
    #[must_use]
    pub fn is_new(&self, stat: &Stat) -> bool {
        match self.in_place {
            Some(_) => self.new.inode == stat.id.inode,
            None => self.new.is(stat),
        }
    }
}

/// The redo plan of a merge in place: it is a pure function of the tables of the files named, which are not
/// changed before its last write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InPlace {
    /// The members that become one, lowest first: the first is written into, the last is the survivor.
    pub members: Vec<Place>,
    /// The lowest one's length before, in bytes.
    pub length: u64,
    /// Where in it the new bytes begin.
    pub base: u64,
    /// The alignment in bytes that clones need; 0: data is copied.
    pub clone_alignment: u64,
    /// What the survivor's parent will be; `None`: nothing below.
    pub new_parent: Option<Place>,
    /// The last write, which makes the file the survivor's. A half-made one cannot be told from the tables.
    pub switch: Switch,
}

/// A checkpoint file that is to name another parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointEdit {
    /// The file.
    pub at: Place,
    /// The publication that it follows, by its index; it is left alone if that was taken back.
    pub after: Option<usize>,
    /// The parent that it is to name.
    pub parent: Option<String>,
    /// The parent that it names before.
    pub before: Option<String>,
    /// Where the old file is kept.
    pub kept: StorePath,
    /// A file that has the wanted bytes, if the present ones are what an earlier edit made of it.
    pub original: Option<StorePath>,
}

/// A name that goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departure {
    /// The member.
    pub at: Place,
    /// Its file. Of one changed in place only the inode is known.
    pub mark: Mark,
    /// Where it is kept.
    pub kept: StorePath,
    /// The publications that must be done before, by index.
    pub after: Vec<usize>,
    /// Its checkpoint file, if it has one.
    pub checkpoint: Option<KeptFile>,
    /// Its file lives on as the survivor of this publication: only the name goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub becomes: Option<usize>,
    /// The bytes that its file takes.
    pub allocated_bytes: u64,
    /// What takes its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stub: Option<Stub>,
}

impl Departure {
    /// Whether a file is the one to go.
    #[must_use]
    pub fn is(&self, stat: &Stat) -> bool {
        match self.becomes {
            Some(_) => self.mark.inode == stat.id.inode,
            None => self.mark.is(stat),
        }
    }

    /// Whether a file is the stub that took the name.
    #[must_use]
    pub fn is_stub(&self, stat: &Stat) -> bool {
        self.stub.as_ref().is_some_and(|stub| stub.is(stat))
    }
}

/// An empty image that takes a deleted member's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stub {
    /// Where it is until then, on the same store.
    pub from: StorePath,
    /// The file. Others may write its header later, so only the inode tells it.
    pub mark: Mark,
}

impl Stub {
    /// Whether a file is the stub.
    #[must_use]
    pub fn is(&self, stat: &Stat) -> bool {
        self.mark.inode == stat.id.inode
    }
}

/// A file that goes, and where it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptFile {
    /// Its name.
    pub path: StorePath,
    /// The file.
    pub mark: Mark,
    /// Where it is kept.
    pub kept: StorePath,
}

/// A tree that nothing is done to until somebody has looked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freeze {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The operation that was found to be wrong.
    pub operation: OperationId,
    /// When, nanoseconds since 1970.
    pub time_ns: i64,
    /// Why.
    pub reason: String,
}

/// A record's bytes.
pub fn encode(record: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(record).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::{Claim, Decision, OperationId, SCHEMA, TreeId, encode};

    #[test]
    fn ids_are_random_and_of_one_form() {
        assert_ne!(TreeId::random(), TreeId::random());
        for bad in ["", "..", "0123456789abcdef0123456789abcdeF", "0123456789abcdef0123456789abcde/"] {
            assert!(OperationId::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_record_with_a_bad_name_is_no_record() {
        let claim = Claim {
            schema: SCHEMA,
            tree: TreeId::random(),
            generation: 7,
            operation: OperationId::random(),
            nonce: "n".to_owned(),
            decided_ns: 5,
            roots: Vec::new(),
            decision: Decision::Abort,
        };
        let bytes = encode(&claim);
        assert_eq!(serde_json::from_slice::<Claim>(&bytes).unwrap(), claim);
        let text = String::from_utf8(bytes).unwrap().replace(claim.tree.as_str(), "../../etc");
        assert!(serde_json::from_str::<Claim>(&text).is_err());
    }
}
