//! The view through a chain: several images' extents resolved to one map.
//!
//! Layers are given newest first. At each guest offset the newest layer that says something decides; a layer
//! says "zero" for everything at or past its own virtual size, whatever lies below it (design, section 4).
//! What no layer decides is [`Content::Below`].
//!
//! Memory: one cursor a layer, each with whatever window its extents hold. Time: the extents of all layers that are
//! not hidden by newer ones, times the logarithm of the number of layers and, for 64 layers each, a look at a word.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::qcow2::map::{Content, Extent, ExtentKind, Run, coalesce};
use crate::units::GuestOffset;

/// How many extents a cursor steps over before it asks its layer for a new start instead.
const STEPS_BEFORE_SEEK: usize = 32;

/// One image as a view sees it.
pub trait Layer: Clone {
    /// What reading its tables can fail with.
    type Error;
    /// Its own extents.
    type Extents: Iterator<Item = Result<Extent, Self::Error>>;

    /// Its virtual size in bytes.
    fn virtual_size(&self) -> u64;

    /// Its extents from `from` (below the virtual size) to its virtual size, in order, without gaps.
    fn extents(&self, from: GuestOffset) -> Self::Extents;

    /// Makes `extents`, which this layer gave, go on at `to`, as those from there would. For layers that
    /// can keep what they have read.
    fn seek(&self, extents: &mut Self::Extents, to: GuestOffset) {
        *extents = self.extents(to);
    }
}

/// The map of `[from, to)` of the newest layer's disk (clipped at its virtual size), as maximal runs.
/// After an error nothing follows.
pub fn view<L: Layer>(
    layers: &[L],
    from: GuestOffset,
    to: GuestOffset,
) -> impl Iterator<Item = Result<Run, L::Error>> + use<L> {
    let end = layers.first().map_or(0, Layer::virtual_size).min(to.0);
    coalesce(View {
        cursors: layers.iter().cloned().map(Cursor::new).collect(),
        position: from,
        end: GuestOffset(end),
        failed: false,
        ends: BinaryHeap::new(),
        deciding: Layers::none(layers.len()),
        unknown: Layers::all(layers.len()),
    })
}

/// Of a thousand layers few have something to say at one place, and the word of most holds for a long way: a layer is
/// looked at again only where what it said last ends, and only while no newer one decides there.
struct View<L: Layer> {
    cursors: Vec<Cursor<L>>,
    position: GuestOffset,
    end: GuestOffset,
    failed: bool,
    /// Where the extent ends in which each known layer is.
    ends: BinaryHeap<Reverse<(GuestOffset, usize)>>,
    /// The known layers that say something at the position.
    deciding: Layers,
    /// The layers of which what was known has ended.
    unknown: Layers,
}

impl<L: Layer> View<L> {
    /// The run at the position, as far as one decision holds and no layer that was looked at has more to say.
    fn resolve(&mut self) -> Result<Run, L::Error> {
        let start = self.position;
        while let Some(Reverse((end, layer))) = self.ends.peek().copied()
            && end <= start
        {
            self.ends.pop();
            self.deciding.remove(layer);
            self.unknown.insert(layer);
        }
        while let Some(layer) = self.unknown.first()
            && self.deciding.first().is_none_or(|decides| layer < decides)
            && let Some(cursor) = self.cursors.get_mut(layer)
        {
            let extent = cursor.at(start)?;
            self.unknown.remove(layer);
            self.ends.push(Reverse((extent.end(), layer)));
            if extent.kind != ExtentKind::Below {
                self.deciding.insert(layer);
            }
        }
        let end = self.ends.peek().map_or(self.end, |Reverse((end, _))| self.end.min(*end));
        let decides = self.deciding.first();
        let extent = decides.and_then(|layer| Some((layer, self.cursors.get(layer)?.current?)));
        let content = match extent {
            None => Content::Below,
            Some((layer, extent)) => match extent.kind {
                ExtentKind::Below => Content::Below,
                ExtentKind::Zero => Content::Zero,
                ExtentKind::Data { host } => {
                    Content::Data { layer, host: host.plus(start.0 - extent.start.0) }
                }
                ExtentKind::Compressed(cluster) => Content::Compressed { layer, cluster },
            },
        };
        Ok(run(start, end, content))
    }
}

fn run(start: GuestOffset, end: GuestOffset, content: Content) -> Run {
    Run { start, length: end.0 - start.0, content }
}

impl<L: Layer> Iterator for View<L> {
    type Item = Result<Run, L::Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.position >= self.end {
            return None;
        }
        let resolved = self.resolve();
        match &resolved {
            Ok(run) => self.position = run.end(),
            Err(_) => self.failed = true,
        }
        Some(resolved)
    }
}

/// A set of layers, a bit each: it changes with every extent, and the newest in it is what is asked for.
struct Layers(Vec<u64>);

impl Layers {
    fn none(count: usize) -> Self {
        Self(vec![0; count.div_ceil(64)])
    }

    fn all(count: usize) -> Self {
        let mut all = Self::none(count);
        (0..count).for_each(|layer| all.insert(layer));
        all
    }

    fn insert(&mut self, layer: usize) {
        if let Some(word) = self.0.get_mut(layer / 64) {
            *word |= 1 << (layer % 64);
        }
    }

    fn remove(&mut self, layer: usize) {
        if let Some(word) = self.0.get_mut(layer / 64) {
            *word &= !(1 << (layer % 64));
        }
    }

    fn first(&self) -> Option<usize> {
        let (at, word) = self.0.iter().enumerate().find(|(_, word)| **word != 0)?;
        Some(at * 64 + word.trailing_zeros() as usize)
    }
}

/// One layer's extents, moving up with the view.
struct Cursor<L: Layer> {
    layer: L,
    extents: Option<L::Extents>,
    current: Option<Extent>,
}

impl<L: Layer> Cursor<L> {
    fn new(layer: L) -> Self {
        Self { layer, extents: None, current: None }
    }

    /// The extent that holds `offset`; at or past the layer's end zeros without end. Offsets only go up.
    fn at(&mut self, offset: GuestOffset) -> Result<Extent, L::Error> {
        let extent = match self.layer.virtual_size().checked_sub(offset.0) {
            None | Some(0) => Extent { start: offset, length: u64::MAX - offset.0, kind: ExtentKind::Zero },
            Some(rest) => {
                // An image that ends before its own virtual size has nothing more to say.
                let silence = Extent { start: offset, length: rest, kind: ExtentKind::Below };
                self.find(offset)?.unwrap_or(silence)
            }
        };
        self.current = Some(extent);
        Ok(extent)
    }

    /// The extent that holds an offset within the layer.
    fn find(&mut self, offset: GuestOffset) -> Result<Option<Extent>, L::Error> {
        for _ in 0..STEPS_BEFORE_SEEK {
            if let Some(extent) = self.current
                && extent.start <= offset
                && offset < extent.end()
            {
                return Ok(Some(extent));
            }
            let Some(extents) = &mut self.extents else { break };
            self.current = extents.next().transpose()?;
            if self.current.is_none() {
                break;
            }
        }
        let extents = match &mut self.extents {
            Some(extents) => {
                self.layer.seek(extents, offset);
                extents
            }
            none => none.insert(self.layer.extents(offset)),
        };
        extents.next().transpose()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Layer, view};
    use crate::qcow2::map::{CompressedCluster, Content, Extent, ExtentKind, Run};
    use crate::units::{GuestOffset, HostOffset};

    /// A layer of 16-byte cells: 0 below, 1 zero, 2 data at cell*16 (+1000), 3 a compressed cell.
    #[derive(Clone, Debug)]
    struct Cells(Vec<u8>, u64);

    impl Layer for Cells {
        type Error = String;
        type Extents = std::vec::IntoIter<Result<Extent, String>>;

        fn virtual_size(&self) -> u64 {
            self.1
        }

        fn extents(&self, from: GuestOffset) -> Self::Extents {
            let mut all = Vec::new();
            for (index, cell) in self.0.iter().enumerate() {
                let cell_start = index as u64 * 16;
                let start = cell_start.max(from.0);
                let end = (cell_start + 16).min(self.1);
                if start >= end {
                    continue;
                }
                let guest = GuestOffset(cell_start);
                let kind = match cell {
                    0 => ExtentKind::Below,
                    1 => ExtentKind::Zero,
                    2 => ExtentKind::Data { host: HostOffset(start + 1000) },
                    _ => ExtentKind::Compressed(CompressedCluster {
                        guest,
                        host: HostOffset(7),
                        stored_bytes: 9,
                    }),
                };
                all.push(Ok(Extent { start: GuestOffset(start), length: end - start, kind }));
            }
            all.into_iter()
        }
    }

    /// Byte by byte, the slow and obvious way.
    fn expected(layers: &[Cells], offset: u64) -> Content {
        for (layer, cells) in layers.iter().enumerate() {
            if offset >= cells.1 {
                return Content::Zero;
            }
            let guest = GuestOffset(offset / 16 * 16);
            match cells.0[usize::try_from(offset / 16).unwrap()] {
                0 => {}
                1 => return Content::Zero,
                2 => return Content::Data { layer, host: HostOffset(offset + 1000) },
                _ => {
                    let cluster = CompressedCluster { guest, host: HostOffset(7), stored_bytes: 9 };
                    return Content::Compressed { layer, cluster };
                }
            }
        }
        Content::Below
    }

    fn layer() -> impl Strategy<Value = Cells> {
        (prop::collection::vec(0u8..4, 0..100), 0u64..16).prop_map(|(cells, cut)| {
            let size = (cells.len() as u64 * 16).saturating_sub(cut);
            Cells(cells, size)
        })
    }

    proptest! {
        #[test]
        fn a_view_is_what_each_byte_resolves_to(
            layers in prop::collection::vec(layer(), 1..5),
            from in 0u64..64,
            length in 1u64..1600,
        ) {
            let to = GuestOffset(from + length);
            let end = layers[0].1.min(to.0);
            let runs: Vec<Run> = view(&layers, GuestOffset(from), to).collect::<Result<_, _>>().unwrap();
            let mut position = from;
            for (index, run) in runs.iter().enumerate() {
                prop_assert_eq!(run.start.0, position);
                prop_assert!(run.length > 0);
                for offset in run.start.0..run.end().0 {
                    let skipped = run.content.skip(offset - run.start.0);
                    prop_assert_eq!(skipped, expected(&layers, offset), "offset {}", offset);
                }
                if index > 0 {
                    prop_assert!(!runs[index - 1].continued_by(run), "runs are not maximal");
                }
                position = run.end().0;
            }
            prop_assert_eq!(position, end.max(from));
        }
    }

    #[test]
    fn what_lies_past_a_members_end_is_zero_also_over_a_longer_one() {
        // P 128 over which A of 96, over which B of 128 that holds nothing.
        let layers = [Cells(vec![0; 8], 128), Cells(vec![0, 0, 0, 0, 2, 0], 96), Cells(vec![2; 8], 128)];
        let runs: Vec<Run> =
            view(&layers, GuestOffset(0), GuestOffset(u64::MAX)).collect::<Result<_, _>>().unwrap();
        let last = runs.last().unwrap();
        assert_eq!((last.start.0, last.length, last.content), (96, 32, Content::Zero));
    }
}
