//! The canonical image against the general layout, an independent way to the same bytes.

use proptest::prelude::*;

use super::{Canonical, Filled, Form, Part};
use crate::qcow2::header::CompressionType;
use crate::qcow2::layout::{Emit, Layout, SourceFacts};
use crate::qcow2::map::{Content, Run};
use crate::units::{BLOCK_BYTES, ClusterBits, GuestOffset, HostOffset};

/// A view that is mapped as one file in which guest offset `x` lies at `x` behind the first cluster.
fn runs(canonical: &Canonical, bits: ClusterBits) -> Vec<Run> {
    let (unit, size) = (canonical.form.unit_bytes(), canonical.virtual_size);
    let mut runs = Vec::new();
    for at in 0..size.div_ceil(unit) {
        let start = GuestOffset(at * unit);
        let length = unit.min(size - start.0);
        let content = if canonical.units.contains(at) {
            Content::Data { layer: 0, host: HostOffset(start.0 + bits.bytes()) }
        } else {
            Content::Below
        };
        runs.push(Run { start, length, content });
    }
    runs
}

/// Where each byte of a file is from: tables as they are, data by its guest offset plus one, in 8 bytes a cluster.
fn general(canonical: &Canonical, bits: ClusterBits) -> (Vec<u8>, Vec<(u64, u64, u64)>) {
    let size = canonical.virtual_size;
    let options = canonical.form.options(size, CompressionType::Zlib);
    let file_length = size + 2 * bits.bytes();
    let source = SourceFacts {
        cluster_bits: bits,
        compression: CompressionType::Zlib,
        virtual_size: size,
        file_length,
    };
    let map = runs(canonical, bits);
    let layout = Layout::plan(&options, &[source], map.iter().copied().map(Ok)).unwrap();
    assert_eq!(layout.file_length(), canonical.length());
    let mut bytes = vec![0; usize::try_from(canonical.metadata_bytes()).unwrap()];
    let mut data: Vec<(u64, u64, u64)> =
        layout.moves().map(|run| (run.to, run.from - bits.bytes(), run.length)).collect();
    for emit in layout.emit(map.iter().copied().map(Ok)) {
        match emit.unwrap() {
            Emit::Table { to, bytes: table, .. } => {
                let to = usize::try_from(to.0).unwrap();
                bytes[to..to + table.len()].copy_from_slice(&table);
            }
            Emit::Composed { to, length, parts } => data.push((to.0, parts[0].piece.start.0, length)),
            Emit::Compressed { .. } => panic!("nothing is compressed"),
        }
    }
    data.sort_unstable();
    (bytes, data)
}

fn plan(size: u64, form: Form, ranges: &[(u64, u64)]) -> Canonical {
    let mut ranges = ranges.to_vec();
    ranges.sort_unstable();
    let mut filled = Filled::new(size, form);
    for (start, length) in ranges {
        filled.add(start, start + length);
    }
    Canonical::new(size, form, filled.finish()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn is_what_the_general_layout_makes_of_one_file_in_guest_order(
        bits in prop::sample::select(vec![9_u32, 12, 16, 17, 21]),
        size in prop_oneof![Just(0_u64), (1_u64..200).prop_map(|sectors| sectors * 512), (1_u64..6000).prop_map(|k| k * 4096 + 512)],
        ranges in prop::collection::vec((0_u64..24_000_000, 1_u64..400_000), 0..12),
        cuts in prop::collection::vec(0_u64..400_000, 0..6),
    ) {
        let bits = ClusterBits::new(bits).unwrap();
        let canonical = plan(size, Form::Qcow2(bits), &ranges);
        let (tables, data) = general(&canonical, bits);
        let mut whole = vec![7; tables.len()];
        canonical.metadata(0, &mut whole);
        prop_assert!(whole == tables, "tables differ");
        for cut in cuts {
            let from = usize::try_from(cut).unwrap().min(tables.len());
            let to = (from + 777).min(tables.len());
            let mut part = vec![7; to - from];
            canonical.metadata(from as u64, &mut part);
            prop_assert!(part == tables[from..to]);
        }
        // Cluster by cluster the same bytes of the view.
        let mut at = canonical.metadata_bytes();
        for (to, guest, length) in data {
            for step in (0..length).step_by(usize::try_from(bits.bytes()).unwrap()) {
                prop_assert_eq!(at, to + step);
                let found = canonical.part(at);
                let Some((Part::Data { guest: is }, more)) = found else { panic!("{found:?}") };
                prop_assert_eq!(is, guest + step);
                prop_assert_eq!(canonical.place(is), Some(at));
                prop_assert!(more >= bits.bytes());
                at += bits.bytes();
            }
        }
        prop_assert_eq!(at, canonical.length());
        prop_assert_eq!(canonical.part(at), None);
    }

    #[test]
    fn a_raw_image_is_the_view(
        size in 0_u64..3_000_000, ranges in prop::collection::vec((0_u64..3_000_000, 1_u64..200_000), 0..6)
    ) {
        let canonical = plan(size, Form::Raw, &ranges);
        prop_assert_eq!(canonical.length(), size);
        let mut at = 0;
        while let Some((part, length)) = canonical.part(at) {
            let full = canonical.units().contains(at / BLOCK_BYTES);
            prop_assert_eq!(part, if full { Part::Data { guest: at } } else { Part::Zeros });
            at += length;
        }
        prop_assert_eq!(at, size);
    }
}

#[test]
fn a_huge_sparse_view_takes_little_memory() {
    let size = 16 << 40;
    let ranges: Vec<_> = (0..16_384_u64).map(|index| (index << 30, 65_536)).collect();
    let canonical = plan(size, Form::Qcow2(ClusterBits::DEFAULT), &ranges);
    assert!(canonical.units().memory_bytes() < 16 << 20);
    let mut bytes = vec![0; 512];
    canonical.metadata(canonical.metadata_bytes() - 512, &mut bytes);
}
