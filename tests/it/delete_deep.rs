//! Chains that are very deep and disks that are very large.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use qchain::backend::posix::raise_file_limit;
use qchain::ops::delete::ModeChoice;
use qchain::store::record::StoreKind;

use super::support::chains::{Numbers, assert_true};
use super::support::digest::{plain_digest, sparse_digest};
use super::support::forked::{Forked, asked};
use super::support::mounts::{FsKind, LoopMount};
use super::support::qemu::{create, io, must, text};
use super::support::reader::{Cluster, Layers};
use super::support::store::{delete_well, digests, files, init, open};
use super::support::writer::{CLUSTER, Says, write};

const DEPTH: usize = 1000;
/// Guest clusters of the deep chain's disk.
const CLUSTERS: u64 = 96;

fn name(index: usize) -> String {
    format!("m{index:04}")
}

/// A thousand members, each with a few clusters of its own, some zeroes, sizes that shrink and grow again.
/// Gives what the disk holds at each: a byte a cluster.
fn deep_chain(store: &Path) -> Vec<(u64, Vec<u8>)> {
    let mut numbers = Numbers(1000);
    let mut states: Vec<(u64, Vec<u8>)> = Vec::new();
    for index in 0..DEPTH {
        let clusters = match numbers.below(20) {
            0 => CLUSTERS - 1 - numbers.below(CLUSTERS / 3),
            _ => CLUSTERS,
        };
        let mut state = states.last().map_or_else(Vec::new, |(_, state)| state.clone());
        state.resize(usize::try_from(clusters).unwrap(), 0);
        state.resize(usize::try_from(CLUSTERS).unwrap(), 0);
        let mut says = BTreeMap::new();
        for _ in 0..numbers.below(3) {
            let at = numbers.below(clusters);
            let byte = u8::try_from(numbers.below(256)).unwrap();
            let zero = numbers.below(4) == 0;
            says.insert(at, if zero { Says::Zero } else { Says::Byte(byte) });
            state[usize::try_from(at).unwrap()] = if zero { 0 } else { byte };
        }
        let below = index.checked_sub(1).map(name);
        write(&store.join(name(index)), clusters * CLUSTER, below.as_deref(), &says);
        states.push((clusters, state));
    }
    states
}

fn write_state(path: &Path, (clusters, state): &(u64, Vec<u8>)) {
    let mut file = File::create(path).unwrap();
    for byte in &state[..usize::try_from(*clusters).unwrap()] {
        file.write_all(&vec![*byte; usize::try_from(CLUSTER).unwrap()]).unwrap();
    }
}

/// The digest of a member is that of its truth.
fn assert_digest(store: &Path, name: &str, truth: &Path, state: &(u64, Vec<u8>)) {
    write_state(truth, state);
    let expected = plain_digest(&std::fs::read(truth).unwrap());
    assert_eq!(digests(&open(store), &[name]), [(name.to_owned(), expected)]);
}

/// The whole view by the tests' own reader.
fn assert_state(member: &Path, (clusters, state): &(u64, Vec<u8>)) {
    let layers = Layers::open(member);
    assert_eq!(layers.0[0].size, clusters * CLUSTER, "{}", member.display());
    for (at, byte) in (0..*clusters).zip(state) {
        let start = at * CLUSTER;
        for (from, length) in [(start, 1024), (start + CLUSTER - 1024, 1024)] {
            let bytes = layers.read(from, length);
            assert!(bytes.iter().all(|found| found == byte), "{} at {from}", member.display());
        }
    }
}

#[test]
fn a_thousand_members_deep() {
    raise_file_limit();
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    init(&store, StoreKind::Plain);
    let states = deep_chain(&store);
    must("qemu-img", &["check", "-q", "-f", "qcow2", text(&store.join(name(500)))]);
    let truth = folder.path().join("truth");
    for index in [0, 1, 700, DEPTH - 1] {
        assert_state(&store.join(name(index)), &states[index]);
        assert_digest(&store, &name(index), &truth, &states[index]);
    }
    // Every other member of a stretch first: survivors in between are merged into in one call.
    let some: Vec<String> = (300..320).step_by(2).map(name).collect();
    delete_well(&store, &some.iter().map(String::as_str).collect::<Vec<_>>(), ModeChoice::Copy);
    for index in [301, 319, 320, DEPTH - 1] {
        assert_state(&store.join(name(index)), &states[index]);
    }
    let rest: Vec<String> = (1..DEPTH - 1).map(name).filter(|name| !some.contains(name)).collect();
    let report = delete_well(&store, &rest.iter().map(String::as_str).collect::<Vec<_>>(), ModeChoice::Auto);
    assert_eq!(report.outcomes.len(), 1);
    assert_eq!(report.outcomes[0].members.len(), 988);
    for index in [0, DEPTH - 1] {
        let member = store.join(name(index));
        assert_state(&member, &states[index]);
        assert_digest(&store, &name(index), &truth, &states[index]);
        assert_true(&member, &truth, "after 998 members went");
    }
    let left: Vec<_> = files(&store).into_iter().filter(|path| !path.starts_with(".qchain")).collect();
    assert_eq!(left, [Path::new("m0000"), Path::new("m0999")]);
}

const HUGE: u64 = 60 << 40;

/// What 512 bytes at each written place hold, newest last; 0 for zeroed again.
type Places = BTreeMap<u64, u8>;

/// Scattered sectors, at both ends of the disk and of L2 tables too, some of them shared by members.
fn places(cluster: u64, numbers: &mut Numbers) -> Vec<u64> {
    let table = cluster * cluster / 8;
    let mut all = vec![0, 512, cluster, table - 512, table, HUGE - 512, HUGE - cluster, HUGE - table];
    all.extend((0..24).map(|_| numbers.below(HUGE / 512) * 512));
    all
}

/// base <- a <- b of 60 TiB; gives what b shows.
fn huge_chain(store: &Path, cluster: u64) -> Places {
    let mut numbers = Numbers(60 + cluster);
    let places = places(cluster, &mut numbers);
    let mut truth = Places::new();
    for (name, below) in [("base", None), ("a", Some("base")), ("b", Some("a"))] {
        let path = store.join(name);
        let backing = below.map(|below| format!(",backing_file={below},backing_fmt=qcow2"));
        create(&path, &format!("cluster_size={cluster}{}", backing.unwrap_or_default()), HUGE);
        let mut commands = Vec::new();
        for place in &places {
            if numbers.below(2) == 0 {
                continue;
            }
            let byte = u8::try_from(numbers.below(256)).unwrap();
            truth.insert(*place, byte);
            commands.push(match byte {
                0 => format!("write -z {place} 512"),
                _ => format!("write -P {byte} {place} 512"),
            });
        }
        io(&path, &commands.iter().map(String::as_str).collect::<Vec<_>>());
    }
    truth
}

/// Bytes at the written places, and nothing anywhere else, by the tests' own reader.
fn assert_huge(member: &Path, truth: &Places) {
    let layers = Layers::open(member);
    assert_eq!(layers.0[0].size, HUGE);
    for (place, byte) in truth {
        let bytes = layers.read(*place, 512);
        assert!(bytes.iter().all(|found| found == byte), "{} at {place}", member.display());
    }
    // A cluster that was touched holds the truth's sectors, and zeros between them.
    for layer in &layers.0 {
        let data = layer.clusters.iter().filter(|(_, says)| matches!(says, Cluster::Data(_)));
        for (guest, _) in data {
            let written: Vec<_> = truth.range(*guest..guest + layer.cluster).collect();
            assert!(!written.is_empty(), "{}: nobody wrote at {guest}", member.display());
            let mut expected = vec![0; usize::try_from(layer.cluster).unwrap()];
            for (place, byte) in written {
                let from = usize::try_from(place - guest).unwrap();
                expected[from..from + 512].fill(*byte);
            }
            assert!(layers.read(*guest, layer.cluster) == expected, "{}: at {guest}", member.display());
        }
    }
}

/// The most memory that this process ever had, in bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Runs in a process of its own, so that its memory can be told.
#[test]
fn forked_delete_of_a_huge_member() {
    let Some(store) = asked("huge") else { return };
    let started = Instant::now();
    delete_well(Path::new(&store), &["a"], ModeChoice::Auto);
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    assert!(peak_memory() < 256 << 20, "{} bytes", peak_memory());
}

fn delete_a_huge_member(parent: &Path, cluster: u64) {
    let store = parent.join(format!("huge-{cluster}"));
    init(&store, StoreKind::Plain);
    let truth = huge_chain(&store, cluster);
    assert_huge(&store.join("b"), &truth);
    let digest = [("b".to_owned(), sparse_digest(HUGE, &truth))];
    assert_eq!(digests(&open(&store), &["b"]), digest);
    Forked::new("delete_deep::forked_delete_of_a_huge_member", "huge", text(&store)).run();
    assert!(!store.join("a").exists());
    let member = store.join("b");
    assert_huge(&member, &truth);
    assert_eq!(digests(&open(&store), &["b"]), digest);
    must("qemu-img", &["check", "-q", "-f", "qcow2", text(&member)]);
    // QEMU reads the places, and its map has data nowhere else.
    let reads: Vec<String> =
        truth.iter().map(|(place, byte)| format!("read -P {byte} {place} 512")).collect();
    io(&member, &reads.iter().map(String::as_str).collect::<Vec<_>>());
    let map = must("qemu-img", &["map", "--output=json", "-f", "qcow2", text(&member)]);
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let mut end = 0;
    for extent in &map {
        let number = |key: &str| extent[key].as_u64().unwrap();
        assert_eq!(number("start"), end);
        end += number("length");
        let written = truth.range(number("start")..end).next().is_some();
        // Within a cluster that was written QEMU tells the file's own holes apart.
        assert!(written || extent["zero"] == true || extent["data"] == false, "{extent}");
    }
    assert_eq!(end, HUGE);
}

#[test]
fn sixty_tebibytes() {
    let mount = LoopMount::new(FsKind::Xfs, 2 << 30);
    for cluster in [65_536, 2 << 20] {
        delete_a_huge_member(&mount.path(), cluster);
    }
}
