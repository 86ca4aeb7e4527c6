//! Checking single images, held against `qemu-img check`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use qchain::failure::Code;
use qchain::qcow2::check::{Limits, Report, check};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::images::{build, combinations, pattern};
use crate::support::open::open_image;
use crate::support::qemu::{io, must, run, text};

const K64: u64 = 65_536;

fn ours(path: &Path) -> Report {
    check(&open_image(path).unwrap(), &Limits::default()).unwrap()
}

/// Corruptions and leaks by qemu-img's count; `None` if it does not even open the image.
fn theirs(path: &Path) -> Option<(u64, u64)> {
    let output = run("qemu-img", &["check", "--output=json", "-f", "qcow2", text(path)]);
    let report: Value = serde_json::from_slice(&output.stdout).ok()?;
    let number = |name: &str| report.get(name).and_then(Value::as_u64).unwrap_or_default();
    let errors = number("check-errors");
    assert!(errors == 0 || number("corruptions") > 0, "{report}");
    Some((number("corruptions"), number("leaks")))
}

fn both_clean(path: &Path) {
    assert_eq!(theirs(path), Some((0, 0)), "{}", path.display());
    let report = ours(path);
    assert_eq!(report.findings, [], "{}", path.display());
    assert!(!report.incomplete && !report.is_damaged());
}

fn poke(path: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn peek(path: &Path, at: u64) -> u64 {
    let mut bytes = [0; 8];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

/// A filled image of 64 KiB clusters: its path, its L2 table and its refcount block.
fn filled(directory: &TempDir) -> (std::path::PathBuf, u64, u64) {
    let path = build(directory, "image", "", 33 * K64, &pattern(K64, 3, true));
    let image = open_image(&path).unwrap();
    let l2 = peek(&path, image.header().l1_offset.0) & 0x00ff_ffff_ffff_fe00;
    let block = peek(&path, image.header().refcount_table_offset.0);
    (path, l2, block)
}

#[test]
fn every_format_is_clean() {
    for (index, (options, cluster, version)) in combinations().into_iter().enumerate() {
        let directory = TempDir::new().unwrap();
        let compress = !options.contains("preallocation");
        let commands = pattern(cluster, version, compress);
        both_clean(&build(&directory, &format!("image{index}"), &options, 32 * cluster + 512, &commands));
    }
}

#[test]
fn empty_disks_are_clean() {
    for size in [0, 512, 60 << 40] {
        let directory = TempDir::new().unwrap();
        both_clean(&build(&directory, "image", "", size, &[]));
    }
}

#[test]
fn snapshots_and_bitmaps_are_clean() {
    for options in ["", "cluster_size=512", "extended_l2=on,compression_type=zstd"] {
        let directory = TempDir::new().unwrap();
        let (cluster, unit) = if options.contains("512") { (512, "512") } else { (K64, "64k") };
        let path = build(&directory, "image", options, 33 * cluster, &pattern(cluster, 3, true));
        for name in ["one", "two"] {
            must("qemu-img", &["snapshot", "-c", name, text(&path)]);
            io(&path, &["write -P 0xaa 0 3000", "write -z 9000 1000"]);
            must("qemu-img", &["bitmap", "--add", "-g", unit, text(&path), name]);
            io(&path, &["write -P 0xab 4k 1k"]);
        }
        both_clean(&path);
        must("qemu-img", &["snapshot", "-d", "one", text(&path)]);
        both_clean(&path);
        must("qemu-img", &["bitmap", "--remove", text(&path), "one"]);
        both_clean(&path);
        must("qemu-img", &["bitmap", "--remove", text(&path), "two"]);
        must("qemu-img", &["snapshot", "-a", "two", text(&path)]);
        both_clean(&path);
    }
}

#[test]
fn a_dirty_image_is_not_damaged() {
    let directory = TempDir::new().unwrap();
    let path = build(&directory, "image", "lazy_refcounts=on", 33 * K64, &pattern(K64, 3, false));
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 1 1800k 100k", "-c", "flush", "-c", "abort", text(&path)],
    );
    let report = ours(&path);
    assert!(report.dirty && !report.is_damaged(), "{report:?}");
    assert!(report.lagging_clusters > 0);
    assert!(theirs(&path).is_some_and(|(corruptions, _)| corruptions > 0));
}

#[test]
fn leaks_agree_to_the_cluster() {
    let directory = TempDir::new().unwrap();
    let (path, _, block) = filled(&directory);
    let clusters = File::open(&path).unwrap().metadata().unwrap().len().div_ceil(K64);
    // One more for three clusters in use, and one for a cluster behind the end, which is nothing.
    for cluster in [0, 5, 6, clusters + 3] {
        let stored = peek(&path, block + 2 * cluster) >> 48;
        poke(&path, block + 2 * cluster, &u16::try_from(stored + 1).unwrap().to_be_bytes());
    }
    let report = ours(&path);
    assert_eq!(theirs(&path).map(|(_, leaks)| leaks), Some(report.leaked_clusters));
    assert_eq!(report.leaked_clusters, 3);
}

#[test]
fn each_poke_that_qemu_minds_is_found() {
    let directory = TempDir::new().unwrap();
    let (source, l2, block) = filled(&directory);
    let path = directory.path().join("poked");
    let l1 = open_image(&source).unwrap().header().l1_offset.0;
    let table = open_image(&source).unwrap().header().refcount_table_offset.0;
    let data = peek(&source, l2);
    let pokes = [
        ("data -> L1 table", l2, l1 | 1 << 63),
        ("data -> its own L2 table", l2, l2 | 1 << 63),
        ("data -> refcount block", l2, block | 1 << 63),
        ("data -> header's neighbour", l2, table | 1 << 63),
        ("data misaligned", l2, data + 512),
        ("data reserved bits", l2, data | 2),
        ("data far behind the end", l2, 1 << 40 | 1 << 63),
        ("COPIED cleared", l2, data & !(1 << 63)),
        ("two on one cluster", l2 + 8 * 12, data),
        ("L1 misaligned", l1, l2 | 1 << 63 | 512),
        ("L1 reserved bits", l1, l2 | 1 << 63 | 1),
        ("L1 behind the end", l1, 1 << 40 | 1 << 63),
        ("L1 -> refcount table", l1, table | 1 << 63),
        ("L1 COPIED cleared", l1, l2),
        ("refcounts lost", block, 0),
        ("refcount table entry misaligned", table, block + 512),
        ("refcount table entry reserved", table, block | 1),
        ("refcount block behind the end", table, 1 << 40),
        ("refcount block -> L2 table", table, l2),
        ("compressed with COPIED", l2 + 8 * 16, 1 << 63 | peek(&source, l2 + 8 * 16)),
    ];
    for (what, at, value) in pokes {
        std::fs::copy(&source, &path).unwrap();
        poke(&path, at, &value.to_be_bytes());
        let corrupt = theirs(&path).is_none_or(|(corruptions, _)| corruptions > 0);
        assert!(corrupt, "{what}: qemu-img does not mind");
        assert!(ours(&path).is_damaged(), "{what}");
    }
}

#[test]
fn sharing_that_the_counts_allow_is_found_beyond_qemu() {
    let directory = TempDir::new().unwrap();
    let (path, l2, block) = filled(&directory);
    let data = peek(&path, l2) & !(1 << 63);
    poke(&path, l2, &data.to_be_bytes());
    poke(&path, l2 + 8 * 12, &data.to_be_bytes());
    poke(&path, block + 2 * (data / K64), &2_u16.to_be_bytes());
    assert_eq!(theirs(&path), Some((0, 0)));
    let report = ours(&path);
    assert_eq!(report.findings.iter().map(|found| found.code).collect::<Vec<_>>(), [Code::SharedCluster]);
}

#[test]
fn a_file_that_was_cut() {
    let directory = TempDir::new().unwrap();
    let (path, ..) = filled(&directory);
    let file = File::options().write(true).open(&path).unwrap();
    let length = file.metadata().unwrap().len();
    for cut in [K64 / 2, K64 + 512, 5 * K64] {
        file.set_len(length - cut).unwrap();
        let corrupt = theirs(&path).is_some_and(|(corruptions, _)| corruptions > 0);
        let report = ours(&path);
        assert_eq!(report.is_damaged(), corrupt, "{cut}: {report:?}");
        assert!(!corrupt || report.findings.iter().any(|found| found.code == Code::Truncated));
    }
}
