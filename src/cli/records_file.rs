//! The file given with `--records`.

use std::path::Path;

use super::error::{CliError, Result};
use crate::cloudstack::records::Records;

/// Reads an export of CloudStack's rows. Memory is in the size of the file.
pub fn read(path: &Path) -> Result<Records> {
    let file = path.display().to_string();
    let text = std::fs::read(path).map_err(|source| CliError::Read { file: file.clone(), source })?;
    Records::parse(&text).map_err(|source| CliError::Records { file, source })
}

/// When it was changed last, as far as that can be told.
pub fn changed(path: &Path) -> Option<std::time::SystemTime> {
    std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}
