//! Flattened images of QEMU's own chains are what QEMU reads of the member: by every way, in every form.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use qchain::backend::Backend as _;
use qchain::backend::faulty::{Faulty, Lasting};
use qchain::backend::memory::MemoryStore;
use qchain::failure::{Code, Failure as _, Kind as Failed};
use qchain::ids::StorePath;
use qchain::ops::flatten::{FlattenReport, How};
use qchain::qcow2::CompressionType;
use qchain::qcow2::layout::canonical::Form;
use qchain::store::record::StoreKind;
use qchain::units::ClusterBits;

use super::delete_oracle::chains;
use super::support::chains::{Kind, Numbers, Spec, assert_true, build, folders};
use super::support::crash::full;
use super::support::digest::plain_digest;
use super::support::flat::{Wish, flatten_into, flatten_to, read, stream_of};
use super::support::mounts::{FsKind, LoopMount};
use super::support::qemu::{must, text};
use super::support::rot::rot;
use super::support::store::{adopt_well, init};

/// Each way to each form.
fn wishes() -> Vec<(&'static str, Wish)> {
    let zstd = Some((CompressionType::Zstd, 1));
    let zlib = Some((CompressionType::Zlib, 1));
    let clusters = |bits| Form::Qcow2(ClusterBits::new(bits).unwrap());
    vec![
        ("cheapest", Wish { read: true, ..Wish::PLAIN }),
        ("cheapest-2m", Wish { form: clusters(21), ..Wish::PLAIN }),
        ("canonical", Wish::CANONICAL),
        ("canonical-4k", Wish { form: clusters(12), read: true, ..Wish::CANONICAL }),
        ("canonical-2m", Wish { form: clusters(21), ..Wish::CANONICAL }),
        ("raw", Wish { read: true, ..Wish::RAW }),
        ("zstd", Wish { compress: zstd, read: true, ..Wish::PLAIN }),
        ("zlib-512", Wish { compress: zlib, form: clusters(9), ..Wish::PLAIN }),
        ("zlib", Wish { compress: zlib, ..Wish::PLAIN }),
    ]
}

/// Flattens one member in every way and lets QEMU judge.
fn try_all(parent: &Path, store: &Path, truth: &Path, member: &str, adopted: bool, context: &str) {
    let raw_truth = fs::read(truth.join(member)).unwrap();
    let digest = plain_digest(&raw_truth);
    for (name, wish) in wishes() {
        let context = format!("{member} as {name}, adopted {adopted}: {context}");
        let dest = parent.join(name);
        let report =
            flatten_to(store, member, &dest, wish).unwrap_or_else(|error| panic!("{context}: {error:?}"));
        judge(&dest, wish, &truth.join(member), &raw_truth, &context);
        assert_eq!(report.file_bytes, fs::metadata(&dest).unwrap().len(), "{context}");
        assert_eq!(report.virtual_bytes, raw_truth.len() as u64, "{context}");
        if adopted || wish.read {
            assert_eq!(report.digest.as_deref(), Some(digest.as_str()), "{context}: {report:?}");
        }
        assert!(
            !wish.read || claims(&report).contains(&"data") || raw_truth.is_empty(),
            "{context}: {report:?}"
        );
        fs::remove_file(&dest).unwrap();
    }
}

fn claims(report: &FlattenReport) -> Vec<&'static str> {
    report.claims.iter().map(|claim| claim.name).collect()
}

fn judge(dest: &Path, wish: Wish, truth: &Path, raw_truth: &[u8], context: &str) {
    if wish.form == Form::Raw {
        assert!(fs::read(dest).unwrap() == raw_truth, "{context}: other bytes");
    } else {
        assert_true(dest, truth, context);
        let info = must("qemu-img", &["info", "--output=json", text(dest)]);
        assert!(!info.contains("backing"), "{context}: {info}");
    }
}

/// The stream of each form is the canonical file, whole and in any parts.
fn try_streams(parent: &Path, store: &Path, member: &str, numbers: &mut Numbers, context: &str) {
    let forms = [Form::Qcow2(ClusterBits::DEFAULT), Form::Qcow2(ClusterBits::new(12).unwrap()), Form::Raw];
    for form in forms {
        let dest = parent.join("file");
        flatten_to(store, member, &dest, Wish { form, ..Wish::CANONICAL }).unwrap();
        let file = fs::read(&dest).unwrap();
        let stream = stream_of(store, member, form).unwrap();
        assert_eq!(stream.length(), file.len() as u64, "{context}");
        assert!(read(&stream, 0, u64::MAX).unwrap() == file, "{context}: {form:?}");
        let mut parts = Vec::new();
        while parts.len() < file.len() {
            let at = parts.len() as u64;
            let most = [600, 70_000, 1 << 20][usize::try_from(numbers.below(3)).unwrap()];
            let length = 1 + numbers.below(most);
            parts.extend(read(&stream, at, at + length).unwrap());
        }
        assert!(parts == file, "{context}: {form:?} in parts");
        fs::remove_file(&dest).unwrap();
    }
}

fn matrix(fs: FsKind, offset: usize) {
    let mount = LoopMount::new(fs, 4 << 30);
    let parent = mount.path();
    let step = if full() { 1 } else { 6 };
    let mut numbers = Numbers(3);
    for (index, (name, specs)) in
        chains().iter().enumerate().skip(if full() { 0 } else { offset }).step_by(step)
    {
        let (store, truth) = folders(&parent, "store");
        build(&store, &truth, specs);
        init(&store, StoreKind::Plain);
        let members: &[&str] = if index % 2 == 0 { &["c", "base"] } else { &["b"] };
        for adopted in [false, true] {
            if adopted {
                adopt_well(&store);
            }
            for member in members {
                try_all(&parent, &store, &truth, member, adopted, name);
            }
            try_streams(&parent, &store, members[0], &mut numbers, name);
        }
        fs::remove_dir_all(&store).unwrap();
        fs::remove_dir_all(&truth).unwrap();
    }
}

#[test]
fn every_chain_in_every_form_on_xfs() {
    matrix(FsKind::Xfs, 0);
}

#[test]
fn every_chain_in_every_form_on_ext4() {
    matrix(FsKind::Ext4, 3);
}

/// A chain of real data: adopted or not as asked.
fn small(parent: &Path, adopted: bool) -> (std::path::PathBuf, std::path::PathBuf) {
    let (store, truth) = folders(parent, "store");
    let specs: Vec<Spec> =
        [40, 10, 10].map(|writes| Kind::PLAIN.member(4 << 20, writes, &mut Numbers(11))).into();
    build(&store, &truth, &specs);
    init(&store, StoreKind::Plain);
    if adopted {
        adopt_well(&store);
    }
    (store, truth)
}

#[test]
fn data_is_shared_where_that_can_be_done_and_nothing_claimed_that_was_not_proved() {
    let mount = LoopMount::new(FsKind::Xfs, 1 << 30);
    let (store, truth) = small(&mount.path(), true);
    for (name, wish) in [("q", Wish::PLAIN), ("r", Wish::RAW)] {
        let dest = mount.path().join(name);
        let report = flatten_to(&store, "b", &dest, wish).unwrap();
        assert_eq!(report.how, How::Clone, "{report:?}");
        assert!(report.bytes_cloned > report.bytes_written, "{report:?}");
        let whole =
            report.claims.iter().any(|claim| claim.name == "data" && claim.bytes == report.virtual_bytes);
        assert!(!whole, "nothing that was shared was read: {report:?}");
    }
    assert_true(&mount.path().join("q"), &truth.join("b"), "cloned");
    // Raw images are sparse.
    let raw = fs::metadata(mount.path().join("r")).unwrap();
    assert!(raw.blocks() * 512 < raw.len(), "{raw:?}");
}

/// Two chains that keep one view in different ways.
#[test]
fn equal_views_give_equal_images() {
    let folder = tempfile::tempdir().unwrap();
    let spec = |options: &str, commands: &[&str]| Spec {
        options: options.to_owned(),
        size: 3 << 20,
        commands: commands.iter().map(|command| (*command).to_owned()).collect(),
    };
    let one = [
        spec("", &["write -P 1 0 1M", "write -P 0 512k 256k"]),
        spec("", &["write -P 2 128k 4k", "write -z 1M 64k"]),
    ];
    let other = [
        spec("cluster_size=4096", &["write -P 1 0 512k", "write -P 1 768k 256k"]),
        spec("cluster_size=2M", &["write -P 2 128k 4k"]),
    ];
    let mut images = Vec::new();
    for (name, specs) in [("one", one), ("other", other)] {
        let (store, truth) = folders(folder.path(), name);
        build(&store, &truth, &specs);
        init(&store, StoreKind::Plain);
        assert_eq!(stream_of(&store, "a", Form::Raw).unwrap().validator(), None, "not adopted");
        adopt_well(&store);
        let stream = stream_of(&store, "a", Form::Qcow2(ClusterBits::DEFAULT)).unwrap();
        let raw = stream_of(&store, "a", Form::Raw).unwrap();
        assert_ne!(raw.validator(), stream.validator());
        images.push((stream.validator().unwrap(), read(&stream, 0, u64::MAX).unwrap()));
    }
    assert!(images[0] == images[1]);
    // What is written as zeros and what is never written are the same.
    let length = images[0].1.len();
    assert!(length < 2 << 20, "{length}");
}

/// Flips a byte of a member's data without a trace in its times.
fn damage(member: &Path, pattern: u8) {
    let bytes = fs::read(member).unwrap();
    let at = bytes.chunks(4096).rposition(|chunk| chunk.iter().all(|byte| *byte == pattern)).unwrap() * 4096;
    rot(member, at as u64 + 7, &[pattern ^ 1]);
}

#[test]
fn a_damaged_block_stops_the_job_and_names_its_member() {
    let folder = tempfile::tempdir().unwrap();
    let (store, truth) = folders(folder.path(), "store");
    let spec = |commands: &[&str]| Spec {
        options: String::new(),
        size: 4 << 20,
        commands: commands.iter().map(|command| (*command).to_owned()).collect(),
    };
    build(
        &store,
        &truth,
        &[spec(&["write -P 0x11 0 2M"]), spec(&["write -P 0x22 2M 1M"]), spec(&["write -P 0x33 0 64k"])],
    );
    init(&store, StoreKind::Plain);
    adopt_well(&store);
    damage(&store.join("a"), 0x22);
    let zstd = Some((CompressionType::Zstd, 1));
    for wish in [Wish::PLAIN, Wish::CANONICAL, Wish::RAW, Wish { compress: zstd, ..Wish::PLAIN }] {
        let dest = folder.path().join("out");
        let error = flatten_to(&store, "b", &dest, wish).unwrap_err();
        assert_eq!(
            (error.kind(), error.code(), error.member()),
            (Failed::Damage, Code::DataDamaged, Some("a"))
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left");
    }
    // A stream ends before the block, and other ranges are served.
    let stream = stream_of(&store, "b", Form::Raw).unwrap();
    assert_eq!(read(&stream, 0, u64::MAX).unwrap_err().code(), Code::DataDamaged);
    assert!(read(&stream, 0, 2 << 20).unwrap() == fs::read(truth.join("b")).unwrap()[..2 << 20]);
    // By force it is read as it is.
    let dest = folder.path().join("out");
    let report = flatten_to(&store, "b", &dest, Wish { force: true, ..Wish::RAW }).unwrap();
    assert!(report.note.is_some() && fs::read(&dest).unwrap() != fs::read(truth.join("b")).unwrap());
    // What lies below the damage is whole.
    flatten_to(&store, "base", &folder.path().join("base"), Wish { read: true, ..Wish::PLAIN }).unwrap();
}

#[test]
fn a_damaged_block_is_seen_by_whoever_reads_what_was_shared() {
    let mount = LoopMount::new(FsKind::Xfs, 1 << 30);
    let (store, truth) = folders(&mount.path(), "store");
    let commands = vec!["write -P 0x11 0 2M".to_owned()];
    build(&store, &truth, &[Spec { options: String::new(), size: 4 << 20, commands }]);
    init(&store, StoreKind::Plain);
    adopt_well(&store);
    damage(&store.join("base"), 0x11);
    let dest = mount.path().join("out");
    let refused = flatten_to(&store, "base", &dest, Wish { read: true, ..Wish::PLAIN }).unwrap_err();
    assert_eq!((refused.kind(), dest.exists()), (Failed::Refused, false), "{refused:?}");
    let report = flatten_to(&store, "base", &dest, Wish::PLAIN).unwrap();
    assert_eq!(claims(&report), ["plan", "digest"], "data is not claimed: {report:?}");
}

#[test]
fn a_full_disk_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = small(folder.path(), false);
    let wishes = [Wish::PLAIN, Wish::RAW, Wish { compress: Some((CompressionType::Zlib, 1)), ..Wish::PLAIN }];
    let memory = Arc::new(MemoryStore::new());
    let left = || memory.read_dir(&StorePath::root()).unwrap().len();
    for wish in wishes {
        // Told before the first byte.
        memory.set_free_bytes(4096);
        let error = flatten_into(memory.clone(), &store, "b", Path::new("/x/out"), wish).unwrap_err();
        assert_eq!((error.kind(), left()), (Failed::NoSpace, 0), "{error:?}");
        memory.set_free_bytes(1 << 40);
        // Or met on the way, wherever it is met.
        for n in 0.. {
            let faulty = Faulty::new(memory.clone());
            faulty.fail_at(n, 28, Lasting::Once);
            let done = flatten_into(Arc::new(faulty), &store, "b", Path::new("/x/out"), wish);
            let Err(error) = done else {
                assert!(n > 4 && left() == 1, "{n} {wish:?}");
                memory.remove_file(&StorePath::parse("out").unwrap()).unwrap();
                break;
            };
            let name = StorePath::parse("out").unwrap();
            assert_eq!(
                (error.kind(), memory.stat(&name).is_err()),
                (Failed::NoSpace, true),
                "{n}: {error:?}"
            );
            for entry in memory.read_dir(&StorePath::root()).unwrap() {
                // One that could not be removed either has a temporary's name.
                memory.remove_file(&entry.path_in(&StorePath::root()).unwrap()).unwrap();
            }
        }
    }
}
