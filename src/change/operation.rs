//! An operation before its decision: announced, its files in the making, nothing of it in force.

use std::sync::Arc;

use crate::backend::publish::take_identity;
use crate::backend::{BackendError, StoreFile};
use crate::chain::graph::Key;
use crate::change::decided::Decided;
use crate::change::error::{ChangeError, Result};
use crate::change::journal::Journal;
use crate::change::lease::Lease;
use crate::change::places::IntentName;
use crate::change::record::{
    Claim, Commit, Decision, Departure, Intent, KeptFile, Mark, OperationId, Place, Publication, SCHEMA,
    TreeId,
};
use crate::change::site::{At, Site};
use crate::change::yard::Yard;
use crate::change::{standing, sweep, tree};
use crate::cloudstack::paths::checkpoint_of;
use crate::ids::StorePath;

/// An operation that has announced itself and holds its tree's lease. Dropped without a decision it takes
/// itself back: its number is claimed for nothing, its temporaries and its intent go.
pub struct Operation<'s> {
    site: &'s Site<'s>,
    /// The store that has the records.
    home: usize,
    name: IntentName,
    /// The tree's root, where that is known.
    roots: Vec<Place>,
    lease: Option<Lease>,
    /// Whether dropping takes it back.
    open: bool,
}

impl<'s> Operation<'s> {
    /// Takes the lease of the tree with that root, and announces the operation.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Busy`] if somebody else works on the tree, or has decided something since this process
    /// recovered it; [`ChangeError::Frozen`] if nobody may change it.
    ///
    /// # After a crash
    ///
    /// An intent may be left, which recovery takes back.
    pub fn begin(site: &'s Site<'s>, root: &Key, members: Vec<Place>) -> Result<Self> {
        let tree = tree::identify(site, root)?;
        let mut operation = Self::begin_in(site, root.store, tree, members, None)?;
        operation.roots.push(site.place(root)?);
        Ok(operation)
    }

    /// As [`Operation::begin`], for a tree whose records lie on the store `home`; an operation that this one
    /// takes back may be anywhere.
    pub(super) fn begin_in(
        site: &'s Site<'s>,
        home: usize,
        tree: TreeId,
        members: Vec<Place>,
        undoes: Option<&OperationId>,
    ) -> Result<Self> {
        let journal = Journal::new(site.stores.get(home)?.backend());
        if let Some(freeze) = journal.frozen(&tree)? {
            return Err(ChangeError::Frozen { tree: tree.to_string(), reason: freeze.reason });
        }
        let lease = Lease::take(site, home, &tree)?;
        let mut begun = site.begun();
        let generation = standing::next_number(site, home, &tree, undoes, &begun)?;
        let operation = Self::announce(site, home, (tree, generation), members, Some(lease))?;
        begun.push(operation.name.clone());
        Ok(operation)
    }

    /// As [`Operation::begin_in`], for a number of the tree; that and the lease are the caller's business.
    pub(super) fn announce(
        site: &'s Site<'s>,
        home: usize,
        (tree, generation): (TreeId, u64),
        members: Vec<Place>,
        lease: Option<Lease>,
    ) -> Result<Self> {
        let journal = Journal::new(site.stores.get(home)?.backend());
        let name =
            IntentName { tree: tree.clone(), generation, operation: OperationId::of(site.clock.unique()) };
        let intent = Intent {
            schema: SCHEMA,
            tree,
            generation,
            operation: name.operation.clone(),
            owner: format!("{} on {}", site.owner.process, site.owner.host),
            begun_ns: site.clock.wall_ns(),
            members,
        };
        let operation = Self { site, home, name, roots: Vec::new(), lease, open: true };
        // From here on dropping takes it back.
        journal.announce(&operation.name, &intent)?;
        Ok(operation)
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &OperationId {
        &self.name.operation
    }

    /// The tree.
    #[must_use]
    pub fn tree(&self) -> &TreeId {
        &self.name.tree
    }

    /// The store that has its records.
    #[must_use]
    pub fn home(&self) -> usize {
        self.home
    }

    /// The site.
    #[must_use]
    pub fn site(&self) -> &'s Site<'s> {
        self.site
    }

    /// Makes an empty file that is to take the name of `old`, the open file at `target`, and gives it that
    /// file's identity: if the store does not allow that, this is where it shows (`squashed`), before any
    /// byte. `what` tells it from the operation's other files.
    pub fn stage(&self, target: &Key, what: &str, old: &dyn StoreFile) -> Result<Staged> {
        let at = self.site.at(&self.site.place(target)?)?;
        let stat = old.stat().map_err(at.failed("look at"))?;
        let yard = Yard::of(at.backend, &target.path).map_err(at.failed("make room beside"))?;
        let temporary = yard.temporary(self.id(), what);
        let file = at.backend.create(&temporary).map_err(at.failed("make a temporary for"))?;
        let staged = Staged {
            place: self.site.place(target)?,
            kept: yard.kept(self.id(), what),
            temporary,
            file,
            old: Mark::from(&stat),
        };
        take_identity(old, staged.file.as_ref()).map_err(at.failed("give owner and attributes to"))?;
        Ok(staged)
    }

    /// A deleted member as the record has it: which file, where it is kept.
    pub fn departure(&self, member: &Key, what: &str, after: Vec<usize>) -> Result<Departure> {
        let at = self.site.at(&self.site.place(member)?)?;
        let stat = at.backend.stat(&member.path).map_err(at.failed("look at"))?;
        let yard = Yard::of(at.backend, &member.path).map_err(at.failed("make room beside"))?;
        let checkpoint = match checkpoint_of(&member.path) {
            Some(path) => match at.backend.stat(&path) {
                Ok(found) => Some(KeptFile {
                    kept: Yard::of(at.backend, &path)
                        .map_err(at.failed("make room beside"))?
                        .kept(self.id(), &format!("{what}-checkpoint")),
                    mark: Mark::from(&found),
                    path,
                }),
                Err(BackendError::NotFound { .. }) => None,
                Err(source) => return Err(at.failed("look at the checkpoint file of")(source)),
            },
            None => None,
        };
        Ok(Departure {
            at: self.site.place(member)?,
            mark: Mark::from(&stat),
            kept: yard.kept(self.id(), what),
            after,
            checkpoint,
            becomes: None,
            allocated_bytes: stat.allocated_bytes,
            stub: None,
        })
    }

    /// A temporary's name on a member's file system.
    pub fn temporary(&self, member: &Key, what: &str) -> Result<StorePath> {
        let at = self.site.at(&self.site.place(member)?)?;
        let yard = Yard::of(at.backend, &member.path).map_err(at.failed("make room beside"))?;
        Ok(yard.temporary(self.id(), what))
    }

    /// Where a file of that name is kept, on its own file system.
    pub fn kept(&self, member: &Key, what: &str) -> Result<StorePath> {
        let at = self.site.at(&self.site.place(member)?)?;
        let yard = Yard::of(at.backend, &member.path).map_err(at.failed("make room beside"))?;
        Ok(yard.kept(self.id(), what))
    }

    /// Decides: from here on the operation is carried out, by this process or by whoever recovers it. The
    /// temporaries' names are made durable before. New roots are told their tree.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Decided`] if somebody else claimed the number: he has taken this operation for dead. It
    /// is taken back.
    ///
    /// # After a crash
    ///
    /// Nothing is decided, or all of it.
    pub fn decide(mut self, commit: Commit, roots: &[Key]) -> Result<Decided<'s>> {
        for root in roots {
            tree::belong(self.site, root, self.tree())?;
            self.roots.push(self.site.place(root)?);
        }
        let mut directories: Vec<(usize, StorePath)> = Vec::new();
        let stubs = commit.departures.iter().filter_map(|one| Some((&one.at, &one.stub.as_ref()?.from)));
        // A merge in place has nothing yet that could get lost.
        let written = commit.publications.iter().filter(|one| one.in_place.is_none());
        let staged = written.map(|one| (&one.at, &one.from)).chain(stubs);
        for (place, from) in staged {
            let at = self.site.at(place)?;
            let directory = (at.key.store, from.parent());
            if !directories.contains(&directory) {
                at.backend.sync_dir(&directory.1).map_err(at.failed("sync the directory of"))?;
                directories.push(directory);
            }
        }
        self.journal()?.settle(self.tree())?;
        if self.lease.as_ref().is_some_and(|lease| !lease.is_held()) {
            return Err(ChangeError::Busy { owner: "another qchain, which took it over".to_owned() });
        }
        self.site.cancel.check().map_err(|_| ChangeError::Cancelled)?;
        let claim = self.claim(Decision::Commit(commit));
        match self.journal()?.decide(&claim) {
            Ok(()) => {}
            Err(error @ ChangeError::Decided { .. }) => return Err(error),
            // The name may have been taken for all that, and then may not last: nothing is built on it here.
            // Recovery will see.
            Err(error) => {
                let claimed = self.journal()?.claim(&claim.tree, claim.generation);
                self.open = matches!(claimed, Ok(super::journal::Found::Nothing));
                if self.open {
                    return Err(error);
                }
                let operation = self.id().to_string();
                return Err(ChangeError::Uncertain { operation, source: Box::new(error) });
            }
        }
        self.open = false;
        let lease = self.lease.take();
        let decided = Decided::new(self.site, self.home, self.name.clone(), claim, lease);
        decided.map(Decided::lasting).ok_or_else(|| ChangeError::BadRecord {
            path: "generations".to_owned(),
            detail: "a commit was claimed as something else".to_owned(),
        })
    }

    /// Takes the operation back now; errors are told, unlike when it is dropped.
    pub fn take_back(mut self) -> Result<()> {
        self.open = false;
        self.give_up()
    }

    /// Its own temporaries go first, whatever the store still allows: it will never decide.
    fn give_up(&self) -> Result<()> {
        let swept = sweep::temporaries_of(self.site, self.id());
        take_back(self.site, self.home, &self.name)?;
        swept
    }

    fn journal(&self) -> Result<Journal> {
        Ok(Journal::new(self.site.stores.get(self.home)?.backend()))
    }

    fn claim(&self, decision: Decision) -> Claim {
        new_claim(self.site, &self.name, self.roots.clone(), decision)
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        if self.open {
            // Best effort: recovery does the same.
            let _ = self.give_up();
        }
    }
}

pub(super) fn new_claim(site: &Site<'_>, name: &IntentName, roots: Vec<Place>, decision: Decision) -> Claim {
    Claim {
        schema: SCHEMA,
        tree: name.tree.clone(),
        generation: name.generation,
        operation: name.operation.clone(),
        nonce: format!("{:032x}", site.clock.unique()),
        decided_ns: site.clock.wall_ns(),
        roots,
        decision,
    }
}

/// Takes back an operation that nobody has decided: claims its number for nothing, so that its maker can only
/// fail, then removes its temporaries and its intent. Gives [`ChangeError::Decided`], having done nothing, if
/// it was decided before.
pub fn take_back(site: &Site<'_>, home: usize, name: &IntentName) -> Result<()> {
    let journal = Journal::new(site.stores.get(home)?.backend());
    let claim = new_claim(site, name, Vec::new(), Decision::Abort);
    match journal.decide(&claim) {
        Ok(()) => {}
        Err(ChangeError::Decided { tree, generation }) => match journal.claim(&name.tree, name.generation)? {
            super::journal::Found::Record(found)
                if found.decision == Decision::Abort || found.operation != name.operation =>
            {
                // Nobody finds this number's intent after this: who made the claim may have died before it was durable.
                journal.confirm(&name.tree, name.generation)?;
            }
            // Its maker is dead, and what he wrote says nothing: nobody has acted on it.
            super::journal::Found::Torn(_) => {}
            _ => return Err(ChangeError::Decided { tree, generation }),
        },
        Err(error) => return Err(error),
    }
    sweep::end(site, &journal, name)
}

/// A file in the making that is to take the name of another.
#[derive(Debug)]
pub struct Staged {
    place: Place,
    temporary: StorePath,
    kept: StorePath,
    file: Arc<dyn StoreFile>,
    old: Mark,
}

impl Staged {
    /// The file, to be written.
    #[must_use]
    pub fn file(&self) -> &dyn StoreFile {
        self.file.as_ref()
    }

    /// Throws the file away.
    pub fn discard(self, site: &Site<'_>) -> Result<()> {
        let at = site.at(&self.place)?;
        at.backend.remove_file(&self.temporary).map_err(at.failed("remove the temporary for"))
    }

    /// Makes the bytes durable and opens the file again as a reader would: what is read from it comes from
    /// the store, as far as the store allows. Nothing may be written after. If it fails the file must be
    /// given up. Whether the old one is still what it was when the new one was begun is the caller's to see.
    pub fn seal(&self, site: &Site<'_>) -> Result<Sealed> {
        let at: At<'_> = site.at(&self.place)?;
        self.file.sync().map_err(at.failed("make durable the new file of"))?;
        self.file.drop_cache().map_err(at.failed("drop from the cache the new file of"))?;
        let again = at.backend.open(&self.temporary).map_err(at.failed("open again the new file of"))?;
        let stat = again.stat().map_err(at.failed("look at the new file of"))?;
        let publication = Publication {
            at: self.place.clone(),
            from: self.temporary.clone(),
            new: Mark::from(&stat),
            old: self.old,
            kept: self.kept.clone(),
            in_place: None,
        };
        Ok(Sealed { file: again, allocated_bytes: stat.allocated_bytes, publication })
    }
}

/// A finished file, durable, not yet under its name.
#[derive(Debug)]
pub struct Sealed {
    /// It, opened anew.
    pub file: Arc<dyn StoreFile>,
    /// What it takes on the store, in bytes.
    pub allocated_bytes: u64,
    /// How it is to be published.
    pub publication: Publication,
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Operation, new_claim, take_back};
    use crate::backend::Backend;
    use crate::backend::faulty::{Faulty, Lasting};
    use crate::backend::memory::MemoryStore;
    use crate::change::error::ChangeError;
    use crate::change::journal::{Found, Journal};
    use crate::change::places::{self, IntentName};
    use crate::change::record::{Decision, OperationId, Purpose, TreeId};
    use crate::change::trial::{commit, on, opted_in};

    const EIO: i32 = 5;

    /// Who took the lease over may have planned from what he saw, and not claimed anything yet.
    #[test]
    fn who_lost_his_lease_decides_nothing() {
        for lost in [true, false] {
            let backend = opted_in(MemoryStore::new()) as Arc<dyn Backend>;
            let tree = TreeId::of(1);
            on(&backend, |site| {
                let operation = Operation::begin_in(site, 0, tree.clone(), Vec::new(), None).unwrap();
                if lost {
                    let lease = backend.open_writable(&places::lease(&tree)).unwrap();
                    let mut other =
                        br#"{"host":"b","process":"1","nonce":"2","counter":3,"free":false}"#.to_vec();
                    other.resize(usize::try_from(lease.stat().unwrap().length).unwrap(), b' ');
                    lease.write_at(0, &other).unwrap();
                }
                let decided = operation.decide(commit(Purpose::Delete, Vec::new()), &[]);
                assert_eq!(matches!(&decided, Err(ChangeError::Busy { .. })), lost, "{:?}", decided.err());
            });
            let found = Journal::new(&backend).claim(&tree, 1).unwrap();
            let Found::Record(claim) = &found else { panic!("{lost}: {found:?}") };
            assert_eq!(claim.decision == Decision::Abort, lost);
        }
    }

    /// Others, on other hosts, live on when the store loses its power, and take the next number.
    #[test]
    fn a_number_that_the_dead_gave_up_stays_given_up() {
        for dies in 0.. {
            let memory = opted_in(MemoryStore::new());
            let backend = Arc::clone(&memory) as Arc<dyn Backend>;
            let name = IntentName { tree: TreeId::of(1), generation: 1, operation: OperationId::random() };
            let lived = on(&backend, |site| {
                // One gives it up and dies somewhere in it.
                let faulty = Faulty::new(Arc::clone(&backend));
                faulty.fail_at(dies, EIO, Lasting::Dead);
                let dying: Arc<dyn Backend> = Arc::new(faulty);
                let claim = new_claim(site, &name, Vec::new(), Decision::Abort);
                let lived = Journal::new(&dying).decide(&claim).is_ok();
                // The other one relies on it.
                take_back(site, 0, &name).unwrap();
                lived
            });
            memory.crash();
            let found = Journal::new(&backend).claim(&name.tree, 1).unwrap();
            assert!(
                matches!(&found, Found::Record(claim) if claim.decision == Decision::Abort),
                "{dies}: {found:?}"
            );
            if lived {
                assert!(dies > 5, "the fault at {dies} was not noticed");
                break;
            }
        }
    }
}
