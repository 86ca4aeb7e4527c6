//! Stores that fail and stores that lie in the middle of a delete; and what clones really share.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use qchain::backend::Backend;
use qchain::backend::faulty::{Faulty, Lasting};
use qchain::backend::memory::MemoryStore;
use qchain::backend::posix::PosixStore;
use qchain::change::record::{Claim, Decision};
use qchain::change::witness::Witness;
use qchain::change::{Site, SystemClock};
use qchain::failure::{Code, Failure, Kind as FailureKind};
use qchain::ids::StorePath;
use qchain::ops::Result;
use qchain::ops::delete::{ModeChoice, Report, Terms};
use qchain::ops::recover::recover;
use qchain::progress::Cancel;
use qchain::store::chain::OpenChain;
use qchain::store::names::resolve_one;
use qchain::store::record::{DIRECTORIES, StoreKind};
use qchain::units::GuestOffset;

use super::support::chains::{Kind, Numbers, Spec, assert_true, build, copy, folders};
use super::support::killing::LONG;
use super::support::mounts::{FsKind, LoopMount};
use super::support::qemu::{must, text};
use super::support::store::{
    LEASE, delete, delete_by, delete_on, delete_well, files, init, open, open_with, scan,
};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// What each survivor shows.
type Truths = BTreeMap<String, Vec<u8>>;

fn path(text: &str) -> StorePath {
    StorePath::parse(text).unwrap()
}

/// base <- a <- b <- c, made by QEMU in `parent/store`, and the truth of what stays without `a` and `b`.
fn chain(parent: &Path, kind: Kind, seed: u64) -> Truths {
    let (store, truth) = folders(parent, "store");
    let mut numbers = Numbers(seed);
    let size = 12 * kind.cluster.max(65_536) + 512;
    let specs: Vec<Spec> = (0..4).map(|_| kind.member(size, 8, &mut numbers)).collect();
    build(&store, &truth, &specs);
    init(&store, StoreKind::Plain);
    ["base", "c"].map(|name| (name.to_owned(), fs::read(truth.join(name)).unwrap())).into()
}

/// The same files in a store in memory.
fn in_memory(store: &Path) -> Arc<MemoryStore> {
    let memory = MemoryStore::new();
    for file in files(store) {
        let name = path(text(&file));
        write(&memory, &name, &fs::read(store.join(file)).unwrap());
    }
    for directory in DIRECTORIES {
        memory.create_dir(&path(".qchain").join(directory).unwrap(), true).unwrap();
    }
    for directory in [".qchain", ""] {
        memory.sync_dir(&path(directory)).unwrap();
    }
    Arc::new(memory)
}

fn write(memory: &MemoryStore, name: &StorePath, bytes: &[u8]) {
    if !name.parent().is_root() && memory.stat(&name.parent()).is_err() {
        memory.create_dir(&name.parent(), true).unwrap();
    }
    let file = memory.create(name).unwrap();
    file.write_at(0, bytes).unwrap();
    file.sync().unwrap();
}

fn content(store: &dyn Backend, name: &str) -> Option<Vec<u8>> {
    let file = store.open(&path(name)).ok()?;
    let mut bytes = vec![0; usize::try_from(file.stat().unwrap().length).unwrap()];
    file.read_at(0, &mut bytes).unwrap();
    Some(bytes)
}

fn entries_of(store: &dyn Backend, directory: &str) -> usize {
    store.read_dir(&path(directory)).unwrap().len()
}

fn temporaries(store: &dyn Backend) -> usize {
    entries_of(store, ".qchain/tmp")
}

fn try_delete(backend: Arc<dyn Backend>, mode: ModeChoice) -> Result<Report> {
    // One thread, and no renewals of the lease, which come by the clock: the calls are those of a clean run.
    let (stores, cancel) = (open_with(Path::new("/nowhere"), backend), Cancel::default());
    let site = Site::new(&stores, &SystemClock, &cancel, LONG);
    delete_by(&site, &["a", "b"], mode, Terms::default(), 1)
}

/// Whether all that was asked for was done.
fn done(result: &Result<Report>) -> bool {
    result.as_ref().is_ok_and(|report| report.first_failure().is_none())
}

fn assert_truths(backend: &Arc<dyn Backend>, truths: &Truths, context: &str) {
    let stores = open_with(Path::new("/nowhere"), Arc::clone(backend));
    let scan = scan(&stores);
    for (name, truth) in truths {
        let id = resolve_one(&stores, &scan, name).unwrap();
        let chain = OpenChain::open(&stores, &scan.graph, id).unwrap();
        let mut bytes = vec![1; truth.len()];
        chain.read(GuestOffset(0), &mut bytes).unwrap();
        assert!(chain.virtual_size() == truth.len() as u64 && bytes == *truth, "{context}: {name}");
    }
}

/// What was decided and not done says so, and nothing else does.
fn says_whether_it_is_decided(store: &dyn Backend, result: &Result<Report>, context: &str) {
    let error = match result {
        Ok(report) => report.first_failure(),
        Err(error) => Some(error),
    };
    let trees = store.read_dir(&path(".qchain/generations")).unwrap_or_default();
    let claims = trees.into_iter().flat_map(|tree| {
        let tree = path(".qchain/generations").join(&tree.name.unwrap()).unwrap();
        let numbers = store.read_dir(&tree).unwrap();
        numbers.into_iter().map(move |number| tree.join(&number.name.unwrap()).unwrap()).collect::<Vec<_>>()
    });
    let decided = claims.filter_map(|claim| content(store, claim.as_str())).any(|claim| {
        let claim: Option<Claim> = serde_json::from_slice(&claim).ok();
        claim.is_some_and(|claim| matches!(claim.decision, Decision::Commit(_)))
    });
    if let Some(error) = error {
        assert_eq!(error.code() == Code::Decided, decided, "{context}: {error}");
        assert!(matches!(error.kind(), FailureKind::Io | FailureKind::NoSpace), "{context}: {error}");
    }
}

/// Lets one mutating call after the other fail, each on a fresh store.
fn fail_everywhere(fresh: &dyn Fn() -> Arc<dyn Backend>, truths: &Truths, mode: ModeChoice, step: usize) {
    let clean = Faulty::new(fresh());
    let result = try_delete(Arc::new(clean.clone()), mode);
    assert!(done(&result), "{result:?}");
    let calls: Vec<_> = clean.trace().into_iter().filter(|call| call.mutation.is_some()).collect();
    let kinds =
        [(EIO, Lasting::Once, false), (ENOSPC, Lasting::Once, true), (ENOSPC, Lasting::Onwards, false)];
    for (at, call) in (0..).zip(&calls).step_by(step) {
        for (errno, lasting, half) in kinds {
            let context = format!("{mode:?}: {call:?} fails with {errno}, {lasting:?}");
            let inner = fresh();
            let faulty = Faulty::new(Arc::clone(&inner));
            if half {
                faulty.fail_halfway_at(at, errno, lasting);
            } else {
                faulty.fail_at(at, errno, lasting);
            }
            let result = try_delete(Arc::new(faulty.clone()), mode);
            let failed_removing = call.path.as_str().starts_with(".qchain") && call.name == "remove_file"
                || lasting == Lasting::Onwards;
            // What was decided keeps what it needs until somebody recovers it.
            let open = entries_of(inner.as_ref(), ".qchain/intents");
            assert!(failed_removing || open == 1 || temporaries(inner.as_ref()) == 0, "{context}");
            assert_truths(&inner, truths, &context);
            says_whether_it_is_decided(inner.as_ref(), &result, &context);
            let gone = ["a", "b"].map(|name| inner.stat(&path(name)).is_err());
            assert!(!done(&result) || gone == [true, true], "{context}: {gone:?}");
            // Once more, on the store as it is now.
            faulty.heal();
            let cancel = Cancel::default();
            let healed = open_with(Path::new("/nowhere"), Arc::new(faulty.clone()));
            recover(&Site::new(&healed, &SystemClock, &cancel, LEASE), Witness::None).unwrap();
            for name in ["b", "a"].into_iter().filter(|name| inner.stat(&path(name)).is_ok()) {
                let stores = open_with(Path::new("/nowhere"), Arc::new(faulty.clone()));
                let again = delete(&stores, &[name], mode);
                // What had been decided is finished first, and then there is nothing left to delete.
                let finished = inner.stat(&path(name)).is_err();
                assert!(done(&again) || finished, "{context}: then {name}: {again:?}");
            }
            assert_truths(&inner, truths, &context);
            let directories = [".qchain/intents", ".qchain/tmp", ".qchain/trash"];
            assert_eq!(directories.map(|name| entries_of(inner.as_ref(), name)), [0; 3], "{context}");
            let left = |name: &str| inner.stat(&path(name)).is_ok();
            assert!(left("base") && left("c") && !left("a") && !left("b"), "{context}");
        }
    }
}

#[test]
fn every_call_fails_once() {
    let folder = tempfile::tempdir().unwrap();
    for (seed, kind) in [
        (1, Kind { cluster: 4096, compressed: true, ..Kind::PLAIN }),
        (2, Kind { extended: true, ..Kind::PLAIN }),
    ] {
        let parent = folder.path().join(seed.to_string());
        let truths = chain(&parent, kind, seed);
        let store = parent.join("store");
        let memory = || in_memory(&store) as Arc<dyn Backend>;
        for mode in [ModeChoice::Copy, ModeChoice::Clone] {
            fail_everywhere(&memory, &truths, mode, 1);
        }
        let count = std::cell::Cell::new(0);
        let posix = || {
            count.set(count.get() + 1);
            let copied = parent.join(format!("copy{}", count.get()));
            copy(&store, &copied);
            Arc::new(PosixStore::open(&copied).unwrap()) as Arc<dyn Backend>
        };
        fail_everywhere(&posix, &truths, ModeChoice::Copy, 2);
    }
}

/// Another tree of the same call, or CloudStack, removes a file between the look at the directory and at it.
#[test]
fn a_member_that_goes_while_it_is_looked_at_was_never_there() {
    let folder = tempfile::tempdir().unwrap();
    chain(folder.path(), Kind::PLAIN, 3);
    let memory = in_memory(&folder.path().join("store"));
    let quiet = Faulty::new(Arc::clone(&memory) as Arc<dyn Backend>);
    // One at a time, so that calls come in the same order twice.
    let stores = open_with(Path::new("/nowhere"), Arc::new(quiet.clone())).with_readers(1);
    let from = quiet.calls();
    assert_eq!(scan(&stores).members.len(), 4);
    let scanned = &quiet.trace()[usize::try_from(from).unwrap()..];
    let first_open = (from..).zip(scanned).find(|(_, call)| call.name == "open").unwrap().0;
    let faulty = Faulty::new(Arc::clone(&memory) as Arc<dyn Backend>);
    let stores = open_with(Path::new("/nowhere"), Arc::new(faulty.clone())).with_readers(1);
    assert_eq!(faulty.calls(), from);
    faulty.before(first_open, move || memory.remove_file(&path("c")).unwrap());
    let scan = scan(&stores);
    let found: Vec<&str> = scan.members.iter().map(|member| member.key.path.as_str()).collect();
    assert_eq!(found, ["a", "b", "base"]);
    assert!(scan.findings.is_empty(), "{:?}", scan.findings);
}

/// How an entry of a table is damaged on its way to the store.
#[derive(Clone, Copy, Debug)]
enum Tamper {
    Drop,
    Shift,
    Swap,
}

/// Where the entries of the L1 and L2 tables of an image lie that say something, each with its length.
fn entries(image: &[u8], kind: Kind) -> Vec<(usize, usize)> {
    let be = |at: usize, length: usize| {
        image[at..at + length].iter().fold(0_usize, |number, byte| number << 8 | usize::from(*byte))
    };
    let cluster = usize::try_from(kind.cluster).unwrap();
    let width = if kind.extended { 16 } else { 8 };
    let (l1, count) = (be(40, 8), be(36, 4));
    let mut found = Vec::new();
    for at in (0..count).map(|index| l1 + 8 * index).filter(|at| be(*at, 8) != 0) {
        found.push((at, 8));
        let table = be(at, 8) & 0x00ff_ffff_ffff_fe00;
        let slots = (table..table + cluster).step_by(width);
        found.extend(
            slots.filter(|at| image[*at..at + width].iter().any(|byte| *byte != 0)).map(|at| (at, width)),
        );
    }
    found
}

/// Damages the entry at `at` in what is written there.
fn damage(
    bytes: &mut [u8],
    offset: u64,
    at: usize,
    other: Option<usize>,
    width: usize,
    how: Tamper,
    kind: Kind,
) {
    let start = usize::try_from(offset).unwrap();
    let inside = |at: usize| at >= start && at + width <= start + bytes.len();
    if !inside(at) {
        return;
    }
    let here = at - start;
    match (how, other.filter(|other| inside(*other))) {
        (Tamper::Swap, Some(other)) => {
            let there = other - start;
            for byte in 0..width {
                bytes.swap(here + byte, there + byte);
            }
        }
        (Tamper::Drop | Tamper::Swap, _) => bytes[here..here + width].fill(0),
        (Tamper::Shift, _) => {
            let entry = u64::from_be_bytes(bytes[here..here + 8].try_into().unwrap());
            let shifted =
                if entry >> 62 & 1 == 1 { entry.wrapping_add(512) } else { entry.wrapping_add(kind.cluster) };
            bytes[here..here + 8].copy_from_slice(&shifted.to_be_bytes());
        }
    }
}

fn tamper_everywhere(parent: &Path, kind: Kind, seed: u64, mode: ModeChoice) {
    let parent = parent.join(format!("{seed}-{mode:?}"));
    chain(&parent, kind, seed);
    let store = parent.join("store");
    let clean = in_memory(&store);
    let result = try_delete(Arc::clone(&clean) as Arc<dyn Backend>, mode);
    assert!(done(&result), "{result:?}");
    let image = content(clean.as_ref(), "c").unwrap();
    let entries = entries(&image, kind);
    assert!(entries.len() > 4, "{entries:?}");
    for (index, (at, width)) in entries.iter().copied().enumerate() {
        let same = |(other, _): &&(usize, usize)| image[*other..other + width] != image[at..at + width];
        let other =
            entries[index + 1..].iter().filter(|other| other.1 == width).find(same).map(|other| other.0);
        for how in [Tamper::Drop, Tamper::Shift, Tamper::Swap] {
            let context = format!("{kind:?} {mode:?}: {how:?} at {at} (and {other:?})");
            let memory = in_memory(&store);
            let faulty = Faulty::new(Arc::clone(&memory) as Arc<dyn Backend>);
            faulty.tamper(move |path, offset, bytes| {
                if path.as_str().starts_with(".qchain/tmp/") {
                    damage(bytes, offset, at, other, width, how, kind);
                }
            });
            let result = try_delete(Arc::new(faulty), mode);
            let report = result.unwrap_or_else(|error| panic!("{context}: {error}"));
            let code = report.first_failure().map(Failure::code);
            assert_eq!(code, Some(Code::ProofFailed), "{context}: {:?}", report.first_failure());
            for name in ["base", "a", "b", "c"] {
                assert!(
                    content(memory.as_ref(), name) == fs::read(store.join(name)).ok(),
                    "{context}: {name}"
                );
            }
            assert_eq!(temporaries(memory.as_ref()), 0, "{context}");
        }
    }
}

#[test]
fn a_tampered_table_never_gets_a_name() {
    let folder = tempfile::tempdir().unwrap();
    let kinds = [
        Kind::PLAIN,
        Kind { cluster: 4096, ..Kind::PLAIN },
        Kind { compressed: true, ..Kind::PLAIN },
        Kind { extended: true, compressed: true, zstd: true, ..Kind::PLAIN },
        Kind { old: true, ..Kind::PLAIN },
    ];
    for (seed, kind) in (1..).zip(kinds) {
        for mode in [ModeChoice::Copy, ModeChoice::Clone] {
            tamper_everywhere(folder.path(), kind, seed, mode);
        }
    }
}

/// The extents of a file that hold data, as `(logical, physical, shared)` in units of 512 bytes.
fn fiemap(path: &Path) -> Vec<(u64, u64, bool)> {
    let output = must("xfs_io", &["-r", "-c", "fiemap -v", text(path)]);
    let extent = |line: &str| {
        // `0: [0..127]: 1000..1127  128 0x2001`; holes have no address.
        let words: Vec<&str> = line.split_whitespace().collect();
        let logical = words.get(1)?.trim_start_matches('[').split_once("..")?.0.parse().ok()?;
        let physical = words.get(2)?.split_once("..")?.0.parse().ok()?;
        let flags = u64::from_str_radix(words.get(4)?.strip_prefix("0x")?, 16).ok()?;
        Some((logical, physical, flags & 0x2000 != 0))
    };
    output.lines().filter_map(extent).collect()
}

#[test]
fn clones_share_their_extents() {
    let mount = LoopMount::new(FsKind::Xfs, 1 << 30);
    let (store, truth) = folders(&mount.path(), "store");
    let member = |commands: &[&str]| Spec {
        options: "cluster_size=65536".to_owned(),
        size: 64 << 20,
        commands: commands.iter().map(|command| (*command).to_owned()).collect(),
    };
    let specs = [
        member(&["write -P 1 0 16M"]),
        member(&["write -P 2 1M 2M", "write -P 3 30M 4M"]),
        member(&["write -P 4 2M 64k", "write -z 31M 1M", "write -P 5 50M 1M"]),
    ];
    build(&store, &truth, &specs);
    init(&store, StoreKind::Plain);
    let originals = mount.path().join("originals");
    copy(&store, &originals);
    must("sync", &["-f", text(&store)]);
    let report = delete_well(&store, &["a"], ModeChoice::Clone);
    let outcome = &report.outcomes[0];
    assert_eq!(outcome.bytes_written, 0, "no byte of data");
    assert!(outcome.bytes_cloned >= 6 << 20 && outcome.metadata_bytes_written < 1 << 20, "{outcome:?}");
    assert_true(&store.join("b"), &truth.join("b"), "cloned");
    // Every run of data lies where it lay in the originals, and is marked as shared.
    let old: Vec<u64> =
        ["a", "b"].iter().flat_map(|name| fiemap(&originals.join(name))).map(|(_, at, _)| at).collect();
    let new = fiemap(&store.join("b"));
    let shared: Vec<_> = new.iter().filter(|(_, _, shared)| *shared).collect();
    assert!(!shared.is_empty() && !old.is_empty(), "{new:?} {old:?}");
    let bytes: u64 = {
        let output = must("xfs_io", &["-r", "-c", "fiemap -v", text(&store.join("b"))]);
        let total = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let flags = u64::from_str_radix(words.get(4)?.strip_prefix("0x")?, 16).ok()?;
            (flags & 0x2000 != 0).then(|| words.get(3)?.parse::<u64>().ok())?
        };
        output.lines().filter_map(total).sum::<u64>() * 512
    };
    assert!(bytes >= outcome.bytes_cloned, "{bytes} of {} bytes are shared: {new:?}", outcome.bytes_cloned);
    let alone = fs::metadata(store.join("b")).unwrap().blocks() * 512 - bytes;
    assert!(alone <= outcome.metadata_bytes_written + 65_536, "{alone} bytes of its own");
}

/// A power cut takes manifests, which are not durable: as long as anything of a tree is open it stays the same
/// tree, so that an undo sees what was done after it.
#[test]
fn a_tree_that_loses_its_manifest_is_the_same_tree() {
    let folder = tempfile::tempdir().unwrap();
    chain(folder.path(), Kind::PLAIN, 21);
    let memory = in_memory(&folder.path().join("store"));
    let terms = Terms { retention_ns: 3_600_000_000_000, ..Terms::default() };
    let stores = || open_with(Path::new("/nowhere"), Arc::clone(&memory) as Arc<dyn Backend>);
    // The second makes another member the root.
    for (number, member) in ["b", "base", "a"].into_iter().enumerate() {
        let report = delete_on(&stores(), &[member], ModeChoice::Copy, terms.clone()).unwrap();
        assert!(report.first_failure().is_none(), "{member}: {:?}", report.first_failure());
        let manifests = path(".qchain/manifests");
        for entry in memory.read_dir(&manifests).unwrap() {
            memory.remove_file(&entry.path_in(&manifests).unwrap()).unwrap();
        }
        let trees = memory.read_dir(&path(".qchain/generations")).unwrap();
        let tree = trees[0].path_in(&path(".qchain/generations")).unwrap();
        assert_eq!((trees.len(), memory.read_dir(&tree).unwrap().len()), (1, number + 1), "{member}");
    }
}

/// A tree that lost its root may be several trees with one id: one call changes all of them.
#[test]
fn what_was_one_tree_is_changed_side_by_side() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    init(root, StoreKind::Plain);
    let members =
        [("base", None), ("a", Some("base")), ("b", Some("a")), ("c", Some("base")), ("d", Some("c"))];
    for (name, parent) in members {
        let place = root.join(name);
        match parent {
            None => must("qemu-img", &["create", "-q", "-f", "qcow2", text(&place), "1M"]),
            Some(parent) => {
                must("qemu-img", &["create", "-q", "-f", "qcow2", "-b", parent, "-F", "qcow2", text(&place)])
            }
        };
    }
    for retention_ns in [3_600_000_000_000, 0] {
        let terms = Terms { retention_ns, ..Terms::default() };
        let targets: &[&str] = if retention_ns > 0 { &["base"] } else { &["a", "c"] };
        let report = delete_on(&open(root), targets, ModeChoice::Copy, terms).unwrap();
        assert!(report.first_failure().is_none(), "{targets:?}: {:?}", report.first_failure());
    }
    let trees: Vec<_> = fs::read_dir(root.join(".qchain/generations")).unwrap().collect();
    assert_eq!(trees.len(), 1);
    let claims = fs::read_dir(trees[0].as_ref().unwrap().path()).unwrap().count();
    assert_eq!((claims, root.join("a").exists(), root.join("c").exists()), (3, false, false));
}
