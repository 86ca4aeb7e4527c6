//! What every command has at hand: settings, stores, progress, the token that stops it.

use std::cell::Cell;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;

use serde::Serialize;

use super::Global;
use super::bar::Bar;
use super::error::{CliError, Result};
use super::settings::{InPlace, Settings};
use super::{config, output, stores};
use crate::change::witness::Witness;
use crate::change::{Clock as _, Site, SystemClock};
use crate::failure::Code;
use crate::ops::delete::InPlacePolicy;
use crate::ops::policy::Policy;
use crate::peer::Zone;
use crate::progress::{Cancel, Progress};
use crate::store::caches::Caches;
use crate::store::connect::connect;
use crate::store::scan::{Scan, ScanOptions};
use crate::store::{StoreConfig, Stores};

/// One call of the program.
pub struct Context {
    /// The configuration.
    pub settings: Settings,
    /// The file it was read from, if any.
    pub config_file: Option<PathBuf>,
    /// Requested by Ctrl-C.
    pub cancel: Cancel,
    configs: Vec<StoreConfig>,
    json: bool,
    read_only: bool,
    bar: Bar,
    /// Bytes given back so far, for the metrics.
    freed_bytes: Cell<u64>,
}

impl Context {
    /// Reads the configuration; opens nothing yet.
    pub fn new(global: &Global, cancel: Cancel) -> Result<Self> {
        let (config_file, settings) = config::load(global.config.as_deref())?;
        let configs = stores::configured(&global.stores, &settings.stores)?;
        let bar = Bar::new(!global.quiet);
        let (json, read_only) = (global.json, global.read_only);
        let freed_bytes = Cell::new(0);
        Ok(Self { settings, config_file, cancel, configs, json, read_only, bar, freed_bytes })
    }

    /// What is told of running work.
    pub fn progress(&self) -> &dyn Progress {
        &self.bar
    }

    /// Whether standard output is to be one JSON document.
    pub fn json(&self) -> bool {
        self.json
    }

    /// What is known of the stores of the call.
    pub fn configs(&self) -> &[StoreConfig] {
        &self.configs
    }

    /// Remembers that bytes were given back.
    pub fn note_freed(&self, bytes: u64) {
        self.freed_bytes.set(self.freed_bytes.get().saturating_add(bytes));
    }

    /// The bytes given back so far.
    pub fn freed_bytes(&self) -> u64 {
        self.freed_bytes.get()
    }

    /// Another zone of the configuration.
    pub fn zone(&self, name: &str) -> Option<Zone> {
        let zone = self.settings.zones.get(name)?;
        Some(zone.named(name))
    }

    /// This process, where it changes those stores.
    pub fn site<'a>(&'a self, stores: &'a Stores) -> Site<'a> {
        Site::new(stores, &SystemClock, &self.cancel, self.settings.safety.lease.0)
    }

    /// Who looks before old files go.
    pub fn witness(&self) -> Witness {
        match self.settings.safety.witness {
            super::settings::Witness::None => Witness::None,
            super::settings::Witness::QemuImg => Witness::QemuImg,
        }
    }

    /// When a merge in place may be chosen.
    pub fn in_place(&self) -> InPlacePolicy {
        match self.settings.safety.in_place {
            InPlace::Auto => InPlacePolicy::Auto,
            InPlace::NoSpace => InPlacePolicy::NoSpace,
            InPlace::Never => InPlacePolicy::Never,
        }
    }

    /// How chains should be.
    pub fn policy(&self) -> Policy {
        let settings = &self.settings.policy;
        Policy {
            max_length: settings.max_length,
            max_base_age: settings.max_base_age.0,
            max_pinned_bytes: settings.max_pinned_bytes.0,
        }
    }

    /// Opens the stores; there must be one.
    pub fn stores(&self) -> Result<Stores> {
        if self.configs.is_empty() {
            let message = "no store: give --store DIR, or name one in the configuration";
            return Err(CliError::usage(message.to_owned()));
        }
        Ok(connect(self.configs.clone())?)
    }

    /// Scans for a reading verb: by the help of the cache of headers.
    pub fn scan_cached(&self, stores: &Stores) -> Result<Scan> {
        let caches = Caches::load(stores, self.settings.server.cache.as_deref());
        let scan = self.scan_with(stores, &caches.loaded, self.settle_ns())?;
        caches.save();
        Ok(scan)
    }

    /// Scans for a changing verb: everything is read. `now` waives the settle time.
    pub fn scan(&self, stores: &Stores, now: bool) -> Result<Scan> {
        self.scan_with(stores, &[], if now { 0 } else { self.settle_ns() })
    }

    fn scan_with(
        &self,
        stores: &Stores,
        caches: &[crate::store::cache::Cache],
        settle_ns: i128,
    ) -> Result<Scan> {
        let options = ScanOptions { now_ns: now_ns(), settle_ns, caches, progress: self.progress() };
        let scan = Scan::run(stores, &options)?;
        self.cancel.check()?;
        Ok(scan)
    }

    fn settle_ns(&self) -> i128 {
        i128::try_from(self.settings.safety.settle.0.as_nanos()).unwrap_or(i128::MAX)
    }

    /// Prints a report: the JSON document, or what `text` writes.
    pub fn print(
        &self,
        report: &impl Serialize,
        text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        self.bar.clear();
        if self.json { output::json(report) } else { output::text(text) }
    }

    /// Prints piece by piece, whatever the form.
    pub fn stream(&self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        self.bar.clear();
        output::text(write)
    }

    /// Whether nothing may be written to any store.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Refuses if the call is `--read-only`.
    pub fn check_writable(&self) -> Result<()> {
        if self.read_only {
            let message = "this command changes the store, and --read-only was given".to_owned();
            return Err(CliError::Refused { code: Code::ReadOnly, message });
        }
        Ok(())
    }

    /// Shows a plan and asks for consent on a terminal; `yes` skips that and is required without one.
    pub fn confirm(&self, plan: &str, yes: bool) -> Result<()> {
        if yes {
            return Ok(());
        }
        self.bar.clear();
        let refused =
            |message: &str| CliError::Refused { code: Code::NotConfirmed, message: message.to_owned() };
        if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
            return Err(refused("there is no terminal to ask on, and --yes was not given"));
        }
        eprint!("{}\nGo on? [y/N] ", plan.trim_end());
        let mut answer = String::new();
        let read = io::stdin().lock().read_line(&mut answer);
        read.map_err(|source| CliError::Read { file: "standard input".to_owned(), source })?;
        self.cancel.check()?;
        if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { Err(refused("not confirmed")) }
    }
}

/// The time, in nanoseconds since 1970.
pub fn now_ns() -> i128 {
    SystemClock.wall_ns().into()
}
