//! Ctrl-C: the first asks the work to stop at its next safe point, the second ends the program.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::failure::Kind;
use crate::progress::Cancel;

/// Requests `cancel` at the first interrupt.
pub fn install(cancel: &Cancel) {
    let cancel = cancel.clone();
    let asked = AtomicBool::new(false);
    let installed = ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(Kind::Cancelled.exit_code()));
        }
        cancel.request();
        eprintln!("qchain: stopping at the next safe point; once more ends it now");
    });
    if let Err(error) = installed {
        // The system's own way of ending a program is left.
        tracing::debug!("no handler for interrupts: {error}");
    }
}
