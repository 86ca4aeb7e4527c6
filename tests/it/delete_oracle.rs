//! Delete on QEMU's own chains: every survivor still reads the same, says QEMU.

use std::fs;
use std::path::Path;

use qchain::backend::Means;
use qchain::failure::{Code, Failure as _, Kind as Failed};
use qchain::ops::OpError;
use qchain::ops::delete::{Mode, ModeChoice, Report};
use qchain::ops::verify::{Level, Verdict};
use qchain::store::record::StoreKind;

use super::support::chains::{Kind, NAMES, Numbers, Spec, assert_true, build, copy, folders};
use super::support::crash::full;
use super::support::digest::plain_digest;
use super::support::mounts::{FsKind, LoopMount};
use super::support::store::{
    adopt_well, backing, delete, delete_well, digests, init, left, mode_of, open, owner_and_mode, verify,
};

/// What to delete of a chain of four; the tip too.
pub const DELETIONS: &[&[&str]] = &[&["a"], &["base"], &["a", "b"], &["c"], &["base", "a", "b"], &["a", "c"]];

/// Every kind of image that QEMU makes.
pub fn kinds() -> Vec<Kind> {
    let mut kinds = Vec::new();
    for cluster in [4096, 65_536, 2 << 20] {
        let plain = Kind { cluster, ..Kind::PLAIN };
        kinds.extend([
            plain,
            Kind { old: true, ..plain },
            Kind { old: true, compressed: true, ..plain },
            Kind { compressed: true, ..plain },
            Kind { compressed: true, zstd: true, ..plain },
            Kind { compressed: true, refcount_bits: 1, ..plain },
            Kind { refcount_bits: 64, ..plain },
        ]);
    }
    for cluster in [16_384, 65_536, 2 << 20] {
        let extended = Kind { cluster, extended: true, ..Kind::PLAIN };
        kinds.extend([extended, Kind { compressed: true, zstd: true, ..extended }]);
    }
    kinds
}

/// Chains of one kind, chains of mixed kinds, sizes that differ.
pub fn chains() -> Vec<(String, Vec<Spec>)> {
    let kinds = kinds();
    let mut chains = Vec::new();
    let mut numbers = Numbers(7);
    for (index, kind) in kinds.iter().enumerate() {
        let size = 20 * kind.cluster.max(65_536) + 512 * (index as u64 % 3);
        let specs = (0..4).map(|_| kind.member(size, 14, &mut numbers)).collect();
        chains.push((format!("kind {index} {kind:?}"), specs));
    }
    let mixed = if full() { 150 } else { 24 };
    for index in 0..mixed {
        let base = 1 + numbers.below(6 << 20) / 512 * 512;
        let specs = (0..4)
            .map(|_| {
                let kind = kinds[usize::try_from(numbers.below(kinds.len() as u64)).unwrap()];
                let size = match numbers.below(6) {
                    0 => base / 2 / 512 * 512,
                    1 => base + 512 * numbers.below(5000),
                    2 => [0, 512, 1024, 65_536][usize::try_from(numbers.below(4)).unwrap()],
                    _ => base / 512 * 512,
                };
                kind.member(size, 12, &mut numbers)
            })
            .collect();
        chains.push((format!("mixed {index}"), specs));
    }
    chains
}

/// What to delete, and by which means.
type Try = (&'static [&'static str], Means);

/// The first of the deletions, by one means.
fn first_by(means: Means) -> Vec<Try> {
    DELETIONS[..3].iter().map(|deleted| (*deleted, means)).collect()
}

/// Deletes from copies of one chain and looks at what is left.
fn try_deletions(parent: &Path, name: &str, specs: &[Spec], tries: &[Try]) {
    let (store, truth) = folders(parent, "original");
    build(&store, &truth, specs);
    init(&store, StoreKind::Plain);
    let adopted = adopt_well(&store);
    let truths: Vec<(String, String)> = adopted
        .adopted
        .iter()
        .map(|one| (one.digest.to_string(), plain_digest(&fs::read(truth.join(&one.member)).unwrap())))
        .collect();
    assert!(truths.iter().all(|(digest, truth)| digest == truth), "{name}: {specs:#?}");
    for &(deleted, means) in tries {
        let context = format!("{name}, without {deleted:?}, {means:?}: {specs:#?}");
        let copied = parent.join("copy");
        copy(&store, &copied);
        let before: Vec<_> = NAMES[..4].iter().map(|name| owner_and_mode(&copied.join(name))).collect();
        // A copy is another file with the same content, which is seen, and adopted for what it was.
        adopt_well(&copied);
        let report = delete_well(&copied, deleted, mode_of(means));
        check_proof(&report, means, &context);
        check_known(&copied, &context);
        check_survivors(&copied, &truth, deleted, &before, &context);
        fs::remove_dir_all(&copied).unwrap();
    }
    fs::remove_dir_all(&store).unwrap();
    fs::remove_dir_all(&truth).unwrap();
}

/// Each survivor's view digest was proved, and of what was copied the bytes, too.
pub fn check_proof(report: &Report, means: Means, context: &str) {
    for outcome in report.outcomes.iter().filter(|outcome| outcome.into.is_some()) {
        assert!(outcome.view_digest.is_some(), "{context}: {outcome:?}");
        if means == Means::Copy {
            assert!(outcome.data_bytes > 0 || outcome.bytes_written == 0, "{context}: {outcome:?}");
        }
    }
}

/// The survivors are adopted, and are what they were.
pub fn check_known(store: &Path, context: &str) {
    let report = verify(store, Level::Data);
    let sound = report.checked.iter().all(|checked| checked.verdict == Verdict::Sound && checked.complete);
    assert!(sound && report.findings.is_empty(), "{context}: {report:#?}");
}

pub fn check_survivors(
    store: &Path,
    truth: &Path,
    deleted: &[&str],
    before: &[(u32, u32, u32)],
    context: &str,
) {
    let survivors: Vec<&str> = NAMES[..4].iter().copied().filter(|name| !deleted.contains(name)).collect();
    let truths: Vec<(String, String)> = survivors
        .iter()
        .map(|name| ((*name).to_owned(), plain_digest(&fs::read(truth.join(name)).unwrap())))
        .collect();
    assert_eq!(digests(&open(store), &survivors), truths, "{context}");
    for (index, name) in survivors.iter().enumerate() {
        let path = store.join(name);
        assert_true(&path, &truth.join(name), context);
        let parent = index.checked_sub(1).map(|below| survivors[below].to_owned());
        let format = parent.as_ref().map(|_| "qcow2".to_owned());
        assert_eq!(backing(&path), (parent, format), "{context}");
        let position = NAMES.iter().position(|other| other == name).unwrap();
        assert_eq!(owner_and_mode(&path), before[position], "{context}");
    }
    let mut names: Vec<String> = survivors.iter().map(|name| (*name).to_owned()).collect();
    names.sort();
    assert_eq!(left(store), names, "{context}");
}

#[test]
fn every_kind_of_chain_on_xfs_by_clone_and_copy() {
    let mount = LoopMount::new(FsKind::Xfs, 4 << 30);
    for (index, (name, specs)) in chains().iter().enumerate() {
        let both = [Means::Clone, Means::Copy];
        let mut tries: Vec<Try> = Vec::new();
        for (turn, &deleted) in DELETIONS.iter().enumerate() {
            // By both, or by turns.
            let chosen = if full() { &both[..] } else { &both[(index + turn) % 2..][..1] };
            tries.extend(chosen.iter().map(|&means| (deleted, means)));
        }
        try_deletions(&mount.path(), name, specs, &tries);
    }
}

#[test]
fn every_kind_of_chain_on_btrfs() {
    let mount = LoopMount::new(FsKind::Btrfs, 4 << 30);
    let step = if full() { 1 } else { 5 };
    for (name, specs) in chains().iter().step_by(step) {
        try_deletions(&mount.path(), name, specs, &first_by(Means::Clone));
    }
}

#[test]
fn every_kind_of_chain_on_ext4() {
    let mount = LoopMount::new(FsKind::Ext4, 4 << 30);
    let step = if full() { 1 } else { 5 };
    for (name, specs) in chains().iter().skip(1).step_by(step) {
        try_deletions(&mount.path(), name, specs, &first_by(Means::Copy));
    }
}

/// In place: where it can be done, what is known of the survivor goes over to the file that it got.
#[test]
fn what_is_known_survives_a_merge_in_place() {
    let mount = LoopMount::new(FsKind::Ext4, 4 << 30);
    let (mut done, parent) = (0, mount.path());
    for (name, specs) in chains() {
        let (store, truth) = folders(&parent, "place");
        build(&store, &truth, &specs);
        init(&store, StoreKind::Plain);
        adopt_well(&store);
        let before: Vec<_> = NAMES[..4].iter().map(|name| owner_and_mode(&store.join(name))).collect();
        for deleted in [&NAMES[1..2], &NAMES[1..3]] {
            let context = format!("{name}, without {deleted:?}: {specs:#?}");
            match delete(&open(&store), deleted, ModeChoice::InPlace) {
                Ok(report) => {
                    assert!(report.first_failure().is_none(), "{context}: {:?}", report.first_failure());
                    done += 1;
                    check_proof(&report, Means::Clone, &context);
                    check_known(&store, &context);
                    check_survivors(&store, &truth, deleted, &before, &context);
                    break;
                }
                Err(error) => assert_eq!(error.code(), Code::ModeImpossible, "{context}: {error}"),
            }
        }
        fs::remove_dir_all(&store).unwrap();
        fs::remove_dir_all(&truth).unwrap();
    }
    assert!(done > 10, "only {done} could be merged in place");
}

/// P 128 KiB of 0x11; A of 96 KiB over P with 4 KiB written at 64 KiB; B of 128 KiB over A.
#[test]
fn what_lies_past_a_members_end_stays_zero() {
    let folder = tempfile::tempdir().unwrap();
    let spec = |size, commands: &[&str]| Spec {
        options: String::new(),
        size,
        commands: commands.iter().map(|command| (*command).to_owned()).collect(),
    };
    let specs = [
        spec(131_072, &["write -P 0x11 0 128k"]),
        spec(98_304, &["write -P 0x22 64k 4k"]),
        spec(131_072, &[]),
    ];
    let (store, truth) = folders(folder.path(), "store");
    build(&store, &truth, &specs);
    init(&store, StoreKind::Plain);
    let zeros_past_the_end = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        assert_eq!(bytes.len(), 131_072);
        assert!(bytes[98_304..].iter().all(|byte| *byte == 0));
        assert!(bytes[..65_536].iter().all(|byte| *byte == 0x11));
    };
    zeros_past_the_end(&truth.join("b"));
    delete_well(&store, &["a"], ModeChoice::Copy);
    assert_true(&store.join("b"), &truth.join("b"), "after A went");
    super::support::chains::write_truth(&store.join("b"), &truth.join("after"));
    zeros_past_the_end(&truth.join("after"));
}

#[test]
fn the_cheapest_mode_that_works_is_taken_and_an_impossible_one_refused() {
    for (fs, mode, word) in [(FsKind::Xfs, Mode::Clone, "clone"), (FsKind::Ext4, Mode::InPlace, "in-place")] {
        let mount = LoopMount::new(fs, 1 << 30);
        let (store, truth) = folders(&mount.path(), "store");
        // The survivor has little beside what is merged into it.
        let specs: Vec<Spec> =
            [10, 40, 1, 10].map(|writes| Kind::PLAIN.member(2 << 20, writes, &mut Numbers(5))).into();
        build(&store, &truth, &specs);
        init(&store, StoreKind::Plain);
        if mode == Mode::InPlace {
            let refused = delete(&open(&store), &["a"], ModeChoice::Clone).unwrap_err();
            assert_eq!((refused.kind(), refused.code()), (Failed::Refused, Code::ModeImpossible));
        }
        let report = delete_well(&store, &["a"], ModeChoice::Auto);
        assert_eq!(report.outcomes[0].mode, Some(mode));
        assert_eq!(mode.word(), word);
        let removed = delete_well(&store, &["c"], ModeChoice::Auto);
        assert_eq!(removed.outcomes[0].mode.map(Mode::word), Some("remove"));
        assert_true(&store.join("b"), &truth.join("b"), word);
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_bytes_needed() {
    let mount = LoopMount::new(FsKind::Ext4, 256 << 20);
    let (store, truth) = folders(&mount.path(), "store");
    let member = |megabytes: u64| Spec {
        options: String::new(),
        size: 64 << 20,
        commands: vec![format!("write -P 7 0 {megabytes}M")],
    };
    build(&store, &truth, &[member(1), member(40), member(2)]);
    init(&store, StoreKind::Plain);
    let space = open(&store).get(0).unwrap().backend().space().unwrap();
    fs::write(mount.path().join("full"), vec![1; usize::try_from(space.free_bytes - (20 << 20)).unwrap()])
        .unwrap();
    let before = left(&store);
    match delete(&open(&store), &["a"], ModeChoice::Copy).unwrap_err() {
        OpError::NoSpace { free_bytes, needed_bytes, .. } => {
            assert!(((40 << 20)..(42 << 20)).contains(&needed_bytes), "{needed_bytes}");
            assert!(free_bytes < 21 << 20, "{free_bytes}");
        }
        error => panic!("{error}"),
    }
    assert_eq!(left(&store), before);
    fs::remove_file(mount.path().join("full")).unwrap();
    delete_well(&store, &["a"], ModeChoice::Copy);
    assert_true(&store.join("b"), &truth.join("b"), "with room");
}
