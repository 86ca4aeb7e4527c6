//! Owner, mode and attributes: read, given to another file, and proven to have taken.

use std::fs::File;
use std::io;

use rustix::fs::{self, Gid, Mode, Uid, XattrFlags};
use rustix::io::{Errno, retry_on_intr};

use super::failed;
use crate::backend::{BackendError, Identity, Result};
use crate::ids::StorePath;

/// The kernel's limits (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`): 64 KiB of names, 64 KiB a value.
const MOST_BYTES: usize = 65_536;

/// What a file has. An attribute that this process may not read does not appear, as one of `trusted.` for
/// a process without rights; a name that is no UTF-8 is an error, as it could not be given to another file.
pub(super) fn read(file: &File) -> io::Result<Identity> {
    let stat = fs::fstat(file)?;
    let mut attributes = Vec::new();
    for name in names(file)? {
        match filled(|buffer| fs::fgetxattr(file, name.as_str(), buffer)) {
            Ok(value) => attributes.push((name, value)),
            Err(Errno::NODATA | Errno::PERM | Errno::ACCESS | Errno::NOTSUP) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    attributes.sort();
    Ok(Identity { uid: stat.st_uid, gid: stat.st_gid, mode: stat.st_mode & 0o7777, attributes })
}

/// Gives a file that identity and reads it back. Owner first: a change of owner takes set-user-id bits and
/// capabilities away. Mode last: an ACL changes it.
pub(super) fn give(file: &File, path: &StorePath, wanted: &Identity) -> Result<()> {
    let io = |error| failed("give its owner and attributes to", path, error);
    let before = read(file).map_err(io)?;
    if (before.uid, before.gid) != (wanted.uid, wanted.gid) {
        let uid = (before.uid != wanted.uid).then(|| Uid::from_raw(wanted.uid));
        let gid = (before.gid != wanted.gid).then(|| Gid::from_raw(wanted.gid));
        let owner = format!("owner {}:{}", wanted.uid, wanted.gid);
        retry_on_intr(|| fs::fchown(file, uid, gid)).map_err(|errno| squashed(path, owner, errno))?;
    }
    for (name, value) in &wanted.attributes {
        if !before.attributes.iter().any(|(has, is)| has == name && is == value) {
            retry_on_intr(|| fs::fsetxattr(file, name.as_str(), value, XattrFlags::empty()))
                .map_err(|errno| squashed(path, format!("attribute {name}"), errno))?;
        }
    }
    for (name, _) in &before.attributes {
        if !wanted.attributes.iter().any(|(want, _)| want == name) {
            match retry_on_intr(|| fs::fremovexattr(file, name.as_str())) {
                // The change of owner may have taken it already.
                Ok(()) | Err(Errno::NODATA) => {}
                Err(errno) => return Err(squashed(path, format!("no attribute {name}"), errno)),
            }
        }
    }
    let mut is = read(file).map_err(io)?;
    if is.mode != wanted.mode {
        retry_on_intr(|| fs::fchmod(file, Mode::from_raw_mode(wanted.mode)))
            .map_err(|errno| squashed(path, format!("mode {:04o}", wanted.mode), errno))?;
        is = read(file).map_err(io)?;
    }
    prove(path, &is, wanted)
}

/// A call can succeed and do nothing, as on an export that squashes us: only what is there counts.
fn prove(path: &StorePath, is: &Identity, wanted: &Identity) -> Result<()> {
    let what = if (is.uid, is.gid) != (wanted.uid, wanted.gid) {
        format!("owner {}:{}", wanted.uid, wanted.gid)
    } else if is.mode != wanted.mode {
        format!("mode {:04o}", wanted.mode)
    } else if is.attributes != wanted.attributes {
        let missing = wanted.attributes.iter().find(|want| !is.attributes.contains(want));
        let surplus = is.attributes.iter().find(|has| !wanted.attributes.contains(has));
        missing
            .or(surplus)
            .map_or_else(|| "its attributes".to_owned(), |(name, _)| format!("attribute {name}"))
    } else {
        return Ok(());
    };
    Err(BackendError::Squashed { path: path.to_string(), what })
}

/// A refusal for lack of rights or of support is the store's policy; anything else is an I/O failure.
fn squashed(path: &StorePath, what: String, errno: Errno) -> BackendError {
    match errno {
        Errno::PERM | Errno::ACCESS | Errno::NOTSUP | Errno::INVAL | Errno::NOSYS => {
            BackendError::Squashed { path: path.to_string(), what }
        }
        _ => failed("give its owner and attributes to", path, errno),
    }
}

fn names(file: &File) -> io::Result<Vec<String>> {
    let list = match filled(|buffer| fs::flistxattr(file, buffer)) {
        // No attributes at all on this file system.
        Err(Errno::NOTSUP | Errno::NOSYS) => return Ok(Vec::new()),
        other => other?,
    };
    let unreadable = |_| io::Error::new(io::ErrorKind::InvalidData, "the name of an attribute is no UTF-8");
    list.split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8(name.to_vec()).map_err(unreadable))
        .collect()
}

/// Calls with a larger and larger buffer until the answer fits.
fn filled(mut call: impl FnMut(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 512];
    loop {
        match call(&mut buffer) {
            Err(Errno::INTR) => {}
            Err(Errno::RANGE) if buffer.len() < MOST_BYTES => buffer.resize(buffer.len() * 8, 0),
            Err(errno) => return Err(errno),
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
        }
    }
}
