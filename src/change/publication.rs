//! Names come back and get new files. Every step looks at file ids first, so that it can be repeated.

use crate::backend::publish::{link, swap, take_name};
use crate::backend::{Backend, BackendError, Stat};
use crate::change::decided::Decided;
use crate::change::error::Result;
use crate::change::in_place;
use crate::change::keep::{Kept, keep, name_if_free, release, sync_all, take_back};
use crate::change::record::{Mark, Publication, Restore};
use crate::change::site::{At, Site};
use crate::cloudstack::paths::snapshot_of;
use crate::failure::Code;
use crate::ids::StorePath;

/// What became of a publication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Published {
    /// The name stands for the new file, or did before somebody else changed it later.
    Done,
    /// Somebody else had changed, replaced or removed the file, or writes it: it was left as it is.
    TakenBack {
        /// Why, as a code.
        code: Code,
        /// Why, in words.
        reason: String,
    },
}

/// A publication that is still to be done.
struct Pending<'a> {
    index: usize,
    publication: &'a Publication,
    at: At<'a>,
    kept: Kept,
}

/// Does all restores and publications of a decision that are not done yet.
pub fn publish(site: &Site<'_>, decided: &Decided<'_>) -> Result<Vec<Published>> {
    if !decided.is_lasting() && begins(site, decided)? {
        decided.make_last()?;
    }
    restore_all(site, &decided.commit.restores)?;
    let lost = is_any_lost(site, &decided.commit.restores)?;
    let mut outcomes = Vec::new();
    let mut pending = Vec::new();
    // Those that stand on others first: a merge in place leaves nothing known of the member that it went into.
    for (index, publication) in decided.commit.publications.iter().enumerate().rev() {
        let at = site.at(&publication.at)?;
        let outcome = match look(site, decided, publication, &at)? {
            Some(outcome) => outcome,
            None if lost => {
                give_up(&at, publication, "was left alone: a member that it would read through is gone")?
            }
            None => match keep(&at, &publication.at.path, &publication.kept, &publication.old)? {
                Kept::Another => give_up(&at, publication, "was replaced by somebody else")?,
                kept => {
                    pending.push(Pending { index, publication, at, kept });
                    Published::Done
                }
            },
        };
        outcomes.push(outcome);
    }
    outcomes.reverse();
    pending.reverse();
    sync_all(pending.iter().map(|pending| (&pending.at, pending.publication.kept.parent())))?;
    for one in &pending {
        let outcome = put_in_place(one)?;
        if let Some(place) = outcomes.get_mut(one.index) {
            *place = outcome;
        }
    }
    // Also what an earlier run published: it may have died before it was durable, and checkpoint files follow.
    if outcomes.contains(&Published::Done) {
        decided.settle()?;
    }
    Ok(outcomes)
}

/// Whether something is to be done for which nothing that was done before shows that the claim is durable.
fn begins(site: &Site<'_>, decided: &Decided<'_>) -> Result<bool> {
    let commit = &decided.commit;
    for restore in &commit.restores {
        if stat(&site.at(&restore.at)?, &restore.kept)?.is_some() {
            return Ok(true);
        }
    }
    for publication in &commit.publications {
        let at = site.at(&publication.at)?;
        let grows = publication.in_place.is_some() && has(&at, &publication.at.path, &publication.old)?;
        if grows || stat(&at, &publication.from)?.is_some() {
            return Ok(true);
        }
    }
    Ok(commit.publications.is_empty())
}

/// Makes durable what was published, also by an earlier run, which may have died before it could.
pub fn sync(site: &Site<'_>, decided: &Decided<'_>) -> Result<()> {
    let names = decided.commit.publications.iter();
    let ats = names.map(|publication| site.at(&publication.at)).collect::<Result<Vec<_>>>()?;
    sync_all(ats.iter().map(|at| (at, at.key.path.parent())))
}

/// What can be said of a publication before it is done; `None` if it is to be done now.
fn look(
    site: &Site<'_>,
    decided: &Decided<'_>,
    publication: &Publication,
    at: &At<'_>,
) -> Result<Option<Published>> {
    let now = stat(at, &publication.at.path)?;
    if publication.in_place.is_some() {
        if now.as_ref().is_some_and(|now| publication.is_new(now)) {
            in_place::keep_writers_out(site, decided, publication)?;
            return match stat(at, &publication.from)? {
                // The old file, at which nobody has looked since it lost its name.
                Some(found) if !publication.is_new(&found) => after_exchange(publication, at, &found),
                Some(_) => release(at, &publication.from).map(|()| Published::Done),
                None if was_written_into(site, publication, at)? => bring_back(publication, at),
                None => Ok(Published::Done),
            }
            .map(Some);
        }
        if now.as_ref().is_some_and(|now| publication.old.is(now))
            && let Err(taken_back) = in_place::complete(site, decided, publication)?
        {
            return Ok(Some(taken_back));
        }
    }
    match stat(at, &publication.from)? {
        // Publishing uses the name up: it was done, or given up.
        None => {
            // An earlier run ended between the rename and the look at what it replaced.
            if now.as_ref().is_some_and(|now| publication.is_new(now))
                && was_written_into(site, publication, at)?
            {
                return bring_back(publication, at).map(Some);
            }
            let done = now.as_ref().is_none_or(|now| !publication.old.is(now));
            return Ok(Some(if !done {
                taken_back(at, "has its old file still; the new one was given up")
            } else if in_place::is_left(site, publication)? {
                taken_back(at, "was replaced or removed by somebody else")
            } else {
                Published::Done
            }));
        }
        Some(found) if publication.is_new(&found) => {}
        // The names were exchanged, and then nobody looked at what came back.
        Some(found) if now.as_ref().is_some_and(|now| publication.is_new(now)) => {
            return after_exchange(publication, at, &found).map(Some);
        }
        Some(_) => return give_up(at, publication, "has a damaged new file").map(Some),
    }
    match now {
        Some(now) if publication.is_new(&now) => {
            release(at, &publication.from)?;
            Ok(Some(Published::Done))
        }
        Some(now) if publication.old.is(&now) => {
            if writer(at, &publication.at.path)? {
                give_up(at, publication, "is open for writing").map(Some)
            } else {
                Ok(None)
            }
        }
        Some(_) => give_up(at, publication, "was changed or replaced by somebody else").map(Some),
        None => give_up(at, publication, "was removed by somebody else").map(Some),
    }
}

/// Gives one name its new file.
fn put_in_place(one: &Pending<'_>) -> Result<Published> {
    let Pending { publication, at, .. } = one;
    let name = &publication.at.path;
    match stat(at, name)? {
        Some(now) if publication.old.is(&now) => {}
        _ => return give_up(at, publication, "was changed, replaced or removed by somebody else"),
    }
    match swap(at.backend, &publication.from, name) {
        Ok(()) => {}
        Err(error) if error.is_unsupported() => return rename_over(one),
        Err(BackendError::NotFound { .. }) => {
            return give_up(at, publication, "was removed by somebody else");
        }
        Err(source) => return Err(at.failed("publish")(source)),
    }
    match stat(at, &publication.from)? {
        Some(found) => after_exchange(publication, at, &found),
        None => Ok(Published::Done),
    }
}

/// What had the name has the temporary's now: was it what was recorded, and does nobody write it? Then it is
/// let go from there, and kept under its other name; else it comes back.
fn after_exchange(publication: &Publication, at: &At<'_>, found: &Stat) -> Result<Published> {
    let (name, from) = (&publication.at.path, &publication.from);
    if !publication.old.is(found) || writer(at, from)? {
        if stat(at, name)?.is_some_and(|now| publication.is_new(&now)) {
            take_back(at, from, name)?;
        }
        return give_up(at, publication, "was changed or replaced by somebody else");
    }
    match stat(at, &publication.kept)? {
        Some(kept) if kept.id == found.id => release(at, from)?,
        Some(_) => {}
        None => take_name(at.backend, from, &publication.kept).map_err(at.failed("keep the old file of"))?,
    }
    Ok(Published::Done)
}

/// Where names cannot be exchanged: a rename over the name, and a look at the old file after it.
fn rename_over(one: &Pending<'_>) -> Result<Published> {
    let Pending { publication, at, kept, .. } = one;
    let name = &publication.at.path;
    match take_name(at.backend, &publication.from, name) {
        Ok(()) => {}
        // The answer to an earlier request was lost, or another instance was faster.
        Err(BackendError::NotFound { .. }) => {
            return Ok(match stat(at, name)? {
                Some(now) if publication.is_new(&now) => Published::Done,
                _ => taken_back(at, "was changed, replaced or removed by somebody else"),
            });
        }
        Err(source) => return Err(at.failed("publish")(source)),
    }
    if *kept != Kept::Here {
        return Ok(Published::Done);
    }
    let old = stat(at, &publication.kept)?;
    if old.is_some_and(|old| publication.old.is(&old)) && !writer(at, &publication.kept)? {
        return Ok(Published::Done);
    }
    bring_back(publication, at)
}

/// Whether the old file, which its other name keeps, is not what was recorded any more, and can have its name back:
/// after a merge in place only while the member has its name through which it reads.
fn was_written_into(site: &Site<'_>, publication: &Publication, at: &At<'_>) -> Result<bool> {
    if publication.in_place.is_some() && in_place::lowest(site, publication)?.is_none() {
        return Ok(false);
    }
    let kept = stat(at, &publication.kept)?;
    Ok(kept.is_some_and(|kept| kept.id.inode == publication.old.inode && !publication.old.is(&kept)))
}

/// Somebody wrote into the old file at the very moment of the rename. His edit must not be lost: his file comes
/// back over the new one, by way of the temporary's name, so that a run that is cut off between is gone on with.
fn bring_back(publication: &Publication, at: &At<'_>) -> Result<Published> {
    let name = &publication.at.path;
    if stat(at, name)?.is_some_and(|now| publication.is_new(&now)) {
        match link(at.backend, &publication.kept, &publication.from) {
            Ok(()) => {
                take_name(at.backend, &publication.from, name).map_err(at.failed("take back"))?;
            }
            // Another instance has it in hand, or its owner let it go.
            Err(BackendError::NotFound { .. }) => {}
            Err(source) => return Err(at.failed("take back")(source)),
        }
    }
    Ok(taken_back(at, "was changed by somebody else"))
}

/// Drops the new file, and the second name of an old one that has its first.
fn give_up(at: &At<'_>, publication: &Publication, reason: &str) -> Result<Published> {
    if publication.in_place.is_some()
        || stat(at, &publication.from)?.is_some_and(|found| publication.new.is(&found))
    {
        release(at, &publication.from)?;
    }
    let same = match (stat(at, &publication.at.path)?, stat(at, &publication.kept)?) {
        (Some(named), Some(kept)) => named.id == kept.id,
        _ => false,
    };
    if same {
        release(at, &publication.kept)?;
    }
    Ok(taken_back(at, reason))
}

fn taken_back(at: &At<'_>, reason: &str) -> Published {
    Published::TakenBack { code: Code::ChangedMeanwhile, reason: format!("{} {reason}", at.name) }
}

/// Names come back, never over another file. It uses the kept name up, as soon as the other is durable: what
/// somebody else removes afterwards is not brought back again.
fn restore_all(site: &Site<'_>, restores: &[Restore]) -> Result<()> {
    let ats = restores.iter().map(|restore| site.at(&restore.at)).collect::<Result<Vec<_>>>()?;
    let mut back = Vec::new();
    for (at, restore) in ats.iter().zip(restores) {
        let found = stat(at, &restore.kept)?.filter(|found| restore.mark.inode == found.id.inode);
        if found.is_some() {
            if stat(at, &restore.at.path)?.is_none() {
                name_if_free(at, &restore.kept, &restore.at.path, "put back")?;
            }
            back.push((at, restore));
        }
    }
    sync_all(ats.iter().map(|at| (at, at.key.path.parent())))?;
    for (at, restore) in &back {
        let (named, kept) = (stat(at, &restore.at.path)?, stat(at, &restore.kept)?);
        if let (Some(named), Some(kept)) = (named, kept)
            && named.id == kept.id
        {
            release(at, &restore.kept)?;
        }
    }
    sync_all(back.iter().map(|(at, restore)| (*at, restore.kept.parent())))
}

/// Whether a member that was to come back has neither its name nor its file: whoever was stopped in the middle of
/// a purge let it go, or its owner removed it. What would read through it keeps its new file.
fn is_any_lost(site: &Site<'_>, restores: &[Restore]) -> Result<bool> {
    for restore in restores.iter().filter(|one| snapshot_of(&one.at.path).is_none()) {
        let at = site.at(&restore.at)?;
        if stat(&at, &restore.at.path)?.is_none() && stat(&at, &restore.kept)?.is_none() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether QEMU has a file open for writing.
fn writer(at: &At<'_>, path: &StorePath) -> Result<bool> {
    match at.backend.open(path) {
        Ok(file) => Ok(file.image_locks().map_err(at.failed("look at the locks of"))?.writer),
        Err(BackendError::NotFound { .. }) => Ok(false),
        Err(source) => Err(at.failed("open")(source)),
    }
}

/// What a name stands for; `None` if nothing has it.
pub fn stat(at: &At<'_>, path: &StorePath) -> Result<Option<Stat>> {
    stat_in(at.backend, path).map_err(at.failed("look at"))
}

fn stat_in(backend: &dyn Backend, path: &StorePath) -> std::result::Result<Option<Stat>, BackendError> {
    match backend.stat(path) {
        Ok(stat) => Ok(Some(stat)),
        Err(BackendError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a name stands for a file of that mark.
pub fn has(at: &At<'_>, path: &StorePath, mark: &Mark) -> Result<bool> {
    Ok(stat(at, path)?.is_some_and(|stat| mark.is(&stat)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::restore_all;
    use crate::backend::Backend;
    use crate::backend::memory::MemoryStore;
    use crate::change::record::Restore;
    use crate::change::trial::{on, opted_in, path, place, write};

    /// Whoever undoes may die, or be stopped, and another one does it once more.
    #[test]
    fn what_its_owner_removed_after_it_came_back_is_not_brought_back_again() {
        for links in [true, false] {
            let memory = opted_in(MemoryStore::new().with_hard_links(links));
            let kept = path(".qchain/trash/m");
            let mark = write(memory.as_ref(), kept.as_str(), b"a member");
            let restores = [Restore { at: place("m"), kept, mark }];
            let backend = Arc::clone(&memory) as Arc<dyn Backend>;
            on(&backend, |site| {
                restore_all(site, &restores).unwrap();
                restore_all(site, &restores).unwrap();
                assert!(mark.is(&memory.stat(&path("m")).unwrap()), "links: {links}");
                memory.remove_file(&path("m")).unwrap();
                restore_all(site, &restores).unwrap();
                assert!(memory.stat(&path("m")).is_err(), "it is back; links: {links}");
            });
        }
    }
}
