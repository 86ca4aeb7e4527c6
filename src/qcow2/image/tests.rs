use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::testing::{Draft, open};
use crate::failure::{Code, Failure};
use crate::qcow2::format as f;
use crate::qcow2::map::{CompressedCluster, Extent, ExtentKind};
use crate::units::{GuestOffset, HostOffset};

const K64: u64 = 65_536;

fn all(draft: &Draft) -> Vec<Extent> {
    draft.open().extents(GuestOffset(0)).collect::<Result<_, _>>().unwrap()
}

fn failure(draft: &Draft) -> (usize, Code) {
    let image = draft.open();
    let mut extents = image.extents(GuestOffset(0));
    let mut good = 0;
    loop {
        match extents.next() {
            Some(Ok(_)) => good += 1,
            Some(Err(error)) => {
                assert!(error.to_string().contains("guest offset"), "{error}");
                assert!(extents.next().is_none(), "an error is the end");
                return (good, error.code());
            }
            None => panic!("no error"),
        }
    }
}

fn extent(start: u64, length: u64, kind: ExtentKind) -> Extent {
    Extent { start: GuestOffset(start), length, kind }
}

fn data(host: u64) -> ExtentKind {
    ExtentKind::Data { host: HostOffset(host) }
}

/// An image of 16 clusters of 64 KiB whose L2 table is in cluster 4.
fn draft(virtual_size: u64, entries: &[(u64, u64)]) -> Draft {
    let mut draft = Draft::new(16, virtual_size, false);
    draft.put_l1(0, (4 * K64) | f::ENTRY_COPIED);
    for (index, value) in entries {
        draft.put(4 * K64 + index * 8, *value);
    }
    draft.put(16 * K64 - 8, 0);
    draft
}

#[test]
fn runs_are_maximal_and_end_at_the_virtual_size() {
    let entries = [(1, 5 * K64), (2, 6 * K64), (3, 8 * K64), (4, 1), (5, (9 * K64) | 1)];
    let size = 7 * K64 + 512;
    let expected = [
        extent(0, K64, ExtentKind::Below),
        extent(K64, 2 * K64, data(5 * K64)),
        extent(3 * K64, K64, data(8 * K64)),
        extent(4 * K64, 2 * K64, ExtentKind::Zero),
        extent(6 * K64, K64 + 512, ExtentKind::Below),
    ];
    let draft = draft(size, &entries);
    assert_eq!(all(&draft), expected);
    let image = draft.open();
    for from in [0, 1, K64 + 100, 3 * K64 - 1, 6 * K64, size - 1] {
        let tail: Vec<_> = image.extents(GuestOffset(from)).map(Result::unwrap).collect();
        assert_eq!(tail[0].start, GuestOffset(from));
        assert_eq!(tail.last().unwrap().end(), GuestOffset(size));
        if let ExtentKind::Data { host } = tail[0].kind {
            let whole = expected.iter().find(|extent| extent.end().0 > from).unwrap();
            assert_eq!(data(host.0 - (from - whole.start.0)), whole.kind);
        }
    }
    assert_eq!(image.extents(GuestOffset(size)).count(), 0);
    assert_eq!(image.extents(GuestOffset(u64::MAX)).count(), 0);
    assert_eq!(image.extents_windowed(GuestOffset(0), 0).map(Result::unwrap).collect::<Vec<_>>(), expected);
}

#[test]
fn empty_and_tiny_disks() {
    assert_eq!(all(&Draft::new(16, 0, false)), []);
    assert_eq!(all(&Draft::new(16, 512, false)), [extent(0, 512, ExtentKind::Below)]);
    assert_eq!(all(&draft(512, &[(0, 5 * K64)])), [extent(0, 512, data(5 * K64))]);
}

#[test]
fn compressed_clusters_stay_alone_and_are_clipped() {
    let raw = f::ENTRY_COMPRESSED | 1 << 54 | (5 * K64 + 3);
    let draft = draft(K64 + 512, &[(0, raw), (1, raw)]);
    let cluster = |guest| {
        let (guest, host) = (GuestOffset(guest), HostOffset(5 * K64 + 3));
        ExtentKind::Compressed(CompressedCluster { guest, host, stored_bytes: 1021 })
    };
    assert_eq!(all(&draft), [extent(0, K64, cluster(0)), extent(K64, 512, cluster(K64))]);
    let from_inside = draft.open().extents(GuestOffset(100)).next().unwrap().unwrap();
    assert_eq!(from_inside, extent(100, K64 - 100, cluster(0)));
    let ExtentKind::Compressed(cluster) = from_inside.kind else { panic!() };
    let error = draft.open().read_compressed(&cluster).unwrap_err();
    assert_eq!(error.code(), Code::BadCompression);
}

#[test]
fn subclusters() {
    let mut draft = Draft::new(16, 2 * K64, true);
    draft.put_l1(0, 4 * K64);
    draft.put(4 * K64, 5 * K64);
    draft.put(4 * K64 + 8, 0b1100 << 32 | 0b11);
    draft.put(4 * K64 + 24, 1 << 32);
    draft.put(6 * K64, 0);
    let sub = K64 / 32;
    let expected = [
        extent(0, 2 * sub, data(5 * K64)),
        extent(2 * sub, 2 * sub, ExtentKind::Zero),
        extent(4 * sub, K64 - 4 * sub, ExtentKind::Below),
        extent(K64, sub, ExtentKind::Zero),
        extent(K64 + sub, K64 - sub, ExtentKind::Below),
    ];
    assert_eq!(all(&draft), expected);
    let inside = draft.open().extents(GuestOffset(sub + 5)).next().unwrap().unwrap();
    assert_eq!(inside, extent(sub + 5, sub - 5, data(5 * K64 + sub + 5)));
    draft.put(4 * K64 + 8, 1 << 32 | 1);
    assert_eq!(failure(&draft), (0, Code::BadEntry));
}

#[test]
fn bad_entries_and_tables() {
    assert_eq!(failure(&draft(K64, &[(0, 5 * K64 + 512)])), (0, Code::BadEntry));
    assert_eq!(failure(&draft(2 * K64, &[(1, 2)])), (1, Code::BadEntry));
    let mut draft = Draft::new(16, K64, false);
    draft.put_l1(0, 4 * K64 + 512);
    assert_eq!(failure(&draft), (0, Code::BadEntry));
    draft.put_l1(0, 1 << 50);
    assert_eq!(failure(&draft), (0, Code::Truncated));
}

#[test]
fn data_behind_the_end_is_left_to_the_caller() {
    let far = 1 << 50;
    let draft = draft(2 * K64, &[(0, far), (1, far + K64)]);
    assert_eq!(all(&draft), [extent(0, 2 * K64, data(far))]);
    let mut buffer = [7; 8];
    draft.open().read_data(HostOffset(far), &mut buffer).unwrap();
    assert_eq!(buffer, [0; 8]);
}

#[test]
fn shared_tables_and_clusters_end_early() {
    // One L2 table and one data cluster for all of 16 TiB: 640 KiB that claim to be 16 TiB.
    let mut draft = Draft::new(16, 16 << 40, false);
    let l2 = draft.bytes.len() as u64;
    for index in 0..(16 << 40) / (512 << 20) {
        draft.put_l1(index, l2);
    }
    for index in 0..K64 / 8 {
        draft.put(l2 + index * 8, l2 + K64);
    }
    draft.put(l2 + 2 * K64 - 8, 0);
    let begun = Instant::now();
    let (good, code) = failure(&draft);
    assert_eq!(code, Code::SharedCluster);
    assert!(good <= 20 && begun.elapsed() < Duration::from_secs(1));
    // Only the tables are shared: all of them are empty.
    for index in 0..K64 / 8 {
        draft.put(l2 + index * 8, 0);
    }
    assert_eq!(failure(&draft).1, Code::SharedCluster);
}

#[test]
fn sparse_sixty_tebibytes_take_no_time() {
    for bits in [16, 21] {
        let size = 60 << 40;
        let draft = Draft::new(bits, size, false);
        let begun = Instant::now();
        assert_eq!(all(&draft), [extent(0, size, ExtentKind::Below)]);
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    }
}

proptest! {
    #[test]
    fn hostile_tables_end(
        words in proptest::collection::vec(any::<u64>(), 64),
        kept in proptest::collection::vec(0_u64..6, 64),
        l1 in 0_u64..8,
        from in 0_u64..1 << 20,
    ) {
        let mut draft = Draft::new(9, 1 << 17, false);
        let at = draft.bytes.len() as u64;
        for index in 0..4 {
            draft.put_l1(index, l1 * 512);
        }
        for (index, (word, kind)) in words.iter().zip(&kept).enumerate() {
            let word = match kind {
                0 => 0,
                1 => word & f::ENTRY_OFFSET_MASK,
                2 => word & 0xe00,
                3 => word & 1,
                4 => word & 0xff | f::ENTRY_COMPRESSED,
                _ => *word,
            };
            draft.put(at + index as u64 * 8, word);
        }
        let mut at = from;
        for extent in draft.open().extents(GuestOffset(from)) {
            let Ok(extent) = extent else { return Ok(()) };
            prop_assert_eq!(extent.start.0, at);
            prop_assert!(extent.length > 0);
            at = extent.end().0;
        }
        prop_assert_eq!(at, from.max(1 << 17));
    }

    #[test]
    fn any_file_opens_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..600), length in any::<u32>()) {
        let _ = open(bytes, u64::from(length));
    }
}
