//! What safety costs: syncs of one deletion, and memory and time of a very long one.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use qchain::backend::faulty::Faulty;
use qchain::backend::posix::PosixStore;
use qchain::backend::posix::raise_file_limit;
use qchain::ops::delete::ModeChoice;
use qchain::store::record::StoreKind;

use super::support::chains::{Kind, Numbers, Spec, build, folders};
use super::support::forked::{Forked, asked};
use super::support::mounts::{FsKind, LoopMount};
use super::support::qemu::{must, text};
use super::support::store::{adopt_well, delete, delete_well, init, left, open, open_with};
use super::support::writer::{CLUSTER, Says, write};

/// The most syncs that the deletion of one member with one child may take, with all of the safety on.
const MOST_SYNCS: usize = 12;
/// How many more it takes if the members are adopted: the survivor's leaf table and manifest, and their names.
const MANIFEST_SYNCS: usize = 4;
/// How many more than that in place: the manifest gets the file's mark after the switch, and again after space was given back.
const MARK_SYNCS: usize = 5;

fn checkpoint(name: &str, parent: Option<&str>) -> String {
    let parent = parent.map(|name| format!("\n  <parent>\n    <name>{name}</name>\n  </parent>"));
    format!("<domaincheckpoint>\n  <name>{name}</name>{}\n</domaincheckpoint>\n", parent.unwrap_or_default())
}

/// The syncs of files and directories of a delete, counted by the store.
fn syncs(root: &Path, member: &str, mode: ModeChoice) -> Vec<String> {
    let faulty = Faulty::new(Arc::new(PosixStore::open(root).unwrap()));
    let report = delete(&open_with(root, Arc::new(faulty.clone())), &[member], mode).unwrap();
    assert!(report.first_failure().is_none(), "{:?}", report.first_failure());
    let syncs = faulty.trace().into_iter().filter(|call| call.name.starts_with("sync"));
    syncs.map(|call| format!("{} {}", call.name, call.path)).collect()
}

#[test]
fn one_survivor_costs_few_syncs() {
    let mount = LoopMount::new(FsKind::Xfs, 512 << 20);
    let known = |mode| [(mode, false), (mode, true)];
    for (mode, adopted) in
        [ModeChoice::Clone, ModeChoice::Copy, ModeChoice::InPlace].into_iter().flat_map(known)
    {
        let root = mount.path().join(format!("{mode:?}-{adopted}"));
        let volume = root.join("snapshots/2/7");
        let (made, truth) = folders(&mount.path(), &format!("{mode:?}-{adopted}-made"));
        let specs: Vec<Spec> = (0..6).map(|_| Kind::PLAIN.member(1 << 20, 6, &mut Numbers(3))).collect();
        build(&made, &truth, &specs);
        fs::create_dir_all(&volume).unwrap();
        let checkpoints = root.join("checkpoints/2/7");
        fs::create_dir_all(&checkpoints).unwrap();
        let mut below: Option<String> = None;
        for name in ["base", "a", "b", "c"] {
            fs::rename(made.join(name), volume.join(name)).unwrap();
            fs::write(checkpoints.join(name), checkpoint(name, below.as_deref())).unwrap();
            below = Some(name.to_owned());
        }
        init(&root, StoreKind::Cloudstack);
        if adopted {
            adopt_well(&root);
        }
        let most = match (adopted, mode) {
            (false, _) => MOST_SYNCS,
            (true, ModeChoice::InPlace) => MOST_SYNCS + MANIFEST_SYNCS + MARK_SYNCS,
            (true, _) => MOST_SYNCS + MANIFEST_SYNCS,
        };
        // The first change of a tree, and a later one.
        for member in ["a", "base"] {
            let syncs = syncs(&root, member, mode);
            assert!(syncs.len() <= most, "{mode:?} {member}, {adopted}: {syncs:#?}");
            assert!(syncs.len() >= 8, "they are counted: {syncs:#?}");
            println!("{mode:?} {member}, adopted: {adopted}: {}", syncs.len());
        }
        let parent = fs::read_to_string(checkpoints.join("b")).unwrap();
        assert_eq!(parent, checkpoint("b", None));
        assert_eq!(
            left(&root),
            ["checkpoints/2/7/b", "checkpoints/2/7/c", "snapshots/2/7/b", "snapshots/2/7/c"]
        );
    }
}

const DEPTH: usize = 1000;
/// Guest clusters of the deep chain, of 64 KiB: 64 MiB.
const CLUSTERS: u64 = 1024;

/// A thousand members that write 64 MiB between them, each cluster once, in an order of no kind.
fn long_chain(store: &Path) {
    let mut order: Vec<u64> = (0..CLUSTERS).collect();
    let mut numbers = Numbers(64);
    for index in (1..order.len()).rev() {
        let other = usize::try_from(numbers.below(index as u64 + 1)).unwrap();
        order.swap(index, other);
    }
    for index in 0..DEPTH {
        let own = order.iter().skip(index).step_by(DEPTH);
        let says: BTreeMap<u64, Says> =
            own.map(|at| (*at, Says::Byte(u8::try_from(at % 255 + 1).unwrap()))).collect();
        let below = index.checked_sub(1).map(|below| format!("m{below:04}"));
        write(&store.join(format!("m{index:04}")), CLUSTERS * CLUSTER, below.as_deref(), &says);
    }
}

/// The part that runs in a process of its own, so that its memory can be told.
#[test]
fn forked_delete_of_998() {
    let Some(store) = asked("long") else { return };
    raise_file_limit();
    let names: Vec<String> = (1..DEPTH - 1).map(|index| format!("m{index:04}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let begun = Instant::now();
    let report = delete_well(Path::new(&store), &names, ModeChoice::Copy);
    let (took, written) = (begun.elapsed(), report.outcomes[0].bytes_written);
    // What the base has it keeps; all else is moved once.
    assert!(written <= (CLUSTERS - 1) * CLUSTER, "{written}");
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kibibytes: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    println!("998 of 1,000 members: {took:?}, {kibibytes} KiB, {written} bytes written");
    assert!(kibibytes < 300 << 10, "{kibibytes} KiB");
    assert!(took < Duration::from_secs(30), "{took:?}");
}

#[test]
fn nearly_a_thousand_members_go_in_one_pass() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    fs::create_dir(&store).unwrap();
    init(&store, StoreKind::Plain);
    raise_file_limit();
    long_chain(&store);
    Forked::new("change_cost::forked_delete_of_998", "long", text(&store)).run();
    assert_eq!(left(&store), ["m0000", "m0999"]);
    must("qemu-img", &["check", "-q", "-f", "qcow2", text(&store.join("m0999"))]);
    let truth = folder.path().join("truth");
    let bytes: Vec<u8> =
        (0..CLUSTERS).flat_map(|at| vec![u8::try_from(at % 255 + 1).unwrap(); 65_536]).collect();
    fs::write(&truth, bytes).unwrap();
    must("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&store.join("m0999")), text(&truth)]);
    assert_eq!(open(&store).len(), 1);
}
