//! Real file systems, each in a sparse file, mounted for one test.
//!
//! Needs root, loop devices and the file system's tools. Without them the test fails and says so: a test
//! that skips itself proves nothing.

use std::fs::File;
use std::path::Path;
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

/// A mounted file system. Unmounted and deleted when dropped, after a failed test too.
#[derive(Debug)]
pub struct LoopMount {
    // Holds both the image file and the mount point; removed after the unmount in `drop`.
    directory: TempDir,
    mounted: bool,
}

impl LoopMount {
    /// Makes and mounts an empty file system of `bytes` (the file is sparse). Panics with the reason if
    /// it cannot.
    pub fn new(kind: FsKind, bytes: u64) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("qchain-mount-")
            .tempdir()
            .unwrap_or_else(|error| panic!("no temporary directory for a {kind:?} mount: {error}"));
        let mut mount = Self { directory, mounted: false };
        let image = mount.directory.path().join("image");
        let sized = File::create(&image).and_then(|file| file.set_len(bytes));
        sized.unwrap_or_else(|error| panic!("cannot make a file of {bytes} bytes: {error}"));
        std::fs::create_dir(mount.path())
            .unwrap_or_else(|error| panic!("cannot make a mount point: {error}"));
        let [program, options @ ..] = kind.mkfs() else { panic!("no program for {kind:?}") };
        run(Command::new(program).args(options).arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(mount.path()));
        mount.mounted = true;
        mount
    }

    /// The root of the mounted file system.
    pub fn path(&self) -> std::path::PathBuf {
        self.directory.path().join("mnt")
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        if !self.mounted {
            return;
        }
        for _ in 0..50 {
            if umount(&self.path(), &[]) {
                return;
            }
            // A file of the test may be closed a moment later than its mount is dropped.
            thread::sleep(Duration::from_millis(20));
        }
        if !umount(&self.path(), &["-l"]) {
            eprintln!("{} could not be unmounted", self.path().display());
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
