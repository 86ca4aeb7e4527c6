//! Progress for a terminal: one bar on standard error, none where there is no terminal.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

use crate::progress::Progress;

/// What counts so much counts bytes.
const LEAST_BYTES: u64 = 1 << 20;
const BYTES: &str = "{msg} [{wide_bar}] {percent:>3}% {binary_bytes_per_sec} {elapsed}, {eta} left";
const COUNT: &str = "{msg} [{wide_bar}] {percent:>3}% {elapsed}, {eta} left";

/// A bar, or nothing.
pub struct Bar(Option<ProgressBar>);

impl Bar {
    /// A bar if standard error is a terminal and progress is wanted.
    pub fn new(wanted: bool) -> Self {
        if !wanted || !std::io::stderr().is_terminal() {
            return Self(None);
        }
        let bar = ProgressBar::new(0);
        Self(Some(bar))
    }

    /// Takes the bar off the terminal.
    pub fn clear(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bar {
    fn phase(&self, name: &str, total: u64) {
        if let Some(bar) = &self.0 {
            bar.reset();
            bar.set_length(total);
            let template = if total >= LEAST_BYTES { BYTES } else { COUNT };
            // A template that does not parse leaves the crate's own style.
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_message(name.to_owned());
        }
    }

    fn advance(&self, units: u64) {
        if let Some(bar) = &self.0 {
            bar.inc(units);
        }
    }
}
