//! `qchain repair`.

use std::path::Path;
use std::time::Duration;

use super::beside::{self, Beside};
use super::context::Context;
use super::error::{Exit, Result};
use super::merges::{nanoseconds, start};
use super::{metrics, stores, values};
use crate::ids::StorePath;
use crate::ops::repair::{Request, Source, repair};
use crate::store::connect::connect;
use crate::store::names::resolve_one;

/// Flags of `repair`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The member
    member: String,
    /// Where good blocks may be: another store that has the member, a qcow2 image (a copy, a template, a volume), a raw image
    #[arg(long, required = true, num_args = 1.., value_name = "STORE_OR_FILE")]
    from: Vec<String>,
    /// Say what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// How long the damaged file is kept for an undo [default: safety.retention]
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

/// Repairs.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    if !args.dry_run {
        context.check_writable()?;
    }
    let stores = context.stores()?;
    stores.check_writable()?;
    let site = context.site(&stores);
    site.pace.set(args.rate.unwrap_or(context.settings.limits.rate.0));
    // A call that changes nothing recovers nothing, either.
    let guard = if args.dry_run { None } else { Some(start(context, &site)?) };
    let scan = context.scan(&stores, true)?;
    let target = resolve_one(&stores, &scan, &args.member)?;
    let key = &scan.graph.node(target).key;
    let sources = args.from.iter().map(|from| source(context, from, &key.path)).collect::<Result<_>>()?;
    if !args.dry_run {
        let plan = format!("repair {} from {}", stores.display(key), args.from.join(", "));
        context.confirm(&plan, args.yes)?;
    }
    let retention_ns = nanoseconds(args.retention.unwrap_or(context.settings.safety.retention.0));
    let request = Request { target, sources, retention_ns };
    let report = repair(&site, &scan, &request, guard.as_ref(), context.progress(), &context.cancel)?;
    context.print(&report, |out| {
        writeln!(out, "{}: {}: {} bad blocks", report.status, report.member, report.blocks)?;
        if report.metadata {
            writeln!(out, "  header and tables from a copy of the file")?;
        }
        for (from, blocks) in &report.from {
            writeln!(out, "  {blocks} from {from}")?;
        }
        Ok(())
    })?;
    Ok(Exit::DONE)
}

/// Opens a place where good blocks may be.
fn source(context: &Context, from: &str, member: &StorePath) -> Result<Source> {
    if from.contains("://") || Path::new(from).is_dir() {
        let configs = stores::configured(&[from.to_owned()], &context.settings.stores)?;
        let other = connect(configs)?;
        let scan = context.scan(&other, true)?;
        return Ok(Source::of_store(from, &other, &scan, member)?);
    }
    let Beside { root, backend, file } = beside::open(from)?;
    Ok(Source::of_file(from, &backend, &root, &file)?)
}
