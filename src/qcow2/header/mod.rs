//! The header: fixed fields, extensions, backing name. Bytes in, values out.

mod parse;

pub(crate) use parse::parse_prefix;

use crate::failure::Code;
use crate::qcow2::error::{ImageError, Result};
use crate::qcow2::tables::{EntryFormat, L1_ENTRY_BYTES};
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
    /// The store whose qchain made it as an empty stand-in for a deleted member, as its own extension says.
    pub stub: Option<String>,
}

impl Header {
    /// Reads a header from the beginning of a file of `file_length` bytes; `image` is what errors call it.
    ///
    /// `bytes` are the file's first ones: the whole first cluster (or file) is always enough, as extensions
    /// and backing name lie within it; the first 4 KiB are enough for what QEMU writes.
    ///
    /// Everything is checked that QEMU checks when it opens an image, and that the L1 table lies within
    /// the file. Errors: `not-qcow2`, `bad-header`, `huge-table`, `truncated`, `marked-corrupt`, `encrypted`,
    /// `data-file`, `unknown-feature`.
    pub fn parse(image: &str, file_length: u64, bytes: &[u8]) -> Result<Self> {
        parse_prefix(image, file_length, bytes)?.ok_or_else(|| ImageError::Bad {
            image: image.to_owned(),
            code: Code::Truncated,
            detail: "the header goes on behind the bytes that were read".to_owned(),
        })
    }

    /// How this image's L2 entries are written.
    #[must_use]
    pub fn entry_format(&self) -> EntryFormat {
        EntryFormat {
            cluster_bits: self.cluster_bits,
            extended: self.extended_l2,
            zero_flag: self.version >= 3,
        }
    }

    /// The active L1 table's length in bytes: at most 32 MiB.
    #[must_use]
    pub fn l1_bytes(&self) -> u64 {
        self.l1_entries.saturating_mul(L1_ENTRY_BYTES)
    }

    /// The refcount table's length in bytes: at most 8 MiB.
    #[must_use]
    pub fn refcount_table_bytes(&self) -> u64 {
        self.refcount_table_clusters.saturating_mul(self.cluster_bits.bytes())
    }
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
