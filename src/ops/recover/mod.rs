//! `recover`, `history`, `undo`, `purge`: what was interrupted, what was done, taking it back, ending it.

use crate::change::history::{Done, find, history as read_history};
use crate::change::journal::Journal;
use crate::change::record::TreeId;
use crate::change::recover::{Action, Extent, Recovered, recover as recover_all};
use crate::change::undo::undo as decide_undo;
use crate::change::witness::Witness;
use crate::change::{ChangeError, Guard, Site, sweep};
use crate::ops::Result;

/// What every changing verb begins with: sweeps, takes the right to change the stores, and recovers what was
/// interrupted. What cannot be recovered stops nothing here: whoever meets it will.
pub fn begin(site: &Site<'_>, witness: Witness) -> Result<Guard> {
    site.stores.check_writable()?;
    sweep::strays(site)?;
    let guard = Guard::take(site.stores)?;
    recover_all(site, Extent::default(), witness)?;
    Ok(guard)
}

/// Finishes or takes back all that was interrupted, and moves on what is due.
pub fn recover(site: &Site<'_>, witness: Witness) -> Result<Vec<Recovered>> {
    site.stores.check_writable()?;
    sweep::strays(site)?;
    let _guard = Guard::take(site.stores)?;
    Ok(recover_all(site, Extent::default(), witness)?)
}

/// Ends what is due: deleted members go after their grace, old files after their retention; with `all` also
/// what is not due yet.
pub fn purge(site: &Site<'_>, all: bool, witness: Witness) -> Result<Vec<Recovered>> {
    site.stores.check_writable()?;
    sweep::strays(site)?;
    let _guard = Guard::take(site.stores)?;
    Ok(recover_all(site, Extent { purge_all: all }, witness)?)
}

/// What was done, oldest first.
pub fn history(site: &Site<'_>) -> Result<Vec<Done>> {
    Ok(read_history(site)?)
}

/// Takes an operation back, whole. `text` is its id, or the beginning of it. Gives what was taken back, and
/// what became of the undo.
pub fn undo(site: &Site<'_>, text: &str, witness: Witness) -> Result<(Done, Action)> {
    let _guard = begin(site, witness)?;
    let done = find(site, text)?;
    let undo = decide_undo(site, done.home, &done.name())?;
    let published = undo.publish()?;
    let mut kept = Vec::new();
    let nobody = Witness::None;
    let action =
        crate::change::recover::carry_on(site, &undo, &published, Extent::default(), nobody, &mut kept)?;
    Ok((done, action))
}

/// Lets a frozen tree be changed again; `text` is the operation that froze it, or the beginning of its id.
/// Gives its tree.
pub fn thaw(site: &Site<'_>, text: &str) -> Result<TreeId> {
    site.stores.check_writable()?;
    let _guard = Guard::take(site.stores)?;
    let done = find(site, text)?;
    let journal = Journal::new(site.stores.get(done.home)?.backend());
    if journal.thaw(&done.tree)? {
        Ok(done.tree)
    } else {
        let reason = "its tree is not frozen".to_owned();
        Err(ChangeError::NotUndoable { operation: done.operation.to_string(), reason }.into())
    }
}
