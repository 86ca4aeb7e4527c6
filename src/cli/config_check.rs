//! `qchain config check`: what is understood of the configuration.

use std::io::{self, Write};

use serde::Serialize;

use super::context::Context;
use super::error::{Exit, Result};
use super::output::human;
use super::settings::{Policy, Reclaim, Settings};
use crate::ops::copy::Reuse;

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

/// What to do.
#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Check it, and print it with all defaults
    Check,
}

#[derive(Serialize)]
struct Understood<'a> {
    file: Option<String>,
    config: &'a Settings,
    stores: Vec<StoreOfCall<'a>>,
}

/// A store as this call would use it.
#[derive(Serialize)]
struct StoreOfCall<'a> {
    id: &'a str,
    path: &'a str,
    url: Option<String>,
    prefixes: Vec<String>,
}

/// Prints what is understood.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    let Action::Check = args.action;
    let file = context.config_file.as_ref().map(|file| file.display().to_string());
    let stores = context.configs().iter().map(|config| {
        let url = config.url.as_ref();
        let hosts = url.into_iter().map(crate::cloudstack::prefix::StoreUrl::host_prefix);
        let virtual_machines = url.and_then(crate::cloudstack::prefix::StoreUrl::system_vm_prefix);
        let prefixes = hosts.chain(virtual_machines).chain(config.aliases.iter().cloned()).collect();
        let (id, path) = (config.id.as_str(), config.root.as_str());
        StoreOfCall { id, path, url: url.map(ToString::to_string), prefixes }
    });
    let understood = Understood { file, config: &context.settings, stores: stores.collect() };
    context.print(&understood, |out| {
        match &understood.file {
            Some(file) => writeln!(out, "# {file}, with all defaults")?,
            None => writeln!(out, "# there is no configuration file; these are the defaults")?,
        }
        let text = toml::to_string(&context.settings).map_err(io::Error::other)?;
        out.write_all(text.as_bytes())?;
        write_policy(out, &context.settings.policy)?;
        write_schedule(out, &context.settings)?;
        write_zones(out, &context.settings)?;
        for store in &understood.stores {
            writeln!(out, "# store {} at {}; backing names may begin with:", store.id, store.path)?;
            for prefix in &store.prefixes {
                writeln!(out, "#   {prefix}")?;
            }
        }
        Ok(())
    })?;
    Ok(Exit::DONE)
}

/// What the policy means, in words.
fn write_policy(out: &mut dyn Write, policy: &Policy) -> io::Result<()> {
    let Policy { max_length, max_base_age, max_pinned_bytes, reclaim: _ } = policy;
    let mut warns = Vec::new();
    if *max_length > 0 {
        warns.push(format!("chains of more than {max_length} members (chain-too-long)"));
    }
    if !max_base_age.0.is_zero() {
        let age = humantime::format_duration(max_base_age.0);
        warns.push(format!("full bases older than {age} (base-too-old)"));
    }
    if max_pinned_bytes.0 > 0 {
        let held = human(max_pinned_bytes.0);
        warns.push(format!("chains whose deleted members hold more than {held} (pinned-bytes)"));
    }
    if warns.is_empty() {
        return writeln!(
            out,
            "# policy: none; qchain audit warns of no chain for its length, age or held space"
        );
    }
    writeln!(out, "# policy: qchain audit warns of")?;
    warns.iter().try_for_each(|warning| writeln!(out, "#   {warning}"))
}

/// What comes from other zones, in words.
fn write_zones(out: &mut dyn Write, settings: &Settings) -> io::Result<()> {
    settings.zones.iter().try_for_each(|(name, zone)| {
        let elsewhere = match zone.reuse {
            Reuse::Chain => "that are nowhere in the chain here",
            Reuse::Account => "that are nowhere in the account's chains here (reuse)",
        };
        writeln!(out, "# zone {name}: qchain copy asks {} for blocks {elsewhere}", zone.url)
    })
}

/// What the service begins by itself, in words.
fn write_schedule(out: &mut dyn Write, settings: &Settings) -> io::Result<()> {
    let schedule = &settings.schedule;
    let span = |span: super::settings::Span| humantime::format_duration(span.0).to_string();
    let mut does = Vec::new();
    if !schedule.verify_within.0.is_zero() {
        let rate = match schedule.verify_rate.0 {
            0 => String::new(),
            rate => format!(", at most {} a second", human(rate)),
        };
        does.push(format!(
            "reads every byte of adopted members within {}{rate}",
            span(schedule.verify_within)
        ));
    }
    if !schedule.purge_every.0.is_zero() {
        does.push(format!("ends what is due every {}", span(schedule.purge_every)));
    }
    let every = span(schedule.reclaim_every);
    match (settings.policy.reclaim, schedule.window.0) {
        (Reclaim::Off, _) => {}
        (Reclaim::Report, _) => does.push(format!("tells every {every} what could be reclaimed")),
        (Reclaim::Auto, None) => does.push(format!("reclaims every {every}, at any time of the day")),
        (Reclaim::Auto, Some(window)) => {
            does.push(format!("reclaims every {every}, beginning merges from {window} UTC"));
        }
    }
    if does.is_empty() {
        return writeln!(out, "# schedule: none; qchain serve begins nothing by itself");
    }
    writeln!(out, "# schedule: qchain serve")?;
    does.iter().try_for_each(|line| writeln!(out, "#   {line}"))
}
