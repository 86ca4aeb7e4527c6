//! The numbers of the format: magic, field offsets, bits, masks, and the limits that QEMU sets to it.
//!
//! One place for reader and writer. "QEMU's limit" means the constants of its `block/qcow2.h`.

/// The first four bytes of an image, big-endian: `QFI` and 0xfb.
pub const MAGIC: u32 = 0x5146_49fb;

/// Length of a version 2 header in bytes; version 3 fields follow.
pub const HEADER_V2_BYTES: u64 = 72;
/// The least `header_length` of version 3 in bytes.
pub const HEADER_V3_MIN_BYTES: u64 = 104;
/// The `header_length` that QEMU writes since it knows compression types: 105 bytes, rounded up to 8.
pub const HEADER_V3_BYTES: u64 = 112;

/// Byte offset of the magic (4 bytes).
pub const AT_MAGIC: usize = 0;
/// Byte offset of the version (4 bytes).
pub const AT_VERSION: usize = 4;
/// Byte offset of the backing name's offset (8 bytes); 0 without one.
pub const AT_BACKING_OFFSET: usize = 8;
/// Byte offset of the backing name's length (4 bytes).
pub const AT_BACKING_LENGTH: usize = 16;
/// Byte offset of the cluster size's logarithm (4 bytes).
pub const AT_CLUSTER_BITS: usize = 20;
/// Byte offset of the virtual size in bytes (8 bytes).
pub const AT_VIRTUAL_SIZE: usize = 24;
/// Byte offset of the encryption method (4 bytes); 0 is none.
pub const AT_CRYPT_METHOD: usize = 32;
/// Byte offset of the number of L1 entries (4 bytes).
pub const AT_L1_ENTRIES: usize = 36;
/// Byte offset of the active L1 table's offset (8 bytes).
pub const AT_L1_OFFSET: usize = 40;
/// Byte offset of the refcount table's offset (8 bytes).
pub const AT_REFCOUNT_TABLE_OFFSET: usize = 48;
/// Byte offset of the refcount table's length in clusters (4 bytes).
pub const AT_REFCOUNT_TABLE_CLUSTERS: usize = 56;
/// Byte offset of the number of internal snapshots (4 bytes).
pub const AT_SNAPSHOT_COUNT: usize = 60;
/// Byte offset of the snapshot table's offset (8 bytes).
pub const AT_SNAPSHOTS_OFFSET: usize = 64;
/// Byte offset of the incompatible features (8 bytes, version 3).
pub const AT_INCOMPATIBLE: usize = 72;
/// Byte offset of the compatible features (8 bytes, version 3).
pub const AT_COMPATIBLE: usize = 80;
/// Byte offset of the autoclear features (8 bytes, version 3).
pub const AT_AUTOCLEAR: usize = 88;
/// Byte offset of the refcount width's logarithm (4 bytes, version 3).
pub const AT_REFCOUNT_ORDER: usize = 96;
/// Byte offset of the header's own length (4 bytes, version 3).
pub const AT_HEADER_LENGTH: usize = 100;
/// Byte offset of the compression type (1 byte, if the header is longer than 104).
pub const AT_COMPRESSION_TYPE: usize = 104;

/// The compression type of raw deflate.
pub const COMPRESSION_ZLIB: u8 = 0;
/// The compression type of Zstandard.
pub const COMPRESSION_ZSTD: u8 = 1;

/// Incompatible bit 0: the image was not closed cleanly.
pub const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
/// Incompatible bit 1: QEMU found the image corrupt.
pub const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
/// Incompatible bit 2: the data is in another file.
pub const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
/// Incompatible bit 3: the compression type is not zlib.
pub const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
/// Incompatible bit 4: L2 entries are extended.
pub const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
/// The incompatible bits that QEMU 10 knows.
pub const INCOMPATIBLE_KNOWN: u64 = 0x1f;

/// Compatible bit 0: refcounts may be written late.
pub const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1 << 0;

/// Autoclear bit 0: the bitmaps extension is up to date.
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// Autoclear bit 1: the external data file is raw.
pub const AUTOCLEAR_DATA_FILE_RAW: u64 = 1 << 1;

/// Type of the extension that ends the list.
pub const EXTENSION_END: u32 = 0;
/// Type of the backing format extension: the format's name.
pub const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Type of the feature name table: entries of 48 bytes.
pub const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
/// Type of the bitmaps extension: 24 bytes.
pub const EXTENSION_BITMAPS: u32 = 0x2385_2875;
/// Type of the full disk encryption extension: 16 bytes.
pub const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;
/// Type of the external data file name.
pub const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// Type of qchain's own extension (`qcst`): the image is an empty one that keeps a deleted member's name. Its
/// data is the id of the store it was made on. Others keep an extension that they do not know as it is.
pub const EXTENSION_STUB: u32 = 0x7163_7374;
/// The longest id in it that is taken for one, in bytes.
pub const MAX_STUB_BYTES: u64 = 64;

/// Bytes of an extension before its data: type and length.
pub const EXTENSION_HEAD_BYTES: usize = 8;
/// Bytes of one entry of the feature name table: kind, bit, 46 bytes of name.
pub const FEATURE_NAME_BYTES: usize = 48;
/// Bytes of the bitmaps extension's data.
pub const BITMAPS_EXTENSION_BYTES: usize = 24;

/// Bit 63 of an L1 or L2 entry: the cluster's refcount is exactly one.
pub const ENTRY_COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed.
pub const ENTRY_COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry of version 3: the cluster reads as zeros.
pub const ENTRY_ZERO: u64 = 1;
/// Where an L1 or uncompressed L2 entry holds its offset: bits 9 to 55.
pub const ENTRY_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The bits of an L1 entry that must be clear: 0 to 8, 56 to 62.
pub const L1_RESERVED_MASK: u64 = 0x7f00_0000_0000_01ff;
/// The bits of an uncompressed L2 entry that must be clear: 1 to 8, 56 to 61.
pub const L2_RESERVED_MASK: u64 = 0x3f00_0000_0000_01fe;
/// Where a refcount table entry holds its offset: bits 9 to 63.
pub const REFCOUNT_OFFSET_MASK: u64 = 0xffff_ffff_ffff_fe00;
/// The bits of a refcount table entry that must be clear: 0 to 8.
pub const REFCOUNT_RESERVED_MASK: u64 = 0x1ff;

/// Subclusters of a cluster with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;
/// The least cluster size's logarithm with extended L2 entries: subclusters of 512 bytes (QEMU's limit).
pub const EXTENDED_L2_MIN_CLUSTER_BITS: u32 = 14;

/// Host offsets are below this (QEMU's limit: `QCOW_MAX_CLUSTER_OFFSET`).
pub const MAX_HOST_OFFSET: u64 = 1 << 56;
/// An L1 table has at most this many bytes (QEMU's limit: `QCOW_MAX_L1_SIZE`).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// A refcount table has at most this many bytes (QEMU's limit: `QCOW_MAX_REFTABLE_SIZE`).
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The widest refcount's logarithm: 64 bits (QEMU's limit).
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// The refcount width's logarithm of version 2, and QEMU's default: 16 bits.
pub const DEFAULT_REFCOUNT_ORDER: u32 = 4;
/// The longest backing name in bytes (QEMU's limit: `qcow2_do_open` refuses 1,024 and more).
pub const MAX_BACKING_NAME_BYTES: u64 = 1023;
/// The longest backing format in bytes (QEMU's limit: the field of 16 bytes it is kept in).
pub const MAX_BACKING_FORMAT_BYTES: u64 = 15;
/// At most this many internal snapshots (QEMU's limit: `QCOW_MAX_SNAPSHOTS`).
pub const MAX_SNAPSHOTS: u32 = 65_536;
/// The snapshot table has at most this many bytes (QEMU's limit: `QCOW_MAX_SNAPSHOTS_SIZE`).
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 1024 * 65_536;
/// Extra data of one snapshot has at most this many bytes (QEMU's limit).
pub const MAX_SNAPSHOT_EXTRA_BYTES: u64 = 1024;
/// At most this many bitmaps (QEMU's limit: `QCOW2_MAX_BITMAPS`).
pub const MAX_BITMAPS: u32 = 65_535;
/// The bitmap directory has at most this many bytes (QEMU's limit).
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 1024 * 65_535;
/// One bitmap's table has at most this many entries (QEMU's limit: `BME_MAX_TABLE_SIZE` in
/// `block/qcow2-bitmap.c`).
pub const MAX_BITMAP_TABLE_ENTRIES: u64 = 0x800_0000;
/// Where an entry of a bitmap's table holds its offset: bits 9 to 55.
pub const BITMAP_ENTRY_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The bits of a bitmap table's entry that must be clear: 1 to 8, 56 to 63.
pub const BITMAP_ENTRY_RESERVED_MASK: u64 = 0xff00_0000_0000_01fe;
