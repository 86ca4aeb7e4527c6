//! What is printed: JSON documents, errors, aligned columns, sizes for people.

use std::io::{self, BufWriter, Write};

use serde::Serialize;

use super::error::{CliError, Result};
use crate::backend::Capabilities;
use crate::failure::{Failure, with_causes};
use crate::ops::document::Document;
pub use crate::ops::document::{ErrorBody, SCHEMA, time};

#[derive(Serialize)]
struct ErrorDocument {
    error: ErrorBody,
}

/// Prints one JSON document.
pub fn json(body: &impl Serialize) -> Result<()> {
    text(|out| {
        serde_json::to_writer(&mut *out, &Document::of(body))?;
        out.write_all(b"\n")
    })
}

/// Prints what `write` writes.
pub fn text(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let mut out = BufWriter::with_capacity(1 << 16, io::stdout().lock());
    write(&mut out).and_then(|()| out.flush()).map_err(|source| CliError::Write { source })
}

/// Prints why a command failed; gives the exit code.
pub fn report_error(error: &CliError, as_json: bool) -> u8 {
    if as_json {
        // If not even this can be written, the exit code has to do.
        let _ = json(&ErrorDocument { error: ErrorBody::of(error) });
    } else if !error.is_broken_pipe() {
        eprintln!("qchain: {} [{}]", with_causes(error), error.code());
    }
    error.kind().exit_code()
}

/// Prints one JSON document to standard error: for commands whose output is something else.
pub fn json_aside(body: &impl Serialize) {
    if let Ok(text) = serde_json::to_string(&Document::of(body)) {
        eprintln!("{text}");
    }
}

/// As [`report_error`], to standard error in either form.
pub fn report_error_aside(error: &CliError, as_json: bool) -> u8 {
    if !as_json {
        return report_error(error, false);
    }
    json_aside(&ErrorDocument { error: ErrorBody::of(error) });
    error.kind().exit_code()
}

/// A number of bytes for people: `1.5 GiB`.
pub fn human(bytes: u64) -> String {
    const UNITS: &[&str] = &["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // Tenths, in whole numbers; rounding up to 1024.0 moves on to the next unit.
    let mut rest = u128::from(bytes) * 10;
    let mut unit = "B";
    for next in UNITS {
        rest = (rest + 512) / 1024;
        unit = next;
        if rest < 10_240 {
            break;
        }
    }
    format!("{}.{} {unit}", rest / 10, rest % 10)
}

/// What a store can do, on one line.
pub fn capabilities(can: &Capabilities) -> String {
    let word = |yes: bool| if yes { "yes" } else { "no" };
    format!(
        "clones {}, hard links {}, locks seen across processes {}, exchange {}, direct I/O {}, network {}",
        word(can.clone),
        word(can.hard_links),
        word(can.byte_range_locks),
        word(can.rename_exchange),
        word(can.direct_io),
        word(can.network)
    )
}

/// A table: a head and rows of as many cells.
pub struct Table {
    rows: Vec<Vec<String>>,
    right: &'static [bool],
}

impl Table {
    /// With a head; `right` says of each column whether its cells are aligned to the right.
    pub fn new(head: &[&str], right: &'static [bool]) -> Self {
        Self { rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()], right }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Writes it; nothing if it has no rows.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.rows.len() < 2 {
            return Ok(());
        }
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for ((column, cell), width) in row.iter().enumerate().zip(&widths) {
                let padding = " ".repeat(width - cell.chars().count());
                let right = self.right.get(column).is_some_and(|right| *right);
                line.push_str(if column > 0 { "  " } else { "" });
                line.push_str(if right { &padding } else { "" });
                line.push_str(cell);
                line.push_str(if right { "" } else { &padding });
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Writes findings, one a line.
pub fn findings<'a>(
    out: &mut dyn Write,
    findings: impl IntoIterator<Item = &'a crate::store::scan::Finding>,
) -> io::Result<()> {
    for finding in findings {
        let severity = finding.code.severity().word();
        writeln!(out, "{severity}: {}: {} [{}]", finding.member, finding.message, finding.code)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::human;

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1 << 20, "1.0 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (60 << 40, "60.0 TiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
