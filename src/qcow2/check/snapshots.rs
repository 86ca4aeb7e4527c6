//! What internal snapshots and persistent bitmaps refer to.

use super::counts::Use;
use super::{Check, Place};
use crate::failure::Code;
use crate::qcow2::error::Result;
use crate::qcow2::format::{
    BITMAP_ENTRY_OFFSET_MASK, BITMAP_ENTRY_RESERVED_MASK, MAX_BITMAP_TABLE_ENTRIES, MAX_HOST_OFFSET,
    MAX_L1_BYTES, MAX_SNAPSHOT_EXTRA_BYTES, MAX_SNAPSHOT_TABLE_BYTES,
};
use crate::qcow2::image::{DEFAULT_WINDOW_BYTES, Window};
use crate::qcow2::tables::{L1_ENTRY_BYTES, word};
use crate::units::HostOffset;

/// Bytes of a snapshot table's entry before its extra data, id and name.
const SNAPSHOT_BYTES: usize = 40;

/// Bytes of a bitmap directory's entry before its extra data and name.
const BITMAP_BYTES: usize = 24;

/// Bytes of an entry of a bitmap's table.
const BITMAP_ENTRY_BYTES: u64 = 8;

impl Check<'_> {
    /// Counts the snapshot table and the L1 table of each snapshot.
    pub(super) fn snapshots(&mut self) -> Result<()> {
        let start = self.image.header().snapshots_offset;
        let mut length: u64 = 0;
        for index in 0..self.image.header().snapshot_count {
            // Entries begin at multiples of 8.
            if self.over() {
                return Ok(());
            }
            let at = length.next_multiple_of(8);
            let mut entry = [0; SNAPSHOT_BYTES];
            self.image.read_data(start.plus(at), &mut entry)?;
            let l1_offset = word(&entry, 0).unwrap_or_default();
            // l1_size (4), id_size (2), name_size (2); vm_state_size (4), extra_size (4).
            let sizes = word(&entry, 1).unwrap_or_default();
            let extra = word(&entry, 4).unwrap_or_default() & 0xffff_ffff;
            let (l1_entries, id, name) = (sizes >> 32, sizes >> 16 & 0xffff, sizes & 0xffff);
            length = at + SNAPSHOT_BYTES as u64 + extra + id + name;
            if extra > MAX_SNAPSHOT_EXTRA_BYTES || length > MAX_SNAPSHOT_TABLE_BYTES {
                self.found(Code::HugeTable, start.plus(at), || {
                    format!("snapshot {index} makes its table longer than QEMU allows")
                });
                return self.kept_tables();
            }
            if self.bits.within(l1_offset) != 0 || l1_offset >= MAX_HOST_OFFSET {
                self.found(Code::BadEntry, start.plus(at), || {
                    format!("the L1 table of snapshot {index} lies at {l1_offset:#x}, between clusters")
                });
            } else if l1_entries > MAX_L1_BYTES / L1_ENTRY_BYTES {
                self.found(Code::HugeTable, start.plus(at), || {
                    format!("the L1 table of snapshot {index} has {l1_entries} entries")
                });
            } else {
                self.l1_table(HostOffset(l1_offset), l1_entries, false)?;
            }
        }
        self.refer("the snapshot table", start, length, Use::Metadata);
        self.kept_tables()
    }

    /// Counts the bitmap directory, each bitmap's table, and its data.
    pub(super) fn bitmaps(&mut self) -> Result<()> {
        let Some(bitmaps) = self.image.header().bitmaps else { return Ok(()) };
        let (start, end) = (bitmaps.directory_offset, bitmaps.directory_bytes);
        if self.refer("the bitmap directory", start, end, Use::Metadata) == Place::Outside {
            return Ok(());
        }
        let mut at: u64 = 0;
        for index in 0..bitmaps.count {
            if self.over() {
                return Ok(());
            }
            let mut entry = [0; BITMAP_BYTES];
            self.image.read_data(start.plus(at), &mut entry)?;
            let table = word(&entry, 0).unwrap_or_default();
            // table_size (4), flags (4); type (1), granularity (1), name_size (2), extra_size (4).
            let entries = word(&entry, 1).unwrap_or_default() >> 32;
            let sizes = word(&entry, 2).unwrap_or_default();
            let (name, extra) = (sizes >> 32 & 0xffff, sizes & 0xffff_ffff);
            let next = (at + BITMAP_BYTES as u64 + name + extra).next_multiple_of(8);
            if next > end || self.bits.within(table) != 0 || entries > MAX_BITMAP_TABLE_ENTRIES {
                self.found(Code::BadEntry, start.plus(at), || {
                    format!("entry {index} of the bitmap directory breaks the format")
                });
                return Ok(());
            }
            self.bitmap_table(HostOffset(table), entries)?;
            at = next;
        }
        Ok(())
    }

    fn bitmap_table(&mut self, host: HostOffset, entries: u64) -> Result<()> {
        let bytes = entries * BITMAP_ENTRY_BYTES;
        let place = self.refer("a bitmap's table", host, bytes, Use::Metadata);
        if place != Place::Free || self.holes.absent(self.image, host, bytes)? || !self.may_read(bytes) {
            return Ok(());
        }
        let mut window = Window::new(DEFAULT_WINDOW_BYTES);
        for index in 0..entries {
            if self.over() {
                return Ok(());
            }
            let offset = index * BITMAP_ENTRY_BYTES;
            let raw = word(window.from(self.image, host, bytes, offset)?, 0).unwrap_or_default();
            let data = HostOffset(raw & BITMAP_ENTRY_OFFSET_MASK);
            if raw & BITMAP_ENTRY_RESERVED_MASK != 0 || self.bits.within(data.0) != 0 {
                self.found(Code::BadEntry, host.plus(offset), || {
                    format!("the bitmap entry {raw:#018x} is misaligned or has reserved bits set")
                });
            } else if data.0 != 0 {
                self.refer("a bitmap's data", data, self.bits.bytes(), Use::Metadata);
            }
        }
        Ok(())
    }
}
