//! Random sequences of what happens to chains (writes, zeroes, discards, sizes, snapshots, branches, deletes),
//! held against arrays of bytes. QEMU writes, qchain deletes; the model says what each member shows.
//!
//! A failure prints its seed; `QCHAIN_SEED` runs that one alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use qchain::ops::delete::ModeChoice;
use qchain::store::chain::OpenChain;
use qchain::store::names::resolve_one;
use qchain::store::record::StoreKind;
use qchain::units::GuestOffset;

use super::support::chains::{Kind, Numbers, assert_true};
use super::support::mounts::{FsKind, LoopMount};
use super::support::qemu::{io, must, text};
use super::support::store::{backing, delete_well, init, left, open, scan};

/// The largest disk in bytes.
const MOST: u64 = 1 << 20;
/// Members at once, at most.
const MEMBERS: usize = 9;
/// Deletes between two looks of QEMU at everything.
const QEMU_EVERY: u32 = 3;

/// One member as it should be.
struct Member {
    parent: Option<String>,
    kind: Kind,
    bytes: Vec<u8>,
    /// Commands for qemu-io that the file has not seen yet.
    pending: Vec<String>,
    /// Clusters may be compressed only while nothing else was written.
    fresh: bool,
}

struct World {
    store: PathBuf,
    truth: PathBuf,
    numbers: Numbers,
    members: BTreeMap<String, Member>,
    made: u32,
    deletes: u32,
    mode: ModeChoice,
    log: Vec<String>,
}

fn kinds() -> Vec<Kind> {
    let plain = Kind { cluster: 65_536, ..Kind::PLAIN };
    vec![
        plain,
        Kind { cluster: 4096, compressed: true, ..plain },
        Kind { cluster: 512, ..plain },
        Kind { cluster: 16_384, extended: true, ..plain },
        Kind { extended: true, compressed: true, zstd: true, ..plain },
        Kind { cluster: 2 << 20, ..plain },
        Kind { compressed: true, refcount_bits: 1, ..plain },
        Kind { cluster: 4096, old: true, ..plain },
    ]
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

impl World {
    fn new(parent: &Path, seed: u64, mode: ModeChoice) -> Self {
        let (store, truth) = (parent.join(format!("s{seed}")), parent.join(format!("t{seed}")));
        fs::create_dir_all(&truth).unwrap();
        init(&store, StoreKind::Plain);
        let numbers = Numbers(seed);
        Self { store, truth, numbers, members: BTreeMap::new(), made: 0, deletes: 0, mode, log: Vec::new() }
    }

    fn pick(&mut self, from: &[String]) -> String {
        from[index(self.numbers.below(from.len() as u64))].clone()
    }

    fn names(&self) -> Vec<String> {
        self.members.keys().cloned().collect()
    }

    /// Members that nobody reads through, so that they may be written.
    fn tips(&self) -> Vec<String> {
        let read = |name: &String| self.members.values().any(|member| member.parent.as_ref() == Some(name));
        self.names().into_iter().filter(|name| !read(name)).collect()
    }

    /// A new member over `parent`, or a new base.
    fn create(&mut self, parent: Option<String>) {
        let kinds = kinds();
        let kind = kinds[index(self.numbers.below(kinds.len() as u64))];
        let below = parent.as_ref().map(|name| self.members[name].bytes.clone());
        let size = match (self.numbers.below(6), &below) {
            (0..3, Some(below)) => below.len() as u64,
            (3, _) => [0, 512, 65_536, 66_048][index(self.numbers.below(4))],
            _ => 512 * (1 + self.numbers.below(MOST / 512)),
        };
        self.made += 1;
        let name = format!("m{:03}", self.made);
        let path = self.store.join(&name);
        let (options, size_text) = (kind.options(), size.to_string());
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if let Some(parent) = &parent {
            self.flush(parent);
            arguments.extend(["-b", parent, "-F", "qcow2"]);
        }
        arguments.extend([text(&path), &size_text]);
        must("qemu-img", &arguments);
        self.log.push(format!("{name} = create {options} {size} over {parent:?}"));
        let mut bytes = below.unwrap_or_default();
        bytes.resize(index(size), 0);
        self.members.insert(name, Member { parent, kind, bytes, pending: Vec::new(), fresh: true });
    }

    /// One write, zero or discard of a tip.
    fn change(&mut self) {
        let tips = self.tips();
        let name = self.pick(&tips);
        let Some(member) = self.members.get_mut(&name) else { return };
        let size = member.bytes.len() as u64;
        if size == 0 {
            return;
        }
        let numbers = &mut self.numbers;
        let cluster = member.kind.cluster;
        let start = 512 * numbers.below(size / 512);
        let unit = [512, 4096, 65_536, cluster, 3 * cluster][index(numbers.below(5))];
        let length = unit.min(size - start);
        let byte = u8::try_from(1 + numbers.below(255)).unwrap();
        let (command, start, length, byte) = match numbers.below(8) {
            0 if !member.kind.old => (format!("write -z {start} {length}"), start, length, 0),
            1 if !member.kind.old => (format!("write -z -u {start} {length}"), start, length, 0),
            2 if !member.kind.old => {
                // Whole clusters, or up to the disk's end: QEMU passes over the rest.
                let start = start / cluster * cluster;
                let length = (length.div_ceil(cluster) * cluster).min(size - start);
                (format!("discard {start} {length}"), start, length, 0)
            }
            3 | 4 if member.kind.compressed && member.fresh && size >= cluster => {
                let start = cluster * numbers.below(size / cluster);
                let already = format!(" {start} {cluster}");
                if member.pending.iter().any(|command| command.ends_with(&already)) {
                    return;
                }
                let command = format!("write -c -P {byte} {start} {cluster}");
                (command, start, cluster, byte)
            }
            _ => (format!("write -P {byte} {start} {length}"), start, length, byte),
        };
        member.fresh &= command.starts_with("write -c");
        member.bytes[index(start)..index(start + length)].fill(byte);
        self.log.push(format!("{name}: {command}"));
        member.pending.push(command);
    }

    /// Lets QEMU do what the model did.
    fn flush(&mut self, name: &str) {
        let Some(member) = self.members.get_mut(name) else { return };
        let commands = std::mem::take(&mut member.pending);
        if !commands.is_empty() {
            member.fresh = false;
            io(&self.store.join(name), &commands.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }

    fn delete(&mut self) {
        for name in self.names() {
            self.flush(&name);
        }
        let mut names = self.names();
        let mut gone = Vec::new();
        for _ in 0..=self.numbers.below(4) {
            if names.is_empty() {
                break;
            }
            let at = index(self.numbers.below(names.len() as u64));
            gone.push(names.remove(at));
        }
        self.log.push(format!("delete {gone:?}"));
        delete_well(&self.store, &gone.iter().map(String::as_str).collect::<Vec<_>>(), self.mode);
        let parents: BTreeMap<String, Option<String>> =
            self.members.iter().map(|(name, member)| (name.clone(), member.parent.clone())).collect();
        self.members.retain(|name, _| !gone.contains(name));
        for member in self.members.values_mut() {
            // It may have got clusters from a merge.
            member.fresh = false;
            while let Some(parent) = member.parent.clone().filter(|parent| gone.contains(parent)) {
                member.parent.clone_from(&parents[&parent]);
            }
        }
        self.deletes += 1;
        self.look();
    }

    /// Every member shows what the model says; nothing else lies in the store.
    fn look(&self) {
        let stores = open(&self.store);
        let scan = scan(&stores);
        for (name, member) in &self.members {
            let id = resolve_one(&stores, &scan, name).unwrap();
            let chain = OpenChain::open(&stores, &scan.graph, id).unwrap();
            assert_eq!(chain.virtual_size(), member.bytes.len() as u64, "{name}");
            let mut bytes = vec![1; member.bytes.len()];
            chain.read(GuestOffset(0), &mut bytes).unwrap();
            let differs = bytes.iter().zip(&member.bytes).position(|(is, wanted)| is != wanted);
            assert_eq!(differs, None, "{name}");
            let parent = scan.graph.parent(id).map(|id| scan.graph.node(id).key.path.to_string());
            assert_eq!(parent, member.parent, "{name}");
        }
        let mut wanted = self.names();
        wanted.sort();
        assert_eq!(left(&self.store), wanted);
        if self.deletes.is_multiple_of(QEMU_EVERY) {
            self.ask_qemu();
        }
    }

    fn ask_qemu(&self) {
        for (name, member) in &self.members {
            let truth = self.truth.join(name);
            fs::write(&truth, &member.bytes).unwrap();
            assert_true(&self.store.join(name), &truth, "QEMU");
            let format = member.parent.as_ref().map(|_| "qcow2".to_owned());
            assert_eq!(backing(&self.store.join(name)), (member.parent.clone(), format));
        }
    }

    fn step(&mut self) {
        let roomy = self.members.len() < MEMBERS;
        match self.numbers.below(20) {
            _ if self.members.is_empty() => self.create(None),
            0..11 => self.change(),
            11..14 if roomy => {
                let tips = self.tips();
                let tip = self.pick(&tips);
                self.create(Some(tip));
            }
            14..16 if roomy => {
                let names = self.names();
                let parent = self.pick(&names);
                self.create(Some(parent));
            }
            16 if roomy => self.create(None),
            _ if self.members.len() > 2 => self.delete(),
            _ => self.change(),
        }
    }
}

/// Says which seed failed, and what had happened.
struct Telling<'a>(u64, &'a std::cell::RefCell<World>);

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.1.try_borrow().map(|world| world.log.join("\n")).unwrap_or_default();
            eprintln!("QCHAIN_SEED={}\n{log}", self.0);
        }
    }
}

fn sequence(parent: &Path, seed: u64, mode: ModeChoice, steps: u32) {
    let world = std::cell::RefCell::new(World::new(parent, seed, mode));
    let telling = Telling(seed, &world);
    for _ in 0..steps {
        // A panic in here ends the borrow before `telling` looks.
        world.borrow_mut().step();
    }
    let mut last = world.borrow_mut();
    for name in last.names() {
        last.flush(&name);
    }
    last.look();
    last.ask_qemu();
    let folders = [last.store.clone(), last.truth.clone()];
    drop(last);
    drop(telling);
    for folder in folders {
        fs::remove_dir_all(folder).unwrap();
    }
}

fn sequences(parent: &Path, first: u64, mode: ModeChoice) {
    if let Some(seed) = std::env::var("QCHAIN_SEED").ok().and_then(|seed| seed.parse().ok()) {
        return sequence(parent, seed, mode, 200);
    }
    let count = if std::env::var_os("QCHAIN_FULL").is_some() { 100 } else { 5 };
    for seed in first..first + count {
        sequence(parent, seed, mode, 200);
    }
}

#[test]
fn random_sequences_by_copy() {
    let folder = tempfile::tempdir().unwrap();
    sequences(folder.path(), 1, ModeChoice::Copy);
}

#[test]
fn random_sequences_by_clone_on_xfs() {
    let mount = LoopMount::new(FsKind::Xfs, 2 << 30);
    sequences(&mount.path(), 1001, ModeChoice::Clone);
}
