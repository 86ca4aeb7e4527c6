//! `qchain recover`: finishes or takes back what was interrupted, and moves on what is due.

use super::context::Context;
use super::error::{Exit, Result};
use super::metrics;
use super::operations::{failure, held_bytes, said, several, short};
use super::output;
use super::reclaim::finish;
use crate::database::Database;
use crate::ops::recover::{RecoverReport, recover, thaw};

/// What is to be said of exit codes.
pub const HELP: &str = "\
Exit codes: 0 all is finished, taken back, or waits for its time; 3 a tree is frozen or a kept file is not what \
was put there; 5 another qchain is at work on it; else that of the first failure.";

/// Flags of `recover`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// First let the tree be changed again that this operation froze; the beginning of its id is enough
    #[arg(long, value_name = "OPERATION")]
    thaw: Option<String>,
    /// CloudStack's database: changes of rows that follow finished merges are made, too
    #[arg(long, value_name = "URL", env = "QCHAIN_DATABASE", hide_env_values = true)]
    database: Option<String>,
    #[command(flatten)]
    pub metrics: metrics::Args,
}

/// Recovers. Asks nothing: it does what every changing command begins with.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    context.check_writable()?;
    let stores = context.stores()?;
    stores.check_writable()?;
    let site = context.site(&stores);
    let thawed = args.thaw.as_deref().map(|text| thaw(&site, text)).transpose()?;
    let held = held_bytes(&site);
    let all = recover(&site, context.witness())?;
    context.note_freed(held.saturating_sub(held_bytes(&site)));
    let database = args.database.as_deref().map(Database::connect).transpose()?;
    let rows = finish(&site, database.as_ref())?;
    let document = RecoverReport::of(&site, &all, &rows, thawed.as_ref());
    context.print(&document, |out| {
        if let Some(tree) = &document.thawed {
            writeln!(out, "tree {tree} may be changed again")?;
        }
        for (entry, one) in document.recovered.iter().zip(&all) {
            writeln!(out, "{} {}: {}", short(&entry.operation), several(&entry.members), said(&one.action))?;
            for reason in &entry.kept {
                writeln!(out, "    stays: {reason}")?;
            }
        }
        if document.recovered.is_empty() {
            writeln!(out, "nothing was left undone")?;
        }
        output::findings(out, &document.findings)
    })?;
    let failed = all.iter().find_map(|one| failure(&one.action));
    Ok(failed.map_or(Exit::DONE, |(kind, _)| Exit::from(kind)))
}
