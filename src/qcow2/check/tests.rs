use proptest::prelude::*;

use super::{Limits, Report, check};
use crate::failure::Code;
use crate::qcow2::check::stored::Stored;
use crate::qcow2::format as f;
use crate::qcow2::image::testing::{Draft, open};

const K64: u64 = 65_536;
const COPIED: u64 = f::ENTRY_COPIED;

/// 64 KiB clusters: L2 table in cluster 4, data in 5 and 6, compressed in 7, all counted.
fn sound() -> Draft {
    let mut draft = Draft::new(16, 64 * K64, false);
    draft.put_l1(0, (4 * K64) | COPIED);
    draft.put(4 * K64, (5 * K64) | COPIED);
    draft.put(4 * K64 + 8, (6 * K64) | COPIED | 1);
    draft.put(4 * K64 + 16, f::ENTRY_COMPRESSED | (7 * K64));
    draft.put(4 * K64 + 24, f::ENTRY_COMPRESSED | (7 * K64 + 512));
    draft.put(8 * K64 - 8, 0);
    for (cluster, count) in [(4, 1), (5, 1), (6, 1), (7, 2)] {
        draft.put_refcount(cluster, count);
    }
    draft
}

fn report(draft: &Draft) -> Report {
    check(&draft.open(), &Limits::default()).unwrap()
}

fn codes(draft: &Draft) -> Vec<Code> {
    report(draft).findings.iter().map(|finding| finding.code).collect()
}

#[test]
fn a_sound_image() {
    let report = report(&sound());
    assert_eq!(report.findings, []);
    assert_eq!(report.used_clusters, 8);
    assert!(!report.is_damaged() && !report.incomplete && !report.dirty);
}

/// Blocks that are few enough are kept whole, and read in larger pages than others.
#[test]
fn stored_counts_are_those_of_their_blocks_however_many_there_are() {
    let per_block = K64 / 2;
    for blocks in [1, 3, 64, 65, 200] {
        let mut draft = sound();
        // The table's blocks lie in clusters 8 and 9, in turn.
        for index in 0..blocks {
            draft.put(K64 + 8 * index, (8 + index % 2) * K64);
        }
        let count =
            |cluster: u64| u16::try_from((cluster / per_block % 2) * 7 + cluster % 5003 % 11).unwrap();
        draft.put(10 * K64 - 8, 0);
        for cluster in 0..2 * per_block {
            let at = usize::try_from(8 * K64 + 2 * cluster).unwrap();
            draft.bytes[at..at + 2].copy_from_slice(&count(cluster).to_be_bytes());
        }
        let image = draft.open();
        let mut stored = Stored::read(&image).unwrap();
        let mut clusters: Vec<u64> = (0..blocks * per_block).step_by(997).collect();
        clusters.extend((0..blocks).flat_map(|block| [block * per_block, (block + 1) * per_block - 1]));
        for cluster in clusters {
            let expected = u64::from(count(cluster % (2 * per_block)));
            assert_eq!(stored.get(cluster).unwrap(), expected, "{cluster} of {blocks} blocks");
        }
        assert_eq!(stored.get(blocks * per_block).unwrap(), 0);
    }
}

#[test]
fn leaks_are_counted_and_no_damage() {
    let mut draft = sound();
    draft.put(12 * K64 - 8, 0);
    for cluster in [9, 10, 11] {
        draft.put_refcount(cluster, 1);
    }
    draft.put_refcount(5, 1);
    draft.put_refcount(7, 3);
    // Behind the end of the file nothing can leak.
    draft.put_refcount(40, 1);
    let found = report(&draft);
    assert_eq!(codes(&draft), [Code::LeakedCluster, Code::LeakedCluster]);
    assert_eq!((found.leaked_clusters, found.is_damaged()), (4, false));
    assert_eq!(found.findings[1].host.0, 9 * K64);
}

#[test]
fn counts_that_are_too_low_and_flags_that_lie() {
    let mut draft = sound();
    draft.put_refcount(7, 1);
    assert_eq!(codes(&draft), [Code::RefcountTooLow]);
    draft.put_refcount(5, 0);
    assert_eq!(codes(&draft), [Code::CopiedFlag, Code::RefcountTooLow, Code::RefcountTooLow]);
    let mut draft = sound();
    draft.put(4 * K64, 5 * K64);
    assert_eq!(codes(&draft), [Code::CopiedFlag]);
    draft.put_l1(0, 4 * K64);
    assert_eq!(codes(&draft), [Code::CopiedFlag, Code::CopiedFlag]);
}

#[test]
fn a_dirty_image_may_lag() {
    let mut draft = sound();
    draft.put(f::AT_INCOMPATIBLE as u64, f::INCOMPATIBLE_DIRTY);
    draft.put_refcount(5, 0);
    let report = report(&draft);
    assert_eq!(report.findings.len(), 1);
    assert_eq!(report.findings[0].code, Code::Dirty);
    assert_eq!((report.lagging_clusters, report.is_damaged()), (2, false));
}

#[test]
fn overlaps_and_shared_clusters() {
    for (target, expected) in [
        (3, Code::Overlap),
        (4, Code::Overlap),
        (2, Code::Overlap),
        (7, Code::Overlap),
        (6, Code::SharedCluster),
    ] {
        let mut draft = sound();
        draft.put(4 * K64 + 40, target * K64);
        // Even if the counts allow for it.
        draft.put_refcount(target, if target == 7 { 3 } else { 2 });
        assert!(codes(&draft).contains(&expected), "{target}: {:?}", report(&draft));
        assert!(report(&draft).is_damaged());
    }
    let mut draft = Draft::new(16, 16 << 30, false);
    let table = draft.bytes.len() as u64;
    for index in 0..32 {
        draft.put_l1(index, table);
    }
    draft.put(table, 0);
    let report = report(&draft);
    assert_eq!(report.findings.iter().filter(|found| found.code == Code::SharedCluster).count(), 31);
}

#[test]
fn what_lies_behind_the_end() {
    let mut draft = sound();
    draft.put(4 * K64 + 40, (8 * K64) | COPIED);
    draft.put_refcount(8, 1);
    assert_eq!(codes(&draft), [Code::Truncated]);
    // A last cluster that is cut is allowed.
    let mut draft = sound();
    draft.put(4 * K64 + 16, 0);
    draft.put(4 * K64 + 24, (7 * K64) | COPIED);
    draft.put_refcount(7, 1);
    draft.bytes.truncate(usize::try_from(7 * K64 + 1).unwrap());
    assert_eq!(codes(&draft), []);
    draft.bytes.truncate(usize::try_from(7 * K64).unwrap());
    assert_eq!(codes(&draft), [Code::Truncated]);
}

#[test]
fn bad_entries_are_findings() {
    let mut draft = sound();
    draft.put(4 * K64 + 40, 5 * K64 + 512);
    draft.put(4 * K64 + 48, 2);
    draft.put_l1(1, 1);
    draft.put_l1(2, COPIED);
    draft.put(K64 + 8, 1);
    draft.put(3 * K64 + 16, COPIED);
    draft.put32(f::AT_L1_ENTRIES, 3);
    assert_eq!(codes(&draft), [Code::BadEntry; 5]);
}

#[test]
fn limits_make_a_report_incomplete() {
    let limits = Limits { findings: 1, counter_bytes: 1536, ..Limits::default() };
    let mut draft = sound();
    draft.put(4 * K64, 5 * K64);
    draft.put(4 * K64 + 8, (6 * K64) | 1);
    let report = check(&draft.open(), &limits).unwrap();
    assert_eq!((report.findings.len(), report.findings_omitted, report.errors), (1, 1, 2));
    assert!(!report.incomplete);
    let limits = Limits { table_bytes: 100, ..Limits::default() };
    let report = check(&draft.open(), &limits).unwrap();
    assert!(report.incomplete);
    assert_eq!(report.leaked_clusters, 0, "what was not walked is no leak");
    draft.put(4 * K64 + 40, 1000 * K64);
    let far = open(draft.bytes.clone(), 2000 * K64).unwrap();
    let limits = Limits { counter_bytes: 512, ..Limits::default() };
    assert!(check(&far, &limits).unwrap().incomplete);
}

#[test]
fn enough_errors_end_the_check() {
    let mut draft = sound();
    for index in 10..40 {
        draft.put(4 * K64 + 8 * index, 2);
    }
    let report = check(&draft.open(), &Limits { errors: 12, ..Limits::default() }).unwrap();
    assert_eq!((report.errors, report.incomplete), (12, true));
    assert!(!check(&draft.open(), &Limits::default()).unwrap().incomplete);
}

#[test]
fn one_stream_behind_many_entries_is_shared() {
    // A cluster has room for 1,024 streams of 64 bytes, if each is a cluster of one byte's repetitions.
    for (entries, shared) in [(1000, false), (1100, true)] {
        let mut draft = sound();
        for index in 0..entries {
            draft.put(4 * K64 + 8 * (10 + index), f::ENTRY_COMPRESSED | (7 * K64));
        }
        draft.put32(f::AT_L1_ENTRIES, 1);
        draft.put(f::AT_VIRTUAL_SIZE as u64, 8192 * K64);
        draft.put_refcount(7, u16::MAX);
        let codes = codes(&draft);
        assert_eq!(codes.contains(&Code::SharedCluster), shared, "{entries}: {codes:?}");
    }
}

#[test]
fn snapshots_count_what_they_share_once_for_each() {
    let mut draft = sound();
    let table = 8 * K64;
    draft.put32(f::AT_SNAPSHOT_COUNT, 3);
    draft.put(f::AT_SNAPSHOTS_OFFSET as u64, table);
    for index in 0..3 {
        // An L1 table of one entry in a cluster of its own.
        let (at, l1) = (table + 40 * index, (9 + index) * K64);
        draft.put(at, l1);
        draft.put(at + 8, 1 << 32);
        draft.put(l1, 4 * K64);
        draft.put_refcount(9 + index, 1);
    }
    draft.put_refcount(8, 1);
    for (cluster, count) in [(4, 4), (5, 4), (6, 4), (7, 8)] {
        draft.put_refcount(cluster, count);
    }
    draft.put_l1(0, 4 * K64);
    draft.put(4 * K64, 5 * K64);
    draft.put(4 * K64 + 8, (6 * K64) | 1);
    draft.put(12 * K64 - 8, 0);
    assert_eq!(codes(&draft), []);
    draft.put_refcount(5, 3);
    assert_eq!(codes(&draft), [Code::RefcountTooLow]);
}

proptest! {
    #[test]
    fn hostile_images_end(
        words in proptest::collection::vec((0_u64..4096, any::<u64>(), 0_u8..4), 1..40),
        snapshots in 0_u32..4,
    ) {
        let mut draft = Draft::new(9, 1 << 17, false);
        draft.put32(f::AT_SNAPSHOT_COUNT, snapshots);
        draft.put(f::AT_SNAPSHOTS_OFFSET as u64, 4096);
        for (at, word, kind) in words {
            let word = match kind {
                0 => word & 0x3e00,
                1 => word & 0x3e00 | COPIED,
                2 => word & 0x3fff | f::ENTRY_COMPRESSED,
                _ => word,
            };
            draft.put(512 + at / 8 * 8, word);
        }
        let limits = Limits { findings: 5, counter_bytes: 1 << 20, table_bytes: 1 << 20, ..Limits::default() };
        let report = check(&draft.open(), &limits).unwrap();
        prop_assert!(report.findings.len() <= 5);
    }
}
