//! qchain's own lock files on an export: seen by this user's processes on this host alone.
//!
//! Locks over NFS are another protocol's (NLM), which is not spoken. So each lock is a byte of a file of this host, which
//! stands for the export; the place of the byte is a digest of the lock's name. Like every such lock it is a hint: what keeps
//! hosts apart is the lease in the store, and what makes a change safe is neither. Where no such file can be had, only the
//! threads of this process exclude each other.

use std::collections::HashMap;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::pool::lock;
use super::url::NfsUrl;
use crate::backend::LockKind;
use crate::ids::StorePath;

/// Where hosts keep locks until they are started anew; else the directory for temporary files is taken.
const PLACE: &str = "/run/lock";

/// A lock's name: host, port, export, path.
type Name = (String, u16, String, StorePath);

/// How many share a lock; nobody else does if one has it exclusively.
#[derive(Clone, Copy, Debug)]
enum Held {
    Shared(usize),
    Exclusive,
}

static TABLE: LazyLock<Mutex<HashMap<Name, Held>>> = LazyLock::new(Mutex::default);

/// A held lock; freed when dropped.
#[derive(Debug)]
struct Guard {
    name: Name,
    /// Holds the byte as long as it is open.
    _file: Option<File>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut table = lock(&TABLE);
        match table.get_mut(&self.name) {
            Some(Held::Shared(count)) if *count > 1 => *count -= 1,
            _ => {
                table.remove(&self.name);
            }
        }
    }
}

/// Takes a lock, `None` if somebody of this user on this host has one that excludes it. Does not wait.
pub(super) fn try_lock(url: &NfsUrl, path: &StorePath, kind: LockKind) -> Option<Box<dyn Send + Sync>> {
    let name = (url.host.clone(), url.port, url.export.clone(), path.clone());
    let mut table = lock(&TABLE);
    let held = match (table.get(&name), kind) {
        (None, LockKind::Exclusive) => Held::Exclusive,
        (None, LockKind::Shared) => Held::Shared(1),
        (Some(Held::Shared(count)), LockKind::Shared) => Held::Shared(count + 1),
        (Some(_), _) => return None,
    };
    let file = match of_host(url, path, kind) {
        Ok(Some(file)) => Some(file),
        Ok(None) => return None,
        Err(error) => {
            tracing::debug!("{url}: other processes of this host do not see its locks: {error}");
            None
        }
    };
    table.insert(name.clone(), held);
    Some(Box::new(Guard { name, _file: file }))
}

/// The file of the export, with the lock's byte locked; `None` if another process has it.
fn of_host(url: &NfsUrl, path: &StorePath, kind: LockKind) -> io::Result<Option<File>> {
    let export = blake3::hash(format!("{} {} {}", url.host, url.port, url.export).as_bytes()).to_hex();
    let directory = directory()?;
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(directory.join(&export.as_str()[..32]))?;
    let digest = blake3::hash(path.as_str().as_bytes());
    let place = digest.as_bytes().iter().take(7).fold(0, |place, byte| place << 8 | i64::from(*byte));
    let kind = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
    };
    let wanted = libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: place,
        l_len: 1,
        l_pid: 0,
    };
    loop {
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&wanted)) {
            Ok(_) => return Ok(Some(file)),
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(None),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A directory of this user's alone.
fn directory() -> io::Result<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    let name = format!("qchain-{user}");
    own_directory(&Path::new(PLACE).join(&name), user)
        .or_else(|_| own_directory(&std::env::temp_dir().join(&name), user))
}

/// Makes it, or finds it, and finds that it is nobody else's.
fn own_directory(path: &Path, user: u32) -> io::Result<PathBuf> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made?,
    }
    let is = std::fs::symlink_metadata(path)?;
    if !is.is_dir() || is.uid() != user || is.mode() & 0o022 != 0 {
        let text = format!("{} is no directory of this user's alone", path.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::{of_host, own_directory, try_lock};
    use crate::backend::LockKind;
    use crate::backend::nfs3::NfsUrl;
    use crate::ids::StorePath;

    #[test]
    fn locks_are_of_one_name_on_one_export() {
        let url = NfsUrl::parse(&format!("nfs://locks.invalid/export{}", std::process::id())).unwrap();
        let path = StorePath::parse("locks/change").unwrap();
        let first = try_lock(&url, &path, LockKind::Shared).unwrap();
        let second = try_lock(&url, &path, LockKind::Shared).unwrap();
        drop(first);
        assert!(try_lock(&url, &path, LockKind::Exclusive).is_none());
        drop(second);
        let alone = try_lock(&url, &path, LockKind::Exclusive).unwrap();
        assert!(try_lock(&url, &path, LockKind::Shared).is_none());
        // As another process sees it.
        assert!(of_host(&url, &path, LockKind::Shared).unwrap().is_none());
        let other = NfsUrl::parse("nfs://locks.invalid/export2").unwrap();
        assert!(try_lock(&other, &path, LockKind::Shared).is_some());
        drop(alone);
        assert!(of_host(&url, &path, LockKind::Exclusive).unwrap().is_some());
        assert!(try_lock(&url, &path, LockKind::Exclusive).is_some());
    }

    #[test]
    fn the_directory_of_locks_is_nobody_elses() {
        let place = tempfile::tempdir().unwrap();
        let user = rustix::process::geteuid().as_raw();
        let own = place.path().join("own");
        for _ in 0..2 {
            assert_eq!(own_directory(&own, user).unwrap(), own);
        }
        assert!(own_directory(&own, user + 1).is_err());
        symlink(&own, place.path().join("link")).unwrap();
        assert!(own_directory(&place.path().join("link"), user).is_err());
        std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(own_directory(&own, user).is_err());
    }
}
