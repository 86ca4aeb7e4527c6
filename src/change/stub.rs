//! Stubs: empty images that take the names of deleted members, for whoever still expects a file there.
//!
//! CloudStack keeps the row of a deleted snapshot until the row's children are gone, and may delete or migrate
//! its file by name until then. A stub is an increment without data over what the member's own header names,
//! so whoever is put on top of it reads what lies below. It takes the name when that would have gone: after
//! the grace, and after the survivors were published. A reader that still holds an old survivor would be shown
//! a wrong view by it, where a name that is gone is just an error; so a stub is never put in place without a
//! grace, unless its caller says so.
//!
//! The name is exchanged for the stub, never created: a member that its owner removed stays removed. Where names
//! cannot be exchanged the stub is renamed over the member, right after a look.

use crate::backend::BackendError;
use crate::backend::publish::{link, swap, take_name};
use crate::change::error::Result;
use crate::change::keep::{Kept, keep, release};
use crate::change::publication::stat;
use crate::change::record::{Departure, Stub};
use crate::change::site::At;
use crate::ids::StorePath;

/// Gives a deleted member's name to its stub; the member's file goes to trash, unless it lives on elsewhere.
/// `false` if another file has the name, which keeps it. Can be repeated.
///
/// # After a crash
///
/// The name stands for the whole member or for the stub.
pub fn stand_in(at: &At<'_>, departure: &Departure, stub: &Stub) -> Result<bool> {
    let name = &departure.at.path;
    match stat(at, name)? {
        // Its owner removed it. It does not come back.
        None => {
            release(at, &stub.from)?;
            return Ok(true);
        }
        Some(found) if stub.is(&found) => return after_exchange(at, departure, stub),
        Some(found) if !departure.is(&found) => return Ok(false),
        Some(_) => {}
    }
    // A file that becomes the survivor's has that name.
    let has_other_name = departure.becomes.is_some()
        || match keep(at, name, &departure.kept, &departure.mark)? {
            Kept::Here => true,
            Kept::Impossible => false,
            Kept::Another => return Ok(false),
        };
    match swap(at.backend, &stub.from, name) {
        Ok(()) => after_exchange(at, departure, stub),
        Err(error) if error.is_unsupported() => rename_over(at, departure, stub, has_other_name),
        // The member was removed, or another instance put the stub in place: both end well.
        Err(BackendError::NotFound { .. }) => {
            release(at, &stub.from)?;
            Ok(true)
        }
        Err(source) => Err(at.failed("put a stub in the place of")(source)),
    }
}

/// What had the name has the stub's temporary one now, if anything has it: was it the member?
fn after_exchange(at: &At<'_>, departure: &Departure, stub: &Stub) -> Result<bool> {
    match stat(at, &stub.from)? {
        None => Ok(true),
        Some(found) if departure.is(&found) => {
            match stat(at, &departure.kept)? {
                None if departure.becomes.is_none() => take_name(at.backend, &stub.from, &departure.kept)
                    .map_err(at.failed("keep the file of"))?,
                _ => release(at, &stub.from)?,
            }
            Ok(true)
        }
        // Another instance had exchanged them, and ours took that back: the member has its name.
        Some(found) if stub.is(&found) && stat(at, &departure.at.path)?.is_none_or(|now| !stub.is(&now)) => {
            Ok(false)
        }
        // Both names are one file: a redo of a link.
        Some(found) if stub.is(&found) => {
            release(at, &stub.from)?;
            Ok(true)
        }
        // Somebody put his own file there at that very moment: it comes back.
        Some(_) => {
            swap(at.backend, &stub.from, &departure.at.path).map_err(at.failed("take back"))?;
            Ok(false)
        }
    }
}

/// Where names cannot be exchanged.
fn rename_over(at: &At<'_>, departure: &Departure, stub: &Stub, has_other_name: bool) -> Result<bool> {
    let name = &departure.at.path;
    if has_other_name {
        match stat(at, name)? {
            Some(found) if departure.is(&found) => {}
            Some(_) => return Ok(false),
            None => {
                release(at, &stub.from)?;
                return Ok(true);
            }
        }
    } else {
        // A file can have one name only: for a moment nothing has this one.
        match take_name(at.backend, name, &departure.kept) {
            Ok(()) | Err(BackendError::NotFound { .. }) => {}
            Err(source) => return Err(at.failed("put aside")(source)),
        }
    }
    match take_name(at.backend, &stub.from, name) {
        Ok(()) | Err(BackendError::NotFound { .. }) => Ok(true),
        Err(source) => Err(at.failed("put a stub in the place of")(source)),
    }
}

/// Takes a stub away again: the member's file comes back to its name, from trash, or for one that was merged
/// into in place from the survivor's name. Does nothing if the name stands for anything but the stub.
pub fn stand_down(
    at: &At<'_>,
    departure: &Departure,
    stub: &Stub,
    survivor: Option<&StorePath>,
) -> Result<()> {
    let name = &departure.at.path;
    let source = survivor.unwrap_or(&departure.kept);
    let is_stub = stat(at, name)?.is_some_and(|found| stub.is(&found));
    if !is_stub || !stat(at, source)?.is_some_and(|found| departure.is(&found)) {
        return Ok(());
    }
    match link(at.backend, source, &stub.from) {
        // The file has a second name, which takes the stub's place in one step.
        Ok(()) => take_name(at.backend, &stub.from, name).map_err(at.failed("put back"))?,
        // A file can have one name only.
        Err(error) if error.is_unsupported() && survivor.is_none() => {
            return take_name(at.backend, source, name).map_err(at.failed("put back"));
        }
        Err(BackendError::NotFound { .. }) => return Ok(()),
        Err(source) => return Err(at.failed("put back")(source)),
    }
    if survivor.is_none() { release(at, source) } else { Ok(()) }
}
