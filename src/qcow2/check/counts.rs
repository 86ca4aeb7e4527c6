//! How often each host cluster was referred to, and as what; sparse.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};

use crate::failure::Code;

/// Clusters of one piece.
const PIECE: usize = 512;

/// What one piece takes: a byte for each cluster.
const PIECE_BYTES: u64 = PIECE as u64;

/// What one count above [`FEW`] takes besides, with what a map needs for it.
const MANY_BYTES: u64 = 64;

/// The uses in a cluster's byte; the bits above are its count, if that is at most [`FEW`].
const USES: u8 = 0x3f;
const COUNT_SHIFT: u32 = 6;
const FEW: u8 = 2;

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

/// The counters. Memory: half a KiB for each 512 clusters of which one is used, and 64 bytes for each cluster that is
/// used more than twice, up to the limit.
#[derive(Debug)]
pub(super) struct Counts {
    pieces: BTreeMap<u64, Box<[u8; PIECE]>>,
    /// The counts that do not fit into a cluster's byte.
    many: HashMap<u64, u16>,
    /// In bytes.
    room: u64,
    overflowed: bool,
}

impl Counts {
    pub(super) fn new(limit_bytes: u64) -> Self {
        Self { pieces: BTreeMap::new(), many: HashMap::new(), room: limit_bytes, overflowed: false }
    }

    /// Counts `times` references, up to 65,535; gives what is wrong with them.
    pub(super) fn add(&mut self, cluster: u64, times: u16, usage: Use) -> Option<Code> {
        let (key, slot) = place(cluster);
        let piece = match self.pieces.entry(key) {
            Entry::Occupied(piece) => piece.into_mut(),
            Entry::Vacant(place) => {
                self.overflowed |= self.room < PIECE_BYTES;
                self.room = self.room.checked_sub(PIECE_BYTES)?;
                place.insert(Box::new([0; PIECE]))
            }
        };
        let cell = piece.get_mut(slot)?;
        let uses = *cell & USES;
        let before = *cell >> COUNT_SHIFT;
        let after = u16::from(before).saturating_add(times);
        if before <= FEW && after <= u16::from(FEW) {
            *cell += u8::try_from(times).unwrap_or_default() << COUNT_SHIFT;
        } else if before > FEW {
            let many = self.many.get_mut(&cluster)?;
            *many = many.saturating_add(times);
        } else {
            self.overflowed |= self.room < MANY_BYTES;
            self.room = self.room.checked_sub(MANY_BYTES)?;
            *cell |= !USES;
            self.many.insert(cluster, after);
        }
        *cell |= usage.bit();
        usage.conflict(uses)
    }

    /// Whether some references did not fit.
    pub(super) fn overflowed(&self) -> bool {
        self.overflowed
    }

    /// References to a cluster; 65,535 stands for that and more.
    pub(super) fn count(&self, cluster: u64) -> u16 {
        let (key, slot) = place(cluster);
        self.pieces
            .get(&key)
            .and_then(|piece| piece.get(slot))
            .map_or(0, |cell| self.count_of(cluster, *cell))
    }

    fn count_of(&self, cluster: u64, cell: u8) -> u16 {
        match cell >> COUNT_SHIFT {
            few @ 0..=FEW => u16::from(few),
            _ => self.many.get(&cluster).copied().unwrap_or_default(),
        }
    }

    /// The clusters that are referred to, in order, with their counts.
    pub(super) fn all(&self) -> impl Iterator<Item = (u64, u16)> {
        self.pieces.iter().flat_map(|(key, piece)| {
            let first = key * PIECE as u64;
            let used = (first..).zip(piece.iter()).filter(|(_, cell)| **cell > 0);
            used.map(|(cluster, cell)| (cluster, self.count_of(cluster, *cell)))
        })
    }
}

fn place(cluster: u64) -> (u64, usize) {
    let slot = usize::try_from(cluster % PIECE as u64).unwrap_or_default();
    (cluster / PIECE as u64, slot)
}
