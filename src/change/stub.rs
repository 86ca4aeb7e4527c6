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
//! cannot be exchanged the member's file is moved aside and looked at there, and the stub takes the name if that is
//! still free.

use crate::backend::publish::{link, swap, take_name};
use crate::backend::{BackendError, Stat};
use crate::change::error::Result;
use crate::change::keep::{Kept, keep, name_if_free, release, take_back};
use crate::change::publication::stat;
use crate::change::record::{Departure, Stub};
use crate::change::site::At;
use crate::ids::StorePath;

/// Gives a deleted member's name to its stub; the member's file goes to trash, unless it lives on elsewhere.
/// `false` if another file has the name, which keeps it. Can be repeated.
///
/// # After a crash
///
/// The name stands for the whole member or for the stub; where names cannot be exchanged, or for nothing.
pub fn stand_in(at: &At<'_>, departure: &Departure, stub: &Stub) -> Result<bool> {
    let name = &departure.at.path;
    if is_aside(at, departure)? {
        return from_aside(at, departure, stub);
    }
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
    if departure.becomes.is_none() && keep(at, name, &departure.kept, &departure.mark)? == Kept::Another {
        return Ok(false);
    }
    match swap(at.backend, &stub.from, name) {
        Ok(()) => after_exchange(at, departure, stub),
        Err(error) if error.is_unsupported() => by_way_of_aside(at, departure, stub),
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
            take_back(at, &stub.from, &departure.at.path)?;
            Ok(false)
        }
    }
}

/// Where a member's file waits, where names cannot be exchanged, until its stub has the name.
fn aside(departure: &Departure) -> Option<StorePath> {
    let kept = &departure.kept;
    kept.parent().join(&format!("{}-aside", kept.file_name())).ok()
}

/// Whether a departure was cut off while nothing had the name.
pub fn is_aside(at: &At<'_>, departure: &Departure) -> Result<bool> {
    match aside(departure) {
        Some(aside) if departure.stub.is_some() => Ok(stat(at, &aside)?.is_some()),
        _ => Ok(false),
    }
}

/// Where names cannot be exchanged: for a moment nothing has the name. So whatever had it is looked at before the stub
/// takes it, and nobody's file is replaced unseen.
fn by_way_of_aside(at: &At<'_>, departure: &Departure, stub: &Stub) -> Result<bool> {
    let Some(aside) = aside(departure) else { return Ok(false) };
    match take_name(at.backend, &departure.at.path, &aside) {
        Ok(()) => from_aside(at, departure, stub),
        Err(BackendError::NotFound { .. }) if stat(at, &aside)?.is_some() => from_aside(at, departure, stub),
        Err(BackendError::NotFound { .. }) => {
            release(at, &stub.from)?;
            Ok(true)
        }
        Err(source) => Err(at.failed("put aside")(source)),
    }
}

/// What had the name waits: if it is the member, its stub takes the name, if that is free; else it comes back.
fn from_aside(at: &At<'_>, departure: &Departure, stub: &Stub) -> Result<bool> {
    let (name, Some(aside)) = (&departure.at.path, aside(departure)) else { return Ok(false) };
    let Some(found) = stat(at, &aside)? else { return Ok(true) };
    let goes = departure.is(&found);
    if goes {
        name_if_free(at, &stub.from, name, "name")?;
        release(at, &stub.from)?;
    } else {
        name_if_free(at, &aside, name, "put back")?;
    }
    match stat(at, &departure.kept)? {
        None if goes && departure.becomes.is_none() => {
            take_name(at.backend, &aside, &departure.kept).map_err(at.failed("keep the file of"))?;
        }
        Some(kept) if !goes && kept.id == found.id => {
            release(at, &departure.kept)?;
            release(at, &aside)?;
        }
        _ => release(at, &aside)?,
    }
    Ok(goes && stat(at, name)?.is_some_and(|found| stub.is(&found)))
}

/// Whether a stub has the name of a member that somebody wrote into, or replaced, at the very moment of the exchange.
pub fn stands_for_another(at: &At<'_>, departure: &Departure, stub: &Stub) -> Result<bool> {
    if departure.becomes.is_some() || !stat(at, &departure.at.path)?.is_some_and(|found| stub.is(&found)) {
        return Ok(false);
    }
    let another = |found: &Stat| !departure.is(found) && !stub.is(found);
    let waits = stat(at, &stub.from)?.is_some_and(|found| another(&found));
    Ok(waits || stat(at, &departure.kept)?.is_some_and(|found| another(&found)))
}

/// Gives the name back to what the stub stands for instead of the member. Can be repeated.
pub fn give_way(at: &At<'_>, departure: &Departure, stub: &Stub) -> Result<()> {
    let name = &departure.at.path;
    if !stands_for_another(at, departure, stub)? {
        return Ok(());
    }
    if stat(at, &stub.from)?.is_none() {
        match link(at.backend, &departure.kept, &stub.from) {
            Ok(()) => {}
            // A file can have one name only.
            Err(error) if error.is_unsupported() => {
                return take_name(at.backend, &departure.kept, name).map_err(at.failed("take back"));
            }
            Err(source) => return Err(at.failed("take back")(source)),
        }
    }
    let back = stat(at, &stub.from)?.map(|found| found.id);
    take_name(at.backend, &stub.from, name).map_err(at.failed("take back"))?;
    if stat(at, &departure.kept)?.map(|found| found.id) == back {
        release(at, &departure.kept)?;
    }
    Ok(())
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
