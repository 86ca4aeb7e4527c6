//! Deleted members lose their names: after the grace, and only if nobody reads through them.

use std::collections::BTreeSet;

use crate::backend::publish::{link, take_name};
use crate::backend::{BackendError, Stat};
use crate::chain::graph::{Key, NodeId, Parent};
use crate::change::decided::Decided;
use crate::change::error::Result;
use crate::change::keep::{name_if_free, release, sync_all};
use crate::change::places::looked_again;
use crate::change::publication::{Published, stat};
use crate::change::record::{Departure, KeptFile, Place, Publication};
use crate::change::site::{At, Site};
use crate::change::standing::carry_out_later;
use crate::change::stub::{give_way, is_aside, stand_down, stand_in, stands_for_another};
use crate::change::yard;
use crate::failure::Code;
use crate::ids::StorePath;
use crate::progress::Silent;
use crate::store::scan::{Scan, ScanOptions};

/// What became of a deleted member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Departed {
    /// Its name is gone.
    Gone,
    /// It has its name until then, nanoseconds since 1970.
    Waits(i64),
    /// It stays, as somebody reads through it or its name is another file's.
    Kept {
        /// Why, as a code.
        code: Code,
        /// Why, in words.
        reason: String,
    },
}

/// Why a member's name is left alone.
const ANOTHER: &str = "another file has its name now; it was left alone";

/// A departure that is to be done now.
struct Due<'a, 's> {
    decided: &'a Decided<'s>,
    departure: &'a Departure,
    at: At<'s>,
    place: (usize, usize),
}

/// Lets the deleted members of several operations go that are due. `published` says what became of each one's
/// publications. Looks for readers on all stores, right before and once more right after: a member that got a
/// reader meanwhile comes back. Idempotent. Durable when it returns.
///
/// # After a crash
///
/// A name is there, or gone with its file kept in trash; calling again does the rest.
pub fn depart(site: &Site<'_>, operations: &[(&Decided<'_>, &[Published])]) -> Result<Vec<Vec<Departed>>> {
    let now = site.clock.wall_ns();
    let mut outcomes: Vec<Vec<Departed>> = Vec::new();
    let mut due = Vec::new();
    for (first, (decided, published)) in operations.iter().enumerate() {
        let departures = &decided.commit.departures;
        let mut own = vec![Departed::Gone; departures.len()];
        let undone = !departures.is_empty() && decided.is_undone()?;
        for (second, departure) in departures.iter().enumerate().filter(|_| !undone) {
            let at = site.at(&departure.at)?;
            let published =
                departure.after.iter().all(|index| published.get(*index) == Some(&Published::Done));
            let ends = now >= decided.grace_until().saturating_add(decided.commit.retention_ns);
            let named = stat(&at, &departure.at.path)?.filter(|found| !departure.is_stub(found));
            let over = now >= decided.grace_until();
            let ready = published && over || named.is_none() && is_kept(&at, departure)?;
            let waiting = match named {
                None if changed_as_it_went(&at, departure)? => Some(changed_meanwhile(&at, departure)?),
                None if !is_due(&at, decided, departure, ready, ends)? => None,
                Some(found) if !departure.is(&found) => Some(kept(Code::ChangedMeanwhile, &at, ANOTHER)),
                Some(_) if !published => {
                    checkpoint_back(&at, departure)?;
                    Some(kept(Code::Kept, &at, "a survivor that reads through it was not published"))
                }
                Some(_) if !over => Some(Departed::Waits(decided.grace_until())),
                Some(_) | None => {
                    due.push(Due { decided, departure, at, place: (first, second) });
                    continue;
                }
            };
            if let (Some(outcome), Some(place)) = (waiting, own.get_mut(second)) {
                *place = outcome;
            }
        }
        outcomes.push(own);
    }
    if !due.is_empty() {
        // What replaces them is durable before they go, and what may need them again is where it is looked for.
        due.iter().try_for_each(|one| one.decided.settle())?;
        let mut concerned: Vec<&Decided<'_>> = due.iter().map(|one| one.decided).collect();
        concerned.dedup_by_key(|decided| decided.id());
        carry_out_later(site, &concerned)?;
        let mut gone: BTreeSet<Key> = BTreeSet::new();
        let scan = look(site)?;
        let mut went = Vec::new();
        for one in &due {
            let outcome = let_go_unread(site, &scan, one, &gone)?;
            if outcome == Departed::Gone {
                gone.insert(one.at.key.clone());
                went.push(one);
            }
            set(&mut outcomes, one.place, outcome);
        }
        for (place, outcome) in come_back(site, &went, &gone)? {
            set(&mut outcomes, place, outcome);
        }
        for one in &went {
            note_second_look(one.decided);
        }
    }
    sync(site, operations, &due)?;
    // What was merged in place has one name again, or is to keep both.
    for (decided, _) in operations {
        decided.let_writers_in();
    }
    Ok(outcomes)
}

/// Whether a member's file is where deleted ones are kept. A name that went, went when all was published, whatever others
/// did to a survivor since.
fn is_kept(at: &At<'_>, departure: &Departure) -> Result<bool> {
    Ok(stat(at, &departure.kept)?.is_some_and(|found| departure.is(&found)))
}

/// Whether what went from a member's name is not what was to go: somebody wrote into it, or put another file there, at that
/// very moment, and whoever let it go died before he looked.
fn changed_as_it_went(at: &At<'_>, departure: &Departure) -> Result<bool> {
    match &departure.stub {
        // What was merged into keeps no other name, so there is nothing that its stub could stand for.
        Some(stub) if departure.becomes.is_none() && stands_for_another(at, departure, stub)? => Ok(true),
        _ => Ok(stat(at, &departure.at.path)?.is_none()
            && stat(at, &departure.kept)?.is_some_and(|found| !departure.is(&found))),
    }
}

/// Gives it its name back, durably.
fn changed_meanwhile(at: &At<'_>, departure: &Departure) -> Result<Departed> {
    let (name, kept_as) = (&departure.at.path, &departure.kept);
    if let Some(stub) = &departure.stub {
        give_way(at, departure, stub)?;
    }
    put_back(at, name, kept_as)?;
    checkpoint_back(at, departure)?;
    sync_all([(at, name.parent()), (at, kept_as.parent())].into_iter())?;
    Ok(kept(Code::ChangedMeanwhile, at, "somebody changed it as it went, and has it back"))
}

/// Whether something is to be done about a member whose name went.
fn is_due(
    at: &At<'_>,
    decided: &Decided<'_>,
    departure: &Departure,
    ready: bool,
    ends: bool,
) -> Result<bool> {
    Ok(is_aside(at, departure)? || ready && leaves_something(at, decided, departure, ends)?)
}

/// Whether a member's name went, but not yet what goes with it: its checkpoint file, or the name under which
/// the file was looked at once more that is the survivor's by now. Before its end (`ends`) a kept file is
/// reason enough, and as long as nobody has noted his second look: whoever let the name go may have died
/// before it.
fn leaves_something(at: &At<'_>, decided: &Decided<'_>, departure: &Departure, ends: bool) -> Result<bool> {
    if is_kept(at, departure)? {
        let home =
            At { backend: decided.site.backend(decided.home)?, key: at.key.clone(), name: at.name.clone() };
        if ends || departure.becomes.is_some() || stat(&home, &second_look(decided))?.is_none() {
            return Ok(true);
        }
    }
    let Some(file) = &departure.checkpoint else { return Ok(false) };
    match stat(at, &file.path)? {
        Some(found) => is_own(decided, departure, file, &found),
        None => Ok(false),
    }
}

/// Whether a checkpoint file is what it was when its member was deleted, but for an edit of a later operation.
/// Edited since by its owner, it stays: it is not ours to judge.
fn is_own(decided: &Decided<'_>, departure: &Departure, file: &KeptFile, found: &Stat) -> Result<bool> {
    let place = Place { store: departure.at.store.clone(), path: file.path.clone() };
    Ok(file.mark.inode == found.id.inode || decided.is_overtaken(&place)?)
}

fn set(outcomes: &mut [Vec<Departed>], place: (usize, usize), outcome: Departed) {
    if let Some(place) = outcomes.get_mut(place.0).and_then(|own| own.get_mut(place.1)) {
        *place = outcome;
    }
}

fn kept(code: Code, at: &At<'_>, reason: &str) -> Departed {
    Departed::Kept { code, reason: format!("{}: {reason}", at.name) }
}

/// A look at all stores.
fn look(site: &Site<'_>) -> Result<Scan> {
    let options = ScanOptions { now_ns: 0, settle_ns: 0, caches: &[], progress: &Silent };
    Ok(Scan::run(site.stores, &options)?)
}

/// A member that reads, or may read, through another, and is not gone itself.
fn reader(site: &Site<'_>, scan: &Scan, one: &Due<'_, '_>, gone: &BTreeSet<Key>) -> Option<String> {
    let id = scan.graph.find(&one.at.key)?;
    let key = |id: NodeId| &scan.graph.node(id).key;
    let children = scan.graph.readers(id);
    // What an earlier stub shows is of no interest, as long as it can be opened.
    let idle = |child: &NodeId| one.departure.stub.is_some() && scan.is_idle_stub(*child);
    let found = children.filter(|child| !idle(child)).map(key).find(|child| !gone.contains(*child));
    found.map(|child| site.stores.display(child))
}

/// Takes one name away, unless somebody reads through it.
fn let_go_unread(site: &Site<'_>, scan: &Scan, one: &Due<'_, '_>, gone: &BTreeSet<Key>) -> Result<Departed> {
    match reader(site, scan, one, gone) {
        Some(child) => {
            match one.departure.stub {
                // Whoever put the stub there died before the second look.
                Some(_) => come_again(one)?,
                None => checkpoint_back(&one.at, one.departure)?,
            }
            Ok(kept(Code::Kept, &one.at, &format!("{child} reads through it now")))
        }
        None => let_go(one),
    }
}

/// Takes one name away: into trash, then a look at what went there.
fn let_go(one: &Due<'_, '_>) -> Result<Departed> {
    let Due { departure, at, decided, .. } = one;
    // An instance that was stopped for long may come too late: what was undone stays undone.
    if decided.is_undone()? {
        return Ok(Departed::Gone);
    }
    let aside = match &departure.stub {
        Some(stub) => stand_in(at, departure, stub)?,
        None => put_aside(at, &departure.at.path, &departure.kept, |found| departure.is(found))?,
    };
    if !aside {
        return Ok(kept(Code::ChangedMeanwhile, at, ANOTHER));
    }
    if departure.becomes.is_some() {
        // It lives on under the survivor's name.
        release(at, &departure.kept)?;
    }
    // Stopped between the look and the rename, it gives the name back.
    if decided.is_undone()? {
        name_back(at, departure)?;
        return Ok(Departed::Gone);
    }
    if let Some(file @ KeptFile { path, kept, .. }) = &departure.checkpoint
        && let Some(found) = stat(at, path)?
        && is_own(decided, departure, file, &found)?
    {
        let inode = found.id.inode;
        put_aside(at, path, kept, |found| inode == found.id.inode)?;
        if decided.is_undone()? {
            name_back(at, departure)?;
            put_back(at, path, kept)?;
        }
    }
    Ok(Departed::Gone)
}

/// Moves a file into trash; false if it was another one, which is where it was then.
fn put_aside(at: &At<'_>, name: &StorePath, kept: &StorePath, is: impl Fn(&Stat) -> bool) -> Result<bool> {
    match (stat(at, name)?, stat(at, kept)?) {
        (None, _) => return Ok(true),
        (Some(named), _) if !is(&named) => return Ok(false),
        // A rename would do nothing.
        (Some(named), Some(kept)) if named.id == kept.id => {
            release(at, name)?;
            return Ok(true);
        }
        _ => {}
    }
    yard::ensure(at.backend, kept).map_err(at.failed("make room beside"))?;
    match take_name(at.backend, name, kept) {
        Ok(()) | Err(BackendError::NotFound { .. }) => {}
        Err(source) => return Err(at.failed("put aside")(source)),
    }
    match stat(at, kept)? {
        Some(found) if !is(&found) => {
            put_back(at, name, kept)?;
            Ok(false)
        }
        _ => Ok(true),
    }
}

/// Gives a deleted member its name back, and its checkpoint file.
fn come_again(one: &Due<'_, '_>) -> Result<()> {
    let Due { decided, departure, at, .. } = one;
    match departure.becomes.and_then(|index| decided.commit.publications.get(index)) {
        None => name_back(at, departure)?,
        Some(publication) => name_again(at, publication, departure)?,
    }
    checkpoint_back(at, departure)
}

/// Gives a deleted member its name back, if that is free or its stub's.
fn name_back(at: &At<'_>, departure: &Departure) -> Result<()> {
    if let Some(stub) = &departure.stub {
        stand_down(at, departure, stub, None)?;
    }
    put_back(at, &departure.at.path, &departure.kept)
}

/// Gives a kept file its name back, if that is free.
fn put_back(at: &At<'_>, name: &StorePath, kept: &StorePath) -> Result<()> {
    if name_if_free(at, kept, name, "put back")? { release(at, kept) } else { Ok(()) }
}

/// Gives a member that stays its checkpoint file back, if that went: of what went a power cut may bring one
/// name back and not the other.
fn checkpoint_back(at: &At<'_>, departure: &Departure) -> Result<()> {
    match &departure.checkpoint {
        Some(KeptFile { path, kept, .. }) => put_back(at, path, kept),
        None => Ok(()),
    }
}

/// Where it is noted that readers were looked for again after an operation's names went.
fn second_look(decided: &Decided<'_>) -> StorePath {
    looked_again(decided.id())
}

/// Notes it, for as long as the operation is open. Lost, or not to be written, it is one more look.
fn note_second_look(decided: &Decided<'_>) {
    if decided.commit.retention_ns > 0
        && let Ok(backend) = decided.site.backend(decided.home)
    {
        let _ = backend.create(&second_look(decided));
    }
}

/// Gives the survivor's file its other name back, if that is free: whoever came to read through it finds it,
/// and reads what all see who came since the merge.
fn name_again(at: &At<'_>, publication: &Publication, departure: &Departure) -> Result<()> {
    let name = &departure.at.path;
    if !stat(at, &publication.at.path)?.is_some_and(|found| publication.is_new(&found)) {
        return Ok(());
    }
    if let Some(stub) = &departure.stub {
        stand_down(at, departure, stub, Some(&publication.at.path))?;
    }
    match link(at.backend, &publication.at.path, name) {
        Ok(()) | Err(BackendError::AlreadyExists { .. } | BackendError::NotFound { .. }) => Ok(()),
        Err(source) => Err(at.failed("put back")(source)),
    }
}

/// Looks again: a member that got a reader while its name went gets the name back, with all below it.
fn come_back(
    site: &Site<'_>,
    went: &[&Due<'_, '_>],
    gone: &BTreeSet<Key>,
) -> Result<Vec<((usize, usize), Departed)>> {
    let mut back: BTreeSet<Key> = BTreeSet::new();
    let mut outcomes = Vec::new();
    if went.is_empty() {
        return Ok(outcomes);
    }
    let scan = look(site)?;
    // Children went first, so from the last on: whoever comes back needs what is below.
    for one in went {
        let name = one.at.key.path.file_name();
        let misses = |id: &NodeId| match &scan.graph.node(*id).parent {
            Parent::Missing(text) => text.rsplit('/').next() == Some(name),
            _ => false,
        };
        let orphan = scan.graph.ids().find(|id| misses(id) && !gone.contains(&scan.graph.node(*id).key));
        let orphan = orphan.or_else(|| on_stub(&scan, one, gone));
        let needed = back.iter().next().is_some_and(|_| below_any(one, went, &back));
        if orphan.is_none() && !needed {
            continue;
        }
        come_again(one)?;
        back.insert(one.at.key.clone());
        let child = orphan.map(|id| site.stores.display(&scan.graph.node(id).key));
        let child = child.unwrap_or_else(|| "a member that came back".to_owned());
        outcomes.push((one.place, kept(Code::Kept, &one.at, &format!("{child} reads through it now"))));
    }
    Ok(outcomes)
}

/// A member that came to read through a name while that got its stub.
fn on_stub(scan: &Scan, one: &Due<'_, '_>, gone: &BTreeSet<Key>) -> Option<NodeId> {
    one.departure.stub.as_ref()?;
    let id = scan.graph.find(&one.at.key)?;
    let came = |child: &NodeId| !gone.contains(&scan.graph.node(*child).key) && !scan.is_idle_stub(*child);
    scan.graph.children(id).iter().copied().find(came)
}

/// Whether a member that went lies, by the order of its operation, below one that came back.
fn below_any(one: &Due<'_, '_>, went: &[&Due<'_, '_>], back: &BTreeSet<Key>) -> bool {
    let same = |other: &&&Due<'_, '_>| other.place.0 == one.place.0 && other.place.1 < one.place.1;
    went.iter().filter(same).any(|other| back.contains(&other.at.key))
}

/// Makes it durable: the members' directories, their checkpoint files', and trash if it is to last.
fn sync(site: &Site<'_>, operations: &[(&Decided<'_>, &[Published])], due: &[Due<'_, '_>]) -> Result<()> {
    let mut ats = Vec::new();
    for one in due {
        let own = [
            Some(one.departure.at.path.parent()),
            one.departure.checkpoint.as_ref().map(|file| file.path.parent()),
        ];
        let lasts = one.decided.commit.retention_ns > 0;
        let trash = lasts.then(|| one.departure.kept.parent());
        ats.extend(own.into_iter().chain([trash]).flatten().map(|directory| (&one.at, directory)));
    }
    let mut edits = Vec::new();
    for edit in operations.iter().flat_map(|(decided, _)| &decided.commit.checkpoints) {
        edits.push(site.at(&edit.at)?);
    }
    let edits = edits.iter().map(|at| (at, at.key.path.parent()));
    sync_all(ats.into_iter().chain(edits))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{At, Departure, Result, changed_as_it_went, changed_meanwhile, put_aside};
    use crate::backend::Backend;
    use crate::backend::faulty::{Faulty, Lasting};
    use crate::backend::memory::MemoryStore;
    use crate::chain::graph::Key;
    use crate::change::record::{Mark, Place, Stub};
    use crate::change::stub::stand_in;
    use crate::change::trial::{STORES, path, write};

    const EIO: i32 = 5;
    const EDIT: &[u8] = b"edited by others";

    fn made(store: &dyn Backend, name: &str) -> Mark {
        write(store, name, name.as_bytes())
    }

    fn holds_edit(store: &dyn Backend, name: &str) -> bool {
        let Ok(file) = store.open(&path(name)) else { return false };
        let mut bytes = vec![0; EDIT.len()];
        let length = usize::try_from(file.stat().unwrap().length).unwrap();
        length >= EDIT.len() && file.read_at(0, &mut bytes).is_ok() && bytes == EDIT
    }

    /// Who writes into the member, or puts another file in its place; true if there was one to be met.
    fn meddle(store: &dyn Backend, replaces: bool) -> bool {
        let name = if replaces { "other" } else { "m" };
        if store.stat(&path("m")).is_err() {
            return false;
        }
        let file = if replaces { store.create(&path(name)) } else { store.open_writable(&path(name)) };
        file.unwrap().write_at(0, EDIT).unwrap();
        !replaces || store.rename(&path(name), &path("m")).is_ok()
    }

    fn departure(store: &dyn Backend, stub: bool) -> Departure {
        store.create_dir(&path("trash"), true).unwrap();
        let stub = stub.then(|| Stub { from: path("stub"), mark: made(store, "stub") });
        let place = Place { store: "s".to_owned(), path: path("m") };
        let (after, checkpoint) = (Vec::new(), None);
        let (mark, kept) = (made(store, "m"), path("trash/m"));
        Departure { at: place, mark, kept, after, checkpoint, becomes: None, allocated_bytes: 0, stub }
    }

    fn go(at: &At<'_>, departure: &Departure) -> Result<bool> {
        match &departure.stub {
            Some(stub) => stand_in(at, departure, stub),
            None => put_aside(at, &departure.at.path, &departure.kept, |found| departure.is(found)),
        }
    }

    /// Others act right before one call of a departure, and whoever does it dies at a later one. What they wrote has
    /// the name in the end. Gives how often they acted.
    fn met(stores: fn() -> MemoryStore, stub: bool, replaces: bool) -> u64 {
        let mut met = 0;
        for (meets, dies) in (0..8).flat_map(|meets| (meets..12).map(move |dies| (meets, dies))) {
            let memory = Arc::new(stores());
            let departure = departure(memory.as_ref(), stub);
            let faulty = Faulty::new(Arc::clone(&memory) as Arc<dyn Backend>);
            let (acted, other) = (Arc::new(std::sync::OnceLock::new()), Arc::clone(&memory));
            let note = Arc::clone(&acted);
            faulty.before_mutation(meets, move || note.set(meddle(other.as_ref(), replaces)).unwrap());
            faulty.fail_at(dies, EIO, Lasting::Dead);
            let key = Key { store: 0, path: path("m") };
            let first = At { backend: &faulty, key: key.clone(), name: "m".to_owned() };
            let done = go(&first, &departure);
            if done.is_ok() && acted.get() == Some(&true) {
                assert!(holds_edit(memory.as_ref(), "m"), "{stub} {replaces} {meets}: recovery has to do it");
            }
            // As recovery does it.
            let at = At { backend: memory.as_ref(), key, name: "m".to_owned() };
            if changed_as_it_went(&at, &departure).unwrap() {
                changed_meanwhile(&at, &departure).unwrap();
            } else if done.is_err() {
                go(&at, &departure).unwrap();
            }
            if acted.get() == Some(&true) {
                met += 1;
                let places = ["m", "trash/m", "stub"].map(|name| (name, holds_edit(memory.as_ref(), name)));
                assert!(holds_edit(memory.as_ref(), "m"), "{stub} {replaces} {meets} {dies}: {places:?}");
            }
        }
        met
    }

    #[test]
    fn what_others_write_as_a_name_goes_keeps_it() {
        for store in STORES {
            for (stub, replaces) in [(false, false), (false, true), (true, false), (true, true)] {
                let met = met(store, stub, replaces);
                assert!(met >= 8, "they were met {met} times only");
            }
        }
    }
}
