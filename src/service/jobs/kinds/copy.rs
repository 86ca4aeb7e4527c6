//! `copy` from another zone of the configuration. A job that is continued goes on with what came.

use super::{Outcome, Work};
use crate::ops::copy::plan::usage;
use crate::ops::copy::{Destination, Renaming, Request, copy};
use crate::ops::recover::begin;
use crate::ops::{Result, Work as OpWork};
use crate::peer::HttpPeer;
use crate::service::jobs::request::CopyRequest;
use crate::service::view::scan;

pub fn run(work: &Work<'_>, request: &CopyRequest) -> Result<Outcome> {
    let Work { config, stores, site, .. } = *work;
    let zone = config.zones.iter().find(|zone| zone.name == request.from);
    let zone = zone.ok_or_else(|| usage(format!("[zones.{}] is not in the configuration", request.from)))?;
    let store = match &request.to {
        None if stores.len() == 1 => 0,
        None => return Err(usage("there are several stores: say to which")),
        Some(id) => {
            let found = stores.named(id);
            found.map(|(store, _)| store).ok_or_else(|| usage(format!("there is no store {id:?}")))?
        }
    };
    let renamings = request.map.iter().map(|text| Renaming::parse(text));
    let wanted = Request {
        members: request.members.clone(),
        flatten: request.flatten,
        dry_run: request.dry_run,
        read: request.read,
        renamings: renamings.collect::<std::result::Result<_, _>>().map_err(usage)?,
        checkpoints: request.checkpoints,
        reuse: zone.reuse,
    };
    let peer = HttpPeer::new(zone)?;
    let _guard = begin(site, config.witness)?;
    let pace = site.pace.within(request.rate_bytes_per_second.unwrap_or(0));
    let by = OpWork { progress: work.meter, cancel: work.cancel, pace: &pace };
    let look = || Ok(scan(config, stores, &[], true)?);
    let report = copy(&peer, &Destination { site, store }, &wanted, &look, &by)?;
    let written_bytes = report.copied.iter().map(|copied| copied.file_bytes).sum();
    Ok(Outcome { written_bytes, ..Outcome::of(&report, None) })
}
