//! Chains of QEMU's own making, of every kind, with the truth of each member as QEMU reads it.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::qemu::{io, must, text};

/// One member to make.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Options for `qemu-img create -o`.
    pub options: String,
    /// Virtual size in bytes.
    pub size: u64,
    /// Commands for qemu-io.
    pub commands: Vec<String>,
}

/// The names of members, base first.
pub const NAMES: [&str; 6] = ["base", "a", "b", "c", "d", "e"];

/// Makes a chain in a directory (`base`, `a`, ...), and the truth of each in `truth`; base first.
pub fn build(directory: &Path, truth: &Path, specs: &[Spec]) {
    for (index, spec) in specs.iter().enumerate() {
        let path = directory.join(NAMES[index]);
        let size = spec.size.to_string();
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if !spec.options.is_empty() {
            arguments.extend(["-o", &spec.options]);
        }
        if index > 0 {
            arguments.extend(["-b", NAMES[index - 1], "-F", "qcow2"]);
        }
        arguments.extend([text(&path), &size]);
        must("qemu-img", &arguments);
        if !spec.commands.is_empty() {
            io(&path, &spec.commands.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
    for (index, _) in specs.iter().enumerate() {
        write_truth(&directory.join(NAMES[index]), &truth.join(NAMES[index]));
    }
}

/// What QEMU reads of a member, as a sparse raw file.
pub fn write_truth(member: &Path, truth: &Path) {
    must("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(member), text(truth)]);
}

/// Fails unless QEMU finds the member sound and equal to its truth.
pub fn assert_true(member: &Path, truth: &Path, context: &str) {
    let check = super::qemu::run("qemu-img", &["check", "-q", "-f", "qcow2", text(member)]);
    assert!(
        check.status.success(),
        "{context}: {}: {}{}",
        member.display(),
        String::from_utf8_lossy(&check.stdout),
        String::from_utf8_lossy(&check.stderr)
    );
    let compare =
        super::qemu::run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(member), text(truth)]);
    // A difference in size that reads as zeros is a warning only.
    let output = String::from_utf8_lossy(&compare.stdout).into_owned();
    assert!(
        compare.status.success() && !output.contains("mismatch"),
        "{context}: {}: {}{}",
        member.display(),
        String::from_utf8_lossy(&compare.stdout),
        String::from_utf8_lossy(&compare.stderr)
    );
}

/// Copies a directory with all attributes, sharing extents where that works.
pub fn copy(from: &Path, to: &Path) {
    let status =
        Command::new("cp").args(["-a", "--reflink=auto", "--sparse=always"]).arg(from).arg(to).status();
    assert!(status.unwrap().success());
}

/// A small generator of numbers: the same seed gives the same chain.
#[derive(Clone, Debug)]
pub struct Numbers(pub u64);

impl Numbers {
    /// The next number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit.max(1)
    }
}

/// How a member is made.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent features of the format")]
pub struct Kind {
    /// Cluster size.
    pub cluster: u64,
    /// `compat=0.10`.
    pub old: bool,
    /// Subclusters.
    pub extended: bool,
    /// Compressed clusters are zstd.
    pub zstd: bool,
    /// Some clusters are compressed.
    pub compressed: bool,
    /// Refcount width in bits.
    pub refcount_bits: u32,
}

impl Kind {
    /// 64 KiB clusters, version 3, nothing special.
    pub const PLAIN: Self = Self {
        cluster: 65_536,
        old: false,
        extended: false,
        zstd: false,
        compressed: false,
        refcount_bits: 16,
    };

    /// Options for `qemu-img create -o`.
    pub fn options(self) -> String {
        let mut options = format!("cluster_size={}", self.cluster);
        if self.old {
            return options + ",compat=0.10";
        }
        options = format!("{options},compat=1.1,refcount_bits={}", self.refcount_bits);
        if self.extended {
            options += ",extended_l2=on";
        }
        if self.zstd {
            options += ",compression_type=zstd";
        }
        options
    }

    /// A member with random writes, zeroes, discards and compressed clusters.
    pub fn member(self, size: u64, writes: u64, numbers: &mut Numbers) -> Spec {
        let mut commands = Vec::new();
        // QEMU compresses into free clusters only, so these come first and each cluster once.
        let mut compressed = std::collections::BTreeMap::new();
        let sectors = size / 512;
        for _ in 0..writes {
            if sectors == 0 {
                break;
            }
            let start = numbers.below(sectors);
            let unit = [1, 8, 128, self.cluster / 512, 3 * self.cluster / 512];
            let picked = unit[usize::try_from(numbers.below(5)).unwrap()].max(1);
            let length = picked.min(sectors - start) * 512;
            let start = start * 512;
            let pattern = 1 + numbers.below(255);
            commands.push(match numbers.below(10) {
                0 if !self.old => format!("write -z {start} {length}"),
                1 if !self.old => format!("write -z -u {start} {length}"),
                2 => format!("discard {start} {length}"),
                3 | 4 if self.compressed && size >= self.cluster => {
                    let at = numbers.below(size / self.cluster) * self.cluster;
                    compressed.insert(at, format!("write -c -P {pattern} {at} {}", self.cluster));
                    continue;
                }
                _ => format!("write -P {pattern} {start} {length}"),
            });
        }
        let commands = compressed.into_values().chain(commands).collect();
        Spec { options: self.options(), size, commands }
    }
}

/// Where things lie: a store's directory and the truths beside it.
pub fn folders(parent: &Path, name: &str) -> (PathBuf, PathBuf) {
    let (store, truth) = (parent.join(name), parent.join(format!("{name}.truth")));
    std::fs::create_dir_all(&store).unwrap();
    std::fs::create_dir_all(&truth).unwrap();
    (store, truth)
}
