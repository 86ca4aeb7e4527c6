//! Where the records of a change lie, as names. See `PROTOCOL.md`.

use crate::backend::{Backend, BackendError};
use crate::ids::StorePath;
use crate::store::record::own;

use super::record::{OperationId, TreeId};

/// Digits of a generation in names, so that they sort.
const DIGITS: usize = 10;

/// What an intent's name says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct IntentName {
    /// The tree.
    pub tree: TreeId,
    /// The number it is for.
    pub generation: u64,
    /// The operation.
    pub operation: OperationId,
}

impl IntentName {
    /// Where it lies.
    #[must_use]
    pub fn path(&self) -> StorePath {
        let Self { tree, generation, operation } = self;
        own(&["intents", &format!("{tree}.{generation:0DIGITS$}.{operation}")])
    }

    /// Reads the name of a file in `intents/`.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.split('.');
        let tree = TreeId::parse(parts.next()?)?;
        let generation = number(parts.next()?)?;
        let operation = OperationId::parse(parts.next()?)?;
        parts.next().is_none().then_some(Self { tree, generation, operation })
    }
}

/// The directory of a tree's claims.
#[must_use]
pub fn generations(tree: &TreeId) -> StorePath {
    own(&["generations", tree.as_str()])
}

/// A tree's claim of a number.
#[must_use]
pub fn generation(tree: &TreeId, number: u64) -> StorePath {
    own(&["generations", tree.as_str(), &format!("{number:0DIGITS$}")])
}

/// Reads the number from a claim's name.
#[must_use]
pub fn number(name: &str) -> Option<u64> {
    (name.len() >= DIGITS && name.bytes().all(|byte| byte.is_ascii_digit())).then(|| name.parse().ok())?
}

/// The mark of a frozen tree.
#[must_use]
pub fn frozen(tree: &TreeId) -> StorePath {
    own(&["generations", tree.as_str(), "frozen"])
}

/// A tree's lease.
#[must_use]
pub fn lease(tree: &TreeId) -> StorePath {
    own(&["locks", tree.as_str()])
}

/// What is known of a member: which tree it is in. The name is a hash of the member's, as that may be long.
#[must_use]
pub fn manifest(member: &StorePath) -> StorePath {
    let hash = blake3::hash(member.as_str().as_bytes()).to_hex();
    own(&["manifests", &format!("{}.json", hash.get(..32).unwrap_or_default())])
}

/// A temporary of an operation in `.qchain/tmp`.
#[must_use]
pub fn temporary(operation: &OperationId, what: &str) -> StorePath {
    own(&["tmp", &format!("{operation}.{what}")])
}

/// Says that readers were looked for again after an operation's deleted members had gone.
#[must_use]
pub fn looked_again(operation: &OperationId) -> StorePath {
    own(&["trash", &format!("{operation}.looked-again")])
}

/// Whose temporary or kept file a name is.
#[must_use]
pub fn operation_of(name: &str) -> Option<OperationId> {
    name.split_once('.').and_then(|(id, _)| OperationId::parse(id))
}

/// Makes a private directory of qchain's if it is not there; gives whether it was made.
pub fn make(backend: &dyn Backend, path: &StorePath) -> Result<bool, BackendError> {
    match backend.create_dir(path, true) {
        Ok(()) => Ok(true),
        Err(BackendError::AlreadyExists { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::{IntentName, generation, number, operation_of, temporary};
    use crate::change::record::{OperationId, TreeId};

    #[test]
    fn names_are_read_as_they_are_written() {
        let name = IntentName { tree: TreeId::random(), generation: 12, operation: OperationId::random() };
        assert_eq!(IntentName::parse(name.path().file_name()), Some(name.clone()));
        assert_eq!(number(generation(&name.tree, 12).file_name()), Some(12));
        let temporary = temporary(&name.operation, "0.image");
        assert_eq!(operation_of(temporary.file_name()), Some(name.operation));
        for other in ["", "x", "frozen", "12", "0000000012.tmp"] {
            assert_eq!((number(other), IntentName::parse(other), operation_of(other)), (None, None, None));
        }
    }
}
