//! Real file systems, each in a sparse file, mounted for one test.
//!
//! Needs root, loop devices and the file system's tools. Without them the test fails and says so: a test
//! that skips itself proves nothing.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

/// Which file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsKind {
    /// XFS with reflinks. At least 300 MiB.
    Xfs,
    /// btrfs. At least 110 MiB.
    Btrfs,
    /// ext4: no clones.
    Ext4,
}

impl FsKind {
    fn mkfs(self) -> &'static [&'static str] {
        match self {
            Self::Xfs => &["mkfs.xfs", "-q", "-m", "reflink=1"],
            Self::Btrfs => &["mkfs.btrfs", "-q"],
            Self::Ext4 => &["mkfs.ext4", "-q", "-F"],
        }
    }
}

/// How the power goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// With it all that nobody had synced: bytes, and what the file system's log had not written.
    Dropped,
    /// The log is written out, but not the bytes that were not synced: names and lengths without content.
    Logged,
}

impl Cut {
    /// Cuts the power of the file system at that place: every later call on it fails, until it is mounted
    /// again. XFS and ext4 have the call; btrfs has not.
    pub fn cut(self, mounted: &Path) {
        let command = match self {
            Self::Dropped => "shutdown",
            Self::Logged => "shutdown -f",
        };
        run(Command::new("xfs_io").args(["-x", "-c", command]).arg(mounted));
    }
}

/// Brings all of the file system that a directory is in to the disk.
pub fn write_out(directory: &Path) {
    rustix::fs::syncfs(File::open(directory).unwrap()).unwrap();
}

/// A mounted file system. Unmounted and deleted when dropped, after a failed test too.
#[derive(Debug)]
pub struct LoopMount {
    // Holds both the image file and the mount point; removed after the unmount in `drop`.
    directory: TempDir,
    kind: FsKind,
    mounted: bool,
}

impl LoopMount {
    /// Makes and mounts an empty file system of `bytes` (the file is sparse). Panics with the reason if
    /// it cannot.
    pub fn new(kind: FsKind, bytes: u64) -> Self {
        Self::new_in(&std::env::temp_dir(), kind, bytes)
    }

    /// The same with its file in memory where the machine has a place for that: what is synced there costs
    /// nothing, and nothing that is tried with it outlives this machine's own power anyway.
    pub fn in_memory(kind: FsKind, bytes: u64) -> Self {
        let shared = Path::new("/dev/shm");
        if shared.is_dir() { Self::new_in(shared, kind, bytes) } else { Self::new(kind, bytes) }
    }

    fn new_in(parent: &Path, kind: FsKind, bytes: u64) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("qchain-mount-")
            .tempdir_in(parent)
            .unwrap_or_else(|error| panic!("no temporary directory for a {kind:?} mount: {error}"));
        let mut mount = Self { directory, kind, mounted: false };
        let image = mount.image();
        let sized = File::create(&image).and_then(|file| file.set_len(bytes));
        sized.unwrap_or_else(|error| panic!("cannot make a file of {bytes} bytes: {error}"));
        std::fs::create_dir(mount.path())
            .unwrap_or_else(|error| panic!("cannot make a mount point: {error}"));
        let [program, options @ ..] = kind.mkfs() else { panic!("no program for {kind:?}") };
        run(Command::new(program).args(options).arg(&image));
        mount.mount(&image);
        mount
    }

    /// The file that has the file system.
    pub fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// Mounts that file, its own or another with such a file system. Nothing may be mounted now.
    pub fn mount(&mut self, image: &Path) {
        assert!(!self.mounted);
        let options = match self.kind {
            FsKind::Btrfs => {
                // It remembers file systems by their ids, and takes an older state of one for a mistake.
                let _ = Command::new("btrfs").args(["device", "scan", "--forget"]).output();
                "loop,nodiscard"
            }
            FsKind::Xfs | FsKind::Ext4 => "loop",
        };
        run(Command::new("mount").args(["-o", options]).arg(image).arg(self.path()));
        self.mounted = true;
    }

    /// Unmounts and mounts again; nothing of it may be open.
    pub fn remount(&mut self) {
        self.unmount();
        self.mount(&self.image());
    }

    /// Unmounts; nothing of it may be open.
    pub fn unmount(&mut self) {
        assert!(self.leave(), "{} is still in use", self.path().display());
    }

    /// Unmounts, waiting a little for whoever closes a file a moment later than he should.
    pub fn leave(&mut self) -> bool {
        for _ in 0..50 {
            if umount(&self.path(), &[]) {
                self.mounted = false;
                return true;
            }
            thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// The root of the mounted file system.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        if !self.mounted || self.leave() {
            return;
        }
        if !umount(&self.path(), &["-l"]) {
            eprintln!("{} could not be unmounted", self.path().display());
        }
    }
}

/// A directory that is seen at another place, too, as a mount of its own.
#[derive(Debug)]
pub struct Bound(PathBuf);

impl Bound {
    /// Makes both directories if need be.
    pub fn new(source: &Path, at: &Path) -> Self {
        for directory in [source, at] {
            std::fs::create_dir_all(directory)
                .unwrap_or_else(|error| panic!("cannot make {}: {error}", directory.display()));
        }
        run(Command::new("mount").arg("--bind").arg(source).arg(at));
        Self(at.to_owned())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if !umount(&self.0, &[]) && !umount(&self.0, &["-l"]) {
            eprintln!("{} could not be unmounted", self.0.display());
        }
    }
}

fn umount(path: &Path, options: &[&str]) -> bool {
    Command::new("umount").args(options).arg(path).output().is_ok_and(|output| output.status.success())
}

fn run(command: &mut Command) {
    match command.output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)),
        Err(error) => panic!("{command:?} cannot be run ({error}); install xfsprogs, btrfs-progs, e2fsprogs"),
    }
}
