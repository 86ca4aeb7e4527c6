//! Headers and checkpoint facts that were read before, so that a second look reads only what changed.
//!
//! A value, not a file: whoever has a place for it loads and saves it (`encode`, `decode`). Entries are keyed
//! by [`Stamp`]; what changed within [`RACY_NS`] of being read is not kept, since another change in the same
//! tick of the file system's clock would look the same. Never used by changing verbs.

use std::collections::BTreeMap;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::store::facts::{CheckpointFacts, Reading, Stamp};

/// How old a file's last change must be for it to be kept, in nanoseconds: two seconds, the coarsest clock of
/// any file system qchain is used on.
pub const RACY_NS: i128 = 2_000_000_000;
/// The version of the encoded form.
const SCHEMA: u32 = 2;

/// What is known of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Known {
    /// A member.
    Member(Reading),
    /// A checkpoint file.
    Checkpoint(CheckpointFacts),
}

/// A cache: what was known before, and what the present scan has seen (which is all that is kept).
#[derive(Debug, Default)]
pub struct Cache {
    before: BTreeMap<Stamp, Known>,
    seen: Mutex<BTreeMap<Stamp, Known>>,
}

#[derive(Serialize, Deserialize)]
struct Encoded {
    schema: u32,
    entries: Vec<(Stamp, Known)>,
}

impl Cache {
    /// Reads an encoded cache; anything that is not one is an empty cache.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Self {
        let entries = match serde_json::from_slice::<Encoded>(bytes) {
            Ok(encoded) if encoded.schema == SCHEMA => encoded.entries,
            _ => Vec::new(),
        };
        Self { before: entries.into_iter().collect(), seen: Mutex::default() }
    }

    /// What the scan saw, to be decoded later; `None` if that is what was known before.
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        let seen = self.seen.lock().ok()?;
        if *seen == self.before {
            return None;
        }
        let entries = seen.iter().map(|(stamp, known)| (*stamp, known.clone())).collect();
        serde_json::to_vec(&Encoded { schema: SCHEMA, entries }).ok()
    }

    /// What is known of a file; remembers that it is still there.
    #[must_use]
    pub fn get(&self, stamp: &Stamp) -> Option<Known> {
        let known = self.before.get(stamp)?.clone();
        if let Ok(mut seen) = self.seen.lock() {
            seen.insert(*stamp, known.clone());
        }
        Some(known)
    }

    /// Keeps what was read of a file at `now_ns`, unless it changed a moment before.
    pub fn put(&self, stamp: Stamp, known: Known, now_ns: i128) {
        if stamp.changed_ns + RACY_NS > now_ns {
            return;
        }
        if let Ok(mut seen) = self.seen.lock() {
            seen.insert(stamp, known);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Cache, Known, RACY_NS};
    use crate::store::facts::{Reading, Stamp};

    fn stamp(inode: u64) -> Stamp {
        Stamp { device: 1, inode, length: 3, changed_ns: 1000 }
    }

    #[test]
    fn what_was_seen_is_kept_and_what_is_gone_is_forgotten() {
        let cache = Cache::default();
        cache.put(stamp(1), Known::Member(Reading::NotQcow2), 1000 + RACY_NS);
        cache.put(stamp(2), Known::Member(Reading::NotQcow2), 1000 + RACY_NS);
        cache.put(stamp(3), Known::Member(Reading::NotQcow2), 999 + RACY_NS);
        let next = Cache::decode(&cache.encode().unwrap());
        assert!(next.get(&stamp(1)).is_some());
        assert!(next.get(&stamp(3)).is_none(), "changed too recently to be told apart");
        let last = Cache::decode(&next.encode().unwrap());
        assert!(last.get(&stamp(1)).is_some());
        assert!(last.get(&stamp(2)).is_none(), "nobody asked for it any more");
        let same = Cache::decode(&next.encode().unwrap());
        assert!(same.get(&stamp(1)).is_some());
        assert_eq!(same.encode(), None);
    }

    #[test]
    fn rubbish_is_an_empty_cache() {
        assert!(Cache::decode(b"{\"schema\":9}").get(&stamp(1)).is_none());
    }
}
