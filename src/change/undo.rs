//! Taking an operation back, as one of its own: deleted members and old survivors get their names again.

use crate::backend::BackendError;
use crate::chain::graph::Key;
use crate::change::decided::Decided;
use crate::change::error::{ChangeError, Result};
use crate::change::in_place::lowest;
use crate::change::journal::{Found, Journal};
use crate::change::operation::Operation;
use crate::change::places::IntentName;
use crate::change::publication::{has, stat};
use crate::change::record::{
    CheckpointEdit, Claim, Commit, Decision, Departure, Mark, Place, Publication, Purpose, Restore,
};
use crate::change::site::Site;
use crate::cloudstack::backing::{At as NamedAt, NameMap, Target};
use crate::cloudstack::paths::{checkpoint_of, snapshot_of};
use crate::ids::StorePath;
use crate::qcow2::Image;
use crate::qcow2::layout::Switched;
use crate::qcow2::write::switch_state;

/// Decides that an operation is taken back. The result is to be published as any decision; nothing has
/// changed before that.
///
/// # Errors
///
/// [`ChangeError::NotUndoable`] with what is in the way: it was made in place, its old files are gone, a
/// survivor was changed since, a name was taken, or a later operation builds on it.
pub fn undo<'s>(site: &'s Site<'s>, home: usize, name: &IntentName) -> Result<Decided<'s>> {
    let commit = commit_of(site, home, name)?;
    if !site.is_settled(&name.operation) {
        // Recovery did not come to it: whoever claimed may have been stopped before that was durable.
        Journal::new(site.stores.get(home)?.backend()).confirm(&name.tree, name.generation)?;
    }
    let operation =
        Operation::begin_in(site, home, name.tree.clone(), members_of(&commit), Some(&name.operation))?;
    decide(site, operation, home, name, &commit)
}

/// As [`undo`], of an operation whose tree's lease the caller holds.
pub(super) fn undo_held<'s>(site: &'s Site<'s>, decided: &Decided<'s>) -> Result<Decided<'s>> {
    let (home, name) = (decided.home, decided.name());
    let commit = commit_of(site, home, name)?;
    let journal = Journal::new(site.stores.get(home)?.backend());
    let number = journal.generations(&name.tree)?.last().copied().unwrap_or(0) + 1;
    let operation = Operation::announce(site, home, (name.tree.clone(), number), members_of(&commit), None)?;
    decide(site, operation, home, name, &commit)
}

fn refusal(name: &IntentName) -> impl Fn(Conflict) -> ChangeError + use<> {
    let operation = name.operation.to_string();
    move |conflict| match conflict {
        Conflict::With(reason) => ChangeError::NotUndoable { operation: operation.clone(), reason },
        Conflict::Failed(error) => error,
    }
}

fn members_of(commit: &Commit) -> Vec<Place> {
    commit.departures.iter().map(|departure| departure.at.clone()).collect()
}

/// What was decided, if that can be taken back at all.
fn commit_of(site: &Site<'_>, home: usize, name: &IntentName) -> Result<Commit> {
    let refuse = |reason: &str| refusal(name)(Conflict::With(reason.to_owned()));
    let journal = Journal::new(site.stores.get(home)?.backend());
    let commit = match journal.claim(&name.tree, name.generation)? {
        Found::Record(Claim { decision: Decision::Commit(commit), .. }) => commit,
        Found::Record(_) | Found::Nothing => return Err(refuse("it was never carried out")),
        Found::Torn(_) => return Err(refuse("its record is damaged")),
    };
    if commit.purpose != Purpose::Delete {
        return Err(refuse("it is an undo itself"));
    }
    if commit.publications.iter().any(|publication| publication.in_place.is_some()) {
        return Err(refuse("it was made in place: the old file was written into"));
    }
    if !journal.intents()?.contains(name) {
        return Err(refuse("its old files are gone"));
    }
    Ok(commit)
}

fn decide<'s>(
    site: &'s Site<'s>,
    operation: Operation<'s>,
    home: usize,
    name: &IntentName,
    commit: &Commit,
) -> Result<Decided<'s>> {
    let journal = Journal::new(site.stores.get(home)?.backend());
    let grown = later(&journal, name, commit).map_err(refusal(name))?;
    let mut reversed = reverse(site, &operation, commit).map_err(refusal(name))?;
    stands(site, &reversed, &grown).map_err(refusal(name))?;
    reversed.purpose = Purpose::Undo { operation: name.operation.clone(), generation: name.generation };
    // Each may be the root again.
    let roots =
        commit.departures.iter().map(|departure| site.key(&departure.at)).collect::<Result<Vec<Key>>>()?;
    operation.decide(reversed, &roots)
}

enum Conflict {
    With(String),
    Failed(ChangeError),
}

impl From<ChangeError> for Conflict {
    fn from(error: ChangeError) -> Self {
        Self::Failed(error)
    }
}

fn touched(commit: &Commit) -> impl Iterator<Item = &Place> {
    let survivors = commit.publications.iter().map(|publication| &publication.at);
    survivors.chain(commit.departures.iter().map(|departure| &departure.at))
}

/// Looks for a later operation of the tree that touched what this one did. Gives what others merge in place.
fn later(
    journal: &Journal,
    name: &IntentName,
    commit: &Commit,
) -> std::result::Result<Vec<Publication>, Conflict> {
    let own: Vec<&Place> = touched(commit).collect();
    let mut grown = Vec::new();
    let mut undone = Vec::new();
    let mut builds = Vec::new();
    for number in journal.generations(&name.tree)?.into_iter().filter(|number| *number > name.generation) {
        let Found::Record(claim) = journal.claim(&name.tree, number)? else { continue };
        let Decision::Commit(other) = &claim.decision else { continue };
        match &other.purpose {
            Purpose::Undo { generation, .. } if *generation == name.generation => {
                return Err(Conflict::With("it was undone already".to_owned()));
            }
            Purpose::Undo { generation, .. } => undone.push(*generation),
            Purpose::Delete => {
                if touched(other).any(|place| own.contains(&place)) {
                    builds.push((number, claim.operation.to_string()));
                }
                grown.extend(other.publications.iter().filter(|one| one.in_place.is_some()).cloned());
            }
        }
    }
    match builds.iter().find(|(number, _)| !undone.contains(number)) {
        Some((_, operation)) => Err(Conflict::With(format!("the later operation {operation} builds on it"))),
        None => Ok(grown),
    }
}

/// Whether everything is there that the old files read through, as it was: a later operation may have deleted it, or
/// have merged in place into it, which nobody read any more.
fn stands(site: &Site<'_>, commit: &Commit, grown: &[Publication]) -> std::result::Result<(), Conflict> {
    let names = NameMap::new(site.stores.iter().map(|(_, store)| store.names()).collect());
    let restored = commit.restores.iter().map(|one| site.key(&one.at)).collect::<Result<Vec<Key>>>()?;
    let exists = |store: usize, path: &StorePath| {
        restored.contains(&Key { store, path: path.clone() })
            || site.backend(store).is_ok_and(|backend| backend.stat(path).is_ok())
    };
    let members = commit.restores.iter().map(|one| (&one.at, &one.kept));
    let files = members.chain(commit.publications.iter().map(|one| (&one.at, &one.from)));
    for (place, file) in files.filter(|(place, _)| snapshot_of(&place.path).is_none()) {
        let at = site.at(place)?;
        // One that waits for the end of its grace has its own name yet.
        let file = if stat(&at, file)?.is_some() { file } else { &place.path };
        let opened = at.backend.open(file).map_err(at.failed("open the old file of"))?;
        let image = Image::open(opened, &at.name)
            .map_err(|error| Conflict::With(format!("the old file of {} is damaged: {error}", at.name)))?;
        let Some(backing) = &image.header().backing else { continue };
        let child = NamedAt { store: at.key.store, path: &at.key.path };
        let gone = match names.resolve(&backing.name, child, &exists) {
            Target::Missing => true,
            Target::Member { store, path, .. } => {
                let below = Key { store, path };
                !restored.contains(&below) && (is_stub(site, &below)? || is_grown(site, &below, grown)?)
            }
            Target::Ambiguous(_) | Target::Outside(_) => false,
        };
        if gone {
            return Err(Conflict::With(format!("what {} reads through was deleted since", at.name)));
        }
    }
    Ok(())
}

/// Whether an empty image stands in for a deleted member: an old file would read what is below that through it, and
/// not what it read.
fn is_stub(site: &Site<'_>, key: &Key) -> std::result::Result<bool, Conflict> {
    let at = site.at(&site.place(key)?)?;
    let file = match at.backend.open(&key.path) {
        Ok(file) => file,
        Err(BackendError::NotFound { .. }) => return Ok(false),
        Err(source) => return Err(at.failed("open")(source).into()),
    };
    let own = site.stores.get(key.store).map_err(ChangeError::from)?.record().map(|record| &record.id);
    let image = Image::open(file, &at.name)
        .map_err(|error| Conflict::With(format!("{} cannot be read: {error}", at.name)))?;
    Ok(image.header().stub.is_some() && image.header().stub.as_ref() == own)
}

/// Whether a member that is merged in place shows its successor by now, or a mixture, for as long as it keeps its name.
fn is_grown(site: &Site<'_>, key: &Key, grown: &[Publication]) -> std::result::Result<bool, Conflict> {
    let place = site.place(key)?;
    for publication in grown {
        let merges = publication.in_place.as_ref().is_some_and(|plan| plan.members.contains(&place));
        if place == publication.at || !merges {
            continue;
        }
        // Taken back, or not begun.
        let untouched = match lowest(site, publication)? {
            Some((at, plan)) => {
                let file = at.backend.open(&at.key.path).map_err(at.failed("open"))?;
                matches!(switch_state(&plan.switch, file.as_ref()), Ok(Switched::Not))
            }
            None => false,
        };
        if !untouched {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A deleted member whose stub has its name, and the stub as it is now.
type Replaced<'a> = (&'a Departure, Mark);

/// The deleted members that come back by their free names, and those that come back in their stubs' places.
fn members_back<'a>(
    site: &Site<'_>,
    commit: &'a Commit,
) -> std::result::Result<(Vec<Restore>, Vec<Replaced<'a>>), Conflict> {
    let mut restores = Vec::new();
    let mut stubs = Vec::new();
    for departure in &commit.departures {
        let at = site.at(&departure.at)?;
        match stat(&at, &departure.at.path)? {
            Some(found) if departure.is(&found) => {}
            Some(found) if departure.is_stub(&found) => {
                if !has(&at, &departure.kept, &departure.mark)? {
                    return Err(Conflict::With(format!("the old file of {} is gone", at.name)));
                }
                stubs.push((departure, Mark::from(&found)));
            }
            Some(_) => return Err(Conflict::With(format!("another file is called {} now", at.name))),
            None if has(&at, &departure.kept, &departure.mark)? => {}
            None => return Err(Conflict::With(format!("the old file of {} is gone", at.name))),
        }
        // One that has its name may lose it before the undo is decided: to an instance that was stopped.
        restores.push(Restore {
            at: departure.at.clone(),
            kept: departure.kept.clone(),
            mark: departure.mark,
        });
        let Some(file) = &departure.checkpoint else { continue };
        let kept = stat(&at, &file.kept)?;
        if let Some(found) = kept.map_or_else(|| stat(&at, &file.path), |kept| Ok(Some(kept)))? {
            let place = Place { store: departure.at.store.clone(), path: file.path.clone() };
            restores.push(Restore { at: place, kept: file.kept.clone(), mark: Mark::from(&found) });
        }
    }
    Ok((restores, stubs))
}

/// What takes a decision back.
fn reverse(
    site: &Site<'_>,
    operation: &Operation<'_>,
    commit: &Commit,
) -> std::result::Result<Commit, Conflict> {
    let (restores, stubs) = members_back(site, commit)?;
    let mut publications = Vec::new();
    for (index, publication) in commit.publications.iter().enumerate() {
        let at = site.at(&publication.at)?;
        let Some(now) = stat(&at, &publication.at.path)? else {
            return Err(Conflict::With(format!("{} was removed since", at.name)));
        };
        // Taken back then: there is nothing to be taken back now.
        if publication.old.is(&now) {
            continue;
        }
        if !publication.is_new(&now) {
            return Err(Conflict::With(format!("{} was changed since", at.name)));
        }
        if !has(&at, &publication.kept, &publication.old)? {
            return Err(Conflict::With(format!("the old file of {} is gone", at.name)));
        }
        publications.push(Publication {
            at: publication.at.clone(),
            from: publication.kept.clone(),
            new: publication.old,
            old: publication.new,
            kept: operation.kept(&at.key, &format!("{index}.image"))?,
            in_place: None,
        });
    }
    for (index, (departure, stub)) in stubs.into_iter().enumerate() {
        publications.push(Publication {
            at: departure.at.clone(),
            from: departure.kept.clone(),
            new: departure.mark,
            old: stub,
            kept: operation.kept(&site.key(&departure.at)?, &format!("{index}.stub"))?,
            in_place: None,
        });
    }
    let checkpoints = edits_back(site, operation, commit, &publications)?;
    Ok(Commit {
        purpose: Purpose::Delete,
        grace_ns: commit.grace_ns,
        retention_ns: 0,
        restores,
        publications,
        checkpoints,
        departures: Vec::new(),
        repairs: false,
    })
}

/// The edits of checkpoint files that take a decision's own back.
fn edits_back(
    site: &Site<'_>,
    operation: &Operation<'_>,
    commit: &Commit,
    publications: &[Publication],
) -> Result<Vec<CheckpointEdit>> {
    let mut checkpoints = Vec::new();
    for (index, edit) in commit.checkpoints.iter().enumerate() {
        let at = site.at(&edit.at)?;
        checkpoints.push(CheckpointEdit {
            at: edit.at.clone(),
            after: publications.iter().position(|one| {
                one.at.store == edit.at.store && checkpoint_of(&one.at.path).as_ref() == Some(&edit.at.path)
            }),
            parent: edit.before.clone(),
            before: edit.parent.clone(),
            kept: operation.kept(&at.key, &format!("{index}.checkpoint"))?,
            original: Some(edit.kept.clone()),
        });
    }
    Ok(checkpoints)
}
