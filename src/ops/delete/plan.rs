//! What a delete would do: the values that `--dry-run` prints and that [`run`](super::run()) carries out.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rayon::prelude::*;

use crate::backend::Capabilities;
use crate::chain::delete::{Departure, Merge};
use crate::chain::graph::{Key, NodeId};
use crate::change::yard::Yard;
use crate::ops::delete::consolidate;
use crate::ops::delete::follow;
use crate::ops::delete::mode::{Choice, Chosen, choose};
use crate::ops::delete::select::{Aim, Request, select};
use crate::ops::{OpError, Result};
use crate::qcow2::layout::Layout;
use crate::store::manifest::shelf::Shelf;
use crate::store::merge::Cost;
use crate::store::scan::Scan;
use crate::store::{StoreError, Stores};

/// How data is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By sharing extents.
    Clone,
    /// By writing into the lowest deleted member.
    InPlace,
    /// By copying.
    Copy,
    /// Nothing is moved: a name goes.
    Remove,
}

impl Mode {
    /// The word in reports.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Clone => "clone",
            Self::InPlace => "in-place",
            Self::Copy => "copy",
            Self::Remove => "remove",
        }
    }
}

/// How long readers on other hosts of a network mount may take to have opened what they need.
const NETWORK_GRACE: Duration = Duration::from_mins(15);
/// How long deleted members keep their names at least where stubs take them: a reader that opened an old survivor
/// must have opened what is below it by then.
pub const STUB_GRACE: Duration = Duration::from_mins(1);
/// Memory for layouts that are kept from the plan to the merge, in bytes; others are made once more.
const KEPT_LAYOUTS_BYTES: u64 = 32 << 20;

/// One survivor to be written, or one member whose name goes without.
#[derive(Debug)]
pub struct Entry {
    /// The members that are merged, lowest first.
    pub members: Vec<NodeId>,
    /// The survivor that they are merged into; `None` if nobody reads them.
    pub into: Option<NodeId>,
    /// How.
    pub mode: Mode,
    /// Why so.
    pub reason: String,
    /// What it costs.
    pub cost: Cost,
    /// The length of the survivor's new file in bytes.
    pub file_length: u64,
    /// The space that comes back once all names are gone, in bytes, as far as the allocation of the files tells.
    pub bytes_to_free: u64,
    /// The space that it takes more than before, in bytes: copies of what several survivors read.
    pub bytes_to_take: u64,
    /// The space that is needed meanwhile, in bytes.
    pub bytes_needed: u64,
    /// The merge, for a survivor.
    pub merge: Option<Merge>,
    /// The layout of the survivor's new file, unless it is merged in place or the layouts of the whole plan
    /// take too much memory.
    pub layout: Option<Layout>,
}

/// What happens to one tree.
#[derive(Debug)]
pub struct TreePlan {
    /// The members asked away, or to be made bases, that lie in it.
    pub targets: Vec<NodeId>,
    /// What becomes of them.
    pub aim: Aim,
    /// Survivors first, then removals.
    pub entries: Vec<Entry>,
    /// Every deleted member, children first, with the survivors that must be published before it goes.
    pub departures: Vec<Departure>,
    /// Why nothing happens to it.
    pub refusal: Option<OpError>,
}

/// What a delete would do, tree by tree.
#[derive(Debug, Default)]
pub struct Plan {
    /// The trees, in the order of the first target of each.
    pub trees: Vec<TreePlan>,
    /// What each store concerned can do.
    pub capabilities: BTreeMap<usize, Capabilities>,
    /// The manifests of each store, as they were listed.
    pub shelves: Vec<Shelf>,
}

impl Plan {
    /// All entries.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.trees.iter().flat_map(|tree| &tree.entries)
    }

    /// How long deleted members keep their names if nobody says: at least `least`, and as long as readers on other hosts
    /// of a network mount may take, who cannot be seen.
    #[must_use]
    pub fn usual_grace(&self, least: Duration) -> Duration {
        let network = self.capabilities.values().any(|can| can.network);
        if network { NETWORK_GRACE.max(least) } else { least }
    }
}

/// Plans the deletion. A tree that cannot be changed is refused by itself; fails only if nothing at all can be
/// planned: with the first refusal if every tree has one. Reads headers and tables; except for a dry
/// run it writes probes of what a store can do, under `.qchain/tmp`, and removes them.
pub fn plan(stores: &Stores, scan: &Scan, request: &Request<'_>) -> Result<Plan> {
    stores.check_writable()?;
    let mut trees: Vec<(usize, Vec<NodeId>)> = Vec::new();
    let mut places: BTreeMap<usize, usize> = BTreeMap::new();
    for target in &request.targets {
        let tree = scan.graph.tree_of(*target);
        let place = *places.entry(tree).or_insert(trees.len());
        match trees.get_mut(place) {
            Some((_, targets)) => targets.push(*target),
            None => trees.push((tree, vec![*target])),
        }
    }
    // The survivors' stores are written; a child may lie on another store than what it loses.
    let concerned = request.targets.iter().flat_map(|id| scan.graph.children(*id).iter().chain([id]));
    let mut capabilities = BTreeMap::new();
    for id in concerned {
        let key = &scan.graph.node(*id).key;
        if let std::collections::btree_map::Entry::Vacant(place) = capabilities.entry(key.store) {
            place.insert(probe(stores, key, request.dry_run)?);
        }
    }
    let kept_bytes = AtomicU64::new(0);
    let planner = Planner { stores, scan, request, capabilities: &capabilities, kept_bytes: &kept_bytes };
    let mut trees: Vec<TreePlan> = if trees.len() > 1 {
        let plan = |(_, targets)| planner.tree(targets);
        stores.spread(trees.len(), || trees.into_par_iter().with_max_len(4).map(plan).collect())?
    } else {
        trees.into_iter().map(|(_, targets)| planner.tree(targets)).collect()
    };
    check_space(stores, scan, &mut trees)?;
    if trees.iter().all(|tree| tree.refusal.is_some())
        && let Some(refusal) = trees.iter_mut().find_map(|tree| tree.refusal.take())
    {
        return Err(refusal);
    }
    Ok(Plan { trees, capabilities, shelves: Shelf::load_all(stores)? })
}

/// What a store can do: found out by trying, or for a dry run what was found when it was opted in.
fn probe(stores: &Stores, member: &Key, dry_run: bool) -> Result<Capabilities> {
    let store = stores.get(member.store)?;
    if let Some(known) = store.record().and_then(|record| record.capabilities)
        && dry_run
    {
        return Ok(store.backend().of_known(known));
    }
    // Where its new file will lie, which may be another file system than that of qchain's records.
    let backend = store.backend().as_ref();
    let yard = Yard::of(backend, &member.path);
    let found = yard.and_then(|yard| Ok((backend.probe(&yard.temporaries())?, yard.is_beside())));
    let (mut found, beside) = found.map_err(|source| StoreError::backend(store, source))?;
    // One process alone cannot see whether others see its locks: that was proved when the store was opted in.
    let proved = store.record().and_then(|record| record.capabilities).map(|known| known.byte_range_locks);
    found.byte_range_locks &= proved.unwrap_or(false) && !beside;
    Ok(found)
}

/// What all trees of one plan are planned with.
struct Planner<'a> {
    stores: &'a Stores,
    scan: &'a Scan,
    request: &'a Request<'a>,
    capabilities: &'a BTreeMap<usize, Capabilities>,
    /// Memory of the layouts kept so far.
    kept_bytes: &'a AtomicU64,
}

impl Planner<'_> {
    fn tree(&self, targets: Vec<NodeId>) -> TreePlan {
        let Self { stores, scan, request, .. } = *self;
        let aim = request.aim;
        let selected = match aim {
            Aim::Delete => select(stores, scan, request, &targets),
            Aim::Consolidate => consolidate::select(stores, scan, request, &targets),
        };
        let planned = selected.and_then(|groups| {
            follow::plan(stores, scan, (aim, &targets), request.force)?;
            let mut entries =
                groups.merges.iter().map(|merge| self.merge(merge)).collect::<Result<Vec<_>>>()?;
            entries.extend(groups.removals.iter().map(|member| plan_removal(scan, *member)));
            Ok((entries, groups.departures))
        });
        match planned {
            Ok((entries, departures)) => TreePlan { targets, aim, entries, departures, refusal: None },
            Err(refusal) => {
                let (entries, departures) = (Vec::new(), Vec::new());
                TreePlan { targets, aim, entries, departures, refusal: Some(refusal) }
            }
        }
    }

    fn merge(&self, merge: &Merge) -> Result<Entry> {
        let Self { stores, scan, request, capabilities, kept_bytes } = *self;
        let Chosen { choice, layout, file_length, superseded_bytes } =
            choose(stores, scan, request, capabilities, merge)?;
        let Choice { mode, mut reason, cost } = choice;
        if let Some(why) = request.reasons.get(&merge.survivor) {
            reason = format!("{why}; {reason}");
        }
        let layout = (mode != Mode::InPlace).then_some(layout).filter(|layout| {
            let bytes = layout.memory_bytes();
            kept_bytes.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= KEPT_LAYOUTS_BYTES
        });
        let (bytes_to_free, bytes_to_take) = match request.aim {
            Aim::Delete => deleted_bytes(scan, merge, mode, &cost, superseded_bytes),
            Aim::Consolidate => folded_bytes(scan, merge, &cost),
        };
        Ok(Entry {
            members: merge.merged.clone(),
            into: Some(merge.survivor),
            mode,
            reason,
            cost,
            file_length,
            bytes_to_free,
            bytes_to_take,
            bytes_needed: cost.written_bytes(),
            merge: Some(merge.clone()),
            layout,
        })
    }
}

/// What a merge of deleted members gives back, and what it takes more than before, in bytes.
fn deleted_bytes(scan: &Scan, merge: &Merge, mode: Mode, cost: &Cost, superseded_bytes: u64) -> (u64, u64) {
    // A member with several children goes with the last of them; its space is counted with its first.
    let first_child = |id: &NodeId| {
        let child = merge.merged.iter().position(|other| other == id);
        let above = child.and_then(|at| merge.merged.get(at + 1)).unwrap_or(&merge.survivor);
        scan.graph.children(*id).first() == Some(above)
    };
    let gone: u64 =
        merge.merged.iter().filter(|id| first_child(id)).map(|id| scan.allocated_bytes(*id)).sum();
    let before = gone + scan.allocated_bytes(merge.survivor);
    let stays = match (mode, merge.merged.first()) {
        (Mode::InPlace, Some(lowest)) => scan.allocated_bytes(*lowest).saturating_sub(superseded_bytes),
        _ => 0,
    };
    let after = stays + cost.file_bytes();
    (before.saturating_sub(after), after.saturating_sub(before))
}

/// The same of a member that becomes a base. What is cloned takes nothing, as it stays with those that it is cloned
/// from; of the member's old file that goes which is not.
fn folded_bytes(scan: &Scan, merge: &Merge, cost: &Cost) -> (u64, u64) {
    let before = scan.allocated_bytes(merge.survivor).saturating_sub(cost.clone_bytes);
    (before.saturating_sub(cost.written_bytes()), cost.written_bytes().saturating_sub(before))
}

fn plan_removal(scan: &Scan, member: NodeId) -> Entry {
    Entry {
        members: vec![member],
        into: None,
        mode: Mode::Remove,
        reason: "no member that stays reads through it".to_owned(),
        cost: Cost::default(),
        file_length: 0,
        bytes_to_free: scan.allocated_bytes(member),
        bytes_to_take: 0,
        bytes_needed: 0,
        merge: None,
        layout: None,
    }
}

/// Refuses what does not fit beside what was planned before it. All entries may run at the same time.
fn check_space(stores: &Stores, scan: &Scan, trees: &mut [TreePlan]) -> Result<()> {
    let mut free: BTreeMap<usize, u64> = BTreeMap::new();
    for tree in trees {
        for (store, needed_bytes) in needs(scan, tree) {
            let opened = stores.get(store)?;
            if let std::collections::btree_map::Entry::Vacant(place) = free.entry(store) {
                let space = opened.backend().space();
                let space = space.map_err(|source| StoreError::backend(opened, source))?;
                place.insert(space.free_bytes);
            }
            let Some(left) = free.get_mut(&store) else { continue };
            if let Some(rest) = left.checked_sub(needed_bytes) {
                *left = rest;
            } else {
                let store = opened.backend().describe();
                tree.refusal = Some(OpError::NoSpace { store, free_bytes: *left, needed_bytes });
                tree.entries.clear();
                tree.departures.clear();
            }
        }
    }
    Ok(())
}

/// Bytes that a tree's entries need, by store.
fn needs(scan: &Scan, tree: &TreePlan) -> BTreeMap<usize, u64> {
    let mut needs = BTreeMap::new();
    for (store, bytes) in tree.entries.iter().filter_map(|entry| {
        let into = entry.into?;
        Some((scan.graph.node(into).key.store, entry.bytes_needed))
    }) {
        *needs.entry(store).or_insert(0) += bytes;
    }
    needs
}
