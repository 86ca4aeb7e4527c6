//! From bytes to a [`Header`], with every check that QEMU makes when it opens an image.

use super::{BackingName, BitmapsExtension, CompressionType, Header};
use crate::failure::Code;
use crate::qcow2::error::{ImageError, Result};
use crate::qcow2::format::{
    AT_AUTOCLEAR, AT_BACKING_LENGTH, AT_BACKING_OFFSET, AT_CLUSTER_BITS, AT_COMPATIBLE, AT_COMPRESSION_TYPE,
    AT_CRYPT_METHOD, AT_HEADER_LENGTH, AT_INCOMPATIBLE, AT_L1_ENTRIES, AT_L1_OFFSET, AT_MAGIC,
    AT_REFCOUNT_ORDER, AT_REFCOUNT_TABLE_CLUSTERS, AT_REFCOUNT_TABLE_OFFSET, AT_SNAPSHOT_COUNT,
    AT_SNAPSHOTS_OFFSET, AT_VERSION, AT_VIRTUAL_SIZE, AUTOCLEAR_BITMAPS, BITMAPS_EXTENSION_BYTES,
    COMPATIBLE_LAZY_REFCOUNTS, COMPRESSION_ZLIB, COMPRESSION_ZSTD, DEFAULT_REFCOUNT_ORDER,
    EXTENDED_L2_MIN_CLUSTER_BITS, EXTENSION_BACKING_FORMAT, EXTENSION_BITMAPS, EXTENSION_ENCRYPTION,
    EXTENSION_END, EXTENSION_FEATURE_NAMES, EXTENSION_HEAD_BYTES, EXTENSION_STUB, FEATURE_NAME_BYTES,
    HEADER_V2_BYTES, HEADER_V3_MIN_BYTES, INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_DIRTY, INCOMPATIBLE_EXTENDED_L2, INCOMPATIBLE_KNOWN, MAGIC,
    MAX_BACKING_FORMAT_BYTES, MAX_BACKING_NAME_BYTES, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS,
    MAX_HOST_OFFSET, MAX_L1_BYTES, MAX_REFCOUNT_ORDER, MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS,
    MAX_STUB_BYTES,
};
use crate::qcow2::tables::L1_ENTRY_BYTES;
use crate::units::{ClusterBits, HostOffset};

/// As [`Header::parse`], but `None` if more of the first cluster than `bytes` is needed.
pub(crate) fn parse_prefix(image: &str, file_length: u64, bytes: &[u8]) -> Result<Option<Header>> {
    let parser = Parser { image, file_length, bytes };
    match parser.header() {
        Ok(header) => Ok(Some(header)),
        Err(Stop::More) => Ok(None),
        Err(Stop::Failed(error)) => Err(error),
    }
}

/// Why parsing stopped.
enum Stop {
    /// The first cluster goes on behind the bytes at hand.
    More,
    Failed(ImageError),
}

/// What may need more of the file.
type Step<T> = std::result::Result<T, Stop>;

impl From<ImageError> for Stop {
    fn from(error: ImageError) -> Self {
        Self::Failed(error)
    }
}

struct Parser<'a> {
    image: &'a str,
    file_length: u64,
    bytes: &'a [u8],
}

/// The fields of version 3, or what version 2 means by not having them.
struct Features {
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_bytes: u64,
    compression: u8,
}

/// What the extensions say.
#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    bitmaps: Option<BitmapsExtension>,
    stub: Option<String>,
    feature_names: Vec<(u8, u8, String)>,
}

impl Parser<'_> {
    fn header(&self) -> Step<Header> {
        let version = self.version()?;
        let cluster_bits = self.cluster_bits()?;
        if self.u32(AT_CRYPT_METHOD)? != 0 {
            return Err(self.unsupported(Code::Encrypted, "encryption").into());
        }
        let features = self.features(version, cluster_bits)?;
        let backing_at = self.backing_range(cluster_bits)?;
        let extensions_end = backing_at.map_or(cluster_bits.bytes(), |(offset, _)| offset);
        let extensions = self.extensions(features.header_bytes, extensions_end, cluster_bits, &features)?;
        self.refuse_features(&features, &extensions)?;
        let compression = self.compression(&features)?;
        let extended_l2 = features.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0;
        if extended_l2 && cluster_bits.bits() < EXTENDED_L2_MIN_CLUSTER_BITS {
            return Err(self.bad("extended L2 entries with clusters below 16 KiB").into());
        }
        let backing = match backing_at {
            Some((offset, length)) => Some(BackingName {
                name: self.range(offset, length, cluster_bits)?.to_vec(),
                format: extensions.backing_format,
            }),
            None => None,
        };
        let header = Header {
            version,
            cluster_bits,
            virtual_size: self.u64(AT_VIRTUAL_SIZE)?,
            l1_entries: u64::from(self.u32(AT_L1_ENTRIES)?),
            l1_offset: HostOffset(self.u64(AT_L1_OFFSET)?),
            refcount_table_offset: HostOffset(self.u64(AT_REFCOUNT_TABLE_OFFSET)?),
            refcount_table_clusters: u64::from(self.u32(AT_REFCOUNT_TABLE_CLUSTERS)?),
            snapshot_count: self.u32(AT_SNAPSHOT_COUNT)?,
            snapshots_offset: HostOffset(self.u64(AT_SNAPSHOTS_OFFSET)?),
            refcount_order: features.refcount_order,
            dirty: features.incompatible & INCOMPATIBLE_DIRTY != 0,
            lazy_refcounts: features.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0,
            extended_l2,
            compression,
            backing,
            bitmaps: extensions.bitmaps,
            stub: extensions.stub,
        };
        self.check_tables(&header)?;
        Ok(header)
    }

    fn version(&self) -> Result<u32> {
        let magic = self.bytes.get(AT_MAGIC..).and_then(|rest| rest.first_chunk()).copied();
        if magic.map(u32::from_be_bytes) != Some(MAGIC) {
            return Err(ImageError::NotQcow2 { image: self.image.to_owned() });
        }
        match self.u32(AT_VERSION)? {
            version @ (2 | 3) => Ok(version),
            other => Err(self.bad(format!("version {other}; only 2 and 3 are known"))),
        }
    }

    fn cluster_bits(&self) -> Result<ClusterBits> {
        let bits = self.u32(AT_CLUSTER_BITS)?;
        ClusterBits::new(bits).ok_or_else(|| self.bad(format!("cluster_bits is {bits}; QEMU allows 9 to 21")))
    }

    fn features(&self, version: u32, cluster_bits: ClusterBits) -> Result<Features> {
        if version == 2 {
            return Ok(Features {
                incompatible: 0,
                compatible: 0,
                autoclear: 0,
                refcount_order: DEFAULT_REFCOUNT_ORDER,
                header_bytes: HEADER_V2_BYTES,
                compression: COMPRESSION_ZLIB,
            });
        }
        let header_bytes = u64::from(self.u32(AT_HEADER_LENGTH)?);
        if header_bytes < HEADER_V3_MIN_BYTES || header_bytes > cluster_bits.bytes() {
            return Err(self.bad(format!("header_length is {header_bytes}; 104 to one cluster is allowed")));
        }
        if header_bytes % 8 != 0 {
            return Err(self.bad(format!("header_length is {header_bytes}, no multiple of 8")));
        }
        let refcount_order = self.u32(AT_REFCOUNT_ORDER)?;
        if refcount_order > MAX_REFCOUNT_ORDER {
            return Err(self.bad(format!("refcount_order is {refcount_order}; QEMU allows 0 to 6")));
        }
        let compression = if header_bytes > HEADER_V3_MIN_BYTES {
            self.bytes.get(AT_COMPRESSION_TYPE).copied().ok_or_else(|| self.cut(AT_COMPRESSION_TYPE))?
        } else {
            COMPRESSION_ZLIB
        };
        Ok(Features {
            incompatible: self.u64(AT_INCOMPATIBLE)?,
            compatible: self.u64(AT_COMPATIBLE)?,
            autoclear: self.u64(AT_AUTOCLEAR)?,
            refcount_order,
            header_bytes,
            compression,
        })
    }

    /// Offset and length of the backing name.
    fn backing_range(&self, cluster_bits: ClusterBits) -> Result<Option<(u64, u64)>> {
        let offset = self.u64(AT_BACKING_OFFSET)?;
        if offset == 0 {
            return Ok(None);
        }
        let length = u64::from(self.u32(AT_BACKING_LENGTH)?);
        let end = offset.checked_add(length);
        if length == 0 || length > MAX_BACKING_NAME_BYTES {
            return Err(self.bad(format!("the backing name has {length} bytes; 1 to 1,023 are allowed")));
        }
        if end.is_none_or(|end| end > cluster_bits.bytes()) {
            return Err(self.bad(format!("the backing name at {offset:#x} leaves the first cluster")));
        }
        Ok(Some((offset, length)))
    }

    /// Walks the extensions in `[start, end)`, each step at least 8 bytes further.
    fn extensions(
        &self,
        start: u64,
        end: u64,
        cluster_bits: ClusterBits,
        features: &Features,
    ) -> Step<Extensions> {
        let head_bytes = EXTENSION_HEAD_BYTES as u64;
        let mut found = Extensions::default();
        let mut at = start;
        while at.saturating_add(head_bytes) <= end {
            if at >= self.file_length {
                // Behind the end of the file QEMU reads zeros, which end the list.
                break;
            }
            let head = self.range(at, head_bytes, cluster_bits)?;
            let (Some(kind), Some(length)) = (be32(head, 0), be32(head, 4)) else { break };
            if kind == EXTENSION_END {
                break;
            }
            let length = u64::from(length);
            at += head_bytes;
            if length > end - at {
                let detail = format!("the header extension {kind:#010x} has {length} bytes, too many");
                return Err(self.bad(detail).into());
            }
            match kind {
                EXTENSION_BACKING_FORMAT => {
                    if length > MAX_BACKING_FORMAT_BYTES {
                        return Err(self.bad(format!("the backing format has {length} bytes")).into());
                    }
                    let text = self.range(at, length, cluster_bits)?;
                    found.backing_format = Some(String::from_utf8_lossy(text).into_owned());
                }
                EXTENSION_FEATURE_NAMES => {
                    found.feature_names = feature_names(self.range(at, length, cluster_bits)?);
                }
                EXTENSION_BITMAPS if features.autoclear & AUTOCLEAR_BITMAPS != 0 => {
                    found.bitmaps = Some(self.bitmaps(self.range(at, length, cluster_bits)?, cluster_bits)?);
                }
                EXTENSION_STUB if length <= MAX_STUB_BYTES => {
                    let text = self.range(at, length, cluster_bits)?;
                    found.stub = Some(String::from_utf8_lossy(text).into_owned());
                }
                EXTENSION_ENCRYPTION => {
                    return Err(self.unsupported(Code::Encrypted, "encryption").into());
                }
                _ => {}
            }
            at = at.saturating_add(length.next_multiple_of(8));
        }
        Ok(found)
    }

    fn bitmaps(&self, data: &[u8], cluster_bits: ClusterBits) -> Result<BitmapsExtension> {
        let fields = (be32(data, 0), be32(data, 4), be64(data, 8), be64(data, 16));
        let (Some(count), Some(reserved), Some(bytes), Some(offset)) = fields else {
            return Err(self.bad("the bitmaps extension is too short"));
        };
        if data.len() != BITMAPS_EXTENSION_BYTES || reserved != 0 || count == 0 {
            return Err(self.bad("the bitmaps extension has a wrong length, count or reserved field"));
        }
        if count > MAX_BITMAPS || bytes > MAX_BITMAP_DIRECTORY_BYTES {
            return Err(self.huge(format!("{count} bitmaps with a directory of {bytes} bytes")));
        }
        self.table_offset("bitmap directory", offset, cluster_bits)?;
        Ok(BitmapsExtension { count, directory_bytes: bytes, directory_offset: HostOffset(offset) })
    }

    fn refuse_features(&self, features: &Features, extensions: &Extensions) -> Result<()> {
        let bits = features.incompatible;
        let unknown = bits & !INCOMPATIBLE_KNOWN;
        if unknown != 0 {
            let bit = unknown.trailing_zeros();
            let name = extensions
                .feature_names
                .iter()
                .find(|(kind, number, _)| *kind == 0 && u32::from(*number) == bit)
                .map_or_else(String::new, |(_, _, name)| format!(" ({name:?})"));
            return Err(self.unsupported(Code::UnknownFeature, format!("incompatible feature {bit}{name}")));
        }
        if bits & INCOMPATIBLE_DATA_FILE != 0 {
            return Err(self.unsupported(Code::DataFile, "an external data file"));
        }
        if bits & INCOMPATIBLE_CORRUPT != 0 {
            return Err(self.error(Code::MarkedCorrupt, "QEMU has marked the image corrupt"));
        }
        Ok(())
    }

    fn compression(&self, features: &Features) -> Result<CompressionType> {
        let flagged = features.incompatible & INCOMPATIBLE_COMPRESSION != 0;
        match (features.compression, flagged) {
            (COMPRESSION_ZLIB, false) => Ok(CompressionType::Zlib),
            (COMPRESSION_ZSTD, true) => Ok(CompressionType::Zstd),
            (COMPRESSION_ZLIB | COMPRESSION_ZSTD, _) => {
                Err(self.bad("the compression type disagrees with its feature bit"))
            }
            (other, _) => Err(self.unsupported(Code::UnknownFeature, format!("compression type {other}"))),
        }
    }

    fn check_tables(&self, header: &Header) -> Result<()> {
        let bits = header.cluster_bits;
        if header.virtual_size > i64::MAX.unsigned_abs() {
            return Err(self.bad(format!("the virtual size {} is 2^63 or more", header.virtual_size)));
        }
        if header.l1_entries > MAX_L1_BYTES / L1_ENTRY_BYTES {
            return Err(self.huge(format!("an L1 table of {} entries", header.l1_entries)));
        }
        let needed = header.virtual_size.div_ceil(header.entry_format().bytes_per_table());
        if header.l1_entries < needed {
            return Err(self.bad(format!(
                "the L1 table has {} entries; {} bytes need {needed}",
                header.l1_entries, header.virtual_size
            )));
        }
        self.table_offset("L1 table", header.l1_offset.0, bits)?;
        if header.l1_entries > 0 && header.l1_offset.plus(header.l1_bytes()).0 > self.file_length {
            return Err(self.error(
                Code::Truncated,
                format!(
                    "the L1 table at {} ends behind the file's {} bytes",
                    header.l1_offset, self.file_length
                ),
            ));
        }
        if header.refcount_table_bytes() > MAX_REFCOUNT_TABLE_BYTES {
            let clusters = header.refcount_table_clusters;
            return Err(self.huge(format!("a refcount table of {clusters} clusters")));
        }
        if header.refcount_table_clusters == 0 {
            return Err(self.bad("there is no refcount table"));
        }
        self.table_offset("refcount table", header.refcount_table_offset.0, bits)?;
        if header.snapshot_count > MAX_SNAPSHOTS {
            return Err(self.huge(format!("{} internal snapshots", header.snapshot_count)));
        }
        self.table_offset("snapshot table", header.snapshots_offset.0, bits)
    }

    fn table_offset(&self, what: &str, offset: u64, cluster_bits: ClusterBits) -> Result<()> {
        if cluster_bits.within(offset) != 0 || offset >= MAX_HOST_OFFSET {
            return Err(self.bad(format!("the {what} lies at {offset:#x}: misaligned or 2^56 and more")));
        }
        Ok(())
    }

    /// Bytes of the first cluster; asks for more of it where the file has more.
    fn range(&self, at: u64, length: u64, cluster_bits: ClusterBits) -> Step<&[u8]> {
        let start = usize::try_from(at).ok();
        let end = usize::try_from(at.saturating_add(length)).ok();
        if let (Some(start), Some(end)) = (start, end)
            && let Some(found) = self.bytes.get(start..end)
        {
            return Ok(found);
        }
        let whole = cluster_bits.bytes().min(self.file_length);
        if (self.bytes.len() as u64) < whole {
            return Err(Stop::More);
        }
        Err(self.error(Code::Truncated, format!("the file ends inside the header, before {at:#x}")).into())
    }

    fn u32(&self, at: usize) -> Result<u32> {
        be32(self.bytes, at).ok_or_else(|| self.cut(at))
    }

    fn u64(&self, at: usize) -> Result<u64> {
        be64(self.bytes, at).ok_or_else(|| self.cut(at))
    }

    fn cut(&self, at: usize) -> ImageError {
        self.error(Code::Truncated, format!("the file ends inside the header, before byte {at}"))
    }

    fn bad(&self, detail: impl Into<String>) -> ImageError {
        self.error(Code::BadHeader, detail)
    }

    fn huge(&self, detail: impl Into<String>) -> ImageError {
        self.error(Code::HugeTable, detail)
    }

    fn error(&self, code: Code, detail: impl Into<String>) -> ImageError {
        ImageError::Bad { image: self.image.to_owned(), code, detail: detail.into() }
    }

    fn unsupported(&self, code: Code, feature: impl Into<String>) -> ImageError {
        ImageError::Unsupported { image: self.image.to_owned(), code, feature: feature.into() }
    }
}

/// The entries of a feature name table: kind, bit, name.
fn feature_names(data: &[u8]) -> Vec<(u8, u8, String)> {
    data.chunks_exact(FEATURE_NAME_BYTES)
        .filter_map(|entry| match entry {
            [kind, bit, name @ ..] => {
                let text = name.split(|byte| *byte == 0).next().unwrap_or_default();
                Some((*kind, *bit, String::from_utf8_lossy(text).into_owned()))
            }
            _ => None,
        })
        .collect()
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
