//! An open image: a file, its header, windows of its tables.

use std::sync::Arc;

use crate::backend::StoreFile;
use crate::qcow2::header::Header;

/// An image opened for reading.
#[derive(Clone, Debug)]
pub struct Image {
    file: Arc<dyn StoreFile>,
    header: Arc<Header>,
}

impl Image {
    /// The file.
    #[must_use]
    pub fn file(&self) -> &Arc<dyn StoreFile> {
        &self.file
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }
}
