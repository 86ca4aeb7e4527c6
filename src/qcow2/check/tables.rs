//! The walk over L1 and L2 tables, the active ones and those of snapshots.

use super::counts::Use;
use super::{Check, Place};
use crate::failure::Code;
use crate::qcow2::error::Result;
use crate::qcow2::image::{DEFAULT_WINDOW_BYTES, Window};
use crate::qcow2::tables::{L1_ENTRY_BYTES, L1Entry, L2Entry, word};
use crate::units::{GuestOffset, HostOffset};

impl Check<'_> {
    /// Counts an L1 table, its L2 tables and what they refer to. COPIED flags matter in the active one only.
    pub(super) fn l1_table(&mut self, host: HostOffset, entries: u64, active: bool) -> Result<()> {
        let bytes = entries.saturating_mul(L1_ENTRY_BYTES);
        if !self.may_read(bytes) || self.refer("an L1 table", host, bytes, Use::Metadata) == Place::Outside {
            return Ok(());
        }
        let usage = if active { Use::ActiveTable } else { Use::SnapshotTable };
        let per_table = self.image.header().entry_format().bytes_per_table();
        let mut window = Window::new(DEFAULT_WINDOW_BYTES);
        for index in 0..entries {
            let offset = index * L1_ENTRY_BYTES;
            let raw = word(window.from(self.image, host, bytes, offset)?, 0).unwrap_or_default();
            if raw == 0 {
                continue;
            }
            let guest = GuestOffset(index.saturating_mul(per_table));
            match L1Entry::decode(raw, self.bits) {
                Ok(L1Entry::Table { host: table, copied }) => {
                    let place = self.refer("an L2 table", table, self.bits.bytes(), usage);
                    if active {
                        self.copied_flag(table, copied, guest)?;
                    }
                    // A table that was walked for another entry is not walked again: no endless work.
                    if place != Place::Outside && !(active && place == Place::Taken) {
                        self.l2_table(table, guest, active)?;
                    }
                }
                Ok(L1Entry::Unallocated) => self.found(Code::BadEntry, host.plus(offset), || {
                    format!("{guest}: the L1 entry {raw:#018x} has the COPIED flag but no table")
                }),
                Err(fault) => self.found(Code::BadEntry, host.plus(offset), || {
                    format!("{guest}: the L1 entry {raw:#018x} {fault}")
                }),
            }
        }
        Ok(())
    }

    fn l2_table(&mut self, table: HostOffset, first: GuestOffset, active: bool) -> Result<()> {
        let bytes = self.bits.bytes();
        if !self.may_read(bytes) {
            return Ok(());
        }
        let format = self.image.header().entry_format();
        let usage = if active { Use::ActiveData } else { Use::SnapshotData };
        let mut window = Window::new(DEFAULT_WINDOW_BYTES);
        for index in 0..format.entries_per_table() {
            let offset = index * format.entry_bytes();
            let words = window.from(self.image, table, bytes, offset)?;
            let raw = word(words, 0).unwrap_or_default();
            let bitmap = if format.extended { word(words, 1).unwrap_or_default() } else { 0 };
            if raw == 0 && bitmap == 0 {
                continue;
            }
            let guest = first.plus(index << self.bits.bits());
            match format.decode(raw, bitmap) {
                Ok(L2Entry::Compressed { host, stored_bytes }) => {
                    self.refer("a compressed cluster", host, stored_bytes, Use::Compressed);
                }
                Ok(entry) => {
                    if let Some((host, copied)) = entry.cluster() {
                        self.refer("a cluster", host, bytes, usage);
                        if active {
                            self.copied_flag(host, copied, guest)?;
                        }
                    }
                }
                Err(fault) => self.found(Code::BadEntry, table.plus(offset), || {
                    format!("{guest}: the L2 entry {raw:#018x} (subclusters {bitmap:#018x}) {fault}")
                }),
            }
        }
        Ok(())
    }

    /// The COPIED flag stands for a stored refcount of exactly one.
    fn copied_flag(&mut self, host: HostOffset, copied: bool, guest: GuestOffset) -> Result<()> {
        let stored = self.stored.get(host.0 >> self.bits.bits())?;
        if copied == (stored == 1) {
            return Ok(());
        }
        if self.report.dirty {
            self.report.lagging_clusters += 1;
            return Ok(());
        }
        let state = if copied { "set" } else { "clear" };
        self.found(Code::CopiedFlag, host, || {
            format!("{guest}: the COPIED flag for {host} is {state}, its refcount is {stored}")
        });
        Ok(())
    }
}
