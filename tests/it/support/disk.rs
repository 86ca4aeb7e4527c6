//! A disk that remembers what was written to it, and when it was asked to make that last.
//!
//! A file in a FUSE file system of our own, for a loop device. From what it remembers every state can be made
//! that a real disk may be in after its power went: all that was written before the last flush, and whatever
//! part of what came after.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyWrite, Request, WriteFlags,
};
use tempfile::TempDir;

/// How long the kernel may believe what it was told: nothing changes but by its own hand.
const FOREVER: Duration = Duration::from_hours(24);
const FILE: INodeNo = INodeNo(2);
/// The unit in which changed bytes are kept.
const PAGE: usize = 4096;
/// Where a write may tear.
pub const SECTOR: usize = 512;
/// What is written whole or not at all: btrfs counts on that for its superblock, and cannot be mounted after
/// a disk that tears it.
pub const WHOLE: usize = 4096;

/// What came to the disk.
#[derive(Clone, Debug)]
pub enum Event {
    /// Bytes, and where.
    Write(u64, Vec<u8>),
    /// All before this lasts.
    Flush,
    /// Not the disk's: somebody got to that point.
    Mark(u64),
}

#[derive(Debug, Default)]
struct Memory {
    changed: BTreeMap<u64, Vec<u8>>,
    events: Vec<Event>,
}

#[derive(Debug)]
struct Served {
    base: File,
    length: u64,
    memory: Arc<Mutex<Memory>>,
}

impl Served {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let (kind, size) =
            if inode == FILE { (FileType::RegularFile, self.length) } else { (FileType::Directory, 0) };
        FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }

    /// One page as it is now.
    fn page(&self, memory: &Memory, number: u64) -> Vec<u8> {
        memory.changed.get(&number).cloned().unwrap_or_else(|| {
            let mut page = vec![0; PAGE];
            self.base.read_exact_at(&mut page, number * PAGE as u64).unwrap();
            page
        })
    }

    fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let memory = self.memory.lock().unwrap();
        let end = (at + length as u64).min(self.length);
        let mut bytes = Vec::new();
        let mut next = at;
        while next < end {
            let page = self.page(&memory, next / PAGE as u64);
            let from = usize::try_from(next % PAGE as u64).unwrap();
            let count = (PAGE - from).min(usize::try_from(end - next).unwrap());
            bytes.extend_from_slice(&page[from..from + count]);
            next += count as u64;
        }
        bytes
    }

    fn write(&self, at: u64, data: &[u8]) {
        let mut memory = self.memory.lock().unwrap();
        let mut done = 0;
        while done < data.len() {
            let next = at + done as u64;
            let number = next / PAGE as u64;
            let from = usize::try_from(next % PAGE as u64).unwrap();
            let count = (PAGE - from).min(data.len() - done);
            let mut page = self.page(&memory, number);
            page[from..from + count].copy_from_slice(&data[done..done + count]);
            memory.changed.insert(number, page);
            done += count;
        }
        memory.events.push(Event::Write(at, data.to_vec()));
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "disk" {
            reply.entry(&FOREVER, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &self.attributes(inode));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        reply.data(&Self::read(self, offset, usize::try_from(size).unwrap()));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        Self::write(self, offset, data);
        reply.written(u32::try_from(data.len()).unwrap());
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.memory.lock().unwrap().events.push(Event::Flush);
        reply.ok();
    }
}

/// The disk. Whatever is mounted from it must be unmounted before it goes.
#[derive(Debug)]
pub struct Disk {
    _session: BackgroundSession,
    memory: Arc<Mutex<Memory>>,
    directory: TempDir,
}

impl Disk {
    /// Serves a file's content; the file stays as it is.
    pub fn serve(base: &Path) -> Self {
        let directory = tempfile::Builder::new().prefix("qchain-disk-").tempdir().unwrap();
        let memory: Arc<Mutex<Memory>> = Arc::default();
        let base = File::open(base).unwrap();
        let length = base.metadata().unwrap().len();
        assert_eq!(length % PAGE as u64, 0);
        let served = Served { base, length, memory: Arc::clone(&memory) };
        let session = fuser::spawn_mount(served, directory.path(), &Config::default());
        let session = session.unwrap_or_else(|error| panic!("FUSE is needed for this test: {error}"));
        Self { _session: session, memory, directory }
    }

    /// The file for a loop device.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    /// What notes that somebody got to a point, in its place among the writes.
    pub fn marker(&self) -> impl Fn(u64) + Clone + Send + 'static {
        let memory = Arc::clone(&self.memory);
        move |number| memory.lock().unwrap().events.push(Event::Mark(number))
    }

    /// All that came so far.
    pub fn events(&self) -> Vec<Event> {
        self.memory.lock().unwrap().events.clone()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A loop device lets its file go a moment after its file system was unmounted.
        for _ in 0..100 {
            let ended = Command::new("umount").arg(self.directory.path()).output();
            if ended.is_ok_and(|output| output.status.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = Command::new("umount").arg("-l").arg(self.directory.path()).output();
    }
}

/// Applies writes to a file.
pub fn apply(file: &File, events: &[Event]) {
    for event in events {
        if let Event::Write(at, data) = event {
            file.write_all_at(data, *at).unwrap();
        }
    }
}
