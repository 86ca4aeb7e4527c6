//! The end of an operation: what it kept goes, then its intent.

use crate::backend::Stat;
use crate::change::decided::Decided;
use crate::change::departure::Departed;
use crate::change::error::{ChangeError, Result};
use crate::change::in_place;
use crate::change::journal::Journal;
use crate::change::keep::release;
use crate::change::places::{IntentName, operation_of};
use crate::change::publication::stat;
use crate::change::record::{Commit, OperationId, Purpose};
use crate::change::site::{At, Site};
use crate::change::yard::Yard;
use crate::change::{sweep, tree};
use crate::failure::Code;
use crate::ids::StorePath;
use crate::store::scan::Finding;

/// Removes what an operation kept and ends it. Files that are not what was put there are left, and told.
/// `departed` says what became of its deleted members: nothing goes of one that stays.
///
/// # Errors
///
/// [`ChangeError::Busy`] if the lease is lost, or somebody else is moving a member that stays.
///
/// # After a crash
///
/// Some of it is gone; calling again does the rest.
pub fn purge(site: &Site<'_>, decided: &Decided<'_>, departed: &[Departed]) -> Result<Vec<Finding>> {
    // What goes here does not come back: whoever took over may just need it for an undo.
    if !decided.is_held() {
        return Err(busy());
    }
    let mut findings = Vec::new();
    decided.settle()?;
    if decided.commit.purpose == Purpose::Delete {
        // Somebody needs the file as it is; the next purge sees to it.
        if !in_place::give_back(site, decided)? {
            return Ok(findings);
        }
    }
    let_go(site, &decided.commit, departed, &mut findings)?;
    if let Purpose::Undo { operation, generation } = &decided.commit.purpose {
        // What it took back ends with it.
        let journal = decided.journal()?;
        let undone = IntentName {
            tree: decided.name.tree.clone(),
            generation: *generation,
            operation: operation.clone(),
        };
        if let crate::change::journal::Found::Record(claim) = journal.claim(&undone.tree, *generation)?
            && let crate::change::record::Decision::Commit(commit) = &claim.decision
        {
            let_go(site, commit, &[], &mut findings)?;
        }
        sweep::end(site, &journal, &undone)?;
    }
    // As long as something is left to be looked at the operation is not over: its name protects the files.
    if findings.is_empty() {
        sweep::end(site, &decided.journal()?, &decided.name)?;
    }
    Ok(findings)
}

fn busy() -> ChangeError {
    ChangeError::Busy { owner: "another qchain, which took it over".to_owned() }
}

/// Lets everything go that a decision kept.
fn let_go(
    site: &Site<'_>,
    commit: &Commit,
    departed: &[Departed],
    findings: &mut Vec<Finding>,
) -> Result<()> {
    for publication in &commit.publications {
        let at = site.at(&publication.at)?;
        drop_kept(&at, &publication.kept, |found| publication.old.is(found), findings)?;
    }
    for edit in &commit.checkpoints {
        let at = site.at(&edit.at)?;
        drop_kept(&at, &edit.kept, |_| true, findings)?;
    }
    for (index, departure) in commit.departures.iter().enumerate() {
        let at = site.at(&departure.at)?;
        let stays = matches!(departed.get(index), Some(Departed::Kept { .. }));
        if stays && stat(&at, &departure.at.path)?.is_none() && stat(&at, &departure.kept)?.is_some() {
            return Err(busy());
        }
        drop_kept(&at, &departure.kept, |found| departure.is(found), findings)?;
        if let Some(file) = &departure.checkpoint {
            drop_kept(&at, &file.kept, |_| true, findings)?;
        }
        if stat(&at, &departure.at.path)?.is_none() {
            tree::forget(at.backend, &departure.at.path)?;
        }
    }
    Ok(())
}

fn drop_kept(
    at: &At<'_>,
    kept: &StorePath,
    is: impl Fn(&Stat) -> bool,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    match stat(at, kept)? {
        None => Ok(()),
        Some(found) if is(&found) => release(at, kept),
        Some(_) => {
            let message = format!("{kept} was changed after it was put there; it was left alone");
            findings.push(Finding { member: at.name.clone(), code: Code::TrashChanged, message });
            Ok(())
        }
    }
}

/// The bytes that an operation keeps in trash: by the allocation of the files, extents that are shared counted
/// in full.
pub fn held_bytes(site: &Site<'_>, operation: &OperationId) -> Result<u64> {
    let mut bytes = 0;
    for (_, store) in site.stores.iter() {
        let journal = Journal::new(store.backend());
        for trash in Yard::all(store.backend())?.iter().map(Yard::trash) {
            for name in journal.names(&trash)? {
                if operation_of(&name).as_ref() == Some(operation)
                    && let Ok(path) = trash.join(&name)
                    && let Ok(found) = store.backend().stat(&path)
                {
                    bytes += found.allocated_bytes;
                }
            }
        }
    }
    Ok(bytes)
}
