//! Allocation maps: which bytes of a guest disk lie where.
//!
//! Two kinds of run. An [`Extent`] is what one image says of a guest range: its own data, its own zeros, or
//! "see below". A [`Run`] is what a chain (or the part of one that is being merged) says: which *layer* holds
//! it. Both come from iterators that go up the guest disk, without gaps or overlaps, and never hold more than
//! a window of each image's tables.

use crate::units::{GuestOffset, HostOffset};

/// What one image says about a guest range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where the range begins.
    pub start: GuestOffset,
    /// Its length in bytes, above 0. The last extent of an image ends at its virtual size.
    pub length: u64,
    /// What is there.
    pub kind: ExtentKind,
}

impl Extent {
    /// The first guest offset behind it.
    #[must_use]
    pub fn end(&self) -> GuestOffset {
        self.start.plus(self.length)
    }
}

/// Where the bytes of an [`Extent`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// In the image, plain, at `host` and following.
    Data {
        /// The file offset of the extent's first byte.
        host: HostOffset,
    },
    /// Zeros by the image's own word, whatever lies below.
    Zero,
    /// In one compressed cluster; the extent is that cluster, clipped at the virtual size.
    Compressed(CompressedCluster),
    /// Not in this image: see the backing file; zeros without one.
    Below,
}

/// One compressed cluster of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedCluster {
    /// The guest offset of the cluster it decompresses to, cluster-aligned.
    pub guest: GuestOffset,
    /// Where the compressed bytes begin in the file; any byte.
    pub host: HostOffset,
    /// How many bytes to read at most, at least 1, at most two clusters: the descriptor counts whole
    /// sectors, so the last ones may belong to the next cluster or lie past the end of the file.
    pub stored_bytes: u64,
}

/// What a chain says about a guest range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where the range begins.
    pub start: GuestOffset,
    /// Its length in bytes, above 0.
    pub length: u64,
    /// Where its bytes are.
    pub content: Content,
}

impl Run {
    /// The first guest offset behind it.
    #[must_use]
    pub fn end(&self) -> GuestOffset {
        self.start.plus(self.length)
    }

    /// The part of the run inside `[from, to)`; `None` if they do not meet.
    #[must_use]
    pub fn clip(&self, from: GuestOffset, to: GuestOffset) -> Option<Self> {
        let start = self.start.max(from);
        let end = self.end().min(to);
        if start >= end {
            return None;
        }
        Some(Self { start, length: end.0 - start.0, content: self.content.skip(start.0 - self.start.0) })
    }

    /// Whether `next` goes on where this run ends, in the guest and, for data, in the same file.
    #[must_use]
    pub fn continued_by(&self, next: &Self) -> bool {
        if self.end() != next.start {
            return false;
        }
        match (self.content, next.content) {
            (Content::Data { layer: a, host: from }, Content::Data { layer: b, host: to }) => {
                a == b && from.plus(self.length) == to
            }
            (Content::Compressed { layer: a, cluster: x }, Content::Compressed { layer: b, cluster: y }) => {
                a == b && x == y
            }
            (Content::Zero, Content::Zero) | (Content::Below, Content::Below) => true,
            _ => false,
        }
    }
}

/// Where the bytes of a [`Run`] are. A layer is an index into the images that are read together; which is
/// which is the caller's business (by convention 0 is the newest).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Plain in that layer's file, at `host` and following.
    Data {
        /// Which image.
        layer: usize,
        /// The file offset of the run's first byte.
        host: HostOffset,
    },
    /// In a compressed cluster of that layer. The run is all of it or a part of it: the run's bytes begin
    /// `run.start - cluster.guest` bytes into the decompressed cluster.
    Compressed {
        /// Which image.
        layer: usize,
        /// The cluster.
        cluster: CompressedCluster,
    },
    /// Zeros.
    Zero,
    /// In none of the layers: what the image below the lowest layer says; zeros without one.
    Below,
}

impl Content {
    /// The content `bytes` further on in the same run.
    #[must_use]
    pub fn skip(self, bytes: u64) -> Self {
        match self {
            Self::Data { layer, host } => Self::Data { layer, host: host.plus(bytes) },
            other => other,
        }
    }
}

/// Joins runs that continue each other, so that the runs are maximal. A compressed cluster stays one run.
pub fn coalesce<E>(runs: impl Iterator<Item = Result<Run, E>>) -> impl Iterator<Item = Result<Run, E>> {
    Coalesce { runs, held: None, failed: None }
}

struct Coalesce<I, E> {
    runs: I,
    held: Option<Run>,
    failed: Option<E>,
}

impl<I, E> Iterator for Coalesce<I, E>
where
    I: Iterator<Item = Result<Run, E>>,
{
    type Item = Result<Run, E>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(error) = self.failed.take() {
            return Some(Err(error));
        }
        loop {
            match self.runs.next() {
                Some(Ok(run)) => match self.held {
                    Some(ref mut held) if held.continued_by(&run) => held.length += run.length,
                    Some(held) => {
                        self.held = Some(run);
                        return Some(Ok(held));
                    }
                    None => self.held = Some(run),
                },
                Some(Err(error)) => match self.held.take() {
                    Some(held) => {
                        self.failed = Some(error);
                        return Some(Ok(held));
                    }
                    None => return Some(Err(error)),
                },
                None => return self.held.take().map(Ok),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Content, Run, coalesce};
    use crate::units::{GuestOffset, HostOffset};

    fn data(start: u64, length: u64, host: u64) -> Run {
        Run { start: GuestOffset(start), length, content: Content::Data { layer: 0, host: HostOffset(host) } }
    }

    fn zero(start: u64, length: u64) -> Run {
        Run { start: GuestOffset(start), length, content: Content::Zero }
    }

    #[test]
    fn coalescing_joins_only_what_continues() {
        let runs = [data(0, 10, 100), data(10, 5, 110), data(15, 5, 200), zero(20, 5), zero(25, 5)];
        let joined: Vec<Run> = coalesce(runs.into_iter().map(Ok::<_, ()>)).collect::<Result<_, _>>().unwrap();
        assert_eq!(joined, [data(0, 15, 100), data(15, 5, 200), zero(20, 10)]);
    }

    #[test]
    fn an_error_comes_after_what_was_held() {
        let mut runs = coalesce([Ok(zero(0, 5)), Err("bad")].into_iter());
        assert_eq!(runs.next(), Some(Ok(zero(0, 5))));
        assert_eq!(runs.next(), Some(Err("bad")));
        assert_eq!(runs.next(), None);
    }

    #[test]
    fn clipping_moves_the_host_offset() {
        let run = data(100, 50, 1000);
        assert_eq!(run.clip(GuestOffset(120), GuestOffset(130)), Some(data(120, 10, 1020)));
        assert_eq!(run.clip(GuestOffset(150), GuestOffset(160)), None);
        assert_eq!(run.clip(GuestOffset(0), GuestOffset(100)), None);
    }
}
