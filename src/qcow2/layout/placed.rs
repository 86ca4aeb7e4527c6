//! Whether an image that was written is the one that was planned.

use crate::qcow2::error::Result;
use crate::qcow2::image::Image;
use crate::qcow2::layout::canonical::Canonical;
use crate::qcow2::layout::hostset::HostSet;
use crate::qcow2::map::ExtentKind;
use crate::units::GuestOffset;

/// Holds what an image's tables say against the plan: each unit where it was planned, stored or zeros, and nothing else.
/// What is wrong, in words; `None` if nothing is. Reads tables only.
pub fn misplaced(layout: &Canonical, image: &Image) -> Result<Option<&'static str>> {
    let (unit, size) = (layout.form().unit_bytes(), layout.virtual_size());
    let (mut stored, mut zeros) = (0, 0);
    for extent in image.extents(GuestOffset(0)) {
        let extent = extent?;
        let end = extent.end().0.min(size);
        let mut at = extent.start.0;
        while at < end && extent.kind != ExtentKind::Below {
            let stop = ((at / unit + 1) * unit).min(end);
            let right = match extent.kind {
                ExtentKind::Data { host } => {
                    stored += stop - at;
                    layout.place(at) == Some(host.0 + (at - extent.start.0))
                }
                ExtentKind::Zero => {
                    zeros += stop - at;
                    layout.zeros().contains(at / unit)
                }
                ExtentKind::Compressed(_) => return Ok(Some("it has compressed clusters")),
                ExtentKind::Below => false,
            };
            if !right {
                return Ok(Some("a cluster is not where it was planned"));
            }
            at = stop;
        }
    }
    let bytes = |set: &HostSet| {
        let last = size / unit;
        let cut = if set.contains(last) { unit - size % unit } else { 0 };
        set.len() * unit - cut
    };
    let whole = (stored, zeros) == (bytes(layout.units()), bytes(layout.zeros()));
    Ok((!whole).then_some("it has other clusters than were planned"))
}
