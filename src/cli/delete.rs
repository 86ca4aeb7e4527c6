//! `qchain delete`.

use std::path::PathBuf;
use std::time::Duration;

use super::context::Context;
use super::error::{Exit, Result};
use super::merges::{Manner, Shown, Vouched, exit, start};
use super::{members, metrics};
use crate::change::leaving::leaving;
use crate::database::read_export;
use crate::ops::OpError;
use crate::ops::delete::{self, Report, Request};
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
    #[command(flatten)]
    manner: Manner,
    #[command(flatten)]
    vouched: Vouched,
    #[command(flatten)]
    pub metrics: metrics::Args,
}

impl Args {
    /// Whether the stores are to be changed.
    pub fn changes(&self) -> bool {
        !self.dry_run && !self.rehearse
    }
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
    let records = args.records.as_deref().map(read_export).transpose()?;
    let site = context.site(&stores);
    site.pace.set(args.manner.rate(context));
    // What was interrupted comes first: it may be about the same members.
    let guard = if args.dry_run { None } else { Some(start(context, &site)?) };
    let scan = context.scan(&stores, args.manner.now)?;
    let leaving = leaving(&site, &scan).map_err(OpError::from)?;
    let request = Request {
        leaving,
        in_place: context.in_place(),
        targets: names::resolve_all(&stores, &scan, &given)?,
        mode: args.manner.mode(),
        records: records.as_ref(),
        assume_deleted: args.assume_deleted,
        end_of_chain: args.end_of_chain,
        dry_run: args.dry_run,
        force: args.force,
        exclusive: args.vouched.exclusive,
        ..Request::default()
    };
    context.progress().phase("planning", 0);
    let plan = delete::plan(&stores, &scan, &request)?;
    let grace = args.manner.grace(context, &plan, Duration::ZERO);
    let retention = args.manner.retention(context);
    let shown =
        Shown { stores: &stores, scan: &scan, plan: &plan, grace, retention, rehearse: args.rehearse };
    let Some(guard) = guard else {
        context.print(&shown.document(&Report::default()), |out| shown.write_plan(out))?;
        return Ok(exit(plan.trees.iter().find_map(|tree| tree.refusal.as_ref())));
    };
    context.confirm(&shown.plan_text(), args.manner.yes)?;
    let work = delete::Context {
        site: &site,
        terms: shown.terms(context.witness(), false),
        stores: &stores,
        scan: &scan,
        plan: &plan,
        jobs: args.manner.jobs(context),
        force: args.force,
        gate: None,
        progress: context.progress(),
        cancel: &context.cancel,
    };
    let report = delete::run(&work, &guard)?;
    context.note_freed(report.outcomes.iter().map(|outcome| outcome.bytes_freed_now).sum());
    context.print(&shown.document(&report), |out| {
        // Whoever was asked has seen it.
        if args.manner.yes {
            shown.write_plan(out)?;
        }
        shown.write_results(out, &report)
    })?;
    Ok(exit(report.first_failure()))
}
