//! The header: fixed fields, extensions, backing name. Bytes in, values out, and back.

use crate::units::{ClusterBits, HostOffset};

/// A parsed and checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// The guest disk's size in bytes; a multiple of 512 is usual, not required; below 2^63.
    pub virtual_size: u64,
    /// Number of entries of the active L1 table: at least what the virtual size needs, at most 32 MiB / 8.
    pub l1_entries: u64,
    /// Where the active L1 table lies.
    pub l1_offset: HostOffset,
    /// Where the refcount table lies.
    pub refcount_table_offset: HostOffset,
    /// How many clusters it has; at most 8 MiB in all.
    pub refcount_table_clusters: u64,
    /// Number of internal snapshots.
    pub snapshot_count: u32,
    /// Where their table lies.
    pub snapshots_offset: HostOffset,
    /// Log2 of the refcount width in bits, 0 to 6; 4 in version 2.
    pub refcount_order: u32,
    /// Incompatible bit 0: not closed cleanly.
    pub dirty: bool,
    /// Compatible bit 0: refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Incompatible bit 4: 16-byte L2 entries with 32 subclusters.
    pub extended_l2: bool,
    /// How compressed clusters are compressed.
    pub compression: CompressionType,
    /// The backing file, if any.
    pub backing: Option<BackingName>,
    /// The bitmaps extension, if present *and* its autoclear bit is set; present with the bit clear
    /// means stale bitmaps, which count as none.
    pub bitmaps: Option<BitmapsExtension>,
}

/// How clusters are compressed (header byte 104; zlib without it).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate, window of 12 bits.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// What a header says of its backing file. Untrusted: it is only ever compared with known names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// The name's bytes, 1 to 1,023; no particular encoding, and not checked here.
    pub name: Vec<u8>,
    /// The backing format extension's text, if there is one.
    pub format: Option<String>,
}

/// Where the persistent bitmaps are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// How many bitmaps; at most 65,535.
    pub count: u32,
    /// The directory's length in bytes; at most 64 MiB.
    pub directory_bytes: u64,
    /// Where the directory lies.
    pub directory_offset: HostOffset,
}
