//! `qchain history`: what was done, and what can still be taken back.

use serde::Serialize;

use super::context::Context;
use super::error::{Exit, Result};
use super::operations::{Row, several, short};
use super::output::{Table, human};
use crate::ops::recover::history;

/// There are no arguments.
#[derive(Debug, clap::Args)]
pub struct Args {}

#[derive(Serialize)]
struct Document {
    operations: Vec<Row>,
}

/// Shows all decided operations, oldest first.
pub fn run(context: &Context) -> Result<Exit> {
    let stores = context.stores()?;
    let site = context.site(&stores);
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
