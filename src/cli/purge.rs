//! `qchain purge`: ends what is due.

use std::fmt::Write as _;

use serde::Serialize;

use super::context::Context;
use super::error::{Exit, Result};
use super::metrics;
use super::operations::{self, Row, failure, said, several, short, until};
use super::output::{self, ErrorBody, human};
use crate::change::Site;
use crate::ops::recover::{Purged, history, purge};
use crate::store::scan::Finding;

/// Flags of `purge`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// End also what is kept for an undo and not due yet; asks
    #[arg(long)]
    all: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    pub metrics: metrics::Args,
}

#[derive(Serialize)]
struct Document<'a> {
    operations: Vec<Entry<'a>>,
    bytes_freed: u64,
    findings: Vec<&'a Finding>,
}

/// What `history` shows of it, as it is now, and what became of it.
#[derive(Serialize)]
struct Entry<'a> {
    operation: String,
    member: Option<String>,
    members: Vec<String>,
    time: Option<String>,
    undo_until: Option<String>,
    bytes_held: u64,
    bytes_freed: u64,
    action: &'static str,
    until: Option<String>,
    error: Option<ErrorBody>,
    kept: &'a [String],
}

impl<'a> Entry<'a> {
    fn of(site: &Site<'_>, purged: &'a Purged) -> Self {
        let row = purged.done.as_ref().map(|done| Row::of(site, done));
        let recovered = &purged.recovered;
        let members = match &row {
            Some(row) => row.members.clone(),
            None => operations::names(site, &recovered.members),
        };
        let waits = until(&recovered.action);
        Self {
            operation: recovered.name.operation.to_string(),
            member: members.first().cloned(),
            members,
            time: row.as_ref().map(|row| row.time.clone()),
            undo_until: row.and_then(|row| row.undo_until).filter(|_| waits.is_some()),
            bytes_held: purged.held_bytes,
            bytes_freed: purged.freed_bytes(),
            action: recovered.action.word(),
            until: waits,
            error: failure(&recovered.action).map(|(_, error)| error),
            kept: &recovered.kept,
        }
    }
}

/// Purges.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    context.check_writable()?;
    let stores = context.stores()?;
    stores.check_writable()?;
    let site = context.site(&stores);
    if args.all {
        context.confirm(&plan(&site)?, args.yes)?;
    }
    let purged = purge(&site, args.all, context.witness())?;
    let operations: Vec<Entry<'_>> = purged.iter().map(|one| Entry::of(&site, one)).collect();
    let bytes_freed = operations.iter().map(|entry| entry.bytes_freed).sum();
    context.note_freed(bytes_freed);
    let findings = purged.iter().flat_map(|one| operations::findings(&one.recovered.action)).collect();
    let document = Document { operations, bytes_freed, findings };
    context.print(&document, |out| {
        for (entry, one) in document.operations.iter().zip(&purged) {
            let (id, what) = (short(&entry.operation), several(&entry.members));
            write!(out, "{id} {what}: {}", said(&one.recovered.action))?;
            match entry.bytes_freed {
                0 => writeln!(out)?,
                bytes => writeln!(out, ", {} freed", human(bytes))?,
            }
            for reason in entry.kept {
                writeln!(out, "    stays: {reason}")?;
            }
        }
        if document.operations.is_empty() {
            writeln!(out, "nothing is kept")?;
        }
        output::findings(out, document.findings.iter().copied())
    })?;
    let failed = purged.iter().find_map(|one| failure(&one.recovered.action));
    Ok(failed.map_or(Exit::DONE, |(kind, _)| Exit::from(kind)))
}

/// What `--all` would end.
fn plan(site: &Site<'_>) -> Result<String> {
    let mut text = "end these operations, which then cannot be undone:".to_owned();
    for done in history(site)?.iter().filter(|done| !done.ended) {
        let row = Row::of(site, done);
        let (id, what, held) = (short(&row.operation), several(&row.members), human(row.bytes_held));
        let _ = write!(text, "\n    {id} {what}, of {}, keeps {held}", row.time);
    }
    Ok(text)
}
