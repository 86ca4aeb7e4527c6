//! Results that were damaged after they were laid out: the proof or the check must notice all that a guest
//! would notice.

use std::sync::Arc;

use proptest::prelude::*;
use qchain::backend::faulty::Faulty;
use qchain::backend::memory::MemoryStore;
use qchain::qcow2::check::{Limits, check};
use qchain::qcow2::write::switch;
use qchain::qcow2::{CompressionType, Image};

use crate::support::builder::{Cell, Format, Spec};
use crate::support::merging::{Chain, Merged, bytes_of, layer_name, seeded, sizes, spec};
use crate::support::onto::Onto;

const K64: u64 = 65_536;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What became of tampered results.
#[derive(Debug, Default)]
struct Tally {
    /// The guest sees it, and it was noticed.
    caught: usize,
    /// No guest sees it.
    harmless: usize,
}

/// Changes bytes, looks, and puts them back.
fn tamper(merged: &Merged, truth: &[u8], at: u64, bytes: &[u8], what: &str, tally: &mut Tally) {
    let mut before = vec![0; bytes.len()];
    merged.file.read_at(at, &mut before).unwrap();
    if before == bytes {
        return;
    }
    merged.file.write_at(at, bytes).unwrap();
    let same = merged.view().is_ok_and(|view| view == truth);
    if same {
        tally.harmless += 1;
    } else {
        let damaged = |image: &Image| check(image, &Limits::default()).unwrap().is_damaged();
        // A check that only the structure fails is not enough: most of these are sound structures.
        let noticed = merged.prove().is_err() || merged.image().is_ok_and(|image| damaged(&image));
        assert!(noticed, "{what} at {at:#x}: the view is another one, and nobody noticed");
        tally.caught += 1;
    }
    merged.file.write_at(at, &before).unwrap();
}

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Other values for the entry of which `(low, high)` are the words: dropped, shifted, flipped.
fn variants(cluster: u64, extended: bool, (low, high): (u64, u64)) -> Vec<(u64, u64, &'static str)> {
    let mut all = vec![(0, 0, "dropped")];
    if low & COMPRESSED != 0 {
        all.extend([(low + 512, high, "shifted by a sector"), (low.wrapping_sub(512), high, "shifted back")]);
        return all;
    }
    if low & OFFSET != 0 {
        all.push((low + cluster, high, "shifted by a cluster"));
        all.push((low - cluster, high, "shifted back by a cluster"));
    }
    if extended {
        let zeros = u64::from(u32::MAX) << 32;
        all.push((low, high.rotate_left(32), "zero and allocated swapped"));
        all.push((0, zeros, "zeroed"));
        for bit in [0, 1, 15, 31] {
            all.push((low, high ^ 1 << bit, "a subcluster allocated or not"));
            all.push((low, high ^ 1 << (bit + 32), "a subcluster zero or not"));
            all.push((low, (high ^ 1 << bit) ^ 1 << (bit + 32), "a subcluster zero for allocated"));
        }
    } else {
        all.push((low ^ ZERO, high, "the zero flag flipped"));
        all.push((ZERO, 0, "zeroed"));
    }
    all
}

/// Damages every L1 and L2 entry of a result in many ways.
fn tamper_all(merged: &Merged, truth: &[u8], tally: &mut Tally) {
    merged.prove().unwrap();
    let image = merged.image().unwrap();
    let header = image.header();
    let bytes = bytes_of(&*merged.file);
    let (cluster, extended) = (header.cluster_bits.bytes(), header.extended_l2);
    let width: u64 = if extended { 16 } else { 8 };
    let mut tables = Vec::new();
    for index in 0..header.l1_entries {
        let at = header.l1_offset.0 + 8 * index;
        let raw = word(&bytes, at);
        let next = word(&bytes, header.l1_offset.0 + 8 * ((index + 1) % header.l1_entries));
        let others = [0, raw + cluster, raw.wrapping_sub(cluster), next, (2 * cluster) | COPIED];
        for other in others {
            tamper(merged, truth, at, &other.to_be_bytes(), "an L1 entry", tally);
        }
        if raw != 0 {
            tables.push(raw & OFFSET);
        }
    }
    let in_disk = header.virtual_size.div_ceil(cluster);
    let entries: Vec<u64> = tables
        .iter()
        .flat_map(|table| (0..(cluster / width).min(in_disk)).map(move |index| table + index * width))
        .collect();
    let words = |at: u64| (word(&bytes, at), if extended { word(&bytes, at + 8) } else { 0 });
    for (index, &at) in entries.iter().enumerate() {
        let put = |(low, high): (u64, u64), at: u64, what: &str, tally: &mut Tally| {
            let both = [low.to_be_bytes(), high.to_be_bytes()].concat();
            tamper(merged, truth, at, &both[..usize::try_from(width).unwrap()], what, tally);
        };
        for (low, high, what) in variants(cluster, extended, words(at)) {
            put((low, high), at, what, tally);
        }
        for other in [index + 1, index + 2, index + 7].into_iter().filter_map(|other| entries.get(other)) {
            put(words(*other), at, "a copy of another entry", tally);
            // Both ends change in a swap.
            merged.file.write_at(*other, &bytes[usize::try_from(at).unwrap()..][..8]).unwrap();
            if extended {
                merged.file.write_at(other + 8, &bytes[usize::try_from(at + 8).unwrap()..][..8]).unwrap();
            }
            put(words(*other), at, "a swap with another entry", tally);
            let (low, high) = words(*other);
            let both = [low.to_be_bytes(), high.to_be_bytes()].concat();
            merged.file.write_at(*other, &both[..usize::try_from(width).unwrap()]).unwrap();
        }
    }
    assert!(bytes_of(&*merged.file) == bytes, "the test did not clean up");
    merged.prove().unwrap();
}

fn both_means(specs: &[Spec], bottom: usize, top: usize, tally: &mut Tally) {
    for clones in [true, false] {
        let chain = Chain::in_memory(clones, specs.to_vec());
        let merged = chain.merge(bottom, top, "result").unwrap();
        tamper_all(&merged, &chain.views[top], tally);
    }
}

#[test]
fn every_damaged_entry_is_noticed() {
    use Cell::{Below, Compressed, Data, Subs, Zero, ZeroKept};
    let cells = |spec: Spec, cells: &[Cell]| {
        let numbered = (0..).zip(cells.iter().cloned());
        numbered.fold(spec, |spec, (cluster, cell)| spec.cell(cluster, cell))
    };
    let mut tally = Tally::default();
    for bits in [12, 14, 16] {
        for (extended, compression) in
            [(false, CompressionType::Zlib), (true, CompressionType::Zlib), (false, CompressionType::Zstd)]
        {
            if extended && bits < 14 {
                continue;
            }
            let format = Format { extended, compression, ..Format::plain(bits) };
            let size = (10 << bits) - 512;
            let full = |seed| (0..10).fold(Spec::new(format, size, seed), |spec, at| spec.cell(at, Data));
            let part = if extended { Subs(0x0f0f_00ff, 0xf000_ff00) } else { Data };
            let upper = cells(
                Spec::new(format, size, 7),
                &[Data, Zero, Below, Compressed, part.clone(), Data, Below, ZeroKept, Compressed, Data],
            );
            let middle = cells(
                Spec::new(format, size - 512, 8),
                &[Data, Data, Data, Data, Below, part, Compressed, Below, Below, Data],
            );
            both_means(&[full(1), middle.clone(), upper.clone()], 1, 2, &mut tally);
            both_means(&[full(1), middle, upper], 0, 2, &mut tally);
        }
    }
    eprintln!("{tally:?}");
    assert!(tally.caught > 1000, "{tally:?}");
}

#[test]
fn damage_to_random_merges_is_noticed() {
    let mut tally = Tally::default();
    let chains = (prop::collection::vec(spec(sizes(24 * 1024)), 1..=4), any::<prop::sample::Index>());
    let total = std::cell::RefCell::new(&mut tally);
    seeded(40)
        .run(&chains, |(specs, at)| {
            let bottom = at.index(specs.len());
            both_means(&specs, bottom, specs.len() - 1, &mut total.borrow_mut());
            Ok(())
        })
        .unwrap();
    eprintln!("{tally:?}");
    assert!(tally.caught > 1000, "{tally:?}");
}

/// A result in the file of its lowest member: entries may point at what was there before, too.
#[test]
fn damage_to_a_file_that_was_kept_is_noticed() {
    use Cell::{Below, Compressed, Data, Subs, Zero, ZeroKept};
    let mut tally = Tally::default();
    for (bits, extended) in [(12, false), (14, true), (16, false)] {
        let format = Format { extended, ..Format::plain(bits) };
        let spec = |seed, cells: &[Cell]| {
            let spec = Spec::new(format, (10 << bits) - 512, seed);
            (0..).zip(cells.iter().cloned()).fold(spec, |spec, (at, cell)| spec.cell(at, cell))
        };
        let part = if extended { Subs(0x0f0f_00ff, 0xf000_ff00) } else { Data };
        let upper = [Data, Zero, Below, Compressed, part.clone(), Below, Below, ZeroKept, Below, Data];
        let middle = [Data, Data, Data, Data, Below, part, Compressed, Below, Data, Data];
        let specs = [spec(1, &vec![Data; 10]), spec(2, &middle), spec(3, &upper)];
        for bottom in [0, 1] {
            let chain = Chain::in_memory(true, specs.to_vec());
            let names: Vec<String> = (0..3).rev().map(layer_name).collect();
            let onto = Onto::open(&*chain.store, &names, 3 - bottom, true);
            let layout = onto.plan(None).unwrap();
            let written = onto.write(&layout).unwrap();
            switch(layout.switch().unwrap(), &*onto.target).unwrap();
            let Onto { upper, lower, target: file, .. } = onto;
            let merged = Merged { layout, written, file, name: "kept".to_owned(), upper, lower };
            tamper_all(&merged, &chain.views[2], &mut tally);
        }
    }
    eprintln!("{tally:?}");
    assert!(tally.caught > 300, "{tally:?}");
}

/// The same where the product writes: a store that changes a table on its way down.
#[test]
fn a_store_that_writes_other_tables_is_noticed() {
    let format = Format::plain(16);
    let full = |seed| (0..8).fold(Spec::new(format, 8 * K64, seed), |spec, at| spec.cell(at, Cell::Data));
    for clones in [true, false] {
        for what in 0..3 {
            let store = Faulty::new(Arc::new(MemoryStore::new().with_clone(clones)));
            let upper = Spec::new(format, 8 * K64, 2).cell(2, Cell::Data).cell(5, Cell::Zero);
            let chain = Chain::build(Arc::new(store.clone()), clones, vec![full(1), upper]);
            let table = chain.plan(0, 1).unwrap().metadata_bytes() - K64;
            store.tamper(move |path, offset, bytes| {
                if path.as_str() != "result" || offset != table {
                    return;
                }
                match what {
                    0 => bytes[..8].fill(0),
                    1 => bytes.copy_within(8..16, 0),
                    _ => bytes[..64].rotate_left(8),
                }
            });
            let merged = chain.merge(0, 1, "result").unwrap();
            assert!(merged.view().unwrap() != chain.views[1]);
            merged.prove().map(drop).unwrap_err();
        }
    }
}
