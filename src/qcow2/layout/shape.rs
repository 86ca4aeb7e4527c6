//! What becomes of one cluster of the target: left out, zero, moved whole, copied compressed, or composed.

use crate::qcow2::format::SUBCLUSTERS;
use crate::qcow2::layout::clusters::{Fill, Piece};
use crate::qcow2::layout::{ImageOptions, SourceFacts};
use crate::qcow2::map::CompressedCluster;
use crate::qcow2::tables::Subclusters;
use crate::units::HostOffset;

/// The decision for one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// No entry.
    Nothing,
    /// Zeros (in the subclusters named; the rest has no entry).
    Zero(Subclusters),
    /// One cluster's worth of a source file, moved as it is.
    Whole { layer: usize, host: HostOffset, subclusters: Subclusters },
    /// A compressed cluster, moved as it is.
    Compressed { layer: usize, cluster: CompressedCluster },
    /// Put together from pieces, in memory.
    Composed(Subclusters),
}

/// How the shapes of clusters are decided.
#[derive(Debug)]
pub struct Shaper<'a> {
    pub options: &'a ImageOptions,
    pub sources: &'a [SourceFacts],
}

impl Shaper<'_> {
    /// The shape of clusters that one uncompressed piece fills, the first of them at its start.
    pub fn same(&self, piece: &Piece) -> Shape {
        match piece.fill {
            Fill::Below | Fill::Nothing => Shape::Nothing,
            Fill::Zero => Shape::Zero(Subclusters::ZERO),
            Fill::Data { layer, host } if self.movable(layer, host) => {
                Shape::Whole { layer, host, subclusters: Subclusters::ALLOCATED }
            }
            Fill::Data { .. } | Fill::Compressed { .. } => Shape::Composed(Subclusters::ALLOCATED),
        }
    }

    /// The shape of one cluster made of `pieces`, which cover it from its start, up to its end or the
    /// image's.
    pub fn mixed(&self, cluster: u64, pieces: &[Piece]) -> Shape {
        if let [Piece { length, fill: Fill::Compressed { layer, cluster: stored }, start }] = *pieces
            && length == self.options.cluster_bits.bytes()
            && stored.guest == start
            && self.sources.get(layer).is_some_and(|source| {
                source.cluster_bits == self.options.cluster_bits
                    && source.compression == self.options.compression
            })
        {
            return Shape::Compressed { layer, cluster: stored };
        }
        if self.options.extended_l2 { self.mixed_extended(cluster, pieces) } else { mixed_standard(pieces) }
    }

    fn mixed_extended(&self, cluster: u64, pieces: &[Piece]) -> Shape {
        let size = self.options.cluster_bits.bytes();
        let start = cluster * size;
        let sub = size / u64::from(SUBCLUSTERS);
        let (mut allocated, mut zero) = (0u32, 0u32);
        let mut base = Base::NotSeen;
        for index in 0..SUBCLUSTERS {
            let from = start + u64::from(index) * sub;
            let state = SubState::of(pieces, from, from + sub);
            if state.allocated() {
                allocated |= 1 << index;
                base = self.one_base(base, pieces, start, (from, from + sub));
            } else if state.zero {
                zero |= 1 << index;
            }
        }
        // Disjoint by construction: a subcluster is one or the other.
        let Some(subclusters) = Subclusters::new(allocated, zero) else { return Shape::Nothing };
        match (allocated, zero) {
            (0, 0) => Shape::Nothing,
            (0, _) => Shape::Zero(subclusters),
            _ => match base {
                Base::At(layer, host) if !self.cut(start, start + size) => {
                    Shape::Whole { layer, host, subclusters }
                }
                _ => Shape::Composed(subclusters),
            },
        }
    }

    /// Where, after this subcluster too, all data seen lies.
    fn one_base(&self, so_far: Base, pieces: &[Piece], cluster_start: u64, (from, to): (u64, u64)) -> Base {
        let Some(piece) = pieces.iter().find(|piece| piece.start.0 <= from && to <= piece.end()) else {
            return Base::Several;
        };
        let Fill::Data { layer, host } = piece.fill else { return Base::Several };
        let (Some(base), Some(source)) =
            (host.0.checked_sub(piece.start.0 - cluster_start), self.sources.get(layer))
        else {
            return Base::Several;
        };
        let fits = source.cluster_bits >= self.options.cluster_bits
            && self.options.cluster_bits.within(base) == 0
            && base != 0;
        let here = Base::At(layer, HostOffset(base));
        if fits && (so_far == Base::NotSeen || so_far == here) { here } else { Base::Several }
    }

    /// Whether some source's disk ends inside `(from, to)`: bytes past its end may be stale, so such a
    /// cluster is composed and never moved.
    fn cut(&self, from: u64, to: u64) -> bool {
        self.sources.iter().any(|source| from < source.virtual_size && source.virtual_size < to)
    }

    /// Whether data at `host` of a layer can be moved in units of [`SourceFacts::unit_bits`].
    fn movable(&self, layer: usize, host: HostOffset) -> bool {
        self.sources.get(layer).is_some_and(|source| {
            host.0 != 0 && source.unit_bits(self.options.cluster_bits).within(host.0) == 0
        })
    }
}

/// Whether all data of a cluster lies in one host cluster of one source, at the places it has in the guest
/// cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    NotSeen,
    At(usize, HostOffset),
    Several,
}

/// What the pieces of one subcluster are made of.
#[derive(Clone, Copy, Debug, Default)]
struct SubState {
    data: bool,
    zero: bool,
    below: bool,
}

impl SubState {
    fn of(pieces: &[Piece], from: u64, to: u64) -> Self {
        let mut state = Self::default();
        for piece in pieces.iter().filter(|piece| piece.start.0 < to && from < piece.end()) {
            match piece.fill {
                Fill::Data { .. } | Fill::Compressed { .. } => state.data = true,
                Fill::Zero => state.zero = true,
                Fill::Below => state.below = true,
                Fill::Nothing => {}
            }
        }
        state
    }

    /// It needs bytes of its own: it has data, or zeros and something below that one bit cannot tell apart.
    fn allocated(self) -> bool {
        self.data || (self.zero && self.below)
    }
}

fn mixed_standard(pieces: &[Piece]) -> Shape {
    let state = SubState::of(pieces, 0, u64::MAX);
    if state.allocated() {
        Shape::Composed(Subclusters::ALLOCATED)
    } else if state.zero {
        Shape::Zero(Subclusters::ZERO)
    } else {
        Shape::Nothing
    }
}
