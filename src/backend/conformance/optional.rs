//! What a store may do or lack: it does it right, or says that it cannot and changes nothing.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::{Case, Outcome, Room, contents, fails, missing, not_plain, same, told};
use crate::backend::{Backend, BackendError, FileId, ImageLocks, LockKind, publish};
use crate::ids::StorePath;

pub(super) const CASES: &[(&str, Case)] = &[
    ("exchange-swaps-or-refuses", exchange_swaps_or_refuses),
    ("exchange-takes-files-only", exchange_takes_files_only),
    ("directories-move-or-refuse", directories_move_or_refuse),
    ("hard-links-work-or-refuse", hard_links_work_or_refuse),
    ("reserved-space-changes-nothing", reserved_space_changes_nothing),
    ("holes-read-as-zeros", holes_read_as_zeros),
    ("shared-locks-are-shared", shared_locks_are_shared),
    ("image-locks-can-be-held", image_locks_can_be_held),
    ("local-paths-lead-to-the-file", local_paths_lead_to_the_file),
];

/// Whether the store has hard links; a refusal is checked on the way.
pub(super) fn has_links(room: &Room<'_>) -> Result<bool, String> {
    let has = room.backend.probe(&room.directory).map_err(told)?.hard_links;
    if !has {
        let (from, to) = (room.path("link-from")?, room.path("link-to")?);
        room.file("link-from", b"x")?;
        fails("a link", room.backend.hard_link(&from, &to), BackendError::is_unsupported)?;
        fails("a published link", publish::link(room.backend.as_ref(), &from, &to), |error| {
            error.is_unsupported()
        })?;
        fails("the name of a refused link", room.backend.stat(&to), missing)?;
        room.backend.remove_file(&from).map_err(told)?;
    }
    Ok(has)
}

fn id(room: &Room<'_>, name: &str) -> Result<FileId, String> {
    Ok(room.backend.stat(&room.path(name)?).map_err(told)?.id)
}

fn exchange_swaps_or_refuses(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    backend.create_dir(&room.path("d")?, true).map_err(told)?;
    let (a, b) = (room.path("a")?, room.path("d/b")?);
    let open = room.file("a", b"was a")?;
    let first = open.stat().map_err(told)?.id;
    let second = room.file("d/b", b"was b")?.stat().map_err(told)?.id;
    if !backend.probe(&room.directory).map_err(told)?.rename_exchange {
        fails("an exchange", backend.exchange(&a, &b), BackendError::is_unsupported)?;
        same("the ids after a refusal", [id(&room, "a")?, id(&room, "d/b")?], [first, second])?;
        return room.leave();
    }
    backend.exchange(&a, &b).map_err(told)?;
    same("the ids", [id(&room, "a")?, id(&room, "d/b")?], [second, first])?;
    same("the links", backend.stat(&a).map_err(told)?.links, 1)?;
    same("the bytes of a", contents(backend.open(&a).map_err(told)?.as_ref())?, b"was b".to_vec())?;
    same("the bytes of an open file", contents(open.as_ref())?, b"was a".to_vec())?;
    publish::swap(backend.as_ref(), &b, &a).map_err(told)?;
    same("the ids swapped back", [id(&room, "a")?, id(&room, "d/b")?], [first, second])?;
    backend.exchange(&a, &a).map_err(told)?;
    same("the id after an exchange with itself", id(&room, "a")?, first)?;
    if has_links(&room)? {
        backend.hard_link(&a, &room.path("c")?).map_err(told)?;
        backend.exchange(&a, &room.path("c")?).map_err(told)?;
        same("two names of one file", [id(&room, "a")?, id(&room, "c")?], [first, first])?;
    }
    room.leave()
}

fn directories_move_or_refuse(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    for name in ["d", "empty", "full"] {
        backend.create_dir(&room.path(name)?, true).map_err(told)?;
    }
    let was = room.file("d/f", b"inside")?.stat().map_err(told)?.id;
    room.file("full/g", b"in the way")?;
    room.file("file", b"a file")?;
    let (from, to) = (room.path("d")?, room.path("new")?);
    match backend.rename_dir(&from, &to) {
        Err(error) if error.is_unsupported() => {
            same("the id after a refusal", id(&room, "d/f")?, was)?;
            return room.leave();
        }
        moved => moved.map_err(told)?,
    }
    same("the id after a move", id(&room, "new/f")?, was)?;
    fails("the old name", backend.stat(&from), missing)?;
    let taken = |error: &BackendError| matches!(error, BackendError::AlreadyExists { .. });
    for name in ["full", "file"] {
        fails("a move over what there is", backend.rename_dir(&to, &room.path(name)?), taken)?;
        same("the id after a refused move", id(&room, "new/f")?, was)?;
    }
    backend.rename_dir(&to, &room.path("empty")?).map_err(told)?;
    same("the id after a move over an empty one", id(&room, "empty/f")?, was)?;
    fails("a move of a file", backend.rename_dir(&room.path("file")?, &to), not_plain)?;
    fails("a move of nothing", backend.rename_dir(&from, &to), missing)?;
    room.leave()
}

fn exchange_takes_files_only(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let (a, d, none) = (room.path("a")?, room.path("d")?, room.path("none")?);
    backend.create_dir(&d, true).map_err(told)?;
    let was = room.file("a", b"a")?.stat().map_err(told)?.id;
    if backend.probe(&room.directory).map_err(told)?.rename_exchange {
        for (left, right) in [(&a, &none), (&none, &a), (&none, &d)] {
            fails("an exchange with nothing", backend.exchange(left, right), missing)?;
        }
        for (left, right) in [(&a, &d), (&d, &a), (&d, &d), (&a, &StorePath::root())] {
            fails("an exchange with a directory", backend.exchange(left, right), not_plain)?;
        }
    }
    same("the id", id(&room, "a")?, was)?;
    room.leave()
}

fn hard_links_work_or_refuse(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    if has_links(&room)? {
        let (a, b) = (room.path("a")?, room.path("b")?);
        let was = room.file("a", b"a")?.stat().map_err(told)?.id;
        publish::link(backend.as_ref(), &a, &b).map_err(told)?;
        publish::link(backend.as_ref(), &a, &b).map_err(|error| format!("a redo: {}", told(error)))?;
        same("the ids", [id(&room, "a")?, id(&room, "b")?], [was, was])?;
        room.file("c", b"c")?;
        let over = publish::link(backend.as_ref(), &a, &room.path("c")?);
        fails("a link over another file", over, super::taken)?;
    }
    room.leave()
}

fn reserved_space_changes_nothing(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let file = room.file("a", b"hello")?;
    let can = file.reserve(0, 1 << 20).map_err(told)?;
    same("a second answer", file.reserve(4096, 8192).map_err(told)?, can)?;
    file.reserve(77, 0).map_err(told)?;
    same("the bytes", contents(file.as_ref())?, b"hello".to_vec())?;
    file.write_at(500_000, b"far").map_err(told)?;
    file.sync().map_err(told)?;
    let mut wanted = vec![0; 500_003];
    wanted[..5].copy_from_slice(b"hello");
    wanted[500_000..].copy_from_slice(b"far");
    same("the bytes after a write", contents(file.as_ref())? == wanted, true)?;
    let total = backend.space().map_err(told)?.total_bytes;
    if can && i64::try_from(total).is_ok_and(|total| total < 1 << 60) {
        let too_much = file.reserve(0, total.saturating_mul(2));
        fails("reserving too much", too_much, |error| !matches!(error, BackendError::NotFound { .. }))?;
        same("the length after it", file.stat().map_err(told)?.length, 500_003)?;
    }
    if can {
        let reader = backend.open(&room.path("a")?).map_err(told)?;
        fails("reserving through a file open for reading", reader.reserve(0, 4096), super::any)?;
    }
    room.leave()
}

fn holes_read_as_zeros(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let mut wanted = vec![7; 1_000_000];
    let file = room.file("a", &wanted)?;
    file.sync().map_err(told)?;
    let before = file.stat().map_err(told)?.allocated_bytes;
    // Out of line at both ends, and over the end.
    let can = file.punch(1_001, 600_000).map_err(told)?;
    same("a hole over the end", file.punch(999_000, 50_000).map_err(told)?, can)?;
    same("an empty hole", file.punch(0, 0).is_ok(), true)?;
    if can {
        wanted[1_001..601_001].fill(0);
        wanted[999_000..].fill(0);
        file.sync().map_err(told)?;
        let after = file.stat().map_err(told)?.allocated_bytes;
        same("that space was given back", after + (500 << 10) < before, true)?;
        let reader = backend.open(&room.path("a")?).map_err(told)?;
        fails("a hole through a file open for reading", reader.punch(0, 4096), super::any)?;
    }
    same("the bytes", contents(file.as_ref())? == wanted, true)?;
    room.leave()
}

fn shared_locks_are_shared(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let path = room.path("lock")?;
    let take = |kind| backend.try_lock(&path, kind).map_err(told);
    let first = take(LockKind::Shared)?;
    let second = take(LockKind::Shared)?;
    same("two shared locks", [first.is_some(), second.is_some()], [true, true])?;
    same("an exclusive one beside two", take(LockKind::Exclusive)?.is_some(), false)?;
    drop(first);
    same("an exclusive one beside one", take(LockKind::Exclusive)?.is_some(), false)?;
    drop(second);
    // Whatever was just forked off this process by others has its locks, too, until it executes something.
    let take_soon = |kind| {
        for _ in 0..200 {
            if let Some(lock) = take(kind)? {
                return Ok(Some(lock));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok::<_, String>(None)
    };
    let exclusive = take_soon(LockKind::Exclusive)?;
    same("an exclusive one alone", exclusive.is_some(), true)?;
    same("a shared one beside it", take(LockKind::Shared)?.is_some(), false)?;
    drop(exclusive);
    same("a shared one after it", take_soon(LockKind::Shared)?.is_some(), true)?;
    room.leave()
}

fn image_locks_can_be_held(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    let file = room.file("a", b"x")?;
    let other = backend.open(&room.path("a")?).map_err(told)?;
    if !backend.probe(&room.directory).map_err(told)?.byte_range_locks {
        return room.leave();
    }
    let held = other.hold_image_locks().map_err(told)?;
    same("that they are held", held.is_some(), true)?;
    let seen = ImageLocks { writer: false, any: true };
    same("what others see", file.image_locks().map_err(told)?, seen)?;
    same("what the holder sees", other.image_locks().map_err(told)?.any, false)?;
    let again = other.hold_image_locks().map_err(told)?;
    let beside = file.hold_image_locks().map_err(told)?;
    same("that they can be shared", [again.is_some(), beside.is_some()], [true, true])?;
    drop((held, beside));
    same("what is seen of the second", file.image_locks().map_err(told)?, seen)?;
    drop(again);
    same("what is seen when all are gone", file.image_locks().map_err(told)?.any, false)?;
    let kept = other.hold_image_locks().map_err(told)?;
    drop(other);
    same("a guard that outlives its file", file.image_locks().map_err(told)?, seen)?;
    drop(kept);
    same("what it leaves", file.image_locks().map_err(told)?.any, false)?;
    room.leave()
}

fn local_paths_lead_to_the_file(backend: &Arc<dyn Backend>) -> Outcome {
    let room = Room::new(backend)?;
    room.file("a", b"x")?;
    let paths = [StorePath::root(), room.directory.clone(), room.path("a")?, room.path("none")?];
    let local: Vec<_> = paths.iter().map(|path| backend.local_path(path)).collect();
    let there = local.iter().filter(|path| path.is_some()).count();
    same("that all names have one or none", there == 0 || there == paths.len(), true)?;
    let absolute = local.iter().flatten().all(|path| path.is_absolute());
    same("that they are absolute", absolute, true)?;
    if let [Some(root), _, Some(file), _] = &local[..] {
        same("the path of a file", file, &root.join(paths[2].as_str()))?;
    }
    room.leave()
}
