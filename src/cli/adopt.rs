//! `qchain adopt`.

use std::time::Duration;

use super::context::{Context, now_ns};
use super::error::{Exit, Result};
use super::merges::start;
use super::output::{self, Table, human};
use super::{members, metrics, values};
use crate::change::leaving::leaving;
use crate::change::sweep;
use crate::ops::OpError;
use crate::ops::adopt::{Request, adopt};
use crate::store::names::resolve_all;

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The members, with all below each; all settled ones if none is given
    members: Vec<String>,
    /// Do not wait until files without checkpoint have been left alone for the settle time
    #[arg(long)]
    now: bool,
    /// Take what a changed or quarantined member is now for right
    #[arg(long)]
    accept_changed: bool,
    /// How many trees are read at once [default: limits.jobs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: Option<u16>,
    /// The most bytes that are read a second [default: limits.rate]
    #[arg(long, value_name = "RATE", value_parser = values::rate)]
    rate: Option<u64>,
    /// Stop after this time; the next run goes on
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    max_duration: Option<Duration>,
    #[command(flatten)]
    pub metrics: metrics::Args,
}

/// Adopts; what could not be is told, and 1 if anything is damaged.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    context.check_writable()?;
    let stores = context.stores()?;
    stores.check_writable()?;
    let given = members::expand(&args.members)?;
    let site = context.site(&stores);
    site.pace.set(args.rate.unwrap_or(context.settings.limits.rate.0));
    let _guard = start(context, &site)?;
    let scan = context.scan(&stores, args.now)?;
    let named = !given.is_empty();
    let targets = if named { resolve_all(&stores, &scan, &given)? } else { scan.graph.ids().collect() };
    let request = Request {
        targets,
        named,
        accept_changed: args.accept_changed,
        jobs: args.jobs.map_or(context.settings.limits.jobs, usize::from),
        leaving: leaving(&site, &scan).map_err(OpError::from)?,
        now_ns: i64::try_from(now_ns()).unwrap_or(i64::MAX),
        deadline: args.max_duration.and_then(|limit| std::time::Instant::now().checked_add(limit)),
    };
    let report = adopt(&stores, &scan, &request, context.progress(), &context.cancel, &site.pace)?;
    sweep::manifests(&site).map_err(OpError::from)?;
    context.print(&report, |out| {
        let mut table =
            Table::new(&["MEMBER", "DIGEST", "VIEW", "LEAVES", ""], &[false, false, true, true, false]);
        for adopted in &report.adopted {
            let digest = adopted.digest.to_string();
            let short = digest.get(..16).unwrap_or_default().to_owned();
            let new = if adopted.new { "adopted" } else { "was adopted" };
            let (view, leaves) = (human(adopted.virtual_bytes), human(adopted.table_bytes));
            table.row(vec![adopted.member.clone(), short, view, leaves, new.to_owned()]);
        }
        table.write(out)?;
        if report.left > 0 {
            writeln!(out, "{} members are left for the next run", report.left)?;
        }
        output::findings(out, &report.findings)
    })?;
    Ok(report.failure.map_or(Exit::DONE, Exit::from))
}
