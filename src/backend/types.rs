//! The values that pass between a backend and its users.

use crate::ids::StorePath;

/// A file's identity on its store, as good as the file system gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    /// The device (the export's `fsid` over NFS).
    pub device: u64,
    /// The inode number (the `fileid` over NFS).
    pub inode: u64,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, pipe or socket.
    Special,
}

/// Facts about a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// What it is.
    pub kind: FileKind,
    /// Which file it is.
    pub id: FileId,
    /// Its length in bytes.
    pub length: u64,
    /// The bytes that it takes on the store, extents shared with other files counted in full.
    pub allocated_bytes: u64,
    /// Last change of its bytes, nanoseconds since 1970.
    pub modified_ns: i128,
    /// Last change of its bytes or attributes, nanoseconds since 1970.
    pub changed_ns: i128,
    /// How many names it has.
    pub links: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits, the lower 12.
    pub mode: u32,
}

/// One name of a directory.
#[derive(Clone, Debug)]
pub struct DirEntry {
    /// The name, or its lossy text if it is no valid component.
    pub name: Result<String, String>,
    /// What it is.
    pub kind: FileKind,
}

/// Room on a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that this process may still take.
    pub free_bytes: u64,
    /// All bytes.
    pub total_bytes: u64,
}

/// How to move data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// By sharing extents (FICLONERANGE), or not at all.
    Clone,
    /// By whatever copies fastest.
    Copy,
}

/// Whom a lock excludes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Who wants it exclusively.
    Shared,
    /// Everybody else.
    Exclusive,
}

/// One run to move into a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Which of the sources it comes from.
    pub source: usize,
    /// Where it begins there.
    pub from: u64,
    /// Where it goes.
    pub to: u64,
    /// Its length in bytes, above 0.
    pub length: u64,
}

/// What a batch of moves did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes shared by cloning.
    pub cloned_bytes: u64,
    /// Bytes copied.
    pub copied_bytes: u64,
}

impl std::ops::AddAssign for Moved {
    fn add_assign(&mut self, other: Self) {
        self.cloned_bytes += other.cloned_bytes;
        self.copied_bytes += other.copied_bytes;
    }
}

/// Owner, permissions and attributes of a file: what a replacement must take over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits, the lower 12.
    pub mode: u32,
    /// Extended attributes, POSIX ACLs among them, sorted by name.
    pub attributes: Vec<(String, Vec<u8>)>,
}

/// Which image locks of QEMU are held by others (`docs/interop/qemu-storage-daemon`'s file driver: bytes
/// 100 and up for permissions held, 200 and up for permissions not shared).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageLocks {
    /// Somebody holds the permission to write (byte 101), or one to resize (byte 103).
    pub writer: bool,
    /// Somebody holds any of the locks.
    pub any: bool,
}

/// What a store can do, found out by trying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
#[expect(clippy::struct_excessive_bools, reason = "a list of independent findings")]
pub struct Capabilities {
    /// FICLONERANGE works.
    pub clone: bool,
    /// The alignment that clones need, in bytes; 0 without them.
    pub clone_alignment: u64,
    /// Hard links work.
    pub hard_links: bool,
    /// Byte-range locks of one open file are seen by another.
    pub byte_range_locks: bool,
    /// RENAME_EXCHANGE works.
    pub rename_exchange: bool,
    /// Files can be opened with O_DIRECT.
    pub direct_io: bool,
    /// The mount is a network file system.
    pub network: bool,
}

impl DirEntry {
    /// The entry's path in `directory`, if its name is valid.
    #[must_use]
    pub fn path_in(&self, directory: &StorePath) -> Option<StorePath> {
        self.name.as_ref().ok().and_then(|name| directory.join(name).ok())
    }
}
