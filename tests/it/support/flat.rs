//! `qchain flatten` as the command line calls it.

use std::path::Path;
use std::sync::Arc;

use qchain::backend::Backend;
use qchain::backend::posix::PosixStore;
use qchain::ids::StorePath;
use qchain::ops::Result;
use qchain::ops::Work;
use qchain::ops::flatten::{Arrangement, FileTarget, FlattenReport, Request, Target, flatten, stream};
use qchain::progress::{Cancel, Pace, Silent};
use qchain::qcow2::CompressionType;
use qchain::qcow2::layout::canonical::Form;
use qchain::store::measure::Job;
use qchain::store::stream::{Piece, Stream, Wanted};
use qchain::store::{StoreError, Stores, names};
use qchain::units::ClusterBits;

use super::qemu::text;
use super::store::{open, scan};

/// What can be wanted of an image.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// The form.
    pub form: Form,
    /// How it is compressed.
    pub compress: Option<(CompressionType, i32)>,
    /// How it is laid out.
    pub arrangement: Arrangement,
    /// Read back.
    pub read: bool,
    /// Whether damage is taken.
    pub force: bool,
}

impl Wish {
    /// qcow2 in clusters of 64 KiB, the cheapest way.
    pub const PLAIN: Self = Self {
        form: Form::Qcow2(ClusterBits::DEFAULT),
        compress: None,
        arrangement: Arrangement::Cheapest,
        read: false,
        force: false,
    };

    /// The same, raw.
    pub const RAW: Self = Self { form: Form::Raw, ..Self::PLAIN };

    /// The same, laid out the canonical way.
    pub const CANONICAL: Self = Self { arrangement: Arrangement::Canonical, ..Self::PLAIN };
}

fn request(stores: &Stores, member: &str, wish: Wish) -> Request {
    let scan = scan(stores);
    Request {
        member: names::resolve_one(stores, &scan, member).unwrap(),
        form: wish.form,
        compress: wish.compress,
        arrangement: wish.arrangement,
        read: wish.read,
        force: wish.force,
        keep_cache: true,
    }
}

/// Flattens a member of the store at `root` into a file.
pub fn flatten_to(root: &Path, member: &str, dest: &Path, wish: Wish) -> Result<FlattenReport> {
    flatten_into(Arc::new(PosixStore::open(dest.parent().unwrap()).unwrap()), root, member, dest, wish)
}

/// The same, with another backend for the file's directory.
pub fn flatten_into(
    backend: Arc<dyn Backend>,
    root: &Path,
    member: &str,
    dest: &Path,
    wish: Wish,
) -> Result<FlattenReport> {
    let stores = open(root);
    let path = StorePath::parse(dest.file_name().unwrap().to_str().unwrap()).unwrap();
    let target = Target::File(FileTarget { backend, path, shown: text(dest).to_owned(), overwrite: false });
    let work = Work { progress: &Silent, cancel: &Cancel::default(), pace: &Pace::default() };
    flatten(&stores, &scan(&stores), &request(&stores, member, wish), &target, &work)
}

/// The stream of a member.
pub fn stream_of(root: &Path, member: &str, form: Form) -> Result<Stream> {
    let stores = open(root);
    stream(&stores, &scan(&stores), &request(&stores, member, Wish { form, ..Wish::PLAIN }))
}

/// Some bytes of a stream.
pub fn read(stream: &Stream, start: u64, end: u64) -> std::result::Result<Vec<u8>, StoreError> {
    let (cancel, pace) = (Cancel::default(), Pace::default());
    let job = Job { progress: &Silent, cancel: &cancel, pace: &pace, tolerant: false };
    let mut bytes = Vec::new();
    stream.read::<StoreError>(start..end, Wanted::Bytes, &job, |at, piece| {
        assert_eq!(at, start + bytes.len() as u64, "pieces follow each other");
        match piece {
            Piece::Bytes(piece) => bytes.extend_from_slice(piece),
            Piece::Zeros(count) => bytes.resize(bytes.len() + usize::try_from(count).unwrap(), 0),
        }
        Ok(())
    })?;
    Ok(bytes)
}
