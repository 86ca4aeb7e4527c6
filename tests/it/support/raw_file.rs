//! A file of a mount as a backend's file, for reading, without a backend.

use std::any::Any;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use qchain::backend::{
    BackendError, FileId, FileKind, Identity, ImageLocks, Means, Move, Moved, Result, Stat, StoreFile,
};
use qchain::ids::StorePath;
use qchain::qcow2::Image;

/// The file.
#[derive(Debug)]
pub struct RawFile {
    name: StorePath,
    file: File,
}

/// Opens an image.
pub fn open_image(path: &Path) -> qchain::qcow2::Result<Image> {
    let file = RawFile { name: StorePath::root(), file: File::open(path).unwrap() };
    Image::open(Arc::new(file), &path.file_name().unwrap().to_string_lossy())
}

fn refuse<T>() -> Result<T> {
    Err(BackendError::NotPlain { path: "opened for reading".to_owned() })
}

impl StoreFile for RawFile {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn path(&self) -> &StorePath {
        &self.name
    }
    fn stat(&self) -> Result<Stat> {
        let data = self.file.metadata().map_err(|error| BackendError::from_io("stat", "image", error))?;
        Ok(Stat {
            kind: FileKind::File,
            id: FileId { device: data.dev(), inode: data.ino() },
            length: data.len(),
            allocated_bytes: data.blocks() * 512,
            modified_ns: i128::from(data.mtime()) * 1_000_000_000 + i128::from(data.mtime_nsec()),
            changed_ns: i128::from(data.ctime()) * 1_000_000_000 + i128::from(data.ctime_nsec()),
            links: data.nlink(),
            uid: data.uid(),
            gid: data.gid(),
            mode: data.mode() & 0o7777,
        })
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let mut count = 0;
        while count < buffer.len() {
            match self.file.read_at(&mut buffer[count..], offset + count as u64) {
                Ok(0) => break,
                Ok(more) => count += more,
                Err(error) => return Err(BackendError::from_io("read", "image", error)),
            }
        }
        Ok(count)
    }
    fn write_at(&self, _: u64, _: &[u8]) -> Result<()> {
        refuse()
    }
    fn set_length(&self, _: u64) -> Result<()> {
        refuse()
    }
    fn move_runs(&self, _: &[Arc<dyn StoreFile>], _: &[Move], _: Means) -> Result<Moved> {
        refuse()
    }
    fn sync(&self) -> Result<()> {
        refuse()
    }
    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }
    fn identity(&self) -> Result<Identity> {
        refuse()
    }
    fn set_identity(&self, _: &Identity) -> Result<()> {
        refuse()
    }
    fn image_locks(&self) -> Result<ImageLocks> {
        Ok(ImageLocks::default())
    }
}
