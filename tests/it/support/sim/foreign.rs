//! What CloudStack, its agents and people do to a store meanwhile, without asking.

use qchain::backend::Backend;
use qchain::backend::memory::MemoryStore;
use qchain::ids::StorePath;

use super::image::rename_backing;
use super::stage::{CLUSTERS, image, path, put, xml};
use super::truth::{Foreign, Member, Presence};
use super::world::{Phase, State};

/// Does one thing, if it can be done now; says what. As often as not it is done to what an instance is about to
/// touch.
pub fn act(state: &mut State, store: &MemoryStore) -> Option<String> {
    let mut names: Vec<String> = state.truth.members.keys().cloned().collect();
    let touched: Vec<String> = names.iter().filter(|name| is_touched(state, name)).cloned().collect();
    if !touched.is_empty() && state.dice.once_in(2) {
        names = touched;
    }
    let name = state.dice.pick(&names);
    let place = state.truth.layout.member(&name);
    if store.stat(&place).is_err() {
        return None;
    }
    let how = state.dice.below(6);
    // What is written into a file that has another name yet is noticed even then.
    let into = matches!(how, 2 | 5) && state.options.hard_links;
    if is_narrow(state, &name) && !into {
        return None;
    }
    match how {
        0 => remove(state, store, &name),
        1 => add_child(state, store, &name),
        2 => edit_header(state, store, &name),
        3 => replace(state, store, &name),
        how => rewrite_checkpoint(state, store, &name, how == 5),
    }
}

/// Whether a call that is about to be made is about a member or its checkpoint file.
fn is_touched(state: &State, name: &str) -> bool {
    let (member, checkpoint) = (state.truth.layout.member(name), state.truth.layout.checkpoint(name));
    let concerned = |path: &StorePath| *path == member || Some(path) == checkpoint.as_ref();
    let calls = state.slots.iter().filter_map(|slot| slot.pending.as_ref());
    calls.flat_map(|call| call.from.iter().chain([&call.path])).any(concerned)
}

/// Where a store cannot exchange names, nobody can notice what happens to a name in the very moment in which
/// it is given another file: between the last look and the rename. Names are left alone then.
fn is_narrow(state: &State, name: &str) -> bool {
    let (member, checkpoint) = (state.truth.layout.member(name), state.truth.layout.checkpoint(name));
    let concerned = |path: &StorePath| *path == member || Some(path) == checkpoint.as_ref();
    let about = |slot: &super::world::Slot| {
        slot.pending.as_ref().is_some_and(|call| match call.name {
            "rename" | "exchange" => concerned(&call.path),
            _ => false,
        })
    };
    !state.options.exchange && state.slots.iter().any(about)
}

/// Whether somebody is about to look at the stores, so that he would take what is done now for given.
fn is_planned(state: &State) -> bool {
    state.slots.iter().all(|slot| slot.phase != Phase::Begun)
}

fn spoil(state: &mut State, store: &MemoryStore, name: &str) {
    for above in state.truth.above(store, name) {
        if let Some(member) = state.truth.members.get_mut(&above) {
            member.spoilt = true;
        }
    }
}

fn remove(state: &mut State, store: &MemoryStore, name: &str) -> Option<String> {
    // An undo that is done again brings the name back.
    if state.truth.undos > 0 {
        return None;
    }
    spoil(state, store, name);
    let checkpoint = state.truth.layout.checkpoint(name);
    for place in [Some(state.truth.layout.member(name)), checkpoint].into_iter().flatten() {
        if store.remove_file(&place).is_ok() {
            store.sync_dir(&place.parent()).unwrap();
        }
    }
    let member = state.truth.members.get_mut(name)?;
    member.presence = Presence::Either;
    member.foreign = Some(Foreign::Removed);
    state.disturbed = true;
    Some(format!("remove {name}"))
}

fn add_child(state: &mut State, store: &MemoryStore, name: &str) -> Option<String> {
    let parent = state.truth.members.get(name).filter(|member| !member.spoilt)?;
    let place = state.truth.layout.member(name);
    let below = state.truth.layers.chain(store, &place).ok()?.view();
    if below != parent.view {
        return None;
    }
    let bits = (below.len() as u64 / CLUSTERS).trailing_zeros();
    let child = format!("n{}", state.foreign_number);
    state.foreign_number += 1;
    let spec = image(bits, Some(name), state.dice.roll() >> 1);
    if let Some(checkpoint) = state.truth.layout.checkpoint(&child) {
        put(store, &checkpoint, &xml(&child, Some(name), 0));
    }
    put(store, &state.truth.layout.member(&child), &spec.build());
    // Between the last look and the switch of a merge in place nobody can notice a child, which then reads what
    // is the survivor's.
    let merged = parent.in_place && parent.presence == Presence::Either;
    let narrow = merged && state.is_switching();
    let mut member = Member::new(spec.view(&below), 0);
    member.spoilt = narrow;
    member.late = true;
    state.truth.members.insert(child.clone(), member);
    Some(format!("add {child} over {name}"))
}

/// `qemu-img rebase -u` onto a member further down.
fn edit_header(state: &mut State, store: &MemoryStore, name: &str) -> Option<String> {
    let place = state.truth.layout.member(name);
    let file = store.open_writable(&place).unwrap();
    if !is_planned(state) || file.image_locks().unwrap().any {
        return None;
    }
    let chain = state.truth.layers.chain(store, &place).ok()?;
    let further = chain.paths.get(2..).filter(|paths| !paths.is_empty())?;
    let onto = state.dice.pick(further).file_name().to_owned();
    spoil(state, store, name);
    // One that was merged into in place has its successor's file for its grace: that is what is written into.
    let inode = file.stat().unwrap().id.inode;
    let is_it = |other: &String| {
        other != name
            && store.stat(&state.truth.layout.member(other)).is_ok_and(|found| found.id.inode == inode)
    };
    let successor = state.truth.members.keys().find(|other| is_it(other)).cloned();
    if let Some(successor) = &successor {
        spoil(state, store, successor);
    }
    rename_backing(store, &place, &onto).unwrap();
    settle(state, successor.as_deref().unwrap_or(name), inode, Some(onto.clone()));
    Some(format!("rebase {name} onto {onto}"))
}

/// A parent that others gave to a member lasts, and a power cut may bring back over that member what had been given another file:
/// it reads through what they wrote, from that instant on.
pub fn met_again(state: &mut State, store: &MemoryStore) {
    let rebased = |member: &Member| matches!(member.foreign, Some(Foreign::File { backing: Some(_), .. }));
    let members = state.truth.members.iter().filter(|(_, member)| rebased(member));
    let names: Vec<String> = members.map(|(name, _)| name.clone()).collect();
    for name in names {
        spoil(state, store, &name);
    }
}

/// Another image takes the name.
fn replace(state: &mut State, store: &MemoryStore, name: &str) -> Option<String> {
    if !is_planned(state) {
        return None;
    }
    spoil(state, store, name);
    let view = &state.truth.members.get(name)?.view;
    let bits = (view.len() as u64 / CLUSTERS).trailing_zeros();
    let spec = image(bits, None, state.dice.roll() >> 1);
    let temporary = path("upload");
    let inode = put(store, &temporary, &spec.build());
    let place = state.truth.layout.member(name);
    store.rename(&temporary, &place).unwrap();
    for directory in [place.parent(), StorePath::root()] {
        store.sync_dir(&directory).unwrap();
    }
    settle(state, name, inode, None);
    Some(format!("replace {name}"))
}

fn settle(state: &mut State, name: &str, inode: u64, backing: Option<String>) {
    if let Some(member) = state.truth.members.get_mut(name) {
        member.foreign = Some(Foreign::File { inode, backing });
        member.presence = Presence::Either;
    }
    state.disturbed = true;
}

/// The agent rewrites disk labels, in place or by another file.
fn rewrite_checkpoint(state: &mut State, store: &MemoryStore, name: &str, in_place: bool) -> Option<String> {
    let place = state.truth.layout.checkpoint(name)?;
    let (parent, stamp) = state.truth.checkpoint(store, name)?;
    let text = xml(name, parent.as_deref(), stamp + 1);
    let how = if in_place {
        let file = store.open_writable(&place).ok()?;
        file.set_length(0).unwrap();
        file.write_at(0, &text).unwrap();
        file.sync().unwrap();
        // All file systems that there are make a file's last rename durable together with its bytes.
        store.sync_dir(&place.parent()).unwrap();
        "in place"
    } else {
        let temporary = path("upload");
        put(store, &temporary, &text);
        store.rename(&temporary, &place).unwrap();
        for directory in [place.parent(), StorePath::root()] {
            store.sync_dir(&directory).unwrap();
        }
        "anew"
    };
    state.truth.members.get_mut(name)?.stamp = stamp + 1;
    Some(format!("write the checkpoint file of {name} {how}"))
}
