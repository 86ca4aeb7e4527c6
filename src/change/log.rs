//! The log of a store: a line for each operation that was carried out, each with the digest of the one before, so that
//! none can be changed or taken out unseen.
//!
//! A line is a file, `log/<number>`, taken by an exclusive create like everything that several instances share. It is
//! written after what it tells of, and not made durable: a power cut may take the last ones, and an operation that
//! recovery finished has none. What the log is for is to say what was done to a snapshot years ago, and that nobody
//! rewrote that; what is true of a store now is in its claims.

use serde::{Deserialize, Serialize};

use crate::backend::publish::offer;
use crate::backend::{Backend, BackendError};
use crate::change::error::{ChangeError, Result};
use crate::change::journal::Journal;
use crate::change::places::{make, number, temporary};
use crate::change::record::{OperationId, encode};
use crate::ids::{Digest, StorePath};
use crate::store::facts::read_whole;
use crate::store::record::own;

/// The version of a line's form.
const SCHEMA: u32 = 1;
/// The longest line that is read, in bytes.
const MAX_BYTES: u64 = 16 << 20;
/// How often a number is tried for that others take.
const TRIES: usize = 1000;

/// One survivor written, or one member removed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Did {
    /// The members that were merged or removed, lowest first.
    pub members: Vec<String>,
    /// The survivor.
    pub into: Option<String>,
    /// How data moved.
    pub mode: Option<String>,
    /// The survivor's view digest before, and after: equal, or unknown.
    pub digest_before: Option<Digest>,
    /// After.
    pub digest_after: Option<Digest>,
    /// Bytes of data and tables written.
    pub bytes_written: u64,
    /// Bytes shared by cloning.
    pub bytes_cloned: u64,
    /// Bytes for which the claims *plan*, *digest* and *data* were proved.
    pub proved_bytes: [u64; 3],
    /// How long it took, in nanoseconds.
    pub duration_ns: u64,
    /// Why it did not end well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// 1.
    pub schema: u32,
    /// Its number, from 1.
    pub number: u64,
    /// The BLAKE3 of the bytes of the line before; `None` for the first.
    pub previous: Option<Digest>,
    /// When it was written, nanoseconds since 1970.
    pub time_ns: i64,
    /// The operation.
    pub operation: OperationId,
    /// What was asked for.
    pub verb: String,
    /// What was done.
    pub did: Vec<Did>,
}

/// A line as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its number, as its name says.
    pub number: u64,
    /// It; or what is wrong with it.
    pub line: std::result::Result<Line, String>,
}

fn directory() -> StorePath {
    own(&["log"])
}

fn path(line: u64) -> StorePath {
    own(&["log", &format!("{line:010}")])
}

fn failed(path: &StorePath) -> impl Fn(BackendError) -> ChangeError + '_ {
    move |source| ChangeError::Store { action: "write to the log", member: path.to_string(), source }
}

/// The numbers that are taken, ascending.
fn numbers(journal: &Journal) -> Result<Vec<u64>> {
    let mut numbers: Vec<u64> = journal.names(&directory())?.iter().filter_map(|name| number(name)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Where a log ends, as this process left it: so that the next line needs no listing.
pub type Tail = Option<(u64, Digest)>;

/// Appends a line to a store's log. `tail` is what the last call left there.
pub fn append(
    backend: &std::sync::Arc<dyn Backend>,
    tail: &mut Tail,
    time_ns: i64,
    operation: &OperationId,
    verb: &str,
    did: Vec<Did>,
) -> Result<()> {
    let (operation, verb) = (operation.clone(), verb.to_owned());
    let mut line = Line { schema: SCHEMA, number: 0, previous: None, time_ns, operation, verb, did };
    for _ in 0..TRIES {
        if tail.is_none() {
            *tail = look(backend)?;
        }
        line.number = tail.map_or(0, |(last, _)| last) + 1;
        line.previous = tail.map(|(_, digest)| digest);
        let target = path(line.number);
        let own = temporary(&line.operation, "log");
        let bytes = encode(&line);
        match offer(backend.as_ref(), &own, &target, &bytes) {
            Err(BackendError::AlreadyExists { .. }) => *tail = None,
            Err(error) => {
                *tail = None;
                return Err(failed(&target)(error));
            }
            Ok(()) => {
                *tail = Some((line.number, Digest(*blake3::hash(&bytes).as_bytes())));
                return Ok(());
            }
        }
    }
    Err(ChangeError::Busy { owner: "others, who write to the log".to_owned() })
}

/// Where a log ends.
fn look(backend: &std::sync::Arc<dyn Backend>) -> Result<Tail> {
    let directory = directory();
    make(backend.as_ref(), &directory).map_err(failed(&directory))?;
    let Some(last) = numbers(&Journal::new(backend))?.last().copied() else { return Ok(None) };
    let bytes = read_whole(backend, &path(last), MAX_BYTES).map_err(failed(&path(last)))?;
    Ok(Some((last, Digest(*blake3::hash(&bytes).as_bytes()))))
}

/// Reads a store's log, oldest first, and tells of each line whether it follows the one before.
pub fn read(backend: &std::sync::Arc<dyn Backend>) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    let mut before: Option<(u64, Digest)> = None;
    for number in numbers(&Journal::new(backend))? {
        let bytes = read_whole(backend, &path(number), MAX_BYTES).map_err(failed(&path(number)))?;
        let line = judge(&bytes, number, before);
        before = Some((number, Digest(*blake3::hash(&bytes).as_bytes())));
        found.push(Found { number, line });
    }
    Ok(found)
}

fn judge(bytes: &[u8], number: u64, before: Option<(u64, Digest)>) -> std::result::Result<Line, String> {
    let line: Line = serde_json::from_slice(bytes).map_err(|error| format!("it cannot be read: {error}"))?;
    if line.number != number {
        return Err(format!("it says that it is number {}", line.number));
    }
    match before {
        None if line.previous.is_none() => Ok(line),
        None => Err("what came before it is gone".to_owned()),
        Some((last, _)) if last + 1 != number => {
            Err(format!("lines {} to {} are gone", last + 1, number - 1))
        }
        Some((_, digest)) if line.previous == Some(digest) => Ok(line),
        Some(_) => Err("it does not follow the line before, or that was changed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{append, path, read};
    use crate::backend::Backend;
    use crate::backend::memory::MemoryStore;
    use crate::change::record::OperationId;
    use crate::store::record::own;

    #[test]
    fn a_line_that_is_changed_or_gone_is_seen() {
        let store: Arc<dyn Backend> = Arc::new(MemoryStore::new());
        for directory in [own(&[]), own(&["tmp"])] {
            store.create_dir(&directory, true).unwrap();
        }
        let mut tail = None;
        for time in 0..4 {
            if time == 2 {
                // Another process.
                tail = None;
            }
            append(&store, &mut tail, time, &OperationId::random(), "delete", Vec::new()).unwrap();
        }
        let wrong = || -> Vec<u64> {
            read(&store)
                .unwrap()
                .into_iter()
                .filter(|found| found.line.is_err())
                .map(|found| found.number)
                .collect()
        };
        assert_eq!(read(&store).unwrap().len(), 4);
        assert!(wrong().is_empty());
        let file = store.open_writable(&path(2)).unwrap();
        let mut byte = [0];
        let at = file.stat().unwrap().length - 40;
        file.read_at(at, &mut byte).unwrap();
        file.write_at(at, &[byte[0] ^ 1]).unwrap();
        assert!(wrong().contains(&3), "{:?}", read(&store));
        file.write_at(at, &byte).unwrap();
        assert!(wrong().is_empty());
        store.remove_file(&path(3)).unwrap();
        assert_eq!(wrong(), [4]);
        store.remove_file(&path(1)).unwrap();
        assert_eq!(wrong(), [2, 4]);
    }
}
