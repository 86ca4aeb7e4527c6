//! `qchain delete`.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::context::Context;
use super::error::{Exit, Result};
use super::output::{ErrorBody, human, time};
use super::{members, records_file, values};
use crate::chain::graph::NodeId;
use crate::change::leaving::leaving;
use crate::failure::{Failure, with_causes};
use crate::ops::OpError;
use crate::ops::delete::{self, Entry, ModeChoice, Outcome, Plan, Report, Request, Terms};
use crate::ops::recover::begin;
use crate::store::scan::Scan;
use crate::store::{Stores, names};

/// Flags of `delete`.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub struct Args {
    /// The members to delete
    #[arg(required = true, value_name = "MEMBER")]
    members: Vec<String>,
    /// Print the plan and stop
    #[arg(long)]
    dry_run: bool,
    /// Do not wait until files without checkpoint have been left alone for the settle time
    #[arg(long)]
    now: bool,
    /// How to move data
    #[arg(long, value_enum, default_value = "auto")]
    mode: Mode,
    /// How many trees are worked on at once [default: limits.jobs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: Option<u16>,
    /// CloudStack's rows, from scripts/export-records.sql
    #[arg(long, value_name = "FILE")]
    records: Option<PathBuf>,
    /// You vouch that CloudStack has given the members up
    #[arg(long)]
    assume_deleted: bool,
    /// You vouch that the chain has been ended, so that its newest member may go
    #[arg(long)]
    end_of_chain: bool,
    /// Leave checkpoint files that cannot be edited as they are
    #[arg(long)]
    force: bool,
    /// Build and prove everything, report, and throw it away
    #[arg(long, conflicts_with = "dry_run")]
    rehearse: bool,
    /// How long deleted members keep their names [default: `safety.reader_grace`]
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    grace: Option<Duration>,
    /// How long old files are kept for an undo [default: safety.retention]
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    retention: Option<Duration>,
    /// The most bytes that are copied a second [default: limits.rate]
    #[arg(long, value_name = "RATE", value_parser = values::rate)]
    rate: Option<u64>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// How to move data.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Mode {
    /// The cheapest that works
    Auto,
    /// By sharing extents
    Clone,
    /// By writing into the lowest deleted member, which cannot be undone
    InPlace,
    /// By copying
    Copy,
}

/// What `--json` shows.
#[derive(Serialize)]
struct Document<'a> {
    plan: Vec<PlanEntry<'a>>,
    refused: Vec<Refused<'a>>,
    results: Vec<ResultEntry<'a>>,
}

#[derive(Serialize)]
struct PlanEntry<'a> {
    members: Vec<String>,
    into: Option<String>,
    mode: &'static str,
    reason: &'a str,
    bytes_to_write: u64,
    bytes_to_clone: u64,
    bytes_to_free: u64,
    bytes_needed: u64,
}

/// A tree that nothing happens to.
#[derive(Serialize)]
struct Refused<'a> {
    members: Vec<String>,
    error: ErrorBody<'a>,
}

#[derive(Serialize)]
struct ResultEntry<'a> {
    operation: &'a str,
    status: &'static str,
    error: Option<ErrorBody<'a>>,
    members: Vec<String>,
    into: Option<String>,
    mode: Option<&'static str>,
    bytes_written: u64,
    metadata_bytes_written: u64,
    bytes_cloned: u64,
    bytes_freed_now: u64,
    bytes_held_until_purge: u64,
    undo_until: Option<String>,
    note: Option<&'a str>,
    claims: Vec<Claim>,
    elapsed_milliseconds: u64,
}

/// What was proved of a new image, for how many bytes of its view.
#[derive(Serialize)]
struct Claim {
    #[serde(rename = "claim")]
    name: &'static str,
    bytes: u64,
    /// Of these, how many were read on both sides and compared.
    compared_bytes: u64,
}

/// Plans, asks, deletes.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    if !args.dry_run {
        context.check_writable()?;
    }
    let stores = context.stores()?;
    // Before anything is read: a wrong mount should say so, and not that a member is missing.
    stores.check_writable()?;
    let given = members::expand(&args.members)?;
    let records = args.records.as_deref().map(records_file::read).transpose()?;
    let site = context.site(&stores);
    site.pace.set(args.rate.unwrap_or(context.settings.limits.rate.0));
    // What was interrupted comes first: it may be about the same members.
    let guard = if args.dry_run { None } else { Some(begin(&site, context.witness())?) };
    let scan = context.scan(&stores, args.now)?;
    let leaving = leaving(&site, &scan).map_err(OpError::from)?;
    let request = Request {
        leaving,
        in_place: context.in_place(),
        targets: names::resolve_all(&stores, &scan, &given)?,
        mode: mode(args.mode),
        records: records.as_ref(),
        assume_deleted: args.assume_deleted,
        end_of_chain: args.end_of_chain,
        dry_run: args.dry_run,
        force: args.force,
    };
    context.progress().phase("planning", 0);
    let plan = delete::plan(&stores, &scan, &request)?;
    let shown = Shown { stores: &stores, scan: &scan, plan: &plan };
    let Some(guard) = guard else {
        context.print(&shown.document(&Report::default()), |out| shown.write_plan(out))?;
        return Ok(exit(plan.trees.iter().find_map(|tree| tree.refusal.as_ref())));
    };
    context.confirm(&shown.plan_text(), args.yes)?;
    let grace = args.grace.or(context.settings.safety.reader_grace.0);
    let grace = grace.unwrap_or_else(|| default_grace(&plan));
    let work = delete::Context {
        site: &site,
        terms: Terms {
            grace_ns: nanoseconds(grace),
            retention_ns: nanoseconds(args.retention.unwrap_or(context.settings.safety.retention.0)),
            rehearse: args.rehearse,
            witness: context.witness(),
        },
        stores: &stores,
        scan: &scan,
        plan: &plan,
        jobs: args.jobs.map_or(context.settings.limits.jobs, usize::from),
        force: args.force,
        progress: context.progress(),
        cancel: &context.cancel,
    };
    let report = delete::run(&work, &guard)?;
    context.print(&shown.document(&report), |out| {
        // Whoever was asked has seen it.
        if args.yes {
            shown.write_plan(out)?;
        }
        shown.write_results(out, &report)
    })?;
    Ok(exit(report.first_failure()))
}

/// What `auto` means: readers on other hosts of a network mount cannot be seen.
fn default_grace(plan: &Plan) -> Duration {
    let network = plan.capabilities.values().any(|can| can.network);
    if network { Duration::from_mins(15) } else { Duration::ZERO }
}

fn nanoseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

fn mode(mode: Mode) -> ModeChoice {
    match mode {
        Mode::Auto => ModeChoice::Auto,
        Mode::Clone => ModeChoice::Clone,
        Mode::InPlace => ModeChoice::InPlace,
        Mode::Copy => ModeChoice::Copy,
    }
}

fn exit(failure: Option<&OpError>) -> Exit {
    failure.map_or(Exit::DONE, |error| Exit::from(error.kind()))
}

/// A plan with what it takes to name its members.
struct Shown<'a> {
    stores: &'a Stores,
    scan: &'a Scan,
    plan: &'a Plan,
}

impl Shown<'_> {
    fn name(&self, id: NodeId) -> String {
        self.stores.display(&self.scan.graph.node(id).key)
    }

    fn names(&self, ids: &[NodeId]) -> Vec<String> {
        ids.iter().map(|id| self.name(*id)).collect()
    }

    fn document<'r>(&'r self, report: &'r Report) -> Document<'r> {
        let refused = self.plan.trees.iter().filter_map(|tree| {
            let error = ErrorBody::of(tree.refusal.as_ref()?);
            Some(Refused { members: self.names(&tree.targets), error })
        });
        Document {
            plan: self.plan.entries().map(|entry| self.plan_entry(entry)).collect(),
            refused: refused.collect(),
            results: report.outcomes.iter().map(|outcome| self.result_entry(outcome)).collect(),
        }
    }

    fn plan_entry<'r>(&self, entry: &'r Entry) -> PlanEntry<'r> {
        PlanEntry {
            members: self.names(&entry.members),
            into: entry.into.map(|id| self.name(id)),
            mode: entry.mode.word(),
            reason: &entry.reason,
            bytes_to_write: entry.cost.written_bytes(),
            bytes_to_clone: entry.cost.clone_bytes,
            bytes_to_free: entry.bytes_to_free,
            bytes_needed: entry.bytes_needed,
        }
    }

    fn result_entry<'r>(&self, outcome: &'r Outcome) -> ResultEntry<'r> {
        let proved = outcome.planned_bytes + outcome.compared_bytes;
        let claim = Claim { name: "plan", bytes: proved, compared_bytes: outcome.compared_bytes };
        let made = outcome.into.is_some() && outcome.error.is_none();
        ResultEntry {
            operation: &outcome.operation,
            status: outcome.status.word(),
            error: outcome.error.as_ref().map(ErrorBody::of),
            members: self.names(&outcome.members),
            into: outcome.into.map(|id| self.name(id)),
            mode: outcome.mode.map(delete::Mode::word),
            bytes_written: outcome.bytes_written,
            metadata_bytes_written: outcome.metadata_bytes_written,
            bytes_cloned: outcome.bytes_cloned,
            bytes_freed_now: outcome.bytes_freed_now,
            bytes_held_until_purge: outcome.bytes_held_until_purge,
            undo_until: outcome.undo_until_ns.map(time),
            note: outcome.note.as_deref(),
            claims: if made { vec![claim] } else { Vec::new() },
            elapsed_milliseconds: outcome.elapsed_ns / 1_000_000,
        }
    }

    fn plan_text(&self) -> String {
        let mut text = Vec::new();
        // Writing into memory cannot fail.
        let _ = self.write_plan(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    fn write_plan(&self, out: &mut dyn Write) -> io::Result<()> {
        for entry in self.plan.entries() {
            let what = match entry.into {
                Some(into) => format!("merge into {}:", self.name(into)),
                None => "remove:".to_owned(),
            };
            writeln!(out, "{what}")?;
            for member in &entry.members {
                writeln!(out, "    {}", self.name(*member))?;
            }
            let mut line = format!("  by {} ({})", entry.mode.word(), entry.reason);
            if entry.into.is_some() {
                let (write, clone) = (human(entry.cost.written_bytes()), human(entry.cost.clone_bytes));
                let _ = write!(line, ", writes {write}, shares {clone}");
            }
            writeln!(out, "{line}, frees {}", human(entry.bytes_to_free))?;
        }
        for tree in &self.plan.trees {
            if let Some(refusal) = &tree.refusal {
                let why = with_causes(refusal);
                writeln!(out, "not done: {why} [{}]", refusal.code())?;
            }
        }
        Ok(())
    }

    fn write_results(&self, out: &mut dyn Write, report: &Report) -> io::Result<()> {
        for outcome in &report.outcomes {
            let name = outcome.into.or(outcome.members.first().copied()).map(|id| self.name(id));
            write!(out, "{}: {}", outcome.status.word(), name.unwrap_or_default())?;
            match &outcome.error {
                Some(error) => writeln!(out, ": {} [{}]", with_causes(error), error.code())?,
                None if outcome.into.is_some() => writeln!(
                    out,
                    ": wrote {}, shared {}, freed {}, proved {} in {:.2} s",
                    human(outcome.bytes_written + outcome.metadata_bytes_written),
                    human(outcome.bytes_cloned),
                    human(outcome.bytes_freed_now),
                    human(outcome.planned_bytes + outcome.compared_bytes),
                    Duration::from_nanos(outcome.elapsed_ns).as_secs_f64()
                )?,
                None => writeln!(out, ": freed {}", human(outcome.bytes_freed_now))?,
            }
        }
        Ok(())
    }
}
