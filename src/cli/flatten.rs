//! `qchain flatten`.

use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::context::Context;
use super::error::{CliError, Exit, Result};
use super::output::{self, human};
use super::values;
use crate::backend::BackendError;
use crate::backend::posix::{PosixStore, StandardOutput};
use crate::change::Guard;
use crate::ids::StorePath;
use crate::ops::Work;
use crate::ops::flatten::{
    Arrangement, FileTarget, FlattenReport, Place, Purpose, Request, Target, flatten, pipe_report, stream,
};
use crate::progress::Pace;
use crate::qcow2::CompressionType;
use crate::qcow2::layout::canonical::Form;
use crate::store::names::resolve_one;
use crate::store::scan::Scan;
use crate::store::stream::{Piece, Stream, Wanted};
use crate::store::{StoreError, Stores};
use crate::units::ClusterBits;

/// The destination that stands for standard output.
const PIPE: &str = "-";
/// How hard is compressed if nothing is said: the least. Of libraries and texts zstd then makes 4 % more than `qemu-img` does
/// (level 2: 1 %), zlib 26 % (level 2: 7 %), in two thirds and two ninths of its time.
const LEVEL: i32 = 1;
/// Zeros for standard output.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

/// Shown behind the flags.
pub const HELP: &str = "\
With - (and with --range) standard output has the image and nothing else: it is written from its first byte to its last, \
uncompressed and in the canonical layout, and the report of --json, a failure too, goes to standard error. \
A reader that gets less than the length announced, or an exit code other than 0, has no image.

--layout canonical gives the same bytes wherever the same view is flattened with the same options, if its members are \
adopted; cheapest, the default for files, shares extents where that can be done and is canonical where it cannot.";

/// Flags of `flatten`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The member
    #[arg(value_name = "MEMBER")]
    member: String,
    /// The file to make, or - for standard output
    #[arg(value_name = "DEST", required_unless_present_any = ["template", "volume", "range"])]
    dest: Option<String>,
    /// Make it a template of that store (or of the member's), with its template.properties
    #[arg(long, value_name = "[STORE:]ACCOUNT/ID/NAME", conflicts_with_all = ["dest", "volume", "range"])]
    template: Option<String>,
    /// Make it a volume of secondary storage, with its volume.properties
    #[arg(long, value_name = "[STORE:]ACCOUNT/ID/NAME", conflicts_with_all = ["dest", "range"])]
    volume: Option<String>,
    /// The format of the image
    #[arg(short = 'O', long = "format", value_enum, default_value = "qcow2")]
    format: Format,
    /// The cluster size of a qcow2 image, 512 bytes to 2 MiB
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = cluster)]
    cluster_size: ClusterBits,
    /// Compress clusters; those that do not get smaller are stored as they are
    #[arg(long, value_enum, default_value = "none")]
    compress: Compress,
    /// How hard: 1 to 22 for zstd, 1 to 9 for zlib [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=22))]
    level: Option<i32>,
    /// How the image is laid out [default: cheapest for files]
    #[arg(long, value_enum)]
    layout: Option<LayoutChoice>,
    /// Write these bytes of the image to standard output: END is the first byte not wanted; without it all of the rest
    #[arg(long, value_name = "START-[END]", value_parser = range)]
    range: Option<(u64, Option<u64>)>,
    /// Read the new file back before it gets its name
    #[arg(long)]
    read: bool,
    /// Replace a file; it keeps its owner, mode and attributes
    #[arg(long, conflicts_with_all = ["template", "volume"])]
    overwrite: bool,
    /// Take members that were found damaged, and hold nothing against what is known; the report says so
    #[arg(long)]
    force: bool,
    /// Whether what was read and written stays in memory [default: drop for files, keep for standard output]
    #[arg(long, value_enum)]
    cache: Option<Cache>,
    /// The most bytes that are moved a second [default: limits.rate]
    #[arg(long, value_name = "RATE", value_parser = values::rate)]
    rate: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Version 3
    Qcow2,
    /// The bytes of the disk; what is zero takes no space in a file
    Raw,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Compress {
    /// Not at all
    None,
    /// By Zstandard, which QEMU reads since version 5.1
    Zstd,
    /// By deflate
    Zlib,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum LayoutChoice {
    /// Whatever costs least
    Cheapest,
    /// The same bytes wherever the view is the same
    Canonical,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Cache {
    /// It stays
    Keep,
    /// It goes
    Drop,
}

fn cluster(text: &str) -> std::result::Result<ClusterBits, String> {
    // As qemu-img writes them, too.
    let text = text.strip_suffix('k').map_or_else(|| text.to_owned(), |number| format!("{number}KiB"));
    let text = text.strip_suffix('M').map_or_else(|| text.clone(), |number| format!("{number}MiB"));
    let size = values::size(&text)?;
    let bits = if size.is_power_of_two() { ClusterBits::new(size.trailing_zeros()) } else { None };
    bits.ok_or_else(|| format!("{text} is no cluster size: a power of two from 512 to 2MiB"))
}

fn range(text: &str) -> std::result::Result<(u64, Option<u64>), String> {
    let parsed = text.split_once('-').and_then(|(start, end)| {
        let end = if end.is_empty() { None } else { Some(end.parse::<u64>().ok()?) };
        Some((start.parse::<u64>().ok()?, end))
    });
    let ordered = parsed.filter(|(start, end)| end.is_none_or(|end| *start <= end));
    ordered.ok_or_else(|| format!("{text:?} is no range like 0-4096"))
}

impl Args {
    /// Whether a store is changed.
    fn changes(&self) -> bool {
        self.template.is_some() || self.volume.is_some()
    }

    /// Whether the image goes to standard output.
    fn is_pipe(&self) -> bool {
        match &self.dest {
            Some(dest) => dest == PIPE,
            None => self.range.is_some(),
        }
    }

    fn form(&self) -> Form {
        match self.format {
            Format::Qcow2 => Form::Qcow2(self.cluster_size),
            Format::Raw => Form::Raw,
        }
    }

    /// How clusters are compressed; a combination that makes no sense is told.
    fn compression(&self) -> Result<Option<(CompressionType, i32)>> {
        let usage = |message: &str| Err(CliError::usage(message.to_owned()));
        if self.range.is_some() && !self.is_pipe() {
            return usage("--range goes to standard output: leave DEST away, or give -");
        }
        let kind = match self.compress {
            Compress::None if self.level.is_some() => return usage("--level needs --compress"),
            Compress::None => return Ok(None),
            Compress::Zstd => CompressionType::Zstd,
            Compress::Zlib => CompressionType::Zlib,
        };
        if self.is_pipe() {
            return usage(
                "standard output gets an image whose length is known before: --compress is for files",
            );
        }
        if self.format == Format::Raw {
            return usage("a raw image has no compressed clusters");
        }
        if self.layout == Some(LayoutChoice::Canonical) {
            return usage("the canonical layout is uncompressed");
        }
        let level = self.level.unwrap_or(LEVEL);
        if kind == CompressionType::Zlib && level > 9 {
            return usage("zlib has the levels 1 to 9");
        }
        Ok(Some((kind, level)))
    }

    fn target(&self, stores: &Stores, scan: &Scan, request: &Request) -> Result<Target> {
        let store = scan.graph.node(request.member).key.store;
        let place = |purpose, text: &str| Ok(Target::Place(Place::parse(stores, purpose, text, store)?));
        match (&self.template, &self.volume, &self.dest) {
            (Some(text), _, _) => place(Purpose::Template, text),
            (_, Some(text), _) => place(Purpose::Volume, text),
            (_, _, Some(dest)) => file_target(dest, self.overwrite),
            _ => Err(CliError::usage("no destination".to_owned())),
        }
    }
}

/// Flattens.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    if !args.is_pipe() {
        return to_file(context, args);
    }
    // Standard output is the image's.
    match to_pipe(context, args) {
        Ok(report) => {
            if context.json() {
                output::json_aside(&report);
            }
            Ok(Exit::DONE)
        }
        Err(error) => Ok(Exit(output::report_error_aside(&error, context.json()))),
    }
}

fn to_file(context: &Context, args: &Args) -> Result<Exit> {
    let compress = args.compression()?;
    if args.changes() {
        context.check_writable()?;
    }
    let stores = context.stores()?;
    let guard = if args.changes() { Some(Guard::take(&stores)?) } else { None };
    let scan = context.scan_cached(&stores)?;
    let request = request(&stores, &scan, args, compress)?;
    let target = args.target(&stores, &scan, &request)?;
    let pace = Pace::new(args.rate.unwrap_or(context.settings.limits.rate.0));
    let work = Work { progress: context.progress(), cancel: &context.cancel, pace: &pace };
    let report = flatten(&stores, &scan, &request, &target, &work)?;
    drop(guard);
    context.print(&report, |out| write_report(out, &report))?;
    Ok(Exit::DONE)
}

fn request(
    stores: &Stores,
    scan: &Scan,
    args: &Args,
    compress: Option<(CompressionType, i32)>,
) -> Result<Request> {
    let member = resolve_one(stores, scan, &args.member)?;
    let arrangement = match args.layout {
        Some(LayoutChoice::Canonical) => Arrangement::Canonical,
        Some(LayoutChoice::Cheapest) | None => Arrangement::Cheapest,
    };
    Ok(Request {
        member,
        form: args.form(),
        compress,
        arrangement,
        read: args.read,
        force: args.force,
        keep_cache: args.cache == Some(Cache::Keep) || (args.cache.is_none() && args.is_pipe()),
    })
}

fn file_target(dest: &str, overwrite: bool) -> Result<Target> {
    let absolute = std::path::absolute(Path::new(dest))
        .map_err(|source| CliError::Read { file: dest.to_owned(), source })?;
    let (Some(directory), Some(name)) =
        (absolute.parent(), absolute.file_name().and_then(|name| name.to_str()))
    else {
        return Err(CliError::usage(format!("{dest:?} names no file")));
    };
    if dest.ends_with('/') {
        return Err(CliError::usage(format!("{dest:?} names a directory")));
    }
    let path = StorePath::parse(name).map_err(|error| CliError::usage(error.to_string()))?;
    let backend = PosixStore::open(directory).map_err(|source| match source {
        BackendError::NotFound { .. } => StoreError::NotFound { name: directory.display().to_string() },
        source => StoreError::Backend { store: directory.display().to_string(), source },
    })?;
    Ok(Target::File(FileTarget { backend: Arc::new(backend), path, shown: dest.to_owned(), overwrite }))
}

fn to_pipe(context: &Context, args: &Args) -> Result<FlattenReport> {
    args.compression()?;
    let started = std::time::Instant::now();
    if args.layout == Some(LayoutChoice::Cheapest) {
        return Err(CliError::usage("standard output gets the canonical layout".to_owned()));
    }
    if args.read || args.overwrite {
        return Err(CliError::usage("standard output can be neither read back nor replaced".to_owned()));
    }
    let stores = context.stores()?;
    let scan = context.scan_cached(&stores)?;
    let request = request(&stores, &scan, args, None)?;
    let image = stream(&stores, &scan, &request)?;
    let wanted = whole_or(args.range, &image)?;
    let pace = Pace::new(args.rate.unwrap_or(context.settings.limits.rate.0));
    let work = Work { progress: context.progress(), cancel: &context.cancel, pace: &pace };
    context.progress().phase("writing", wanted.end - wanted.start);
    let mut out = StandardOutput::take();
    image.read::<CliError>(wanted.clone(), Wanted::Bytes, &work.job(), |_, piece| {
        give(&mut out, piece).map_err(|source| CliError::Write { source })
    })?;
    image.source().unchanged()?;
    if !request.keep_cache {
        image.source().drop_caches();
    }
    Ok(pipe_report(&image, &request, wanted, started))
}

/// The range wanted; one that begins behind the image's end is none.
fn whole_or(range: Option<(u64, Option<u64>)>, image: &Stream) -> Result<Range<u64>> {
    let (start, end) = range.unwrap_or((0, None));
    if start > image.length() {
        return Err(CliError::usage(format!("the image has {} bytes", image.length())));
    }
    Ok(start..end.unwrap_or(u64::MAX).min(image.length()))
}

fn give(out: &mut impl Write, piece: Piece<'_>) -> io::Result<()> {
    match piece {
        Piece::Bytes(bytes) => out.write_all(bytes),
        Piece::Zeros(count) => {
            let mut left = count;
            while left > 0 {
                let step = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.len());
                out.write_all(ZEROS.get(..step).unwrap_or_default())?;
                left -= step as u64;
            }
            Ok(())
        }
    }
}

fn write_report(out: &mut dyn Write, report: &FlattenReport) -> io::Result<()> {
    let how = match report.how {
        crate::ops::flatten::How::Clone => "shared extents",
        crate::ops::flatten::How::Compress => "compressed",
        crate::ops::flatten::How::Copy | crate::ops::flatten::How::Stream => "copied",
    };
    writeln!(
        out,
        "{}: {} of {}, a file of {} ({how}: wrote {}, shared {}) in {:.2} s",
        report.output,
        report.format,
        human(report.virtual_bytes),
        human(report.file_bytes),
        human(report.bytes_written + report.metadata_bytes_written),
        human(report.bytes_cloned),
        std::time::Duration::from_millis(report.elapsed_milliseconds).as_secs_f64()
    )?;
    if let Some(digest) = &report.digest {
        writeln!(out, "view digest {digest}")?;
    }
    for claim in &report.claims {
        writeln!(out, "proved {}: {}", claim.name, human(claim.bytes))?;
    }
    match &report.note {
        Some(note) => writeln!(out, "note: {note}"),
        None => Ok(()),
    }
}
