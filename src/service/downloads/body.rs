//! The bytes of a download: a slice is read while the one before it is sent.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio_stream::Stream;

use super::opened::Opened;
use crate::failure::{Failure as _, with_causes};
use crate::progress::{Cancel, Pace, Silent};
use crate::service::problem::Problem;
use crate::service::state::Shared;
use crate::store::StoreError;
use crate::store::measure::Job;
use crate::store::stream::{Cursor, Taken};

/// What slices of all downloads may take, about: each has two.
pub const ALL_BYTES: u64 = 64 << 20;
/// The smallest slice: less is read again and again where compressed clusters or leaves reach over its end.
pub const LEAST_SLICE: u64 = 256 << 10;
/// The largest slice: with more the caches of a processor hold nothing of it by the time it is sent (1, 8 and 32
/// MiB took a fifth to two fifths longer).
pub const MOST_SLICE: u64 = 2 << 20;
/// Zeros, to be sent without memory of their own.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

/// Some of an image, or why there is no more.
type Slice = io::Result<Vec<Taken>>;

/// The body that has those bytes of the image. Its first slice is read before this returns, so that what fails at once is
/// told in words. Reading ends when the client is gone.
///
/// A block that is damaged, and a file that is written to meanwhile, cut the connection before a byte of them is sent:
/// the client has less than the length that it was told.
pub async fn body(service: &Shared, image: Arc<Opened>, range: Range<u64>) -> Result<Body, Problem> {
    let place = service.downloads.places.clone().try_acquire_owned();
    let place = place.map_err(|_| Problem::unavailable("there are as many downloads as there may be"))?;
    let cursor = image.stream.cursor(range);
    let (cursor, first) = next(service, &image, cursor).await.map_err(|error| Problem::of(&error))?;
    let (sender, slices) = channel(1);
    let underway = Underway::new(service.clone(), place);
    let service = service.clone();
    tokio::spawn(async move {
        if let Err(error) = send(&service, &image, first, cursor, &sender).await {
            service.metrics.count_error(error.code().as_str());
            tracing::warn!(code = %error.code(), "a download is cut: {}", with_causes(&error));
            // Ends the connection without an end of the body.
            let _ = sender.send(Err(io::Error::other(with_causes(&error)))).await;
        }
    });
    Ok(Body::from_stream(Pieces { slices, slice: VecDeque::new(), underway }))
}

/// Gives the first slice to the connection, and what follows it: each is read while the one before it is sent. Whoever is
/// gone gets nothing more.
async fn send(
    service: &Shared,
    image: &Arc<Opened>,
    first: Vec<Taken>,
    mut cursor: Cursor,
    sender: &Sender<Slice>,
) -> Result<(), StoreError> {
    // There is room at first, and then whenever the slice before is being sent.
    let _ = sender.send(Ok(first)).await;
    while !cursor.rest().is_empty() {
        let Ok(room) = sender.reserve().await else { break };
        let (after, slice) = next(service, image, cursor).await?;
        room.send(Ok(slice));
        cursor = after;
    }
    Ok(())
}

/// A download, counted from its first byte until the connection has done with it.
struct Underway {
    service: Shared,
    _place: OwnedSemaphorePermit,
}

impl Underway {
    fn new(service: Shared, place: OwnedSemaphorePermit) -> Self {
        service.metrics.download_began();
        Self { service, _place: place }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.service.metrics.download_ended();
    }
}

/// What the connection takes: one slice after the other, so that it is woken once for each, not for each piece.
struct Pieces {
    slices: Receiver<Slice>,
    /// The rest of the one that is being sent.
    slice: VecDeque<Taken>,
    underway: Underway,
}

impl Pieces {
    fn piece(&mut self) -> Option<Bytes> {
        match self.slice.pop_front()? {
            Taken::Bytes(held) => Some(Bytes::from_owner(held)),
            Taken::Zeros(count) => {
                let step = usize::try_from(count).unwrap_or(usize::MAX).min(ZEROS.len());
                let left = count - step as u64;
                if left > 0 {
                    self.slice.push_front(Taken::Zeros(left));
                }
                Some(Bytes::from_static(ZEROS.get(..step).unwrap_or_default()))
            }
        }
    }
}

impl Stream for Pieces {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(piece) = self.piece() {
                self.underway.service.metrics.downloaded(piece.len() as u64);
                return Poll::Ready(Some(Ok(piece)));
            }
            match ready!(self.slices.poll_recv(context)) {
                Some(Ok(slice)) => self.slice = slice.into(),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
    }
}

/// The next slice at a cursor.
async fn next(
    service: &Shared,
    image: &Arc<Opened>,
    cursor: Cursor,
) -> Result<(Cursor, Vec<Taken>), StoreError> {
    let rest = cursor.rest();
    let size = service.downloads.slice_bytes();
    // Slices end where blocks do, so that each is read once.
    let most = ((rest.start / size + 1) * size).min(rest.end) - rest.start;
    let turn = service.downloads.turns.clone().acquire_owned().await;
    let (image, pace) = (image.clone(), service.pace.clone());
    let read = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        slice(&image, cursor, most, &pace)
    });
    let panicked = |_| StoreError::Usage { detail: "the reading ended by a panic: see the log".to_owned() };
    read.await.map_err(panicked)?
}

/// Reads at a cursor. Blocks.
fn slice(
    image: &Opened,
    mut cursor: Cursor,
    most: u64,
    pace: &Pace,
) -> Result<(Cursor, Vec<Taken>), StoreError> {
    let cancel = Cancel::default();
    let job = Job { progress: &Silent, cancel: &cancel, pace, tolerant: false };
    let taken = image.stream.next(&mut cursor, most, &job)?;
    // What is adopted was held against its leaves; all of it is held against the files as they were opened.
    image.stream.source().unchanged()?;
    Ok((cursor, taken))
}
