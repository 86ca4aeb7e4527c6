//! `qchain docs`, of the package's own: manual pages and completions, made of the command line as it is compiled.
//!
//! Printed, not written: who builds the package says where they go.

use std::io::Write as _;

use clap::{CommandFactory as _, ValueEnum};
use clap_complete::Shell;

use super::Cli;
use super::error::{CliError, Exit, Result};

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to print
    #[arg(value_enum)]
    what: What,
    /// Of `man` the command, none for the whole program; of `completion` the shell: bash, zsh, fish
    name: Option<String>,
}

/// What can be printed.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// The names of all commands that have a manual page.
    Commands,
    /// A manual page.
    Man,
    /// Completions.
    Completion,
}

/// Prints it to standard output.
pub fn run(args: &Args) -> Result<Exit> {
    let text = match args.what {
        What::Commands => commands().join("\n").into_bytes(),
        What::Man => man(args.name.as_deref())?,
        What::Completion => completion(args.name.as_deref())?,
    };
    let mut out = std::io::stdout().lock();
    // Whoever reads it may have seen enough.
    let _ = out.write_all(&text).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush());
    Ok(Exit::DONE)
}

/// All commands for people.
fn commands() -> Vec<String> {
    let shown = |command: &&clap::Command| !command.is_hide_set();
    Cli::command().get_subcommands().filter(shown).map(|command| command.get_name().to_owned()).collect()
}

fn man(name: Option<&str>) -> Result<Vec<u8>> {
    let mut whole = Cli::command();
    // Also gives each command the options that all have.
    whole.build();
    let command = match name {
        None => whole,
        Some(name) => {
            let found = whole.find_subcommand(name).filter(|command| !command.is_hide_set()).cloned();
            found.ok_or_else(|| CliError::usage(format!("{name} is no command")))?
        }
    };
    let page = clap_mangen::Man::new(command).section("1").manual("qchain");
    let mut text = Vec::new();
    // Into memory, which takes all.
    let _ = page.render(&mut text);
    Ok(text)
}

fn completion(name: Option<&str>) -> Result<Vec<u8>> {
    let shell = match name {
        Some("bash") => Shell::Bash,
        Some("zsh") => Shell::Zsh,
        Some("fish") => Shell::Fish,
        _ => return Err(CliError::usage("completions are of bash, zsh or fish".to_owned())),
    };
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "qchain", &mut text);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::{commands, completion, man};

    #[test]
    fn every_command_has_its_page_and_its_place_in_the_completions() {
        let bash = String::from_utf8(completion(Some("bash")).unwrap()).unwrap();
        let all = String::from_utf8(man(None).unwrap()).unwrap();
        for name in commands() {
            let page = String::from_utf8(man(Some(&name)).unwrap()).unwrap();
            assert!(page.contains(&format!(".TH qchain-{name} 1")), "{name}: {page}");
            assert!(page.contains("\\-\\-store"), "{name}");
            assert!(
                bash.contains(&format!("qchain__{}", name.replace('-', "__"))) || bash.contains(&name),
                "{name}"
            );
            assert!(all.contains(&format!("qchain\\-{name}(1)")), "{name}: {all}");
        }
        assert!(man(Some("hold-lock")).is_err() && completion(Some("tcsh")).is_err());
    }
}
