//! Refcounts, overlaps, metadata and data past the end: findings, not errors.
//!
//! The walk counts every reference to every host cluster (header, tables, refcount blocks, data, compressed
//! data, internal snapshots, bitmaps) and compares with what is stored. The verdict is never stricter than
//! that of `qemu-img check` on images that QEMU wrote: leaks are not damage, nor are counts that an image
//! with the dirty bit has not written yet. It sees two things more: two guest clusters on one host cluster,
//! and data where metadata lies, even if the stored counts allow for both.

mod counts;
mod snapshots;
pub(super) mod stored;
mod tables;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::Range;

use crate::failure::{Code, Severity};
use crate::qcow2::error::Result;
use crate::qcow2::format::MAX_HOST_OFFSET;
use crate::qcow2::image::{Holes, Image};
use crate::units::{ClusterBits, GuestOffset, HostOffset};
use counts::{Counts, Use};
use stored::Stored;

/// How far a check goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How many findings a report lists; the rest are only counted.
    pub findings: usize,
    /// How many errors there are before the check ends, `incomplete`.
    pub errors: u64,
    /// How much memory the counters may take: a byte a host cluster that is referred to, in pieces of 512
    /// clusters. What does not fit is not compared, and the report is `incomplete`. Of a file that takes little of
    /// its store they take no more than 16 MiB, or half of what the file takes.
    pub counter_bytes: u64,
    /// How many bytes of L1, L2 and bitmap tables are read; then the report is `incomplete`. Holes are not read.
    pub table_bytes: u64,
}

/// The memory that counters may take of any file, in bytes: 1 TiB of clusters of 64 KiB.
const LEAST_COUNTER_BYTES: u64 = 16 << 20;

/// How many clusters may be referred to in any file. Each reference is 8 bytes of some table, so a file that takes
/// more of its store may have more; one that refers to more than that refers to the same over and over.
const LEAST_REFERENCES: u64 = 4 << 20;

impl Default for Limits {
    /// 100 findings, 10,000 errors, 256 MiB of counters (16 TiB of densely used file at 64 KiB clusters), 16 GiB of
    /// tables.
    fn default() -> Self {
        Self { findings: 100, errors: 10_000, counter_bytes: 256 << 20, table_bytes: 16 << 30 }
    }
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The first findings, errors in the order of the walk.
    pub findings: Vec<Finding>,
    /// How many more there were than are listed.
    pub findings_omitted: u64,
    /// How many findings are errors: anything above 0 is damage.
    pub errors: u64,
    /// Clusters of the file that are counted as used but not referred to.
    pub leaked_clusters: u64,
    /// Clusters that are used more often than counted, and COPIED flags that disagree, in an image with the
    /// dirty bit: expected there, no errors.
    pub lagging_clusters: u64,
    /// Host clusters that are referred to at all.
    pub used_clusters: u64,
    /// The dirty bit is set.
    pub dirty: bool,
    /// A limit ended the check early; what was found is true, what was not found may be there.
    pub incomplete: bool,
}

impl Report {
    /// Whether anything was found that makes the image damaged.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.errors > 0
    }
}

/// One thing that a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is: `overlap`, `shared-cluster`, `refcount-too-low`, `leaked-cluster`, `copied-flag`,
    /// `truncated`, `bad-entry`, `bad-header`, `huge-table` or `dirty`.
    pub code: Code,
    /// The host offset it is about.
    pub host: HostOffset,
    /// The whole sentence.
    pub message: String,
}

/// Checks an image's structure. Reads metadata only, no data.
///
/// Memory: `limits.counter_bytes`, the refcount table (at most 8 MiB), and windows of the other tables.
/// Errors are the store's; whatever is wrong with the image is a finding.
pub fn check(image: &Image, limits: &Limits) -> Result<Report> {
    check_with(image, limits, &mut |_| {})
}

/// As [`check`], and tells of every range of the file that holds metadata, in no order; a table that is referred to
/// twice is told of twice.
pub fn check_with(image: &Image, limits: &Limits, metadata: &mut dyn FnMut(Range<u64>)) -> Result<Report> {
    let header = image.header();
    let taken = image.allocated_bytes();
    let mut check = Check {
        image,
        limits,
        bits: header.cluster_bits,
        counts: Counts::new(limits.counter_bytes.min((taken / 2).max(LEAST_COUNTER_BYTES))),
        stored: Stored::read(image)?,
        holes: Holes::default(),
        snapshot_tables: BTreeMap::new(),
        table_bytes: limits.table_bytes,
        references: (taken / 4).saturating_add(LEAST_REFERENCES),
        metadata,
        blocks_apart: true,
        report: Report { dirty: header.dirty, ..Report::default() },
    };
    if header.dirty {
        check.found(Code::Dirty, HostOffset(0), || "the image was not closed cleanly".to_owned());
    }
    check.refer("the header", HostOffset(0), check.bits.bytes(), Use::Metadata);
    let table_bytes = header.refcount_table_bytes();
    check.refer("the refcount table", header.refcount_table_offset, table_bytes, Use::Metadata);
    check.refcount_blocks();
    check.l1_table(header.l1_offset, header.l1_entries, true)?;
    check.snapshots()?;
    check.bitmaps()?;
    let counts = std::mem::replace(&mut check.counts, Counts::new(0));
    check.report.incomplete |= counts.overflowed();
    check.report.used_clusters = counts.all().count() as u64;
    check.compare(&counts)?;
    Ok(check.report)
}

struct Check<'a> {
    image: &'a Image,
    limits: &'a Limits,
    bits: ClusterBits,
    counts: Counts,
    stored: Stored<'a>,
    holes: Holes,
    /// The L2 tables of snapshots that are still to be walked: how many refer to each, and for which guest offset.
    snapshot_tables: BTreeMap<HostOffset, (u16, GuestOffset)>,
    /// What may still be read of tables, in bytes.
    table_bytes: u64,
    /// How many clusters may still be referred to.
    references: u64,
    /// Told of where metadata lies.
    metadata: &'a mut dyn FnMut(Range<u64>),
    /// No refcount block lies on something else.
    blocks_apart: bool,
    report: Report,
}

/// Where something lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// On clusters that nothing else uses that may not.
    Free,
    /// On something else.
    Taken,
    /// Behind the file's end.
    Outside,
}

impl Check<'_> {
    fn found(&mut self, code: Code, host: HostOffset, message: impl FnOnce() -> String) {
        if code.severity() == Severity::Error {
            self.report.errors = self.report.errors.saturating_add(1);
        }
        if self.report.findings.len() < self.limits.findings {
            self.report.findings.push(Finding { code, host, message: message() });
        } else {
            self.report.findings_omitted = self.report.findings_omitted.saturating_add(1);
        }
    }

    /// Whether to go no further: there are errors enough, or more references than any file of its size needs.
    fn over(&mut self) -> bool {
        let over = self.report.errors >= self.limits.errors || self.references == 0;
        self.report.incomplete |= over;
        over
    }

    /// Takes `bytes` of what may still be read; `false`, and the report incomplete, if it is used up.
    fn may_read(&mut self, bytes: u64) -> bool {
        let rest = self.table_bytes.checked_sub(bytes);
        self.table_bytes = rest.unwrap_or(self.table_bytes);
        self.report.incomplete |= rest.is_none();
        rest.is_some()
    }

    /// Counts one reference to each cluster of `[host, host + bytes)`.
    fn refer(&mut self, what: &str, host: HostOffset, bytes: u64, usage: Use) -> Place {
        self.refer_times(what, host, bytes, 1, usage)
    }

    /// Counts `times` references to each cluster of `[host, host + bytes)`.
    ///
    /// A range that ends a cluster or more behind the file's end is reported and not counted (QEMU's rule:
    /// the last cluster of a file may be cut).
    fn refer_times(&mut self, what: &str, host: HostOffset, bytes: u64, times: u16, usage: Use) -> Place {
        if bytes == 0 {
            return Place::Free;
        }
        let end = host.0.saturating_add(bytes);
        if end.saturating_sub(self.image.file_length()) >= self.bits.bytes() || end > MAX_HOST_OFFSET {
            self.found(Code::Truncated, host, || {
                format!("{what} at {host}, {bytes} bytes, lies behind the file's end")
            });
            return Place::Outside;
        }
        if matches!(usage, Use::Metadata | Use::ActiveTable | Use::SnapshotTable) {
            (self.metadata)(host.0..end);
        }
        let first = host.0 >> self.bits.bits();
        let last = (end - 1) >> self.bits.bits();
        let mut place = Place::Free;
        for cluster in first..=last {
            if self.over() {
                return Place::Taken;
            }
            self.references = self.references.saturating_sub(1);
            if let Some(code) = self.counts.add(cluster, times, usage) {
                place = Place::Taken;
                let at = HostOffset(cluster << self.bits.bits());
                self.found(code, at, || format!("{what} at {host} lies where something else does"));
            }
        }
        place
    }

    fn refcount_blocks(&mut self) {
        let table = self.image.header().refcount_table_offset;
        for index in 0..self.stored.blocks() {
            if self.over() {
                return;
            }
            match self.stored.block(index) {
                Ok(None) => {}
                Ok(Some(host)) => {
                    let place = self.refer("a refcount block", host, self.bits.bytes(), Use::Metadata);
                    self.blocks_apart &= place == Place::Free;
                }
                Err(raw) => self.found(Code::BadEntry, table, || {
                    format!("entry {index} of the refcount table, {raw:#x}, is misaligned or has reserved bits set")
                }),
            }
        }
    }

    /// Compares what was counted with what is stored, in both directions.
    fn compare(&mut self, counts: &Counts) -> Result<()> {
        for (cluster, count) in counts.all() {
            if self.over() {
                return Ok(());
            }
            let stored = self.stored.get(cluster)?;
            if stored < u64::from(count) {
                self.too_low(cluster, stored, count);
            }
        }
        // What was not counted for want of room is no leak; blocks on top of each other say nothing.
        if self.report.incomplete || !self.blocks_apart {
            return Ok(());
        }
        let end = self.bits.clusters_in(self.image.file_length());
        let mut run = 0..0;
        let mut at = 0;
        while let Some(stretch) = self.stored.next_counted(at, end)? {
            at = stretch.end;
            for cluster in stretch {
                let count = counts.count(cluster);
                if count == u16::MAX || self.stored.get(cluster)? <= u64::from(count) {
                    continue;
                }
                self.report.leaked_clusters += 1;
                if run.end != cluster {
                    self.leak(&run);
                    run.start = cluster;
                }
                run.end = cluster + 1;
            }
        }
        self.leak(&run);
        Ok(())
    }

    fn too_low(&mut self, cluster: u64, stored: u64, count: u16) {
        if self.report.dirty {
            self.report.lagging_clusters += 1;
            return;
        }
        let host = HostOffset(cluster << self.bits.bits());
        self.found(Code::RefcountTooLow, host, || {
            format!("the cluster at {host} has refcount {stored} and {count} references")
        });
    }

    fn leak(&mut self, run: &Range<u64>) {
        if !run.is_empty() {
            let host = HostOffset(run.start << self.bits.bits());
            let clusters = run.end - run.start;
            self.found(Code::LeakedCluster, host, || {
                format!("{clusters} clusters from {host} on have refcounts above their references")
            });
        }
    }
}
