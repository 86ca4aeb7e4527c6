//! Lists of members: `@FILE` and `-`, one a line.

use std::io::Read;

use super::error::{CliError, Result};

/// The longest list, in bytes.
const MAX_LIST_BYTES: u64 = 64 << 20;

/// Puts the lines of `@FILE` and `-` in their place; empty lines are left out.
pub fn expand(names: &[String]) -> Result<Vec<String>> {
    let mut expanded = Vec::with_capacity(names.len());
    for name in names {
        if name == "-" {
            lines("standard input", std::io::stdin().lock(), &mut expanded)?;
        } else if let Some(file) = name.strip_prefix('@') {
            let opened = std::fs::File::open(file);
            let opened = opened.map_err(|source| CliError::Read { file: file.to_owned(), source })?;
            lines(file, opened, &mut expanded)?;
        } else if name.is_empty() {
            return Err(CliError::usage("a member's name is empty".to_owned()));
        } else {
            expanded.push(name.clone());
        }
    }
    if expanded.is_empty() && !names.is_empty() {
        // "Nothing" must not come to mean "all".
        return Err(CliError::usage("the list of members is empty".to_owned()));
    }
    Ok(expanded)
}

fn lines(file: &str, source: impl Read, into: &mut Vec<String>) -> Result<()> {
    let mut text = String::new();
    let read = source.take(MAX_LIST_BYTES + 1).read_to_string(&mut text);
    read.map_err(|source| CliError::Read { file: file.to_owned(), source })?;
    if text.len() as u64 > MAX_LIST_BYTES {
        return Err(CliError::usage(format!("{file} is no list of members: it is too long")));
    }
    let lines = text.lines().map(|line| line.trim_end_matches('\r')).filter(|line| !line.is_empty());
    into.extend(lines.map(str::to_owned));
    Ok(())
}
