//! `scripts/view-digest`, which shares nothing with the program, computes the same digests; and what does not change a
//! view does not change its digest.

use std::fs;
use std::path::Path;

use qchain::ops::delete::ModeChoice;
use qchain::store::record::StoreKind;
use tempfile::TempDir;

use super::support::chains::{Kind, Numbers, Spec, build};
use super::support::mounts::{FsKind, LoopMount};
use super::support::qemu::{must, run, text};
use super::support::store::{delete_well, digests, init, left, open};

/// By the script.
fn theirs(image: &Path, raw: bool) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/view-digest");
    let arguments = if raw { vec!["--raw", text(image)] } else { vec![text(image)] };
    must(text(&script), &arguments).trim().to_owned()
}

/// By the program, of a file by its path.
fn ours(image: &Path, raw: bool) -> String {
    let mut arguments = vec!["--json", "digest", text(image)];
    arguments.extend(raw.then_some("--raw"));
    let output = run(env!("CARGO_BIN_EXE_qchain"), &arguments);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    document["digest"].as_str().unwrap_or_else(|| panic!("{document}")).to_owned()
}

#[test]
fn the_script_is_short_and_has_the_vectors() {
    let script =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/view-digest")).unwrap();
    assert!(script.lines().count() < 60);
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = directory.path().join("view");
    let views: [(&str, Vec<u8>); 4] = [
        ("5db69ab619e8413264421ae2df34c22b183841dd4d4cd2f99b7393d4a533fcb2", Vec::new()),
        ("c3c47c162b5ddf78dbc2531483227926ba1ef2113716adc293379f66d29f07a4", vec![0; 512]),
        ("db7350a7597673f696e5c5e2d9e4d50ee41455884ded9e9e0047cabdaddbcd7b", vec![0x41; 65_536]),
        (
            "970db05196c99e8323aa7f4e54c66081533723b36e6618ba462e283d76266e5d",
            (0..(16 << 20) + 512).map(|i| u8::try_from(i % 251).unwrap()).collect(),
        ),
    ];
    for (digest, view) in views {
        fs::write(&file, view).unwrap();
        assert_eq!(theirs(&file, true), digest);
    }
    // Holes of all widths: whole nodes of zeros, and blocks of zeros around what is written.
    let mut numbers = Numbers(5);
    for _ in 0..8 {
        let size = numbers.below(300 << 20) + 1;
        let raw = fs::File::create(&file).unwrap();
        raw.set_len(size).unwrap();
        for _ in 0..numbers.below(6) {
            std::os::unix::fs::FileExt::write_all_at(&raw, b"x", numbers.below(size)).unwrap();
        }
        assert_eq!(theirs(&file, true), ours(&file, true), "{size} bytes");
    }
}

fn specs(numbers: &mut Numbers) -> Vec<Spec> {
    let plain = Kind { cluster: 65_536, ..Kind::PLAIN };
    let kinds = [plain, plain, Kind { compressed: true, ..plain }, plain];
    kinds.into_iter().map(|kind| kind.member((20 << 16) + 512, 14, numbers)).collect()
}

#[test]
fn merges_in_all_modes_keep_digests() {
    let mount = LoopMount::new(FsKind::Xfs, 512 << 20);
    let mut numbers = Numbers(11);
    for (index, mode) in [ModeChoice::Clone, ModeChoice::InPlace, ModeChoice::Copy].into_iter().enumerate() {
        let root = mount.path().join(index.to_string());
        let truth = TempDir::new_in("/dev/shm").unwrap();
        fs::create_dir(&root).unwrap();
        build(&root, truth.path(), &specs(&mut numbers));
        init(&root, StoreKind::Plain);
        let before = ["base", "b", "c"].map(|name| theirs(&root.join(name), false));
        let program = digests(&open(&root), &["base", "b", "c"]);
        assert_eq!(
            program.iter().map(|(_, digest)| digest.as_str()).collect::<Vec<_>>(),
            before.each_ref().map(String::as_str)
        );
        delete_well(&root, &["a"], mode);
        assert!(!left(&root).contains(&"a".to_owned()));
        assert_eq!(["base", "b", "c"].map(|name| theirs(&root.join(name), false)), before, "{mode:?}");
        assert_eq!(digests(&open(&root), &["base", "b", "c"]), program, "{mode:?}");
    }
}

#[test]
fn digests_do_not_know_how_a_view_is_kept() {
    let directory = TempDir::new_in("/dev/shm").unwrap();
    let root = directory.path().join("chain");
    let truth = directory.path().join("truth");
    fs::create_dir(&root).unwrap();
    fs::create_dir(&truth).unwrap();
    build(&root, &truth, &specs(&mut Numbers(13)));
    let tip = root.join("c");
    let digest = theirs(&tip, false);
    assert_eq!(ours(&tip, false), digest);
    assert_eq!(
        (theirs(&truth.join("c"), true), ours(&truth.join("c"), true)),
        (digest.clone(), digest.clone()),
        "raw"
    );
    for options in [
        "cluster_size=512",
        "cluster_size=4096,compat=0.10",
        "cluster_size=2M",
        "cluster_size=64k,extended_l2=on",
        "preallocation=metadata",
        "compression_type=zlib -c",
        "compression_type=zstd -c",
        "cluster_size=2M,compression_type=zstd -c",
    ] {
        let other = directory.path().join("other");
        let (options, compress) =
            options.split_once(" -c").map_or((options, false), |(options, _)| (options, true));
        let mut arguments = vec!["convert", "-f", "qcow2", "-O", "qcow2", "-o", options];
        arguments.extend(compress.then_some("-c"));
        arguments.extend([text(&tip), text(&other)]);
        must("qemu-img", &arguments);
        assert_eq!(
            (theirs(&other, false), ours(&other, false)),
            (digest.clone(), digest.clone()),
            "{options}"
        );
    }
    // By hand: c onto the base, without a and b; then onto nothing.
    for backing in ["base", ""] {
        must("qemu-img", &["rebase", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, text(&tip)]);
        assert_eq!(
            (theirs(&tip, false), ours(&tip, false)),
            (digest.clone(), digest.clone()),
            "onto {backing:?}"
        );
    }
}
