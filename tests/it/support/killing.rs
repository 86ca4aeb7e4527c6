//! A process that kills itself at a call that was chosen, and what it did until then.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use qchain::backend::faulty::{Call, Faulty};
use qchain::change::recover::Action;
use qchain::change::witness::Witness;
use qchain::change::{Site, SystemClock};
use qchain::failure::with_causes;
use qchain::ops::OpError;
use qchain::ops::delete::{Aim, ModeChoice, Report, Terms};
use qchain::ops::recover::{history, recover, undo};
use qchain::progress::Cancel;
use qchain::store::Stores;
use serde::{Deserialize, Serialize};

use super::crash::{Chain, Shape};
use super::forked::{Forked, asked};
use super::store::{backend, change_by, open_with};

/// So long that no renewal is among the calls of one operation: those come by the clock.
pub const LONG: Duration = Duration::from_hours(1);

/// The test that does what it is asked, and dies of it.
const TEST: &str = "crash_kill::a_process_kills_itself";
const WHAT: &str = "kill";

/// What a process is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verb {
    /// Delete the members.
    Delete,
    /// Make the members full bases.
    Consolidate,
    /// Finish what is there.
    Recover,
    /// Take the last operation back.
    Undo,
}

impl Verb {
    /// What is to be done to a chain.
    pub fn on(chain: &Chain) -> Self {
        if chain.shape == Shape::Consolidate { Self::Consolidate } else { Self::Delete }
    }
}

/// When it dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Death {
    /// Not at all.
    Never,
    /// Right before that mutating call.
    Before(u64),
    /// Right after it.
    After(u64),
}

/// One process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// The store.
    pub root: PathBuf,
    /// By what export it is reached, if not by its directory.
    pub url: Option<String>,
    /// What it does.
    pub verb: Verb,
    /// The members that it is told.
    pub members: Vec<String>,
    /// As on the command line.
    pub mode: String,
    /// How long deleted members keep their names.
    pub grace_ns: i64,
    /// How long they are kept.
    pub retention_ns: i64,
    /// When it dies.
    pub death: Death,
    /// Where it writes what it did.
    pub trace: PathBuf,
}

/// Runs a verb on one store as a single thread; what failed of it, as its exit code would say.
pub fn act(
    stores: &Stores,
    verb: Verb,
    members: &[String],
    mode: ModeChoice,
    terms: Terms,
) -> Result<(), String> {
    let cancel = Cancel::default();
    let site = Site::new(stores, &SystemClock, &cancel, LONG);
    let failed = |error: OpError| with_causes(&error);
    match verb {
        Verb::Delete | Verb::Consolidate => {
            let members: Vec<&str> = members.iter().map(String::as_str).collect();
            let aim = if verb == Verb::Delete { Aim::Delete } else { Aim::Consolidate };
            let report: Report = change_by(&site, (aim, &members), mode, terms, 1).map_err(failed)?;
            report.outcomes.into_iter().find_map(|outcome| outcome.error).map_or(Ok(()), Err).map_err(failed)
        }
        Verb::Recover => recover_telling(stores).map(drop),
        Verb::Undo => {
            let done = history(&site).map_err(failed)?;
            let last = done.last().map(|done| done.operation.to_string()).unwrap_or_default();
            let undone = undo(&site, &last, Witness::None).map_err(failed)?;
            failed_action(&undone.action)
        }
    }
}

/// Recovers; which deleted members it says stay, and why.
pub fn recover_telling(stores: &Stores) -> Result<Vec<String>, String> {
    let cancel = Cancel::default();
    let site = Site::new(stores, &SystemClock, &cancel, LONG);
    let recovered = recover(&site, Witness::None).map_err(|error| with_causes(&error))?;
    recovered.iter().try_for_each(|one| failed_action(&one.action))?;
    Ok(recovered.into_iter().flat_map(|one| one.kept).collect())
}

fn failed_action(action: &Action) -> Result<(), String> {
    match action {
        Action::Failed { .. } | Action::Stuck(_) | Action::Frozen(_) | Action::Busy => {
            Err(format!("{action:?}"))
        }
        Action::TakenBack | Action::Finished | Action::Grace(_) | Action::Retention(_) => Ok(()),
    }
}

/// The mutating calls of a trace; random names are all the same.
pub fn mutations(trace: &[Call]) -> Vec<String> {
    let text = |call: &Call| match &call.from {
        Some(from) => format!("{} {} {}", call.name, plain(from.as_str()), plain(call.path.as_str())),
        None => format!("{} {}", call.name, plain(call.path.as_str())),
    };
    trace.iter().filter(|call| call.mutation.is_some()).map(text).collect()
}

/// Whether calls are the first ones of others. Data is written, cloned and moved side by side, so between other calls those
/// come in any order.
pub fn begins(calls: &[String], first: &[String]) -> bool {
    let is_data =
        |call: &String| ["write_at ", "clone_runs ", "move_runs "].iter().any(|data| call.starts_with(data));
    let mut left: Vec<&String> = Vec::new();
    let mut all = calls.iter();
    first.iter().all(|call| {
        if left.is_empty() {
            let data = all.as_slice().iter().take_while(|call| is_data(call)).count().max(1);
            left = all.by_ref().take(data).collect();
        }
        let found = left.iter().position(|other| *other == call);
        found.map(|at| left.swap_remove(at)).is_some()
    })
}

#[test]
fn only_data_comes_in_any_order() {
    let calls = |text: &str| text.split(", ").map(str::to_owned).collect::<Vec<_>>();
    let clean = calls("create a, write_at a, clone_runs b a, write_at c, sync a, rename a c");
    for (first, expected) in [
        ("create a, write_at a, clone_runs b a", true),
        ("create a, write_at c, clone_runs b a, write_at a, sync a, rename a c", true),
        ("create a, clone_runs b a", true),
        ("create a, write_at a, write_at a", false),
        ("create a, write_at a, sync a", false),
        ("write_at a, create a", false),
        ("create a, write_at a, clone_runs b a, write_at c, sync a, rename a c, sync c", false),
    ] {
        assert_eq!(begins(&clean, &calls(first)), expected, "{first}");
    }
}

/// A path without what is random in it: ids, inode numbers.
fn plain(path: &str) -> String {
    let mut plain = String::new();
    for part in path.split_inclusive(['/', '.', '-']) {
        let word = part.trim_end_matches(['/', '.', '-']);
        let id = word.len() == 32 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
        let inode = ["taken-over-", "/in-place-", "/manifests/"].iter().any(|of| path.contains(of));
        let number = inode && !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
        plain += &if id || number { part.replace(word, "*") } else { part.to_owned() };
    }
    plain
}

/// What [`Order::run`] asks of the process: never returns if it was to die.
pub fn obey() -> bool {
    let Some(text) = asked(WHAT) else { return false };
    let order: Order = serde_json::from_str(&text).unwrap();
    let faulty = Faulty::new(backend(&order.root, order.url.as_deref()));
    let (watched, path) = (faulty.clone(), order.trace.clone());
    let die = move || {
        fs::write(&path, mutations(&watched.trace()).join("\n")).unwrap();
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
    };
    match order.death {
        Death::Never => {}
        Death::Before(at) => faulty.before_mutation(at, die),
        Death::After(at) => faulty.after_mutation(at, die),
    }
    let stores = open_with(&order.root, Arc::new(faulty.clone()));
    let mode = match order.mode.as_str() {
        "copy" => ModeChoice::Copy,
        "clone" => ModeChoice::Clone,
        "in-place" => ModeChoice::InPlace,
        _ => ModeChoice::Auto,
    };
    let terms = Terms { grace_ns: order.grace_ns, retention_ns: order.retention_ns, ..Terms::default() };
    let result = act(&stores, order.verb, &order.members, mode, terms);
    fs::write(&order.trace, mutations(&faulty.trace()).join("\n")).unwrap();
    result.unwrap_or_else(|error| panic!("{error}"));
    true
}

impl Order {
    /// The same with another death.
    pub fn dying(&self, death: Death) -> Self {
        Self { death, ..self.clone() }
    }

    /// Has a process do it; gives its mutating calls. It must end as it was told to, or this says how it did.
    pub fn run(&self) -> Result<Vec<String>, String> {
        let _ = fs::remove_file(&self.trace);
        let output = Forked::new(TEST, WHAT, &serde_json::to_string(self).unwrap()).end();
        let killed = output.status.signal() == Some(9);
        if killed == (self.death == Death::Never) || !(killed || output.status.success()) {
            let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
            return Err(format!("{:?}: {}: {}", self.death, output.status, said.concat()));
        }
        Ok(trace(&self.trace))
    }
}

fn trace(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}
