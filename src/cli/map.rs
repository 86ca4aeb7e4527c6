//! `qchain map`: printed run by run, so that a map of any length takes no memory.

use std::io::{self, Write};

use super::context::Context;
use super::error::{CliError, Exit, Result};
use super::output::{ErrorBody, SCHEMA};
use crate::failure::Failure;
use crate::ops::OpError;
use crate::ops::map::{MapReport, MapRun, RunKind, map};
use crate::store::names::resolve_one;

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The member
    member: String,
}

/// Prints the map.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    let stores = context.stores()?;
    let scan = context.scan_cached(&stores)?;
    let id = resolve_one(&stores, &scan, &args.member)?;
    let report = map(&stores, &scan, id)?;
    let mut runs = report.runs(&context.cancel).peekable();
    // What fails at once is a failure and nothing else.
    if let Some(Err(error)) = runs.next_if(std::result::Result::is_err) {
        return Err(error.into());
    }
    if !context.json() {
        let mut failed = None;
        context.stream(|out| {
            for run in runs {
                match run {
                    Ok(run) => write_run(out, &run)?,
                    Err(error) => failed = Some(error),
                }
            }
            Ok(())
        })?;
        return failed.map_or(Ok(Exit::DONE), |error| Err(CliError::Op(error)));
    }
    let mut exit = Exit::DONE;
    context.stream(|out| {
        if let Some(error) = write_json(out, &report, runs)? {
            exit = error.kind().into();
        }
        Ok(())
    })?;
    Ok(exit)
}

fn write_run(out: &mut dyn Write, run: &MapRun<'_>) -> io::Result<()> {
    let kind = match run.kind {
        RunKind::Data => "data",
        RunKind::Zero => "zero",
        RunKind::Compressed => "compressed",
    };
    write!(out, "{:#14x} {:#14x} {kind:10}", run.start, run.length)?;
    if let (Some(member), Some(offset)) = (run.member, run.offset) {
        write!(out, " {offset:#14x} {member}")?;
    }
    writeln!(out)
}

/// Writes the document; an error on the way becomes its `error` key, and is given back.
fn write_json<'a>(
    out: &mut dyn Write,
    report: &MapReport,
    runs: impl Iterator<Item = crate::ops::Result<MapRun<'a>>>,
) -> io::Result<Option<OpError>> {
    write!(out, "{{\"schema\":{SCHEMA},\"member\":")?;
    serde_json::to_writer(&mut *out, &report.member)?;
    write!(out, ",\"virtual_bytes\":{},\"runs\":[", report.virtual_bytes)?;
    let mut failed = None;
    for (index, run) in runs.enumerate() {
        match run {
            Ok(run) => {
                out.write_all(if index > 0 { b",\n" } else { b"\n" })?;
                serde_json::to_writer(&mut *out, &run)?;
            }
            Err(error) => failed = Some(error),
        }
    }
    out.write_all(b"]")?;
    if let Some(error) = &failed {
        out.write_all(b",\"error\":")?;
        serde_json::to_writer(&mut *out, &ErrorBody::of(error))?;
    }
    out.write_all(b"}\n")?;
    Ok(failed)
}
