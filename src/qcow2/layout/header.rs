//! The header cluster of a new image.

use crate::failure::Code;
use crate::qcow2::error::{ImageError, Result};
use crate::qcow2::format;
use crate::qcow2::header::CompressionType;
use crate::qcow2::layout::ImageOptions;
use crate::qcow2::layout::geometry::Geometry;

/// Names of the features this writer may set, for programs that do not know them: (kind, bit, name), kind 0
/// incompatible, 1 compatible, 2 autoclear. The names are those that QEMU prints.
const FEATURES: &[(u8, u8, &str)] = &[
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// Encodes the header with its extensions and backing name; fails if they do not fit into one cluster.
pub fn encode(options: &ImageOptions, version: u32, l1_entries: u64, geometry: &Geometry) -> Result<Vec<u8>> {
    let size = usize::try_from(options.cluster_bits.bytes()).unwrap_or_default();
    let mut bytes = vec![0; size];
    let mut header = Writer { bytes: &mut bytes, full: false };
    header.u32(format::AT_MAGIC, format::MAGIC);
    header.u32(format::AT_VERSION, version);
    header.u32(format::AT_CLUSTER_BITS, options.cluster_bits.bits());
    header.u64(format::AT_VIRTUAL_SIZE, options.virtual_size);
    header.u32(format::AT_L1_ENTRIES, narrow(l1_entries));
    header.u64(format::AT_L1_OFFSET, if l1_entries == 0 { 0 } else { geometry.l1 });
    header.u64(format::AT_REFCOUNT_TABLE_OFFSET, geometry.refcount_table);
    header.u32(format::AT_REFCOUNT_TABLE_CLUSTERS, narrow(geometry.refcount_table_clusters));
    let mut at = usize::try_from(format::HEADER_V2_BYTES).unwrap_or_default();
    if version >= 3 {
        at = usize::try_from(format::HEADER_V3_BYTES).unwrap_or_default();
        let zstd = options.compression == CompressionType::Zstd;
        let incompatible = if zstd { format::INCOMPATIBLE_COMPRESSION } else { 0 }
            | if options.extended_l2 { format::INCOMPATIBLE_EXTENDED_L2 } else { 0 };
        header.u64(format::AT_INCOMPATIBLE, incompatible);
        let lazy = if options.lazy_refcounts { format::COMPATIBLE_LAZY_REFCOUNTS } else { 0 };
        header.u64(format::AT_COMPATIBLE, lazy);
        header.u32(format::AT_REFCOUNT_ORDER, options.refcount_order);
        header.u32(format::AT_HEADER_LENGTH, narrow(format::HEADER_V3_BYTES));
        let kind = if zstd { format::COMPRESSION_ZSTD } else { format::COMPRESSION_ZLIB };
        header.bytes(format::AT_COMPRESSION_TYPE, &[kind]);
    }
    if let Some(backing) = &options.backing {
        at = header.extension(at, format::EXTENSION_BACKING_FORMAT, backing.format.as_bytes());
    }
    if let Some(store) = &options.stub {
        at = header.extension(at, format::EXTENSION_STUB, store.as_bytes());
    }
    // Small clusters have no room for the names beside a long backing name; they are only a courtesy.
    let name_bytes = options.backing.as_ref().map_or(0, |backing| backing.name.len());
    let table_bytes = FEATURES.len() * format::FEATURE_NAME_BYTES + 2 * format::EXTENSION_HEAD_BYTES;
    if version >= 3 && at + table_bytes + name_bytes <= size {
        at = header.extension(at, format::EXTENSION_FEATURE_NAMES, &feature_names());
    }
    at += format::EXTENSION_HEAD_BYTES;
    if let Some(backing) = &options.backing {
        header.u64(format::AT_BACKING_OFFSET, at as u64);
        header.u32(format::AT_BACKING_LENGTH, narrow(backing.name.len() as u64));
        header.bytes(at, &backing.name);
    }
    if header.full || at > size {
        return Err(ImageError::Bad {
            image: "the new image".to_owned(),
            code: Code::BadHeader,
            detail: format!("its header and backing name do not fit into a cluster of {size} bytes"),
        });
    }
    Ok(bytes)
}

fn feature_names() -> Vec<u8> {
    let mut table = Vec::new();
    for (kind, bit, name) in FEATURES {
        table.extend([*kind, *bit]);
        table.extend(name.as_bytes());
        table.resize(table.len().div_ceil(format::FEATURE_NAME_BYTES) * format::FEATURE_NAME_BYTES, 0);
    }
    table
}

/// Header fields are 32 bits wide where the limits above keep the values far below.
fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

struct Writer<'a> {
    bytes: &'a mut [u8],
    full: bool,
}

impl Writer<'_> {
    fn bytes(&mut self, at: usize, data: &[u8]) {
        match self.bytes.get_mut(at..at + data.len()) {
            Some(place) => place.copy_from_slice(data),
            None => self.full = true,
        }
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.bytes(at, &value.to_be_bytes());
    }

    fn u64(&mut self, at: usize, value: u64) {
        self.bytes(at, &value.to_be_bytes());
    }

    /// Writes an extension padded to 8 bytes; gives where the next one goes.
    fn extension(&mut self, at: usize, kind: u32, data: &[u8]) -> usize {
        self.u32(at, kind);
        self.u32(at + 4, narrow(data.len() as u64));
        self.bytes(at + format::EXTENSION_HEAD_BYTES, data);
        at + format::EXTENSION_HEAD_BYTES + data.len().next_multiple_of(8)
    }
}
