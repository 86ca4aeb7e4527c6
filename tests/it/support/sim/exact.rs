//! Histories by a plan instead of by chance: one process, one deletion, and what goes wrong at which of its calls.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use qchain::backend::Backend;
use qchain::backend::memory::MemoryStore;
use qchain::ops::delete::ModeChoice;
use qchain::store::record::StoreKind;

use super::dice::Dice;
use super::history::{Threads, end};
use super::script::{Action, act};
use super::stage::{Layout, build, templates};
use super::truth::Truth;
use super::world::{Options, Strike, Troubles, World};

const SECOND: u64 = 1_000_000_000;

/// One deletion, on one kind of store.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "a list of independent facts")]
pub struct Case {
    /// Which chains.
    pub template: usize,
    pub kind: StoreKind,
    pub hard_links: bool,
    pub exchange: bool,
    pub clones: bool,
    pub targets: Vec<usize>,
    pub mode: ModeChoice,
    pub grace_ns: i64,
    pub retention_ns: i64,
    /// It is taken back at the end.
    pub undo: bool,
}

/// How it went.
#[derive(Debug)]
pub struct Played {
    pub failure: Option<String>,
    /// Whether the deletion was reported as done.
    pub deleted: bool,
    pub story: String,
    /// Mutating calls up to the end of each action.
    pub calls: Vec<u64>,
}

impl Case {
    /// All that are played.
    pub fn all() -> Vec<Self> {
        let stores = [(true, true), (true, false), (false, true), (false, false)];
        // Chains of four, small clusters and large ones; one with two children; two beside each other.
        let shapes: [(usize, &[usize]); 6] =
            [(0, &[1]), (4, &[1, 2]), (4, &[0]), (0, &[3]), (5, &[1]), (2, &[0])];
        let modes = [ModeChoice::Copy, ModeChoice::Clone, ModeChoice::InPlace];
        // Seconds.
        let times = [(0, 0), (0, 3600), (30, 3600)];
        let mut cases = Vec::new();
        for (number, (template, targets)) in shapes.into_iter().enumerate() {
            for (at, (hard_links, exchange)) in stores.into_iter().enumerate() {
                for (turn, mode) in modes.into_iter().enumerate() {
                    // By clones large clusters only; in place one child only, and where there are hard links.
                    let large = template % 8 >= 4;
                    let fits = match mode {
                        ModeChoice::Clone => large,
                        ModeChoice::InPlace => {
                            hard_links && !matches!((template, targets), (5 | 2, _) | (_, [3]))
                        }
                        _ => true,
                    };
                    let (grace, retention) = times[(number + at + turn) % times.len()];
                    let kind =
                        if (number + turn) % 2 == 0 { StoreKind::Cloudstack } else { StoreKind::Plain };
                    if fits {
                        cases.push(Self {
                            template,
                            kind,
                            hard_links,
                            exchange,
                            clones: mode == ModeChoice::Clone || mode == ModeChoice::InPlace && large,
                            targets: targets.to_vec(),
                            mode,
                            grace_ns: grace * i64::try_from(SECOND).unwrap(),
                            retention_ns: retention * i64::try_from(SECOND).unwrap(),
                            undo: retention > 0 && mode != ModeChoice::InPlace,
                        });
                    }
                }
            }
        }
        cases
    }

    fn actions(&self) -> Vec<Action> {
        let template = &templates()[self.template];
        let targets = self.targets.iter().map(|at| template.members[*at].name.clone()).collect();
        let (mode, grace_ns, retention_ns) = (self.mode, self.grace_ns, self.retention_ns);
        let delete = Action::Delete { targets, mode, grace_ns, retention_ns };
        let mut actions = vec![delete, Action::Recover, Action::Recover];
        if self.undo {
            actions.extend([Action::Undo, Action::Recover]);
        }
        actions
    }

    fn world(&self, seed: u64, strikes: &BTreeMap<u64, Strike>, trace: bool) -> Arc<World> {
        let (template, layout) = (&templates()[self.template], Layout(self.kind));
        let options = Options {
            slots: 1,
            hard_links: self.hard_links,
            exchange: self.exchange,
            one_host: true,
            lease: SECOND / 50,
            tick: 20_000,
            switch: 1 << 40,
            trace,
            reads: false,
        };
        let store = MemoryStore::numbered(1 << 20)
            .with_clone(self.clones)
            .with_hard_links(self.hard_links)
            .with_exchange(self.exchange);
        let memory = build(store, layout, template);
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let began_ns = i64::try_from(since.as_nanos()).unwrap();
        let calm = Troubles { rate: 1 << 40, ..Troubles::default() };
        let world =
            World::new(memory, options, calm, Truth::new(layout, template), Dice::new(seed), began_ns);
        world.state().strikes.clone_from(strikes);
        Arc::new(world)
    }

    /// Lets it happen. The seed decides what a power cut takes and what others do.
    pub fn play(&self, threads: &Threads, seed: u64, strikes: &BTreeMap<u64, Strike>, trace: bool) -> Played {
        let world = self.world(seed, strikes, trace);
        let said = format!("{self:?} {strikes:?}");
        world.state().note(|| said);
        let (mut calls, mut deleted) = (Vec::new(), false);
        let played = catch_unwind(AssertUnwindSafe(|| {
            threads.0[0].install(|| self.act(&world, &mut calls, &mut deleted))?;
            end(&world, threads)
        }));
        let done = played.unwrap_or_else(|panic| {
            Err(format!("it panics: {}", panic.downcast_ref::<String>().cloned().unwrap_or_default()))
        });
        world.state().judge(done);
        let state = world.state();
        Played { failure: state.failure.clone(), deleted, story: state.story(), calls }
    }

    fn act(&self, world: &Arc<World>, calls: &mut Vec<u64>, deleted: &mut bool) -> Result<(), String> {
        for action in self.actions() {
            let waiting = world.state().strikes.len();
            let gave = act(world, 0, &action);
            let state = world.state();
            calls.push(state.mutations);
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let (met_others, struck) = (state.counts.contains_key("foreign"), state.strikes.len() < waiting);
            drop(state);
            match action {
                Action::Delete { .. } => {
                    *deleted = gave.is_some_and(|gave| gave.did());
                    if *deleted && !struck {
                        self.keeps_names(world)?;
                    }
                }
                // What was reported as done can be taken back, whatever happened since to the power.
                Action::Undo
                    if *deleted
                        && !met_others
                        && !struck
                        && self.hard_links
                        && !gave.is_some_and(|gave| gave.brought_back()) =>
                {
                    return Err("what was done cannot be undone".to_owned());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// During its grace a deleted member has its name, and not after.
    fn keeps_names(&self, world: &Arc<World>) -> Result<(), String> {
        for at in &self.targets {
            let name = &templates()[self.template].members[*at].name;
            let there = world.memory.stat(&Layout(self.kind).member(name)).is_ok();
            if there != (self.grace_ns > 0) {
                return Err(format!("with a grace of {} ns {name} is there: {there}", self.grace_ns));
            }
        }
        Ok(())
    }
}
