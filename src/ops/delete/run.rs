//! Carries out a plan: all survivors of a tree are built and proved, one decision is made for the tree, new
//! files are published; then, for all trees together, deleted names go as far as they are due.

use std::time::Instant;

use rayon::prelude::*;

use crate::backend::{BackendError, Stat};
use crate::chain::graph::{Key, NodeId};
use crate::change::departure::{Departed, depart};
use crate::change::log::Did;
use crate::change::publication::Published;
use crate::change::record::{Commit, Departure as Leaves, Publication, Purpose};
use crate::change::recover::{Action, Extent, finish};
use crate::change::{Decided, Grown, Guard, Operation, checkpoint, tree};
use crate::cloudstack::paths::{checkpoint_of, snapshot_of};
use crate::failure::{Code, Failure, with_causes};
use crate::ops::delete::context::Context;
use crate::ops::delete::follow;
use crate::ops::delete::merge::{Built, build};
use crate::ops::delete::plan::{Entry, Mode, TreePlan};
use crate::ops::delete::report::{Outcome, Report, Status};
use crate::ops::delete::stub;
use crate::ops::{OpError, Result};
use crate::store::StoreError;
use crate::store::attest::Carried;
use crate::store::manifest::shelf;
use crate::store::merge::MergeInput;

/// A tree whose change was decided.
struct Changed<'s> {
    decided: Decided<'s>,
    published: Vec<Published>,
}

/// Carries out the plan. One failing tree stops no other; each entry has its outcome. Blocks until all is
/// published and durable, and deleted members are gone as far as they are due.
pub fn run(context: &Context<'_>, _guard: &Guard) -> Result<Report> {
    let total = context.plan.entries().map(|entry| entry.cost.file_bytes()).sum();
    context.progress.phase("merging", total);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(context.jobs.max(1)).build();
    let pool = pool.map_err(|error| StoreError::Usage { detail: format!("--jobs: {error}") })?;
    let mut trees: Vec<(Vec<Outcome>, Option<Changed<'_>>)> =
        pool.install(|| context.plan.trees.par_iter().map(|tree| run_tree(context, tree)).collect());
    let changed: Vec<(&Decided<'_>, &[Published])> = trees
        .iter()
        .filter_map(|(_, changed)| changed.as_ref())
        .map(|changed| (&changed.decided, changed.published.as_slice()))
        .collect();
    let departed = depart(context.site, &changed);
    let mut index = 0;
    for ((outcomes, changed), tree) in trees.iter_mut().zip(&context.plan.trees) {
        let Some(changed) = changed else { continue };
        let result = match &departed {
            Ok(departed) => Ok(departed.get(index).cloned().unwrap_or_default()),
            Err(error) => Err(OpError::after_decision(error)),
        };
        index += 1;
        conclude(context, tree, changed, result, outcomes);
        // It was done all the same; the log is for people.
        if let Err(error) = write_log(context, changed, outcomes)
            && let Some(outcome) = outcomes.first_mut()
        {
            outcome.note.get_or_insert_with(|| format!("it is not in the log: {}", with_causes(&error)));
        }
    }
    Ok(Report { outcomes: trees.into_iter().flat_map(|(outcomes, _)| outcomes).collect() })
}

/// Writes down what was done to a tree, on the store that has its records.
fn write_log(context: &Context<'_>, changed: &Changed<'_>, outcomes: &[Outcome]) -> Result<()> {
    let name = |id: &NodeId| context.stores.display(&context.scan.graph.node(*id).key);
    let did = outcomes.iter().map(|outcome| Did {
        members: outcome.members.iter().map(name).collect(),
        into: outcome.into.as_ref().map(name),
        mode: outcome.mode.map(|mode| mode.word().to_owned()),
        digest_before: outcome.view_digest,
        digest_after: outcome.view_digest,
        bytes_written: outcome.bytes_written + outcome.metadata_bytes_written,
        bytes_cloned: outcome.bytes_cloned,
        proved_bytes: [
            outcome.planned_bytes + outcome.compared_bytes,
            outcome.digest_bytes,
            outcome.data_bytes,
        ],
        duration_ns: outcome.elapsed_ns,
        error: outcome.error.as_ref().map(|error| error.code().as_str().to_owned()),
    });
    let verb = if changed.decided.commit().departures.is_empty() { "consolidate" } else { "delete" };
    Ok(context.site.log(changed.decided.home(), changed.decided.id(), verb, did.collect())?)
}

fn run_tree<'s>(context: &Context<'s>, tree: &TreePlan) -> (Vec<Outcome>, Option<Changed<'s>>) {
    if let Some(refusal) = &tree.refusal {
        let mut outcome = outcome(&tree.targets, None, None);
        fail(&mut outcome, again(refusal));
        return (vec![outcome], None);
    }
    let mut outcomes: Vec<Outcome> =
        tree.entries.iter().map(|entry| outcome(&entry.members, entry.into, Some(entry.mode))).collect();
    match change(context, tree, &mut outcomes) {
        Ok(changed) => (outcomes, changed),
        Err(error) => {
            for outcome in outcomes.iter_mut().filter(|outcome| outcome.error.is_none()) {
                fail(outcome, again(&error));
            }
            (outcomes, None)
        }
    }
}

/// Builds, decides, publishes.
fn change<'s>(
    context: &Context<'s>,
    tree: &TreePlan,
    outcomes: &mut [Outcome],
) -> Result<Option<Changed<'s>>> {
    context.cancel.check()?;
    if let Some(gate) = context.gate {
        gate.begin(&tree.targets)?;
    }
    let (site, graph) = (context.site, &context.scan.graph);
    let Some(first) = tree.targets.first() else { return Ok(None) };
    let root = graph.node(tree::root(graph, *first)).key.clone();
    let members = tree.targets.iter().map(|id| site.place(&graph.node(*id).key));
    let operation = Operation::begin(site, &root, members.collect::<std::result::Result<_, _>>()?)?;
    for outcome in outcomes.iter_mut() {
        operation.id().as_str().clone_into(&mut outcome.operation);
    }
    // All inputs are opened before anything is published, so that each reads the tree as it was planned.
    let inputs: Vec<Option<MergeInput>> = tree
        .entries
        .iter()
        .map(|entry| match &entry.merge {
            Some(merge) => Ok(Some(MergeInput::open(context.stores, context.scan, merge)?)),
            None => Ok(None),
        })
        .collect::<Result<_>>()?;
    let built = tree
        .entries
        .par_iter()
        .zip(&inputs)
        .zip(outcomes.par_iter_mut())
        .enumerate()
        .map(|(index, ((entry, input), outcome))| {
            let (Some(merge), Some(input)) = (&entry.merge, input) else { return Ok(None) };
            let started = Instant::now();
            let built = build(context, &operation, entry, merge, input, index)?;
            note_built(outcome, &built, started);
            Ok(Some(built))
        })
        .collect::<Vec<Result<Option<Built>>>>();
    let built = first_error(built, outcomes)?;
    drop(inputs);
    let lost = unknown_from_now_on(context, tree, &built);
    let publications: Vec<Publication> = built.into_iter().flatten().map(|built| built.publication).collect();
    let commit = commit(context, tree, &operation, publications)?;
    if context.terms.rehearse {
        operation.take_back()?;
        for outcome in outcomes.iter_mut() {
            outcome.status = Status::Done;
            outcome.note = Some("rehearsed: nothing was changed".to_owned());
        }
        return Ok(None);
    }
    let changed = carry_out(context, tree, operation, commit, outcomes)?;
    for (key, inode) in lost {
        // What it says is of a file that is gone; who finds it all the same asks for another adoption.
        let _ = shelf::forget(context.site.backend(key.store)?, &key.path, inode);
    }
    Ok(Some(changed))
}

/// The adopted survivors whose new files are not, with the inodes of their old ones.
fn unknown_from_now_on(context: &Context<'_>, tree: &TreePlan, built: &[Option<Built>]) -> Vec<(Key, u64)> {
    let lost = tree.entries.iter().zip(built).filter_map(|(entry, built)| {
        let built = built.as_ref().filter(|built| matches!(built.attested, Carried::Lost(_)))?;
        let key = context.scan.graph.node(entry.into?).key.clone();
        Some((key, built.publication.old.inode))
    });
    lost.collect()
}

/// Decides, and publishes what was decided.
fn carry_out<'s>(
    context: &Context<'s>,
    tree: &TreePlan,
    operation: Operation<'s>,
    commit: Commit,
    outcomes: &mut [Outcome],
) -> Result<Changed<'s>> {
    let graph = &context.scan.graph;
    let roots: Vec<Key> = tree
        .entries
        .iter()
        .filter_map(|entry| entry.merge.as_ref())
        .filter(|merge| merge.new_parent.is_none())
        .map(|merge| graph.node(merge.survivor).key.clone())
        .collect();
    context.cancel.check()?;
    if let Some(gate) = context.gate {
        gate.pass(&operation, &tree.targets)?;
    }
    let decided = operation.decide(commit, &roots)?;
    let published = decided.publish().map_err(|error| OpError::after_decision(&error))?;
    note_grown(context, tree, &decided, outcomes);
    if let Some(gate) = context.gate {
        let whole = published.iter().all(|one| *one == Published::Done);
        let note = gate.published(decided.id(), &tree.targets, whole);
        for outcome in outcomes.iter_mut().filter(|_| note.is_some()) {
            outcome.note.clone_from(&note);
        }
    }
    Ok(Changed { decided, published })
}

/// All of them, or the first error; each goes to its own outcome, so that the one that failed says why.
fn first_error(built: Vec<Result<Option<Built>>>, outcomes: &mut [Outcome]) -> Result<Vec<Option<Built>>> {
    let mut good = Vec::new();
    let mut failed = None;
    for (built, outcome) in built.into_iter().zip(outcomes) {
        match built {
            Ok(built) => good.push(built),
            Err(error) => {
                failed.get_or_insert_with(|| again(&error));
                fail(outcome, error);
            }
        }
    }
    failed.map_or(Ok(good), Err)
}

fn note_built(outcome: &mut Outcome, built: &Built, started: Instant) {
    outcome.bytes_written = built.written.data_bytes;
    outcome.metadata_bytes_written = built.written.metadata_bytes;
    outcome.bytes_cloned = built.written.cloned_bytes;
    outcome.planned_bytes = built.proof.planned_bytes;
    outcome.compared_bytes = built.proof.compared_bytes;
    note_carried(outcome, &built.attested);
    outcome.new_bytes = built.allocated_bytes;
    outcome.elapsed_ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
}

/// What was proved beside the plan.
fn note_carried(outcome: &mut Outcome, carried: &Carried) {
    match carried {
        Carried::Attested(attested) => {
            outcome.digest_bytes = attested.digest_bytes;
            outcome.data_bytes = attested.data_bytes;
            outcome.view_digest = Some(attested.view_digest);
        }
        Carried::Lost(why) => outcome.note = Some(format!("its new file is not adopted: {why}")),
        Carried::Nothing => {}
    }
}

/// What merges in place wrote and proved, which was after the decision.
fn note_grown(context: &Context<'_>, tree: &TreePlan, decided: &Decided<'_>, outcomes: &mut [Outcome]) {
    for Grown { survivor, written, proof, carried } in decided.grown() {
        let own = |entry: &Entry| {
            entry.into.is_some_and(|id| {
                context.site.place(&context.scan.graph.node(id).key).is_ok_and(|place| place == survivor)
            })
        };
        let index = tree.entries.iter().position(own);
        let Some(outcome) = index.and_then(|index| outcomes.get_mut(index)) else { continue };
        outcome.bytes_written = written.data_bytes;
        outcome.metadata_bytes_written = written.metadata_bytes;
        outcome.bytes_cloned = written.cloned_bytes;
        outcome.planned_bytes = proof.planned_bytes;
        outcome.compared_bytes = proof.compared_bytes;
        note_carried(outcome, &carried);
        let stat = context.site.at(&survivor).ok().and_then(|at| at.backend.stat(&survivor.path).ok());
        outcome.new_bytes = stat.map_or(0, |stat| stat.allocated_bytes);
    }
}

/// The record of what is to be done.
fn commit(
    context: &Context<'_>,
    tree: &TreePlan,
    operation: &Operation<'_>,
    publications: Vec<Publication>,
) -> Result<Commit> {
    let (site, graph) = (context.site, &context.scan.graph);
    let key = |id: NodeId| &graph.node(id).key;
    let survivors: Vec<NodeId> = tree.entries.iter().filter_map(|entry| entry.into).collect();
    let index_of = |survivor: &NodeId| survivors.iter().position(|other| other == survivor);
    let mut checkpoints = Vec::new();
    let edits = follow::plan(context.stores, context.scan, (tree.aim, &tree.targets), context.force)?;
    for (number, (file, edit)) in edits.into_iter().enumerate() {
        let after = survivors.iter().position(|id| {
            key(*id).store == file.store && checkpoint_of(&key(*id).path).as_ref() == Some(&file.path)
        });
        // A member that is no survivor reads on through what its header names; it came after the plan, or
        // goes itself.
        if after.is_none() && has_member(context, &file)? {
            continue;
        }
        checkpoints.push(checkpoint::record(operation, &file, edit, &format!("{number}.checkpoint"), after)?);
    }
    let mut departures: Vec<Leaves> = Vec::new();
    for (number, departure) in tree.departures.iter().enumerate() {
        let after: Vec<usize> = departure.after.iter().filter_map(index_of).collect();
        let mut leaves = operation.departure(key(departure.member), &format!("{number}.member"), after)?;
        let planned = context.scan.member(departure.member);
        if planned.is_none_or(|member| !leaves.is(&member.stat)) {
            return Err(OpError::Refused {
                code: Code::ChangedMeanwhile,
                member: context.stores.display(key(departure.member)),
                message: "it was changed or replaced by somebody else meanwhile".to_owned(),
            });
        }
        let own = site.place(key(departure.member))?;
        leaves.becomes = publications
            .iter()
            .position(|one| one.in_place.as_ref().is_some_and(|plan| plan.members.first() == Some(&own)));
        if context.terms.stubs {
            leaves.stub = Some(stub::make(context, operation, departure.member, &format!("{number}.stub"))?);
            // Whoever comes for the file comes for its checkpoint, too.
            leaves.checkpoint = None;
        }
        departures.push(leaves);
    }
    Ok(Commit {
        purpose: Purpose::Delete,
        grace_ns: context.terms.grace_ns,
        retention_ns: context.terms.retention_ns,
        restores: Vec::new(),
        publications,
        checkpoints,
        departures,
        repairs: false,
    })
}

/// Whether the member that a checkpoint file belongs to lies on the same store.
fn has_member(context: &Context<'_>, checkpoint: &Key) -> Result<bool> {
    let store = context.stores.get(checkpoint.store)?;
    let Some(member) = snapshot_of(&checkpoint.path) else { return Ok(false) };
    match store.backend().stat(&member) {
        Ok(_) => Ok(true),
        Err(BackendError::NotFound { .. }) => Ok(false),
        Err(source) => Err(StoreError::backend(store, source).into()),
    }
}

/// What became of a decided tree, told to its outcomes; what is due of its end is done.
fn conclude(
    context: &Context<'_>,
    tree: &TreePlan,
    changed: &Changed<'_>,
    departed: Result<Vec<Departed>>,
    outcomes: &mut [Outcome],
) {
    let Changed { decided, published } = changed;
    let survivors: Vec<NodeId> = tree.entries.iter().filter_map(|entry| entry.into).collect();
    for outcome in outcomes.iter_mut() {
        let index = outcome.into.and_then(|into| survivors.iter().position(|other| *other == into));
        if let Some(Published::TakenBack { code, reason }) = index.and_then(|index| published.get(index)) {
            let member = outcome.into.map(|id| context.stores.display(&context.scan.graph.node(id).key));
            let (code, member, message) = (*code, member.unwrap_or_default(), reason.clone());
            fail(outcome, OpError::Refused { code, member, message });
        }
    }
    let done = departed.and_then(|departed| {
        note_departed(tree, &departed, outcomes);
        let mut kept = Vec::new();
        let extent = Extent::default();
        let action =
            finish(context.site, decided, published, &departed, extent, context.terms.witness, &mut kept)
                .map_err(|error| OpError::after_decision(&error))?;
        Ok((departed, action))
    });
    match done {
        Ok((departed, action)) => note_end(context, tree, changed, &departed, &action, outcomes),
        Err(error) => {
            for outcome in outcomes.iter_mut().filter(|outcome| outcome.error.is_none()) {
                fail(outcome, again(&error));
            }
        }
    }
}

/// A deleted member that stays for another reason than its grace fails its entries.
fn note_departed(tree: &TreePlan, departed: &[Departed], outcomes: &mut [Outcome]) {
    for (departure, departed) in tree.departures.iter().zip(departed) {
        for outcome in outcomes.iter_mut().filter(|outcome| outcome.members.contains(&departure.member)) {
            match departed {
                Departed::Kept { code, reason } if outcome.error.is_none() => {
                    let (code, message) = (*code, reason.clone());
                    fail(outcome, OpError::Refused { code, member: String::new(), message });
                }
                Departed::Waits(_) => {
                    outcome.note = Some("deleted members keep their names for the grace".to_owned());
                }
                Departed::Kept { .. } | Departed::Gone => {}
            }
        }
    }
}

/// The bytes: what came back, and what comes back later.
fn note_end(
    context: &Context<'_>,
    tree: &TreePlan,
    changed: &Changed<'_>,
    departed: &[Departed],
    action: &Action,
    outcomes: &mut [Outcome],
) {
    let ended = *action == Action::Finished;
    if let Action::Frozen(reason) = action {
        for outcome in outcomes.iter_mut() {
            let message = reason.clone();
            fail(outcome, OpError::Refused { code: Code::WitnessDiffers, member: String::new(), message });
        }
    }
    let mut counted = std::collections::BTreeSet::new();
    for outcome in outcomes.iter_mut() {
        let gone = tree.departures.iter().zip(departed).filter(|(departure, departed)| {
            outcome.members.contains(&departure.member) && **departed == Departed::Gone
        });
        // A member that went into several survivors is counted with the first.
        let mut old: u64 = 0;
        for (departure, _) in gone {
            if counted.insert(departure.member) {
                old += context.scan.allocated_bytes(departure.member);
            }
        }
        if outcome.error.is_none() {
            old += outcome.into.map_or(0, |into| context.scan.allocated_bytes(into));
            if ended {
                if outcome.mode == Some(Mode::InPlace)
                    && let Some(stat) = outcome.into.and_then(|into| now(context, into))
                {
                    // What belongs to nothing was given back at the end only.
                    outcome.new_bytes = stat.allocated_bytes;
                }
                // Below zero while extents are shared with a member that stays: nothing came back.
                outcome.bytes_freed_now = old.saturating_sub(outcome.new_bytes);
            } else {
                // The new file is there already; of the old ones it shares what was cloned.
                outcome.bytes_held_until_purge = old.saturating_sub(outcome.bytes_cloned);
            }
        }
        outcome.undo_until_ns = changed.decided.undo_until().filter(|_| !ended && outcome.error.is_none());
    }
}

/// A member's file as it is now.
fn now(context: &Context<'_>, member: NodeId) -> Option<Stat> {
    let key = &context.scan.graph.node(member).key;
    context.stores.get(key.store).ok()?.backend().stat(&key.path).ok()
}

fn outcome(members: &[NodeId], into: Option<NodeId>, mode: Option<Mode>) -> Outcome {
    Outcome {
        operation: String::new(),
        status: Status::Done,
        error: None,
        members: members.to_vec(),
        into,
        mode,
        bytes_written: 0,
        metadata_bytes_written: 0,
        bytes_cloned: 0,
        bytes_freed_now: 0,
        bytes_held_until_purge: 0,
        undo_until_ns: None,
        note: None,
        new_bytes: 0,
        digest_bytes: 0,
        data_bytes: 0,
        view_digest: None,
        planned_bytes: 0,
        compared_bytes: 0,
        elapsed_ns: 0,
    }
}

fn fail(outcome: &mut Outcome, error: OpError) {
    // Only what was not begun is busy or refused.
    let decided = error.code() == Code::Decided;
    outcome.status = if decided { Status::Failed } else { Status::of(error.kind()) };
    outcome.error = Some(error);
}

/// The same refusal for another entry; errors with causes are told as text.
fn again(error: &OpError) -> OpError {
    match error {
        OpError::NoSpace { store, free_bytes, needed_bytes } => {
            OpError::NoSpace { store: store.clone(), free_bytes: *free_bytes, needed_bytes: *needed_bytes }
        }
        OpError::Cancelled(cancelled) => OpError::Cancelled(*cancelled),
        OpError::Decided { kind, member, message } => {
            OpError::Decided { kind: *kind, member: member.clone(), message: message.clone() }
        }
        OpError::Refused { code, member, message } => {
            OpError::Refused { code: *code, member: member.clone(), message: message.clone() }
        }
        error => {
            let member = error.member().unwrap_or_default().to_owned();
            let message = with_causes(error);
            match error.code() {
                Code::Decided => OpError::Decided { kind: error.kind(), member, message },
                code => OpError::Refused { code, member, message },
            }
        }
    }
}
