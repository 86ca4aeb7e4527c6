//! Compressed clusters: stored bytes in, one cluster out, and back. Pure.
//!
//! A descriptor counts sectors, so what is read ends with bytes of somebody else, or with zeros: they are
//! ignored. The memory taken is one cluster and a decoder's fixed state, whatever the bytes claim.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe;

use crate::qcow2::header::CompressionType;
use crate::units::ClusterBits;

/// The window of raw deflate in qcow2: QEMU reads with no more than 12 bits (`block/qcow2-threads.c`).
const DEFLATE_WINDOW_BITS: u8 = 12;

/// Why a compressed cluster cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompressionFault {
    /// The bytes are no stream of that kind, or end too early.
    #[error("the stream is broken or cut short")]
    Broken,
    /// The stream ends before one cluster is full.
    #[error("the stream is shorter than one cluster")]
    Short,
}

/// Decompresses `stored` to exactly one cluster.
pub fn decompress(
    kind: CompressionType,
    stored: &[u8],
    cluster_bits: ClusterBits,
) -> Result<Vec<u8>, CompressionFault> {
    let mut cluster = vec![0; 1 << cluster_bits.bits()];
    match kind {
        CompressionType::Zlib => inflate(stored, &mut cluster)?,
        CompressionType::Zstd => unzstd(stored, &mut cluster)?,
    }
    Ok(cluster)
}

/// The least bytes that a compressed cluster can be stored in: deflate's longest match is 258 bytes in two bits; zstd has
/// frames of 6 bytes and more with 4 for each block of at most 128 KiB.
#[must_use]
pub fn least_stored_bytes(kind: CompressionType, cluster_bits: ClusterBits) -> u64 {
    let cluster = cluster_bits.bytes();
    match kind {
        CompressionType::Zlib => cluster.div_ceil(1032),
        CompressionType::Zstd => 6 + 4 * cluster.div_ceil(128 << 10),
    }
}

/// Compresses one cluster; `None` if that does not make it smaller.
///
/// `level` is the compressor's own: 1 to 9 for zlib, 1 to 22 for zstd; a number outside is clamped.
#[must_use]
pub fn compress(kind: CompressionType, level: i32, cluster: &[u8]) -> Option<Vec<u8>> {
    // Room for one byte less than the cluster: what does not fit is not smaller.
    let mut out = vec![0; cluster.len().checked_sub(1)?];
    let length = match kind {
        CompressionType::Zlib => deflate(level.clamp(1, 9).unsigned_abs(), cluster, &mut out)?,
        CompressionType::Zstd => zstd_safe::compress(out.as_mut_slice(), cluster, level.clamp(1, 22)).ok()?,
    };
    out.truncate(length);
    Some(out)
}

/// Compresses cluster after cluster with one set of tables: for images that are compressed whole.
pub struct Compressor {
    level: i32,
    coder: Coder,
}

enum Coder {
    Zlib(Compress),
    Zstd(zstd_safe::CCtx<'static>),
}

impl Compressor {
    /// For one kind and level, as [`compress`] takes them.
    #[must_use]
    pub fn new(kind: CompressionType, level: i32) -> Self {
        let coder = match kind {
            CompressionType::Zlib => {
                let level = Compression::new(level.clamp(1, 9).unsigned_abs());
                Coder::Zlib(Compress::new_with_window_bits(level, false, DEFLATE_WINDOW_BITS))
            }
            CompressionType::Zstd => Coder::Zstd(zstd_safe::CCtx::create()),
        };
        Self { level: level.clamp(1, 22), coder }
    }

    /// Compresses one cluster behind what `out` has, and gives how many bytes that took; `None`, and nothing added, if it
    /// does not make it smaller.
    pub fn compress_onto(&mut self, cluster: &[u8], out: &mut Vec<u8>) -> Option<usize> {
        let start = out.len();
        // Room for one byte less than the cluster: what does not fit is not smaller.
        out.resize(start + cluster.len().checked_sub(1)?, 0);
        let length = out.get_mut(start..).and_then(|room| self.compress_into(cluster, room));
        out.truncate(start + length.unwrap_or(0));
        length
    }

    fn compress_into(&mut self, cluster: &[u8], room: &mut [u8]) -> Option<usize> {
        match &mut self.coder {
            Coder::Zlib(encoder) => {
                encoder.reset();
                match encoder.compress(cluster, room, FlushCompress::Finish) {
                    Ok(Status::StreamEnd) => usize::try_from(encoder.total_out()).ok(),
                    _ => None,
                }
            }
            Coder::Zstd(context) => context.compress(room, cluster, self.level).ok(),
        }
    }
}

fn inflate(stored: &[u8], cluster: &mut [u8]) -> Result<(), CompressionFault> {
    match libdeflater::Decompressor::new().deflate_decompress(stored, cluster) {
        Ok(length) if length == cluster.len() => return Ok(()),
        Ok(_) => return Err(CompressionFault::Short),
        Err(_) => {}
    }
    // libdeflate wants the stream's end; like QEMU, be content when the cluster is full.
    let mut decoder = Decompress::new(false);
    let status = decoder.decompress(stored, cluster, FlushDecompress::Finish);
    if decoder.total_out() == cluster.len() as u64 && status.is_ok() {
        return Ok(());
    }
    match status {
        Ok(Status::StreamEnd) => Err(CompressionFault::Short),
        _ => Err(CompressionFault::Broken),
    }
}

fn deflate(level: u32, cluster: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut encoder = Compress::new_with_window_bits(Compression::new(level), false, DEFLATE_WINDOW_BITS);
    match encoder.compress(cluster, out, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => usize::try_from(encoder.total_out()).ok(),
        _ => None,
    }
}

/// Decodes whole frames until the cluster is full, as QEMU does; whole frames take no window's memory.
fn unzstd(mut stored: &[u8], cluster: &mut [u8]) -> Result<(), CompressionFault> {
    let mut context = zstd_safe::DCtx::create();
    let mut filled = 0;
    while filled < cluster.len() {
        if stored.is_empty() {
            return Err(CompressionFault::Short);
        }
        let length = zstd_safe::find_frame_compressed_size(stored).map_err(|_| CompressionFault::Broken)?;
        let (frame, rest) = stored.split_at_checked(length).ok_or(CompressionFault::Broken)?;
        let room = cluster.get_mut(filled..).ok_or(CompressionFault::Broken)?;
        filled += context.decompress(room, frame).map_err(|_| CompressionFault::Broken)?;
        if length == 0 {
            return Err(CompressionFault::Broken);
        }
        stored = rest;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{CompressionFault, Compressor, compress, decompress};
    use crate::qcow2::header::CompressionType::{self, Zlib, Zstd};
    use crate::units::ClusterBits;

    const KINDS: [CompressionType; 2] = [Zlib, Zstd];

    #[test]
    fn one_compressor_for_many_clusters() {
        let bits = ClusterBits::DEFAULT;
        for kind in KINDS {
            let mut compressor = Compressor::new(kind, 3);
            let mut out = b"before".to_vec();
            for round in 0..5_u8 {
                let cluster: Vec<u8> = (0..65_536_u32).map(|at| (at / 7).to_le_bytes()[0] ^ round).collect();
                let start = out.len();
                let length = compressor.compress_onto(&cluster, &mut out).unwrap();
                assert_eq!(out.len(), start + length);
                assert_eq!(decompress(kind, &out[start..], bits), Ok(cluster));
            }
            assert!(out.starts_with(b"before"));
            let before = out.clone();
            let noise: Vec<u8> =
                (0..2048_u32).flat_map(|at| *blake3::hash(&at.to_le_bytes()).as_bytes()).collect();
            assert_eq!(compressor.compress_onto(&noise, &mut out), None);
            assert_eq!(compressor.compress_onto(&[], &mut out), None);
            assert_eq!(out, before);
        }
    }

    fn text(length: usize) -> Vec<u8> {
        (0..length).map(|i| u8::try_from(i / 7 % 251).unwrap()).collect()
    }

    #[test]
    fn every_cluster_size_comes_back_with_foreign_bytes_behind() {
        for kind in KINDS {
            for bits in [9, 12, 16, 21] {
                let bits = ClusterBits::new(bits).unwrap();
                let cluster = text(usize::try_from(bits.bytes()).unwrap());
                for level in [-5, 1, 6, 99] {
                    let mut stored = compress(kind, level, &cluster).unwrap();
                    assert_eq!(decompress(kind, &stored, bits), Ok(cluster.clone()));
                    stored.extend([0xaa; 600]);
                    assert_eq!(decompress(kind, &stored, bits), Ok(cluster.clone()));
                }
            }
        }
    }

    #[test]
    fn what_does_not_shrink_is_not_compressed() {
        // A multiplicative generator: no repeats that either compressor could use.
        let mut state = 1_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()[0]
        })
        .take(4096)
        .collect();
        for kind in KINDS {
            assert_eq!(compress(kind, 1, &noise), None);
            assert_eq!(compress(kind, 1, &[]), None);
        }
    }

    #[test]
    fn broken_and_short_streams() {
        let bits = ClusterBits::new(12).unwrap();
        for kind in KINDS {
            let stored = compress(kind, 1, &text(4096)).unwrap();
            assert_eq!(decompress(kind, &stored[..stored.len() / 2], bits), Err(CompressionFault::Broken));
            let small = compress(kind, 1, &text(2048)).unwrap();
            assert_eq!(decompress(kind, &small, bits), Err(CompressionFault::Short));
            assert!(decompress(kind, &[], bits).is_err());
        }
        // More than a cluster: QEMU takes deflate's first cluster, and refuses a larger frame.
        let large = compress(Zlib, 1, &text(8192)).unwrap();
        assert_eq!(decompress(Zlib, &large, bits), Ok(text(4096)));
        let large = compress(Zstd, 1, &text(8192)).unwrap();
        assert_eq!(decompress(Zstd, &large, bits), Err(CompressionFault::Broken));
    }

    #[test]
    fn two_frames_fill_a_cluster() {
        let whole = text(4096);
        let (first, second) = whole.split_at(2048);
        let mut stored = compress(Zstd, 3, first).unwrap();
        stored.extend(compress(Zstd, 3, second).unwrap());
        stored.extend([0; 100]);
        assert_eq!(decompress(Zstd, &stored, ClusterBits::new(12).unwrap()), Ok(whole));
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_value(stored in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let bits = ClusterBits::new(10).unwrap();
            for kind in KINDS {
                if let Ok(cluster) = decompress(kind, &stored, bits) {
                    prop_assert_eq!(cluster.len(), 1024);
                }
            }
        }
    }
}
