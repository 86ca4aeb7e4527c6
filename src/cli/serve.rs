//! `qchain serve`.

use std::path::PathBuf;

use super::context::Context;
use super::error::{CliError, Exit, Result};
use crate::service::config::{Config, TlsFiles};
use crate::service::run as serve;

/// Where tokens are looked for when nobody says.
const TOKENS: &str = "/etc/qchain/tokens";

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
        read_only: context.is_read_only(),
    })?;
    Ok(Exit::DONE)
}
