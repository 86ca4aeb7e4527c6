//! Space inside an image's file that the image does not use.

use crate::qcow2::check::stored::Stored;
use crate::qcow2::error::Result;
use crate::qcow2::image::Image;
use crate::units::HostOffset;

/// The ranges below `limit` whose clusters have a reference count of 0, as `(from, length)` in bytes, ascending,
/// maximal. Rests on the image's own counts: only for images that were checked. At most one range in two
/// clusters of the file.
pub fn unused_below(image: &Image, limit: u64) -> Result<Vec<(HostOffset, u64)>> {
    let bits = image.header().cluster_bits;
    let end = limit.min(image.file_length()) / bits.bytes();
    let mut stored = Stored::read(image)?;
    let mut ranges: Vec<(HostOffset, u64)> = Vec::new();
    for cluster in 0..end {
        if stored.get(cluster)? != 0 {
            continue;
        }
        let from = cluster * bits.bytes();
        match ranges.last_mut() {
            Some((start, length)) if start.0 + *length == from => *length += bits.bytes(),
            _ => ranges.push((HostOffset(from), bits.bytes())),
        }
    }
    Ok(ranges)
}
