//! `qchain init` and `qchain deinit`.

use serde::Serialize;

use super::context::Context;
use super::error::{Exit, Result};
use super::{lock_proof, output};
use crate::ops::init::{deinit, init, own_directory};
use crate::store::record::StoreKind;

/// The arguments of `init`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What the stores hold [default: cloudstack where there is a directory snapshots, else plain]
    #[arg(long, value_enum)]
    kind: Option<KindArg>,
}

/// The arguments of `deinit`.
#[derive(Debug, clap::Args)]
pub struct DeinitArgs {
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// The kinds on the command line.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum KindArg {
    /// CloudStack's secondary storage
    Cloudstack,
    /// Any tree of qcow2 files
    Plain,
}

/// The first store's keys on top; all stores if there are several.
#[derive(Serialize)]
struct Reports<'a, T: Serialize> {
    #[serde(flatten)]
    first: Option<&'a T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stores: Option<&'a [T]>,
}

impl<'a, T: Serialize> Reports<'a, T> {
    fn of(all: &'a [T]) -> Self {
        Self { first: all.first(), stores: (all.len() > 1).then_some(all) }
    }
}

/// Opts the stores of the call in, as one zone.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    context.check_writable()?;
    let kind = args.kind.map(|kind| match kind {
        KindArg::Cloudstack => StoreKind::Cloudstack,
        KindArg::Plain => StoreKind::Plain,
    });
    let reports = init(&context.stores()?, kind, &lock_proof::seen_across_processes)?;
    context.print(&Reports::of(&reports), |out| {
        for report in &reports {
            let done = if report.changed { "opted in" } else { "was opted in already" };
            writeln!(out, "{}: {done}, kind {}", report.store, report.kind.word())?;
            writeln!(out, "  {}", output::capabilities(&report.capabilities))?;
        }
        Ok(())
    })?;
    Ok(Exit::DONE)
}

/// Removes everything of qchain's from the stores of the call.
pub fn run_deinit(context: &Context, args: &DeinitArgs) -> Result<Exit> {
    context.check_writable()?;
    let stores = context.stores()?;
    let directories: Vec<String> = stores.iter().map(|(_, store)| own_directory(store)).collect();
    context.confirm(&format!("This removes {}", directories.join(", ")), args.yes)?;
    let reports = deinit(&stores)?;
    context.print(&Reports::of(&reports), |out| {
        for report in &reports {
            writeln!(out, "{}: opted out, {} files and directories removed", report.store, report.removed)?;
        }
        Ok(())
    })?;
    Ok(Exit::DONE)
}
