//! What was written and may still be lost: kept until the server says that it has it on stable storage.
//!
//! A WRITE is answered with the verifier of the server's incarnation, a COMMIT, too. Equal verifiers mean that what was
//! written is durable; another one means that the server was started anew in between and may have lost it: then all
//! that is kept is written again, in the order in which it was written at first, with nothing else being written
//! meanwhile. What is kept belongs to the file and not to who opened it, so that whoever syncs the file syncs all of it;
//! and reads by this process see it, whatever the server has lost.
//!
//! Whoever writes does not wait for the answer: several WRITEs of a file are under way at once, never two of the same bytes.
//! Little ones that follow each other in the file are held until they fill one call, or are asked about. What the server
//! refused to take, or to make durable, is kept as lost: until it was written again and made durable, nothing more is taken,
//! and no sync succeeds. A COMMIT alone is never tried again, as a server may throw away what it could not make durable, and
//! call that durable the next time. When those who wrote are gone, and it still is lost, it is given up: others may write
//! to the file by now. Then every sync fails, until somebody opens the file to write it anew.
//!
//! Before a file gets another name, or is looked at, all that was written has been sent and answered ([`answered`]): no other
//! client sees the name before the bytes.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use nfs3_client::nfs3_types::nfs3::writeverf3;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::access::{Access, Written, too_far};
use super::fault::{Fault, Result};
use super::pool::lock;

/// How much is kept of a file, in bytes, before it is made durable without being asked for, and before whoever writes waits
/// for that.
const MUCH_KEPT: usize = 16 << 20;
const MOST_KEPT: usize = 32 << 20;
/// What the smallest write counts.
const LEAST_COUNTED: usize = 4 << 10;
/// How many writes of a file are in flight.
const IN_FLIGHT: u32 = 8;
/// How many places of a file are being written to little by little.
const MOST_HELD: usize = 8;
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
    state: State,
}

/// Who has what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not sent: what follows it in the file may come.
    Held,
    /// Nobody has answered yet.
    UnderWay,
    /// That incarnation of the server.
    With(writeverf3),
    /// Nobody, as far as is known.
    Lost,
}

impl Kept {
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.data.len() as u64)
    }

    fn was_answered(&self) -> bool {
        !matches!(self.state, State::Held | State::UnderWay)
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }
}

/// What is kept of one file.
#[derive(Debug)]
pub(super) struct Unstable {
    kept: Mutex<Vec<Kept>>,
    /// Begun writes, ever.
    orders: Mutex<u64>,
    /// A write takes one; whoever takes all of them, to write everything again or to set the length, is alone.
    slots: Arc<Semaphore>,
    /// One flush at a time.
    turn: tokio::sync::Mutex<()>,
    /// Why something is lost, or was given up.
    failed: Mutex<Option<Fault>>,
    given_up: AtomicBool,
    users: AtomicUsize,
}

impl Default for Unstable {
    fn default() -> Self {
        Self {
            kept: Mutex::default(),
            orders: Mutex::default(),
            slots: Arc::new(Semaphore::new(IN_FLIGHT as usize)),
            turn: tokio::sync::Mutex::default(),
            failed: Mutex::default(),
            given_up: AtomicBool::default(),
            users: AtomicUsize::default(),
        }
    }
}

impl Unstable {
    /// How much is kept; little is counted as a page, so that there are never very many.
    fn bytes(&self) -> usize {
        lock(&self.kept).iter().map(|write| write.data.len().max(LEAST_COUNTED)).sum()
    }

    /// Whether there is nothing to be kept in mind.
    pub(super) fn is_empty(&self) -> bool {
        lock(&self.kept).is_empty() && lock(&self.failed).is_none()
    }

    /// Fails if anything that was written is lost.
    fn whole(&self) -> Result<()> {
        lock(&self.failed).clone().map_or(Ok(()), Err)
    }

    /// What the server has of the file it may throw away, or it was never asked.
    fn doubt(&self, fault: Fault) {
        lock(&self.failed).get_or_insert(fault);
        for write in lock(&self.kept).iter_mut().filter(|write| write.was_answered()) {
            write.state = State::Lost;
        }
    }

    /// One more writes. What failed for those who are gone is forgotten: he writes anew what he needs.
    pub(super) fn come(&self) {
        if self.users.fetch_add(1, Ordering::Relaxed) == 0 {
            self.begin_anew();
        }
    }

    /// One who wrote is gone; whether he was the last one.
    pub(super) fn go(&self) -> bool {
        self.users.fetch_sub(1, Ordering::Relaxed) == 1
    }

    /// Whether somebody has it open to write.
    pub(super) fn has_users(&self) -> bool {
        self.users.load(Ordering::Relaxed) > 0
    }

    /// Whether what was written to it was given up.
    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// The file is no more.
    pub(super) fn forget(&self) {
        lock(&self.kept).clear();
        self.begin_anew();
    }

    /// Nobody is there any more to write it again; what others wrote since then would be lost by it.
    pub(super) fn give_up(&self, fault: Fault) {
        lock(&self.failed).get_or_insert(fault);
        self.given_up.store(true, Ordering::Relaxed);
        lock(&self.kept).retain(|write| write.state == State::UnderWay);
    }

    /// Somebody writes it anew.
    fn begin_anew(&self) {
        lock(&self.kept).retain(|write| write.state != State::Lost);
        lock(&self.failed).take();
        self.given_up.store(false, Ordering::Relaxed);
    }

    /// So many of the slots: one to write, all of them to be alone.
    async fn slots(&self, count: u32) -> Result<OwnedSemaphorePermit> {
        let slots = self.slots.clone().acquire_many_owned(count).await;
        slots.map_err(|error| Fault::Garbled(format!("nothing is written any more: {error}")))
    }

    /// Holds a little write, alone or with the one that it follows. `false` if any other is about the same bytes: which of
    /// them is the later one must stay known.
    pub(super) fn hold(&self, offset: u64, data: &[u8], part: usize) -> bool {
        let mut kept = lock(&self.kept);
        let end = offset.saturating_add(data.len() as u64);
        if kept.iter().any(|other| other.offset < end && offset < other.end()) {
            return false;
        }
        let fits = |other: &&mut Kept| {
            other.state == State::Held && other.end() == offset && other.data.len() + data.len() <= part
        };
        if let Some(before) = kept.iter_mut().find(fits) {
            Arc::make_mut(&mut before.data).extend_from_slice(data);
        } else {
            let order = self.next_order();
            kept.push(Kept { order, offset, data: Arc::new(data.to_vec()), state: State::Held });
        }
        true
    }

    /// One that is held and fills a call, or the first of more than are held.
    fn ripe(&self, part: usize, most: usize) -> Option<u64> {
        let kept = lock(&self.kept);
        let mut held = kept.iter().filter(|write| write.state == State::Held);
        let (first, count) = (held.clone().next()?.order, held.clone().count());
        held.find(|write| write.data.len() >= part)
            .map(|write| write.order)
            .or((count > most).then_some(first))
    }

    /// Takes up one that is held, unless somebody else did.
    fn take_up(&self, order: u64) -> Option<Kept> {
        let mut kept = lock(&self.kept);
        let write = kept.iter_mut().find(|write| write.order == order && write.state == State::Held)?;
        write.state = State::UnderWay;
        Some(write.clone())
    }

    /// Whether there is anything that was not answered yet.
    pub(super) fn is_under_way(&self) -> bool {
        lock(&self.kept).iter().any(|write| !write.was_answered())
            || self.slots.available_permits() < IN_FLIGHT as usize
    }

    /// Notes a write that is about to be made; `None` if another one that is not answered yet is about the same bytes.
    fn begin(&self, offset: u64, data: &Arc<Vec<u8>>) -> Option<Kept> {
        let mut kept = lock(&self.kept);
        let order = self.next_order();
        let write = Kept { order, offset, data: data.clone(), state: State::UnderWay };
        if kept.iter().any(|other| !other.was_answered() && other.overlaps(&write)) {
            return None;
        }
        kept.push(write.clone());
        Some(write)
    }

    /// What the server said to a write.
    fn end(&self, order: u64, written: Result<Written>) {
        let state = match &written {
            Ok(Written { stable: true, .. }) => None,
            Ok(Written { verifier, .. }) => Some(State::With(*verifier)),
            Err(_) => Some(State::Lost),
        };
        {
            let mut kept = lock(&self.kept);
            match state.filter(|_| !self.given_up.load(Ordering::Relaxed)) {
                Some(state) => {
                    if let Some(write) = kept.iter_mut().find(|write| write.order == order) {
                        write.state = state;
                    }
                }
                None => kept.retain(|write| write.order != order),
            }
        }
        if let Err(fault) = written {
            lock(&self.failed).get_or_insert(fault);
        }
    }

    /// What is kept of a range.
    pub(super) fn over(&self, offset: u64, length: usize) -> Layer {
        let end = offset.saturating_add(length as u64);
        let within = |write: &&Kept| write.offset < end && write.end() > offset;
        let kept = lock(&self.kept);
        let mut writes: Vec<Kept> = kept.iter().filter(within).cloned().collect();
        writes.sort_by_key(|write| write.order);
        let reaches = kept.iter().map(Kept::end).max().unwrap_or_default();
        Layer { offset, writes, reaches }
    }

    /// How long the file is at least, by what is kept of it.
    pub(super) fn reaches(&self) -> u64 {
        lock(&self.kept).iter().map(Kept::end).max().unwrap_or_default()
    }

    /// Whether all of these were made durable by that incarnation; they are not kept any more then. Else all of them
    /// stay: what one lost may lie below what another one did not lose.
    fn settle(&self, sent: &[Kept], verifier: writeverf3) -> bool {
        if sent.iter().any(|write| write.state != State::With(verifier)) {
            return false;
        }
        let orders: HashSet<u64> = sent.iter().map(|write| write.order).collect();
        let mut kept = lock(&self.kept);
        kept.retain(|write| !orders.contains(&write.order));
        if !kept.iter().any(|write| write.state == State::Lost) && !self.given_up.load(Ordering::Relaxed) {
            lock(&self.failed).take();
        }
        true
    }

    fn next_order(&self) -> u64 {
        let mut orders = lock(&self.orders);
        *orders += 1;
        *orders
    }

    /// All writes that were answered, the earliest first.
    fn sent(&self) -> Vec<Kept> {
        let mut all = lock(&self.kept).clone();
        all.retain(Kept::was_answered);
        all.sort_by_key(|write| write.order);
        all
    }
}

/// What was kept of a range when a read of it began: the server may have lost it, and may give it by the time.
#[derive(Debug)]
pub(super) struct Layer {
    offset: u64,
    writes: Vec<Kept>,
    /// Where what is kept of the file ends: up to there nothing is past the end, whatever the server has yet.
    reaches: u64,
}

impl Layer {
    /// Lays it over the `count` bytes that the server gave; how many there are then.
    pub(super) fn lay(&self, buffer: &mut [u8], count: usize) -> usize {
        let end = self.offset.saturating_add(buffer.len() as u64);
        let inside = |at: u64| usize::try_from(at.clamp(self.offset, end) - self.offset).unwrap_or_default();
        let reached = inside(self.reaches).max(count);
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

/// Writes all of `data`, in pieces of at most `part` bytes, and does not wait for the answers: an error may be about what was
/// written before. If much is kept already it is made durable meanwhile; if it is very much, this waits for that.
pub(super) async fn write(
    access: Access,
    unstable: Arc<Unstable>,
    offset: u64,
    data: Vec<u8>,
    part: usize,
) -> Result<()> {
    let end = offset.checked_add(data.len() as u64).filter(|end| *end <= LAST_BYTE);
    end.ok_or_else(too_far)?;
    unstable.whole()?;
    if data.len() >= part || !unstable.hold(offset, &data, part) {
        for (at, piece) in pieces(offset, data, part) {
            begin(&access, &unstable, at, &Arc::new(piece)).await?;
        }
    }
    while let Some(order) = unstable.ripe(part, MOST_HELD) {
        send(&access, &unstable, order).await?;
    }
    let bytes = unstable.bytes();
    if bytes > MOST_KEPT {
        return flush(&access, &unstable, MUCH_KEPT).await;
    }
    // One is enough; who comes next sees how it ended.
    if bytes > MUCH_KEPT && unstable.turn.try_lock().is_ok() {
        tokio::spawn(async move { flush(&access, &unstable, MUCH_KEPT).await });
    }
    Ok(())
}

/// Begins one write, as soon as there is a slot and the bytes are in nobody's hands.
async fn begin(access: &Access, unstable: &Arc<Unstable>, offset: u64, data: &Arc<Vec<u8>>) -> Result<()> {
    let (slot, write) = loop {
        let slot = unstable.slots(1).await?;
        unstable.whole()?;
        match unstable.begin(offset, data) {
            Some(write) => break (slot, write),
            None => drop(slot),
        }
        answered(access, unstable).await?;
    };
    let under_way = make(access.clone(), unstable.clone(), slot, write);
    tokio::spawn(under_way);
    Ok(())
}

/// Sends what was held, as soon as there is a slot.
async fn send(access: &Access, unstable: &Arc<Unstable>, order: u64) -> Result<()> {
    let slot = unstable.slots(1).await?;
    if let Some(write) = unstable.take_up(order) {
        tokio::spawn(make(access.clone(), unstable.clone(), slot, write));
    }
    Ok(())
}

/// Makes a write, and notes what became of it.
async fn make(access: Access, unstable: Arc<Unstable>, slot: OwnedSemaphorePermit, write: Kept) {
    let written = access.write(write.offset, &write.data).await;
    unstable.end(write.order, written);
    // While it still counts as under way: whoever sees that it does not sees this.
    access.shared.writers.end_one();
    drop(slot);
}

/// What is written at once, cut to what one call takes.
fn pieces(offset: u64, data: Vec<u8>, part: usize) -> Vec<(u64, Vec<u8>)> {
    if data.len() <= part {
        return vec![(offset, data)];
    }
    let cut = data.chunks(part.max(1)).enumerate();
    cut.map(|(index, data)| (offset + (index * part) as u64, data.to_vec())).collect()
}

/// Sends what is held, and waits until the server has answered all that was written before this call, if anything was.
pub(super) async fn answered(access: &Access, unstable: &Arc<Unstable>) -> Result<()> {
    if unstable.is_under_way() {
        while let Some(order) = unstable.ripe(0, 0) {
            send(access, unstable, order).await?;
        }
        drop(unstable.slots(IN_FLIGHT).await?);
    }
    Ok(())
}

/// Makes all that was written to the file before this call durable.
pub(super) async fn sync(access: &Access, unstable: &Arc<Unstable>) -> Result<()> {
    answered(access, unstable).await?;
    flush(access, unstable, 0).await
}

/// The same for what the server has answered, if more than `most` bytes are kept once it is this call's turn; COMMIT is sent
/// at any rate for 0.
async fn flush(access: &Access, unstable: &Unstable, most: usize) -> Result<()> {
    let _turn = unstable.turn.lock().await;
    if most > 0 && unstable.bytes() <= most {
        return Ok(());
    }
    let flushed = commit(access, unstable).await;
    match &flushed {
        Ok(()) | Err(Fault::Silent { .. }) => {}
        Err(fault) => unstable.doubt(fault.clone()),
    }
    flushed
}

/// Has the server make durable what it has, and what it had.
async fn commit(access: &Access, unstable: &Unstable) -> Result<()> {
    if unstable.whole().is_ok() {
        let sent = unstable.sent();
        let verifier = access.commit().await?;
        if unstable.settle(&sent, verifier) {
            return Ok(());
        }
    }
    let _alone = unstable.slots(IN_FLIGHT).await?;
    for _ in 0..RESENDS {
        if unstable.given_up.load(Ordering::Relaxed) {
            return unstable.whole();
        }
        tracing::info!("{}: what the server had of the file, or should have, is written again", access.path);
        resend(access, unstable).await?;
        let sent = unstable.sent();
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
    for write in unstable.sent() {
        if batch.len() == IN_FLIGHT as usize || batch.iter().any(|other| other.overlaps(&write)) {
            resend_batch(access, unstable, std::mem::take(&mut batch)).await?;
        }
        batch.push(write);
    }
    resend_batch(access, unstable, batch).await
}

async fn resend_batch(access: &Access, unstable: &Unstable, batch: Vec<Kept>) -> Result<()> {
    let mut running = JoinSet::new();
    for Kept { order, offset, data, .. } in batch {
        let access = access.clone();
        running.spawn(async move { (order, access.write(offset, &data).await) });
    }
    while let Some(done) = running.join_next().await {
        let (order, written) = done.map_err(|error| Fault::Garbled(format!("a write was lost: {error}")))?;
        unstable.end(order, Ok(written?));
    }
    Ok(())
}

/// Sets the length. What is kept of what lies past it is made durable before: written again later, it would come back.
pub(super) async fn set_length(access: &Access, unstable: &Arc<Unstable>, length: u64) -> Result<()> {
    if length > LAST_BYTE {
        return Err(too_far());
    }
    if unstable.reaches() > length {
        sync(access, unstable).await?;
    } else {
        answered(access, unstable).await?;
    }
    let _alone = unstable.slots(IN_FLIGHT).await?;
    access.set(&super::attributes::length(length)).await
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nfs3_client::nfs3_types::nfs3::{nfsstat3, writeverf3};

    use super::{Fault, Kept, State, Unstable, Written, lock, pieces};

    fn kept(order: u64, offset: u64, data: &[u8], incarnation: u8) -> Kept {
        let state = State::With(writeverf3([incarnation; 8]));
        Kept { order, offset, data: Arc::new(data.to_vec()), state }
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
        assert_eq!(lay(0, &mut buffer, 10), 16);
        assert_eq!(&buffer, b"012ABBA789\0\0C\0\0\0");
        let mut buffer = *b"56";
        assert_eq!(lay(5, &mut buffer, 2), 2);
        assert_eq!(&buffer, b"BA");
        let mut buffer = *b"??";
        assert_eq!(lay(40, &mut buffer, 0), 2, "the file goes on behind it");
        assert_eq!(&buffer, b"\0\0");
        let mut buffer = *b"??";
        assert_eq!(lay(100, &mut buffer, 0), 1);
        assert_eq!(&buffer, b"D?");
        assert_eq!(unstable.reaches(), 101);
    }

    #[test]
    fn one_lost_write_keeps_all_of_them() {
        let unstable = with(&[kept(1, 0, b"old", 1), kept(2, 0, b"new", 2)]);
        assert!(!unstable.settle(&unstable.sent(), writeverf3([2; 8])));
        assert_eq!(unstable.sent().len(), 2);
        let first = [kept(1, 0, b"old", 2)];
        assert!(unstable.settle(&first, writeverf3([2; 8])), "one that came later is not asked about");
        assert_eq!(unstable.sent().len(), 1);
    }

    #[test]
    fn pieces_are_cut_to_what_a_call_takes() {
        let cut = pieces(10, vec![7; 25], 10);
        let shown: Vec<_> = cut.iter().map(|(offset, data)| (*offset, data.len())).collect();
        assert_eq!(shown, [(10, 10), (20, 10), (30, 5)]);
    }

    #[test]
    fn the_same_bytes_are_never_under_way_twice() {
        let (unstable, data) = (Unstable::default(), Arc::new(vec![7; 10]));
        let verifier = writeverf3([1; 8]);
        let first = unstable.begin(0, &data).unwrap();
        assert!(unstable.begin(9, &data).is_none());
        assert!(unstable.begin(10, &data).is_some());
        assert!(unstable.sent().is_empty(), "none was answered");
        unstable.end(first.order, Ok(Written { stable: false, verifier }));
        let over = unstable.begin(5, &Arc::new(vec![8; 5])).unwrap();
        assert_eq!(unstable.sent().len(), 1);
        let mut buffer = [0; 20];
        assert_eq!(unstable.over(0, 20).lay(&mut buffer, 0), 20);
        assert_eq!(buffer[4..6], [7, 8], "reads see what is under way");
        unstable.end(over.order, Ok(Written { stable: true, verifier }));
        assert!(unstable.settle(&unstable.sent(), verifier));
        assert_eq!(unstable.bytes(), super::LEAST_COUNTED, "what is under way stays");
    }

    #[test]
    fn little_writes_are_held_until_they_fill_a_call() {
        let unstable = Unstable::default();
        assert!(unstable.hold(0, &[1; 4], 10) && unstable.hold(4, &[2; 4], 10));
        assert_eq!(unstable.ripe(10, 8), None);
        assert!(unstable.hold(8, &[3; 4], 10), "it has no room in the first");
        assert!(!unstable.hold(11, &[4; 1], 10), "it lies over another");
        assert!(unstable.hold(12, &[5; 6], 10));
        let second = unstable.ripe(10, 8).unwrap();
        let sent = unstable.take_up(second).unwrap();
        assert_eq!((sent.offset, &sent.data[..]), (8, &[3, 3, 3, 3, 5, 5, 5, 5, 5, 5][..]));
        assert!(unstable.take_up(second).is_none(), "once");
        assert_eq!(unstable.ripe(10, 0), Some(1), "the first");
        let mut buffer = [0; 18];
        assert_eq!(unstable.over(0, 18).lay(&mut buffer, 0), 18);
        assert_eq!(buffer, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 5, 5, 5, 5, 5, 5]);
        assert!(unstable.begin(7, &Arc::new(vec![6; 2])).is_none(), "what is held is sent before");
    }

    #[test]
    fn what_is_lost_is_kept_until_it_is_given_up() {
        let file = Unstable::default();
        file.come();
        let verifier = writeverf3([1; 8]);
        let refused = || Fault::Status(nfsstat3::NFS3ERR_NOSPC);
        let writes = [0, 10, 20].map(|offset| file.begin(offset, &Arc::new(vec![7; 10])).unwrap());
        file.end(writes[0].order, Ok(Written { stable: false, verifier }));
        file.end(writes[1].order, Err(refused()));
        assert!(!file.settle(&file.sent(), verifier), "one is lost");
        file.doubt(refused());
        assert_eq!(file.sent().iter().filter(|write| write.state == State::Lost).count(), 2);
        // Written again.
        for write in &writes[..2] {
            file.end(write.order, Ok(Written { stable: false, verifier }));
        }
        assert!(file.whole().is_err(), "it is not durable yet");
        assert!(file.settle(&file.sent(), verifier) && file.whole().is_ok());
        file.give_up(refused());
        file.end(writes[2].order, Ok(Written { stable: false, verifier }));
        assert!(file.sent().is_empty(), "what comes late is given up, too");
        file.come();
        assert!(file.whole().is_err(), "also for who comes while others write");
        assert!(!file.go() && file.go() && file.whole().is_err(), "and for who syncs it later");
        file.come();
        assert!(file.whole().is_ok(), "but not for who writes it anew");
    }
}
