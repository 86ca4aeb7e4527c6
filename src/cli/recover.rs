//! `qchain recover`: finishes or takes back what was interrupted, and moves on what is due.

use serde::Serialize;

use super::context::Context;
use super::error::{Exit, Result};
use super::metrics;
use super::operations::{self, failure, held_bytes, names, said, several, short, until};
use super::output::{self, ErrorBody};
use super::reclaim::finish;
use crate::change::Site;
use crate::change::recover::Recovered;
use crate::database::Database;
use crate::ops::recover::{recover, thaw};
use crate::store::scan::Finding;

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

#[derive(Serialize)]
struct Document<'a> {
    recovered: Vec<Entry<'a>>,
    findings: Vec<&'a Finding>,
    /// The tree that was thawed.
    thawed: Option<String>,
}

#[derive(Serialize)]
struct Entry<'a> {
    /// The name of its record in `.qchain/intents`.
    intent: String,
    action: &'static str,
    operation: String,
    store: String,
    members: Vec<String>,
    /// Until when it waits, if it does.
    until: Option<String>,
    error: Option<ErrorBody<'static>>,
    /// Deleted members that stay, and why.
    kept: &'a [String],
}

impl<'a> Entry<'a> {
    fn of(site: &Site<'_>, recovered: &'a Recovered) -> Self {
        let Recovered { name, home, members, action, kept } = recovered;
        Self {
            intent: name.path().file_name().to_owned(),
            action: action.word(),
            operation: name.operation.to_string(),
            store: operations::store(site, *home),
            members: names(site, members),
            until: until(action),
            error: failure(action).map(|(_, error)| error),
            kept,
        }
    }
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
    let document = Document {
        recovered: all.iter().map(|one| Entry::of(&site, one)).collect(),
        findings: all.iter().flat_map(|one| operations::findings(&one.action)).chain(&rows).collect(),
        thawed: thawed.map(|tree| tree.to_string()),
    };
    context.print(&document, |out| {
        if let Some(tree) = &document.thawed {
            writeln!(out, "tree {tree} may be changed again")?;
        }
        for (entry, one) in document.recovered.iter().zip(&all) {
            writeln!(out, "{} {}: {}", short(&entry.operation), several(&entry.members), said(&one.action))?;
            for reason in entry.kept {
                writeln!(out, "    stays: {reason}")?;
            }
        }
        if document.recovered.is_empty() {
            writeln!(out, "nothing was left undone")?;
        }
        output::findings(out, document.findings.iter().copied())
    })?;
    let failed = all.iter().find_map(|one| failure(&one.action));
    Ok(failed.map_or(Exit::DONE, |(kind, _)| Exit::from(kind)))
}
