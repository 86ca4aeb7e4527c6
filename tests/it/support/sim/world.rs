//! The scheduler: many instances, of which exactly one runs at a time; between any two calls of the store
//! the seed decides who goes on, and what goes wrong.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use qchain::backend::LockKind;
use qchain::backend::memory::MemoryStore;
use qchain::ids::StorePath;

use super::dice::Dice;
use super::foreign;
use super::truth::{Truth, When};

/// Calls of a history that goes round in circles.
const MOST_CALLS: u64 = 200_000;
/// How much of a trace is shown.
const SHOWN: usize = 2000;

/// How the locks of files begin that are merged into.
const MERGED: &str = ".qchain/locks/in-place-";

/// One call of a store.
#[derive(Clone, Debug)]
pub struct Call {
    pub name: &'static str,
    pub path: StorePath,
    pub from: Option<StorePath>,
    pub mutates: bool,
}

/// What a call is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Go,
    /// It fails with this error.
    Fail(How, i32),
    /// Its instance ends.
    Crash(How),
}

/// How much a call does that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Nothing,
    Half,
    All,
}

/// What happens at one call, by a plan instead of by chance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strike {
    Crash(How),
    Fail(How, i32),
    Cut,
    /// Others do something, which the dice choose, right before the call.
    Others,
}

/// What the dead are told.
const DEAD: Verdict = Verdict::Fail(How::Nothing, super::EIO);

/// One life of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    pub slot: usize,
    pub number: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ready,
    /// Sleeps or is stopped until then.
    Until(u64),
    Over,
}

/// How far an instance's action is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Idle,
    /// It is about to look at the stores.
    Begun,
    Planned,
}

#[derive(Debug)]
pub struct Slot {
    status: Status,
    life: u64,
    pub phase: Phase,
    /// The call that it is about to make.
    pub pending: Option<Call>,
    /// How far it is with a merge in place.
    merging: Merging,
}

/// How far an instance is with a merge in place, for which it has the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Merging {
    /// It does not merge.
    Not,
    /// It has the lock, and has changed nothing yet.
    Locked,
    /// It writes.
    Writes,
    /// It has looked who is there since it last wrote, and may be about to switch.
    Looked,
}

/// What may still go wrong.
#[derive(Clone, Debug, Default)]
pub struct Troubles {
    pub crashes: u32,
    pub cuts: u32,
    pub stalls: u32,
    pub foreigners: u32,
    pub errors: u32,
    /// One in so many mutating calls is in for one.
    pub rate: u64,
    /// How many mutating calls go well before.
    pub quiet: u64,
}

/// How the store and its users are.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "a list of independent facts")]
pub struct Options {
    pub slots: usize,
    pub hard_links: bool,
    pub exchange: bool,
    pub one_host: bool,
    /// Nanoseconds.
    pub lease: u64,
    /// What a call takes at most, in nanoseconds.
    pub tick: u64,
    /// One in so many calls is followed by another instance's.
    pub switch: u64,
    /// Whether everything is written down, and reads too.
    pub trace: bool,
    pub reads: bool,
}

/// Who holds a lock of which kind, and which of his it is.
type Holder = (LockKind, Life, u64);

pub struct State {
    pub dice: Dice,
    ids: Dice,
    pub now: u64,
    current: usize,
    pub slots: Vec<Slot>,
    pub troubles: Troubles,
    pub truth: Truth,
    pub failure: Option<String>,
    pub trace: Vec<String>,
    /// Of all calls, in their order.
    pub hash: u64,
    pub calls: u64,
    pub counts: BTreeMap<&'static str, u64>,
    locks: BTreeMap<(usize, StorePath), Vec<Holder>>,
    locked: u64,
    pub options: Options,
    /// Others changed what hangs together how: nothing new is planned on it.
    pub disturbed: bool,
    pub foreign_number: u64,
    /// Mutating calls so far, and what happens at which.
    pub mutations: u64,
    pub strikes: BTreeMap<u64, Strike>,
}

pub struct World {
    pub memory: Arc<MemoryStore>,
    state: Mutex<State>,
    turns: Vec<Condvar>,
    /// The wall clock when the history began, nanoseconds since 1970.
    pub began_ns: i64,
}

impl World {
    pub fn new(
        memory: Arc<MemoryStore>,
        options: Options,
        troubles: Troubles,
        truth: Truth,
        mut dice: Dice,
        began_ns: i64,
    ) -> Self {
        let slot = || Slot {
            status: Status::Ready,
            life: 0,
            phase: Phase::Idle,
            pending: None,
            merging: Merging::Not,
        };
        let count = options.slots;
        let current = usize::try_from(dice.below(count as u64)).unwrap();
        let state = State {
            ids: Dice::new(dice.roll()),
            dice,
            now: 0,
            current,
            slots: (0..count).map(|_| slot()).collect(),
            troubles,
            truth,
            failure: None,
            trace: Vec::new(),
            hash: 0,
            calls: 0,
            counts: BTreeMap::new(),
            locks: BTreeMap::new(),
            locked: 0,
            options,
            disturbed: false,
            foreign_number: 0,
            mutations: 0,
            strikes: BTreeMap::new(),
        };
        let turns = (0..count).map(|_| Condvar::new()).collect();
        Self { memory, state: Mutex::new(state), turns, began_ns }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the first turn of a slot.
    pub fn enter(&self, slot: usize) {
        drop(self.wait(self.state(), slot));
    }

    /// A slot has nothing more to do.
    pub fn leave(&self, slot: usize) {
        let mut state = self.state();
        state.slots[slot].status = Status::Over;
        if let Some(next) = state.choose(None) {
            state.current = next;
            self.turns[next].notify_one();
        }
    }

    /// A new process in a slot, whose own turn it is.
    pub fn live(&self, slot: usize) -> Life {
        let mut state = self.state();
        state.slots[slot].life += 1;
        state.slots[slot].status = Status::Ready;
        Life { slot, number: state.slots[slot].life }
    }

    /// After the scripts: the only slot that goes on is this one, and nothing goes wrong any more.
    pub fn calm(&self, slot: usize) {
        let mut state = self.state();
        state.troubles = Troubles { rate: 1 << 40, ..Troubles::default() };
        state.strikes.clear();
        state.current = slot;
        state.slots[slot].status = Status::Ready;
    }

    pub fn is_alive(&self, life: Life) -> bool {
        self.state().is_alive(life)
    }

    fn wait<'s>(&'s self, mut state: MutexGuard<'s, State>, slot: usize) -> MutexGuard<'s, State> {
        while state.current != slot {
            state = self.turns[slot].wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.slots[slot].status = Status::Ready;
        state
    }

    fn hand_over<'s>(&'s self, mut state: MutexGuard<'s, State>, slot: usize) -> MutexGuard<'s, State> {
        if let Some(next) = state.choose(Some(slot))
            && next != slot
        {
            state.current = next;
            self.turns[next].notify_one();
        }
        self.wait(state, slot)
    }

    /// A call is about to be made: others may go first, and things may go wrong.
    pub fn step(&self, life: Life, call: Call) -> Verdict {
        let mut state = self.state();
        if !state.is_alive(life) {
            return DEAD;
        }
        state.note_call(life, &call);
        let (mutates, syncs) = (call.mutates, call.name.starts_with("sync"));
        let looks = matches!(call.name, "read_dir" | "walk") && !call.path.as_str().starts_with(".qchain");
        state.slots[life.slot].pending = Some(call);
        let verdict = state.trouble(self, life, mutates, syncs);
        let merging = &mut state.slots[life.slot].merging;
        *merging = match *merging {
            Merging::Not => Merging::Not,
            _ if mutates => Merging::Writes,
            Merging::Writes if looks => Merging::Looked,
            as_before => as_before,
        };
        let mut state = self.hand_over(state, life.slot);
        state.slots[life.slot].pending = None;
        if state.is_alive(life) { verdict } else { DEAD }
    }

    /// An instance ends, with all that it has open.
    pub fn die(&self, life: Life) {
        let mut state = self.state();
        if state.is_alive(life) {
            state.note(|| format!("{} CRASHES", life.slot));
            state.kill(life.slot);
        }
    }

    pub fn sleep(&self, life: Life, duration: Duration) {
        let mut state = self.state();
        if !state.is_alive(life) {
            return;
        }
        let until = state.now + u64::try_from(duration.as_nanos()).unwrap();
        state.slots[life.slot].status = Status::Until(until);
        drop(self.hand_over(state, life.slot));
    }

    /// A call was made: what it did to names is looked at.
    pub fn after(&self, call: &Call, done_well: bool) {
        let own = |path: &StorePath| path.as_str().starts_with(".qchain/");
        let claims = call.path.as_str().starts_with(".qchain/generations/");
        let shown = !own(&call.path) || call.from.as_ref().is_some_and(|from| !own(from));
        if !call.mutates || !(claims || shown) {
            return;
        }
        let mut state = self.state();
        if claims {
            let done = state.truth.check_claims(&self.memory, When::Instant);
            state.judge(done);
            if call.name == "sync_dir" && done_well {
                state.truth.claims_synced(&call.path);
            }
        }
        if shown {
            let done = state.truth.check(&self.memory, When::Instant);
            state.judge(done);
        }
    }

    pub fn unique(&self) -> u128 {
        let mut state = self.state();
        u128::from(state.ids.roll()) << 64 | u128::from(state.ids.roll())
    }

    pub fn lock_local(&self, life: Life, path: &StorePath, kind: LockKind) -> Option<u64> {
        let mut state = self.state();
        if !state.is_alive(life) {
            return None;
        }
        state.locked += 1;
        let number = state.locked;
        // Nothing is merged in place but where locks are seen by all.
        let by_all = path.as_str().starts_with(MERGED);
        let host = if state.options.one_host || by_all { 0 } else { life.slot };
        let holders = state.locks.entry((host, path.clone())).or_default();
        let free = |(held, ..): &(LockKind, Life, u64)| (*held, kind) == (LockKind::Shared, LockKind::Shared);
        if !holders.iter().all(free) {
            return None;
        }
        holders.push((kind, life, number));
        if by_all {
            state.slots[life.slot].merging = Merging::Locked;
        }
        Some(number)
    }

    pub fn unlock_local(&self, number: u64) {
        let mut state = self.state();
        let State { locks, slots, .. } = &mut *state;
        for ((_, path), holders) in locks.iter_mut() {
            let Some(at) = holders.iter().position(|(_, _, held)| *held == number) else { continue };
            let (_, life, _) = holders.swap_remove(at);
            if path.as_str().starts_with(MERGED) && slots[life.slot].life == life.number {
                slots[life.slot].merging = Merging::Not;
            }
        }
    }
}

impl State {
    pub fn is_alive(&self, life: Life) -> bool {
        self.slots[life.slot].life == life.number
    }

    /// Whether somebody may be about to switch a merge in place, and looks at nothing before.
    pub fn is_switching(&self) -> bool {
        self.slots.iter().any(|slot| slot.merging == Merging::Looked)
    }

    /// An instance is no more; its script goes on with a new one.
    fn kill(&mut self, slot: usize) {
        self.slots[slot].life += 1;
        self.slots[slot].phase = Phase::Idle;
        self.slots[slot].merging = Merging::Not;
        for holders in self.locks.values_mut() {
            holders.retain(|(_, life, _)| life.slot != slot);
        }
        if matches!(self.slots[slot].status, Status::Until(_)) {
            self.slots[slot].status = Status::Ready;
        }
    }

    pub fn judge(&mut self, result: Result<(), String>) {
        if let Err(message) = result {
            self.note(|| format!("WRONG: {message}"));
            self.failure.get_or_insert(message);
            // It is over for all of them.
            (0..self.slots.len()).for_each(|slot| self.kill(slot));
        }
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        if self.options.trace {
            let text = format!("{:>9} us  {}", self.now / 1000, text());
            self.trace.push(text);
        }
    }

    fn note_call(&mut self, life: Life, call: &Call) {
        self.calls += 1;
        if self.calls > MOST_CALLS {
            self.judge(Err("it does not end".to_owned()));
        }
        self.now += 1 + self.dice.below(self.options.tick);
        let words =
            [call.name.as_bytes(), call.path.as_str().as_bytes(), &[u8::try_from(life.slot).unwrap()]];
        for byte in words.concat() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if !call.mutates && !self.options.reads {
            return;
        }
        self.note(|| {
            let mut text = format!("{}: {} {}", life.slot, call.name, call.path);
            if let Some(from) = &call.from {
                let _ = write!(text, " <- {from}");
            }
            text
        });
    }

    /// Who is next; the present one rather than others.
    fn choose(&mut self, present: Option<usize>) -> Option<usize> {
        loop {
            let now = self.now;
            let ready = |slot: &Slot| match slot.status {
                Status::Ready => true,
                Status::Until(until) => until <= now,
                Status::Over => false,
            };
            let who: Vec<usize> = (0..self.slots.len()).filter(|slot| ready(&self.slots[*slot])).collect();
            if let Some(present) = present.filter(|present| who.contains(present))
                && !self.dice.once_in(self.options.switch)
            {
                return Some(present);
            }
            if !who.is_empty() {
                return Some(self.dice.pick(&who));
            }
            let waiting = self.slots.iter().filter_map(|slot| match slot.status {
                Status::Until(until) => Some(until),
                Status::Ready | Status::Over => None,
            });
            self.now = waiting.min()?;
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Something may go wrong with this call, or beside it.
    fn trouble(&mut self, world: &World, life: Life, mutates: bool, syncs: bool) -> Verdict {
        if mutates {
            self.mutations += 1;
            if let Some(strike) = self.strikes.remove(&(self.mutations - 1)) {
                return self.strike(world, life, strike);
            }
        }
        if self.troubles.quiet > 0 {
            self.troubles.quiet -= u64::from(mutates);
            return Verdict::Go;
        }
        // What was not made durable is worth the most right before it is.
        let rate = match (mutates, syncs) {
            (_, true) => self.troubles.rate.div_ceil(3),
            (true, _) => self.troubles.rate,
            (false, _) => self.troubles.rate * 8,
        };
        if !self.dice.once_in(rate) {
            return Verdict::Go;
        }
        let Troubles { crashes, cuts, stalls, foreigners, errors, .. } = self.troubles;
        let kinds = [crashes, cuts, stalls, foreigners, errors];
        let open: Vec<usize> = (0..kinds.len()).filter(|kind| kinds[*kind] > 0).collect();
        if open.is_empty() {
            return Verdict::Go;
        }
        let how = self.dice.pick(&[How::Nothing, How::Half, How::All]);
        match self.dice.pick(&open) {
            0 => {
                self.troubles.crashes -= 1;
                self.strike(world, life, Strike::Crash(how))
            }
            1 => {
                self.troubles.cuts -= 1;
                self.strike(world, life, Strike::Cut)
            }
            2 => {
                self.troubles.stalls -= 1;
                self.count("stall");
                let until = self.now + self.options.lease * (1 + self.dice.below(3));
                self.note(|| format!("{} IS STOPPED", life.slot));
                self.slots[life.slot].status = Status::Until(until);
                Verdict::Go
            }
            3 => {
                let before = self.counts.get("foreign").copied();
                let verdict = self.strike(world, life, Strike::Others);
                self.troubles.foreigners -= u32::from(self.counts.get("foreign").copied() != before);
                verdict
            }
            _ => {
                self.troubles.errors -= 1;
                let errno = if self.dice.once_in(2) { super::EIO } else { super::ENOSPC };
                self.strike(world, life, Strike::Fail(how, errno))
            }
        }
    }

    fn strike(&mut self, world: &World, life: Life, strike: Strike) -> Verdict {
        match strike {
            Strike::Crash(how) => {
                self.truth.halved |= how == How::Half;
                self.count("crash");
                Verdict::Crash(how)
            }
            Strike::Cut => {
                self.count("power cut");
                self.power_cut(world);
                DEAD
            }
            Strike::Others => {
                if let Some(what) = foreign::act(self, &world.memory) {
                    self.count("foreign");
                    self.note(|| format!("OTHERS {what}"));
                    let done = self.truth.check(&world.memory, When::Instant);
                    self.judge(done);
                }
                Verdict::Go
            }
            Strike::Fail(how, errno) => {
                self.truth.halved |= how == How::Half;
                self.count("error");
                self.note(|| format!("{} FAILS, {how:?} done", life.slot));
                Verdict::Fail(how, errno)
            }
        }
    }

    fn power_cut(&mut self, world: &World) {
        self.note(|| "POWER CUT".to_owned());
        let seed = self.dice.roll();
        world.memory.crash_seeded(seed);
        self.truth.power_cut();
        foreign::met_again(self, &world.memory);
        (0..self.slots.len()).for_each(|slot| self.kill(slot));
        let done = self.truth.check(&world.memory, When::Instant);
        self.judge(done);
        let done = self.truth.check_claims(&world.memory, When::Instant);
        self.judge(done);
    }

    /// What is told of a history that went wrong.
    pub fn story(&self) -> String {
        let from = self.trace.len().saturating_sub(SHOWN);
        self.trace[from..].join("\n")
    }
}
