//! Storage that goes bad.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Puts other bytes into a file as bad storage does: nobody wrote, so the time stays.
pub fn rot(path: &Path, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(bytes, at).unwrap();
    file.set_modified(modified).unwrap();
}
