//! Reading and writing the records of changes on one store.

use std::sync::Arc;

use serde::de::DeserializeOwned;

use crate::backend::publish::{decide, decided, offer, replace};
use crate::backend::{Backend, BackendError};
use crate::change::error::{ChangeError, Result};
use crate::change::places::{self, IntentName};
use crate::change::record::{
    Claim, Commit, Decision, Freeze, Intent, MAX_BYTES, OperationId, TreeId, encode,
};
use crate::ids::StorePath;
use crate::store::facts::read_whole;
use crate::store::record::own;

/// A record as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found<T> {
    /// Nothing has its name.
    Nothing,
    /// Something has its name that is no record: a power cut lost its bytes, or a store without hard links
    /// has them half-written.
    Torn(String),
    /// It.
    Record(T),
}

/// The records on one store.
#[derive(Clone, Debug)]
pub struct Journal {
    backend: Arc<dyn Backend>,
}

impl Journal {
    /// Those of a store.
    #[must_use]
    pub fn new(backend: &Arc<dyn Backend>) -> Self {
        Self { backend: backend.clone() }
    }

    fn read<T: DeserializeOwned>(&self, path: &StorePath) -> Result<Found<T>> {
        match read_whole(&self.backend, path, MAX_BYTES) {
            Ok(bytes) => Ok(match serde_json::from_slice(&bytes) {
                Ok(record) => Found::Record(record),
                Err(error) => Found::Torn(error.to_string()),
            }),
            Err(BackendError::NotFound { .. }) => Ok(Found::Nothing),
            Err(source) => Err(failed("read", path)(source)),
        }
    }

    /// The names in a directory of qchain's own; none if it is not there.
    pub fn names(&self, directory: &StorePath) -> Result<Vec<String>> {
        match self.backend.read_dir(directory) {
            Ok(entries) => {
                let mut names: Vec<String> =
                    entries.into_iter().filter_map(|entry| entry.name.ok()).collect();
                names.sort();
                Ok(names)
            }
            Err(BackendError::NotFound { .. }) => Ok(Vec::new()),
            Err(source) => Err(failed("list", directory)(source)),
        }
    }

    /// All intents, by tree and number.
    pub fn intents(&self) -> Result<Vec<IntentName>> {
        let names = self.names(&own(&["intents"]))?;
        Ok(names.iter().filter_map(|name| IntentName::parse(name)).collect())
    }

    /// What an intent says, if that is still to be read.
    pub fn intent(&self, name: &IntentName) -> Result<Option<Intent>> {
        Ok(match self.read(&name.path())? {
            Found::Record(intent) => Some(intent),
            Found::Nothing | Found::Torn(_) => None,
        })
    }

    /// Makes an intent known. It is made durable by [`Journal::settle`]; what it says may be lost by a power cut
    /// even then, its name not.
    pub fn announce(&self, name: &IntentName, intent: &Intent) -> Result<()> {
        let path = name.path();
        let temporary = places::temporary(&name.operation, "intent");
        self.ensure(&path.parent())?;
        offer(self.backend.as_ref(), &temporary, &path, &encode(intent)).map_err(failed("write", &path))
    }

    /// Makes the names of intents durable, and the place for a tree's claims. Called when the files of the
    /// operation have just been made durable: file systems with a log have little left to do then.
    pub fn settle(&self, tree: &TreeId) -> Result<()> {
        let intents = own(&["intents"]);
        self.backend.sync_dir(&intents).map_err(failed("sync", &intents))?;
        self.make_room(tree)
    }

    /// Makes the place for a tree's claims, durable before the first of them lies there: whoever finds it empty
    /// cannot know whether its maker came to that.
    fn make_room(&self, tree: &TreeId) -> Result<()> {
        let claims = places::generations(tree);
        if self.ensure(&claims)? || self.generations(tree)?.is_empty() {
            self.backend.sync_dir(&claims.parent()).map_err(failed("sync", &claims))?;
        }
        Ok(())
    }

    /// Takes an intent away, which ends its operation. Not made durable: of one that a power cut brings back all is found
    /// done, and it goes again.
    pub fn conclude(&self, name: &IntentName) -> Result<()> {
        let path = name.path();
        match self.backend.remove_file(&path) {
            Ok(()) | Err(BackendError::NotFound { .. }) => Ok(()),
            Err(source) => Err(failed("remove", &path)(source)),
        }
    }

    /// Takes away the note that readers were looked for again.
    pub fn forget_second_look(&self, operation: &OperationId) -> Result<()> {
        let path = places::looked_again(operation);
        match self.backend.remove_file(&path) {
            Ok(()) | Err(BackendError::NotFound { .. }) => Ok(()),
            Err(source) => Err(failed("remove", &path)(source)),
        }
    }

    /// The numbers that a tree has used, ascending.
    pub fn generations(&self, tree: &TreeId) -> Result<Vec<u64>> {
        let names = self.names(&places::generations(tree))?;
        let mut numbers: Vec<u64> = names.iter().filter_map(|name| places::number(name)).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Whether the tree has a later operation than `number` that is such a one.
    pub fn is_followed(
        &self,
        tree: &TreeId,
        number: u64,
        by: impl Fn(&IntentName, &Commit) -> bool,
    ) -> Result<bool> {
        for generation in self.generations(tree)?.into_iter().filter(|later| *later > number) {
            if let Found::Record(Claim { operation, decision: Decision::Commit(commit), .. }) =
                self.claim(tree, generation)?
                && by(&IntentName { tree: tree.clone(), generation, operation }, &commit)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a later operation of the tree takes that one back.
    pub fn is_undone(&self, tree: &TreeId, number: u64) -> Result<bool> {
        self.is_followed(tree, number, |_, later| later.undoes(number))
    }

    /// All trees that have claims here.
    pub fn trees(&self) -> Result<Vec<TreeId>> {
        Ok(self.names(&own(&["generations"]))?.iter().filter_map(|name| TreeId::parse(name)).collect())
    }

    /// What a number was claimed for.
    pub fn claim(&self, tree: &TreeId, number: u64) -> Result<Found<Claim>> {
        let path = places::generation(tree, number);
        match self.read(&path) {
            Err(ChangeError::Store { source: BackendError::NotPlain { .. }, .. }) => {
                self.read(&decided(&path))
            }
            found => found,
        }
    }

    /// Claims a number: the one exclusive create that decides. Durable when it returns.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Decided`] if the number is taken.
    ///
    /// # After a crash
    ///
    /// The number is free, or claimed as written.
    pub fn decide(&self, record: &Claim) -> Result<()> {
        let path = places::generation(&record.tree, record.generation);
        let temporary = places::temporary(&record.operation, &format!("claim-{}", record.nonce));
        // A commit has settled before.
        if record.decision == Decision::Abort {
            self.make_room(&record.tree)?;
        }
        match decide(self.backend.as_ref(), &temporary, &path, &encode(record)) {
            Err(BackendError::AlreadyExists { .. }) => {
                Err(ChangeError::Decided { tree: record.tree.to_string(), generation: record.generation })
            }
            done => done.map_err(failed("claim", &path)),
        }
    }

    /// Makes a claim durable that was found, bytes and name: it may be there and not last.
    pub fn confirm(&self, tree: &TreeId, number: u64) -> Result<()> {
        let path = places::generation(tree, number);
        let synced = match self.backend.open(&path) {
            Err(BackendError::NotPlain { .. }) => self
                .backend
                .open(&decided(&path))
                .and_then(|file| file.sync())
                .and_then(|()| self.backend.sync_dir(&path)),
            opened => opened.and_then(|file| file.sync()),
        };
        synced.and_then(|()| self.backend.sync_dir(&path.parent())).map_err(failed("sync", &path))
    }

    /// Why a tree is frozen, if it is.
    pub fn frozen(&self, tree: &TreeId) -> Result<Option<Freeze>> {
        Ok(match self.read(&places::frozen(tree))? {
            Found::Record(freeze) => Some(freeze),
            Found::Nothing => None,
            Found::Torn(detail) => Some(Freeze {
                schema: super::record::SCHEMA,
                operation: OperationId::random(),
                time_ns: 0,
                reason: format!("the record of the freeze is damaged: {detail}"),
            }),
        })
    }

    /// Freezes a tree.
    pub fn freeze(&self, tree: &TreeId, freeze: &Freeze) -> Result<()> {
        let path = places::frozen(tree);
        self.ensure(&path.parent())?;
        replace(self.backend.as_ref(), &own(&["tmp"]), &path, &encode(freeze), false)
            .map_err(failed("write", &path))
    }

    /// Thaws a tree; gives whether it was frozen.
    pub fn thaw(&self, tree: &TreeId) -> Result<bool> {
        let path = places::frozen(tree);
        match self.backend.remove_file(&path) {
            Ok(()) => self.backend.sync_dir(&path.parent()).map(|()| true).map_err(failed("sync", &path)),
            Err(BackendError::NotFound { .. }) => Ok(false),
            Err(source) => Err(failed("remove", &path)(source)),
        }
    }

    /// Makes a directory of qchain's own if it is missing; gives whether it was.
    fn ensure(&self, directory: &StorePath) -> Result<bool> {
        if self.backend.stat(directory).is_ok() {
            return Ok(false);
        }
        places::make(self.backend.as_ref(), directory).map_err(failed("make", directory))
    }
}

fn failed(action: &'static str, path: &StorePath) -> impl Fn(BackendError) -> ChangeError + use<> {
    let member = path.to_string();
    move |source| ChangeError::Store { action, member: member.clone(), source }
}
