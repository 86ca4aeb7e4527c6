//! `qchain consolidate`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use super::context::{self, Context};
use super::error::{CliError, Exit, Result};
use super::merges::{Manner, Shown, exit, start};
use super::reclaim::{Document, Ledger, Rows, finish, write_rows};
use super::{members, metrics, output};
use crate::chain::graph::NodeId;
use crate::change::leaving::leaving;
use crate::change::{Guard, Site};
use crate::database::Source;
use crate::ops::OpError;
use crate::ops::delete::{self, Aim, Plan, Report, Request, Yardstick, due};
use crate::store::names;
use crate::store::rows::RowMap;
use crate::store::scan::{Finding, Scan};

/// What follows the flags in its help.
pub const HELP: &str = "\
Without MEMBER the policy chooses. A chain of more than max_length members gets a new base so that half as many, \
from that base to its newest member, are left: the oldest of these. A chain whose base is older than max_base_age, \
and on which something younger stands, gets the oldest member younger than half of that age, or its newest one. \
What is below a new base stays as it is, for as long as CloudStack wants it.";

/// Flags of `consolidate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The members that become full bases [default: those that the configured policy wants to be]
    #[arg(value_name = "MEMBER")]
    members: Vec<String>,
    /// Print the plan and stop
    #[arg(long)]
    dry_run: bool,
    /// Build and prove everything, report, and throw it away
    #[arg(long, conflicts_with = "dry_run")]
    rehearse: bool,
    /// Leave checkpoint files that cannot be edited as they are
    #[arg(long)]
    force: bool,
    /// CloudStack's rows, from scripts/export-records.sql
    #[arg(long, value_name = "FILE", conflicts_with = "database")]
    records: Option<PathBuf>,
    /// CloudStack's database
    #[arg(long, value_name = "URL", env = "QCHAIN_DATABASE", hide_env_values = true)]
    database: Option<String>,
    /// What becomes of the rows
    #[arg(long, value_enum, default_value = "untouched")]
    rows: Rows,
    #[command(flatten)]
    manner: Manner,
    #[command(flatten)]
    pub metrics: metrics::Args,
}

impl Args {
    /// Whether the stores are to be changed.
    pub fn changes(&self) -> bool {
        !self.dry_run && !self.rehearse
    }

    /// Where rows come from, if they are given.
    fn source(&self) -> Result<Option<Source>> {
        if self.rows == Rows::Apply && self.database.is_none() {
            return Err(CliError::usage("--rows apply needs --database".to_owned()));
        }
        let given = self.records.is_some() || self.database.is_some();
        if self.rows == Rows::Print && !given {
            return Err(CliError::usage("--rows print needs --records or --database".to_owned()));
        }
        Ok(Source::open(self.records.as_deref(), self.database.as_deref())?)
    }
}

/// Chooses, plans, asks, makes bases.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    if !args.dry_run {
        context.check_writable()?;
    }
    let stores = context.stores()?;
    stores.check_writable()?;
    let given = members::expand(&args.members)?;
    let site = context.site(&stores);
    site.pace.set(args.manner.rate(context));
    let guard = if args.dry_run { None } else { Some(start(context, &site)?) };
    let source = args.source()?;
    // What an earlier run left.
    let late = match &source {
        Some(source) if args.rows == Rows::Apply && args.changes() => finish(&site, source.database())?,
        _ => Vec::new(),
    };
    let scan = context.scan(&stores, args.manner.now)?;
    let records = source.as_ref().map(Source::records).transpose()?;
    let map = records.as_ref().map(|records| RowMap::new(&stores, &scan, records));
    let leaving = leaving(&site, &scan).map_err(OpError::from)?;
    let mut reasons = BTreeMap::new();
    let targets = if args.members.is_empty() {
        let yardstick = Yardstick {
            stores: &stores,
            scan: &scan,
            rows: map.as_ref(),
            leaving: &leaving,
            policy: context.policy(),
            now_ns: context::now_ns(),
        };
        reasons.extend(due(&yardstick).into_iter().map(|due| (due.member, due.why)));
        reasons.keys().copied().collect::<Vec<NodeId>>()
    } else {
        names::resolve_all(&stores, &scan, &given)?
    };
    let request = Request {
        targets,
        aim: Aim::Consolidate,
        reasons,
        mode: args.manner.mode(),
        records: records.as_ref(),
        dry_run: args.dry_run,
        force: args.force,
        leaving,
        ..Request::default()
    };
    context.progress().phase("planning", 0);
    let nothing = request.targets.is_empty();
    let plan = if nothing { Plan::default() } else { delete::plan(&stores, &scan, &request)? };
    let ledger = source.as_ref().zip(records.as_ref()).zip(map.as_ref());
    let ledger = ledger.map(|((source, records), map)| Ledger {
        site: &site,
        source,
        records,
        map,
        scan: &scan,
        plan: &plan,
        rows: args.rows,
        deadline: None,
        made: Mutex::default(),
    });
    let work = Work { site: &site, scan: &scan, plan: &plan, ledger: ledger.as_ref(), findings: &late };
    match guard {
        Some(guard) if !nothing => consolidate(context, args, &work, &guard),
        _ => show(context, args, &work),
    }
}

/// What was planned.
struct Work<'a> {
    site: &'a Site<'a>,
    scan: &'a Scan,
    plan: &'a Plan,
    ledger: Option<&'a Ledger<'a>>,
    findings: &'a [Finding],
}

impl Work<'_> {
    fn shown(&self, context: &Context, args: &Args) -> Shown<'_> {
        Shown {
            stores: self.site.stores,
            scan: self.scan,
            plan: self.plan,
            grace: args.manner.grace(context, self.plan, Duration::ZERO),
            retention: args.manner.retention(context),
            rehearse: args.rehearse,
        }
    }
}

/// Shows the plan, and that is all.
fn show(context: &Context, args: &Args, work: &Work<'_>) -> Result<Exit> {
    let (shown, report) = (work.shown(context, args), Report::default());
    let rows = work.ledger.map(Ledger::planned).unwrap_or_default();
    let document = Document { merges: shown.document(&report), rows: &rows, findings: work.findings };
    context.print(&document, |out| {
        output::findings(out, work.findings)?;
        if work.plan.trees.is_empty() {
            return writeln!(out, "every chain is as the policy wants it");
        }
        shown.write_plan(out)?;
        write_rows(out, &rows)
    })?;
    Ok(exit(work.plan.trees.iter().find_map(|tree| tree.refusal.as_ref())))
}

/// Asks, and makes bases.
fn consolidate(context: &Context, args: &Args, work: &Work<'_>, guard: &Guard) -> Result<Exit> {
    let shown = work.shown(context, args);
    context.confirm(&shown.plan_text(), args.manner.yes)?;
    let run = delete::Context {
        site: work.site,
        terms: shown.terms(context.witness(), false),
        stores: work.site.stores,
        scan: work.scan,
        plan: work.plan,
        jobs: args.manner.jobs(context),
        force: args.force,
        gate: work.ledger.map(|ledger| ledger as &dyn delete::Gate),
        progress: context.progress(),
        cancel: &context.cancel,
    };
    let report = delete::run(&run, guard)?;
    context.note_freed(report.outcomes.iter().map(|outcome| outcome.bytes_freed_now).sum());
    let rows = work.ledger.map(Ledger::made).unwrap_or_default();
    let document = Document { merges: shown.document(&report), rows: &rows, findings: work.findings };
    context.print(&document, |out| {
        output::findings(out, work.findings)?;
        // Whoever was asked has seen it.
        if args.manner.yes {
            shown.write_plan(out)?;
        }
        shown.write_results(out, &report)?;
        write_rows(out, &rows)
    })?;
    Ok(exit(report.first_failure()))
}
