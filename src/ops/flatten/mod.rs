//! `flatten`: a member's view as one image that stands alone.
//!
//! | way | when | what is checked |
//! |---|---|---|
//! | clone | the target's file system shares extents with most of the data | the map of the new file, parsed again; view digests from tables; bytes that had to be copied |
//! | copy | otherwise, and always for the canonical layout | each block against its leaf before it is written; the new file's tables |
//! | compress | asked for | the same |
//!
//! The file is made under a temporary name beside its place (for a place of CloudStack's: in a directory of its own that
//! becomes the place), sealed, proved, and then gets its name: nothing or all of it is there, whenever the process ends.
//! What a crash can leave is a temporary, whose name ends in `.tmp`.

mod clone;
mod compress;
mod copy;
mod place;
mod properties;
mod report;
mod target;

use std::time::Instant;

pub use place::{Place, Purpose};
pub use report::{Claim, FlattenReport, How, pipe_report};
pub use target::{FileTarget, Target};

use crate::chain::graph::NodeId;
use crate::failure::Code;
use crate::ops::{OpError, Result, Work};
use crate::qcow2::layout::canonical::Form;
use crate::qcow2::{CompressionType, Image};
use crate::store::chain::OpenChain;
use crate::store::digest::{raw_digest, view_digest};
use crate::store::scan::{Incoming, Scan};
use crate::store::stream::{Source, Stream};
use crate::store::{StoreError, Stores};
use report::Made;
use target::Output;

/// How the image is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arrangement {
    /// Whatever costs least.
    #[default]
    Cheapest,
    /// The same bytes wherever the view is the same.
    Canonical,
}

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The member.
    pub member: NodeId,
    /// The form of the image.
    pub form: Form,
    /// How its clusters are compressed, and how hard; qcow2 alone.
    pub compress: Option<(CompressionType, i32)>,
    /// How it is laid out.
    pub arrangement: Arrangement,
    /// Read all of it back before it gets its name.
    pub read: bool,
    /// Take members in quarantine.
    pub force: bool,
    /// Leave what was read and written in the page cache.
    pub keep_cache: bool,
}

/// A member's view as a stream: for pipes, ranges, and whoever serves them.
///
/// # Errors
///
/// As [`Source::open`] and [`Stream::new`].
pub fn stream(stores: &Stores, scan: &Scan, request: &Request) -> Result<Stream> {
    let source = open(stores, scan, request)?;
    Ok(Stream::new(source, request.form)?)
}

/// Makes the image at its target. Blocks.
///
/// # Errors
///
/// `target-exists`, `no-space`, `quarantined`, `data-damaged`, `changed-meanwhile`, `proof-failed`, `cancelled`, and
/// what the stores fail with. After any of them the target is what it was.
///
/// # After a crash
///
/// The target is what it was, or the whole new image; a temporary may be left beside it.
pub fn flatten(
    stores: &Stores,
    scan: &Scan,
    request: &Request,
    target: &Target,
    work: &Work<'_>,
) -> Result<FlattenReport> {
    let started = Instant::now();
    let source = open(stores, scan, request)?;
    target.check(stores, scan, &source)?;
    work.cancel.check()?;
    let output = Output::create(stores, target, request.form)?;
    let (source, made) = make(source, request, &output, work)?;
    source.unchanged()?;
    let read =
        if request.read { Some(read_back(&source, request.form, &output, &made, work)?) } else { None };
    if !request.keep_cache {
        // Best effort: memory that somebody else could use.
        let _ = output.file().drop_cache();
        source.drop_caches();
    }
    work.cancel.check()?;
    let file_bytes = output.length()?;
    let shown =
        output.publish(stores, target, &properties(request.form, source.virtual_size(), file_bytes))?;
    Ok(report::report(&source, request, shown, file_bytes, &made, read.as_ref(), started))
}

/// Opens what is to be flattened; a member that somebody writes is busy.
fn open(stores: &Stores, scan: &Scan, request: &Request) -> Result<Source> {
    let ancestors = scan.graph.ancestors(request.member).unwrap_or_default();
    for id in std::iter::once(request.member).chain(ancestors) {
        if scan.member(id).is_some_and(|member| member.incoming == Some(Incoming::Writer)) {
            let member = stores.display(&scan.graph.node(id).key);
            let message = "QEMU has it open for writing".to_owned();
            return Err(OpError::Refused { code: Code::Incoming, member, message });
        }
    }
    Ok(Source::open(stores, scan, request.member, request.force)?)
}

fn properties(form: Form, virtual_bytes: u64, file_bytes: u64) -> properties::Facts {
    properties::Facts { format: form.word(), virtual_bytes, file_bytes }
}

/// Makes the image by the way that fits, sealed.
fn make(source: Source, request: &Request, output: &Output, work: &Work<'_>) -> Result<(Source, Made)> {
    if let Some((kind, level)) = request.compress {
        let Form::Qcow2(bits) = request.form else {
            return Err(
                StoreError::Usage { detail: "a raw image has no compressed clusters".to_owned() }.into()
            );
        };
        let stream = Stream::new(source, Form::Qcow2(bits))?;
        let made = compress::write(&stream, kind, level, output, work)?;
        return Ok((stream.into_source(), made));
    }
    if request.arrangement == Arrangement::Cheapest
        && let Some(made) = clone::try_write(&source, request.form, output, work)?
    {
        return Ok((source, made));
    }
    let stream = Stream::new(source, request.form)?;
    let made = copy::write(&stream, output, work, request.keep_cache)?;
    Ok((stream.into_source(), made))
}

/// Reads the sealed image back from its store; gives how many bytes of view were proved.
fn read_back(
    source: &Source,
    form: Form,
    output: &Output,
    made: &Made,
    work: &Work<'_>,
) -> Result<report::Read> {
    // Best effort: what comes from memory proves less.
    let _ = output.file().drop_cache();
    let is = match form {
        Form::Raw => raw_digest(output.file(), work.progress, work.cancel)?.0,
        Form::Qcow2(_) => {
            let image = Image::open(output.reopen()?, output.shown())?;
            view_digest(&OpenChain::of(vec![image]), work.progress, work.cancel)?
        }
    };
    let was = match source.digest().or(made.digest) {
        Some(digest) => digest,
        None => view_digest(source.chain(), work.progress, work.cancel)?,
    };
    if is != was {
        let message = format!("the new file was thrown away: it reads as {is}, the member as {was}");
        return Err(OpError::Store(StoreError::Proof { member: source.member().to_owned(), message }));
    }
    Ok(report::Read { digest: is, bytes: source.virtual_size() })
}
