//! An image of compressed clusters, placed while they are made: their sizes are not known before.
//!
//! One behind the other: header, L1 table, L2 tables, clusters in the order of the guest, refcount blocks, refcount
//! table. Compressed clusters follow each other byte by byte, as QEMU packs them, and may lie in two neighbouring
//! host clusters; one that is stored plain has a host cluster of its own. The same clusters, compressed to the same
//! bytes, give the same file.
//!
//! Memory: one L2 table, 8 bytes a table, 2 bytes a host cluster: 32 MiB a TiB stored in clusters of 64 KiB.

use crate::failure::Code;
use crate::qcow2::error::Result;
use crate::qcow2::format;
use crate::qcow2::layout::geometry::{Geometry, too_large};
use crate::qcow2::layout::{ImageOptions, bad, header};
use crate::qcow2::refcount::RefcountWidth;
use crate::qcow2::tables::{EntryFormat, L2Entry};
use crate::units::HostOffset;

/// Bytes of a table, and where they go.
pub type Table = (u64, Vec<u8>);

/// How a cluster is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// Compressed to so many bytes, fewer than a cluster has.
    Compressed(u64),
    /// As it is.
    Plain,
}

/// The image so far.
#[derive(Debug)]
pub struct Packed {
    options: ImageOptions,
    format: EntryFormat,
    l1_at: u64,
    l2_at: u64,
    tables_reserved: u64,
    /// Where each L2 table lies that has an entry, by its place in the L1 table.
    l1: Vec<(u64, u64)>,
    table: Option<(u64, Vec<u8>)>,
    /// The first free host cluster, in bytes.
    end: u64,
    /// The host cluster that compressed ones are put into: the first free byte, and its end.
    open: (u64, u64),
    data_at: u64,
    /// References to each host cluster from `data_at` on.
    counts: Vec<u16>,
}

impl Packed {
    /// An image without clusters, of those options, which will have at most `tables` L2 tables.
    #[must_use]
    pub fn new(options: ImageOptions, tables: u64) -> Self {
        let size = options.cluster_bits.bytes();
        let format = options.entry_format(3);
        let l1_entries = options.virtual_size.div_ceil(format.bytes_per_table());
        let l2_at = size + options.cluster_bits.round_up(l1_entries * 8);
        let data_at = l2_at + tables * size;
        let (l1, counts) = (Vec::new(), Vec::new());
        let (l1_at, end, open) = (size, data_at, (data_at, data_at));
        Self {
            options,
            format,
            l1_at,
            l2_at,
            tables_reserved: tables,
            l1,
            table: None,
            end,
            open,
            data_at,
            counts,
        }
    }

    /// Places the guest's cluster `number`; they come in ascending order. Gives where its bytes go, and a table that is
    /// complete now.
    pub fn put(&mut self, number: u64, stored: Stored) -> Result<(u64, Option<Table>)> {
        let (host, entry) = match stored {
            Stored::Compressed(length) => {
                let host = self.place(length);
                (host, L2Entry::Compressed { host: HostOffset(host), stored_bytes: length })
            }
            Stored::Plain => {
                let host = self.take(1);
                self.refer(host, 1);
                (host, L2Entry::Data { host: HostOffset(host), copied: true })
            }
        };
        let per_table = self.format.entries_per_table();
        let (index, slot) = (number / per_table, number % per_table);
        let done =
            if self.table.as_ref().is_some_and(|(open, _)| *open != index) { self.flush()? } else { None };
        let size = usize::try_from(self.options.cluster_bits.bytes()).unwrap_or_default();
        let (_, bytes) = self.table.get_or_insert_with(|| (index, vec![0; size]));
        let (word, _) = self.format.encode(entry).ok_or_else(|| too_large("a cluster lies too far out"))?;
        let at = usize::try_from(slot * 8).unwrap_or(usize::MAX);
        match bytes.get_mut(at..at.saturating_add(8)) {
            Some(place) => place.copy_from_slice(&word.to_be_bytes()),
            None => return Err(bad(Code::BadEntry, "a cluster lies outside its table".to_owned())),
        }
        Ok((host, done))
    }

    /// Takes host clusters at the end.
    fn take(&mut self, clusters: u64) -> u64 {
        let at = self.end;
        self.end += clusters * self.options.cluster_bits.bytes();
        let count = (self.end - self.data_at) / self.options.cluster_bits.bytes();
        self.counts.resize(usize::try_from(count).unwrap_or_default(), 0);
        at
    }

    /// Places so many compressed bytes.
    fn place(&mut self, length: u64) -> u64 {
        let (next, end) = self.open;
        let full = next < end && self.count(next) == u16::MAX;
        if next + length > end || full {
            // Behind the open cluster if nothing came between.
            let start = if end == self.end && !full { next } else { self.end };
            let more = (start + length).saturating_sub(self.end).div_ceil(self.options.cluster_bits.bytes());
            self.take(more);
            self.open = (start, self.end);
        }
        let at = self.open.0;
        self.open.0 += length;
        self.refer(at, length);
        at
    }

    fn index(&self, host: u64) -> usize {
        usize::try_from((host - self.data_at) / self.options.cluster_bits.bytes()).unwrap_or(usize::MAX)
    }

    fn count(&self, host: u64) -> u16 {
        self.counts.get(self.index(host)).copied().unwrap_or_default()
    }

    /// Counts a reference to all host clusters that so many bytes touch.
    fn refer(&mut self, host: u64, length: u64) {
        let (first, last) = (self.index(host), self.index(host + length.max(1) - 1));
        self.counts.iter_mut().take(last.saturating_add(1)).skip(first).for_each(|count| *count += 1);
    }

    /// Ends the table that is being filled.
    fn flush(&mut self) -> Result<Option<Table>> {
        let Some((index, bytes)) = self.table.take() else { return Ok(None) };
        let number = self.l1.len() as u64;
        if number >= self.tables_reserved {
            return Err(bad(Code::ChangedMeanwhile, "there are more tables than were planned".to_owned()));
        }
        let at = self.l2_at + number * self.options.cluster_bits.bytes();
        self.l1.push((index, at));
        Ok(Some((at, bytes)))
    }

    /// Ends the image: what is left of its tables, the header last, and its length.
    pub fn finish(mut self) -> Result<(Vec<Table>, u64)> {
        let size = self.options.cluster_bits.bytes();
        let mut writes: Vec<Table> = self.flush()?.into_iter().collect();
        let width = RefcountWidth::new(self.options.refcount_order)
            .ok_or_else(|| bad(Code::BadHeader, "there are no such refcounts".to_owned()))?;
        let per_block = width.entries_per_block(self.options.cluster_bits);
        let (mut blocks, mut table) = (0, 0);
        loop {
            let needed = (self.end / size + blocks + table).div_ceil(per_block);
            let clusters = self.options.cluster_bits.clusters_in(needed * 8);
            if (needed, clusters) == (blocks, table) {
                break;
            }
            (blocks, table) = (needed.max(blocks), clusters.max(table));
        }
        if table * size > format::MAX_REFCOUNT_TABLE_BYTES {
            return Err(too_large("its refcount table would pass 8 MiB"));
        }
        let (blocks_at, table_at) = (self.end, self.end + blocks * size);
        let length = table_at + table * size;
        let l1_entries = self.options.virtual_size.div_ceil(self.format.bytes_per_table());
        let cluster = usize::try_from(size).unwrap_or_default();
        for block in 0..blocks {
            let mut bytes = vec![0; cluster];
            for (index, number) in
                (block * per_block..((block + 1) * per_block).min(length / size)).enumerate()
            {
                // Within the block by the loop's bounds.
                let _ = width.set(&mut bytes, index, self.references(number * size));
            }
            writes.push((blocks_at + block * size, bytes));
        }
        writes.push((table_at, list(blocks, table * size, |index| blocks_at + index * size)));
        let mut l1 =
            vec![0; usize::try_from(self.options.cluster_bits.round_up(l1_entries * 8)).unwrap_or_default()];
        for (index, at) in &self.l1 {
            let place = usize::try_from(index * 8).unwrap_or(usize::MAX);
            if let Some(place) = l1.get_mut(place..place.saturating_add(8)) {
                place.copy_from_slice(&(at | format::ENTRY_COPIED).to_be_bytes());
            }
        }
        writes.push((self.l1_at, l1));
        let geometry = Geometry {
            l1: self.l1_at,
            refcount_table: table_at,
            refcount_table_clusters: table,
            refcount_blocks: blocks_at,
            refcount_block_count: blocks,
            l2_tables: self.l2_at,
            moved: Vec::new(),
            composed: self.data_at,
            compressed: self.data_at,
            end: length,
        };
        writes.push((0, header::encode(&self.options, 3, l1_entries, &geometry)?));
        Ok((writes, length))
    }

    /// References to a host cluster of the finished file.
    fn references(&self, host: u64) -> u64 {
        if host >= self.end || host < self.l2_at {
            return 1;
        }
        if host < self.data_at {
            // Tables that turned out to have no entry are not used.
            return u64::from(host < self.l2_at + self.l1.len() as u64 * self.options.cluster_bits.bytes());
        }
        u64::from(self.count(host))
    }
}

fn list(count: u64, bytes: u64, entry: impl Fn(u64) -> u64) -> Vec<u8> {
    let mut list: Vec<u8> = (0..count).flat_map(|index| entry(index).to_be_bytes()).collect();
    list.resize(usize::try_from(bytes).unwrap_or_default(), 0);
    list
}
