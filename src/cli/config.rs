//! Finding and reading the configuration file.

use std::io;
use std::path::{Path, PathBuf};

use super::error::{CliError, Result};
use super::settings::Settings;

/// Where the configuration is looked for when nobody says.
pub const DEFAULT_FILE: &str = "/etc/qchain/qchain.toml";

/// Reads the file given, or the usual one if it is there. Gives the file read, if any.
pub fn load(given: Option<&Path>) -> Result<(Option<PathBuf>, Settings)> {
    let path = given.unwrap_or(Path::new(DEFAULT_FILE));
    let file = path.display().to_string();
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && given.is_none() => {
            return Ok((None, Settings::default()));
        }
        Err(error) => {
            return Err(CliError::usage(format!("failed to read the configuration {file}: {error}")));
        }
    };
    let settings = Settings::parse(&text)
        .map_err(|error| CliError::usage(format!("{file}: {}", error.to_string().trim_end())))?;
    Ok((Some(path.to_owned()), settings))
}
