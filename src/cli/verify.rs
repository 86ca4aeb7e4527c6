//! `qchain verify`.

use super::context::Context;
use super::error::{CliError, Exit, Result};
use super::members;
use super::output::{self, Table};
use crate::failure::Kind;
use crate::ops::verify::{Level, Verdict, verify};
use crate::store::names::resolve_all;

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The members; all if none is given
    members: Vec<String>,
    /// How far to look
    #[arg(long, value_enum, default_value = "structure")]
    level: LevelArg,
}

/// The levels on the command line.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum LevelArg {
    /// Headers and backing names
    Links,
    /// Tables and reference counts too
    Structure,
    /// Every byte against the manifests (not supported yet)
    Data,
}

/// Checks; 1 if any member is damaged.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    let level = match args.level {
        LevelArg::Links => Level::Links,
        LevelArg::Structure => Level::Structure,
        LevelArg::Data => {
            let message = "--level data comes with manifests, and is not supported yet";
            return Err(CliError::unsupported(message.to_owned()));
        }
    };
    let names = members::expand(&args.members)?;
    let stores = context.stores()?;
    let scan = context.scan_cached(&stores)?;
    let chosen =
        if names.is_empty() { scan.graph.ids().collect() } else { resolve_all(&stores, &scan, &names)? };
    let report = verify(&stores, &scan, &chosen, level, context.progress(), &context.cancel)?;
    context.print(&report, |out| {
        let mut table = Table::new(&["MEMBER", "VERDICT"], &[]);
        for checked in &report.checked {
            let verdict = match checked.verdict {
                Verdict::Sound => "sound",
                Verdict::Damaged => "damaged",
                Verdict::Unknown => "unknown",
            };
            table.row(vec![checked.member.clone(), verdict.to_owned()]);
        }
        table.write(out)?;
        output::findings(out, &report.findings)
    })?;
    Ok(if report.any_damaged() { Kind::Damage.into() } else { Exit::DONE })
}
