//! The digest's definition, a second time.

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
