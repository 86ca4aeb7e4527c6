//! One history: from a seed to its end.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use qchain::backend::memory::MemoryStore;
use qchain::ops::delete::ModeChoice;
use qchain::store::record::StoreKind;
use rayon::ThreadPool;

use super::dice::Dice;
use super::script::{Action, act, is_disturbed, unended};
use super::stage::{Layout, Template, build, templates};
use super::truth::{Truth, When};
use super::world::{Options, Troubles, World};

/// The most instances at once.
pub const SLOTS: usize = 3;
/// One second of virtual time, in nanoseconds.
const SECOND: u64 = 1_000_000_000;
/// Longer than any grace or retention, and than strangers' temporaries are left alone.
const LONG: u64 = 3 * 86_400 * SECOND;

/// How a history ended.
#[derive(Debug)]
pub struct Ended {
    pub failure: Option<String>,
    /// What happened, if that was asked for.
    pub story: String,
    pub hash: u64,
    pub calls: u64,
    /// How often what happened.
    pub counts: BTreeMap<&'static str, u64>,
}

/// Threads that instances run on, one each.
pub struct Threads(pub Vec<ThreadPool>);

impl Threads {
    pub fn new() -> Self {
        let pool = |_| rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        Self((0..SLOTS).map(pool).collect())
    }
}

fn troubles(dice: &mut Dice) -> Troubles {
    // Some histories have one kind only, so that what it does is not hidden by the others.
    let alone = dice.below(8);
    let mut some = |number: u64, most: u64| match alone {
        0..=4 if alone != number => 0,
        0..=4 => 1 + dice.below(most),
        _ => dice.below(most + 1),
    };
    let crashes = some(0, 3);
    let cuts = some(1, 2);
    let stalls = some(2, 4);
    let foreigners = some(3, 2);
    let errors = some(4, 3);
    let small = |number: u64| u32::try_from(number).unwrap();
    Troubles {
        crashes: small(crashes),
        cuts: small(cuts),
        stalls: small(stalls),
        foreigners: small(foreigners),
        errors: small(errors),
        rate: dice.pick(&[3, 10, 25, 60]),
        quiet: dice.below(4) * dice.below(60),
    }
}

fn action(dice: &mut Dice, template: &Template) -> Action {
    match dice.below(10) {
        0 | 1 => Action::Undo,
        2 => Action::Recover,
        3 => Action::Purge { all: dice.once_in(2) },
        _ => {
            let names: Vec<String> = template.members.iter().map(|member| member.name.clone()).collect();
            let mut targets = vec![dice.pick(&names)];
            if dice.once_in(3) {
                let another = dice.pick(&names);
                if !targets.contains(&another) {
                    targets.push(another);
                }
            }
            let modes = [
                ModeChoice::Copy,
                ModeChoice::Copy,
                ModeChoice::Clone,
                ModeChoice::InPlace,
                ModeChoice::Auto,
            ];
            // In nanoseconds.
            let mut time = |most: i64| if dice.once_in(2) { 0 } else { 1_000 + most / 2 };
            let (grace_ns, retention_ns) = (time(40_000_000), time(10_000_000_000));
            Action::Delete { targets, mode: dice.pick(&modes), grace_ns, retention_ns }
        }
    }
}

/// A world and what its instances do.
fn set_up(seed: u64, trace: bool) -> (Arc<World>, Vec<Vec<Action>>) {
    let mut dice = Dice::new(seed);
    let template = &templates()[usize::try_from(dice.below(templates().len() as u64)).unwrap()];
    let layout = Layout(dice.pick(&[StoreKind::Plain, StoreKind::Cloudstack]));
    let options = Options {
        slots: 1 + usize::try_from(dice.below(SLOTS as u64)).unwrap(),
        hard_links: !dice.once_in(4),
        exchange: !dice.once_in(3),
        one_host: dice.once_in(2),
        lease: dice.pick(&[SECOND / 50, SECOND / 5, 2 * SECOND]),
        tick: dice.pick(&[20_000, 200_000, 2_000_000]),
        switch: dice.pick(&[2, 8, 30, 100]),
        trace,
        reads: std::env::var_os("QCHAIN_READS").is_some(),
    };
    let scripts = (0..options.slots)
        .map(|_| (0..=dice.below(3)).map(|_| action(&mut dice, template)).collect())
        .collect();
    let store = MemoryStore::numbered(1 << 20)
        .with_clone(!dice.once_in(3))
        .with_hard_links(options.hard_links)
        .with_exchange(options.exchange);
    let memory = build(store, layout, template);
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let began_ns = i64::try_from(since.as_nanos()).unwrap();
    let troubles = troubles(&mut dice);
    let world = World::new(memory, options, troubles, Truth::new(layout, template), dice, began_ns);
    (Arc::new(world), scripts)
}

/// Lets a seed's history happen.
pub fn history(threads: &Threads, seed: u64, trace: bool) -> Ended {
    let (world, scripts) = set_up(seed, trace);
    {
        let mut state = world.state();
        let said = format!("{:?} {:?} {scripts:?}", state.options, state.troubles);
        state.note(|| said);
    }
    std::thread::scope(|scope| {
        for (slot, script) in scripts.iter().enumerate() {
            let (world, pool) = (&world, &threads.0[slot]);
            scope.spawn(move || {
                world.enter(slot);
                for action in script {
                    let acted = catch_unwind(AssertUnwindSafe(|| pool.install(|| act(world, slot, action))));
                    if let Err(panic) = acted {
                        let said = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                        world.state().judge(Err(format!("it panics: {said}")));
                    }
                    if world.state().failure.is_some() {
                        break;
                    }
                }
                world.leave(slot);
            });
        }
    });
    if world.state().failure.is_none() {
        let done = end(&world, threads);
        world.state().judge(done);
    }
    let state = world.state();
    Ended {
        failure: state.failure.clone(),
        story: state.story(),
        hash: state.hash,
        calls: state.calls,
        counts: state.counts.clone(),
    }
}

/// A fresh instance finds what is left, and ends it.
pub fn end(world: &Arc<World>, threads: &Threads) -> Result<(), String> {
    world.calm(0);
    let act = |action: Action, wait: u64| {
        world.state().now += wait;
        threads.0[0].install(|| act(world, 0, &action)).ok_or_else(|| format!("{action:?} fails"))
    };
    let lease = world.state().options.lease;
    let gave = act(Action::Recover, 3 * lease)?;
    world.state().truth.check(&world.memory, When::Recovered)?;
    world.state().truth.check_claims(&world.memory, When::Recovered)?;
    let disturbed = is_disturbed(world);
    match unended(&gave, false) {
        Some(left) if !disturbed => return Err(format!("not recovered: {left}")),
        _ => {}
    }
    act(Action::Recover, LONG)?;
    let gave = act(Action::Purge { all: true }, lease)?;
    let stuck = unended(&gave, true);
    match stuck {
        Some(left) if !disturbed => Err(format!("not ended: {left}")),
        Some(_) => world.state().truth.check(&world.memory, When::Recovered),
        None => world.state().truth.check(&world.memory, When::End),
    }
}
