//! What is said between zones.
//!
//! | route | answer |
//! |---|---|
//! | `GET /v1/peer/chain?member=` | [`Chain`]: the members that it stands on, base first |
//! | `GET /v1/peer/table?member=&digest=&table=&offset=&length=` | bytes of its leaf table |
//! | `POST /v1/peer/blocks` with [`BlocksRequest`] | frames, one a block, in the order in which the blocks lie in the files |
//! | `GET /v1/peer/checkpoint?member=&digest=` | its checkpoint file |
//!
//! A frame: the block's number in 8 bytes, a word of 4, little-endian both, and so many bytes as the word's lower 31 bits
//! say: the block's 65,536, or, with bit 31 set, those compressed by zstd. Each block proves itself by its leaf. All other
//! answers have the header [`SEAL`]: the BLAKE3 of the request's path and query, a line feed, and the answer's bytes. So what a
//! line changed, or answered to another request, is noticed where there is no TLS, too.

use hyper::body::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::ids::Digest;
use crate::ops::copy::LineMember;
use crate::ops::copy::offer::Given;
use crate::store::manifest::Blocks;
use crate::units::BLOCK_LENGTH;

/// The length of what comes before a block, in bytes.
pub const HEAD_LENGTH: usize = 12;
/// In a frame's word: the block is compressed.
const COMPRESSED: u32 = 1 << 31;
/// The longest message in JSON, in bytes.
pub const MOST_JSON: u64 = 16 << 20;

/// The header that says what an answer was when it was given.
pub const SEAL: &str = "qchain-seal";

/// The seal of an answer to a request for that path and query.
#[must_use]
pub fn seal(target: &str, bytes: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(target.as_bytes()).update(b"\n").update(bytes);
    Digest(*hasher.finalize().as_bytes())
}

/// The line of a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
// Of two descriptions of one name the last one holds for both.
#[schema(as = PeerChain)]
pub struct Chain {
    /// The version of documents.
    pub schema: u32,
    /// Base first.
    pub members: Vec<LineMember>,
}

impl Chain {
    /// Reads one; the error says what is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes).map_err(|error| error.to_string())
    }
}

/// Whose line is asked for.
#[derive(Clone, Debug, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ChainQuery {
    /// The member: `[STORE:]install/path`, whole.
    pub member: String,
}

/// Which bytes of a leaf table are asked for.
#[derive(Clone, Debug, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct TableQuery {
    /// The member.
    pub member: String,
    /// Its view digest.
    #[param(value_type = String)]
    pub digest: Digest,
    /// The table's BLAKE3.
    #[param(value_type = String)]
    pub table: Digest,
    /// The first byte.
    pub offset: u64,
    /// How many.
    pub length: u64,
}

/// Whose checkpoint file is asked for.
#[derive(Clone, Debug, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct CheckpointQuery {
    /// The member.
    pub member: String,
    /// Its view digest.
    #[param(value_type = String)]
    pub digest: Digest,
}

/// Which blocks are asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BlocksRequest {
    /// The member.
    pub member: String,
    /// Its view digest.
    pub digest: Digest,
    /// First block and count of each range, ascending.
    pub ranges: Vec<(u64, u64)>,
    /// Nothing is to be compressed.
    #[serde(default)]
    pub plain: bool,
}

impl BlocksRequest {
    /// The ranges.
    #[must_use]
    pub fn blocks(&self) -> Vec<Blocks> {
        self.ranges.iter().map(|(first, count)| Blocks { first: *first, count: *count }).collect()
    }
}

/// Blocks that have room for the heads of frames before them, as frames; compressed where that makes one smaller by an
/// eighth at least. Where nothing does, nothing is copied.
#[must_use]
pub fn framed(mut given: Given, plain: bool) -> Bytes {
    let mut bodies = Vec::new();
    for (block, frame) in given.iter_mut() {
        let Some((head, body)) = frame.split_first_chunk_mut::<HEAD_LENGTH>() else { continue };
        let packed = if plain { None } else { packed(body) };
        *head = head_of(block, packed.as_ref().map_or((0, body.len()), |packed| (COMPRESSED, packed.len())));
        bodies.push(packed);
    }
    if bodies.iter().all(Option::is_none) {
        return Bytes::from_owner(given);
    }
    let mut frames = Vec::new();
    for ((_, frame), packed) in given.iter_mut().zip(bodies) {
        match packed {
            Some(packed) => {
                frames.extend_from_slice(frame.get(..HEAD_LENGTH).unwrap_or_default());
                frames.extend_from_slice(&packed);
            }
            None => frames.extend_from_slice(frame),
        }
    }
    Bytes::from(frames)
}

/// What a frame begins with.
fn head_of(block: u64, (flag, length): (u32, usize)) -> [u8; HEAD_LENGTH] {
    let mut head = [0; HEAD_LENGTH];
    let word = u32::try_from(length).unwrap_or_default() | flag;
    let bytes = block.to_le_bytes().into_iter().chain(word.to_le_bytes());
    head.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    head
}

fn packed(bytes: &[u8]) -> Option<Vec<u8>> {
    // What does not get smaller mostly shows that in its beginning.
    let sample = bytes.get(..SAMPLE_LENGTH.min(bytes.len()))?;
    if sample.len() < bytes.len() && zstd::bulk::compress(sample, 1).ok()?.len() > sample.len() / 8 * 7 {
        return None;
    }
    let packed = zstd::bulk::compress(bytes, 1).ok()?;
    (packed.len() <= bytes.len() / 8 * 7).then_some(packed)
}

/// How much of a block is tried first.
const SAMPLE_LENGTH: usize = 4096;

/// Why bytes are no frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameFault {
    /// A length that no block has.
    #[error("a block of {0} bytes")]
    Length(u32),
    /// They end within a frame.
    #[error("they end in the middle of a block")]
    Short,
}

/// Reads frames from pieces of any length. Memory: one frame.
#[derive(Debug, Default)]
pub struct Frames {
    pending: Vec<u8>,
}

impl Frames {
    /// Takes more bytes; gives each block that is whole. One that was compressed and cannot be unpacked is given as no
    /// bytes, which hash to nothing that is asked for.
    ///
    /// # Errors
    ///
    /// A frame that cannot be one, as `E`, or what `take` fails with.
    pub fn push<E: From<FrameFault>>(
        &mut self,
        mut bytes: &[u8],
        mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        loop {
            // A frame that came whole is not copied.
            if self.pending.is_empty()
                && let Some((block, word)) = head(bytes)
                && let Some(body) = bytes.get(HEAD_LENGTH..whole(word)?)
            {
                give(block, word, body, &mut take)?;
                bytes = bytes.get(HEAD_LENGTH + body.len()..).unwrap_or_default();
                continue;
            }
            let wanted = head(&self.pending).map_or(Ok(HEAD_LENGTH), |(_, word)| whole(word))?;
            let missing = wanted.saturating_sub(self.pending.len());
            if missing == 0 {
                // The head alone is never all of a frame.
                let (block, word) = head(&self.pending).unwrap_or_default();
                give(block, word, self.pending.get(HEAD_LENGTH..).unwrap_or_default(), &mut take)?;
                self.pending.clear();
                continue;
            }
            if bytes.is_empty() {
                return Ok(());
            }
            let (part, rest) = bytes.split_at(missing.min(bytes.len()));
            self.pending.extend_from_slice(part);
            bytes = rest;
        }
    }

    /// The end of the bytes.
    pub fn finish(&self) -> Result<(), FrameFault> {
        if self.pending.is_empty() { Ok(()) } else { Err(FrameFault::Short) }
    }
}

fn give<E>(
    block: u64,
    word: u32,
    body: &[u8],
    take: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    if word & COMPRESSED == 0 {
        return take(block, body);
    }
    take(block, &zstd::bulk::decompress(body, BLOCK_LENGTH).unwrap_or_default())
}

/// The number and the word that a frame begins with.
fn head(bytes: &[u8]) -> Option<(u64, u32)> {
    let (head, _) = bytes.split_first_chunk::<HEAD_LENGTH>()?;
    let (block, word) = head.split_at(8);
    Some((u64::from_le_bytes(block.try_into().ok()?), u32::from_le_bytes(word.try_into().ok()?)))
}

/// How many bytes a frame with that word has.
fn whole(word: u32) -> Result<usize, FrameFault> {
    let length = word & !COMPRESSED;
    let bytes = usize::try_from(length).unwrap_or(usize::MAX);
    let fits = if word & COMPRESSED == 0 { bytes == BLOCK_LENGTH } else { bytes > 0 && bytes < BLOCK_LENGTH };
    if fits { Ok(HEAD_LENGTH + bytes) } else { Err(FrameFault::Length(length)) }
}

/// A text as it stands in a query.
#[must_use]
pub fn encoded(text: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_./:".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{COMPRESSED, FrameFault, Frames, HEAD_LENGTH, head_of, packed};

    /// A block as a frame.
    fn frame(block: u64, bytes: &[u8], plain: bool) -> Vec<u8> {
        match packed(bytes).filter(|_| !plain) {
            Some(packed) => [&head_of(block, (COMPRESSED, packed.len()))[..], &packed].concat(),
            None => [&head_of(block, (0, bytes.len()))[..], bytes].concat(),
        }
    }

    fn read(bytes: &[u8], step: usize) -> Result<Vec<(u64, Vec<u8>)>, FrameFault> {
        let (mut frames, mut found) = (Frames::default(), Vec::new());
        for part in bytes.chunks(step) {
            frames.push::<FrameFault>(part, |block, bytes| {
                found.push((block, bytes.to_vec()));
                Ok(())
            })?;
        }
        frames.finish().map(|()| found)
    }

    #[test]
    fn frames_are_read_as_they_were_written() {
        let zeros = vec![0; 65536];
        let noise: Vec<u8> = (0..65536_u64).map(|at| blake3::hash(&at.to_le_bytes()).as_bytes()[0]).collect();
        assert!(frame(1, &zeros, false).len() < 200);
        assert_eq!(frame(1, &zeros, true).len(), HEAD_LENGTH + 65536);
        assert_eq!(frame(1, &noise, false).len(), HEAD_LENGTH + 65536);
        let bytes =
            [frame(7, &zeros, false), frame(u64::MAX, &noise, false), frame(9, &zeros, true)].concat();
        for step in [1, 11, 12, 13, 65536, 1 << 20] {
            let found = read(&bytes, step).unwrap();
            assert_eq!(found.iter().map(|(block, _)| *block).collect::<Vec<_>>(), [7, u64::MAX, 9]);
            assert!(found[0].1 == zeros && found[1].1 == noise && found[2].1 == zeros);
        }
        assert_eq!(read(&bytes[..bytes.len() - 1], 1 << 20), Err(FrameFault::Short));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..400), step in 1usize..50) {
            if let Ok(found) = read(&bytes, step) {
                prop_assert!(found.iter().all(|(_, bytes)| bytes.len() <= 65536));
            }
        }

        #[test]
        fn a_bomb_is_no_block(length in 65_537usize..2_000_000) {
            let packed = zstd::bulk::compress(&vec![0; length], 1).unwrap();
            let word = u32::try_from(packed.len()).unwrap() | COMPRESSED;
            let bytes = [&1_u64.to_le_bytes()[..], &word.to_le_bytes(), &packed].concat();
            prop_assert_eq!(read(&bytes, 1 << 20).unwrap(), vec![(1, vec![])]);
        }
    }
}
