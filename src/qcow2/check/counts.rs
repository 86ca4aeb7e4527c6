//! How often each host cluster was referred to, and as what; sparse.

use std::collections::BTreeMap;

use crate::failure::Code;

/// Clusters of one piece.
const PIECE: usize = 512;

/// What one piece takes: a count of two bytes and a byte of uses for each cluster.
const PIECE_BYTES: u64 = 3 * PIECE as u64;

/// As what a cluster is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Anything that has one reference: header, tables but L2, refcount blocks, bitmaps.
    Metadata,
    /// An L2 table of the active L1 table.
    ActiveTable,
    /// A plain cluster of the active L2 tables.
    ActiveData,
    /// Part of a compressed cluster; they share host clusters.
    Compressed,
    /// An L2 table of a snapshot, which may be an active one too.
    SnapshotTable,
    /// A plain cluster of a snapshot, which may be an active one too.
    SnapshotData,
}

impl Use {
    fn bit(self) -> u8 {
        match self {
            Self::Metadata => 1,
            Self::ActiveTable => 2,
            Self::ActiveData => 4,
            Self::Compressed => 8,
            Self::SnapshotTable => 16,
            Self::SnapshotData => 32,
        }
    }

    /// What it means that a cluster with the uses `before` is used so, if that may not be.
    fn conflict(self, before: u8) -> Option<Code> {
        let same = before & self.bit() != 0;
        match self {
            Self::ActiveTable | Self::ActiveData if same => return Some(Code::SharedCluster),
            Self::Metadata if same => return Some(Code::Overlap),
            _ => {}
        }
        let friends = match self {
            Self::Metadata => 0,
            Self::ActiveTable | Self::SnapshotTable => Self::ActiveTable.bit() | Self::SnapshotTable.bit(),
            Self::ActiveData | Self::SnapshotData => Self::ActiveData.bit() | Self::SnapshotData.bit(),
            Self::Compressed => Self::Compressed.bit(),
        };
        (before & !friends != 0).then_some(Code::Overlap)
    }
}

#[derive(Debug)]
struct Piece {
    counts: [u16; PIECE],
    uses: [u8; PIECE],
}

/// The counters. Memory: 1.5 KiB for each 512 clusters of which one is used, up to the limit.
#[derive(Debug)]
pub(super) struct Counts {
    pieces: BTreeMap<u64, Box<Piece>>,
    room: u64,
    overflowed: bool,
}

impl Counts {
    pub(super) fn new(limit_bytes: u64) -> Self {
        Self { pieces: BTreeMap::new(), room: limit_bytes / PIECE_BYTES, overflowed: false }
    }

    /// Counts a reference, up to 65,535; gives what is wrong with it.
    pub(super) fn add(&mut self, cluster: u64, usage: Use) -> Option<Code> {
        let (key, slot) = place(cluster);
        if !self.pieces.contains_key(&key) {
            if self.pieces.len() as u64 >= self.room {
                self.overflowed = true;
                return None;
            }
            self.pieces.insert(key, Box::new(Piece { counts: [0; PIECE], uses: [0; PIECE] }));
        }
        let piece = self.pieces.get_mut(&key)?;
        let (count, uses) = (piece.counts.get_mut(slot)?, piece.uses.get_mut(slot)?);
        *count = count.saturating_add(1);
        let conflict = usage.conflict(*uses);
        *uses |= usage.bit();
        conflict
    }

    /// Whether some references did not fit.
    pub(super) fn overflowed(&self) -> bool {
        self.overflowed
    }

    /// References to a cluster; 65,535 stands for that and more.
    pub(super) fn count(&self, cluster: u64) -> u16 {
        let (key, slot) = place(cluster);
        self.pieces.get(&key).and_then(|piece| piece.counts.get(slot)).copied().unwrap_or_default()
    }

    /// The clusters that are referred to, in order, with their counts.
    pub(super) fn all(&self) -> impl Iterator<Item = (u64, u16)> {
        self.pieces.iter().flat_map(|(key, piece)| {
            let first = key * PIECE as u64;
            (first..).zip(piece.counts).filter(|(_, count)| *count > 0)
        })
    }
}

fn place(cluster: u64) -> (u64, usize) {
    let slot = usize::try_from(cluster % PIECE as u64).unwrap_or_default();
    (cluster / PIECE as u64, slot)
}
