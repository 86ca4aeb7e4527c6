//! How a merge moves its data: the modes that are possible, what each would cost, which is taken and why.

use std::collections::BTreeMap;

use crate::backend::Capabilities;
use crate::chain::delete::Merge;
use crate::change::in_place::was_taken_over;
use crate::failure::Code;
use crate::ops::delete::plan::Mode;
use crate::ops::delete::select::{Aim, InPlacePolicy, ModeChoice, Request};
use crate::ops::{OpError, Result};
use crate::qcow2::layout::Layout;
use crate::store::merge::{Cost, MergeInput};
use crate::store::scan::Scan;
use crate::store::{StoreError, Stores};

/// What the kernel's work for one cloned run is worth in bytes written, about (measured on XFS: some 20 us a
/// run, at 1 GiB/s).
const BYTES_A_RUN: u64 = 20 << 10;
/// A plan that costs less than this is not worth looking for a cheaper one, in bytes.
const CHEAP_BYTES: u64 = 64 << 20;
/// How much cheaper a merge in place must be than one by clones, which can be undone.
const WORTH_IT: u64 = 4;

/// The mode taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// It.
    pub mode: Mode,
    /// Why.
    pub reason: String,
    /// What it costs.
    pub cost: Cost,
}

/// The mode taken, and the layout of the survivor's new file, for every mode but in place.
#[derive(Debug)]
pub struct Chosen {
    /// The mode.
    pub choice: Choice,
    /// The layout.
    pub layout: Layout,
    /// The length of the survivor's new file in bytes, in the mode taken.
    pub file_length: u64,
    /// Of a file that is merged into: the bytes that belong to nothing afterwards.
    pub superseded_bytes: u64,
}

/// What a cost is worth in bytes written. What is copied is read before.
fn weight(cost: &Cost) -> u64 {
    let moved = 2 * cost.data_bytes + cost.metadata_bytes;
    moved.saturating_add(cost.clone_runs.saturating_mul(BYTES_A_RUN))
}

/// Chooses. Reads the members' tables.
pub fn choose(
    stores: &Stores,
    scan: &Scan,
    request: &Request<'_>,
    capabilities: &BTreeMap<usize, Capabilities>,
    merge: &Merge,
) -> Result<Chosen> {
    let input = MergeInput::open_upper(stores, scan, merge)?;
    let layout = input.layout()?;
    let choice = choose_with(stores, scan, request, capabilities, merge, &input, &layout)?;
    let (file_length, superseded_bytes) = match choice.mode {
        Mode::InPlace => {
            let onto = input.layout_onto(None)?;
            (onto.file_length(), onto.superseded().map(|(_, length)| length).sum())
        }
        Mode::Clone | Mode::Copy | Mode::Remove => (layout.file_length(), 0),
    };
    Ok(Chosen { choice, layout, file_length, superseded_bytes })
}

fn choose_with(
    stores: &Stores,
    scan: &Scan,
    request: &Request<'_>,
    capabilities: &BTreeMap<usize, Capabilities>,
    merge: &Merge,
    input: &MergeInput,
    layout: &Layout,
) -> Result<Choice> {
    let key = &scan.graph.node(merge.survivor).key;
    let probed = capabilities.get(&key.store);
    let clones = probed.filter(|found| found.clone);
    let copy = input.cost(layout, &input.clone_alignment(None));
    let clone = clones.map(|found| input.cost(layout, &input.clone_alignment(Some(found))));
    let in_place = || -> Result<std::result::Result<Cost, String>> {
        if let Some(why) = unfit(stores, scan, request, merge, input, probed)? {
            return Ok(Err(why));
        }
        let layout = input.layout_onto(None)?;
        Ok(Ok(input.cost(&layout, &input.clone_alignment(clones))))
    };
    let impossible = |message: String| {
        let member = stores.display(key);
        OpError::Refused { code: Code::ModeImpossible, member, message }
    };
    let asked = |mode, cost| Ok(Choice { mode, reason: format!("asked for; {}", words(&cost)), cost });
    match (request.mode, clone) {
        (ModeChoice::Copy, _) => asked(Mode::Copy, copy),
        (ModeChoice::Clone, Some(clone)) => asked(Mode::Clone, clone),
        (ModeChoice::Clone, None) => {
            Err(impossible("its file system cannot share extents between files".to_owned()))
        }
        (ModeChoice::InPlace, _) => match in_place()? {
            Ok(cost) => Ok(Choice {
                reason: format!("asked for; it cannot be undone; {}", words(&cost)),
                mode: Mode::InPlace,
                cost,
            }),
            Err(why) => Err(impossible(why)),
        },
        (ModeChoice::Auto, Some(clone)) if weight(&clone) < CHEAP_BYTES => {
            let reason = format!("the file system shares extents; {}", words(&clone));
            Ok(Choice { mode: Mode::Clone, reason, cost: clone })
        }
        (ModeChoice::Auto, clone) => {
            let free_bytes = free(stores, key.store)?;
            Ok(cheapest(request.in_place, free_bytes, clone, copy, in_place()?))
        }
    }
}

/// The cheapest of the modes that fit; a merge in place only where its policy says so.
fn cheapest(
    policy: InPlacePolicy,
    free_bytes: u64,
    clone: Option<Cost>,
    copy: Cost,
    in_place: std::result::Result<Cost, String>,
) -> Choice {
    let (mode, cost) = match clone {
        Some(clone) if weight(&clone) <= weight(&copy) => (Mode::Clone, clone),
        _ => (Mode::Copy, copy),
    };
    let fits = cost.written_bytes() <= free_bytes;
    let (other, why_not) = match in_place {
        Ok(cost) => (Some(cost), String::new()),
        Err(why) => (None, format!("; not in place: {why}")),
    };
    if let Some(other) = other {
        let cheaper = match mode {
            Mode::Clone => weight(&other).saturating_mul(WORTH_IT) < weight(&cost),
            // Half the bytes, which is where the survivor has no more than what is merged into it.
            Mode::InPlace | Mode::Copy | Mode::Remove => {
                other.data_bytes.saturating_mul(2) <= cost.data_bytes && weight(&other) < weight(&cost)
            }
        };
        let taken = match policy {
            InPlacePolicy::Auto => cheaper || !fits,
            InPlacePolicy::NoSpace => !fits,
            InPlacePolicy::Never => false,
        };
        if taken && (fits || other.written_bytes() < cost.written_bytes()) {
            let reason = format!(
                "{}; {} would {}; it cannot be undone",
                words(&other),
                mode.word(),
                if fits {
                    words(&cost)
                } else {
                    format!("need {} bytes, {free_bytes} are free", cost.written_bytes())
                },
            );
            return Choice { mode: Mode::InPlace, reason, cost: other };
        }
    }
    let first = match mode {
        Mode::Clone => "the file system shares extents",
        Mode::InPlace | Mode::Copy | Mode::Remove => "the file system cannot share extents",
    };
    Choice { mode, reason: format!("{first}; {}{why_not}", words(&cost)), cost }
}

fn words(cost: &Cost) -> String {
    let Cost { clone_runs, copy_runs, .. } = cost;
    let copied = cost.written_bytes();
    match (*clone_runs, *copy_runs) {
        (0, runs) => format!("write {copied} bytes, {runs} runs"),
        (clones, 0) => format!("write {copied} bytes of tables, {clones} runs are cloned"),
        (clones, runs) => format!("write {copied} bytes, {runs} runs, {clones} runs are cloned"),
    }
}

fn free(stores: &Stores, index: usize) -> Result<u64> {
    let store = stores.get(index)?;
    let space = store.backend().space().map_err(|source| StoreError::backend(store, source))?;
    Ok(space.free_bytes)
}

/// Why a merge cannot be made in the lowest member's file; `None` if it can.
fn unfit(
    stores: &Stores,
    scan: &Scan,
    request: &Request<'_>,
    merge: &Merge,
    input: &MergeInput,
    probed: Option<&Capabilities>,
) -> Result<Option<String>> {
    let say = |text: &str| Ok(Some(text.to_owned()));
    if request.aim == Aim::Consolidate {
        return say("what is folded into it stays as it is");
    }
    if request.in_place == InPlacePolicy::Never {
        return say("the configuration says never");
    }
    if let Err(unfit) = input.fits_onto() {
        return Ok(Some(unfit.to_string()));
    }
    let Some(lowest) = merge.merged.first().copied() else { return say("nothing is merged") };
    // Those that are leaving count: as long as they have their names they may be opened.
    if merge.merged.iter().any(|id| scan.graph.readers(*id).count() != 1) {
        let mut readers = merge.merged.iter().flat_map(|id| scan.graph.readers(*id));
        return if readers.any(|id| request.leaving.contains(&id)) {
            say(
                "a member that keeps its name until its readers have had their grace reads through a deleted one",
            )
        } else {
            say("a deleted member has several children")
        };
    }
    let (Some(member), Some(survivor)) = (scan.member(lowest), scan.member(merge.survivor)) else {
        return say("it is not in the scan");
    };
    if member.stat.id.device != survivor.stat.id.device || member.key.store != survivor.key.store {
        return say("the lowest deleted member and the survivor lie on different file systems");
    }
    if !probed.is_some_and(|can| can.hard_links) {
        return say("the store has no hard links");
    }
    if !request.exclusive && !probed.is_some_and(|can| can.byte_range_locks) {
        return say(
            "the store's locks were not proved to be seen by others, and --exclusive was not given, by which you vouch \
             that nobody else has the members open",
        );
    }
    if merge.merged.iter().any(|id| scan.member(*id).is_some_and(|member| member.stat.links > 1)) {
        return say("a deleted member's file has another name");
    }
    if merge.merged.iter().any(|id| scan.member(*id).is_some_and(|member| member.locks.any)) {
        return say("somebody has a deleted member open");
    }
    if was_taken_over(stores, &member.key, member.stat.id.inode)? {
        return say("an instance that was taken over may still write into the file");
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::{Cost, InPlacePolicy, Mode, cheapest};

    fn cost(data_bytes: u64, clone_runs: u64) -> Cost {
        Cost { data_bytes, clone_runs, metadata_bytes: 1000, ..Cost::default() }
    }

    #[test]
    fn the_cheapest_that_fits_is_taken_and_said() {
        let gib = 1 << 30;
        let big = 100 * gib;
        let copy = cost(2 * gib, 0);
        let down = cost(gib, 0);
        let auto = InPlacePolicy::Auto;
        let choice = cheapest(auto, big, None, copy, Ok(down));
        assert_eq!((choice.mode, choice.cost), (Mode::InPlace, down));
        assert!(choice.reason.contains("copy would write 2147484648 bytes"), "{}", choice.reason);
        // One that can be undone is worth something.
        assert_eq!(cheapest(auto, big, None, copy, Ok(cost(gib + 1, 0))).mode, Mode::Copy);
        let clone = cost(0, 100_000);
        assert_eq!(cheapest(auto, big, Some(clone), copy, Ok(cost(0, 50_000))).mode, Mode::Clone);
        assert_eq!(cheapest(auto, big, Some(clone), copy, Ok(cost(0, 10_000))).mode, Mode::InPlace);
        // Only where nothing else fits, or never.
        let no_space = InPlacePolicy::NoSpace;
        assert_eq!(cheapest(no_space, big, None, copy, Ok(down)).mode, Mode::Copy);
        assert_eq!(cheapest(no_space, gib + (1 << 20), None, copy, Ok(down)).mode, Mode::InPlace);
        assert_eq!(cheapest(InPlacePolicy::Never, 0, None, copy, Ok(down)).mode, Mode::Copy);
        let choice = cheapest(auto, big, None, copy, Err("it is open".to_owned()));
        assert_eq!(choice.mode, Mode::Copy);
        assert!(choice.reason.ends_with("not in place: it is open"), "{}", choice.reason);
    }
}
