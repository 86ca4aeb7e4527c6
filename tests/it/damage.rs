//! Damage to adopted members is found, named, and never passed on; what is no damage is not taken for it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use qchain::failure::Code;
use qchain::ops::delete::ModeChoice;
use qchain::ops::verify::{Level, Verdict, VerifyReport};
use qchain::store::record::StoreKind;
use tempfile::TempDir;

use super::support::chains::{Numbers, Spec, build};
use super::support::crash::full;
use super::support::qemu::{must, text};
use super::support::store::{adopt, adopt_well, delete, init, left, open, verify};

/// Three small members over each other: base <- a <- b.
struct Store {
    directory: TempDir,
}

impl Store {
    fn adopted(options: &str) -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let store = Self { directory };
        let commands: [&[&str]; 3] = [
            &["write -P 1 0 300k", "write -P 2 700k 68k"],
            &["write -P 3 100k 80k", "write -z 704k 8k", "write -P 4 320k 3k"],
            &["write -P 5 160k 10k", "write -P 6 900k 64k"],
        ];
        let specs: Vec<Spec> = commands
            .iter()
            .map(|commands| Spec {
                options: options.to_owned(),
                size: 1 << 20,
                commands: commands.iter().map(|command| (*command).to_owned()).collect(),
            })
            .collect();
        let truth = store.directory.path().join("truth");
        fs::create_dir(&truth).unwrap();
        fs::create_dir(store.root()).unwrap();
        build(&store.root(), &truth, &specs);
        init(&store.root(), StoreKind::Plain);
        adopt_well(&store.root());
        store
    }

    fn root(&self) -> std::path::PathBuf {
        self.directory.path().join("store")
    }

    fn member(&self, name: &str) -> std::path::PathBuf {
        self.root().join(name)
    }
}

/// Changes bytes as bad storage does: nobody wrote, so the times stay.
fn rot(path: &Path, at: u64, change: impl Fn(&mut [u8]), length: usize) {
    super::support::rot::rot(path, at, &changed(path, at, change, length));
}

fn write(path: &Path, at: u64, change: impl Fn(&mut [u8]), length: usize) {
    let bytes = changed(path, at, change, length);
    File::options().write(true).open(path).unwrap().write_all_at(&bytes, at).unwrap();
}

fn changed(path: &Path, at: u64, change: impl Fn(&mut [u8]), length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    change(&mut bytes);
    bytes
}

fn flip(bit: u64) -> (u64, impl Fn(&mut [u8])) {
    (bit / 8, move |bytes: &mut [u8]| bytes[0] ^= 1 << (bit % 8))
}

fn verdict(report: &VerifyReport, name: &str) -> Verdict {
    report.checked.iter().find(|checked| checked.member == name).unwrap().verdict
}

/// Every member sound, and nothing said.
fn assert_clean(store: &Store, context: &str) {
    let report = verify(&store.root(), Level::Data);
    let sound = report.checked.iter().all(|checked| checked.verdict == Verdict::Sound && checked.complete);
    assert!(sound && report.findings.is_empty(), "{context}: {report:#?}");
}

/// Where the metadata of a small image lies, as its header and tables say.
fn metadata(path: &Path) -> Vec<(u64, u64)> {
    let bytes = fs::read(path).unwrap();
    let word = |at: u64| {
        let at = usize::try_from(at).unwrap();
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
    };
    let half = |at: u64| word(at) >> 32;
    let (cluster, mask) = (1 << half(20), 0x00ff_ffff_ffff_fe00);
    // The header and the backing name behind it.
    let mut found = vec![(0, (word(8) + half(16)).max(112))];
    let (entries, l1) = (half(36), word(40));
    found.push((l1, entries * 8));
    found.extend(
        (0..entries).map(|index| word(l1 + index * 8) & mask).filter(|at| *at > 0).map(|at| (at, cluster)),
    );
    let (table, clusters) = (word(48), half(56));
    found.push((table, clusters * cluster));
    let blocks = (0..clusters * cluster / 8).map(|index| word(table + index * 8) & mask).filter(|at| *at > 0);
    found.extend(blocks.map(|at| (at, cluster)).collect::<Vec<_>>());
    found
}

#[test]
fn every_bit_of_metadata_that_rots_is_found() {
    let store = Store::adopted("cluster_size=512");
    let step = if full() { 1 } else { 29 };
    let mut tried = 0;
    for name in ["base", "a"] {
        let path = store.member(name);
        let good = fs::read(&path).unwrap();
        for (at, length) in metadata(&path) {
            for bit in (at * 8..(at + length) * 8).step_by(step) {
                let (byte, change) = flip(bit);
                rot(&path, byte, change, 1);
                let report = verify(&store.root(), Level::Structure);
                assert_eq!(verdict(&report, name), Verdict::Damaged, "{name}, bit {bit}: {report:#?}");
                assert!(report.findings.iter().any(|finding| finding.member == name), "{name}, bit {bit}");
                rot(&path, byte, |now| now[0] = good[usize::try_from(byte).unwrap()], 1);
                tried += 1;
            }
        }
        assert_eq!(fs::read(&path).unwrap(), good);
    }
    assert!(tried > 1000, "{tried}");
    assert_clean(&store, "at the end");
}

/// The same by a writer, who leaves a new time: no flipped bit is passed by in silence.
#[test]
fn every_bit_of_metadata_that_is_written_is_told() {
    let store = Store::adopted("cluster_size=512");
    let step = if full() { 3 } else { 101 };
    let path = store.member("a");
    let good = fs::read(&path).unwrap();
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    for (at, length) in metadata(&path) {
        for bit in (at * 8..(at + length) * 8).step_by(step) {
            let (byte, change) = flip(bit);
            write(&path, byte, change, 1);
            let report = verify(&store.root(), Level::Data);
            assert!(report.findings.iter().any(|finding| finding.member == "a"), "bit {bit}: {report:#?}");
            fs::write(&path, &good).unwrap();
            File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
        }
    }
    assert_clean(&store, "at the end");
}

#[test]
fn data_that_rots_is_found_and_said_where() {
    for options in ["cluster_size=512", "cluster_size=64k", "cluster_size=2M,extended_l2=on"] {
        let store = Store::adopted(options);
        let mut numbers = Numbers(3);
        for (name, guest, length) in
            [("base", 0, 300 << 10), ("a", 100 << 10, 60 << 10), ("b", 900 << 10, 64 << 10)]
        {
            let path = store.member(name);
            let map: serde_json::Value =
                serde_json::from_str(&must("qemu-img", &["map", "-U", "--output=json", text(&path)]))
                    .unwrap();
            for _ in 0..12 {
                let at: u64 = guest + numbers.below(length);
                let run = map.as_array().unwrap().iter().find(|run| {
                    let start = run["start"].as_u64().unwrap();
                    start <= at && at < start + run["length"].as_u64().unwrap()
                });
                let run = run.unwrap();
                assert_eq!(run["depth"], 0, "{name} {at}: {run}");
                let host = run["offset"].as_u64().unwrap() + at - run["start"].as_u64().unwrap();
                let bit = host * 8 + numbers.below(8);
                let (byte, change) = flip(bit);
                rot(&path, byte, change, 1);
                let report = verify(&store.root(), Level::Data);
                assert_eq!(
                    verdict(&report, name),
                    Verdict::Damaged,
                    "{options}, {name} at {at}: {report:#?}"
                );
                let said = report.damage.iter().any(|damage| {
                    damage.member == name
                        && (damage.start..damage.start + damage.length).contains(&at)
                        && damage
                            .host
                            .iter()
                            .any(|range| (range.offset..range.offset + range.length).contains(&host))
                });
                assert!(said, "{options}, {name} at {at}, host {host}: {report:#?}");
                let (byte, change) = flip(bit);
                rot(&path, byte, change, 1);
                assert_clean(&store, "healed");
            }
        }
    }
}

#[test]
fn the_snapshots_that_show_damage_are_named() {
    let store = Store::adopted("cluster_size=64k");
    // Cluster 0 of the base shows in all; the one at 700 KiB is covered by nobody; that at 128 KiB by a.
    let data = metadata(&store.member("base")).iter().map(|(at, length)| at + length).max().unwrap();
    rot(&store.member("base"), data.next_multiple_of(65_536), |bytes| bytes[0] ^= 1, 1);
    let report = verify(&store.root(), Level::Data);
    assert_eq!(report.damage.len(), 1, "{report:#?}");
    assert_eq!((report.damage[0].member.as_str(), report.damage[0].start), ("base", 0));
    assert_eq!(report.damage[0].dependents, ["a", "b"]);
    for name in ["base", "a", "b"] {
        assert_eq!(verdict(&report, name), Verdict::Damaged);
    }
    // As long as nobody has read it anew.
    let report = verify(&store.root(), Level::Data);
    assert_eq!(verdict(&report, "b"), Verdict::Damaged);
}

#[test]
fn coarse_damage_is_found() {
    let store = Store::adopted("cluster_size=64k");
    let path = store.member("base");
    let good = fs::read(&path).unwrap();
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let end = good.len() as u64;
    let restore = || {
        fs::write(&path, &good).unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    };
    let expect = |what: &str| {
        let report = verify(&store.root(), Level::Data);
        assert_eq!(verdict(&report, "base"), Verdict::Damaged, "{what}: {report:#?}");
        restore();
        assert_clean(&store, what);
    };
    // The last cluster holds 700 KiB's, the one before 640 KiB's or so: different data.
    let cluster = 65_536;
    let (one, two) = (end - cluster, end - 3 * cluster);
    let at = |place: u64| {
        good[usize::try_from(place).unwrap()..usize::try_from(place + cluster).unwrap()].to_vec()
    };
    let (first, second) = (at(one), at(two));
    assert_ne!(first, second);
    rot(&path, one, |bytes| bytes.copy_from_slice(&second), 65_536);
    rot(&path, two, |bytes| bytes.copy_from_slice(&first), 65_536);
    expect("two clusters swapped");
    rot(&path, one, |bytes| bytes[..512].fill(0), 512);
    expect("a sector of zeros");
    for lost in [1, 512, cluster, 2 * cluster] {
        File::options().write(true).open(&path).unwrap().set_len(end - lost).unwrap();
        expect(&format!("{lost} bytes lost at the end"));
    }
}

#[test]
fn another_file_under_the_name_is_found() {
    for options in ["cluster_size=4k", "cluster_size=64k"] {
        let store = Store::adopted(options);
        let other = store.directory.path().join("other");
        must("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&other), "1M"]);
        must("qemu-io", &["-c", "write -P 99 0 300k", "-c", "write -P 2 700k 64k", text(&other)]);
        fs::rename(&other, store.member("base")).unwrap();
        let report = verify(&store.root(), Level::Data);
        assert_eq!(verdict(&report, "base"), Verdict::Damaged, "{report:#?}");
        assert_eq!(verdict(&report, "a"), Verdict::Damaged, "its parent is another one: {report:#?}");
        // It is not adopted in passing, and nothing is merged with it.
        let again = adopt(&store.root(), false);
        assert!(again.findings.iter().any(|finding| finding.code == Code::ChangedSinceAdoption), "{again:?}");
        let before = left(&store.root());
        let refused = delete(&open(&store.root()), &["base"], ModeChoice::Copy);
        let failure =
            refused.as_ref().map(|report| report.first_failure().map(qchain::failure::Failure::code));
        assert_eq!(failure.unwrap(), Some(Code::Quarantined));
        assert_eq!(left(&store.root()), before);
        assert!(adopt(&store.root(), true).failure.is_none());
        assert_clean(&store, "accepted");
    }
}

#[test]
fn a_rebase_by_hand_is_no_damage() {
    let store = Store::adopted("cluster_size=64k");
    let path = store.member("b");
    must("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", text(&store.member("a")), text(&path)]);
    let report = verify(&store.root(), Level::Data);
    assert!(report.checked.iter().all(|checked| checked.verdict == Verdict::Sound), "{report:#?}");
    let codes: Vec<Code> = report.findings.iter().map(|finding| finding.code).collect();
    assert_eq!(codes, [Code::Relinked]);
    let adopted = adopt(&store.root(), false);
    assert!(adopted.findings.is_empty(), "{adopted:?}");
    assert_clean(&store, "adopted again");
    // QEMU's own rebase writes the file anew; its content stays.
    must("qemu-img", &["rebase", "-F", "qcow2", "-b", "base", text(&path)]);
    let report = verify(&store.root(), Level::Data);
    assert!(report.checked.iter().all(|checked| checked.verdict == Verdict::Sound), "{report:#?}");
    assert!(adopt(&store.root(), false).findings.is_empty());
    assert_clean(&store, "rebased");
}

#[test]
fn a_parent_of_the_same_view_is_no_damage_and_another_one_is() {
    let store = Store::adopted("cluster_size=64k");
    let path = store.member("b");
    fs::copy(store.member("a"), store.member("c")).unwrap();
    must("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", "c", text(&path)]);
    assert!(adopt(&store.root(), false).findings.is_empty());
    assert_clean(&store, "over a copy of its parent");
    must("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", "base", text(&path)]);
    let report = verify(&store.root(), Level::Data);
    assert_eq!(verdict(&report, "b"), Verdict::Damaged, "{report:#?}");
    assert!(report.findings.iter().any(|finding| finding.code == Code::ParentChanged), "{report:#?}");
    let refused = adopt(&store.root(), false);
    assert!(refused.findings.iter().any(|finding| finding.member == "b"), "{refused:?}");
}

#[test]
fn a_merge_does_not_pass_damage_on() {
    let store = Store::adopted("cluster_size=64k");
    let code = |members: &[&str], mode| match delete(&open(&store.root()), members, mode) {
        Ok(report) => report.first_failure().map(qchain::failure::Failure::code),
        Err(error) => Some(qchain::failure::Failure::code(&error)),
    };
    let path = store.member("a");
    let data = metadata(&path).iter().map(|(at, length)| at + length).max().unwrap().next_multiple_of(65_536);
    // Bytes that are copied are hashed: nobody had looked at them.
    rot(&path, data + 65_000, |bytes| bytes[0] ^= 1, 1);
    let before = fs::read(store.member("b")).unwrap();
    assert_eq!(code(&["a"], ModeChoice::Copy), Some(Code::DataDamaged));
    assert_eq!(verdict(&verify(&store.root(), Level::Data), "a"), Verdict::Damaged);
    assert_eq!(code(&["a"], ModeChoice::Copy), Some(Code::Quarantined));
    assert_eq!(code(&["base"], ModeChoice::Copy), Some(Code::Quarantined));
    rot(&path, data + 65_000, |bytes| bytes[0] ^= 1, 1);
    assert_eq!(code(&["a"], ModeChoice::Copy), Some(Code::Quarantined), "until somebody looked");
    assert_eq!(verdict(&verify(&store.root(), Level::Data), "a"), Verdict::Sound);
    rot(&path, 20, |bytes| bytes[90] ^= 1, 100);
    assert!(code(&["a"], ModeChoice::Copy).is_some());
    rot(&path, 20, |bytes| bytes[90] ^= 1, 100);
    assert_eq!(fs::read(store.member("b")).unwrap(), before);
    assert_eq!(code(&["a"], ModeChoice::Copy), None);
    assert_clean(&store, "merged");
}

#[test]
fn a_circle_of_backing_names_comes_to_an_end() {
    let store = Store::adopted("cluster_size=4096");
    must("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "b", text(&store.member("base"))]);
    let report = verify(&store.root(), Level::Data);
    let codes: Vec<Code> = report.findings.iter().map(|finding| finding.code).collect();
    assert!(codes.contains(&Code::Cycle), "{report:#?}");
    assert!(report.checked.iter().all(|checked| checked.verdict != Verdict::Sound), "{report:#?}");
}
