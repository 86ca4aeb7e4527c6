//! What every store must do: the contracts of [`Backend`] and [`StoreFile`], as cases.
//!
//! A case works in a directory of its own below the root and removes it when it passes. It answers with a
//! sentence if the store is at fault, so that the suite can also be run against a store in use.

mod optional;

use std::fmt::Debug;
use std::sync::Arc;

use super::publish;
use super::{
    Backend, BackendError, FileKind, Identity, LockKind, Means, Move, Moved, Result as StoreResult, StoreFile,
};
use crate::ids::StorePath;

/// What a case answers: what is wrong, if anything.
pub type Outcome = Result<(), String>;

/// A case: a store in, an outcome out.
pub type Case = fn(&Arc<dyn Backend>) -> Outcome;

/// All cases that every store passes in full, by name; those of what a store may lack are apart.
const CASES: &[(&str, Case)] = &[
    ("create-is-exclusive", create_is_exclusive),
    ("missing-is-not-found", missing_is_not_found),
    ("only-plain-files-open", only_plain_files_open),
    ("reads-and-writes", reads_and_writes),
    ("read-only-files-refuse-writes", read_only_files_refuse_writes),
    ("length-can-be-set", length_can_be_set),
    ("names-move-and-multiply", names_move_and_multiply),
    ("same-file-rename-keeps-both-names", same_file_rename_keeps_both_names),
    ("directories-list-and-walk", directories_list_and_walk),
    ("removed-files-stay-open", removed_files_stay_open),
    ("copies-move-runs", copies_move_runs),
    ("past-the-source-is-zeros", past_the_source_is_zeros),
    ("clones-move-runs-or-refuse", clones_move_runs_or_refuse),
    ("identity-is-taken-over", identity_is_taken_over),
    ("locks-exclude", locks_exclude),
    ("probe-leaves-nothing", probe_leaves_nothing),
    ("sync-succeeds", sync_succeeds),
    ("publish-replaces", publish_replaces),
    ("publish-of-one-file-by-two-names", publish_of_one_file_by_two_names),
    ("write-new-is-exclusive", write_new_is_exclusive),
    ("replace-keeps-identity", replace_keeps_identity),
];

/// Runs all cases and tells which failed, and why.
#[must_use]
pub fn check(backend: &Arc<dyn Backend>) -> Vec<(&'static str, String)> {
    let run = |&(name, case): &(&'static str, Case)| Some((name, case(backend).err()?));
    CASES.iter().chain(optional::CASES).filter_map(run).collect()
}

/// A directory for one case.
struct Room<'b> {
    backend: &'b Arc<dyn Backend>,
    directory: StorePath,
}

impl<'b> Room<'b> {
    fn new(backend: &'b Arc<dyn Backend>) -> Result<Self, String> {
        let name = format!("conformance-{}", publish::temporary_name());
        let directory = StorePath::root().join(&name).map_err(|error| error.to_string())?;
        backend.create_dir(&directory, true).map_err(told)?;
        Ok(Self { backend, directory })
    }

    fn path(&self, text: &str) -> Result<StorePath, String> {
        StorePath::parse(&format!("{}/{text}", self.directory)).map_err(|error| error.to_string())
    }

    fn file(&self, name: &str, bytes: &[u8]) -> Result<Arc<dyn StoreFile>, String> {
        let file = self.backend.create(&self.path(name)?).map_err(told)?;
        file.write_at(0, bytes).map_err(told)?;
        Ok(file)
    }

    /// Removes all that is left; an error here is one of the store's.
    fn leave(self) -> Outcome {
        for entry in self.backend.walk(&self.directory, 16, &|_| false).into_iter().rev() {
            let entry = entry.map_err(told)?;
            let path = entry.path?;
            if entry.kind == FileKind::Directory {
                self.backend.remove_dir(&path).map_err(told)?;
            } else {
                self.backend.remove_file(&path).map_err(told)?;
            }
        }
        self.backend.remove_dir(&self.directory).map_err(told)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is an argument of map_err")]
fn told(error: BackendError) -> String {
    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
    format!("{error}{cause}")
}

#[expect(clippy::needless_pass_by_value, reason = "most values are made for the comparison")]
fn same<T: PartialEq + Debug>(what: &str, is: T, wanted: T) -> Outcome {
    if is == wanted { Ok(()) } else { Err(format!("{what} is {is:?}, not {wanted:?}")) }
}

/// Holds if the call failed in the way that `fits`.
fn fails<T>(what: &str, outcome: StoreResult<T>, fits: fn(&BackendError) -> bool) -> Outcome {
    match outcome {
        Err(error) if fits(&error) => Ok(()),
        Err(error) => Err(format!("{what} failed with {error:?}")),
        Ok(_) => Err(format!("{what} succeeded")),
    }
}

fn missing(error: &BackendError) -> bool {
    matches!(error, BackendError::NotFound { .. })
}

fn taken(error: &BackendError) -> bool {
    matches!(error, BackendError::AlreadyExists { .. })
}

fn not_plain(error: &BackendError) -> bool {
    matches!(error, BackendError::NotPlain { .. })
}

fn any(_: &BackendError) -> bool {
    true
}

fn contents(file: &dyn StoreFile) -> Result<Vec<u8>, String> {
    let length = usize::try_from(file.stat().map_err(told)?.length).map_err(|error| error.to_string())?;
    let mut bytes = vec![0xEE; length + 1];
    let count = file.read_at(0, &mut bytes).map_err(told)?;
    same("the count of bytes read", count, length)?;
    bytes.truncate(count);
    Ok(bytes)
}

fn create_is_exclusive(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let path = room.path("a")?;
    let file = backend.create(&path).map_err(told)?;
    let stat = file.stat().map_err(told)?;
    same("a new file's mode", stat.mode, 0o600)?;
    same("a new file's length", stat.length, 0)?;
    same("its kind", stat.kind, FileKind::File)?;
    same("its names", stat.links, 1)?;
    same("its id by name", backend.stat(&path).map_err(told)?.id, stat.id)?;
    same("its path", file.path(), &path)?;
    fails("a second create", backend.create(&path), taken)?;
    fails("a directory over a file", backend.create_dir(&path, true), taken)?;
    fails("a file over a directory", backend.create(&room.directory), taken)?;
    room.leave()
}

fn missing_is_not_found(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let (none, below, other) = (room.path("none")?, room.path("none/below")?, room.path("other")?);
    fails("open", backend.open(&none), missing)?;
    fails("open_writable", backend.open_writable(&none), missing)?;
    fails("stat", backend.stat(&none), missing)?;
    fails("stat below", backend.stat(&below), missing)?;
    fails("create below", backend.create(&below), missing)?;
    fails("create_dir below", backend.create_dir(&below, false), missing)?;
    fails("read_dir", backend.read_dir(&none), missing)?;
    fails("remove_file", backend.remove_file(&none), missing)?;
    fails("remove_dir", backend.remove_dir(&none), missing)?;
    fails("rename", backend.rename(&none, &other), missing)?;
    fails("hard_link", backend.hard_link(&none, &other), missing)?;
    fails("sync_dir", backend.sync_dir(&none), missing)?;
    room.file("file", b"x")?;
    fails("open below a file", backend.open(&room.path("file/x")?), missing)?;
    fails("stat below a file", backend.stat(&room.path("file/x/y")?), missing)?;
    fails("create below a file", backend.create(&room.path("file/x")?), missing)?;
    let mut walked = backend.walk(&none, 3, &|_| false);
    same("the walk's items", walked.len(), 1)?;
    fails("walk", walked.pop().unwrap_or(Err(BackendError::NotPlain { path: String::new() })), missing)?;
    room.leave()
}

fn only_plain_files_open(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let directory = room.path("d")?;
    backend.create_dir(&directory, false).map_err(told)?;
    room.file("file", b"x")?;
    fails("open of a directory", backend.open(&directory), not_plain)?;
    fails("open_writable of a directory", backend.open_writable(&directory), not_plain)?;
    fails("remove_file of a directory", backend.remove_file(&directory), not_plain)?;
    fails("rename of a directory", backend.rename(&directory, &room.path("e")?), not_plain)?;
    fails("rename over a directory", backend.rename(&room.path("file")?, &directory), not_plain)?;
    fails("link of a directory", backend.hard_link(&directory, &room.path("e")?), not_plain)?;
    fails("open of the root", backend.open(&StorePath::root()), not_plain)?;
    fails("a new root", backend.create_dir(&StorePath::root(), true), taken)?;
    fails("read_dir of a file", backend.read_dir(&room.path("file")?), any)?;
    fails("remove_dir of a file", backend.remove_dir(&room.path("file")?), any)?;
    same("the kind", backend.stat(&directory).map_err(told)?.kind, FileKind::Directory)?;
    same("the root's kind", backend.stat(&StorePath::root()).map_err(told)?.kind, FileKind::Directory)?;
    room.leave()
}

fn reads_and_writes(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let file = room.file("a", b"hello")?;
    file.write_at(10_000, b"far").map_err(told)?;
    let mut wanted = vec![0; 10_003];
    wanted[..5].copy_from_slice(b"hello");
    wanted[10_000..].copy_from_slice(b"far");
    same("the bytes", contents(file.as_ref())? == wanted, true)?;
    let mut buffer = [0xEE; 8];
    same("a read over the end", file.read_at(9_999, &mut buffer).map_err(told)?, 4)?;
    same("its bytes", &buffer[..4], b"\0far")?;
    same("a read past the end", file.read_at(20_000, &mut buffer).map_err(told)?, 0)?;
    super::read_padded(file.as_ref(), 10_001, &mut buffer).map_err(told)?;
    same("a padded read", &buffer, b"ar\0\0\0\0\0\0")?;
    let again = backend.open(&room.path("a")?).map_err(told)?;
    same("the bytes by another open", contents(again.as_ref())? == wanted, true)?;
    file.write_at(50_000, b"").map_err(told)?;
    same("the length after an empty write", file.stat().map_err(told)?.length, 10_003)?;
    let before = file.stat().map_err(told)?;
    again.drop_cache().map_err(told)?;
    same("stat by two opens", again.stat().map_err(told)?.id, before.id)?;
    same("locks of nobody", file.image_locks().map_err(told)?.any, false)?;
    fails("a write at the end of all offsets", file.write_at(u64::MAX - 1, b"xy"), any)?;
    room.leave()
}

fn read_only_files_refuse_writes(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    room.file("a", b"hello")?;
    let file = backend.open(&room.path("a")?).map_err(told)?;
    fails("a write", file.write_at(0, b"x"), any)?;
    fails("a new length", file.set_length(0), any)?;
    file.sync().map_err(told)?;
    let writable = backend.open_writable(&room.path("a")?).map_err(told)?;
    writable.write_at(0, b"J").map_err(told)?;
    same("the bytes", contents(file.as_ref())?, b"Jello".to_vec())?;
    room.leave()
}

fn length_can_be_set(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let file = room.file("a", &[7; 6000])?;
    file.set_length(10).map_err(told)?;
    file.set_length(9000).map_err(told)?;
    let mut wanted = vec![7; 10];
    wanted.resize(9000, 0);
    same("bytes cut off and grown again", contents(file.as_ref())? == wanted, true)?;
    let large = 1 << 40;
    file.set_length(large).map_err(told)?;
    let stat = file.stat().map_err(told)?;
    same("a large length", stat.length, large)?;
    same("that it takes little space", stat.allocated_bytes < 1 << 20, true)?;
    room.leave()
}

fn names_move_and_multiply(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let (a, b, c) = (room.path("a")?, room.path("b")?, room.path("c")?);
    let file = room.file("a", b"a")?;
    let id = file.stat().map_err(told)?.id;
    let replaced = room.file("b", b"b")?.stat().map_err(told)?.id;
    same("that ids differ", id == replaced, false)?;
    let links = optional::has_links(&room)?;
    if links {
        backend.hard_link(&a, &c).map_err(told)?;
        same("the links", backend.stat(&c).map_err(told)?.links, 2)?;
        same("the linked id", backend.stat(&c).map_err(told)?.id, id)?;
        fails("a link over a name", backend.hard_link(&a, &b), taken)?;
    }
    backend.rename(&a, &b).map_err(told)?;
    same("the renamed id", backend.stat(&b).map_err(told)?.id, id)?;
    fails("stat of the old name", backend.stat(&a), missing)?;
    if links {
        backend.remove_file(&c).map_err(told)?;
    }
    same("the links left", file.stat().map_err(told)?.links, 1)?;
    same("the bytes", contents(backend.open(&b).map_err(told)?.as_ref())?, b"a".to_vec())?;
    backend.rename(&b, &a).map_err(told)?;
    same("a rename to a free name", backend.stat(&a).map_err(told)?.id, id)?;
    room.leave()
}

fn same_file_rename_keeps_both_names(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let (a, b) = (room.path("a")?, room.path("b")?);
    if !optional::has_links(&room)? {
        return room.leave();
    }
    room.file("a", b"a")?;
    backend.hard_link(&a, &b).map_err(told)?;
    backend.rename(&a, &b).map_err(told)?;
    same("the links", backend.stat(&a).map_err(told)?.links, 2)?;
    room.leave()
}

fn directories_list_and_walk(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    for name in ["b", "a", "a/y", "a/x", "skipped"] {
        backend.create_dir(&room.path(name)?, false).map_err(told)?;
    }
    for name in ["a/x/deep", "a/file", "c", "skipped/no"] {
        room.file(name, b"")?;
    }
    same("a directory's mode", backend.stat(&room.path("a")?).map_err(told)?.mode & 0o777, 0o755)?;
    same("a private one's", backend.stat(&room.directory).map_err(told)?.mode & 0o777, 0o700)?;
    let mut listed: Vec<_> = backend.read_dir(&room.directory).map_err(told)?;
    listed.sort_by(|left, right| left.name.cmp(&right.name));
    let listed: Vec<_> =
        listed.into_iter().map(|entry| (entry.name.unwrap_or_else(|text| text), entry.kind)).collect();
    let kinds = [("a", FileKind::Directory), ("b", FileKind::Directory), ("c", FileKind::File)];
    let mut wanted: Vec<_> = kinds.iter().map(|&(name, kind)| (name.to_owned(), kind)).collect();
    wanted.push(("skipped".to_owned(), FileKind::Directory));
    same("the names", listed, wanted)?;
    let skipped = room.path("skipped")?;
    let walk = |depth| -> Result<Vec<String>, String> {
        let found = backend.walk(&room.directory, depth, &|path| *path == skipped);
        let relative = |path: StorePath| path.as_str()[room.directory.as_str().len() + 1..].to_owned();
        found.into_iter().map(|entry| Ok(relative(entry.map_err(told)?.path?))).collect()
    };
    same("a walk of one level", walk(1)?, text(&["a", "b", "c", "skipped"]))?;
    same("a walk of two", walk(2)?, text(&["a", "a/file", "a/x", "a/y", "b", "c", "skipped"]))?;
    same("a walk of all", walk(9)?, text(&["a", "a/file", "a/x", "a/x/deep", "a/y", "b", "c", "skipped"]))?;
    same("a walk of none", walk(0)?, Vec::new())?;
    fails("remove_dir of a full directory", backend.remove_dir(&room.path("a")?), any)?;
    room.leave()
}

fn text(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

fn removed_files_stay_open(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let file = room.file("a", b"still here")?;
    backend.remove_file(&room.path("a")?).map_err(told)?;
    same("the bytes", contents(file.as_ref())?, b"still here".to_vec())?;
    same("the links", file.stat().map_err(told)?.links, 0)?;
    let new = room.file("a", b"new")?;
    same("that ids differ", new.stat().map_err(told)?.id == file.stat().map_err(told)?.id, false)?;
    room.leave()
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..=250).cycle().skip(usize::from(seed)).take(length).collect()
}

fn copies_move_runs(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let bytes = [pattern(3_000_000, 0), pattern(70_000, 101)];
    let sources = [room.file("a", &bytes[0])?, room.file("b", &bytes[1])?];
    let target = room.file("t", b"")?;
    // Out of order, neighbours, odd offsets, a piece larger than any buffer.
    let runs = [
        run(0, 2_900_000, 10, 100_000),
        run(1, 5, 1_000_003, 69_000),
        run(0, 0, 2_000_000, 2_500_000),
        run(0, 2_500_000, 4_500_000, 1),
    ];
    let moved = target.move_runs(&sources, &runs, Means::Copy).map_err(told)?;
    let mut wanted = vec![0; 4_500_001];
    for run in &runs {
        place(&mut wanted, &bytes[run.source], run);
    }
    same("the bytes", contents(target.as_ref())? == wanted, true)?;
    same("what was moved", moved, Moved { cloned_bytes: 0, copied_bytes: 2_669_001 })?;
    fails("a run of no source", target.move_runs(&sources, &[run(2, 0, 0, 1)], Means::Copy), any)?;
    fails("a run past all offsets", target.move_runs(&sources, &[run(0, u64::MAX, 0, 9)], Means::Copy), any)?;
    room.leave()
}

fn run(source: usize, from: u64, to: u64, length: u64) -> Move {
    Move { source, from, to, length }
}

/// What a run does to the bytes of its target.
fn place(target: &mut [u8], source: &[u8], run: &Move) {
    let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
    let into = &mut target[index(run.to)..index(run.to + run.length)];
    into.fill(0);
    for (byte, &from) in into.iter_mut().zip(source.iter().skip(index(run.from))) {
        *byte = from;
    }
}

fn past_the_source_is_zeros(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let bytes = pattern(10_000, 3);
    let sources = [room.file("a", &bytes)?];
    let mut wanted = vec![9; 30_000];
    let target = room.file("t", &wanted)?;
    let runs = [run(0, 8_192, 4_096, 8_192), run(0, 20_480, 16_384, 4_096), run(0, 9_000, 40_000, 5_000)];
    let moved = target.move_runs(&sources, &runs, Means::Copy).map_err(told)?;
    wanted.resize(45_000, 0);
    for run in &runs {
        place(&mut wanted, &bytes, run);
    }
    same("the bytes", contents(target.as_ref())? == wanted, true)?;
    same("what was moved", moved.copied_bytes, 1_808 + 1_000)?;
    room.leave()
}

fn clones_move_runs_or_refuse(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let can = backend.probe(&room.directory).map_err(told)?;
    let unit = if can.clone { can.clone_alignment } else { 4096 };
    same("the alignment", unit.is_power_of_two(), true)?;
    let block = usize::try_from(unit).map_err(|error| error.to_string())?;
    // The last block of the source is not full.
    let bytes = pattern(block * 9 + 77, 9);
    let sources = [room.file("a", &bytes)?];
    let mut wanted = vec![5; block * 30];
    let target = room.file("t", &wanted)?;
    let runs = [
        run(0, unit * 8, unit * 2, unit * 4),
        run(0, 0, unit * 10, unit * 2),
        run(0, unit * 2, unit * 12, unit),
    ];
    let outcome = target.move_runs(&sources, &runs, Means::Clone);
    if !can.clone {
        fails("a clone", outcome, |error| matches!(error, BackendError::CannotClone { .. }))?;
        return room.leave();
    }
    let moved = outcome.map_err(told)?;
    for run in &runs {
        place(&mut wanted, &bytes, run);
    }
    same("the bytes", contents(target.as_ref())? == wanted, true)?;
    same("what was moved", moved, Moved { cloned_bytes: unit * 4, copied_bytes: 77 })?;
    // The copies are apart from each other afterwards.
    sources[0].write_at(0, b"changed").map_err(told)?;
    same("the target's bytes", contents(target.as_ref())? == wanted, true)?;
    for odd in [run(0, 1, unit, unit), run(0, 0, unit + 1, unit), run(0, 0, 0, unit - 1)] {
        let outcome = target.move_runs(&sources, &[run(0, 0, 0, unit), odd], Means::Clone);
        fails("a clone out of line", outcome, |error| matches!(error, BackendError::CannotClone { .. }))?;
    }
    same("the bytes after refusals", contents(target.as_ref())? == wanted, true)?;
    let fresh = room.file("n", b"")?;
    let moved = fresh.move_runs(&sources, &[run(0, 0, 0, unit * 9 + 77)], Means::Clone).map_err(told)?;
    same("a whole file moved", moved, Moved { cloned_bytes: unit * 9, copied_bytes: 77 })?;
    same("its bytes", contents(fresh.as_ref())? == contents(sources[0].as_ref())?, true)?;
    room.leave()
}

/// A change of attributes that any store with attributes takes.
fn marked(identity: &Identity) -> Identity {
    let mut marked = Identity { mode: 0o640, ..identity.clone() };
    marked.attributes.push(("user.qchain-test".to_owned(), b"value\0with zero".to_vec()));
    marked.attributes.sort();
    marked
}

fn identity_is_taken_over(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let (old, new) = (room.file("old", b"")?, room.file("new", b"")?);
    let plain = new.identity().map_err(told)?;
    same("the mode of a new file", plain.mode, 0o600)?;
    let wanted = match old.set_identity(&marked(&plain)) {
        Ok(()) => marked(&plain),
        // No attributes here: owner and mode alone.
        Err(BackendError::Squashed { .. }) => Identity { mode: 0o640, ..plain.clone() },
        Err(error) => return Err(told(error)),
    };
    old.set_identity(&wanted).map_err(told)?;
    same("the identity read back", old.identity().map_err(told)?, wanted.clone())?;
    publish::take_identity(old.as_ref(), new.as_ref()).map_err(told)?;
    same("the identity taken over", new.identity().map_err(told)?, wanted)?;
    new.set_identity(&plain).map_err(told)?;
    same("the identity taken back", new.identity().map_err(told)?, plain)?;
    room.leave()
}

fn locks_exclude(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let path = room.path("lock")?;
    let first = backend.try_lock(&path, LockKind::Exclusive).map_err(told)?;
    same("a first lock", first.is_some(), true)?;
    same("a second", backend.try_lock(&path, LockKind::Exclusive).map_err(told)?.is_some(), false)?;
    drop(first);
    same(
        "one after it was freed",
        backend.try_lock(&path, LockKind::Exclusive).map_err(told)?.is_some(),
        true,
    )?;
    room.leave()
}

fn probe_leaves_nothing(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let found = backend.probe(&room.directory).map_err(told)?;
    same("that an alignment goes with clones", found.clone, found.clone_alignment != 0)?;
    same("probing twice", backend.probe(&room.directory).map_err(told)?, found)?;
    same("what it left", backend.read_dir(&room.directory).map_err(told)?.len(), 0)?;
    fails("probe of nothing", backend.probe(&room.path("none")?), missing)?;
    let space = backend.space().map_err(told)?;
    same("that there is space", space.total_bytes > 0 && space.free_bytes <= space.total_bytes, true)?;
    room.leave()
}

fn sync_succeeds(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    room.file("a", b"x")?.sync().map_err(told)?;
    backend.sync_dir(&room.directory).map_err(told)?;
    backend.sync_dir(&StorePath::root()).map_err(told)?;
    room.leave()
}

fn publish_replaces(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    backend.create_dir(&room.path("d")?, true).map_err(told)?;
    for round in ["first", "second"] {
        let id = room.file("t", round.as_bytes())?.stat().map_err(told)?.id;
        let target = room.path("d/target")?;
        publish::publish(backend.as_ref(), &room.path("t")?, &target).map_err(told)?;
        same("the id", backend.stat(&target).map_err(told)?.id, id)?;
        fails("the temporary", backend.stat(&room.path("t")?), missing)?;
    }
    room.file("t", b"third")?;
    let over = publish::publish(backend.as_ref(), &room.path("t")?, &room.path("d")?);
    fails("publishing over a directory", over, not_plain)?;
    let none = publish::publish(backend.as_ref(), &room.path("none")?, &room.path("d/target")?);
    fails("publishing nothing", none, missing)?;
    room.leave()
}

fn publish_of_one_file_by_two_names(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    if !optional::has_links(&room)? {
        return room.leave();
    }
    room.file("t", b"x")?;
    backend.hard_link(&room.path("t")?, &room.path("target")?).map_err(told)?;
    publish::publish(backend.as_ref(), &room.path("t")?, &room.path("target")?).map_err(told)?;
    fails("the temporary", backend.stat(&room.path("t")?), missing)?;
    same("the links", backend.stat(&room.path("target")?).map_err(told)?.links, 1)?;
    room.leave()
}

fn write_new_is_exclusive(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let path = room.path("1")?;
    publish::write_new(backend.as_ref(), &room.directory, &path, b"first").map_err(told)?;
    fails("a second", publish::write_new(backend.as_ref(), &room.directory, &path, b"second"), taken)?;
    same("the bytes", contents(backend.open(&path).map_err(told)?.as_ref())?, b"first".to_vec())?;
    same("the links", backend.stat(&path).map_err(told)?.links, 1)?;
    same("what is left", backend.read_dir(&room.directory).map_err(told)?.len(), 1)?;
    room.leave()
}

fn replace_keeps_identity(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let (path, tmp) = (room.path("a")?, room.path("tmp")?);
    backend.create_dir(&tmp, true).map_err(told)?;
    let kept = publish::replace(backend.as_ref(), &tmp, &path, b"x", true);
    fails("keeping the identity of nothing", kept, missing)?;
    publish::replace(backend.as_ref(), &tmp, &path, b"first", false).map_err(told)?;
    let old = backend.open_writable(&path).map_err(told)?;
    let identity = Identity { mode: 0o644, ..old.identity().map_err(told)? };
    old.set_identity(&identity).map_err(told)?;
    publish::replace(backend.as_ref(), &tmp, &path, b"second", true).map_err(told)?;
    let new = backend.open(&path).map_err(told)?;
    same("the bytes", contents(new.as_ref())?, b"second".to_vec())?;
    same("the identity", new.identity().map_err(told)?, identity)?;
    same("what the old open file reads", contents(old.as_ref())?, b"first".to_vec())?;
    same("what is left", backend.read_dir(&tmp).map_err(told)?.len(), 0)?;
    room.leave()
}
