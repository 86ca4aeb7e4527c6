//! The key by which the service signs URLs: `url-key` on the first store that is opted in, so that all instances and
//! all restarts have the same one; else in the directory of caches of this host.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::{Backend, BackendError, publish};
use crate::ids::StorePath;
use crate::store::caches::directory;
use crate::store::facts::read_whole;
use crate::store::record::own;
use crate::store::{Result, StoreError, Stores};

/// The name of the file.
const NAME: &str = "url-key";
/// 64 hex digits and a line's end.
const LENGTH: u64 = 65;
/// How often a key that is just being written is looked at, and how long between.
const LOOKS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// The key; made if there is none yet and `may_write` allows it, or in the directory of caches. Blocks.
///
/// # Errors
///
/// What the store fails with; a file that is no key is a usage error. `None` if there is no place for one.
///
/// # After a crash
///
/// The key is there or it is not. On a store without hard links a part of it may be, which is told as no key.
pub fn url_key(stores: &Stores, cache: Option<&Path>, may_write: bool) -> Result<Option<[u8; 32]>> {
    let opted_in = stores.iter().map(|(_, store)| store).find(|store| store.record().is_some());
    if let Some(store) = opted_in {
        let may_write = may_write && store.writable_record().is_ok();
        if let Some(key) = key_in(store.backend(), &own(&[]), &own(&[NAME]), may_write)? {
            return Ok(Some(key));
        }
    }
    let Some(directory) = directory(cache) else { return Ok(None) };
    let name = StorePath::parse(NAME).unwrap_or_default();
    key_in(&directory, &StorePath::root(), &name, true)
}

fn key_in(
    backend: &Arc<dyn Backend>,
    directory: &StorePath,
    path: &StorePath,
    may_write: bool,
) -> Result<Option<[u8; 32]>> {
    let failed = |source| StoreError::Backend { store: backend.describe(), source };
    for _ in 0..LOOKS {
        match read_whole(backend, path, LENGTH) {
            // One without hard links takes the name first; the bytes follow.
            Ok(bytes) => match parse(&bytes) {
                Some(key) => return Ok(Some(key)),
                None => std::thread::sleep(PAUSE),
            },
            Err(BackendError::NotFound { .. }) if may_write => {
                match publish::write_new(backend.as_ref(), directory, path, &fresh()) {
                    Ok(()) | Err(BackendError::AlreadyExists { .. }) => {}
                    Err(source) => return Err(failed(source)),
                }
            }
            Err(BackendError::NotFound { .. }) => return Ok(None),
            Err(source) => return Err(failed(source)),
        }
    }
    Err(StoreError::Usage { detail: format!("{}: {path} is no key; remove it", backend.describe()) })
}

fn parse(bytes: &[u8]) -> Option<[u8; 32]> {
    let text = std::str::from_utf8(bytes).ok()?.strip_suffix('\n')?;
    blake3::Hash::from_hex(text).ok().map(|hash| *hash.as_bytes())
}

/// A new key of 244 random bits, as the file has it.
fn fresh() -> Vec<u8> {
    let random = [uuid::Uuid::new_v4().into_bytes(), uuid::Uuid::new_v4().into_bytes()].concat();
    let key = blake3::derive_key("qchain 2026 key of signed URLs", &random);
    format!("{}\n", blake3::Hash::from_bytes(key).to_hex()).into_bytes()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{key_in, parse};
    use crate::backend::Backend;
    use crate::backend::memory::MemoryStore;
    use crate::ids::StorePath;

    #[test]
    fn the_first_one_makes_the_key_and_all_others_read_it() {
        let backend: Arc<dyn Backend> = Arc::new(MemoryStore::new());
        let (root, path) = (StorePath::root(), StorePath::parse("url-key").unwrap());
        assert_eq!(key_in(&backend, &root, &path, false).unwrap(), None);
        let made = key_in(&backend, &root, &path, true).unwrap().unwrap();
        assert_eq!(key_in(&backend, &root, &path, true).unwrap(), Some(made));
        assert_eq!(key_in(&backend, &root, &path, false).unwrap(), Some(made));
        assert_ne!(made, [0; 32]);
    }

    #[test]
    fn what_is_no_key_is_none() {
        for bad in [&b""[..], b"00\n", &[b'0'; 64], &[0; 65]] {
            assert_eq!(parse(bad), None);
        }
        assert_eq!(parse(&[&[b'0'; 64][..], b"\n"].concat()), Some([0; 32]));
    }
}
