//! A window on a table of an image: the part of it that was read last.

use crate::qcow2::error::Result;
use crate::qcow2::image::Image;
use crate::units::HostOffset;

/// Up to `bytes` bytes of one table, aligned to that size within it.
#[derive(Debug)]
pub(crate) struct Window {
    /// The table and the window's offset in it; `None` before the first read.
    place: Option<(HostOffset, u64)>,
    data: Vec<u8>,
    bytes: u64,
}

impl Window {
    /// A window of `bytes`, a power of two of at least 16 (rounded down to one), on no table yet.
    pub(crate) fn new(bytes: usize) -> Self {
        let bytes = (bytes.max(16) + 1).next_power_of_two() / 2;
        Self { place: None, data: Vec::new(), bytes: bytes as u64 }
    }

    /// The bytes from `offset` of the table at `host` to the end of the window there, at least one; empty
    /// from `table_bytes` on. What lies behind the end of the file is zero.
    pub(crate) fn from(
        &mut self,
        image: &Image,
        host: HostOffset,
        table_bytes: u64,
        offset: u64,
    ) -> Result<&[u8]> {
        let start = offset & !(self.bytes - 1);
        if self.place != Some((host, start)) {
            self.place = None;
            let length = self.bytes.min(table_bytes.saturating_sub(start));
            // All of it is overwritten.
            self.data.resize(usize::try_from(length).unwrap_or_default(), 0);
            image.read_data(host.plus(start), &mut self.data)?;
            self.place = Some((host, start));
        }
        let skip = usize::try_from(offset - start).unwrap_or(usize::MAX);
        Ok(self.data.get(skip..).unwrap_or_default())
    }
}
