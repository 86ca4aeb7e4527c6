//! Carries out a plan: all survivors of a tree are written and published, in parallel, then deleted names go.

use std::collections::BTreeSet;
use std::time::Instant;

use rayon::prelude::*;

use crate::chain::delete::Departure;
use crate::chain::graph::NodeId;
use crate::change::{Guard, checkpoint};
use crate::failure::{Code, Failure};
use crate::ops::delete::context::Context;
use crate::ops::delete::merge::{Merged, execute};
use crate::ops::delete::plan::{Entry, Mode, TreePlan};
use crate::ops::delete::report::{Outcome, Report, Status};
use crate::ops::{OpError, Result};
use crate::progress::Silent;
use crate::store::StoreError;
use crate::store::merge::MergeInput;
use crate::store::scan::{Scan, ScanOptions};

/// Carries out the plan. One failing tree stops no other; each entry has its outcome. Blocks until all is
/// published and durable.
pub fn run(context: &Context<'_>, guard: &Guard) -> Result<Report> {
    let total = context.plan.entries().map(|entry| entry.cost.file_bytes()).sum();
    context.progress.phase("merging", total);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(context.jobs.max(1)).build();
    let pool = pool.map_err(|error| StoreError::Usage { detail: format!("--jobs: {error}") })?;
    let trees: Vec<Vec<Outcome>> =
        pool.install(|| context.plan.trees.par_iter().map(|tree| run_tree(context, guard, tree)).collect());
    Ok(Report { outcomes: trees.into_iter().flatten().collect() })
}

fn run_tree(context: &Context<'_>, guard: &Guard, tree: &TreePlan) -> Vec<Outcome> {
    if let Some(refusal) = &tree.refusal {
        let mut outcome = outcome(&tree.targets, None, None);
        let error = again(refusal);
        outcome.status = Status::of(error.kind());
        outcome.error = Some(error);
        return vec![outcome];
    }
    // All inputs are opened before anything is published, so that each reads the tree as it was planned.
    let inputs: Vec<Option<Result<MergeInput>>> = tree
        .entries
        .iter()
        .map(|entry| {
            let merge = entry.merge.as_ref()?;
            Some(MergeInput::open(context.stores, context.scan, merge).map_err(OpError::from))
        })
        .collect();
    let mut outcomes: Vec<Outcome> = tree
        .entries
        .par_iter()
        .zip(inputs)
        .map(|(entry, input)| match input {
            Some(input) => run_merge(context, guard, entry, input),
            None => outcome(&entry.members, None, Some(Mode::Remove)),
        })
        .collect();
    depart(context, guard, tree, &mut outcomes);
    outcomes
}

fn run_merge(context: &Context<'_>, guard: &Guard, entry: &Entry, input: Result<MergeInput>) -> Outcome {
    let started = Instant::now();
    let mut outcome = outcome(&entry.members, entry.into, Some(entry.mode));
    let merged = input.and_then(|input| {
        context.cancel.check()?;
        execute(context, guard, entry, &input)
    });
    match merged {
        Ok(Merged { written, proof, allocated_bytes }) => {
            outcome.bytes_written = written.data_bytes;
            outcome.metadata_bytes_written = written.metadata_bytes;
            outcome.bytes_cloned = written.cloned_bytes;
            outcome.planned_bytes = proof.planned_bytes;
            outcome.compared_bytes = proof.compared_bytes;
            let before = entry.into.and_then(|id| context.scan.member(id));
            let before = before.map_or(0, |member| member.stat.allocated_bytes);
            // What the new file takes more than the old one comes off when the deleted members go.
            outcome.bytes_freed_now = before.wrapping_sub(allocated_bytes);
        }
        Err(error) => fail(&mut outcome, error),
    }
    outcome.elapsed_ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
    outcome
}

/// Lets the deleted names of a tree go, children first, each only if all that read through it are published
/// and a new look finds nobody else who does.
fn depart(context: &Context<'_>, guard: &Guard, tree: &TreePlan, outcomes: &mut [Outcome]) {
    let published: BTreeSet<NodeId> = outcomes
        .iter()
        .filter(|outcome| outcome.error.is_none())
        .filter_map(|outcome| outcome.into)
        .collect();
    let ready = |departure: &&Departure| departure.after.iter().all(|survivor| published.contains(survivor));
    let mut fresh = None;
    let mut freed = vec![0u64; outcomes.len()];
    for departure in tree.departures.iter().filter(ready) {
        // Its space is counted with the first entry that has it.
        let Some(at) = outcomes.iter().position(|outcome| outcome.members.contains(&departure.member)) else {
            continue;
        };
        let removed = if context.cancel.check().is_err() {
            Err(OpError::Cancelled(crate::progress::Cancelled))
        } else {
            fresh_scan(context, &mut fresh).and_then(|fresh| remove(context, guard, fresh, departure.member))
        };
        match removed {
            Ok(bytes) => {
                if let Some(place) = freed.get_mut(at) {
                    *place += bytes;
                }
            }
            Err(error) => {
                for outcome in outcomes.iter_mut() {
                    if outcome.members.contains(&departure.member) && outcome.error.is_none() {
                        fail(outcome, again(&error));
                    }
                }
                // What lies below it may be read through it still.
                break;
            }
        }
    }
    for (outcome, freed) in outcomes.iter_mut().zip(freed) {
        let sum = outcome.bytes_freed_now.wrapping_add(freed);
        // Below zero while extents are shared with a member that stays: nothing came back.
        outcome.bytes_freed_now = i64::try_from(sum).map_or(0, |_| sum);
    }
}

/// A scan made after the tree's survivors were published, once for all its departures.
fn fresh_scan<'s>(context: &Context<'_>, fresh: &'s mut Option<Scan>) -> Result<&'s Scan> {
    if fresh.is_none() {
        let options = ScanOptions { now_ns: 0, settle_ns: 0, caches: &[], progress: &Silent };
        *fresh = Some(Scan::run(context.stores, &options)?);
    }
    fresh.as_ref().ok_or_else(|| StoreError::Usage { detail: "no scan".to_owned() }.into())
}

/// Removes one deleted member and its checkpoint file; gives the bytes that its file took.
fn remove(context: &Context<'_>, guard: &Guard, fresh: &Scan, id: NodeId) -> Result<u64> {
    let key = &context.scan.graph.node(id).key;
    let display = context.stores.display(key);
    let refuse = |code, message: String| OpError::Refused { code, member: display.clone(), message };
    let store = context.stores.get(key.store)?;
    let fail = |source| OpError::Store(StoreError::backend(store, source));
    let Some(found) = fresh.graph.find(key) else {
        // Somebody else removed it; that is what was wanted.
        return Ok(0);
    };
    let planned = context.scan.member(id).map(|member| (member.stat.id, member.stat.length));
    let now = store.backend().stat(&key.path).map_err(fail)?;
    if planned != Some((now.id, now.length)) {
        return Err(refuse(
            Code::ChangedMeanwhile,
            "another file has its name now; it was left alone".to_owned(),
        ));
    }
    if let Some(child) = reader(context, fresh, found) {
        let message = format!("{child} reads through it now; it was left where it is");
        return Err(refuse(Code::ChangedMeanwhile, message));
    }
    store.backend().remove_file(&key.path).map_err(fail)?;
    store.backend().sync_dir(&key.path.parent()).map_err(fail)?;
    checkpoint::remove(guard, store.backend(), &key.path)
        .map_err(|error| refuse(error.code(), error.to_string()))?;
    Ok(now.allocated_bytes)
}

/// A member that is not itself on its way out and reads, or may read, through `id`.
fn reader(context: &Context<'_>, fresh: &Scan, id: NodeId) -> Option<String> {
    let leaving = |child: NodeId| {
        let child = context.scan.graph.find(&fresh.graph.node(child).key);
        child.is_some_and(|child| {
            context.plan.trees.iter().any(|tree| tree.departures.iter().any(|gone| gone.member == child))
        })
    };
    let children = fresh.graph.children(id).iter().copied().filter(|child| !leaving(*child));
    let found = children.chain(fresh.graph.possible_children(id)).next();
    found.map(|child| context.stores.display(&fresh.graph.node(child).key))
}

fn outcome(members: &[NodeId], into: Option<NodeId>, mode: Option<Mode>) -> Outcome {
    Outcome {
        operation: crate::backend::publish::temporary_name().trim_end_matches(".tmp").to_owned(),
        status: Status::Done,
        error: None,
        members: members.to_vec(),
        into,
        mode,
        bytes_written: 0,
        metadata_bytes_written: 0,
        bytes_cloned: 0,
        bytes_freed_now: 0,
        planned_bytes: 0,
        compared_bytes: 0,
        elapsed_ns: 0,
    }
}

fn fail(outcome: &mut Outcome, error: OpError) {
    outcome.status = Status::of(error.kind());
    outcome.error = Some(error);
}

/// The same refusal for another entry; errors with causes are told as text.
fn again(error: &OpError) -> OpError {
    match error {
        OpError::NoSpace { store, free_bytes, needed_bytes } => {
            OpError::NoSpace { store: store.clone(), free_bytes: *free_bytes, needed_bytes: *needed_bytes }
        }
        OpError::Cancelled(cancelled) => OpError::Cancelled(*cancelled),
        OpError::Refused { code, member, message } => {
            OpError::Refused { code: *code, member: member.clone(), message: message.clone() }
        }
        error => OpError::Refused {
            code: error.code(),
            member: error.member().unwrap_or_default().to_owned(),
            message: error.to_string(),
        },
    }
}
