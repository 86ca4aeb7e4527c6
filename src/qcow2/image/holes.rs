//! Which parts of a file need not be read, as they are holes.

use std::ops::Range;

use crate::qcow2::error::Result;
use crate::qcow2::image::Image;
use crate::units::HostOffset;

/// Knows the last hole that was met in a file. Nothing is asked as long as no more is read than the file takes on its
/// store: one whose tables are all there is read without a question.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct Holes {
    read_bytes: u64,
    known: Range<u64>,
}

impl Holes {
    /// Whether a range is known to be zeros because it is a hole; otherwise it counts as read.
    pub(in crate::qcow2) fn absent(&mut self, image: &Image, host: HostOffset, bytes: u64) -> Result<bool> {
        let range = host.0..host.0.saturating_add(bytes);
        if self.is_known(&range) {
            return Ok(true);
        }
        self.read_bytes = self.read_bytes.saturating_add(bytes);
        if self.read_bytes <= image.allocated_bytes() {
            return Ok(false);
        }
        let data = image.data_from(range.start)?;
        if data > range.start {
            self.known = range.start..data;
        }
        Ok(self.is_known(&range))
    }

    /// Whether a range lies in the last hole that was met.
    pub(in crate::qcow2) fn is_known(&self, range: &Range<u64>) -> bool {
        self.known.start <= range.start && range.end <= self.known.end
    }
}
