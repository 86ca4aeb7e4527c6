//! Blocks, leaves and view digests: what makes two views comparable without comparing their bytes.
//!
//! Owns: the digest of a block ([`leaf`]) and of a whole view ([`TreeBuilder`]), defined right
//! here and held by vectors of a separate program; leaf tables as bytes ([`table`]), and the leaves of a view from the
//! tables of its chain ([`view`]). Does not own: reading views, or files. Pure.
//!
//! - Block `i` of a view is guest bytes `[i * 65536, (i + 1) * 65536)`, the last one zero-padded.
//! - A leaf is the BLAKE3 of one block, so a hole, a zero cluster and written zeros are the same.
//! - A node is the BLAKE3 of its up to [`FAN_OUT`] children's digests, concatenated; level by level, until
//!   one digest `t` is left. The last node of each level is computed from its real child count. A view of
//!   one block has its leaf as `t`, an empty view the BLAKE3 of nothing.
//! - The view digest is BLAKE3(`t` || virtual size as u64, little-endian).
//!
//! A digest depends only on what a guest would read and on the virtual size, never on cluster size,
//! compression, or which member of a chain holds the bytes.

pub mod table;
mod tree;
pub mod view;

use crate::ids::Digest;
use crate::units::{BLOCK_BYTES, BLOCK_LENGTH};

pub use tree::{FAN_OUT, TreeBuilder, zero_leaf};

/// A block of zeros: the padding of a short block.
static ZEROS: [u8; BLOCK_LENGTH] = [0; BLOCK_LENGTH];

/// The leaf of one block. `block` is at most [`BLOCK_BYTES`] long; a shorter one, the last of a view, is
/// padded with zeros.
#[must_use]
pub fn leaf(block: &[u8]) -> Digest {
    debug_assert!(block.len() <= ZEROS.len(), "a block is at most 64 KiB");
    // Looking for a set bit is several times cheaper than hashing, and ends at once in a block of data.
    if is_zero(block) {
        return zero_leaf();
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(block);
    if let Some(padding) = ZEROS.get(block.len()..) {
        hasher.update(padding);
    }
    Digest(*hasher.finalize().as_bytes())
}

/// How many blocks a view of `virtual_size` bytes has, the last one perhaps in part.
#[must_use]
pub fn block_count(virtual_size: u64) -> u64 {
    virtual_size.div_ceil(BLOCK_BYTES)
}

/// Whether every byte is zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Wide steps for the compiler to vectorise; the early end between them keeps data cheap.
    let mut steps = bytes.chunks_exact(256);
    steps.by_ref().all(|step| step.iter().fold(0, |seen, byte| seen | byte) == 0)
        && steps.remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::{TreeBuilder, ZEROS, block_count, is_zero, leaf, zero_leaf};

    /// The digest of `view`, leaf by leaf.
    fn digest(view: &[u8]) -> String {
        let mut tree = TreeBuilder::new();
        for block in view.chunks(65536) {
            tree.push_leaf(leaf(block));
        }
        tree.finish(view.len() as u64).to_string()
    }

    /// The vectors of the format's definition, computed by a separate program.
    #[test]
    fn vectors() {
        let counting: Vec<u8> = (0..(16_u32 << 20) + 512).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let mut late = vec![0; (64 << 20) + 512];
        late[64 << 20..].fill(1);
        for (view, expected) in [
            (&[][..], "5db69ab619e8413264421ae2df34c22b183841dd4d4cd2f99b7393d4a533fcb2"),
            (&[0; 512], "c3c47c162b5ddf78dbc2531483227926ba1ef2113716adc293379f66d29f07a4"),
            (&vec![0x41; 65536], "db7350a7597673f696e5c5e2d9e4d50ee41455884ded9e9e0047cabdaddbcd7b"),
            (&counting, "970db05196c99e8323aa7f4e54c66081533723b36e6618ba462e283d76266e5d"),
            (&late, "526ec1c3364ddc1cccd8831b399eb76924daf52ae2e48411f9615e879aa43ec0"),
        ] {
            assert_eq!(digest(view), expected, "view of {} bytes", view.len());
        }
    }

    #[test]
    fn a_short_block_is_padded() {
        let mut padded = vec![7; 1000];
        padded.resize(65536, 0);
        assert_eq!(leaf(&[7; 1000]), leaf(&padded));
        assert_eq!(leaf(&[]), zero_leaf());
        assert_eq!(leaf(&ZEROS), zero_leaf());
        assert_eq!(zero_leaf().0, *blake3::hash(&ZEROS).as_bytes());
    }

    #[test]
    fn zero_is_seen_at_every_place() {
        for length in [0, 1, 255, 256, 257, 65536] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for place in [0, length / 2, length.saturating_sub(1)] {
                if let Some(byte) = bytes.get_mut(place) {
                    *byte = 1;
                    assert!(!is_zero(&bytes), "{place} of {length}");
                    bytes[place] = 0;
                }
            }
        }
    }

    #[test]
    fn blocks_of_a_view() {
        assert_eq!(block_count(0), 0);
        assert_eq!(block_count(1), 1);
        assert_eq!(block_count(65536), 1);
        assert_eq!(block_count(65537), 2);
        assert_eq!(block_count(u64::MAX), 1 << 48);
    }
}
