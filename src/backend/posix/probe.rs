//! What a mount can do, found out by trying: a server's promise is known only from what it does.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use reflink_copy::ReflinkBlockBuilder;
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::{PLAIN, PosixStore, failed, locks};
use crate::backend::{Capabilities, Result, publish};
use crate::ids::StorePath;

/// What a clone may need to be aligned to: block sizes of file systems that clone.
const ALIGNMENTS: [u64; 5] = [512, 1024, 4096, 16_384, 65_536];

/// `f_type` of network file systems, and of those in user space, which may be anything.
const NETWORK: [u32; 7] = [
    0x6969,      // NFS
    0xFF53_4D42, // CIFS
    0xFE53_4D42, // SMB2
    0x517B,      // SMB
    0x00C3_6400, // Ceph
    0x6573_5546, // FUSE
    0x0102_1997, // 9P
];

/// Two files in the scratch directory, and a name for a third; gone when dropped.
struct Scratch {
    directory: OwnedFd,
    names: [String; 3],
    first: File,
    second: File,
}

/// [`crate::backend::Backend::probe`] for a mount.
pub(super) fn probe(store: &PosixStore, scratch: &StorePath) -> Result<Capabilities> {
    let directory = store.directory("probe", scratch)?;
    let fail = |error: io::Error| failed("probe", scratch, error);
    let scratch = Scratch::new(directory).map_err(fail)?;
    let clone_alignment = scratch.clone_alignment().map_err(fail)?;
    Ok(Capabilities {
        clone: clone_alignment != 0,
        clone_alignment,
        byte_range_locks: scratch.locks().map_err(fail)?,
        hard_links: scratch.hard_links().map_err(fail)?,
        rename_exchange: scratch.exchange().map_err(fail)?,
        direct_io: scratch.direct().map_err(fail)?,
        network: is_network(&scratch.directory).map_err(fail)?,
    })
}

impl Scratch {
    fn new(directory: OwnedFd) -> io::Result<Self> {
        // Told by their names from the temporary files of a change, by whoever sweeps.
        let names = [(); 3].map(|()| format!("probe.{}", publish::temporary_name()));
        let first = create(&directory, &names[0])?;
        let second = match create(&directory, &names[1]) {
            Ok(second) => second,
            Err(error) => {
                fs::unlinkat(&directory, names[0].as_str(), AtFlags::empty())?;
                return Err(error);
            }
        };
        Ok(Self { directory, names, first, second })
    }

    /// The smallest alignment at which cloning works, 0 if none does.
    fn clone_alignment(&self) -> io::Result<u64> {
        self.first.write_all_at(&vec![1; 262_144], 0)?;
        self.second.set_len(262_144)?;
        for alignment in ALIGNMENTS {
            let Some(length) = NonZeroU64::new(alignment) else { continue };
            let cloned = ReflinkBlockBuilder::new(&self.first, &self.second, length)
                .from_offset(alignment)
                .to_offset(2 * alignment)
                .reflink_block();
            match cloned.as_ref().map_err(Errno::from_io_error) {
                Ok(()) => return Ok(alignment),
                Err(Some(Errno::NOSPC | Errno::DQUOT | Errno::IO)) => cloned?,
                // Not supported, or not at this alignment.
                Err(_) => {}
            }
        }
        Ok(0)
    }

    /// Whether a lock taken through one open file is seen through another.
    fn locks(&self) -> io::Result<bool> {
        let flags = OFlags::RDWR | PLAIN;
        let again = File::from(fs::openat(&self.directory, self.names[0].as_str(), flags, Mode::empty())?);
        if locks::take_shared(&self.first, 100, 1).is_err() {
            return Ok(false);
        }
        let seen = locks::held(&again, 100, 1).unwrap_or(false);
        Ok(seen && !locks::held(&again, 101, 1).unwrap_or(true))
    }

    fn hard_links(&self) -> io::Result<bool> {
        let [first, _, third] = &self.names;
        if fs::linkat(&self.directory, first.as_str(), &self.directory, third.as_str(), AtFlags::empty())
            .is_err()
        {
            return Ok(false);
        }
        let links = fs::fstat(&self.first)?.st_nlink;
        fs::unlinkat(&self.directory, third.as_str(), AtFlags::empty())?;
        Ok(links == 2)
    }

    fn exchange(&self) -> io::Result<bool> {
        let [first, second, _] = &self.names;
        let flags = RenameFlags::EXCHANGE;
        if fs::renameat_with(&self.directory, first.as_str(), &self.directory, second.as_str(), flags)
            .is_err()
        {
            return Ok(false);
        }
        let now = fs::statat(&self.directory, first.as_str(), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(now.st_ino == fs::fstat(&self.second)?.st_ino)
    }

    fn direct(&self) -> io::Result<bool> {
        let flags = OFlags::RDONLY | OFlags::DIRECT | PLAIN;
        match fs::openat(&self.directory, self.names[0].as_str(), flags, Mode::empty()) {
            Ok(_) => Ok(true),
            Err(Errno::INVAL | Errno::NOTSUP) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Whether an open file or directory lies on a network file system.
pub(super) fn is_network(file: impl AsFd) -> io::Result<bool> {
    let kind = fs::fstatfs(file)?.f_type;
    // The field is a signed word of the machine's width, the constants are its lower 32 bits.
    Ok(NETWORK.iter().any(|&network| i128::from(network) == i128::from(kind) & 0xFFFF_FFFF))
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for name in &self.names {
            // What cannot be removed is a file of qchain's own in its scratch directory, swept later.
            let _ = fs::unlinkat(&self.directory, name.as_str(), AtFlags::empty());
        }
    }
}

fn create(directory: &OwnedFd, name: &str) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | PLAIN;
    let file = File::from(fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR)?);
    if FileType::from_raw_mode(fs::fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::from(Errno::INVAL));
    }
    Ok(file)
}
