//! `qchain verify`.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::context::{Context, now_ns};
use super::error::{CliError, Exit, Result};
use super::output::{self, Table, human, time};
use super::{members, values};
use crate::chain::graph::NodeId;
use crate::failure::Kind;
use crate::ops::verify::{Debt, Level, Options, Verdict, VerifyReport, debt, verify};
use crate::progress::Pace;
use crate::store::Stores;
use crate::store::names::resolve_all;
use crate::store::scan::Scan;

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The members; all if none is given
    members: Vec<String>,
    /// How far to look
    #[arg(long, value_enum, default_value = "structure")]
    level: LevelArg,
    /// At level data: read only so much of each member, chosen by chance, like 0.05
    #[arg(long, value_name = "PART", value_parser = fraction)]
    fraction: Option<f64>,
    /// At level data: stop reading after this time; what was left alone for longest comes first
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    max_duration: Option<Duration>,
    /// The most bytes that are read a second [default: limits.rate]
    #[arg(long, value_name = "RATE", value_parser = values::rate)]
    rate: Option<u64>,
    /// Read no image; tell how old the reading of each member's bytes is
    #[arg(long, conflicts_with_all = ["fraction", "max_duration"])]
    debt: bool,
}

/// The levels on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum LevelArg {
    /// Headers and backing names
    Links,
    /// Tables and reference counts too; of adopted members they are what they were
    Structure,
    /// Every byte of adopted members against the leaves that were kept
    Data,
}

/// A part of a whole: above 0, at most 1.
fn fraction(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(part) if part > 0.0 && part <= 1.0 => Ok(part),
        _ => Err("not a number above 0 and at most 1".to_owned()),
    }
}

/// Checks; 1 if any member is damaged.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    let level = match args.level {
        LevelArg::Links => Level::Links,
        LevelArg::Structure => Level::Structure,
        LevelArg::Data => Level::Data,
    };
    if level != Level::Data && (args.fraction.is_some() || args.max_duration.is_some()) {
        return Err(CliError::usage("--fraction and --max-duration need --level data".to_owned()));
    }
    let names = members::expand(&args.members)?;
    let stores = context.stores()?;
    let scan = context.scan_cached(&stores)?;
    let chosen =
        if names.is_empty() { scan.graph.ids().collect() } else { resolve_all(&stores, &scan, &names)? };
    let now_ns = i64::try_from(now_ns()).unwrap_or(i64::MAX);
    if args.debt {
        return show_debt(context, &stores, &scan, &chosen, now_ns);
    }
    let options = Options {
        level,
        fraction: args.fraction,
        seed: u64::from_le_bytes(now_ns.to_le_bytes()),
        deadline: args.max_duration.and_then(|limit| Instant::now().checked_add(limit)),
        note: !context.is_read_only(),
        all: names.is_empty() && level >= Level::Structure,
        now_ns,
    };
    let pace = Pace::new(args.rate.unwrap_or(context.settings.limits.rate.0));
    let report = verify(&stores, &scan, &chosen, &options, context.progress(), &context.cancel, &pace)?;
    context.print(&report, |out| write(out, &report, level))?;
    Ok(if report.any_damaged() { Kind::Damage.into() } else { Exit::DONE })
}

fn write(out: &mut dyn std::io::Write, report: &VerifyReport, level: Level) -> std::io::Result<()> {
    let mut table = Table::new(&["MEMBER", "VERDICT", ""], &[]);
    for checked in &report.checked {
        let verdict = match checked.verdict {
            Verdict::Sound => "sound",
            Verdict::Damaged => "damaged",
            Verdict::Unknown => "unknown",
        };
        let partly = if checked.complete { "" } else { ", in part" };
        let read = if level == Level::Data && checked.bytes_read > 0 {
            format!("{} of view{partly}", human(checked.bytes_read))
        } else {
            String::new()
        };
        table.row(vec![checked.member.clone(), verdict.to_owned(), read]);
    }
    table.write(out)?;
    output::findings(out, &report.findings)
}

/// What `--debt --json` shows.
#[derive(Serialize)]
struct DebtDocument<'a> {
    checked: [(); 0],
    findings: [(); 0],
    debt: Vec<DebtEntry<'a>>,
}

#[derive(Serialize)]
struct DebtEntry<'a> {
    member: &'a str,
    adopted: bool,
    oldest_read: Option<String>,
    age_seconds: Option<u64>,
}

fn show_debt(
    context: &Context,
    stores: &Stores,
    scan: &Scan,
    chosen: &[NodeId],
    now_ns: i64,
) -> Result<Exit> {
    let debts: Vec<Debt> = debt(stores, scan, chosen, now_ns)?;
    let entries = debts.iter().map(|debt| DebtEntry {
        member: &debt.member,
        adopted: debt.adopted,
        oldest_read: debt.oldest_ns.map(time),
        age_seconds: debt.age_seconds,
    });
    let document = DebtDocument { checked: [], findings: [], debt: entries.collect() };
    context.print(&document, |out| {
        let mut table = Table::new(&["MEMBER", "OLDEST BYTE READ"], &[]);
        for entry in &document.debt {
            let when = match (&entry.oldest_read, entry.adopted) {
                (Some(when), _) => when.clone(),
                (None, true) => "never".to_owned(),
                (None, false) => "not adopted".to_owned(),
            };
            table.row(vec![entry.member.to_owned(), when]);
        }
        table.write(out)
    })?;
    Ok(Exit::DONE)
}
