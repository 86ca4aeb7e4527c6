//! `qchain serve`.

use std::path::PathBuf;

use super::context::Context;
use super::error::{CliError, Exit, Result};
use super::settings::{Reclaim, Settings};
use crate::service::config::{Config, RowSource, TlsFiles};
use crate::service::run as serve;
use crate::service::schedule::Schedule;

/// Where tokens are looked for when nobody says.
const TOKENS: &str = "/etc/qchain/tokens";

/// The variable that has the URL of CloudStack's database, for it has a password in it.
const DATABASE: &str = "QCHAIN_DATABASE";

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to listen; port 0 takes a free one [default: server.listen]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
    /// The file of bearer tokens, one `NAME read/operate/admin SECRET` a line [default: server.tokens]
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
}

/// Serves until it is told to stop.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    if context.configs().is_empty() {
        let message = "no store: give --store DIR, or name one in the configuration";
        return Err(CliError::usage(message.to_owned()));
    }
    let settings = &context.settings;
    let server = &settings.server;
    let tls = match (&server.certificate, &server.key) {
        (Some(certificate), Some(key)) => {
            Some(TlsFiles { certificate: certificate.clone(), key: key.clone() })
        }
        (None, None) => None,
        _ => return Err(CliError::usage("server.certificate and server.key belong together".to_owned())),
    };
    let rows = rows(settings)?;
    let tokens = args.tokens.clone().or_else(|| server.tokens.clone());
    serve(Config {
        stores: context.configs().to_vec(),
        listen: args.listen.clone().unwrap_or_else(|| server.listen.clone()),
        tokens: tokens.unwrap_or_else(|| PathBuf::from(TOKENS)),
        tls,
        cache: server.cache.clone(),
        exports: server.exports.clone(),
        jobs: settings.limits.jobs.clamp(1, 256),
        rate: settings.limits.rate.0,
        connections: server.connections.clamp(1, 1 << 20),
        keep_jobs: server.keep_jobs.0,
        settle: settings.safety.settle.0,
        lease: settings.safety.lease.0,
        grace: settings.safety.reader_grace.0,
        retention: settings.safety.retention.0,
        in_place: context.in_place(),
        witness: context.witness(),
        policy: context.policy(),
        schedule: schedule(settings),
        rows,
        zones: settings.zones.iter().map(|(name, zone)| zone.named(name)).collect(),
        read_only: context.is_read_only(),
    })?;
    Ok(Exit::DONE)
}

/// CloudStack's rows; without any nothing can be reclaimed.
fn rows(settings: &Settings) -> Result<Option<RowSource>> {
    let file = settings.schedule.records.clone().map(RowSource::File);
    let database = std::env::var(DATABASE).ok().filter(|url| !url.is_empty()).map(RowSource::Database);
    match file.or(database) {
        None if settings.policy.reclaim != Reclaim::Off => {
            let message = format!("policy.reclaim needs CloudStack's rows: schedule.records, or {DATABASE}");
            Err(CliError::usage(message))
        }
        found => Ok(found),
    }
}

fn schedule(settings: &Settings) -> Schedule {
    let schedule = &settings.schedule;
    Schedule {
        verify_within: schedule.verify_within.0,
        verify_rate: schedule.verify_rate.0,
        purge_every: schedule.purge_every.0,
        reclaim: settings.policy.reclaim.into(),
        reclaim_every: schedule.reclaim_every.0,
        window: schedule.window.0,
    }
}
