//! The verbs for a terminal: arguments in, text or one JSON document out, an exit code.
//!
//! Owns: the command line, the configuration, who is asked before a change, how reports look. Does not own:
//! what a verb does. A command is one module: a struct `Args` for clap and
//! `run(&Context, &Args) -> Result<Exit>`; it gets its line in `Command` and in `dispatch`.
//!
//! With `--json` standard output is one JSON document and nothing else, a failure too. Progress and logs go
//! to standard error.

mod adopt;
mod audit;
mod bar;
mod beside;
mod config;
mod config_check;
mod consolidate;
mod context;
mod copy;
mod delete;
mod digest;
mod docs;
mod error;
mod explain;
mod flatten;
mod history;
mod init;
mod interrupt;
mod list;
mod lock_proof;
mod map;
mod members;
mod merges;
mod metrics;
mod metrics_file;
mod operations;
mod output;
mod purge;
mod reclaim;
mod recover;
mod repair;
mod serve;
mod settings;
mod stores;
mod undo;
mod values;
mod verify;

use std::ffi::OsStr;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{ArgAction, Args, Parser, Subcommand};

use context::Context;
use error::{CliError, Exit, Result};

/// What is given before or behind any command.
#[derive(Clone, Debug, Args)]
struct Global {
    /// The configuration file [default: /etc/qchain/qchain.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE", env = "QCHAIN_CONFIG")]
    config: Option<PathBuf>,
    /// A store; may be repeated [env: `QCHAIN_STORE`, several separated by semicolons]
    #[arg(
        long = "store",
        global = true,
        value_name = "DIR_OR_EXPORT[,id=ID][,url=URL][,alias=PREFIX][,layout=primary]"
    )]
    stores: Vec<String>,
    /// Print one JSON document and nothing else
    #[arg(long, global = true)]
    json: bool,
    /// Refuse every command that changes a store
    #[arg(long, global = true)]
    read_only: bool,
    /// Log errors only, show no progress
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Log more; may be repeated
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

/// Verifies, merges, flattens and copies qcow2 snapshot chains on CloudStack secondary storage.
#[derive(Debug, Parser)]
#[command(name = "qchain", version, max_term_width = 100, after_help = MEMBERS_HELP)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const MEMBERS_HELP: &str = "\
MEMBER is [STORE:]install/path, a file name if it is unique, a prefix ending in /, or @FILE or - for a \
list of such, one a line.

Exit codes: 0 done, 1 damage found, 2 usage, 3 refused, 4 not found, 5 busy, 6 image corrupt or \
unsupported, 7 no space, 8 input/output or peer failure, 130 cancelled.";

/// All commands.
#[derive(Debug, Subcommand)]
enum Command {
    /// Opt stores in, and find out what they can do
    Init(init::Args),
    /// Remove everything of qchain's from stores
    Deinit(init::DeinitArgs),
    /// Show chains, their sizes and states
    List(list::Args),
    /// Show where the bytes of a member's view are
    Map(map::Args),
    /// Compute the digest of a member's view
    Digest(digest::Args),
    /// Read settled members once, and keep the digests by which damage is found
    Adopt(adopt::Args),
    /// Check members for damage
    Verify(verify::Args),
    /// Give a damaged member its bad blocks back, from any place that has them
    Repair(repair::Args),
    /// Hold files against headers, checkpoint files, CloudStack's rows and the policy
    Audit(audit::Args),
    /// Delete members: merge each into its children, or remove a tip
    Delete(delete::Args),
    /// Give back the space of deleted snapshots that CloudStack keeps for their children
    Reclaim(reclaim::Args),
    /// Make members full bases of their own, so that chains are shorter; nothing is deleted
    #[command(after_help = consolidate::HELP)]
    Consolidate(consolidate::Args),
    /// Make one image of a member's view that stands alone: a file, a template, a volume, a stream
    #[command(after_help = flatten::HELP)]
    Flatten(flatten::Args),
    /// Bring members from another zone or store: what is missing, proved on arrival
    #[command(after_help = copy::HELP)]
    Copy(copy::Args),
    /// Show what was deleted, until when it can be undone, what is kept for that
    History(history::Args),
    /// Take a delete back, whole
    Undo(undo::Args),
    /// End what is due: deleted members after their grace, old files after their retention
    Purge(purge::Args),
    /// Finish or take back what was interrupted; every changing command begins with it
    #[command(after_help = recover::HELP)]
    Recover(recover::Args),
    /// Serve verbs as durable jobs over HTTP
    Serve(serve::Args),
    /// Say what a reason code means
    Explain(explain::Args),
    /// Look at the configuration
    Config(config_check::Args),
    /// Of init's own: take locks, so that it can see whether they are seen
    #[command(name = lock_proof::COMMAND, hide = true)]
    HoldLock(lock_proof::Args),
    /// Of the package's own: print manual pages and completions
    #[command(hide = true)]
    Docs(docs::Args),
}

/// Runs the command.
fn dispatch(cli: &Cli, cancel: &crate::progress::Cancel) -> Result<Exit> {
    let context = || Context::new(&cli.global, cancel.clone());
    match &cli.command {
        Command::Init(args) => init::run(&context()?, args),
        Command::Deinit(args) => init::run_deinit(&context()?, args),
        Command::List(args) => list::run(&context()?, args),
        Command::Map(args) => map::run(&context()?, args),
        Command::Digest(args) => digest::run(&context()?, args),
        Command::Adopt(args) => {
            metrics::run(context(), "adopt", &args.metrics, true, |context| adopt::run(context, args))
        }
        Command::Verify(args) => verify::run(&context()?, args),
        Command::Audit(args) => audit::run(&context()?, args),
        Command::Delete(args) => {
            metrics::run(context(), "delete", &args.metrics, args.changes(), |context| {
                delete::run(context, args)
            })
        }
        Command::Reclaim(args) => {
            metrics::run(context(), "reclaim", &args.metrics, args.changes(), |context| {
                reclaim::run(context, args)
            })
        }
        Command::Consolidate(args) => {
            metrics::run(context(), "consolidate", &args.metrics, args.changes(), |context| {
                consolidate::run(context, args)
            })
        }
        Command::Flatten(args) => flatten::run(&context()?, args),
        Command::Copy(args) => copy::run(&context()?, args),
        Command::History(args) => history::run(&context()?, args),
        Command::Undo(args) => {
            metrics::run(context(), "undo", &args.metrics, true, |context| undo::run(context, args))
        }
        Command::Purge(args) => {
            metrics::run(context(), "purge", &args.metrics, true, |context| purge::run(context, args))
        }
        Command::Recover(args) => {
            metrics::run(context(), "recover", &args.metrics, true, |context| recover::run(context, args))
        }
        Command::Repair(args) => metrics::run(context(), "repair", &args.metrics, !args.dry_run, |context| {
            repair::run(context, args)
        }),
        Command::Serve(args) => serve::run(&context()?, args),
        Command::Explain(args) => explain::run(cli.global.json, args),
        Command::Config(args) => config_check::run(&context()?, args),
        Command::HoldLock(args) => lock_proof::hold(args),
        Command::Docs(args) => docs::run(args),
    }
}

/// Runs the program with the arguments of the process; gives its exit code.
#[must_use]
pub fn main() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return not_understood(&error),
    };
    start_log(&cli.global, matches!(cli.command, Command::Serve(_)));
    crate::backend::posix::raise_file_limit();
    let cancel = crate::progress::Cancel::default();
    // The service has signals of its own.
    if !matches!(cli.command, Command::Serve(_)) {
        interrupt::install(&cancel);
    }
    let done = check_stores_flags(&cli.global).and_then(|()| dispatch(&cli, &cancel));
    match done {
        Ok(exit) => exit.0,
        Err(error) => output::report_error(&error, cli.global.json),
    }
}

/// A command line that clap refused, or a call for help.
fn not_understood(error: &clap::Error) -> u8 {
    let help = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if help || !flag_given("--json") {
        // Nothing is left to be done if the terminal is gone.
        let _ = error.print();
        return if help { 0 } else { crate::failure::Kind::Usage.exit_code() };
    }
    let text = error.to_string();
    let message = text.trim().trim_start_matches("error: ").to_owned();
    output::report_error(&CliError::usage(message), true)
}

fn flag_given(flag: &str) -> bool {
    own_arguments().any(|argument| argument == OsStr::new(flag))
}

/// The arguments before a lone `--`.
fn own_arguments() -> impl Iterator<Item = std::ffi::OsString> {
    std::env::args_os().skip(1).take_while(|argument| argument != OsStr::new("--"))
}

/// Stores before the command and behind it would silently replace each other.
fn check_stores_flags(global: &Global) -> Result<()> {
    let is_store = |argument: &std::ffi::OsString| {
        argument == OsStr::new("--store")
            || argument.to_str().is_some_and(|text| text.starts_with("--store="))
    };
    if own_arguments().filter(is_store).count() > global.stores.len() {
        let message = "give every --store before the command, or every one behind it";
        return Err(CliError::usage(message.to_owned()));
    }
    Ok(())
}

fn start_log(global: &Global, service: bool) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => tracing::Level::ERROR,
        (false, 0) if !service => tracing::Level::WARN,
        (false, 0 | 1) => tracing::Level::INFO,
        (false, 2) => tracing::Level::DEBUG,
        (false, _) => tracing::Level::TRACE,
    };
    let log = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false);
    // Fails only if a log was started already, which then is used.
    let _ = if service { log.json().flatten_event(true).try_init() } else { log.try_init() };
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    /// What clap checks in debug builds only.
    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
