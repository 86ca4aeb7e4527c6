//! `qchain audit`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use super::context::Context;
use super::error::{Exit, Result};
use super::output::{Table, human};
use super::values;
use crate::database::Source;
use crate::failure::Kind;
use crate::ops::audit::{AuditFinding, AuditOptions, AuditReport, Sum, Totals, audit};

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// CloudStack's rows, from scripts/export-records.sql
    #[arg(long, value_name = "FILE", conflicts_with = "database")]
    records: Option<PathBuf>,
    /// CloudStack's database
    #[arg(long, value_name = "URL", env = "QCHAIN_DATABASE", hide_env_values = true)]
    database: Option<String>,
    /// How long a file must have been left alone to count as left behind
    #[arg(long, value_name = "DURATION", default_value = "8h", value_parser = values::duration)]
    min_age: Duration,
    /// Exit code 1 if a finding is a warning or an error
    #[arg(long)]
    strict: bool,
}

/// Looks, and changes nothing.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    let source = Source::open(args.records.as_deref(), args.database.as_deref())?;
    // Before the files: what comes meanwhile is too young to count as left behind.
    let records = source.as_ref().map(Source::records).transpose()?;
    let stores = context.stores()?;
    let scan = context.scan_cached(&stores)?;
    let options = AuditOptions {
        records: records.as_ref(),
        policy: context.policy(),
        now_ns: super::context::now_ns(),
        min_age_ns: i128::try_from(args.min_age.as_nanos()).unwrap_or(i128::MAX),
    };
    let report = audit(&stores, &scan, &options, &context.cancel)?;
    context.print(&report, |out| write(out, &report))?;
    Ok(if args.strict && report.anything_wrong() { Kind::Damage.into() } else { Exit::DONE })
}

fn write(out: &mut dyn Write, report: &AuditReport) -> io::Result<()> {
    for AuditFinding { code, member, message, bytes } in &report.findings {
        let bytes = bytes.map_or_else(String::new, |bytes| format!(" ({})", human(bytes)));
        writeln!(out, "{}: {member}: {message}{bytes} [{code}]", code.severity().word())?;
    }
    let Totals { accounts, volumes, chains } = &report.totals;
    let by_account = accounts.iter().map(|total| (total.owner.account.to_string(), &total.sum));
    table(out, "ACCOUNT", by_account)?;
    let by_volume = volumes.iter().map(|total| {
        let volume = total.owner.volume.map_or_else(String::new, |volume| volume.to_string());
        (format!("{}/{volume}", total.owner.account), &total.sum)
    });
    table(out, "ACCOUNT/VOLUME", by_volume)?;
    table(out, "CHAIN", chains.iter().map(|total| (total.member.clone(), &total.sum)))
}

fn table<'a>(
    out: &mut dyn Write,
    what: &str,
    rows: impl Iterator<Item = (String, &'a Sum)>,
) -> io::Result<()> {
    let head = [what, "MEMBERS", "FILES", "TAKE", "HIDDEN"];
    let mut table = Table::new(&head, &[false, true, true, true, true]);
    for (name, sum) in rows {
        table.row(vec![
            name,
            sum.members.to_string(),
            human(sum.file_bytes),
            human(sum.allocated_bytes),
            sum.hidden_bytes.map_or_else(|| "?".to_owned(), human),
        ]);
    }
    writeln!(out)?;
    table.write(out)
}
