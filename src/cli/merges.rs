//! What `delete`, `reclaim` and `consolidate` share: the flags of a merge, how it begins, how its plan and results are shown.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use super::context::Context;
use super::error::{Exit, Result};
use super::operations::{held_bytes, short};
use super::output::{human, time};
use super::values;
use crate::change::{Guard, Site};
use crate::failure::{Failure, with_causes};
use crate::ops::OpError;
pub use crate::ops::delete::Shown;
use crate::ops::delete::{Aim, Entry, ModeChoice, Plan, Report};
use crate::ops::recover::begin;
use humantime::format_duration;

/// Flags of whatever merges.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub struct Manner {
    /// Do not wait until files without checkpoint have been left alone for the settle time
    #[arg(long)]
    pub now: bool,
    /// How to move data
    #[arg(long, value_enum, default_value = "auto")]
    mode: Mode,
    /// How many trees are worked on at once [default: limits.jobs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: Option<u16>,
    /// How long deleted members keep their names [default: `safety.reader_grace`, with stubs at least 1 min]
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    grace: Option<Duration>,
    /// How long old files are kept for an undo [default: safety.retention]
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    retention: Option<Duration>,
    /// The most bytes that are copied a second [default: limits.rate]
    #[arg(long, value_name = "RATE", value_parser = values::rate)]
    rate: Option<u64>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

impl Manner {
    /// How data is moved.
    pub fn mode(&self) -> ModeChoice {
        match self.mode {
            Mode::Auto => ModeChoice::Auto,
            Mode::Clone => ModeChoice::Clone,
            Mode::InPlace => ModeChoice::InPlace,
            Mode::Copy => ModeChoice::Copy,
        }
    }

    /// How many trees are worked on at once.
    pub fn jobs(&self, context: &Context) -> usize {
        self.jobs.map_or(context.settings.limits.jobs, usize::from)
    }

    /// Bytes a second, 0 for no limit.
    pub fn rate(&self, context: &Context) -> u64 {
        self.rate.unwrap_or(context.settings.limits.rate.0)
    }

    /// How long deleted members keep their names; [`Plan::usual_grace`] if nobody says.
    pub fn grace(&self, context: &Context, plan: &Plan, least: Duration) -> Duration {
        self.grace.or(context.settings.safety.reader_grace.0).unwrap_or_else(|| plan.usual_grace(least))
    }

    /// How long old files are kept after that.
    pub fn retention(&self, context: &Context) -> Duration {
        self.retention.unwrap_or(context.settings.safety.retention.0)
    }
}

/// The flag of what may merge in place.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub struct Vouched {
    /// You vouch that nobody else has the members open, on any host: merges in place need no locks to prove it
    #[arg(long)]
    pub exclusive: bool,
}

/// How to move data.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Mode {
    /// The cheapest that works
    Auto,
    /// By sharing extents
    Clone,
    /// By writing into the lowest deleted member, which cannot be undone
    InPlace,
    /// By copying
    Copy,
}

impl Shown<'_> {
    pub(super) fn plan_text(&self) -> String {
        let mut text = Vec::new();
        // Writing into memory cannot fail.
        let _ = self.write_plan(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    pub(super) fn write_plan(&self, out: &mut dyn Write) -> io::Result<()> {
        for tree in &self.plan.trees {
            for entry in &tree.entries {
                self.write_entry(out, tree.aim, entry)?;
            }
            match &tree.refusal {
                Some(refusal) => writeln!(out, "not done: {} [{}]", with_causes(refusal), refusal.code())?,
                None if !self.undoable(tree) => writeln!(out, "  this cannot be undone")?,
                None => {}
            }
        }
        if self.plan.trees.iter().any(|tree| tree.refusal.is_none() && self.undoable(tree)) {
            let (kept, named) = (format_duration(self.grace + self.retention), format_duration(self.grace));
            writeln!(out, "old files are kept, and it can be undone, for {kept}")?;
            let names_go = self.plan.trees.iter().any(|tree| !tree.departures.is_empty());
            if names_go && !self.grace.is_zero() {
                writeln!(out, "deleted members keep their names, for who reads them now, for {named}")?;
            }
        }
        if self.rehearse {
            writeln!(out, "this is a rehearsal: all is built and proved, and thrown away")?;
        }
        Ok(())
    }

    fn write_entry(&self, out: &mut dyn Write, aim: Aim, entry: &Entry) -> io::Result<()> {
        let what = match (entry.into, aim) {
            (Some(into), Aim::Delete) => format!("merge into {}:", self.name(into)),
            (Some(into), Aim::Consolidate) => format!("make {} a full base, of what is in:", self.name(into)),
            (None, _) => "remove:".to_owned(),
        };
        writeln!(out, "{what}")?;
        for member in &entry.members {
            writeln!(out, "    {}", self.name(*member))?;
        }
        let mut line = format!("  by {} ({})", entry.mode.word(), entry.reason);
        if entry.into.is_some() {
            let (write, clone) = (human(entry.cost.written_bytes()), human(entry.cost.clone_bytes));
            let _ = write!(line, ", writes {write}, shares {clone}");
        }
        if entry.bytes_to_take > 0 {
            return writeln!(out, "{line}, takes {} more", human(entry.bytes_to_take));
        }
        writeln!(out, "{line}, frees {}", human(entry.bytes_to_free))
    }

    pub(super) fn write_results(&self, out: &mut dyn Write, report: &Report) -> io::Result<()> {
        for outcome in &report.outcomes {
            let name = outcome.into.or(outcome.members.first().copied()).map(|id| self.name(id));
            let rehearsed = self.rehearse && outcome.error.is_none();
            let word = if rehearsed { "rehearsed" } else { outcome.status.word() };
            let name = name.unwrap_or_default();
            match &outcome.error {
                // It says which member it is about.
                Some(error) if error.member() == Some(&name) => write!(out, "{word}")?,
                _ => write!(out, "{word}: {name}")?,
            }
            match &outcome.error {
                Some(error) => write!(out, ": {} [{}]", with_causes(error), error.code())?,
                None if outcome.into.is_some() => write!(
                    out,
                    ": wrote {}, shared {}, freed {}, proved {} in {:.2} s",
                    human(outcome.bytes_written + outcome.metadata_bytes_written),
                    human(outcome.bytes_cloned),
                    human(outcome.bytes_freed_now),
                    human(outcome.planned_bytes + outcome.compared_bytes),
                    Duration::from_nanos(outcome.elapsed_ns).as_secs_f64()
                )?,
                None => write!(out, ": freed {}", human(outcome.bytes_freed_now))?,
            }
            match &outcome.note {
                Some(note) if !rehearsed => writeln!(out, "; {note}")?,
                _ => writeln!(out)?,
            }
        }
        if self.rehearse {
            writeln!(out, "it was a rehearsal: nothing was changed")?;
        }
        write_kept(out, report)
    }
}

/// What each operation keeps, and how it is undone. The outcomes of one stand together.
fn write_kept(out: &mut dyn Write, report: &Report) -> io::Result<()> {
    for outcomes in report.outcomes.chunk_by(|a, b| a.operation == b.operation) {
        let held: u64 = outcomes.iter().map(|outcome| outcome.bytes_held_until_purge).sum();
        let Some((outcome, until)) = outcomes.iter().find_map(|one| Some((one, one.undo_until_ns?))) else {
            // Nothing, or what waits for the grace of a merge in place.
            if held > 0 {
                writeln!(out, "{} are freed by a later purge; this cannot be undone", human(held))?;
            }
            continue;
        };
        let (held, until, id) = (human(held), time(until), short(&outcome.operation));
        writeln!(out, "{held} are kept until {until}; until then qchain undo {id} takes it back")?;
    }
    Ok(())
}

/// What every change begins with; what it frees counts as freed by this run.
pub fn start(context: &Context, site: &Site<'_>) -> Result<Guard> {
    let held = held_bytes(site);
    let guard = begin(site, context.witness())?;
    context.note_freed(held.saturating_sub(held_bytes(site)));
    Ok(guard)
}

pub fn nanoseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// What a failure exits with.
pub fn exit(failure: Option<&OpError>) -> Exit {
    failure.map_or(Exit::DONE, |error| Exit::from(error.kind()))
}
