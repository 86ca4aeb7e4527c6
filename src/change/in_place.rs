//! Merging in place: the lowest deleted member's file grows behind its end until it is the survivor's new file.
//!
//! The plan is a pure function of the tables of the members concerned, which nothing changes before the one
//! write that switches the file over. So it is decided before the first byte, and any process can do the work
//! again from the beginning; until the switch the file is what it was, and so is every view. A failure that
//! is not the store's own takes the publication back: the deleted member keeps its old image, and what was
//! added behind its end is cut off again.
//!
//! What is known of the members is carried over in two steps: leaf table and manifest of the new file are written, and
//! proved, before the switch; once the file is what it will be the manifest gets the file's mark. A crash between the two
//! leaves a manifest that fits no file, and recovery does the second step.

use std::sync::Arc;

use crate::backend::publish::link;
use crate::backend::{BackendError, LockKind, StoreFile};
use crate::chain::delete::Merge;
use crate::chain::graph::Key;
use crate::chain::graph::NodeId;
use crate::change::decided::{Decided, Grown};
use crate::change::error::{ChangeError, Result};
use crate::change::publication::{Published, stat};
use crate::change::record::{InPlace, Mark, Publication};
use crate::change::site::{At, Site};
use crate::failure::{Code, Failure, Kind, with_causes};
use crate::ids::StorePath;
use crate::progress::Silent;
use crate::qcow2::Image;
use crate::qcow2::layout::Switched;
use crate::qcow2::unused::unused_below;
use crate::qcow2::write::{Sources, switch, switch_state, write_onto};
use crate::store::attest::{Attestor, Knowledge, Made, mark_again};
use crate::store::manifest::FileMark;
use crate::store::manifest::shelf::{self, Shelf};
use crate::store::merge::MergeInput;
use crate::store::prove::prove;
use crate::store::record::own;
use crate::store::scan::{Scan, ScanOptions};
use crate::store::{StoreError, Stores};

/// Does what is left of one merge in place, up to the second name by which it is published.
pub fn complete(
    site: &Site<'_>,
    decided: &Decided<'_>,
    publication: &Publication,
) -> Result<std::result::Result<(), Published>> {
    let Some(plan) = &publication.in_place else { return Ok(Ok(())) };
    let Some(lowest) = plan.members.first() else { return Ok(Ok(())) };
    let at = site.at(lowest)?;
    let _alone = lock(&at, publication)?;
    let taken_back = |reason: &str| {
        let reason = format!("{} {reason}", at.name);
        Ok(Err(Published::TakenBack { code: Code::ChangedMeanwhile, reason }))
    };
    match stat(&at, &lowest.path)? {
        Some(found) if publication.new.inode == found.id.inode => {}
        _ => return taken_back("was replaced or removed by somebody else"),
    }
    if stat(&at, &publication.from)?.is_some() {
        keep_writers_out(site, decided, publication)?;
        return Ok(Ok(()));
    }
    let file = at.backend.open_writable(&lowest.path).map_err(at.failed("open"))?;
    let locks = file.image_locks().map_err(at.failed("look at the locks of"))?;
    if locks.writer {
        return taken_back("is open for writing");
    }
    // QEMU must not begin to write into what is being changed; where there are no locks the operator or the
    // planner has made sure.
    let held = match file.hold_image_locks() {
        Ok(Some(held)) => Some(held),
        Ok(None) => return taken_back("is open for writing"),
        Err(error) if error.is_unsupported() => None,
        Err(source) => return Err(at.failed("lock")(source)),
    };
    if let Err(error) = grow(site, decided, (publication, plan), &at, &file) {
        // The store's own failures are tried again by recovery; all others end the attempt: nothing is lost
        // before the switch but what was added.
        let state = switch_state(&plan.switch, file.as_ref());
        return match error.kind() {
            Kind::Io | Kind::Busy => Err(error),
            // It is the survivor's already, or half of it is: there is no way back. Nor where another of the
            // operation's merges may have been made: all of them are, or none.
            Kind::NoSpace
                if decided.commit().publications.len() > 1
                    || !matches!(state, Ok(Switched::Not | Switched::Foreign)) =>
            {
                Err(error)
            }
            _ => {
                cut_off(site, &at, (publication, plan), &file)?;
                let reason = format!("{} was not merged into: {}", at.name, with_causes(&error));
                Ok(Err(Published::TakenBack { code: error.code(), reason }))
            }
        };
    }
    if identify(site, publication, &at, &file)? {
        file.sync().map_err(at.failed("make durable"))?;
    }
    carry_over(site, publication, &at, &file)?;
    link(at.backend, &lowest.path, &publication.from).map_err(at.failed("give a second name to"))?;
    if let Some(held) = held {
        decided.keep_writers_out(held);
    }
    Ok(Ok(()))
}

/// Gives the file the identity of the survivor's old one, unless it has that: what an earlier attempt gave it was made
/// durable by the switch. `true`: it is to be made durable. Who put another one there since, or none, has nothing to give;
/// publishing will see it.
fn identify(
    site: &Site<'_>,
    publication: &Publication,
    at: &At<'_>,
    file: &Arc<dyn StoreFile>,
) -> Result<bool> {
    let survivor = site.at(&publication.at)?;
    let old = match survivor.backend.open(&publication.at.path) {
        Ok(old) => old,
        Err(BackendError::NotFound { .. }) => return Ok(false),
        Err(source) => return Err(survivor.failed("open")(source)),
    };
    if !publication.old.is(&old.stat().map_err(survivor.failed("look at"))?) {
        return Ok(false);
    }
    let identity = old.identity().map_err(survivor.failed("look at the owner of"))?;
    if file.identity().map_err(at.failed("look at the owner of"))? == identity {
        return Ok(false);
    }
    file.set_identity(&identity).map_err(at.failed("give owner and attributes to"))?;
    Ok(true)
}

/// Leaves a merge alone whose survivor somebody else removed or replaced before it was made: the deleted member keeps
/// its old image. `false`: it is the survivor's by now, or is gone.
pub fn is_left(site: &Site<'_>, publication: &Publication) -> Result<bool> {
    let Some((at, plan)) = lowest(site, publication)? else { return Ok(false) };
    let _alone = lock(&at, publication)?;
    let file = at.backend.open_writable(&at.key.path).map_err(at.failed("open"))?;
    let state = switch_state(&plan.switch, file.as_ref())
        .map_err(|source| StoreError::Image { member: at.name.clone(), source })?;
    if matches!(state, Switched::Done | Switched::Torn) {
        return Ok(false);
    }
    if state == Switched::Not && !file.image_locks().map_err(at.failed("look at the locks of"))?.writer {
        cut_off(site, &at, (publication, plan), &file)?;
    }
    Ok(true)
}

/// Only one process merges into a file, or takes that back: leases are taken over from who is stopped for long, and of
/// two the one could take back what the other is about to switch to.
fn lock(at: &At<'_>, publication: &Publication) -> Result<Box<dyn Send + Sync>> {
    let path = own(&["locks", &format!("in-place-{}", publication.new.inode)]);
    let lock = at.backend.try_lock(&path, LockKind::Exclusive).map_err(at.failed("lock"))?;
    lock.ok_or_else(|| ChangeError::Busy {
        owner: format!("another qchain, which is merging into {} and may be stopped", at.name),
    })
}

/// Keeps QEMU's writers out of a file that was merged into, as long as it has the deleted member's name beside
/// the survivor's: a `rebase -u` of the one onto the other would make it stand on itself. A writer that is in
/// already stays; where there are no locks there is nothing to take.
pub fn keep_writers_out(site: &Site<'_>, decided: &Decided<'_>, publication: &Publication) -> Result<()> {
    let Some((at, _)) = lowest(site, publication)? else { return Ok(()) };
    let file = match at.backend.open(&at.key.path) {
        Ok(file) => file,
        Err(BackendError::NotFound { .. }) => return Ok(()),
        Err(source) => return Err(at.failed("open")(source)),
    };
    match file.hold_image_locks() {
        Ok(Some(held)) => decided.keep_writers_out(held),
        Ok(None) => {}
        Err(error) if error.is_unsupported() => {}
        Err(source) => return Err(at.failed("lock")(source)),
    }
    Ok(())
}

/// Writes behind the end, proves, switches.
fn grow(
    site: &Site<'_>,
    decided: &Decided<'_>,
    (publication, plan): (&Publication, &InPlace),
    at: &At<'_>,
    file: &Arc<dyn StoreFile>,
) -> Result<()> {
    let failed = |error: &dyn Failure, text: String| ChangeError::InPlace {
        member: at.name.clone(),
        code: error.code(),
        detail: text,
    };
    let image_failed = |error: crate::qcow2::ImageError| failed(&error, with_causes(&error));
    if matches!(
        switch_state(&plan.switch, file.as_ref()).map_err(image_failed)?,
        Switched::Done | Switched::Torn
    ) {
        // Died between the switch and the second name: nothing of the other members is needed any more, nor asked for, as
        // they may be gone by now.
        return switch(&plan.switch, file.as_ref()).map_err(image_failed);
    }
    let (scan, merge) = find(site, plan)?;
    let input = MergeInput::open(site.stores, &scan, &merge)?;
    is_alone(site, &scan, &merge)?;
    let knowledge = known_before(site, publication, plan, (&scan, &merge, &input))?;
    let layout = input.layout_onto(Some(plan.base)).map_err(image_failed)?;
    let alignment = input.alignments(plan.clone_alignment);
    let images: Vec<Image> = input.upper.images().cloned().collect();
    let below = |from, buffer: &mut [u8]| input.lower.read(from, buffer);
    let sources = Sources {
        layers: &images,
        clone_alignment: &alignment,
        below: &below,
        progress: &Silent,
        cancel: site.cancel,
        pace: &site.pace,
    };
    if plan.clone_alignment == 0 && layout.file_length() > plan.base {
        file.reserve(plan.base, layout.file_length() - plan.base).map_err(at.failed("reserve space in"))?;
    }
    let written = write_onto(&layout, file.as_ref(), &sources, input.upper.map()).map_err(image_failed)?;
    file.drop_cache().map_err(at.failed("drop from the cache"))?;
    let Some(becomes) = layout.switch() else { return Ok(()) };
    if switch_state(becomes, file.as_ref()).map_err(image_failed)? == Switched::Done {
        return Ok(());
    }
    let sealed = at.backend.open(&at.key.path).map_err(at.failed("open again"))?;
    let image = Image::open_switched(sealed, &format!("the new image in {}", at.name), becomes)
        .map_err(image_failed)?;
    let proof = prove(&layout, &input, &image, &at.name)?;
    let made = Made {
        input: &input,
        layout: &layout,
        new: &image,
        alignment: &alignment,
        now_ns: site.clock.wall_ns(),
        cancel: site.cancel,
        pace: &site.pace,
    };
    let carried = knowledge.carry(site.stores.get(at.key.store)?, &made)?;
    let survivor = publication.at.clone();
    decided.note(Grown { survivor, written, proof, carried });
    stands(site, decided, plan, at)?;
    switch(becomes, file.as_ref()).map_err(image_failed)
}

/// What is known of the members, looked up before the first byte is written: by an attempt that a crash cut off, some
/// may have been.
fn known_before(
    site: &Site<'_>,
    publication: &Publication,
    plan: &InPlace,
    (scan, merge, input): (&Scan, &Merge, &MergeInput),
) -> Result<Knowledge> {
    let Mark { inode, modified_ns, .. } = publication.new;
    let grown = FileMark { inode, length: plan.length, modified_ns: modified_ns.into() };
    let shelves = Shelf::load_all(site.stores)?;
    Ok(Attestor::open(site.stores, scan, &shelves, merge, input, Some(grown))?)
}

/// The file is the survivor's now, and what is known of it is so from here on; what it was as the deleted member's is no
/// more. Of a survivor whose new file is not known nothing is: nobody asks what its old one was.
fn carry_over(
    site: &Site<'_>,
    publication: &Publication,
    at: &At<'_>,
    file: &Arc<dyn StoreFile>,
) -> Result<()> {
    let store = site.stores.get(at.key.store)?;
    let shelf = Shelf::load(store)?;
    let (member, new) = (&publication.at.path, publication.new.inode);
    let mut stale = vec![(&at.key.path, new)];
    if !mark_again(store, member, file)? {
        stale.extend([(member, new), (member, publication.old.inode)]);
    }
    for (member, inode) in stale.into_iter().filter(|(member, inode)| shelf.has(member, *inode)) {
        shelf::forget(at.backend, member, inode).map_err(at.failed("forget what is known of"))?;
    }
    Ok(())
}

/// Whether an image's tables lie behind the base already.
fn is_switched(image: &Image, plan: &InPlace) -> bool {
    image.header().l1_offset.0 >= plan.base
}

/// The members of the plan, as they hang together now.
fn find(site: &Site<'_>, plan: &InPlace) -> Result<(Scan, Merge)> {
    let options = ScanOptions { now_ns: 0, settle_ns: 0, caches: &[], progress: &Silent };
    let scan = Scan::run(site.stores, &options)?;
    let mut ids: Vec<NodeId> = Vec::new();
    for place in &plan.members {
        let found = scan.graph.find(&site.key(place)?);
        ids.push(found.ok_or_else(|| ChangeError::ChangedMeanwhile { member: place.path.to_string() })?);
    }
    let new_parent = match &plan.new_parent {
        Some(place) => {
            let found = scan.graph.find(&site.key(place)?);
            Some(found.ok_or_else(|| ChangeError::ChangedMeanwhile { member: place.path.to_string() })?)
        }
        None => None,
    };
    let linked = ids.windows(2).all(|pair| match pair {
        [below, above] => scan.graph.parent(*above) == Some(*below),
        _ => false,
    });
    let Some((survivor, merged)) = ids.split_last() else {
        return Err(ChangeError::ChangedMeanwhile { member: "a merge of nothing".to_owned() });
    };
    if !linked || merged.first().is_none_or(|lowest| scan.graph.parent(*lowest) != new_parent) {
        let member = site.stores.display(&scan.graph.node(*survivor).key);
        return Err(ChangeError::ChangedMeanwhile { member });
    }
    let merge = Merge { survivor: *survivor, merged: merged.to_vec(), new_parent, merged_stay: false };
    Ok((scan, merge))
}

/// Whether the merge may be switched to: nobody was put over what is merged while it grew, who would read what it is
/// then, and nobody has taken the operation back.
fn stands(site: &Site<'_>, decided: &Decided<'_>, plan: &InPlace, at: &At<'_>) -> Result<()> {
    let (scan, merge) = find(site, plan)?;
    is_alone(site, &scan, &merge)?;
    if decided.is_undone()? {
        return Err(ChangeError::ChangedMeanwhile { member: at.name.clone() });
    }
    Ok(())
}

/// Whether nobody reads through the members that are merged but the next of them: what he reads would change.
fn is_alone(site: &Site<'_>, scan: &Scan, merge: &Merge) -> Result<()> {
    let above = merge.merged.iter().skip(1).chain([&merge.survivor]);
    for (id, above) in merge.merged.iter().zip(above) {
        if let Some(other) = scan.graph.readers(*id).find(|other| other != above) {
            let name = |id| site.stores.display(&scan.graph.node(id).key);
            return Err(ChangeError::NewChild { member: name(*id), child: name(other) });
        }
    }
    Ok(())
}

/// Takes off again what was added to a file that was not switched.
fn cut_off(
    site: &Site<'_>,
    at: &At<'_>,
    (publication, plan): (&Publication, &InPlace),
    file: &Arc<dyn StoreFile>,
) -> Result<()> {
    let image = Image::open(file.clone(), &at.name)
        .map_err(|error| StoreError::Image { member: at.name.clone(), source: error })?;
    let now = file.stat().map_err(at.failed("look at"))?;
    // Space that was only reserved lies behind the end, too, and goes with the same call.
    let touched = now.length > plan.length || now.length == plan.length && !publication.new.is(&now);
    if touched && !is_switched(&image, plan) {
        // Not synced: it may be a sync that failed, and a power cut brings back no more than bytes behind the
        // image's end.
        file.set_length(plan.length).map_err(at.failed("shorten"))?;
        mark_again(site.stores.get(at.key.store)?, &at.key.path, file)?;
    }
    Ok(())
}

/// Gives back the space of what merges in place have left unused: the old tables, and data that the deleted
/// members' successors replaced. False if that has to wait: for somebody who has the file open, and may read what is
/// unused since, or for a later operation that deletes the file or merges it, and knows it by its mark.
pub fn give_back(site: &Site<'_>, decided: &Decided<'_>) -> Result<bool> {
    for publication in &decided.commit().publications {
        let Some(plan) = &publication.in_place else { continue };
        let at = site.at(&publication.at)?;
        match stat(&at, &publication.at.path)? {
            Some(found) if publication.is_new(&found) => {}
            // Another file by now.
            _ => continue,
        }
        if decided.is_built_on(&publication.at)? {
            return Ok(false);
        }
        let file = at.backend.open_writable(&publication.at.path).map_err(at.failed("open"))?;
        if file.image_locks().map_err(at.failed("look at the locks of"))?.any {
            return Ok(false);
        }
        let image = Image::open(file.clone(), &at.name)
            .map_err(|source| StoreError::Image { member: at.name.clone(), source })?;
        let unused = unused_below(&image, plan.base)
            .map_err(|source| StoreError::Image { member: at.name.clone(), source })?;
        for (from, length) in unused {
            if !file.punch(from.0, length).map_err(at.failed("give back space of"))? {
                break;
            }
        }
        let store = site.stores.get(at.key.store)?;
        // A manifest holds for what lasts. For nothing else it matters when the space is given back.
        if shelf::read(store, &at.key.path, publication.new.inode)?.is_some() {
            file.sync().map_err(at.failed("make durable"))?;
            mark_again(store, &at.key.path, &file)?;
        }
    }
    Ok(true)
}

/// Whether a merge into a file was finished by another than who began it: that one may only be stopped, and
/// write into the file when it goes on.
pub fn was_taken_over(stores: &Stores, member: &Key, inode: u64) -> crate::store::Result<bool> {
    let store = stores.get(member.store)?;
    match store.backend().stat(&marker(inode)) {
        Ok(_) => Ok(true),
        Err(BackendError::NotFound { .. }) => Ok(false),
        Err(source) => Err(StoreError::backend(store, source)),
    }
}

/// Remembers that merges in place of an operation go on in another process than they began in.
pub fn take_over(site: &Site<'_>, decided: &Decided<'_>) -> Result<()> {
    for publication in decided.commit().publications.iter().filter(|one| one.in_place.is_some()) {
        let at = site.at(&publication.at)?;
        // Made already, as far as its bytes go; or over, and the survivor has a still newer file.
        let made = stat(&at, &publication.at.path)?.is_some_and(|now| publication.is_new(&now));
        if made || stat(&at, &publication.from)?.is_some() || lowest(site, publication)?.is_none() {
            continue;
        }
        match at.backend.create(&marker(publication.new.inode)) {
            Ok(_) | Err(BackendError::AlreadyExists { .. }) => {}
            Err(source) => return Err(at.failed("remember the merge into")(source)),
        }
    }
    Ok(())
}

/// The deleted member that is merged into, if its name is still its file's.
pub fn lowest<'a>(site: &'a Site<'_>, publication: &'a Publication) -> Result<Option<(At<'a>, &'a InPlace)>> {
    let Some(plan) = &publication.in_place else { return Ok(None) };
    let Some(lowest) = plan.members.first() else { return Ok(None) };
    let at = site.at(lowest)?;
    let found = stat(&at, &lowest.path)?;
    Ok(found.is_some_and(|found| publication.is_new(&found)).then_some((at, plan)))
}

fn marker(inode: u64) -> StorePath {
    own(&["locks", &format!("taken-over-{inode}")])
}
