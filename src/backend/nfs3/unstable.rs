//! What was written and may still be lost: kept until the server says that it has it on stable storage.
//!
//! A WRITE is answered with the verifier of the server's incarnation, a COMMIT, too. Equal verifiers mean that what was
//! written is durable; another one means that the server was started anew in between and may have lost it: then all
//! that is kept is written again, in the order in which it was written at first, with nothing else being written
//! meanwhile. What is kept belongs to the file and not to who opened it, so that whoever syncs the file syncs all of it;
//! and reads by this process see it, whatever the server has lost.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use nfs3_client::nfs3_types::nfs3::{nfs_fh3, writeverf3};
use tokio::sync::RwLock;
use tokio::task::JoinSet;

use super::access::{Access, Written, too_far};
use super::fault::{Fault, Result};
use super::pool::lock;

/// How much is kept of a file, in bytes, before it is made durable without being asked for; what is in flight comes on
/// top of it.
const MOST_KEPT: usize = 32 << 20;
/// How many writes of one call are in flight.
const IN_FLIGHT: usize = 8;
/// How often everything is written again before it is given up.
const RESENDS: usize = 8;

/// Where a file ends at last: offsets are signed elsewhere.
const LAST_BYTE: u64 = i64::MAX.cast_unsigned();

/// One write.
#[derive(Clone, Debug)]
struct Kept {
    /// Later ones lie over earlier ones.
    order: u64,
    offset: u64,
    data: Arc<Vec<u8>>,
    verifier: writeverf3,
}

impl Kept {
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.data.len() as u64)
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }
}

/// What is kept of one file.
#[derive(Debug, Default)]
pub(super) struct Unstable {
    kept: Mutex<Vec<Kept>>,
    /// Begun writes, ever.
    orders: Mutex<u64>,
    /// Shared by writes; whoever writes everything again, or sets the length, is alone.
    gate: RwLock<()>,
    /// One flush at a time.
    turn: tokio::sync::Mutex<()>,
    users: AtomicUsize,
}

impl Unstable {
    fn bytes(&self) -> usize {
        lock(&self.kept).iter().map(|write| write.data.len()).sum()
    }

    fn is_empty(&self) -> bool {
        lock(&self.kept).is_empty()
    }

    /// What is kept of a range.
    pub(super) fn over(&self, offset: u64, length: usize) -> Layer {
        let end = offset.saturating_add(length as u64);
        let within = |write: &&Kept| write.offset < end && write.end() > offset;
        let mut writes: Vec<Kept> = lock(&self.kept).iter().filter(within).cloned().collect();
        writes.sort_by_key(|write| write.order);
        Layer { offset, writes }
    }

    /// How long the file is at least, by what is kept of it.
    pub(super) fn reaches(&self) -> u64 {
        lock(&self.kept).iter().map(Kept::end).max().unwrap_or_default()
    }

    /// Whether all of these were made durable by that incarnation; they are not kept any more then. Else all of them
    /// stay: what one lost may lie below what another one did not lose.
    fn settle(&self, sent: &[Kept], verifier: writeverf3) -> bool {
        if sent.iter().any(|write| write.verifier != verifier) {
            return false;
        }
        let orders: std::collections::HashSet<u64> = sent.iter().map(|write| write.order).collect();
        lock(&self.kept).retain(|write| !orders.contains(&write.order));
        true
    }

    fn next_order(&self) -> u64 {
        let mut orders = lock(&self.orders);
        *orders += 1;
        *orders
    }

    /// All writes, the earliest first.
    fn all(&self) -> Vec<Kept> {
        let mut all = lock(&self.kept).clone();
        all.sort_by_key(|write| write.order);
        all
    }
}

/// What was kept of a range when a read of it began: the server may have lost it, and may give it by the time.
#[derive(Debug)]
pub(super) struct Layer {
    offset: u64,
    writes: Vec<Kept>,
}

impl Layer {
    /// Lays it over the `count` bytes that the server gave; how many there are then.
    pub(super) fn lay(&self, buffer: &mut [u8], count: usize) -> usize {
        let end = self.offset.saturating_add(buffer.len() as u64);
        let inside = |at: u64| usize::try_from(at.clamp(self.offset, end) - self.offset).unwrap_or_default();
        let reached = self.writes.iter().map(|write| inside(write.end())).max();
        let reached = reached.unwrap_or_default().max(count);
        if let Some(gap) = buffer.get_mut(count..reached) {
            gap.fill(0);
        }
        for write in &self.writes {
            let (from, to) = (inside(write.offset), inside(write.end()));
            let skip = usize::try_from(self.offset.saturating_sub(write.offset)).unwrap_or_default();
            if let (Some(place), Some(data)) = (buffer.get_mut(from..to), write.data.get(skip..)) {
                place.iter_mut().zip(data).for_each(|(place, byte)| *place = *byte);
            }
        }
        reached
    }
}

/// Writes all of `data`, in pieces of at most `part` bytes, several at once. It is not durable when this returns, but
/// kept; if that is much already, all of the file is made durable.
pub(super) async fn write(
    access: Access,
    unstable: Arc<Unstable>,
    offset: u64,
    data: Vec<u8>,
    part: usize,
) -> Result<()> {
    let end = offset.checked_add(data.len() as u64).filter(|end| *end <= LAST_BYTE);
    end.ok_or_else(too_far)?;
    {
        let _with_others = unstable.gate.read().await;
        let pieces = pieces(&unstable, offset, data, part);
        for written in send(&access, pieces).await? {
            lock(&unstable.kept).extend(written);
        }
    }
    if unstable.bytes() > MOST_KEPT {
        flush(&access, &unstable, MOST_KEPT).await?;
    }
    Ok(())
}

/// What is written at once, cut to what one call takes.
fn pieces(unstable: &Unstable, offset: u64, data: Vec<u8>, part: usize) -> Vec<Kept> {
    let piece = |offset, data| {
        let (order, verifier) = (unstable.next_order(), writeverf3::default());
        Kept { order, offset, data: Arc::new(data), verifier }
    };
    if data.len() <= part {
        return vec![piece(offset, data)];
    }
    let cut = data.chunks(part.max(1)).enumerate();
    cut.map(|(index, data)| piece(offset + (index * part) as u64, data.to_vec())).collect()
}

/// Writes pieces that do not overlap; those that are not durable yet come back, with the server's verifier.
async fn send(access: &Access, pieces: Vec<Kept>) -> Result<Vec<Option<Kept>>> {
    if let [_] = &pieces[..] {
        let mut sent = Vec::new();
        for piece in pieces {
            sent.push(send_one(access, piece).await?);
        }
        return Ok(sent);
    }
    let mut waiting = pieces.into_iter();
    let mut running = JoinSet::new();
    let mut sent = Vec::new();
    loop {
        while running.len() < IN_FLIGHT {
            let Some(piece) = waiting.next() else { break };
            let access = access.clone();
            running.spawn(async move { send_one(&access, piece).await });
        }
        match running.join_next().await {
            Some(Ok(one)) => sent.push(one?),
            Some(Err(error)) => return Err(Fault::Garbled(format!("a write was lost: {error}"))),
            None => return Ok(sent),
        }
    }
}

async fn send_one(access: &Access, piece: Kept) -> Result<Option<Kept>> {
    let Written { stable, verifier } = access.write(piece.offset, &piece.data).await?;
    Ok((!stable).then_some(Kept { verifier, ..piece }))
}

/// Makes all that was written to the file before this call durable.
pub(super) async fn sync(access: &Access, unstable: &Unstable) -> Result<()> {
    flush(access, unstable, 0).await
}

/// The same, if more than `most` bytes are kept once it is this call's turn; COMMIT is sent at any rate for 0.
async fn flush(access: &Access, unstable: &Unstable, most: usize) -> Result<()> {
    let _turn = unstable.turn.lock().await;
    if most > 0 && unstable.bytes() <= most {
        return Ok(());
    }
    let sent = unstable.all();
    let verifier = access.commit().await?;
    if unstable.settle(&sent, verifier) {
        return Ok(());
    }
    let _alone = unstable.gate.write().await;
    for _ in 0..RESENDS {
        tracing::info!(
            "{}: the server was started anew; what it had of the file is written again",
            access.path
        );
        resend(access, unstable).await?;
        let sent = unstable.all();
        let verifier = access.commit().await?;
        if unstable.settle(&sent, verifier) {
            return Ok(());
        }
    }
    Err(Fault::Garbled("the server is started anew again and again".to_owned()))
}

/// Writes everything again: in order, at once what does not overlap.
async fn resend(access: &Access, unstable: &Unstable) -> Result<()> {
    let mut batch: Vec<Kept> = Vec::new();
    for write in unstable.all() {
        if batch.len() == IN_FLIGHT || batch.iter().any(|other| other.overlaps(&write)) {
            resend_batch(access, unstable, std::mem::take(&mut batch)).await?;
        }
        batch.push(write);
    }
    resend_batch(access, unstable, batch).await
}

async fn resend_batch(access: &Access, unstable: &Unstable, batch: Vec<Kept>) -> Result<()> {
    let orders: Vec<u64> = batch.iter().map(|write| write.order).collect();
    let sent = send(access, batch).await?;
    let verifiers: HashMap<u64, writeverf3> =
        sent.iter().flatten().map(|write| (write.order, write.verifier)).collect();
    let mut kept = lock(&unstable.kept);
    // What was durable at once is not kept any more.
    kept.retain(|write| !orders.contains(&write.order) || verifiers.contains_key(&write.order));
    for write in kept.iter_mut() {
        if let Some(verifier) = verifiers.get(&write.order) {
            write.verifier = *verifier;
        }
    }
    Ok(())
}

/// Sets the length. What is kept of what lies past it is made durable before: written again later, it would come back.
pub(super) async fn set_length(access: &Access, unstable: &Unstable, length: u64) -> Result<()> {
    if length > LAST_BYTE {
        return Err(too_far());
    }
    if unstable.reaches() > length {
        sync(access, unstable).await?;
    }
    let _alone = unstable.gate.write().await;
    access.set(&super::attributes::length(length)).await
}

/// The files of a store that are open for writing, or of which something is kept, by their handles. (A file id may be
/// another file's by the time, a handle is not.)
#[derive(Debug, Default)]
pub(super) struct Writers {
    files: Mutex<HashMap<Vec<u8>, Arc<Unstable>>>,
    begun: AtomicUsize,
}

impl Writers {
    /// What is kept of a file, if it is open for writing or something is.
    pub(super) fn of(&self, handle: &nfs_fh3) -> Option<Arc<Unstable>> {
        lock(&self.files).get(handle.data.as_ref()).cloned()
    }

    /// The same for one more who writes; [`Writers::leave`] is his end.
    pub(super) fn enter(&self, handle: &nfs_fh3) -> Arc<Unstable> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        let mut files = lock(&self.files);
        let unstable = files.entry(handle.data.to_vec()).or_default();
        unstable.users.fetch_add(1, Ordering::Relaxed);
        unstable.clone()
    }

    /// How often somebody began to write.
    pub(super) fn begun(&self) -> usize {
        self.begun.load(Ordering::Relaxed)
    }

    /// One who wrote is gone; what is kept then, if he was the last one.
    pub(super) fn leave(&self, handle: &nfs_fh3) -> Option<Arc<Unstable>> {
        let mut files = lock(&self.files);
        let unstable = files.get(handle.data.as_ref())?;
        if unstable.users.fetch_sub(1, Ordering::Relaxed) > 1 {
            return None;
        }
        if unstable.is_empty() {
            files.remove(handle.data.as_ref());
            return None;
        }
        Some(unstable.clone())
    }

    /// Forgets a file that nobody writes to and of which nothing is kept.
    pub(super) fn tidy(&self, handle: &nfs_fh3) {
        let mut files = lock(&self.files);
        let idle = |file: &Arc<Unstable>| file.users.load(Ordering::Relaxed) == 0 && file.is_empty();
        if files.get(handle.data.as_ref()).is_some_and(idle) {
            files.remove(handle.data.as_ref());
        }
    }

    /// Forgets what is kept of a file that is no more.
    pub(super) fn drop_kept(&self, handle: &nfs_fh3) {
        if let Some(unstable) = self.of(handle) {
            lock(&unstable.kept).clear();
        }
        self.tidy(handle);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nfs3_client::nfs3_types::nfs3::{nfs_fh3, writeverf3};
    use nfs3_client::nfs3_types::xdr_codec::Opaque;

    use super::{Kept, Unstable, Writers, lock, pieces};

    fn kept(order: u64, offset: u64, data: &[u8], incarnation: u8) -> Kept {
        Kept { order, offset, data: Arc::new(data.to_vec()), verifier: writeverf3([incarnation; 8]) }
    }

    fn with(writes: &[Kept]) -> Unstable {
        let unstable = Unstable::default();
        lock(&unstable.kept).extend_from_slice(writes);
        unstable
    }

    #[test]
    fn what_is_kept_lies_over_what_the_server_gives() {
        // As they came back, which need not be as they were written.
        let unstable = with(&[
            kept(2, 4, b"BB", 1),
            kept(1, 3, b"AAAA", 1),
            kept(3, 12, b"C", 1),
            kept(4, 100, b"D", 1),
        ]);
        let lay = |offset, buffer: &mut [u8], count| unstable.over(offset, buffer.len()).lay(buffer, count);
        let mut buffer = *b"0123456789??????";
        assert_eq!(lay(0, &mut buffer, 10), 13);
        assert_eq!(&buffer, b"012ABBA789\0\0C???");
        let mut buffer = *b"56";
        assert_eq!(lay(5, &mut buffer, 2), 2);
        assert_eq!(&buffer, b"BA");
        let mut buffer = *b"??";
        assert_eq!(lay(40, &mut buffer, 0), 0);
        assert_eq!(&buffer, b"??");
        assert_eq!(unstable.reaches(), 101);
    }

    #[test]
    fn one_lost_write_keeps_all_of_them() {
        let unstable = with(&[kept(1, 0, b"old", 1), kept(2, 0, b"new", 2)]);
        assert!(!unstable.settle(&unstable.all(), writeverf3([2; 8])));
        assert_eq!(unstable.all().len(), 2);
        let first = [kept(1, 0, b"old", 2)];
        assert!(unstable.settle(&first, writeverf3([2; 8])), "one that came later is not asked about");
        assert_eq!(unstable.all().len(), 1);
    }

    #[test]
    fn pieces_are_cut_to_what_a_call_takes() {
        let unstable = Unstable::default();
        let cut = pieces(&unstable, 10, vec![7; 25], 10);
        let shown: Vec<_> = cut.iter().map(|piece| (piece.order, piece.offset, piece.data.len())).collect();
        assert_eq!(shown, [(1, 10, 10), (2, 20, 10), (3, 30, 5)]);
        assert!(cut[0].overlaps(&kept(9, 19, b"x", 0)) && !cut[0].overlaps(&cut[1]));
    }

    #[test]
    fn a_file_is_known_as_long_as_something_is_kept() {
        let writers = Writers::default();
        let handle = nfs_fh3 { data: Opaque::borrowed(b"handle") };
        let (first, second) = (writers.enter(&handle), writers.enter(&handle));
        assert!(Arc::ptr_eq(&first, &second));
        lock(&first.kept).push(kept(1, 0, b"x", 1));
        assert!(writers.leave(&handle).is_none(), "one is left");
        assert!(writers.leave(&handle).is_some());
        writers.tidy(&handle);
        assert!(writers.of(&handle).is_some(), "it may be synced yet");
        writers.drop_kept(&handle);
        assert!(writers.of(&handle).is_none());
    }
}
