//! Checkpoint files that follow a change: libvirt refuses to redefine a checkpoint whose parent is gone, so
//! every file of the volume that names a deleted member as parent must name another.

use std::collections::BTreeMap;
use std::iter;
use std::sync::Arc;

use crate::backend::publish::{link, swap, take_identity, take_name};
use crate::backend::{Backend, BackendError, FileKind, StoreFile};
use crate::chain::graph::Key;
use crate::change::decided::Decided;
use crate::change::error::{ChangeError, Result};
use crate::change::keep::{Kept, keep, name_if_free, release, sync_all};
use crate::change::operation::Operation;
use crate::change::publication::{Published, stat};
use crate::change::record::{CheckpointEdit, Mark};
use crate::change::site::{At, Site};
use crate::change::yard::Yard;
use crate::cloudstack::checkpoint::{Checkpoint, MAX_BYTES, set_parent};
use crate::ids::StorePath;
use crate::store::Stores;
use crate::store::facts::read_whole;

/// How often an edit is tried when the file changes under it: the agent rewrites disk labels there, once a VM
/// start.
const TRIES: usize = 5;

/// A volume's directory of checkpoint files, and what becomes of parents that are named there: by the name of
/// a deleted member, the name of the parent that takes its place.
pub type Volumes = BTreeMap<Key, BTreeMap<String, Option<String>>>;

/// Works out which checkpoint files name a deleted member. `own` are those of the deleted members, which go
/// themselves; `needed` are those of the survivors. Another file that cannot be read is passed over: libvirt
/// cannot read it either. With `force` so are those.
///
/// # Errors
///
/// [`ChangeError::Checkpoint`] for a survivor's file that cannot be read, and one that cannot be edited.
pub fn edits(
    stores: &Stores,
    volumes: &Volumes,
    own: &[Key],
    needed: &[Key],
    force: bool,
) -> Result<Vec<(Key, Edit)>> {
    let mut edits = Vec::new();
    for (directory, parents) in volumes {
        let backend = stores.get(directory.store)?.backend();
        let mut entries = match backend.read_dir(&directory.path) {
            Ok(entries) => entries,
            Err(BackendError::NotFound { .. }) => continue,
            Err(source) => return Err(failed("list", &directory.path, source)),
        };
        entries.retain(|entry| entry.kind == FileKind::File);
        let mut paths: Vec<StorePath> =
            entries.iter().filter_map(|entry| entry.path_in(&directory.path)).collect();
        paths.sort();
        for path in paths {
            let key = Key { store: directory.store, path };
            if own.contains(&key) {
                continue;
            }
            match edit_of(backend, &key.path, parents) {
                Ok(Some(edit)) => edits.push((key, edit)),
                Ok(None) => {}
                Err(ChangeError::Checkpoint { .. }) if force || !needed.contains(&key) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(edits)
}

/// Works out the edit that leaves one checkpoint file without a parent; `None` if it has none, or is not there. With
/// `force` one that cannot be edited is passed over.
///
/// # Errors
///
/// [`ChangeError::Checkpoint`] for a file that cannot be read as libvirt's, or not be edited.
pub fn orphan(stores: &Stores, file: &Key, force: bool) -> Result<Option<Edit>> {
    match edit_with(stores.get(file.store)?.backend(), &file.path, |_| Some(None)) {
        Err(ChangeError::Checkpoint { .. }) if force => Ok(None),
        edit => edit,
    }
}

/// One edit: from one parent to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    /// The parent named so far.
    pub before: Option<String>,
    /// The parent wanted.
    pub parent: Option<String>,
}

fn edit_of(
    backend: &Arc<dyn Backend>,
    path: &StorePath,
    parents: &BTreeMap<String, Option<String>>,
) -> Result<Option<Edit>> {
    edit_with(backend, path, |named| parents.get(named).cloned())
}

/// The edit of a file that names a parent which `becomes` another, or none.
fn edit_with(
    backend: &Arc<dyn Backend>,
    path: &StorePath,
    becomes: impl Fn(&str) -> Option<Option<String>>,
) -> Result<Option<Edit>> {
    let fail = |source| ChangeError::Checkpoint { path: path.to_string(), source };
    let bytes = match read_whole(backend, path, MAX_BYTES as u64) {
        Ok(bytes) => bytes,
        Err(BackendError::NotFound { .. }) => return Ok(None),
        Err(source) => return Err(failed("read", path, source)),
    };
    let before = Checkpoint::parse(&bytes).map_err(fail)?.parent;
    let Some(parent) = before.as_deref().and_then(becomes) else { return Ok(None) };
    set_parent(&bytes, parent.as_deref()).map_err(fail)?;
    Ok(Some(Edit { before, parent }))
}

/// An edit as the record has it. `after` is the publication that it follows, if it follows just one.
pub fn record(
    operation: &Operation<'_>,
    key: &Key,
    edit: Edit,
    what: &str,
    after: Option<usize>,
) -> Result<CheckpointEdit> {
    let Edit { before, parent } = edit;
    let kept = operation.kept(key, what)?;
    Ok(CheckpointEdit { at: operation.site().place(key)?, after, parent, before, kept, original: None })
}

/// Makes all checkpoint files of a decision name their new parents. Their names are durable when the caller
/// has synced the directories, which this does too.
pub fn follow_all(site: &Site<'_>, decided: &Decided<'_>, published: &[Published]) -> Result<()> {
    let mut followed = Vec::new();
    for (index, edit) in decided.commit().checkpoints.iter().enumerate() {
        let wanted = match edit.after {
            Some(after) => published.get(after) == Some(&Published::Done),
            None => published.iter().all(|one| *one == Published::Done),
        };
        if wanted {
            let at = site.at(&edit.at)?;
            if follow(&at, decided, edit, index)? {
                followed.push(at);
            }
        }
    }
    // A deletion without grace syncs these directories when the deleted members' own files are gone.
    let later = decided.commit().grace_ns == 0 && !decided.commit().departures.is_empty();
    let directories = followed.iter().filter(|_| !later).map(|at| (at, at.key.path.parent()));
    sync_all(directories)
}

/// One edit. Edits made by others meanwhile are kept: the file is compared before and after its name changes
/// hands, and edited again if it changed. Gives whether anything was done.
fn follow(at: &At<'_>, decided: &Decided<'_>, edit: &CheckpointEdit, index: usize) -> Result<bool> {
    let path = &edit.at.path;
    for _ in 0..TRIES {
        // An instance that was stopped for long may come too late: what was undone stays undone.
        if decided.is_undone()? {
            return Ok(false);
        }
        let old = match at.backend.open(path) {
            Ok(file) => file,
            Err(BackendError::NotFound { .. }) => return Ok(false),
            Err(source) => return Err(at.failed("read")(source)),
        };
        let (bytes, mark) = content(at, old.as_ref())?;
        let fail = |source| ChangeError::Checkpoint { path: path.to_string(), source };
        // One that names another parent by now is somebody else's business.
        let named = Checkpoint::parse(&bytes).map_err(fail)?.parent;
        if named != edit.parent && named != edit.before {
            return Ok(false);
        }
        // A later operation was about this file: what it says is that one's business, however it looks.
        if decided.is_overtaken(&edit.at)? {
            return Ok(false);
        }
        if named == edit.parent {
            if !bring_back_unseen(at, decided, edit, index, (&bytes, &mark))? {
                return Ok(false);
            }
            continue;
        }
        if keep(at, path, &edit.kept, &mark)? == Kept::Another {
            // From an earlier attempt, which the file outlived.
            release(at, &edit.kept)?;
            if keep(at, path, &edit.kept, &mark)? == Kept::Another {
                continue;
            }
        }
        let from = if let Some(original) = original(at, edit, &bytes)? {
            original
        } else {
            let new = set_parent(&bytes, edit.parent.as_deref()).map_err(fail)?;
            match stage(at, decided, edit, index, &new, old.as_ref())? {
                Some(temporary) => temporary,
                // Another instance is at it.
                None => continue,
            }
        };
        if exchange(at, decided, edit, &from, (&bytes, &mark))? {
            return Ok(true);
        }
    }
    Err(ChangeError::ChangedMeanwhile { member: at.name.clone() })
}

/// Gives a file its name back that an earlier run took from it and died before it looked: somebody had written into it, or
/// put it there, at that very moment. The edit is made on that, then. Gives whether there was one.
fn bring_back_unseen(
    at: &At<'_>,
    decided: &Decided<'_>,
    edit: &CheckpointEdit,
    index: usize,
    (now, now_mark): (&[u8], &Mark),
) -> Result<bool> {
    let take_back = |from: &StorePath| {
        take_name(at.backend, from, &edit.at.path).map_err(at.failed("take back")).map(|()| true)
    };
    let is = |bytes: &[u8], parent: &Option<String>, other: &[u8]| {
        set_parent(bytes, parent.as_deref()).is_ok_and(|edited| edited == other)
    };
    // Nothing is lost of what the present file is just an edit of.
    let differs = |found: &[u8]| !is(found, &edit.parent, now) && !is(now, &edit.before, found);
    let unedited = |found: &[u8]| Checkpoint::parse(found).is_ok_and(|found| found.parent == edit.before);
    let exchanged = temporary(at, decided, edit, index, now)?;
    if let Some((found, _)) = read(at, &exchanged)?
        && unedited(&found)
    {
        return if differs(&found) { take_back(&exchanged) } else { Ok(false) };
    }
    // Without such a name to tell, the one that was written last: by its owner, or too late.
    let later = |mark: &Mark| mark.modified_ns > now_mark.modified_ns;
    if let Some(original) = &edit.original
        && let Some((found, mark)) = read(at, original)?
        && unedited(&found)
        && differs(&found)
        && later(&mark)
    {
        return take_back(original);
    }
    match read(at, &edit.kept)? {
        Some((kept, mark)) if differs(&kept) && later(&mark) => {
            let temporary = temporary(at, decided, edit, index, &kept)?;
            release(at, &temporary)?;
            link(at.backend, &edit.kept, &temporary).map_err(at.failed("take back"))?;
            take_back(&temporary)
        }
        _ => Ok(false),
    }
}

/// A file's bytes, if it is there.
fn read(at: &At<'_>, name: &StorePath) -> Result<Option<(Vec<u8>, Mark)>> {
    match at.backend.open(name) {
        Ok(file) => content(at, file.as_ref()).map(Some),
        Err(BackendError::NotFound { .. }) => Ok(None),
        Err(source) => Err(at.failed("read")(source)),
    }
}

/// Writes an edited file and gives it the name that tells its bytes. That name all instances have in common: one that was
/// stopped may go on with it after another one made it anew, so it never stands for a file that is not whole. `None` if
/// another instance has it for something else just now.
fn stage(
    at: &At<'_>,
    decided: &Decided<'_>,
    edit: &CheckpointEdit,
    index: usize,
    new: &[u8],
    old: &dyn StoreFile,
) -> Result<Option<StorePath>> {
    let yard = yard(at, edit)?;
    let temporary = shared(&yard, decided, index, new);
    let unique = format!("staged-{index}-{:032x}", decided.site.clock.unique());
    let own = yard.temporary(decided.id(), &unique);
    write(at, &own, new, old)?;
    release(at, &temporary)?;
    name_if_free(at, &own, &temporary, "make a temporary for")?;
    release(at, &own)?;
    Ok(read(at, &temporary)?.is_some_and(|(found, _)| found == new).then_some(temporary))
}

/// The name of an edited file before it has its place. It tells the file's bytes: whoever finds another file there after
/// a crash knows whether the edited one still has the other name.
fn temporary(
    at: &At<'_>,
    decided: &Decided<'_>,
    edit: &CheckpointEdit,
    index: usize,
    bytes: &[u8],
) -> Result<StorePath> {
    Ok(shared(&yard(at, edit)?, decided, index, bytes))
}

fn yard(at: &At<'_>, edit: &CheckpointEdit) -> Result<Yard> {
    Yard::of(at.backend, &edit.at.path).map_err(at.failed("make room beside"))
}

fn shared(yard: &Yard, decided: &Decided<'_>, index: usize, bytes: &[u8]) -> StorePath {
    let hash = blake3::hash(bytes).to_hex();
    let hash = hash.get(..16).unwrap_or_default();
    yard.temporary(decided.id(), &format!("checkpoint-{index}-{hash}"))
}

/// The file that an earlier edit replaced, if the present one is just what that edit made of it: then it comes
/// back as it was, to the last attribute.
fn original(at: &At<'_>, edit: &CheckpointEdit, bytes: &[u8]) -> Result<Option<StorePath>> {
    let Some(kept) = &edit.original else { return Ok(None) };
    let Some((old, _)) = read(at, kept)? else { return Ok(None) };
    let names = Checkpoint::parse(&old).is_ok_and(|old| old.parent == edit.parent);
    let same = set_parent(&old, edit.before.as_deref()).is_ok_and(|edited| edited == bytes);
    Ok((names && same).then(|| kept.clone()))
}

/// Gives the checkpoint file's name the file at `from`; false if what had the name was no longer what was read, or the
/// operation was taken back just then.
fn exchange(
    at: &At<'_>,
    decided: &Decided<'_>,
    edit: &CheckpointEdit,
    from: &StorePath,
    (read, mark): (&[u8], &Mark),
) -> Result<bool> {
    let path = &edit.at.path;
    let unchanged = |name: &StorePath| -> Result<bool> {
        match at.backend.open(name) {
            Ok(file) => Ok(content(at, file.as_ref())?.0 == read),
            Err(BackendError::NotFound { .. }) => Ok(false),
            Err(source) => Err(at.failed("read")(source)),
        }
    };
    if !unchanged(path)? {
        release(at, from)?;
        return Ok(false);
    }
    let Some(new) = stat(at, from)? else { return Ok(false) };
    match swap(at.backend, from, path) {
        Ok(()) => {
            if unchanged(from)? && !decided.is_undone()? {
                release(at, from)?;
                return Ok(true);
            }
            if stat(at, path)?.is_some_and(|now| now.id == new.id) {
                swap(at.backend, from, path).map_err(at.failed("take back"))?;
                release(at, from)?;
            }
            Ok(false)
        }
        Err(error) if error.is_unsupported() => {
            // An undo may have come and gone: the name is its file's again, which looks as it did.
            if decided.is_undone()? || !take_over(at, decided, edit, from, mark, unchanged)? {
                release(at, from)?;
                return Ok(false);
            }
            Ok(true)
        }
        Err(BackendError::NotFound { .. }) => {
            release(at, from)?;
            Ok(false)
        }
        Err(source) => Err(at.failed("publish")(source)),
    }
}

/// As [`exchange`], where names cannot be exchanged. What had the name is at hand meanwhile under one that only this process
/// knows: the kept one goes with an undo.
fn take_over(
    at: &At<'_>,
    decided: &Decided<'_>,
    edit: &CheckpointEdit,
    from: &StorePath,
    mark: &Mark,
    unchanged: impl Fn(&StorePath) -> Result<bool>,
) -> Result<bool> {
    let path = &edit.at.path;
    let yard = Yard::of(at.backend, path).map_err(at.failed("make room beside"))?;
    let held = yard.temporary(decided.id(), &format!("held-{:032x}", decided.site.clock.unique()));
    // Whoever comes after a power cut looks at the kept one for what was written at that very moment.
    sync_all(iter::once((at, edit.kept.parent())))?;
    // The last look is one at the name: a file that was put there meanwhile would be gone for good.
    match keep(at, path, &held, mark)? {
        Kept::Here => {}
        Kept::Impossible if stat(at, path)?.is_some_and(|now| mark.is(&now)) => {}
        Kept::Impossible | Kept::Another => return Ok(false),
    }
    match take_name(at.backend, from, path) {
        // Written into at that very moment: the next attempt starts from what was written.
        Ok(()) if stat(at, &held)?.is_some() && (!unchanged(&held)? || decided.is_undone()?) => {
            take_name(at.backend, &held, path).map_err(at.failed("take back"))?;
            return Ok(false);
        }
        Ok(()) => {}
        // Whoever took this operation over has swept it.
        Err(BackendError::NotFound { .. }) => {
            release(at, &held)?;
            return Ok(false);
        }
        Err(source) => return Err(at.failed("publish")(source)),
    }
    release(at, &held)?;
    Ok(true)
}

fn write(at: &At<'_>, temporary: &StorePath, bytes: &[u8], old: &dyn StoreFile) -> Result<()> {
    let file = at.backend.create(temporary).map_err(at.failed("make a temporary for"))?;
    file.write_at(0, bytes).map_err(at.failed("write the new file of"))?;
    take_identity(old, file.as_ref()).map_err(at.failed("give owner and attributes to"))?;
    file.sync().map_err(at.failed("make durable the new file of"))
}

fn content(at: &At<'_>, file: &dyn StoreFile) -> Result<(Vec<u8>, Mark)> {
    let stat = file.stat().map_err(at.failed("look at"))?;
    let mut bytes = vec![0; usize::try_from(stat.length.min(MAX_BYTES as u64 + 1)).unwrap_or_default()];
    let count = file.read_at(0, &mut bytes).map_err(at.failed("read"))?;
    bytes.truncate(count);
    Ok((bytes, Mark::from(&stat)))
}

fn failed(action: &'static str, path: &StorePath, source: BackendError) -> ChangeError {
    ChangeError::Store { action, member: path.to_string(), source }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{edit_with, follow_all, read_whole};
    use crate::backend::Backend;
    use crate::backend::faulty::{Call, Faulty, Lasting};
    use crate::backend::memory::MemoryStore;
    use crate::change::decided::Decided;
    use crate::change::journal::Journal;
    use crate::change::operation::new_claim;
    use crate::change::places::IntentName;
    use crate::change::record::{CheckpointEdit, Decision, OperationId, Purpose, TreeId};
    use crate::change::trial::{STORES, commit, on, opted_in, path, place, write};

    const FILE: &str = "checkpoints/2/7/m2";
    const XML: &[u8] =
        b"<domaincheckpoint>\n  <name>m2</name>\n  <parent><name>m1</name></parent>\n</domaincheckpoint>\n";

    fn parent(backend: &Arc<dyn Backend>) -> Option<String> {
        edit_with(backend, &path(FILE), |_| Some(None)).unwrap().and_then(|edit| edit.before)
    }

    const STAMPED: &[u8] = b"<domaincheckpoint>\n  <name>m2</name>\n  <parent><name>m1</name></parent>\n  <stamp/>\n</domaincheckpoint>\n";

    fn name() -> IntentName {
        IntentName { tree: TreeId::of(1), generation: 1, operation: OperationId::of(7) }
    }

    /// A store with the file.
    fn made(store: fn() -> MemoryStore) -> Arc<MemoryStore> {
        let memory = store();
        for directory in ["checkpoints", "checkpoints/2", "checkpoints/2/7"] {
            memory.create_dir(&path(directory), false).unwrap();
            memory.sync_dir(&path(directory).parent()).unwrap();
        }
        let memory = opted_in(memory);
        write(memory.as_ref(), FILE, XML);
        Journal::new(&(Arc::clone(&memory) as Arc<dyn Backend>)).settle(&name().tree).unwrap();
        memory
    }

    /// An instance makes the file name another parent.
    fn follow(backend: &Arc<dyn Backend>) -> crate::change::Result<()> {
        let edit = CheckpointEdit {
            at: place(FILE),
            after: None,
            parent: Some("m0".to_owned()),
            before: Some("m1".to_owned()),
            kept: path(&format!(".qchain/trash/{}.0.checkpoint", name().operation)),
            original: None,
        };
        on(backend, |site| {
            let decision = Decision::Commit(commit(Purpose::Delete, vec![edit]));
            let claim = new_claim(site, &name(), Vec::new(), decision);
            let decided = Decided::new(site, 0, name(), claim, None).unwrap();
            follow_all(site, &decided, &[])
        })
    }

    /// The mutating calls that give the file's name another file, or try to.
    fn edits(faulty: &Faulty) -> Vec<u64> {
        let edits = |made: &Call| made.path == path(FILE) && matches!(made.name, "exchange" | "rename");
        faulty.trace().iter().filter(|made| edits(made)).filter_map(|made| made.mutation).collect()
    }

    /// The undo is decided right before a call; it edits the file back only when it comes to that.
    #[test]
    fn an_edit_of_what_was_taken_back_does_not_last() {
        for (kind, store) in STORES.into_iter().enumerate() {
            let mut late = 0;
            for call in 0.. {
                let memory = made(store);
                let calm = Arc::clone(&memory) as Arc<dyn Backend>;
                let faulty = Arc::new(Faulty::new(Arc::clone(&calm)));
                let by = Arc::clone(&calm);
                faulty.before_mutation(call, move || {
                    let purpose = Purpose::Undo { operation: name().operation, generation: 1 };
                    let decision = Decision::Commit(commit(purpose, Vec::new()));
                    let undo = IntentName { generation: 2, operation: OperationId::of(8), ..name() };
                    on(&by, |site| {
                        Journal::new(&by).decide(&new_claim(site, &undo, Vec::new(), decision)).unwrap();
                    });
                });
                follow(&(Arc::clone(&faulty) as Arc<dyn Backend>)).unwrap();
                if faulty.mutations() <= call {
                    assert_eq!(parent(&calm).as_deref(), Some("m0"), "store {kind}, undisturbed");
                    break;
                }
                // Later than that it is the undo's to see. Where the old file has no second name, so it is once it is tried.
                let edits = edits(&faulty);
                let ends = if kind < 3 { edits.last() } else { edits.first() };
                if ends.is_none_or(|ends| call <= *ends) {
                    late += 1;
                    assert_eq!(parent(&calm).as_deref(), Some("m1"), "store {kind}, {call}");
                }
            }
            assert!(late > 2, "store {kind}: {late}");
        }
    }

    /// The agent writes into the file right before a call, for good, and the power goes after another one, or not at all.
    #[test]
    fn what_its_owner_writes_as_it_is_edited_is_there_in_the_end() {
        // Without a second name nor exchange nobody can see what is written at the moment of the rename.
        for (kind, store) in STORES.into_iter().enumerate().take(3) {
            let mut met = 0;
            for call in 0.. {
                let mut calls = 0;
                for (later, seed) in (0..5).flat_map(|later| (0..24).map(move |seed| (later, seed))) {
                    let memory = made(store);
                    let calm = Arc::clone(&memory) as Arc<dyn Backend>;
                    let faulty = Arc::new(Faulty::new(Arc::clone(&calm)));
                    let other = Arc::clone(&memory);
                    faulty.before_mutation(call, move || {
                        let named =
                            edit_with(&(Arc::clone(&other) as Arc<dyn Backend>), &path(FILE), |_| Some(None));
                        // As it stands, with something more.
                        let parent = named.unwrap().and_then(|edit| edit.before).unwrap();
                        let text = String::from_utf8(STAMPED.to_vec()).unwrap().replace("m1", &parent);
                        let file = other.open_writable(&path(FILE)).unwrap();
                        file.set_length(0).unwrap();
                        file.write_at(0, text.as_bytes()).unwrap();
                        file.sync().unwrap();
                        other.sync_dir(&path(FILE).parent()).unwrap();
                    });
                    if later > 0 {
                        faulty.fail_at(call + later, 5, Lasting::Dead);
                    }
                    let done = follow(&(Arc::clone(&faulty) as Arc<dyn Backend>));
                    calls = faulty.mutations();
                    if later > 0 && done.is_err() {
                        memory.crash_seeded(seed);
                        follow(&calm).unwrap();
                    }
                    let held = read_whole(&calm, &path(FILE), 4096).unwrap();
                    let held = String::from_utf8_lossy(&held).into_owned();
                    let context = format!("store {kind}, {call}, {later} later, {seed}: {held}");
                    assert!(held.contains("<stamp/>") || calls <= call, "{context}");
                    assert_eq!(parent(&calm).as_deref(), Some("m0"), "{context}");
                    met += u32::from(calls > call);
                }
                if calls <= call {
                    break;
                }
            }
            assert!(met > 100, "store {kind}: {met}");
        }
    }
}
