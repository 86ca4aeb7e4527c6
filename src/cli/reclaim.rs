//! `qchain reclaim`.

mod ledger;

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::context::Context;
use super::error::{CliError, Exit, Result};
use super::merges::{Manner, Shown, Vouched, exit, start};
use super::output::human;
use super::{metrics, output, values};
use crate::change::leaving::leaving;
use crate::change::{Guard, Site};
use crate::database::Source;
use crate::failure::Code;
use crate::ops::OpError;
use crate::ops::delete::{self, MergeDocument, Plan, Report, Request, STUB_GRACE, plan_worth, selectable};
use crate::ops::reclaim::{Bounds, Found, find};
use crate::store::Stores;
use crate::store::rows::RowMap;
use crate::store::scan::{Finding, Scan};
pub use ledger::{Ledger, Made, finish};

/// Flags of `reclaim`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// CloudStack's rows, from scripts/export-records.sql
    #[arg(long, value_name = "FILE", required_unless_present = "database", conflicts_with = "database")]
    records: Option<PathBuf>,
    /// CloudStack's database
    #[arg(long, value_name = "URL", env = "QCHAIN_DATABASE", hide_env_values = true)]
    database: Option<String>,
    /// What becomes of the rows
    #[arg(long, value_enum, default_value = "untouched")]
    rows: Rows,
    /// Only this account's snapshots; may be repeated
    #[arg(long, value_name = "ACCOUNT")]
    account: Vec<u64>,
    /// Write at most so many bytes in all
    #[arg(long, value_name = "BYTES", value_parser = values::size)]
    limit_bytes: Option<u64>,
    /// Begin no merge after so long; what was begun is finished
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    max_duration: Option<Duration>,
    /// Print the plan and stop
    #[arg(long)]
    dry_run: bool,
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
        !self.dry_run
    }

    fn source(&self) -> Result<Source> {
        let source = Source::open(self.records.as_deref(), self.database.as_deref())?;
        source.ok_or_else(|| CliError::usage("give --records or --database".to_owned()))
    }
}

/// What becomes of CloudStack's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Rows {
    /// Nothing; an empty image keeps each deleted name for CloudStack
    Untouched,
    /// The changes are printed as SQL, for whoever may make them
    Print,
    /// The changes are made; needs --database, and a user that may UPDATE
    Apply,
}

/// What `--json` shows: what was merged, and what became of rows.
#[derive(Serialize)]
pub struct Document<'a> {
    #[serde(flatten)]
    pub merges: MergeDocument,
    /// Changes of rows, tree by tree.
    pub rows: &'a [Made],
    pub findings: &'a [Finding],
}

/// Finds, plans, asks, merges.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    if !args.dry_run {
        context.check_writable()?;
    }
    if args.rows == Rows::Apply && args.database.is_none() {
        return Err(CliError::usage("--rows apply needs --database".to_owned()));
    }
    let begun = Instant::now();
    let stores = context.stores()?;
    stores.check_writable()?;
    let site = context.site(&stores);
    site.pace.set(args.manner.rate(context));
    let guard = if args.dry_run { None } else { Some(start(context, &site)?) };
    let source = args.source()?;
    // What an earlier run left.
    let late = if args.rows == Rows::Apply && !args.dry_run {
        finish(&site, source.database())?
    } else {
        Vec::new()
    };
    let scan = context.scan(&stores, args.manner.now)?;
    let records = source.records()?;
    let leaving = leaving(&site, &scan).map_err(OpError::from)?;
    let map = RowMap::new(&stores, &scan, &records);
    let bounds = Bounds { accounts: args.account.clone() };
    let Found { targets, superseded, mut findings } = find(&stores, &scan, &map, &leaving, &bounds);
    findings.extend(late);
    let mut request = Request {
        targets,
        mode: args.manner.mode(),
        records: Some(&records),
        dry_run: args.dry_run,
        in_place: context.in_place(),
        leaving,
        superseded,
        stubs: args.rows == Rows::Untouched,
        exclusive: args.vouched.exclusive,
        ..Request::default()
    };
    request.targets = selectable(&stores, &scan, &request, &mut findings);
    context.progress().phase("planning", 0);
    let mut plan = plan_worth(&stores, &scan, &mut request, &mut findings)?;
    bound(&stores, &scan, &mut plan, args.limit_bytes, &mut findings);
    let deadline = args.max_duration.and_then(|limit| begun.checked_add(limit));
    let ledger = Ledger {
        site: &site,
        source: &source,
        records: &records,
        map: &map,
        scan: &scan,
        plan: &plan,
        rows: args.rows,
        deadline,
        made: Mutex::default(),
    };
    let work = Work { site: &site, scan: &scan, plan: &plan, ledger: &ledger };
    match guard {
        Some(guard) if !plan.trees.is_empty() => merge(context, args, &work, &guard, findings),
        _ => show(context, args, &work, &findings),
    }
}

/// What was planned.
struct Work<'a> {
    site: &'a Site<'a>,
    scan: &'a Scan,
    plan: &'a Plan,
    ledger: &'a Ledger<'a>,
}

impl Work<'_> {
    fn shown(&self, context: &Context, args: &Args) -> Shown<'_> {
        let least = if args.rows == Rows::Untouched { STUB_GRACE } else { Duration::ZERO };
        Shown {
            stores: self.site.stores,
            scan: self.scan,
            plan: self.plan,
            grace: args.manner.grace(context, self.plan, least),
            retention: args.manner.retention(context),
            rehearse: false,
        }
    }
}

/// Shows the plan, and that is all.
fn show(context: &Context, args: &Args, work: &Work<'_>, findings: &[Finding]) -> Result<Exit> {
    let (shown, report, rows) = (work.shown(context, args), Report::default(), work.ledger.planned());
    let document = Document { merges: shown.document(&report), rows: &rows, findings };
    context.print(&document, |out| {
        shown.write_plan(out)?;
        if work.plan.trees.is_empty() {
            writeln!(out, "nothing can be reclaimed")?;
        }
        write_total(out, work.plan)?;
        write_rows(out, &rows)?;
        output::findings(out, findings)
    })?;
    Ok(exit(work.plan.trees.iter().find_map(|tree| tree.refusal.as_ref())))
}

/// Asks, and merges.
fn merge(
    context: &Context,
    args: &Args,
    work: &Work<'_>,
    guard: &Guard,
    mut findings: Vec<Finding>,
) -> Result<Exit> {
    let shown = work.shown(context, args);
    context.confirm(&shown.plan_text(), args.manner.yes)?;
    let run = delete::Context {
        site: work.site,
        terms: shown.terms(context.witness(), args.rows == Rows::Untouched),
        stores: work.site.stores,
        scan: work.scan,
        plan: work.plan,
        jobs: args.manner.jobs(context),
        force: false,
        gate: Some(work.ledger),
        progress: context.progress(),
        cancel: &context.cancel,
    };
    let mut report = delete::run(&run, guard)?;
    context.note_freed(report.outcomes.iter().map(|outcome| outcome.bytes_freed_now).sum());
    shown.put_off(&mut report, &mut findings);
    let rows = work.ledger.made();
    let document = Document { merges: shown.document(&report), rows: &rows, findings: &findings };
    context.print(&document, |out| {
        if args.manner.yes {
            shown.write_plan(out)?;
        }
        shown.write_results(out, &report)?;
        write_rows(out, &rows)?;
        output::findings(out, &findings)
    })?;
    Ok(exit(report.first_failure()))
}

/// The trees that give back most for what they write come first; what is behind the limit is left.
fn bound(stores: &Stores, scan: &Scan, plan: &mut Plan, limit: Option<u64>, findings: &mut Vec<Finding>) {
    let freed = |tree: &delete::TreePlan| tree.entries.iter().map(|entry| entry.bytes_to_free).sum::<u64>();
    let written =
        |tree: &delete::TreePlan| tree.entries.iter().map(|entry| entry.cost.written_bytes()).sum::<u64>();
    plan.trees.sort_by_cached_key(|tree| {
        let gain = u128::from(freed(tree)) * 1_000_000 / (u128::from(written(tree)) + 1);
        (std::cmp::Reverse(gain), tree.targets.clone())
    });
    let Some(mut left) = limit else { return };
    plan.trees.retain(|tree| {
        let fits = written(tree) <= left;
        if fits {
            left -= written(tree);
        } else if let Some(first) = tree.targets.first() {
            let member = stores.display(&scan.graph.node(*first).key);
            let message = format!(
                "{} would be written, and --limit-bytes leaves {}",
                human(written(tree)),
                human(left)
            );
            findings.push(Finding { member, code: Code::LeftForLater, message });
        }
        fits
    });
}

fn write_total(out: &mut dyn Write, plan: &Plan) -> io::Result<()> {
    if plan.trees.is_empty() {
        return Ok(());
    }
    let freed: u64 = plan.entries().map(|entry| entry.bytes_to_free).sum();
    let taken: u64 = plan.entries().map(|entry| entry.bytes_to_take).sum();
    let freed = freed.saturating_sub(taken);
    let written: u64 = plan.entries().map(|entry| entry.cost.written_bytes()).sum();
    writeln!(out, "in all: writes {}, frees {}", human(written), human(freed))
}

/// The statements, ready to be run.
pub fn write_rows(out: &mut dyn Write, rows: &[Made]) -> io::Result<()> {
    for made in rows.iter().filter(|made| !made.changes.is_empty()) {
        if let Some(note) = &made.note {
            writeln!(out, "-- {note}")?;
        }
        writeln!(out, "START TRANSACTION;")?;
        for change in &made.changes {
            writeln!(out, "{};", change.statement)?;
        }
        writeln!(out, "COMMIT;")?;
    }
    Ok(())
}
