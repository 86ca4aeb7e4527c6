//! What a flatten did.

use std::ops::Range;
use std::time::Instant;

use serde::Serialize;

use crate::ids::Digest;
use crate::ops::flatten::Request;
use crate::qcow2::layout::canonical::VERSION;
use crate::store::stream::{Source, Stream};

/// By which way an image was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// Extents were shared.
    Clone,
    /// Bytes were copied, in the canonical layout.
    Copy,
    /// Clusters were compressed.
    Compress,
    /// It was given away as a stream, in the canonical layout.
    Stream,
}

/// What was proved of a new image, for how many bytes of its view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Claim {
    /// `plan`, `digest` or `data`.
    #[serde(rename = "claim")]
    pub name: &'static str,
    /// Bytes of view.
    pub bytes: u64,
    /// Of these, how many were read on both sides and compared.
    pub compared_bytes: u64,
    /// The digest that was proved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// What `--json` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct FlattenReport {
    /// The member.
    pub member: String,
    /// Where the image is.
    pub output: String,
    /// `qcow2` or `raw`.
    pub format: &'static str,
    /// The size of the view.
    pub virtual_bytes: u64,
    /// The length of the file; of a stream that of the whole image.
    pub file_bytes: u64,
    /// Which bytes of a stream were written: the first, and the one behind the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<[u64; 2]>,
    /// What two streams have in common only if all their bytes are the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validator: Option<String>,
    /// The view digest, if it is known: of adopted members, and where all was read.
    pub digest: Option<String>,
    /// How it was made.
    pub how: How,
    /// The version of the canonical layout, if the file has that.
    pub layout: Option<u32>,
    /// Bytes of data that were written.
    pub bytes_written: u64,
    /// Bytes of header and tables that were written.
    pub metadata_bytes_written: u64,
    /// Bytes that are shared with the members.
    pub bytes_cloned: u64,
    /// A member in quarantine was taken: the view may be damaged.
    pub forced: bool,
    /// Why there is less to be said than there might be.
    pub note: Option<String>,
    /// What was proved.
    pub claims: Vec<Claim>,
    /// How long it took.
    pub elapsed_milliseconds: u64,
}

/// An image as one of the ways made it.
#[derive(Debug, Default)]
pub struct Made {
    pub how: Option<How>,
    /// Of the view, as it was read.
    pub digest: Option<Digest>,
    pub data_bytes: u64,
    pub metadata_bytes: u64,
    pub cloned_bytes: u64,
    /// Bytes of view for which the plan was proved, and of them those that were compared.
    pub planned_bytes: u64,
    pub compared_bytes: u64,
    /// Bytes read back from the store that hash to their leaves.
    pub checked_bytes: u64,
}

/// What reading all of it back found.
pub struct Read {
    pub digest: Digest,
    pub bytes: u64,
}

pub fn report(
    source: &Source,
    request: &Request,
    output: String,
    file_bytes: u64,
    made: &Made,
    read: Option<&Read>,
    started: Instant,
) -> FlattenReport {
    let known = source.digest();
    let claim = |name, bytes, compared_bytes| Claim { name, bytes, compared_bytes, digest: None };
    let mut claims = Vec::new();
    if made.planned_bytes > 0 {
        claims.push(claim("plan", made.planned_bytes, made.compared_bytes));
    }
    if let Some(digest) = known.filter(|_| made.planned_bytes > 0 || made.digest.is_some()) {
        claims.push(Claim { digest: Some(digest.to_string()), ..claim("digest", source.virtual_size(), 0) });
    }
    let data_bytes = read.map_or(made.checked_bytes, |read| read.bytes);
    if data_bytes > 0 {
        claims.push(claim("data", data_bytes, data_bytes));
    }
    let how = made.how.unwrap_or(How::Copy);
    let digest = known.or(made.digest).or(read.map(|read| read.digest));
    FlattenReport {
        member: source.member().to_owned(),
        output,
        format: request.form.word(),
        virtual_bytes: source.virtual_size(),
        file_bytes,
        range: None,
        validator: None,
        digest: digest.map(|digest| digest.to_string()),
        how,
        layout: matches!(how, How::Copy | How::Stream).then_some(VERSION),
        bytes_written: made.data_bytes,
        metadata_bytes_written: made.metadata_bytes,
        bytes_cloned: made.cloned_bytes,
        forced: source.is_forced(),
        note: source.missing().map(|why| format!("its bytes were not held against anything: {why}")),
        claims,
        elapsed_milliseconds: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}

/// Of a stream that was written to standard output.
#[must_use]
pub fn pipe_report(stream: &Stream, request: &Request, range: Range<u64>, started: Instant) -> FlattenReport {
    let metadata_bytes = stream.layout().metadata_bytes();
    let made = Made {
        how: Some(How::Stream),
        data_bytes: range.end.max(metadata_bytes) - range.start.max(metadata_bytes),
        metadata_bytes: range.end.min(metadata_bytes) - range.start.min(metadata_bytes),
        ..Made::default()
    };
    let report = report(stream.source(), request, "-".to_owned(), stream.length(), &made, None, started);
    let validator = stream.validator().map(|validator| validator.to_string());
    FlattenReport { range: Some([range.start, range.end]), validator, ..report }
}
