//! The walk over L1 and L2 tables, the active ones and those of snapshots.

use std::collections::btree_map::Entry;

use super::counts::Use;
use super::{Check, Place};
use crate::failure::Code;
use crate::qcow2::compressed::least_stored_bytes;
use crate::qcow2::error::Result;
use crate::qcow2::image::{DEFAULT_WINDOW_BYTES, Window};
use crate::qcow2::tables::{L1_ENTRY_BYTES, L1Entry, L2Entry, word};
use crate::units::{GuestOffset, HostOffset};

/// How many L2 tables of snapshots are remembered: 40 bytes of memory each.
const MAX_SNAPSHOT_TABLES: u64 = 1 << 19;

impl Check<'_> {
    /// Counts an L1 table, its L2 tables and what they refer to. COPIED flags matter in the active one only.
    pub(super) fn l1_table(&mut self, host: HostOffset, entries: u64, active: bool) -> Result<()> {
        let bytes = entries.saturating_mul(L1_ENTRY_BYTES);
        let place = self.refer("an L1 table", host, bytes, Use::Metadata);
        // That of a snapshot which lies on something else was walked for that, or is no table.
        let useless = place == Place::Outside || !active && place == Place::Taken;
        if useless || self.holes.absent(self.image, host, bytes)? || !self.may_read(bytes) {
            return Ok(());
        }
        let usage = if active { Use::ActiveTable } else { Use::SnapshotTable };
        let per_table = self.image.header().entry_format().bytes_per_table();
        let mut window = Window::new(DEFAULT_WINDOW_BYTES);
        for index in 0..entries {
            if self.over() {
                return Ok(());
            }
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
                    match place {
                        Place::Outside => {}
                        _ if !active => self.keep_for_later(table, guest),
                        // A table that was walked for another entry is not walked again: no endless work.
                        Place::Taken => {}
                        Place::Free => self.l2_table(table, guest, 1, true)?,
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

    /// Takes note of one more snapshot that refers to an L2 table, to walk it once for all of them.
    fn keep_for_later(&mut self, table: HostOffset, guest: GuestOffset) {
        let known = self.snapshot_tables.len() as u64;
        match self.snapshot_tables.entry(table) {
            Entry::Occupied(mut kept) => kept.get_mut().0 = kept.get().0.saturating_add(1),
            Entry::Vacant(_) if known >= MAX_SNAPSHOT_TABLES => self.report.incomplete = true,
            Entry::Vacant(place) => {
                place.insert((1, guest));
            }
        }
    }

    /// Walks the L2 tables of snapshots.
    pub(super) fn kept_tables(&mut self) -> Result<()> {
        for (table, (times, guest)) in std::mem::take(&mut self.snapshot_tables) {
            self.l2_table(table, guest, times, false)?;
        }
        Ok(())
    }

    /// Counts what an L2 table refers to, `times` times.
    fn l2_table(&mut self, table: HostOffset, first: GuestOffset, times: u16, active: bool) -> Result<()> {
        let bytes = self.bits.bytes();
        if self.over() || self.holes.absent(self.image, table, bytes)? || !self.may_read(bytes) {
            return Ok(());
        }
        let format = self.image.header().entry_format();
        let usage = if active { Use::ActiveData } else { Use::SnapshotData };
        let mut window = Window::new(DEFAULT_WINDOW_BYTES);
        for index in 0..format.entries_per_table() {
            if self.over() {
                return Ok(());
            }
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
                    self.refer_times("a compressed cluster", host, stored_bytes, times, Use::Compressed);
                    if active {
                        self.streams(host);
                    }
                }
                Ok(entry) => {
                    if let Some((host, copied)) = entry.cluster() {
                        self.refer_times("a cluster", host, bytes, times, usage);
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

    /// More compressed clusters than streams fit into a host cluster are the same stream over and over.
    fn streams(&mut self, host: HostOffset) {
        let header = self.image.header();
        let least = least_stored_bytes(header.compression, self.bits);
        // The first and the last may lie in its neighbours for the most part.
        let most = self.bits.bytes() / least + 2;
        if u64::from(self.counts.count(host.0 >> self.bits.bits())) > most {
            self.found(Code::SharedCluster, host, || {
                format!("more compressed clusters lie at {host} than fit there: some are the same one")
            });
        }
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
