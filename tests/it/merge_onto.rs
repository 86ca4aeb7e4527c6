//! Merges into the file of the lowest merged member: the view of all members at every moment, and the result.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use qchain::backend::faulty::{Faulty, Lasting};
use qchain::backend::memory::MemoryStore;
use qchain::backend::{Backend, StoreFile};
use qchain::failure::{Code, Failure};
use qchain::ids::StorePath;
use qchain::qcow2::check::{Limits, check};
use qchain::qcow2::format as f;
use qchain::qcow2::header::BitmapsExtension;
use qchain::qcow2::layout::{
    Backing, Emit, ImageOptions, Kept, Layout, Origin, SourceFacts, Switch, Switched, TableKind, Unfit,
    in_place_possible,
};
use qchain::qcow2::write::{switch, switch_state};
use qchain::qcow2::{CompressionType, Content, Header, Image, Run};
use qchain::units::{GuestOffset, HostOffset};

use crate::support::builder::{Cell, Format, Spec};
use crate::support::merging::{
    Chain, bytes_of, format, layer_name, path, put, seeded, shuffle, sizes, spec, spec_of,
};
use crate::support::onto::{Onto, open_chain, view};

const K64: u64 = 65_536;
const EIO: i32 = 5;

/// A chain to merge: any images below, and members above that are alike.
#[derive(Clone, Debug)]
struct Case {
    specs: Vec<Spec>,
    /// How many lie below.
    bottom: usize,
    clones: bool,
    /// Bytes that the kept file is shorter than whole clusters.
    cut: u64,
}

impl Case {
    fn new(specs: Vec<Spec>, bottom: usize) -> Self {
        Self { specs, bottom, clones: true, cut: 0 }
    }

    fn store(&self) -> Arc<MemoryStore> {
        Arc::new(MemoryStore::new().with_clone(self.clones))
    }

    /// The chain in a store, all of it durable.
    fn build(&self, store: &Arc<MemoryStore>) -> Chain {
        let chain = Chain::build(store.clone(), self.clones, self.specs.clone());
        let kept = chain.images[self.bottom].file();
        kept.set_length(kept.stat().unwrap().length - self.cut).unwrap();
        chain.images.iter().for_each(|image| image.file().sync().unwrap());
        store.sync_dir(&StorePath::root()).unwrap();
        chain
    }

    /// The members' names, newest first.
    fn names(&self) -> Vec<String> {
        (0..self.specs.len()).rev().map(layer_name).collect()
    }

    fn open(&self, store: &dyn Backend) -> Onto {
        Onto::open(store, &self.names(), self.specs.len() - self.bottom, self.clones)
    }

    fn kept_name(&self) -> String {
        layer_name(self.bottom)
    }

    fn kept_bytes(&self, store: &dyn Backend) -> Vec<u8> {
        bytes_of(&*store.open(&path(&self.kept_name())).unwrap())
    }

    /// What everybody reads as long as the header is the old one: of the newest, and of the kept member.
    fn assert_views(&self, store: &dyn Backend, chain: &Chain, context: &str) {
        let names = self.names();
        let kept = names.len() - 1 - self.bottom;
        assert!(view(&open_chain(store, &names)) == *chain.views.last().unwrap(), "{context}");
        let through_kept = open_chain(store, &names[kept..]);
        assert!(view(&through_kept) == chain.views[self.bottom], "{context}: the kept member");
        // Images that were opened before read on.
        let (upper, lower) = chain.split(0, self.specs.len() - 1);
        assert!(lower.is_empty() && view(&upper) == *chain.views.last().unwrap(), "{context}: open images");
        assert_clean(through_kept.images().next().unwrap(), context);
    }

    /// The result, and the base of the plan.
    fn reference(&self) -> (Vec<u8>, u64) {
        let store = self.store();
        self.build(&store);
        let onto = self.open(&*store);
        let layout = onto.plan(None).unwrap();
        onto.write(&layout).unwrap();
        (self.kept_bytes(&*store), layout.kept().unwrap().1)
    }
}

fn assert_clean(image: &Image, context: &str) {
    let report = check(image, &Limits::default()).unwrap();
    assert_eq!((report.findings, report.incomplete), (vec![], false), "{context}");
}

fn case() -> impl Strategy<Value = Case> {
    let below = prop::collection::vec(spec(sizes(120 * 1024)), 0..=2);
    let alike = (format(), sizes(160 * 1024), prop::collection::vec(shuffle(), 2..=4));
    (below, alike, any::<bool>(), 0u64..K64).prop_map(|(mut specs, (format, size, all), clones, cut)| {
        let bottom = specs.len();
        let format = Format { version: 3, ..format };
        specs.extend(all.into_iter().map(|shuffle| spec_of(format, size, shuffle)));
        // Of the last cluster, which holds the refcount table, the words that are used stay.
        let cut = if cut % 3 == 0 { 0 } else { cut % (format.cluster() - 511) };
        Case { specs, bottom, clones, cut }
    })
}

/// Every cluster before the base is the header, kept, or superseded; and nobody needs what is superseded.
fn assert_superseded(case: &Case, layout: &Layout, file: &dyn StoreFile) {
    let size = case.specs[case.bottom].format.cluster();
    let (kept, base) = layout.kept().unwrap();
    let mut at = size;
    for (start, length) in layout.superseded() {
        for cluster in (at..start.0).step_by(usize::try_from(size).unwrap()) {
            let host = HostOffset(cluster);
            let origin = layout.origin(host);
            assert!(matches!(origin, Origin::Moved { layer, host: h, .. } if layer == kept && h == host));
        }
        assert!(length > 0 && start.0 >= at && (start.0 > at || at == size), "not maximal");
        assert_eq!(layout.origin(start), Origin::Outside);
        at = start.0 + length;
        assert!(at <= base);
        file.write_at(start.0, &vec![0xa5; usize::try_from(length).unwrap()]).unwrap();
    }
    for cluster in (at..base).step_by(usize::try_from(size).unwrap()) {
        assert!(matches!(layout.origin(HostOffset(cluster)), Origin::Moved { .. }));
    }
}

fn merged_onto(case: &Case) {
    let store = case.store();
    let chain = case.build(&store);
    let before = case.kept_bytes(&*store);
    let onto = case.open(&*store);
    let layout = onto.plan(None).unwrap();
    let (kept, base) = layout.kept().unwrap();
    assert_eq!((kept, base), (onto.upper.len() - 1, onto.options.cluster_bits.round_up(before.len() as u64)));
    let written = onto.write(&layout).unwrap();
    case.assert_views(&*store, &chain, "before the switch");
    assert_eq!(written.metadata_bytes, layout.metadata_bytes());
    assert_eq!(
        written.cloned_bytes + written.data_bytes,
        layout.moved_bytes() + layout.composed_bytes() + layout.compressed_bytes()
    );
    let unswitched = case.kept_bytes(&*store);
    assert_eq!(unswitched.len() as u64, layout.file_length());
    assert!(unswitched[..before.len()] == before, "the old image was written to");

    assert_clean(&onto.image_to_be(&layout), "to be");
    assert!(view(&onto.over_lower(onto.image_to_be(&layout))) == *chain.views.last().unwrap());
    let proof = onto.prove(&layout).unwrap();
    assert_eq!(proof.planned_bytes + proof.compared_bytes, case.specs.last().unwrap().size);

    // Another process plans the same and writes the same.
    let again = case.open(&*store);
    let replanned = again.plan(Some(base)).unwrap();
    assert_eq!(again.write(&replanned).unwrap(), written);
    assert_eq!(replanned.switch(), layout.switch());
    assert!(case.kept_bytes(&*store) == unswitched, "the same plan gave other bytes");

    finish(case, &*store, &chain, &onto, &layout);
}

/// Switches, and holds the new image against the model.
fn finish(case: &Case, store: &dyn Backend, chain: &Chain, onto: &Onto, layout: &Layout) {
    let plan = layout.switch().unwrap();
    assert!(plan.at + plan.new.len() as u64 <= 512 && plan.new.len() <= 60);
    assert_eq!(switch_state(plan, &*onto.target).unwrap(), Switched::Not);
    let mut expected = case.kept_bytes(store);
    plan.lay_over(0, &mut expected);
    for _ in 0..2 {
        switch(plan, &*onto.target).unwrap();
        assert_eq!(switch_state(plan, &*onto.target).unwrap(), Switched::Done);
        assert!(case.kept_bytes(store) == expected, "more than the switch was written");
    }
    let look = |context: &str| {
        let names = case.names();
        let alone = open_chain(store, &names[names.len() - 1 - case.bottom..]);
        assert!(view(&alone) == *chain.views.last().unwrap(), "{context}");
        // The newest still reads through it, until it goes.
        assert!(view(&open_chain(store, &names)) == *chain.views.last().unwrap(), "{context}: through");
        assert_clean(alone.images().next().unwrap(), context);
    };
    look("switched");
    // Whoever opened the images before reads on by the old tables.
    let (opened, _) = chain.split(0, case.specs.len() - 1);
    assert!(view(&opened) == *chain.views.last().unwrap(), "images that were open at the switch");
    assert_superseded(case, layout, &*onto.target);
    look("without what is superseded");
    assert_eq!(
        case.open(store).plan(None).map(drop).ok(),
        Some(()),
        "the new image can be merged into again"
    );
    let stale = case.open(store).plan(layout.kept().map(|(_, base)| base)).map(drop).unwrap_err();
    assert_eq!(stale.code(), Code::ChangedMeanwhile);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_file_grows_into_the_merge(case in case()) {
        merged_onto(&case);
    }
}

/// A write that is cut off, and whether it was done by half and the power went.
#[derive(Clone, Copy, Debug)]
struct Cut {
    at: u64,
    half: bool,
    power: bool,
}

/// Cuts the work off at its `at`-th mutating call, looks, and does it again; `false` when there was none.
fn cut_off(case: &Case, reference: &[u8], base: u64, cut: Cut) -> bool {
    let memory = case.store();
    let mut chain = case.build(&memory);
    let faulty = Faulty::new(memory.clone());
    let onto = case.open(&faulty);
    let layout = onto.plan(None).unwrap();
    let at = faulty.mutations() + cut.at;
    if cut.half {
        faulty.fail_halfway_at(at, EIO, Lasting::Dead);
    } else {
        faulty.fail_at(at, EIO, Lasting::Dead);
    }
    let failed = onto.write(&layout).is_err();
    if !failed {
        assert!(case.kept_bytes(&*memory) == reference);
        return false;
    }
    if cut.power {
        memory.crash();
        // What was open is dead now.
        let open = |index| {
            let name = layer_name(index);
            Image::open(memory.open(&path(&name)).unwrap(), &name).unwrap()
        };
        chain.images = (0..case.specs.len()).map(open).collect();
    }
    case.assert_views(&*memory, &chain, &format!("{cut:?}"));
    let again = case.open(&*memory);
    let layout = again.plan(Some(base)).unwrap();
    again.write(&layout).unwrap();
    assert!(case.kept_bytes(&*memory) == reference, "{cut:?}: other bytes when done again");
    true
}

#[test]
fn cut_off_anywhere_it_is_the_old_image_and_can_be_done_again() {
    let cuts = std::cell::Cell::new(0);
    seeded(12)
        .run(&case(), |case| {
            let (reference, base) = case.reference();
            for (half, power) in [(false, false), (true, false), (true, true)] {
                let mut at = 0;
                while cut_off(&case, &reference, base, Cut { at, half, power }) {
                    at += 1;
                    cuts.set(cuts.get() + 1);
                }
            }
            Ok(())
        })
        .unwrap();
    eprintln!("{} cuts", cuts.get());
    assert!(cuts.get() > 250, "{}", cuts.get());
}

/// A base and a tip of eight clusters, plain.
fn plain(bits: u32) -> Case {
    let format = Format::plain(bits);
    let spec = |seed| Spec::new(format, 8 << bits, seed);
    let base = (0..8).fold(spec(1), |spec, at| spec.cell(at, Cell::Data));
    Case::new(vec![base, spec(2).cell(3, Cell::Data).cell(5, Cell::Zero)], 0)
}

#[test]
fn the_switch_is_one_write_and_a_torn_one_is_finished() {
    let case = plain(16);
    let memory = case.store();
    let chain = case.build(&memory);
    let faulty = Faulty::new(memory.clone());
    let onto = case.open(&faulty);
    let layout = onto.plan(None).unwrap();
    onto.write(&layout).unwrap();
    let before = faulty.mutations();
    let plan = layout.switch().unwrap();
    faulty.fail_halfway_at(before, EIO, Lasting::Once);
    switch(plan, &*onto.target).map(drop).unwrap_err();
    assert_eq!(switch_state(plan, &*onto.target).unwrap(), Switched::Torn);
    // The L1 table is whole at its old or new place, so the newest reads on.
    assert!(view(&open_chain(&*memory, &case.names())) == chain.views[1]);
    switch(plan, &*onto.target).unwrap();
    let calls: Vec<_> = faulty.trace().iter().filter_map(|call| call.mutation.map(|_| call.name)).collect();
    assert_eq!(calls[calls.len() - 3..], ["write_at", "write_at", "sync"]);
    assert_eq!(switch_state(plan, &*onto.target).unwrap(), Switched::Done);
    // Somebody else's header is left alone.
    onto.target.write_at(plan.at + 4, &[0x77; 8]).unwrap();
    assert_eq!(switch_state(plan, &*onto.target).unwrap(), Switched::Foreign);
    assert_eq!(switch(plan, &*onto.target).unwrap_err().code(), Code::ChangedMeanwhile);
    let bytes = serde_json::to_string(plan).unwrap();
    assert_eq!(serde_json::from_str::<Switch>(&bytes).unwrap(), *plan);
}

#[test]
fn what_stays_costs_nothing_and_clones_write_no_data() {
    for clones in [true, false] {
        let case = Case { clones, ..plain(16) };
        let store = case.store();
        case.build(&store);
        let onto = case.open(&*store);
        let layout = onto.plan(None).unwrap();
        let written = onto.write(&layout).unwrap();
        let expected = if clones { (K64, 0) } else { (0, K64) };
        assert_eq!((written.cloned_bytes, written.data_bytes), expected);
        // L1 table, refcount table and block, L2 table.
        assert_eq!(written.metadata_bytes, 4 * K64);
        let free: u64 = layout.superseded().map(|(_, length)| length).sum();
        // As many of the old ones, and the two clusters of data that are hidden.
        assert_eq!(free, 6 * K64);
        assert_eq!(layout.moves().count(), 1);
    }
    // A layout for a file of its own keeps nothing.
    let chain = Chain::in_memory(true, plain(16).specs);
    let layout = chain.plan(0, 1).unwrap();
    assert_eq!((layout.kept(), layout.switch(), layout.superseded().count()), (None, None, 0));
}

#[test]
fn a_file_of_another_length_is_refused() {
    let case = plain(12);
    let store = case.store();
    case.build(&store);
    let onto = case.open(&*store);
    let layout = onto.plan(None).unwrap();
    let (_, base) = layout.kept().unwrap();
    for length in [base - 4096, layout.file_length() + 1] {
        onto.target.set_length(length).unwrap();
        let refused = onto.write(&layout).unwrap_err();
        assert_eq!(refused.code(), Code::ChangedMeanwhile, "{length}");
    }
    onto.target.set_length(base).unwrap();
    assert_eq!(onto.plan(Some(base + 512)).unwrap_err().code(), Code::Truncated);
    assert_eq!(onto.plan(Some(4096)).unwrap_err().code(), Code::ChangedMeanwhile);
    assert_eq!(onto.plan(Some(base + 4096)).map(|layout| layout.kept().unwrap().1).unwrap(), base + 4096);
    // A plan for a file of its own.
    let own = Layout::plan(&onto.options, &onto.upper.source_facts(), onto.upper.map()).unwrap();
    assert_eq!(onto.write(&own).unwrap_err().code(), Code::ModeImpossible);
}

#[test]
fn members_that_differ_do_not_fit() {
    let format = Format::plain(16);
    let header = |spec: &Spec| {
        let chain = Chain::in_memory(true, vec![Spec::new(format, K64, 1), spec.clone()]);
        chain.images[1].header().clone()
    };
    let kept = header(&Spec::new(format, K64, 2));
    let backing = Backing { name: b"layer0".to_vec(), format: "qcow2".to_owned(), virtual_size: K64 };
    let wanted = ImageOptions::like(&kept, Some(backing.clone()));
    assert_eq!(in_place_possible(&kept, &[&kept, &kept], &wanted), Ok(()));
    let others = [
        (Format { version: 2, ..format }, K64, Unfit::Version),
        (format, K64 + 512, Unfit::VirtualSize),
        (Format::plain(12), K64, Unfit::ClusterSize),
        (Format { order: 3, ..format }, K64, Unfit::RefcountWidth),
        (Format { extended: true, ..format }, K64, Unfit::Entries),
        (Format { compression: CompressionType::Zstd, ..format }, K64, Unfit::Compression),
    ];
    for (format, size, unfit) in others {
        let other = header(&Spec::new(format, size, 3));
        assert_eq!(in_place_possible(&kept, &[&other, &kept], &wanted), Err(unfit));
        assert_eq!(in_place_possible(&other, &[], &wanted), Err(unfit));
    }
    let extension = BitmapsExtension { count: 1, directory_bytes: 32, directory_offset: HostOffset(5 * K64) };
    for (other, unfit) in [
        (Header { snapshot_count: 1, ..kept.clone() }, Unfit::Snapshots),
        (Header { bitmaps: Some(extension), ..kept.clone() }, Unfit::Bitmaps),
        (Header { dirty: true, ..kept.clone() }, Unfit::Dirty),
    ] {
        assert_eq!(in_place_possible(&kept, &[&other], &wanted), Err(unfit));
        assert_eq!(in_place_possible(&other, &[&kept], &wanted), Err(unfit));
    }
    let other_name = Backing { name: b"./layer0".to_vec(), ..backing.clone() };
    let other_format = Backing { format: "raw".to_owned(), ..backing };
    for backing in [None, Some(other_name), Some(other_format)] {
        let wanted = ImageOptions { backing, ..wanted.clone() };
        assert_eq!(in_place_possible(&kept, &[], &wanted), Err(Unfit::Backing));
    }
    let bare = Header { backing: None, ..kept.clone() };
    assert_eq!(in_place_possible(&bare, &[&kept], &ImageOptions { backing: None, ..wanted }), Ok(()));
}

#[test]
fn autoclear_bits_are_cleared_and_the_rest_of_the_header_stays() {
    let case = plain(9);
    let store = case.store();
    let chain = case.build(&store);
    let file = store.open_writable(&path("layer0")).unwrap();
    file.write_at(f::AT_AUTOCLEAR as u64, &[0x80, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    // More L1 entries than the disk needs are as many afterwards.
    file.write_at(f::AT_L1_ENTRIES as u64, &60u32.to_be_bytes()).unwrap();
    let before = case.kept_bytes(&*store);
    let onto = case.open(&*store);
    let layout = onto.plan(None).unwrap();
    onto.write(&layout).unwrap();
    assert_clean(&onto.image_to_be(&layout), "to be");
    assert!(view(&onto.over_lower(onto.image_to_be(&layout))) == chain.views[1]);
    switch(layout.switch().unwrap(), &*onto.target).unwrap();
    let after = case.kept_bytes(&*store);
    assert!(after[f::AT_AUTOCLEAR..f::AT_AUTOCLEAR + 8] == [0; 8]);
    assert!(after[..f::AT_L1_OFFSET] == before[..f::AT_L1_OFFSET]);
    assert!(after[f::AT_SNAPSHOT_COUNT..f::AT_AUTOCLEAR] == before[f::AT_SNAPSHOT_COUNT..f::AT_AUTOCLEAR]);
    assert!(after[f::AT_AUTOCLEAR + 8..512] == before[f::AT_AUTOCLEAR + 8..512]);
}

/// A compressed cluster may claim bytes behind the end of its file, where the plan has written since.
#[test]
fn what_was_appended_is_not_read_when_it_is_done_again() {
    let mut case = plain(16);
    case.specs[0].cells.insert(0, Cell::Compressed);
    let store = case.store();
    let chain = case.build(&store);
    let file = store.open_writable(&path("layer0")).unwrap();
    let length = file.stat().unwrap().length;
    let mut entry = [0; 8];
    file.read_at(chain.images[0].header().l1_offset.0, &mut entry).unwrap();
    let table = u64::from_be_bytes(entry) & f::ENTRY_OFFSET_MASK;
    let claim = f::ENTRY_COMPRESSED | 255 << 54 | (length - 512);
    file.write_at(table, &claim.to_be_bytes()).unwrap();
    let mut results = Vec::new();
    for base in [None, Some(length)] {
        let onto = case.open(&*store);
        let layout = onto.plan(base).unwrap();
        onto.write(&layout).unwrap();
        results.push(case.kept_bytes(&*store));
    }
    assert!(results[0] == results[1]);
}

#[test]
fn a_tebibyte_that_stays_is_planned_and_counted_quickly() {
    let size = 1 << 40;
    let store = MemoryStore::new();
    let image = put(&store, "kept", &Spec::new(Format::plain(16), size, 1).build());
    let image = Image::open(image, "kept").unwrap();
    // Every other cluster was hidden by the member above.
    let kept = Kept::of(0, &image, Some(3 << 40)).unwrap();
    let facts = SourceFacts {
        cluster_bits: image.header().cluster_bits,
        compression: CompressionType::Zlib,
        virtual_size: size,
        file_length: 3 << 40,
    };
    let runs = || {
        (0..size / K64).map(|at| {
            let content = Content::Data { layer: 0, host: HostOffset((2 * at + 1) * K64) };
            Ok(Run { start: GuestOffset(at * K64), length: K64, content })
        })
    };
    let options = ImageOptions::like(image.header(), None);
    let begun = Instant::now();
    let layout = Layout::plan_onto(&options, &[facts], &kept, runs()).unwrap();
    let planned = begun.elapsed();
    let counting = Instant::now();
    let tables = layout.emit(runs()).map(Result::unwrap);
    let is_refcounts = |emit: &Emit| matches!(emit, Emit::Table { kind: TableKind::Refcounts, .. });
    let blocks = tables.filter(is_refcounts).count();
    let counted = counting.elapsed();
    assert_eq!((layout.moves().count(), layout.moved_bytes()), (0, 0));
    assert_eq!(blocks as u64, (3u64 << 40) / (32_768 * K64) + 2, "one more for the tables, and the table");
    eprintln!("planned in {planned:?}, {blocks} refcount blocks in {counted:?}");
    assert!(begun.elapsed() < Duration::from_secs(30));
}
