//! The file of `--metrics-file`: read before a run, replaced in one step after it.

use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::error::{CliError, Result};

/// The largest file that can be one of ours, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// Whoever collects is another user.
const MODE: u32 = 0o644;

/// The file, and what it said before the run.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    /// Its old text; empty if it was not there.
    pub old: String,
}

impl MetricsFile {
    /// Reads it. What cannot be meant is refused before anything is done: a directory that is not there, a
    /// file that is something else.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        let fail = |source| CliError::Read { file: shown.to_string(), source };
        if !directory(path).is_dir() {
            return Err(CliError::usage(format!("--metrics-file {shown}: its directory is not there")));
        }
        let mut bytes = Vec::new();
        match fs::metadata(path) {
            Ok(data) if !data.is_file() => {
                return Err(CliError::usage(format!("--metrics-file {shown} is not a file")));
            }
            Ok(_) => {
                let file = fs::File::open(path).map_err(fail)?;
                file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(fail)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(fail(error)),
        }
        match String::from_utf8(bytes) {
            Ok(old) if old.is_empty() || old.starts_with("# HELP qchain_") => {
                Ok(Self { path: path.to_owned(), old })
            }
            _ => Err(CliError::usage(format!("--metrics-file {shown}: that file was not written by qchain"))),
        }
    }

    /// Replaces it: a collector finds the old text or the new one.
    pub fn replace(&self, text: &str) -> io::Result<()> {
        let mut builder = tempfile::Builder::new();
        // A collector of `*.prom` does not take the temporary for one.
        builder.prefix(".qchain-metrics.").permissions(Permissions::from_mode(MODE));
        let mut file = builder.tempfile_in(directory(&self.path))?;
        file.write_all(text.as_bytes())?;
        // Whatever the mask of this process.
        file.as_file().set_permissions(Permissions::from_mode(MODE))?;
        file.persist(&self.path).map(drop).map_err(|error| error.error)
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
