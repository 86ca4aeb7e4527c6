//! `qchain explain`: what a code means.

use serde::Serialize;

use super::error::{CliError, Exit, Result};
use super::output::{self, Table};
use crate::failure::Code;

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The code, as findings and errors show it
    #[arg(required_unless_present = "list", conflicts_with = "list")]
    code: Option<String>,
    /// List all codes
    #[arg(long)]
    list: bool,
}

#[derive(Serialize)]
struct Explained {
    code: Code,
    severity: &'static str,
    meaning: &'static str,
    risk: &'static str,
    advice: &'static str,
}

#[derive(Serialize)]
struct Codes {
    codes: Vec<Explained>,
}

fn explained(code: Code) -> Explained {
    Explained {
        code,
        severity: code.severity().word(),
        meaning: code.meaning(),
        risk: code.risk(),
        advice: code.advice(),
    }
}

/// Explains; needs neither stores nor a configuration.
pub fn run(json: bool, args: &Args) -> Result<Exit> {
    match &args.code {
        Some(text) => one(json, text)?,
        None => all(json)?,
    }
    Ok(Exit::DONE)
}

fn one(json: bool, text: &str) -> Result<()> {
    let code = Code::parse(text).ok_or_else(|| {
        CliError::usage(format!("there is no code {text:?}; qchain explain --list names all"))
    })?;
    let explained = explained(code);
    if json {
        return output::json(&explained);
    }
    output::text(|out| {
        writeln!(out, "{code} ({})", explained.severity)?;
        writeln!(out, "  meaning: {}", explained.meaning)?;
        writeln!(out, "  risk:    {}", explained.risk)?;
        writeln!(out, "  advice:  {}", explained.advice)
    })
}

fn all(json: bool) -> Result<()> {
    if json {
        return output::json(&Codes { codes: Code::ALL.iter().copied().map(explained).collect() });
    }
    let mut table = Table::new(&["CODE", "SEVERITY", "MEANING"], &[]);
    for code in Code::ALL {
        table.row(vec![code.to_string(), code.severity().word().to_owned(), code.meaning().to_owned()]);
    }
    output::text(|out| table.write(out))
}
