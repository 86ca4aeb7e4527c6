//! `qchain undo`: takes one operation back, whole.

use std::fmt::Write as _;

use serde::Serialize;

use super::context::Context;
use super::error::{Exit, Result};
use super::metrics;
use super::operations::{Row, failure, short, until};
use super::output::ErrorBody;
use crate::failure::{Code, Kind};
use crate::ops::recover::{find_undoable, undo};

/// Flags of `undo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The operation, as delete and history show it; the beginning of its id is enough
    operation: String,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    pub metrics: metrics::Args,
}

#[derive(Serialize)]
struct Document {
    /// The one that was taken back.
    operations: [Row; 1],
    /// The undo's own id.
    operation: String,
    status: &'static str,
    error: Option<ErrorBody>,
    /// How far the undo came.
    action: &'static str,
    /// Until when files are kept that it replaced.
    until: Option<String>,
}

/// Asks, takes back.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    context.check_writable()?;
    let stores = context.stores()?;
    stores.check_writable()?;
    let site = context.site(&stores);
    let found = find_undoable(&site, &args.operation)?;
    context.confirm(&plan(&Row::of(&site, &found)), args.yes)?;
    let undone = undo(&site, found.operation.as_str(), context.witness())?;
    let mut done = undone.done;
    done.undone = undone.left.is_empty();
    done.undo_until = None;
    // Somebody else's edit came between: it is told, and it stands.
    let (kind, error) = match (undone.left.as_slice(), failure(&undone.action)) {
        ([], None) => (None, None),
        ([], Some((kind, error))) => (Some(kind), Some(error)),
        (left, _) => {
            let error = ErrorBody::new(Kind::Refused, Code::ChangedMeanwhile, left.join("; "));
            (Some(Kind::Refused), Some(error))
        }
    };
    let document = Document {
        operations: [Row::of(&site, &done)],
        operation: undone.operation.to_string(),
        status: if error.is_none() { "done" } else { "failed" },
        error,
        action: undone.action.word(),
        until: until(&undone.action),
    };
    context.print(&document, |out| {
        let [row] = &document.operations;
        match &document.error {
            None => writeln!(out, "undone: {}", short(&row.operation))?,
            Some(error) => writeln!(out, "not wholly undone: {}: {}", short(&row.operation), error.text())?,
        }
        for member in &row.members {
            writeln!(out, "    {member} is back")?;
        }
        for survivor in &row.survivors {
            writeln!(out, "    {survivor} has its old file")?;
        }
        if let Some(until) = &document.until {
            writeln!(out, "the files that it replaced are kept until {until}")?;
        }
        Ok(())
    })?;
    Ok(kind.map_or(Exit::DONE, Exit::from))
}

/// What would be done.
fn plan(row: &Row) -> String {
    let mut text = format!("take back {} of {}:", short(&row.operation), row.time);
    for member in &row.members {
        let _ = write!(text, "\n    {member} comes back");
    }
    for survivor in &row.survivors {
        let _ = write!(text, "\n    {survivor} gets its old file");
    }
    text
}
