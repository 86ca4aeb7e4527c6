//! `qchain delete`.

use std::path::PathBuf;
use std::time::Duration;

use super::context::Context;
use super::error::{Exit, Result};
use super::merges::Shown;
use super::operations::held_bytes;
use super::{members, metrics, records_file, values};
use crate::change::leaving::leaving;
use crate::change::{Guard, Site};
use crate::failure::Failure;
use crate::ops::OpError;
use crate::ops::delete::{self, ModeChoice, Plan, Report, Request, Terms};
use crate::ops::recover::begin;
use crate::store::names;

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
    #[command(flatten)]
    pub metrics: metrics::Args,
}

impl Args {
    /// Whether the stores are to be changed.
    pub fn changes(&self) -> bool {
        !self.dry_run && !self.rehearse
    }
}

/// How to move data.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Mode {
    /// The cheapest that works
    Auto,
    /// By sharing extents
    Clone,
    /// By writing into the lowest deleted member, which cannot be undone
    InPlace,
    /// By copying
    Copy,
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
    let guard = if args.dry_run { None } else { Some(start(context, &site)?) };
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
        stubs: false,
    };
    context.progress().phase("planning", 0);
    let plan = delete::plan(&stores, &scan, &request)?;
    let grace = args.grace.or(context.settings.safety.reader_grace.0);
    let grace = grace.unwrap_or_else(|| default_grace(&plan));
    let retention = args.retention.unwrap_or(context.settings.safety.retention.0);
    let shown =
        Shown { stores: &stores, scan: &scan, plan: &plan, grace, retention, rehearse: args.rehearse };
    let Some(guard) = guard else {
        context.print(&shown.document(&Report::default()), |out| shown.write_plan(out))?;
        return Ok(exit(plan.trees.iter().find_map(|tree| tree.refusal.as_ref())));
    };
    context.confirm(&shown.plan_text(), args.yes)?;
    let work = delete::Context {
        site: &site,
        terms: Terms {
            grace_ns: nanoseconds(grace),
            retention_ns: nanoseconds(retention),
            rehearse: args.rehearse,
            witness: context.witness(),
            stubs: false,
        },
        stores: &stores,
        scan: &scan,
        plan: &plan,
        jobs: args.jobs.map_or(context.settings.limits.jobs, usize::from),
        force: args.force,
        gate: None,
        progress: context.progress(),
        cancel: &context.cancel,
    };
    let report = delete::run(&work, &guard)?;
    context.note_freed(report.outcomes.iter().map(|outcome| outcome.bytes_freed_now).sum());
    context.print(&shown.document(&report), |out| {
        // Whoever was asked has seen it.
        if args.yes {
            shown.write_plan(out)?;
        }
        shown.write_results(out, &report)
    })?;
    Ok(exit(report.first_failure()))
}

/// What every change begins with; what it frees counts as freed by this run.
pub fn start(context: &Context, site: &Site<'_>) -> Result<Guard> {
    let held = held_bytes(site);
    let guard = begin(site, context.witness())?;
    context.note_freed(held.saturating_sub(held_bytes(site)));
    Ok(guard)
}

/// What `auto` means: readers on other hosts of a network mount cannot be seen.
pub fn default_grace(plan: &Plan) -> Duration {
    let network = plan.capabilities.values().any(|can| can.network);
    if network { Duration::from_mins(15) } else { Duration::ZERO }
}

pub fn nanoseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// The same for a request.
pub fn mode(mode: Mode) -> ModeChoice {
    match mode {
        Mode::Auto => ModeChoice::Auto,
        Mode::Clone => ModeChoice::Clone,
        Mode::InPlace => ModeChoice::InPlace,
        Mode::Copy => ModeChoice::Copy,
    }
}

/// What a failure exits with.
pub fn exit(failure: Option<&OpError>) -> Exit {
    failure.map_or(Exit::DONE, |error| Exit::from(error.kind()))
}
