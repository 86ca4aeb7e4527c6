//! The digest's definition, a second time.

use std::collections::{BTreeMap, HashMap};

/// The digest's definition, level by level, of a raw image.
pub fn plain_digest(view: &[u8]) -> String {
    let mut level: Vec<[u8; 32]> = view
        .chunks(65536)
        .map(|block| {
            let mut block = block.to_vec();
            block.resize(65536, 0);
            *blake3::hash(&block).as_bytes()
        })
        .collect();
    while level.len() > 1 {
        level = level.chunks(256).map(|node| *blake3::hash(&node.concat()).as_bytes()).collect();
    }
    let top = level.first().copied().unwrap_or(*blake3::hash(&[]).as_bytes());
    let mut bytes = top.to_vec();
    bytes.extend((view.len() as u64).to_le_bytes());
    blake3::hash(&bytes).to_hex().to_string()
}

const BLOCK: u64 = 65_536;

/// The same of a huge disk of which only some sectors of 512 bytes are written, `offset -> byte`, top down.
pub fn sparse_digest(size: u64, written: &BTreeMap<u64, u8>) -> String {
    let blocks = size.div_ceil(BLOCK);
    let mut height = 0;
    while 256_u64.pow(height) < blocks {
        height += 1;
    }
    let sparse = Sparse { blocks, written };
    let mut bytes = sparse.node(height, 0, &mut HashMap::new()).to_vec();
    bytes.extend(size.to_le_bytes());
    blake3::hash(&bytes).to_hex().to_string()
}

struct Sparse<'a> {
    blocks: u64,
    written: &'a BTreeMap<u64, u8>,
}

impl Sparse<'_> {
    /// The node over `256^height` blocks from `first`, fewer at the end.
    fn node(&self, height: u32, first: u64, zeros: &mut HashMap<u32, [u8; 32]>) -> [u8; 32] {
        let width = 256_u64.pow(height);
        let end = (first + width).min(self.blocks);
        let empty = self.written.range(first * BLOCK..end * BLOCK).next().is_none();
        let full = end - first == width;
        if let Some(known) = zeros.get(&height).filter(|_| empty && full) {
            return *known;
        }
        let hash = if height == 0 {
            let mut block = vec![0; usize::try_from(BLOCK).unwrap()];
            for (at, byte) in self.written.range(first * BLOCK..end * BLOCK) {
                let from = usize::try_from(at - first * BLOCK).unwrap();
                block[from..from + 512].fill(*byte);
            }
            blake3::hash(&block)
        } else {
            let step = usize::try_from(width / 256).unwrap();
            let children = (first..end).step_by(step).map(|child| self.node(height - 1, child, zeros));
            blake3::hash(&children.collect::<Vec<_>>().concat())
        };
        if empty && full {
            zeros.insert(height, *hash.as_bytes());
        }
        *hash.as_bytes()
    }
}
