//! `qchain history`: what was done, and what can still be taken back.

use serde::Serialize;

use super::context::Context;
use super::error::{Exit, Result};
use super::operations::{Row, several, short};
use super::output::{Table, human, time};
use crate::change::Site;
use crate::change::log::Did;
use crate::failure::Kind;
use crate::ops::recover::{history, logs};

/// Flags of `history`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show the log, also of what is over, and whether each line follows the one before
    #[arg(long)]
    log: bool,
}

#[derive(Serialize)]
struct Document {
    operations: Vec<Row>,
}

/// Shows all decided operations, oldest first.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    let stores = context.stores()?;
    let site = context.site(&stores);
    if args.log {
        return show_log(context, &site);
    }
    let operations = history(&site)?.iter().map(|done| Row::of(&site, done)).collect();
    let document = Document { operations };
    context.print(&document, |out| {
        let head = ["OPERATION", "TIME", "DID", "MEMBERS", "HELD", "UNDO UNTIL"];
        let mut table = Table::new(&head, &[false, false, false, false, true, false]);
        for row in &document.operations {
            let undo = match (&row.undo_until, row.undone) {
                (_, true) => "undone",
                (Some(until), _) => until,
                (None, _) => "-",
            };
            table.row(vec![
                short(&row.operation).to_owned(),
                row.time.clone(),
                row.did.to_owned(),
                several(row.about()),
                human(row.bytes_held),
                undo.to_owned(),
            ]);
        }
        table.write(out)?;
        if document.operations.is_empty() {
            writeln!(out, "nothing was changed yet")?;
        }
        Ok(())
    })?;
    Ok(Exit::DONE)
}

#[derive(Serialize)]
struct LogDocument {
    lines: Vec<LogLine>,
}

#[derive(Serialize)]
struct LogLine {
    store: String,
    number: u64,
    /// Why it cannot be believed; null if it follows the one before.
    error: Option<String>,
    time: Option<String>,
    operation: Option<String>,
    verb: Option<String>,
    did: Vec<Did>,
}

/// Shows the logs; 1 if a line does not follow the one before.
fn show_log(context: &Context, site: &Site<'_>) -> Result<Exit> {
    let mut lines = Vec::new();
    for (store, found) in logs(site)? {
        let store = site.stores.get(store)?.id().to_string();
        let (line, error) = match found.line {
            Ok(line) => (Some(line), None),
            Err(error) => (None, Some(error)),
        };
        lines.push(LogLine {
            store,
            number: found.number,
            error,
            time: line.as_ref().map(|line| time(line.time_ns)),
            operation: line.as_ref().map(|line| line.operation.to_string()),
            verb: line.as_ref().map(|line| line.verb.clone()),
            did: line.map(|line| line.did).unwrap_or_default(),
        });
    }
    let document = LogDocument { lines };
    context.print(&document, |out| {
        let mut table = Table::new(&["STORE", "LINE", "TIME", "DID", "MEMBERS", ""], &[false, true]);
        for line in &document.lines {
            let members: Vec<&str> = line
                .did
                .iter()
                .flat_map(|did| did.into.iter().chain(&did.members))
                .map(String::as_str)
                .collect();
            table.row(vec![
                line.store.clone(),
                line.number.to_string(),
                line.time.clone().unwrap_or_default(),
                line.verb.clone().unwrap_or_default(),
                members.join(" "),
                line.error.clone().unwrap_or_default(),
            ]);
        }
        table.write(out)
    })?;
    let broken = document.lines.iter().any(|line| line.error.is_some());
    Ok(if broken { Kind::Damage.into() } else { Exit::DONE })
}
