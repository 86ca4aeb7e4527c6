//! `flatten` to a template, a volume, the directory of exports, or CloudStack's own temporary.

use std::sync::Arc;

use super::{Outcome, Work};
use crate::backend::BackendError;
use crate::backend::posix::PosixStore;
use crate::change::Guard;
use crate::cloudstack::paths::TEMPORARY_SUFFIX;
use crate::failure::{Code, Failure};
use crate::ids::StorePath;
use crate::ops::flatten::{Arrangement, FileTarget, Place, Purpose, Request, Target, flatten};
use crate::ops::{OpError, Result, Work as OpWork};
use crate::qcow2::CompressionType;
use crate::qcow2::layout::canonical::Form;
use crate::service::jobs::request::{Compress, Destination, FlattenRequest, Format};
use crate::service::view::scan;
use crate::store::caches::Caches;
use crate::store::names::resolve_one;
use crate::store::scan::Scan;
use crate::store::{StoreError, Stores};
use crate::units::ClusterBits;

/// What CloudStack puts behind the name of a member that it flattened.
pub const FLATTENED_SUFFIX: &str = TEMPORARY_SUFFIX;
/// How hard is compressed: what the command line takes by itself.
const LEVEL: i32 = 2;

fn usage(detail: impl Into<String>) -> OpError {
    StoreError::Usage { detail: detail.into() }.into()
}

pub fn run(work: &Work<'_>, request: &FlattenRequest) -> Result<Outcome> {
    let Work { config, stores, .. } = *work;
    let on_store = !matches!(request.to, Destination::Export(_));
    let _guard = if on_store { Some(Guard::take(stores)?) } else { None };
    let caches = Caches::load(stores, config.cache.as_deref());
    let scan = scan(config, stores, &caches.loaded, false)?;
    caches.save();
    let member = resolve_one(stores, &scan, &request.member.text(stores)?)?;
    let wanted = Request {
        member,
        form: form(request)?,
        compress: compression(request)?,
        arrangement: if request.canonical { Arrangement::Canonical } else { Arrangement::Cheapest },
        read: request.read,
        force: request.force,
        keep_cache: false,
    };
    let target = target(work, request, stores, &scan, &wanted)?;
    let by = OpWork { progress: work.meter, cancel: work.cancel, pace: &work.site.pace };
    match flatten(stores, &scan, &wanted, &target, &by) {
        Ok(report) => Ok(Outcome {
            written_bytes: report.bytes_written + report.metadata_bytes_written,
            cloned_bytes: report.bytes_cloned,
            ..Outcome::of(&report, None)
        }),
        Err(error) if error.code() == Code::TargetExists && work.again => {
            // An image appears whole or not at all, and nothing was there when the first attempt looked.
            let shown = shown(&target, wanted.form)?;
            let document = serde_json::json!({
                "schema": crate::ops::document::SCHEMA,
                "member": stores.display(&scan.graph.node(member).key),
                "output": shown,
                "format": wanted.form.word(),
                "note": "it was there when the job was continued: the attempt before made it, and did not come to tell",
            });
            Ok(Outcome { document, ..Outcome::of(&(), None) })
        }
        Err(error) => Err(error),
    }
}

fn shown(target: &Target, form: Form) -> Result<String> {
    Ok(match target {
        Target::File(file) => file.shown.clone(),
        Target::Place(place) => format!("{}/{}", place.directory()?, place.file_name(form)),
    })
}

fn form(request: &FlattenRequest) -> Result<Form> {
    let bytes = request.cluster_bytes.unwrap_or(64 << 10);
    let bits = if bytes.is_power_of_two() { ClusterBits::new(bytes.trailing_zeros()) } else { None };
    let bits = bits.ok_or_else(|| usage(format!("{bytes} is no cluster size")))?;
    Ok(match request.format {
        Format::Qcow2 => Form::Qcow2(bits),
        Format::Raw => Form::Raw,
    })
}

fn compression(request: &FlattenRequest) -> Result<Option<(CompressionType, i32)>> {
    let kind = match request.compress {
        Compress::None => return Ok(None),
        Compress::Zstd => CompressionType::Zstd,
        Compress::Zlib => CompressionType::Zlib,
    };
    if request.format == Format::Raw || request.canonical {
        return Err(usage("a raw image and the canonical layout have no compressed clusters"));
    }
    Ok(Some((kind, LEVEL)))
}

fn target(
    work: &Work<'_>,
    request: &FlattenRequest,
    stores: &Stores,
    scan: &Scan,
    wanted: &Request,
) -> Result<Target> {
    let key = &scan.graph.node(wanted.member).key;
    let place = |purpose, text: &str| Ok(Target::Place(Place::parse(stores, purpose, text, key.store)?));
    match &request.to {
        Destination::Template(text) => place(Purpose::Template, text),
        Destination::Volume(text) => place(Purpose::Volume, text),
        Destination::Temporary => {
            let store = stores.get(key.store)?;
            store.writable_record()?;
            let name = format!("{}{FLATTENED_SUFFIX}", key.path.file_name());
            let path = key.path.parent().join(&name).map_err(|error| usage(error.to_string()))?;
            let shown = path.to_string();
            Ok(Target::File(FileTarget { backend: store.backend().clone(), path, shown, overwrite: true }))
        }
        Destination::Export(name) => {
            let directory = work.config.exports.as_deref().ok_or_else(|| OpError::Refused {
                code: Code::Unsupported,
                member: String::new(),
                message: "the service has no directory for images: [server] exports".to_owned(),
            })?;
            let path = StorePath::root().join(name).map_err(|error| usage(error.to_string()))?;
            if name.starts_with('.') {
                return Err(usage(format!("{name:?} begins with a dot")));
            }
            let backend = PosixStore::open(directory).map_err(|source| match source {
                BackendError::NotFound { .. } => {
                    StoreError::NotFound { name: directory.display().to_string() }
                }
                source => StoreError::Backend { store: directory.display().to_string(), source },
            })?;
            let shown = directory.join(name).display().to_string();
            Ok(Target::File(FileTarget { backend: Arc::new(backend), path, shown, overwrite: false }))
        }
    }
}
