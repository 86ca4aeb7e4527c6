//! What a monitor is told after a run, as Prometheus text: for the textfile collector of its node exporter.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use super::context::Context;
use super::error::{Exit, Result};
use super::metrics_file::MetricsFile;
use crate::failure::Failure;
use crate::ops::recover::{StoreState, state};

/// The flag of commands that change stores.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub struct Args {
    /// After the run, also a failed one, write figures for Prometheus to this file
    #[arg(long, value_name = "PATH")]
    metrics_file: Option<PathBuf>,
}

/// Figures of a command's last run, `(name, help)`.
const LAST_RUN: &str = "qchain_last_run_timestamp_seconds";
const EXIT_CODE: &str = "qchain_last_run_exit_code";
const FREED: &str = "qchain_last_run_freed_bytes";
const SUCCESS: &str = "qchain_last_success_timestamp_seconds";
const OF_VERBS: [(&str, &str); 4] = [
    (LAST_RUN, "When the command ended last, seconds since 1970."),
    (EXIT_CODE, "Its exit code."),
    (FREED, "Bytes that it gave back to the stores, by the allocation of the files."),
    (SUCCESS, "When the command ended well last, seconds since 1970."),
];

/// One run.
#[derive(Clone, Copy, Debug)]
struct Run {
    verb: &'static str,
    time_seconds: u64,
    exit: Exit,
    freed_bytes: u64,
}

/// Runs a command, and writes the file if there is to be one. `counts` is false for a run that is to change
/// nothing: it is no success that a monitor may rely on.
pub fn run(
    context: Result<Context>,
    verb: &'static str,
    args: &Args,
    counts: bool,
    command: impl FnOnce(&Context) -> Result<Exit>,
) -> Result<Exit> {
    let path = args.metrics_file.as_deref().filter(|_| counts);
    let Some(file) = path.map(MetricsFile::open).transpose()? else {
        return command(&context?);
    };
    let (done, freed_bytes, states) = match context {
        Ok(context) => {
            let done = command(&context);
            let states = context.stores().and_then(|stores| Ok(state(&stores)?));
            (done, context.freed_bytes(), states.unwrap_or_default())
        }
        Err(error) => (Err(error), 0, Vec::new()),
    };
    let exit = match &done {
        Ok(exit) => *exit,
        Err(error) => error.kind().into(),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let run = Run { verb, time_seconds: now.as_secs(), exit, freed_bytes };
    if let Err(error) = file.replace(&text(&file.old, run, &states)) {
        // What was done is done; a monitor sees that the file is old.
        tracing::error!("the metrics file was not written: {error}");
    }
    done
}

/// The file's text. Figures of other commands are taken over from the old one, and so is the last success if
/// this run was none. Figures of stores that could not be read are left out.
fn text(old: &str, run: Run, states: &[StoreState]) -> String {
    let mut text = String::new();
    for (name, help) in OF_VERBS {
        let mut values = values(old, name);
        let value = match name {
            LAST_RUN => Some(run.time_seconds),
            EXIT_CODE => Some(run.exit.0.into()),
            FREED => Some(run.freed_bytes),
            _ => (run.exit == Exit::DONE).then_some(run.time_seconds),
        };
        if let Some(value) = value {
            values.insert(run.verb, value);
        }
        family(&mut text, name, help, "verb", values.into_iter());
    }
    let of_stores = |value: fn(&StoreState) -> Option<u64>| {
        states.iter().filter_map(move |state| Some((state.store.as_str(), value(state)?)))
    };
    let help = "Operations that are not over: half done, or with old files kept for an undo.";
    family(
        &mut text,
        "qchain_open_operations",
        help,
        "store",
        of_stores(|state| Some(state.open_operations)),
    );
    let help = "When the oldest of them began, seconds since 1970; none if there are none.";
    let oldest = of_stores(|state| Some(u64::try_from(state.oldest_begun_ns?).ok()? / 1_000_000_000));
    family(&mut text, "qchain_oldest_intent_timestamp_seconds", help, "store", oldest);
    let help = "Trees that nothing is done to until somebody has looked.";
    family(&mut text, "qchain_frozen_trees", help, "store", of_stores(|state| Some(state.frozen_trees)));
    let help = "Bytes of old files kept for an undo, by their allocation.";
    family(&mut text, "qchain_trash_bytes", help, "store", of_stores(|state| Some(state.trash_bytes)));
    text
}

fn family<'a>(
    text: &mut String,
    name: &str,
    help: &str,
    label: &str,
    values: impl Iterator<Item = (&'a str, u64)>,
) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
    for (of, value) in values {
        // Ids of stores and commands have no character that would have to be escaped.
        let _ = writeln!(text, "{name}{{{label}=\"{of}\"}} {value}");
    }
}

/// The values that an old text has of a name, by command.
fn values<'a>(old: &'a str, name: &str) -> BTreeMap<&'a str, u64> {
    let lines = old.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix("{verb=\""));
    lines
        .filter_map(|rest| {
            let (verb, value) = rest.split_once("\"} ")?;
            let plain = verb.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
            Some((verb, value.parse().ok()?)).filter(|_| plain)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Run, StoreState, text, values};
    use crate::cli::error::Exit;

    #[test]
    fn figures_of_other_commands_and_the_last_success_stay() {
        let state = StoreState {
            store: "s1".to_owned(),
            open_operations: 2,
            oldest_begun_ns: Some(7_900_000_000),
            frozen_trees: 0,
            trash_bytes: 4096,
        };
        let run = |verb, time_seconds, exit| Run { verb, time_seconds, exit: Exit(exit), freed_bytes: 5 };
        let first = text("", run("delete", 100, 0), &[state]);
        assert!(first.contains("qchain_oldest_intent_timestamp_seconds{store=\"s1\"} 7\n"), "{first}");
        assert!(first.contains("qchain_trash_bytes{store=\"s1\"} 4096\n"), "{first}");
        let second = text(&first, run("purge", 200, 0), &[]);
        let third = text(&second, run("delete", 300, 8), &[]);
        let get = |name| values(&third, name).into_iter().collect::<Vec<_>>();
        assert_eq!(get("qchain_last_success_timestamp_seconds"), [("delete", 100), ("purge", 200)]);
        assert_eq!(get("qchain_last_run_timestamp_seconds"), [("delete", 300), ("purge", 200)]);
        assert_eq!(get("qchain_last_run_exit_code"), [("delete", 8), ("purge", 0)]);
        assert!(!third.contains("store="), "what could not be read is left out: {third}");
        // Rubbish in the old text does not spread.
        let rubbish =
            "qchain_last_run_exit_code{verb=\"a\\\"\"} 1\nqchain_last_run_exit_code{verb=\"x\"} y\n";
        assert!(values(rubbish, "qchain_last_run_exit_code").is_empty());
    }
}
