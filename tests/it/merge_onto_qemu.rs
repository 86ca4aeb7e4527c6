//! Merges into the file of the lowest merged member, as QEMU sees them at every step.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use qchain::backend::Backend;
use qchain::backend::faulty::{Faulty, Lasting};
use qchain::backend::posix::PosixStore;
use qchain::chain::delete::Merge;
use qchain::failure::{Code, Failure};
use qchain::qcow2::check::{Limits, check};
use qchain::qcow2::layout::{Layout, Unfit};
use qchain::qcow2::write::{Written, switch};
use qchain::store::merge::MergeInput;
use qchain::store::record::StoreKind;
use tempfile::TempDir;

use crate::support::chains::{Kind, NAMES, Numbers, Spec, assert_true, build, copy, folders};
use crate::support::merging::{CLONE_ALIGNMENT, bytes_of, path};
use crate::support::mounts::{FsKind, LoopMount};
use crate::support::onto::Onto;
use crate::support::qemu::{must, text};
use crate::support::store;

const K64: u64 = 65_536;
const EIO: i32 = 5;

/// A chain of QEMU's in a directory: the newest member, and how many are merged down into the lowest of them.
#[derive(Debug)]
struct World {
    directory: PathBuf,
    truth: PathBuf,
    members: usize,
    merged: usize,
    clones: bool,
}

impl World {
    fn build(parent: &Path, name: &str, specs: &[Spec], merged: usize) -> Self {
        let (directory, truth) = folders(parent, name);
        build(&directory, &truth, specs);
        Self { directory, truth, members: specs.len(), merged, clones: false }
    }

    /// The same, copied.
    fn copied(&self, name: &str) -> Self {
        let directory = self.directory.with_file_name(name);
        if directory.exists() {
            std::fs::remove_dir_all(&directory).unwrap();
        }
        copy(&self.directory, &directory);
        Self { directory, truth: self.truth.clone(), ..*self }
    }

    fn store(&self) -> Arc<dyn Backend> {
        Arc::new(PosixStore::open(&self.directory).unwrap())
    }

    fn open(&self, store: &dyn Backend) -> Onto {
        let names: Vec<String> = NAMES[..self.members].iter().rev().map(|name| (*name).to_owned()).collect();
        Onto::open(store, &names, self.merged, self.clones)
    }

    fn newest(&self) -> &'static str {
        NAMES[self.members - 1]
    }

    fn kept(&self) -> &'static str {
        NAMES[self.members - self.merged]
    }

    /// Both what is merged into and what reads through it are what they were; no leaks either.
    fn assert_old(&self, context: &str) {
        for name in [self.newest(), self.kept()] {
            assert_true(&self.directory.join(name), &self.truth.join(name), context);
        }
    }

    /// What was merged into shows what the newest does, which still reads through it.
    fn assert_new(&self, context: &str) {
        for name in [self.newest(), self.kept()] {
            assert_true(&self.directory.join(name), &self.truth.join(self.newest()), context);
        }
    }

    fn bytes(&self) -> Vec<u8> {
        bytes_of(&*self.store().open(&path(self.kept())).unwrap())
    }

    /// Writes all but the header.
    fn write(&self, context: &str) -> (Onto, Layout, Written) {
        let onto = self.open(&*self.store());
        let layout = onto.plan(None).unwrap();
        let written = onto.write(&layout).unwrap();
        self.assert_old(&format!("{context}: before the switch"));
        let report = check(&onto.image_to_be(&layout), &Limits::default()).unwrap();
        assert_eq!(report.findings, [], "{context}");
        onto.prove(&layout).unwrap();
        (onto, layout, written)
    }

    /// All of it, and holes where the old image was.
    fn merge(&self, context: &str) -> Written {
        let (onto, layout, written) = self.write(context);
        switch(layout.switch().unwrap(), &*onto.target).unwrap();
        self.assert_new(&format!("{context}: switched"));
        let kept = self.directory.join(self.kept());
        for (start, length) in layout.superseded() {
            let (start, length) = (start.0.to_string(), length.to_string());
            let punch = ["--punch-hole", "--offset", &start, "--length", &length, text(&kept)];
            assert!(Command::new("fallocate").args(punch).status().unwrap().success());
        }
        self.assert_new(&format!("{context}: punched"));
        written
    }
}

/// A chain of members of one kind, all of one size.
fn members(kind: Kind, size: u64, count: usize, seed: u64) -> Vec<Spec> {
    let mut numbers = Numbers(seed);
    (0..count).map(|_| kind.member(size, 24, &mut numbers)).collect()
}

#[test]
fn qemu_sees_the_old_images_until_the_switch_and_the_new_one_from_then_on() {
    let plain = Kind::PLAIN;
    let compressed = Kind { compressed: true, ..plain };
    let shapes = [
        ("64 KiB", plain, 40 * K64, 3, 2),
        ("4 KiB", Kind { cluster: 4096, compressed: true, ..plain }, 400 * 4096, 3, 2),
        ("2 MiB", Kind { cluster: 2 << 20, ..plain }, 24 << 20, 3, 2),
        ("512 bytes", Kind { cluster: 512, ..plain }, 1 << 20, 3, 2),
        ("extended", Kind { extended: true, ..plain }, 40 * K64, 3, 2),
        ("extended, compressed", Kind { extended: true, ..compressed }, 40 * K64, 4, 3),
        ("three members", compressed, 60 * K64, 5, 3),
        ("no multiple of a cluster", compressed, 30 * K64 + 5 * 512, 3, 2),
        ("zstd", Kind { zstd: true, ..compressed }, 40 * K64, 3, 2),
        ("nothing below", compressed, 40 * K64, 3, 3),
        ("refcounts of 1 bit", Kind { refcount_bits: 1, ..compressed }, 40 * K64, 3, 2),
        ("refcounts of 64 bits", Kind { refcount_bits: 64, ..plain }, 40 * K64, 2, 2),
    ];
    let parent = TempDir::new().unwrap();
    for (seed, (name, kind, size, count, merged)) in (1..).zip(shapes) {
        let specs = members(kind, size, count, seed);
        World::build(parent.path(), name, &specs, merged).merge(name);
    }
}

#[test]
fn an_empty_tip_and_an_empty_base() {
    let parent = TempDir::new().unwrap();
    let kind = Kind::PLAIN;
    let empty = || Spec { options: kind.options(), size: 40 * K64, commands: vec![] };
    let full = members(kind, 40 * K64, 1, 7).remove(0);
    let shapes = [("tip", [full.clone(), full.clone(), empty()]), ("kept", [full.clone(), empty(), full])];
    for (name, specs) in shapes {
        World::build(parent.path(), name, &specs, 2).merge(name);
    }
}

#[test]
fn qemu_sees_the_old_images_wherever_the_work_is_cut_off() {
    let parent = TempDir::new().unwrap();
    let kinds = [
        Kind { compressed: true, ..Kind::PLAIN },
        Kind { cluster: 4096, extended: false, compressed: true, ..Kind::PLAIN },
    ];
    let mut cuts = 0;
    for (seed, kind) in (1..).zip(kinds) {
        let world =
            World::build(parent.path(), &format!("world{seed}"), &members(kind, 10 * K64, 3, seed), 2);
        let whole = world.copied("whole");
        let (_, layout, _) = whole.write("whole");
        let (reference, base) = (whole.bytes(), layout.kept().map(|(_, base)| base));
        for at in 0.. {
            let cut = world.copied("cut");
            let store = Faulty::new(cut.store());
            let onto = cut.open(&store);
            let layout = onto.plan(None).unwrap();
            store.fail_halfway_at(store.mutations() + at, EIO, Lasting::Dead);
            if onto.write(&layout).is_ok() {
                break;
            }
            cuts += 1;
            cut.assert_old(&format!("cut at {at}"));
            let again = cut.open(&*cut.store());
            again.write(&again.plan(base).unwrap()).unwrap();
            assert!(cut.bytes() == reference, "cut at {at}: other bytes when done again");
        }
    }
    eprintln!("{cuts} cuts");
    assert!(cuts >= 14, "{cuts}");
}

#[test]
fn shared_extents_need_no_data_written() {
    let mount = LoopMount::new(FsKind::Xfs, 400 << 20);
    let aligned = |at: u64, count: u64, byte: u8| format!("write -P {byte} {} {}", at * K64, count * K64);
    let spec = |commands: Vec<String>| Spec { options: Kind::PLAIN.options(), size: 200 * K64, commands };
    let specs = [
        spec(vec![aligned(0, 150, 1)]),
        spec(vec![aligned(10, 50, 2), aligned(100, 20, 3)]),
        spec(vec![aligned(15, 3, 4), aligned(70, 9, 5)]),
        spec(vec![aligned(16, 1, 6), format!("write -z {} {K64}", 101 * K64), aligned(180, 20, 7)]),
    ];
    let world = World { clones: true, ..World::build(&mount.path(), "world", &specs, 3) };
    let capabilities = world.store().probe(&qchain::ids::StorePath::root()).unwrap();
    assert_eq!((capabilities.clone, capabilities.clone_alignment), (true, CLONE_ALIGNMENT));
    let written = world.merge("clones");
    assert_eq!((written.cloned_bytes, written.data_bytes), ((2 + 1 + 9 + 20) * K64, 0));
    assert_eq!(written.metadata_bytes, 4 * K64);
}

/// The plan of a store's own members: fits, is costed, and costs what it says.
#[test]
fn a_merge_of_a_store_knows_what_it_costs_in_place() {
    let parent = TempDir::new().unwrap();
    let kind = Kind { compressed: true, ..Kind::PLAIN };
    let mut specs = members(kind, 40 * K64, 4, 3);
    specs.push(Spec { size: 41 * K64, ..specs[3].clone() });
    let world = World::build(parent.path(), "world", &specs, 3);
    store::init(&world.directory, StoreKind::Plain);
    let stores = store::open(&world.directory);
    let scan = store::scan(&stores);
    let ids: BTreeMap<&str, _> =
        scan.graph.ids().map(|id| (scan.graph.node(id).key.path.as_str(), id)).collect();
    let input = |merged: &[&str], survivor: &str| {
        let merged = merged.iter().map(|name| ids[name]).collect();
        let new_parent = Some(ids["base"]);
        let merge = Merge { survivor: ids[survivor], merged, new_parent, merged_stay: false };
        MergeInput::open(&stores, &scan, &merge).unwrap()
    };
    let larger = input(&["a", "b", "c"], "d");
    assert_eq!(larger.fits_onto(), Err(Unfit::VirtualSize));
    assert_eq!(larger.layout_onto(None).map(drop).unwrap_err().code(), Code::ModeImpossible);
    let input = input(&["a", "b"], "c");
    input.fits_onto().unwrap();
    let layout = input.layout_onto(None).unwrap();
    let (own, onto) = (input.cost(&input.layout().unwrap(), &[]), input.cost(&layout, &[]));
    assert!(onto.data_bytes < own.data_bytes, "{onto:?} {own:?}");
    // Three members above the base, the oldest of them kept.
    let world = World { members: 4, ..world };
    let written = world.merge("store");
    let expected = (onto.clone_bytes, onto.data_bytes, onto.metadata_bytes);
    assert_eq!((written.cloned_bytes, written.data_bytes, written.metadata_bytes), expected);
}

/// Ends a program when the test does.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// QEMU has the chain open and has read nothing yet: it goes on by the old tables, which nothing has overwritten.
#[test]
fn a_reader_that_opened_the_chain_before_reads_on_after_the_switch() {
    let parent = TempDir::new().unwrap();
    let kind = Kind { compressed: true, ..Kind::PLAIN };
    let world = World::build(parent.path(), "world", &members(kind, 40 * K64, 4, 11), 3);
    let socket = parent.path().join("socket");
    let mut server = Command::new("qemu-nbd");
    server.args(["-r", "-t", "-f", "qcow2", "-k", text(&socket)]).arg(world.directory.join(world.newest()));
    let _server = Running(server.stdout(Stdio::null()).spawn().unwrap());
    let begun = Instant::now();
    while !socket.exists() {
        assert!(begun.elapsed() < Duration::from_secs(20), "qemu-nbd does not listen");
        sleep(Duration::from_millis(20));
    }
    let (onto, layout, _) = world.write("open");
    switch(layout.switch().unwrap(), &*onto.target).unwrap();
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    let truth = world.truth.join(world.newest());
    must("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, text(&truth)]);
    world.assert_new("opened anew");
}
