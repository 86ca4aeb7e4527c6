//! `qchain copy`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::context::Context;
use super::error::{CliError, Exit, Result};
use super::merges::start;
use super::output::{Table, human};
use super::{members, stores, values};
use crate::cloudstack::paths::checkpoint_of;
use crate::ids::{Digest, StorePath};
use crate::ops::copy::{
    Copied, CopyReport, Destination, LocalPeer, Outcome, Peer, Renaming, Request, Reuse, copy,
};
use crate::ops::document::Document;
use crate::ops::{Result as OpResult, Work};
use crate::peer::HttpPeer;
use crate::progress::Pace;
use crate::store::Stores;
use crate::store::connect::connect;
use crate::store::scan::Scan;

/// Shown behind the flags.
pub const HELP: &str = "\
Members are named as the other side names them: [STORE:]install/path. Each comes with those that it stands on, as far as \
no member with an equal view is here. What is here is never replaced. A copy that was interrupted is continued by the same \
call. Copied members are replicas: audit does not ask for their rows.";

/// Flags of `copy`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The members
    #[arg(value_name = "MEMBER", required = true)]
    members: Vec<String>,
    /// Where they come from: a zone of the configuration, a store of this call, or a directory [default: the stores of
    /// this call]
    #[arg(long, value_name = "ZONE_OR_STORE", required_unless_present = "to")]
    from: Option<String>,
    /// Where they go: a store of this call, or a directory [default: the only store of this call]
    #[arg(long, value_name = "STORE")]
    to: Option<String>,
    /// Bring each member as one full image that stands on nothing
    #[arg(long)]
    flatten: bool,
    /// Tell what would come, and how many bytes at most
    #[arg(long)]
    dry_run: bool,
    /// Read what was written back before it gets its name
    #[arg(long)]
    read: bool,
    /// Another account and volume here; may be repeated
    #[arg(long = "map", value_name = "ACCOUNT/VOLUME=ACCOUNT/VOLUME", value_parser = Renaming::parse)]
    renamings: Vec<Renaming>,
    /// Bring checkpoint files too, and write what CloudStack's rows would have to say to this new file
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    records_out: Option<PathBuf>,
    /// The most bytes that are asked for a second [default: limits.rate]
    #[arg(long, value_name = "RATE", value_parser = values::rate)]
    rate: Option<u64>,
}

/// Copies.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    context.check_writable()?;
    let wanted = members::expand(&args.members)?;
    let (stores, store) = destination(context, args)?;
    let peer = source(context, args)?;
    let site = context.site(&stores);
    let guard = if args.dry_run { None } else { Some(start(context, &site)?) };
    stores.check_writable()?;
    let request = Request {
        members: wanted,
        flatten: args.flatten,
        dry_run: args.dry_run,
        read: args.read,
        renamings: args.renamings.clone(),
        checkpoints: args.records_out.is_some(),
        reuse: args
            .from
            .as_deref()
            .and_then(|from| context.zone(from))
            .map_or(Reuse::Chain, |zone| zone.reuse),
    };
    let pace = Pace::new(args.rate.unwrap_or(context.settings.limits.rate.0));
    let work = Work { progress: context.progress(), cancel: &context.cancel, pace: &pace };
    let scan = || -> OpResult<Scan> {
        let options = crate::store::scan::ScanOptions {
            now_ns: super::context::now_ns(),
            settle_ns: 0,
            caches: &[],
            progress: context.progress(),
        };
        Ok(Scan::run(&stores, &options)?)
    };
    let to = Destination { site: &site, store };
    let report = copy(peer.as_ref(), &to, &request, &scan, &work)?;
    drop(guard);
    if let Some(file) = &args.records_out {
        write_records(file, &stores, &report)?;
    }
    context.print(&report, |out| write(out, &report))?;
    Ok(Exit::DONE)
}

/// The stores of the destination, and which of them it is.
fn destination(context: &Context, args: &Args) -> Result<(Stores, usize)> {
    if let Some(to) = args.to.as_deref().filter(|to| to.contains('/')) {
        let config = stores::other(to, &context.settings.stores)?;
        return Ok((connect(vec![config])?, 0));
    }
    let stores = context.stores()?;
    let store = match args.to.as_deref() {
        None if stores.len() == 1 => 0,
        None => return Err(CliError::usage("there are several stores: say to which with --to".to_owned())),
        Some(id) => {
            let Some((store, _)) = stores.named(id) else {
                let detail = if context.zone(id).is_some() {
                    format!("the other side pulls: run the copy in {id}, with --from")
                } else {
                    format!("there is no store {id:?}")
                };
                return Err(CliError::usage(detail));
            };
            store
        }
    };
    Ok((stores, store))
}

/// Who gives the members.
fn source(context: &Context, args: &Args) -> Result<Box<dyn Peer>> {
    let Some(from) = &args.from else {
        return Ok(Box::new(LocalPeer::new("this zone".to_owned(), context.stores()?)));
    };
    if let Some(zone) = context.zone(from) {
        return Ok(Box::new(HttpPeer::new(&zone)?));
    }
    let config = if from.contains('/') {
        stores::other(from, &context.settings.stores)?
    } else {
        let known = context.configs().iter().find(|config| config.id.as_str() == from);
        known
            .cloned()
            .ok_or_else(|| CliError::usage(format!("there is neither a zone nor a store {from:?}")))?
    };
    Ok(Box::new(LocalPeer::new(from.clone(), connect(vec![config])?)))
}

/// What CloudStack's row of a member would have to say.
#[derive(Serialize)]
struct Row<'a> {
    /// `snapshot_store_ref.install_path`
    install_path: &'a str,
    /// The install path of its parent, for `parent_snapshot_id`.
    parent_install_path: Option<&'a str>,
    /// `snapshots.size`
    size: u64,
    /// `snapshot_store_ref.physical_size`
    physical_size: u64,
    /// `snapshot_store_ref.kvm_checkpoint_path`; only if the file is there.
    kvm_checkpoint_path: Option<String>,
    store_role: &'static str,
    state: &'static str,
    hypervisor_type: &'static str,
    view_digest: Digest,
}

#[derive(Serialize)]
struct Rows<'a> {
    rows: Vec<Row<'a>>,
}

fn write_records<'a>(file: &Path, stores: &Stores, report: &'a CopyReport) -> Result<()> {
    // Without the store, which a name only begins with if there are several.
    let path_of = |name: &'a str| stores.split_name(name).1;
    let row = |copied: &'a Copied| Row {
        install_path: path_of(&copied.member),
        parent_install_path: copied.parent.as_deref().map(path_of),
        size: copied.virtual_bytes,
        physical_size: copied.file_bytes,
        kvm_checkpoint_path: if copied.checkpoint {
            let member = StorePath::parse(path_of(&copied.member)).ok();
            member.and_then(|member| checkpoint_of(&member)).map(|path| path.to_string())
        } else {
            None
        },
        store_role: "Image",
        state: "Ready",
        hypervisor_type: "KVM",
        view_digest: copied.digest,
    };
    let rows = Rows { rows: report.copied.iter().map(row).collect() };
    let failed = |source| CliError::Read { file: file.display().to_string(), source };
    let mut out = std::fs::File::create_new(file).map_err(failed)?;
    serde_json::to_writer_pretty(&mut out, &Document::of(&rows))
        .map_err(io::Error::from)
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.sync_all())
        .map_err(failed)
}

fn write(out: &mut dyn Write, report: &CopyReport) -> io::Result<()> {
    let head = ["MEMBER", "", "SENT", "PRESENT", "ON THE WIRE", "FILE"];
    let mut table = Table::new(&head, &[false, false, true, true, true, true]);
    for copied in &report.copied {
        let outcome = match copied.outcome {
            Outcome::Present => "is here",
            Outcome::Copied => "copied",
            Outcome::Planned => "would come",
        };
        let blocks = |count: u64| human(count.saturating_mul(crate::units::BLOCK_BYTES));
        table.row(vec![
            copied.member.clone(),
            outcome.to_owned(),
            blocks(copied.blocks_sent),
            blocks(copied.blocks_present),
            human(copied.bytes_on_wire),
            human(copied.file_bytes),
        ]);
    }
    table.write(out)?;
    let seconds = std::time::Duration::from_millis(report.elapsed_milliseconds).as_secs_f64();
    writeln!(out, "{} came from {} in {seconds:.2} s", human(report.bytes_on_wire), report.from)
}
