//! The bytes of a download: a slice is read while the one before it is sent.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use tokio::sync::mpsc::{Sender, channel};
use tokio_stream::wrappers::ReceiverStream;

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
/// The largest slice.
pub const MOST_SLICE: u64 = 8 << 20;
/// How long a client may take for a slice.
const SLOWEST: Duration = Duration::from_mins(10);
/// Zeros, to be sent without memory of their own.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

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
    let (sender, receiver) = channel(1);
    let service = service.clone();
    tokio::spawn(async move {
        let _place = place;
        service.metrics.download_began();
        if let Err(error) = send(&service, &image, first, cursor, &sender).await {
            service.metrics.count_error(error.code().as_str());
            tracing::warn!(code = %error.code(), "a download is cut: {}", with_causes(&error));
            // Ends the connection without an end of the body.
            let _ = sender.send(Err(io::Error::other(with_causes(&error)))).await;
        }
        service.metrics.download_ended();
    });
    Ok(Body::from_stream(ReceiverStream::new(receiver)))
}

/// Sends a slice, and what follows it: each slice is read while the one before it is sent.
async fn send(
    service: &Shared,
    image: &Arc<Opened>,
    mut slice: Vec<Taken>,
    mut cursor: Cursor,
    sender: &Sender<io::Result<Bytes>>,
) -> Result<(), StoreError> {
    loop {
        if cursor.rest().is_empty() {
            give(service, slice, sender).await;
            return Ok(());
        }
        let (taken, read) = tokio::join!(give(service, slice, sender), next(service, image, cursor));
        if !taken {
            return Ok(());
        }
        (cursor, slice) = read?;
    }
}

/// Gives a slice to the client; whether he took it.
async fn give(service: &Shared, slice: Vec<Taken>, sender: &Sender<io::Result<Bytes>>) -> bool {
    for taken in slice {
        match taken {
            Taken::Bytes(held) => {
                if !give_bytes(service, Bytes::from_owner(held), sender).await {
                    return false;
                }
            }
            Taken::Zeros(mut left) => {
                while left > 0 {
                    let step = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.len());
                    let zeros = Bytes::from_static(ZEROS.get(..step).unwrap_or_default());
                    if !give_bytes(service, zeros, sender).await {
                        return false;
                    }
                    left -= step as u64;
                }
            }
        }
    }
    true
}

/// Whoever is gone, or takes nothing, gets nothing more.
async fn give_bytes(service: &Shared, bytes: Bytes, sender: &Sender<io::Result<Bytes>>) -> bool {
    let count = bytes.len() as u64;
    let given = tokio::time::timeout(SLOWEST, sender.send(Ok(bytes))).await;
    let taken = matches!(given, Ok(Ok(())));
    if taken {
        service.metrics.downloaded(count);
    }
    taken
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
