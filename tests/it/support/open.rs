//! An image by its path.

use std::path::Path;

use qchain::backend::Backend as _;
use qchain::backend::posix::PosixStore;
use qchain::ids::StorePath;
use qchain::qcow2::{Image, Result};

/// Opens an image as a member of the directory it lies in.
pub fn open_image(path: &Path) -> Result<Image> {
    let store = PosixStore::open(path.parent().unwrap()).unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    Image::open(store.open(&StorePath::parse(name).unwrap()).unwrap(), name)
}
