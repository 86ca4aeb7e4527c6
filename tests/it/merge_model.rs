//! Merges of random chains, held against a model that is an array of bytes.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use qchain::backend::faulty::Faulty;
use qchain::backend::memory::MemoryStore;
use qchain::failure::{Code, Failure};
use qchain::qcow2::check::{Limits, check};
use qchain::qcow2::layout::{Backing, ImageOptions, Layout, SourceFacts};
use qchain::qcow2::{CompressionType, Content, Image, ImageError, Run};
use qchain::store::chain::OpenChain;
use qchain::units::{ClusterBits, GuestOffset, HostOffset};

use crate::support::builder::{Cell, Format, Spec, mix};
use crate::support::merging::{Chain, Merged, bytes_of, put, sizes, spec};

const K64: u64 = 65_536;

/// All that must hold of a result.
fn sound(chain: &Chain, (bottom, top): (usize, usize), merged: &Merged) {
    let image = merged.image().unwrap();
    assert_eq!(
        merged.file.stat().unwrap().length,
        merged.layout.file_length(),
        "bytes behind the layout's end"
    );
    assert!(merged.view().unwrap() == chain.views[top], "another view");
    let report = check(&image, &Limits::default()).unwrap();
    assert_eq!((report.findings, report.incomplete), (vec![], false));
    let proof = merged.prove().unwrap();
    assert_eq!(proof.planned_bytes + proof.compared_bytes, chain.specs[top].size);

    let (was, is) = (chain.images[top].header(), image.header());
    assert_eq!(
        (was.cluster_bits, was.refcount_order, was.extended_l2, was.compression, was.virtual_size),
        (is.cluster_bits, is.refcount_order, is.extended_l2, is.compression, is.virtual_size)
    );
    assert!(is.version == was.version || (is.version == 3 && is.version == merged.layout.version()));
    let backing = is.backing.as_ref().map(|backing| (backing.name.clone(), backing.format.clone()));
    let expected = chain.options(bottom, top).backing.map(|backing| (backing.name, Some(backing.format)));
    assert_eq!(backing, expected);

    let (layout, written) = (&merged.layout, merged.written);
    assert_eq!(written.metadata_bytes, layout.metadata_bytes());
    assert_eq!(
        written.cloned_bytes + written.data_bytes,
        layout.moved_bytes() + layout.composed_bytes() + layout.compressed_bytes()
    );
    assert!(chain.clones || written.cloned_bytes == 0);
}

/// Merges, and merges again: both results are the same and sound.
fn merged(chain: &Chain, bottom: usize, top: usize) -> Merged {
    let first = chain.merge(bottom, top, "first").unwrap();
    sound(chain, (bottom, top), &first);
    let second = chain.merge(bottom, top, "second").unwrap();
    assert!(bytes_of(&*first.file) == bytes_of(&*second.file), "the same map gave other bytes");
    first
}

fn both_means(specs: &[Spec], bottom: usize, top: usize) -> [Merged; 2] {
    let results = [true, false].map(|clones| {
        let chain = Chain::in_memory(clones, specs.to_vec());
        let mut view = vec![0; usize::try_from(specs[top].size).unwrap()];
        chain.split(0, top).0.read(GuestOffset(0), &mut view).unwrap();
        assert!(view == chain.views[top], "the sources are not what the model says");
        merged(&chain, bottom, top)
    });
    assert!(bytes_of(&*results[0].file) == bytes_of(&*results[1].file), "clones and copies differ");
    results
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_merge_keeps_the_view(
        specs in prop::collection::vec(spec(sizes(200 * 1024)), 1..=5),
        at in any::<prop::sample::Index>(),
        count in any::<prop::sample::Index>(),
    ) {
        let bottom = at.index(specs.len());
        let top = bottom + count.index(specs.len() - bottom);
        both_means(&specs, bottom, top);
    }

    #[test]
    fn a_disk_may_end_at_any_byte(specs in prop::collection::vec(spec(0u64..70_000), 1..=4)) {
        both_means(&specs, specs.len() / 2, specs.len() - 1);
    }
}

#[test]
fn what_was_past_a_shorter_members_end_stays_zero() {
    for bits in [9, 12, 14, 16] {
        for extended in [false, true] {
            if extended && bits < 14 {
                continue;
            }
            let format = Format { extended, ..Format::plain(bits) };
            let all = |spec: Spec, from: u64, to: u64| {
                (from >> bits..to.div_ceil(1 << bits))
                    .fold(spec, |spec, cluster| spec.cell(cluster, Cell::Data))
            };
            let p = all(Spec::new(format, 2 * K64, 1), 0, 2 * K64);
            let a = all(Spec::new(format, K64 + K64 / 2, 2), K64, K64 + 4096);
            let b = Spec::new(format, 2 * K64, 3);
            for result in both_means(&[p.clone(), a.clone(), b.clone()], 1, 2) {
                let view = result.view().unwrap();
                assert!(view[98_304..].iter().all(|byte| *byte == 0));
                assert!(view[65_536..69_632].iter().all(|byte| view[..65_536].contains(byte)));
            }
            both_means(&[p, a, b], 0, 2);
        }
    }
}

#[test]
fn compressed_clusters_under_one_bit_refcounts() {
    for compression in [CompressionType::Zlib, CompressionType::Zstd] {
        let format = Format { order: 0, compression, ..Format::plain(16) };
        let full =
            |seed: u64| (0..9).fold(Spec::new(format, 9 * K64, seed), |s, at| s.cell(at, Cell::Compressed));
        let specs = [full(1), Spec::new(format, 9 * K64, 2).cell(3, Cell::Compressed).cell(5, Cell::Data)];
        for result in both_means(&specs, 0, 1) {
            assert!(result.layout.compressed_bytes() > 0);
        }
    }
}

#[test]
fn clones_write_no_data_of_aligned_clusters() {
    let format = Format::plain(16);
    let base = (0..8).fold(Spec::new(format, 8 * K64, 1), |spec, at| spec.cell(at, Cell::Data));
    let specs = [base, Spec::new(format, 8 * K64, 2).cell(3, Cell::Data).cell(5, Cell::Zero)];
    let [cloned, copied] = both_means(&specs, 0, 1);
    assert_eq!((cloned.written.cloned_bytes, cloned.written.data_bytes), (7 * K64, 0));
    assert_eq!((copied.written.cloned_bytes, copied.written.data_bytes), (0, 7 * K64));
}

#[test]
fn a_disk_of_60_tib_costs_what_it_holds() {
    for bits in [16, 21] {
        let format = Format::plain(bits);
        let (size, cluster) = (60 << 40, 1 << bits);
        let last = (size - 1) / cluster;
        let base = [0, 1, last / 2, last]
            .into_iter()
            .fold(Spec::new(format, size, 1), |s, at| s.cell(at, Cell::Data));
        let tip = Spec::new(format, size, 2)
            .cell(1, Cell::Data)
            .cell(last - 1, Cell::Zero)
            .cell(7, Cell::Compressed);
        let chain = Chain::in_memory(true, vec![base, tip]);
        let begun = Instant::now();
        let merged = chain.merge(0, 1, "merged").unwrap();
        let proof = merged.prove().unwrap();
        assert_eq!(proof.planned_bytes + proof.compared_bytes, size);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        assert_eq!(check(&merged.image().unwrap(), &Limits::default()).unwrap().findings, []);
        assert_eq!(merged.layout.moved_bytes(), 4 * cluster);
        assert!(merged.layout.file_length() < 64 << 20, "{}", merged.layout.file_length());
        let (old, new) = (chain.split(0, 1).0, merged.chain().unwrap());
        for at in [0, 1, 7, last / 2, last - 1, last] {
            let (mut a, mut b) = (vec![0; 1 << bits], vec![1; 1 << bits]);
            old.read(GuestOffset(at * cluster), &mut a).unwrap();
            new.read(GuestOffset(at * cluster), &mut b).unwrap();
            assert!(a == b && (at == last - 1) == a.iter().all(|byte| *byte == 0));
        }
    }
}

fn options(bits: u32, size: u64) -> ImageOptions {
    ImageOptions {
        version: 3,
        cluster_bits: ClusterBits::new(bits).unwrap(),
        refcount_order: 4,
        extended_l2: false,
        compression: CompressionType::Zlib,
        lazy_refcounts: false,
        virtual_size: size,
        backing: None,
        opaque: false,
        stub: None,
    }
}

fn facts(bits: u32, size: u64, file_length: u64) -> SourceFacts {
    let cluster_bits = ClusterBits::new(bits).unwrap();
    SourceFacts { cluster_bits, compression: CompressionType::Zlib, virtual_size: size, file_length }
}

fn data(start: u64, length: u64, host: u64) -> Run {
    Run { start: GuestOffset(start), length, content: Content::Data { layer: 0, host: HostOffset(host) } }
}

fn planned(
    options: &ImageOptions,
    facts: SourceFacts,
    runs: impl IntoIterator<Item = Run>,
) -> Result<Layout, ImageError> {
    Layout::plan(options, &[facts], runs.into_iter().map(Ok))
}

fn refused(options: &ImageOptions, facts: SourceFacts, runs: impl IntoIterator<Item = Run>) -> Code {
    planned(options, facts, runs).map(drop).unwrap_err().code()
}

#[test]
fn a_host_cluster_of_two_guests_is_refused() {
    let runs = [data(0, K64, 5 * K64), data(K64, K64, 5 * K64)];
    assert_eq!(refused(&options(16, 2 * K64), facts(16, 2 * K64, 10 * K64), runs), Code::SharedCluster);
}

#[test]
fn data_behind_the_end_of_its_file_is_refused() {
    let plan = |host, file_length| {
        planned(&options(16, K64), facts(16, K64, file_length), [data(0, K64, host)])
            .map(|layout| layout.moved_bytes())
            .map_err(|e| e.code())
    };
    assert_eq!(plan(5 * K64, 6 * K64).unwrap(), K64);
    // The last cluster of a file may be cut.
    assert_eq!(plan(5 * K64, 5 * K64 + 1).unwrap(), 1);
    for host in [5 * K64, 6 * K64, 7 * K64, 1 << 55] {
        assert_eq!(plan(host, 5 * K64).unwrap_err(), Code::Truncated, "{host}");
    }
    // So is what would only be composed.
    for target in [12, 16] {
        let runs = [data(0, 512, 9 * K64), Run { content: Content::Below, ..data(512, K64 - 512, 0) }];
        let lost = refused(&options(target, K64), facts(16, K64, 5 * K64), runs);
        assert_eq!(lost, Code::Truncated);
    }
}

#[test]
fn a_backing_name_must_fit_beside_the_header() {
    let named = |bits, name: usize| {
        let backing = Backing { name: vec![b'a'; name], format: "qcow2".to_owned(), virtual_size: 0 };
        let options = ImageOptions { backing: Some(backing), ..options(bits, 0) };
        planned(&options, facts(bits, 0, 0), []).map(drop).map_err(|error| error.code())
    };
    assert_eq!(named(9, 1000), Err(Code::BadHeader));
    assert_eq!(named(9, 377), Err(Code::BadHeader));
    assert_eq!(named(9, 376), Ok(()));
    assert_eq!(named(12, 1023), Ok(()));
    assert_eq!(named(12, 1024), Err(Code::BadHeader));
    assert_eq!(named(12, 0), Err(Code::BadHeader));
}

#[test]
fn options_that_no_header_can_say_are_refused() {
    let base = options(16, 0);
    for wrong in [
        ImageOptions { version: 1, ..base.clone() },
        ImageOptions { version: 4, ..base.clone() },
        ImageOptions { refcount_order: 7, ..base.clone() },
        ImageOptions { version: 2, refcount_order: 3, ..base.clone() },
        ImageOptions { version: 2, extended_l2: true, ..base.clone() },
        ImageOptions { version: 2, compression: CompressionType::Zstd, ..base.clone() },
        ImageOptions { extended_l2: true, ..options(13, 0) },
    ] {
        assert_eq!(refused(&wrong, facts(16, 0, 0), []), Code::BadHeader, "{wrong:?}");
    }
    let zero = Run { content: Content::Zero, ..data(0, 1 << 40, 0) };
    assert_eq!(refused(&options(9, 1 << 40), facts(9, 0, 0), [zero]), Code::HugeTable);
}

#[test]
fn a_map_must_be_whole_and_in_order() {
    let zero = |start, length| Run { content: Content::Zero, ..data(start, length, 0) };
    for runs in [
        vec![],
        vec![zero(0, K64 - 1)],
        vec![zero(512, K64)],
        vec![zero(0, 512), zero(1024, K64 - 1024)],
        vec![zero(0, 0), zero(0, K64)],
    ] {
        assert_eq!(refused(&options(16, K64), facts(16, K64, K64), runs), Code::BadEntry);
    }
    let foreign = Run { content: Content::Data { layer: 1, host: HostOffset(K64) }, ..data(0, K64, 0) };
    assert_eq!(refused(&options(16, K64), facts(16, K64, 2 * K64), [foreign]), Code::BadEntry);
}

#[test]
fn another_map_at_the_second_reading_is_noticed() {
    let facts = facts(16, 4 * K64, 10 * K64);
    let runs =
        [data(0, 2 * K64, 4 * K64), data(2 * K64, 512, 8 * K64), data(2 * K64 + 512, K64 - 512, 9 * K64)];
    let end = Run { content: Content::Zero, ..data(3 * K64, K64, 0) };
    let all: Vec<Run> = runs.into_iter().chain([end]).collect();
    let layout = planned(&options(16, 4 * K64), facts, all.clone()).unwrap();
    let emit = |runs: Vec<Run>| layout.emit(runs.into_iter().map(Ok)).find_map(Result::err).map(|e| e.code());
    assert_eq!(emit(all.clone()), None);
    let zero = Run { content: Content::Zero, ..data(0, 4 * K64, 0) };
    assert_eq!(emit(vec![zero]), Some(Code::ChangedMeanwhile));
    let more = [data(0, 512, 8 * K64), data(512, 4 * K64 - 512, 4 * K64)].to_vec();
    assert_eq!(emit(more), Some(Code::ChangedMeanwhile));
    assert_eq!(emit(vec![data(0, K64, 7 * K64)]), Some(Code::ChangedMeanwhile));
}

#[test]
fn many_scattered_clusters_are_planned_quickly() {
    let count = 32_768;
    let runs = || (0..count).map(|at| data(at * K64, K64, (1 + mix(0, at) % 100_000 * 50_000 + at) * K64));
    let facts = facts(16, count * K64, 1 << 50);
    let begun = Instant::now();
    let layout = planned(&options(16, count * K64), facts, runs()).unwrap();
    let took = begun.elapsed();
    assert_eq!(layout.moved_bytes(), count * K64);
    eprintln!("planned {count} clusters in {took:?}");
    // Unoptimised, beside other tests; the release build needs some 10 ms.
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[test]
fn long_runs_are_planned_and_emitted_quickly() {
    let size = 1 << 40;
    let begun = Instant::now();
    let layout = planned(&options(16, size), facts(16, size, 2 << 40), [data(0, size, K64)]).unwrap();
    assert_eq!(layout.moves().count(), 1);
    assert_eq!(layout.emit([Ok(data(0, size, K64))].into_iter()).count(), 2048 + 513 + 3);
    eprintln!("planned and emitted 1 TiB in {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[test]
fn tables_below_long_runs_are_read_once() {
    // Above, 60 of 64 clusters hide what is below; below, no two clusters are alike.
    let clusters = 4096;
    let format = Format::plain(12);
    let cells = |seed, cell: fn(u64) -> Cell| {
        let spec = Spec::new(format, clusters << 12, seed);
        (0..clusters).fold(spec, |spec, at| spec.cell(at, cell(at)))
    };
    let base = cells(1, |at| if at % 2 == 0 { Cell::Zero } else { Cell::Data });
    let tip = cells(2, |at| if at % 64 < 60 { Cell::Data } else { Cell::Below });
    let store = Faulty::new(Arc::new(MemoryStore::new()));
    let chain = Chain::build(Arc::new(store.clone()), true, vec![base, tip]);
    let before = store.calls();
    assert_eq!(chain.split(0, 1).0.map().count(), 64 * 5);
    // Of each image: the L1 table, and its eight L2 tables.
    assert_eq!(store.calls() - before, 2 * 9);
}

#[test]
fn a_large_compressed_cluster_is_decompressed_for_many_small_ones_at_once() {
    let base = Spec::new(Format::plain(21), 2 << 20, 1).cell(0, Cell::Compressed);
    let tip = Spec::new(Format::plain(9), 2 << 20, 2);
    let store = Faulty::new(Arc::new(MemoryStore::new()));
    let chain = Chain::build(Arc::new(store.clone()), true, vec![base, tip]);
    let merged = chain.merge(0, 1, "result").unwrap();
    assert!(merged.view().unwrap() == chain.views[1]);
    let trace = store.trace();
    let count =
        |name, path| trace.iter().filter(|call| call.name == name && call.path.as_str() == path).count();
    // The cluster is wanted 4,096 times, and decompressed once for each 512 KiB of them.
    assert!(count("read_at", "layer0") < 32, "{}", count("read_at", "layer0"));
    let tables = usize::try_from(merged.layout.metadata_bytes() / 512).unwrap();
    assert!(count("write_at", "result") < tables + 32, "{}", count("write_at", "result"));
}

#[test]
fn what_can_move_whole_is_not_composed_and_what_a_disks_end_cuts_is() {
    let format = Format { extended: true, ..Format::plain(16) };
    let part = Cell::Subs(0x0000_00ff, 0xff00_0000);
    let amounts = |specs: Vec<Spec>| {
        let [merged, _] = both_means(&specs, specs.len() - 1, specs.len() - 1);
        (merged.layout.moved_bytes(), merged.layout.composed_bytes())
    };
    let below = Spec::new(format, 4 * K64, 1).cell(0, Cell::Data).cell(2, Cell::Data);
    let whole = Spec::new(format, 2 * K64, 2).cell(0, part.clone()).cell(1, Cell::Data);
    assert_eq!(amounts(vec![below.clone(), whole]), (2 * K64, 0));
    // It ends between two subclusters: what is behind may be old, and stays behind.
    let cut = Spec::new(format, K64 + K64 / 2, 2).cell(0, part).cell(1, Cell::Data);
    assert_eq!(amounts(vec![below.clone(), cut]), (K64, K64));
    // Zeros and nothing need no bytes, even in a cluster that the end cuts.
    for format in [format, Format::plain(16)] {
        let zero = Spec::new(format, 2 * K64 + 512, 2).cell(0, Cell::Zero).cell(2, Cell::Zero);
        assert_eq!(amounts(vec![below.clone(), zero]), (0, 0));
        let none = Spec::new(format, 2 * K64 + 512, 2);
        assert_eq!(amounts(vec![below.clone(), none]), (0, 0));
    }
}

#[test]
fn the_header_is_written_last() {
    for format in [Format::plain(9), Format::plain(16)] {
        let specs = [1, 2].map(|seed| {
            let spec = Spec::new(format, 40 * format.cluster() - 512, seed).cell(39, Cell::Data);
            spec.cell(3, Cell::Compressed).cell(5 + seed, Cell::Data)
        });
        let store = Faulty::new(Arc::new(MemoryStore::new()));
        let chain = Chain::build(Arc::new(store.clone()), true, specs.to_vec());
        let offsets = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&offsets);
        store.tamper(move |_, offset, _| seen.lock().unwrap().push(offset));
        chain.merge(0, 1, "result").unwrap();
        let offsets = offsets.lock().unwrap();
        assert_eq!(offsets.iter().position(|offset| *offset == 0), Some(offsets.len() - 1));
    }
}

#[test]
fn a_merge_can_be_stopped() {
    let spec = |seed| Spec::new(Format::plain(16), 4 * K64, seed).cell(seed, Cell::Data);
    let chain = Chain::in_memory(true, vec![spec(1), spec(2)]);
    chain.cancel.request();
    assert_eq!(chain.merge(0, 1, "result").map(drop).unwrap_err().code(), Code::Cancelled);
}

#[test]
fn an_empty_disk() {
    for specs in [
        vec![Spec::new(Format::plain(16), 0, 1)],
        vec![
            Spec::new(Format::plain(9), 4096, 1).cell(0, Cell::Data),
            Spec::new(Format::plain(16), 0, 1),
            Spec::new(Format::plain(12), 8192, 1),
        ],
    ] {
        both_means(&specs, 0, 0);
        both_means(&specs, specs.len() / 2, specs.len() - 1);
    }
    let store = MemoryStore::new();
    let image = Image::open(put(&store, "a", &Spec::new(Format::plain(16), 0, 1).build()), "a").unwrap();
    assert_eq!(OpenChain::of(vec![image]).map().count(), 0);
}
