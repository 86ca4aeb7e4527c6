//! What an instance does: deletes, undos, purges, one after the other, each as a process of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use qchain::backend::Backend;
use qchain::change::leaving::leaving;
use qchain::change::recover::{Action as Became, Recovered};
use qchain::change::witness::Witness;
use qchain::change::{Clock, Owner, Site};
use qchain::ops::delete::{ModeChoice, Request, Status, Terms, plan, run};
use qchain::ops::recover::{begin, history, purge, recover, undo};
use qchain::ops::{OpError, Result};
use qchain::progress::{Cancel, Silent};
use qchain::store::scan::{Scan, ScanOptions};
use qchain::store::{Stores, names};

use super::super::store::{context, try_open_with};
use super::backend::Shared;
use super::truth::{Foreign, Member, Presence, When};
use super::world::{Life, Phase, World};

/// One thing to do.
#[derive(Clone, Debug)]
pub enum Action {
    Delete {
        targets: Vec<String>,
        mode: ModeChoice,
        grace_ns: i64,
        retention_ns: i64,
    },
    /// The last that can be.
    Undo,
    Recover,
    Purge {
        all: bool,
    },
}

/// The virtual clock of one life.
struct SimClock {
    world: Arc<World>,
    life: Life,
}

impl Clock for SimClock {
    fn wall_ns(&self) -> i64 {
        self.world.began_ns + i64::try_from(self.world.state().now).unwrap()
    }

    fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.world.state().now)
    }

    fn sleep(&self, duration: Duration) {
        self.world.sleep(self.life, duration);
    }

    fn unique(&self) -> u128 {
        self.world.unique()
    }

    fn renews(&self) -> bool {
        false
    }
}

/// What an action gave.
#[derive(Debug, Default)]
pub struct Gave {
    /// Members whose deletion is reported done.
    done: Vec<String>,
    /// Members that came back.
    back: Vec<String>,
    /// The operations that did it.
    operations: Vec<String>,
    pub recovered: Vec<Recovered>,
}

impl Gave {
    /// Whether a deletion was reported as done.
    pub fn did(&self) -> bool {
        !self.done.is_empty()
    }

    /// Whether members came back.
    pub fn brought_back(&self) -> bool {
        !self.back.is_empty()
    }
}

/// Does one action in a life of its own; tells the truth what is to be expected of it.
pub fn act(world: &Arc<World>, slot: usize, action: &Action) -> Option<Gave> {
    let life = world.live(slot);
    let action = expect(world, slot, action);
    let undos_before = world.state().truth.undos_ended();
    let gave = attempt(world, life, &action);
    let alive = world.is_alive(life);
    let mut state = world.state();
    state.slots[slot].phase = Phase::Idle;
    let told = match &gave {
        Ok(gave) => format!("done {:?}, back {:?}, {:?}", gave.done, gave.back, became(&gave.recovered)),
        Err(error) => qchain::failure::with_causes(error),
    };
    state.note(|| format!("{slot} ENDS {action:?}: {told}"));
    let gave = gave.ok().filter(|_| alive);
    let nothing = Gave::default();
    conclude(&mut state, &action, gave.as_ref().unwrap_or(&nothing), undos_before);
    if gave.as_ref().is_some_and(|gave| !gave.done.is_empty() || !gave.back.is_empty()) {
        let done = state.truth.check_claims(&world.memory, When::Instant);
        state.judge(done);
        state.truth.claims_last(&gave.as_ref().map(|gave| gave.operations.clone()).unwrap_or_default());
    }
    let done = state.truth.check(&world.memory, When::Instant);
    state.judge(done);
    gave
}

fn became(recovered: &[Recovered]) -> Vec<&'static str> {
    recovered.iter().map(|one| one.action.word()).collect()
}

/// What the action may change from now on.
fn expect(world: &World, slot: usize, action: &Action) -> Action {
    let mut state = world.state();
    let disturbed = state.disturbed;
    let action = match action {
        // Whoever deletes what others have changed since does as he is told.
        Action::Delete { .. } | Action::Undo if disturbed => Action::Recover,
        action => action.clone(),
    };
    state.note(|| format!("{slot} BEGINS {action:?}"));
    state.slots[slot].phase = Phase::Begun;
    match &action {
        Action::Delete { targets, mode, .. } => {
            for name in targets {
                if let Some(member) = state.truth.members.get_mut(name) {
                    member.open += 1;
                    member.asked = true;
                    member.asked_times += 1;
                    member.presence = Presence::Either;
                    // By clones is what it chooses itself here.
                    member.in_place |= matches!(mode, ModeChoice::InPlace | ModeChoice::Auto);
                }
            }
        }
        Action::Undo => {
            state.truth.undos += 1;
            state.truth.undos_begun += 1;
            for member in state.truth.members.values_mut().filter(|one| one.presence == Presence::Gone) {
                member.presence = Presence::Either;
            }
        }
        Action::Recover | Action::Purge { .. } => {}
    }
    action
}

/// What the action has changed for sure.
fn conclude(state: &mut super::world::State, action: &Action, gave: &Gave, undos_before: u32) {
    // It may have been taken back by others before it ended.
    let undos = state.truth.undos_begun - undos_before;
    let mut grace = 0;
    if let Action::Delete { targets, grace_ns, .. } = action {
        grace = *grace_ns;
        for name in targets {
            if let Some(member) = state.truth.members.get_mut(name) {
                member.open -= 1;
            }
        }
    }
    if let Action::Undo = action {
        state.truth.undos -= 1;
    }
    let foreign = |member: &Member| member.foreign.is_some();
    for name in gave.done.iter().filter(|_| grace == 0 && undos == 0) {
        if let Some(member) = state.truth.members.get_mut(name).filter(|member| !foreign(member)) {
            member.presence = Presence::Gone;
        }
    }
    for name in &gave.back {
        let member = state.truth.members.get_mut(name);
        // Deleted twice and taken back once it still goes.
        let once = |member: &&mut Member| member.open == 0 && member.asked_times < 2 && !foreign(member);
        if let Some(member) = member.filter(once) {
            member.presence = Presence::Must;
        }
    }
}

fn stores(world: &Arc<World>, life: Life) -> Result<Stores> {
    let backend: Arc<dyn Backend> = Arc::new(Shared::new(world, life));
    Ok(try_open_with(Path::new("/nowhere"), backend)?.with_readers(1))
}

fn attempt(world: &Arc<World>, life: Life, action: &Action) -> Result<Gave> {
    let stores = stores(world, life)?;
    let clock = SimClock { world: Arc::clone(world), life };
    let cancel = Cancel::default();
    let (lease, one_host) = {
        let state = world.state();
        (Duration::from_nanos(state.options.lease), state.options.one_host)
    };
    let mut site = Site::new(&stores, &clock, &cancel, lease);
    let host = if one_host { "host".to_owned() } else { format!("host{}", life.slot) };
    site.owner = Owner { host, process: format!("{:03}-{:03}", life.slot, life.number) };
    let name = |place: &qchain::change::record::Place| place.path.file_name().to_owned();
    let mut gave = Gave::default();
    match action {
        Action::Delete { targets, mode, grace_ns, retention_ns } => {
            let terms = Terms {
                grace_ns: *grace_ns,
                retention_ns: *retention_ns,
                rehearse: false,
                witness: Witness::None,
                stubs: false,
            };
            (gave.done, gave.operations) = delete(world, life, &site, targets, *mode, terms)?;
        }
        Action::Undo => {
            let last = history(&site)?.into_iter().rev().find(|done| done.undo_until.is_some());
            if let Some(last) = last {
                let undone = undo(&site, last.operation.as_str(), Witness::None)?;
                gave.back = undone.done.members.iter().map(name).collect();
                gave.operations = vec![undone.operation.to_string()];
            }
        }
        Action::Recover => gave.recovered = recover(&site, Witness::None)?,
        Action::Purge { all } => {
            let purged = purge(&site, *all, Witness::None)?;
            gave.recovered = purged.into_iter().map(|one| one.recovered).collect();
        }
    }
    Ok(gave)
}

/// As `qchain delete` does it.
fn delete(
    world: &World,
    life: Life,
    site: &Site<'_>,
    targets: &[String],
    mode: ModeChoice,
    terms: Terms,
) -> Result<(Vec<String>, Vec<String>)> {
    let stores = site.stores;
    let guard = begin(site, terms.witness)?;
    let options = ScanOptions { now_ns: 0, settle_ns: 0, caches: &[], progress: &Silent };
    let scan = Scan::run(stores, &options)?;
    let asked: Vec<String> =
        targets.iter().map(|name| world.state().truth.layout.member(name).to_string()).collect();
    let targets = names::resolve_all(stores, &scan, &asked).map_err(OpError::from)?;
    let leaving = leaving(site, &scan)?;
    {
        let mut state = world.state();
        if state.is_alive(life) {
            state.slots[life.slot].phase = Phase::Planned;
        }
    }
    let request =
        Request { targets, mode, assume_deleted: true, end_of_chain: true, leaving, ..Request::default() };
    let plan = plan(stores, &scan, &request)?;
    let report = run(&context(site, &scan, &plan, 1, terms), &guard)?;
    let good = report.outcomes.iter().filter(|one| one.status == Status::Done && one.error.is_none());
    let operations = good.clone().map(|outcome| outcome.operation.clone()).collect();
    let members = good.flat_map(|outcome| &outcome.members);
    Ok((members.map(|id| scan.graph.node(*id).key.path.file_name().to_owned()).collect(), operations))
}

/// What stands against the end of an operation although nobody else had a hand in it.
pub fn unended(gave: &Gave, end: bool) -> Option<String> {
    gave.recovered.iter().find_map(|one| match &one.action {
        Became::TakenBack | Became::Finished => None,
        Became::Grace(_) | Became::Retention(_) if !end => None,
        action => Some(format!("{}: {action:?}", one.name.operation)),
    })
}

/// Whether others had a hand in it.
pub fn is_disturbed(world: &World) -> bool {
    let state = world.state();
    let foreign = |member: &Member| matches!(member.foreign, Some(Foreign::File { .. }));
    state.disturbed || state.truth.members.values().any(foreign)
}
