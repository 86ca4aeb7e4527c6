//! `qchain digest`.

use std::path::Path;

use super::beside::{self, Beside};
use super::context::Context;
use super::error::{CliError, Exit, Result};
use crate::ops::digest::{DigestReport, of_file, of_member};
use crate::store::StoreError;
use crate::store::names::resolve_one;

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A member, or a file of no store: a qcow2 image with what lies below it in its directory, or a raw image
    #[arg(value_name = "MEMBER_OR_FILE")]
    member: String,
    /// The file is a raw image, whatever it begins with (as is one named *.raw)
    #[arg(long)]
    raw: bool,
}

/// Prints the digest.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    let report = if context.configs().is_empty() || args.raw {
        of_path(context, args)?
    } else {
        let stores = context.stores()?;
        let scan = context.scan_cached(&stores)?;
        match resolve_one(&stores, &scan, &args.member) {
            Ok(id) => of_member(&stores, &scan, id, context.progress(), &context.cancel)?,
            // What is no member may be a file; what is neither is told as no member.
            Err(error @ StoreError::NotFound { .. }) => match of_path(context, args) {
                Err(CliError::Op(crate::ops::OpError::Store(StoreError::NotFound { .. }))) => {
                    return Err(error.into());
                }
                other => other?,
            },
            Err(error) => return Err(error.into()),
        }
    };
    context.print(&report, |out| writeln!(out, "{}  {}", report.digest, report.member))?;
    Ok(Exit::DONE)
}

/// The digest of a file that is named by its path.
fn of_path(context: &Context, args: &Args) -> Result<DigestReport> {
    let Beside { root, backend, file } = beside::open(&args.member)?;
    let path = Path::new(&args.member);
    let raw = args.raw || path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("raw"));
    let report = of_file(&backend, &root, &file, raw, context.progress(), &context.cancel)?;
    Ok(DigestReport { member: args.member.clone(), ..report })
}
