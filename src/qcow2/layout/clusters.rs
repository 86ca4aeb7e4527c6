//! Cuts a map into the target's clusters.
//!
//! Long runs stay one span of many clusters; only a cluster in which runs meet is looked at by itself. Memory:
//! the pieces of one cluster.

use crate::failure::Code;
use crate::qcow2::error::{ImageError, Result};
use crate::qcow2::map::{CompressedCluster, Content, Run};
use crate::units::{ClusterBits, GuestOffset, HostOffset};

/// What fills a piece of a cluster. As [`Content`], but knowing the image below: where that one has ended,
/// "zero" and "below" mean the same and need no entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Plain data of a source.
    Data {
        /// Which source.
        layer: usize,
        /// Where in its file the piece begins.
        host: HostOffset,
    },
    /// Part or all of a compressed cluster of a source.
    Compressed {
        /// Which source.
        layer: usize,
        /// The cluster.
        cluster: CompressedCluster,
    },
    /// Zeros over something.
    Zero,
    /// What the image below says.
    Below,
    /// Zeros over nothing.
    Nothing,
}

/// A range of the guest with one fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins in the guest.
    pub start: GuestOffset,
    /// Its length in bytes.
    pub length: u64,
    /// What fills it.
    pub fill: Fill,
}

impl Piece {
    /// The first guest byte behind it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start.0 + self.length
    }

    /// Cuts off the first `length` bytes.
    fn split(&self, length: u64) -> (Self, Option<Self>) {
        if length >= self.length {
            return (*self, None);
        }
        let fill = match self.fill {
            Fill::Data { layer, host } => Fill::Data { layer, host: host.plus(length) },
            other => other,
        };
        let rest = Self { start: self.start.plus(length), length: self.length - length, fill };
        (Self { length, ..*self }, Some(rest))
    }
}

/// Some clusters of the target.
#[derive(Debug)]
pub enum Span {
    /// `count` whole clusters from `first` with one fill that is not compressed.
    Same { first: u64, count: u64, piece: Piece },
    /// One cluster made of several pieces, or the image's last one, or one with compressed data.
    Mixed { cluster: u64, pieces: Vec<Piece> },
}

/// The spans of a map, in order, up to the virtual size. Clusters that hold nothing are spans as well.
pub struct Clusters<I> {
    runs: I,
    bits: ClusterBits,
    /// Where the image below ends; 0 without one.
    below_end: u64,
    /// Where the next run of the map must begin.
    expected: u64,
    /// Pieces cut off and not used yet, the next one last.
    pending: Vec<Piece>,
}

impl<I: Iterator<Item = Result<Run>>> Clusters<I> {
    pub fn new(runs: I, bits: ClusterBits, below_end: u64) -> Self {
        Self { runs, bits, below_end, expected: 0, pending: Vec::new() }
    }

    /// The next piece: what is pending, or the next run, cut where the image below ends.
    fn piece(&mut self) -> Option<Result<Piece>> {
        let piece = match self.pending.pop() {
            Some(piece) => piece,
            None => match self.runs.next()? {
                Ok(run) if run.start.0 == self.expected && run.length > 0 => {
                    self.expected = run.end().0;
                    piece_of(&run)
                }
                Ok(run) => return Some(Err(out_of_order(&run))),
                Err(error) => return Some(Err(error)),
            },
        };
        let head = match piece.fill {
            Fill::Zero | Fill::Below if piece.start.0 >= self.below_end => {
                Piece { fill: Fill::Nothing, ..piece }
            }
            Fill::Zero | Fill::Below => {
                let (head, rest) = piece.split(self.below_end - piece.start.0);
                self.pending.extend(rest);
                head
            }
            _ => piece,
        };
        Some(Ok(head))
    }

    fn mixed(&mut self, first: Piece) -> Result<Span> {
        let size = self.bits.bytes();
        let cluster = first.start.0 / size;
        let end = (cluster + 1) * size;
        let mut pieces = Vec::new();
        let mut next = Some(first);
        while let Some(piece) = next.take() {
            let (head, rest) = piece.split(end - piece.start.0);
            let done = head.end() >= end;
            pieces.push(head);
            if done {
                self.pending.extend(rest);
                break;
            }
            next = self.piece().transpose()?;
        }
        Ok(Span::Mixed { cluster, pieces })
    }
}

impl<I: Iterator<Item = Result<Run>>> Iterator for Clusters<I> {
    type Item = Result<Span>;

    fn next(&mut self) -> Option<Self::Item> {
        let piece = match self.piece()? {
            Ok(piece) => piece,
            Err(error) => return Some(Err(error)),
        };
        let size = self.bits.bytes();
        let count = piece.length / size;
        if count == 0 || matches!(piece.fill, Fill::Compressed { .. }) {
            return Some(self.mixed(piece));
        }
        let (piece, rest) = piece.split(count * size);
        self.pending.extend(rest);
        Some(Ok(Span::Same { first: piece.start.0 / size, count, piece }))
    }
}

fn piece_of(run: &Run) -> Piece {
    let fill = match run.content {
        Content::Data { layer, host } => Fill::Data { layer, host },
        Content::Compressed { layer, cluster } => Fill::Compressed { layer, cluster },
        Content::Zero => Fill::Zero,
        Content::Below => Fill::Below,
    };
    Piece { start: run.start, length: run.length, fill }
}

fn out_of_order(run: &Run) -> ImageError {
    ImageError::Bad {
        image: "the map".to_owned(),
        code: Code::BadEntry,
        detail: format!("a run at {} does not follow the one before", run.start),
    }
}
