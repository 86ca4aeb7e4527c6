use proptest::prelude::*;

use super::{Header, parse_prefix};
use crate::failure::{Code, Failure};
use crate::qcow2::error::ImageError;
use crate::qcow2::format as f;
use crate::qcow2::header::CompressionType;

const FILE: u64 = 1 << 20;

/// A valid version 3 header of a 1 GiB image with 64 KiB clusters, in 4 KiB.
fn image() -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    put32(&mut bytes, f::AT_MAGIC, f::MAGIC);
    put32(&mut bytes, f::AT_VERSION, 3);
    put32(&mut bytes, f::AT_CLUSTER_BITS, 16);
    put64(&mut bytes, f::AT_VIRTUAL_SIZE, 1 << 30);
    put32(&mut bytes, f::AT_L1_ENTRIES, 2);
    put64(&mut bytes, f::AT_L1_OFFSET, 0x30000);
    put64(&mut bytes, f::AT_REFCOUNT_TABLE_OFFSET, 0x10000);
    put32(&mut bytes, f::AT_REFCOUNT_TABLE_CLUSTERS, 1);
    put32(&mut bytes, f::AT_REFCOUNT_ORDER, 4);
    put32(&mut bytes, f::AT_HEADER_LENGTH, 112);
    bytes
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn extension(bytes: &mut [u8], at: usize, kind: u32, data: &[u8]) -> usize {
    put32(bytes, at, kind);
    put32(bytes, at + 4, u32::try_from(data.len()).unwrap());
    bytes[at + 8..at + 8 + data.len()].copy_from_slice(data);
    at + 8 + data.len().next_multiple_of(8)
}

fn code_of(bytes: &[u8]) -> Code {
    Header::parse("x", FILE, bytes).unwrap_err().code()
}

fn code_with32(at: usize, value: u32) -> Code {
    let mut bytes = image();
    put32(&mut bytes, at, value);
    code_of(&bytes)
}

fn code_with64(at: usize, value: u64) -> Code {
    let mut bytes = image();
    put64(&mut bytes, at, value);
    code_of(&bytes)
}

#[test]
fn a_plain_header() {
    let header = Header::parse("x", FILE, &image()).unwrap();
    assert_eq!((header.version, header.virtual_size, header.l1_entries), (3, 1 << 30, 2));
    assert_eq!(header.compression, CompressionType::Zlib);
    assert!(header.backing.is_none() && header.bitmaps.is_none() && !header.dirty);
}

#[test]
fn version_2_has_no_features() {
    let mut bytes = image();
    put32(&mut bytes, f::AT_VERSION, 2);
    // What version 3 keeps there is the extensions' place in version 2: an end mark.
    put64(&mut bytes, 72, 0);
    let header = Header::parse("x", FILE, &bytes).unwrap();
    assert_eq!((header.version, header.refcount_order), (2, 4));
}

#[test]
fn fields_out_of_range() {
    let cases = [
        (f::AT_VERSION, 1),
        (f::AT_VERSION, 4),
        (f::AT_CLUSTER_BITS, 8),
        (f::AT_CLUSTER_BITS, 22),
        (f::AT_CLUSTER_BITS, 70),
        (f::AT_REFCOUNT_ORDER, 7),
        (f::AT_HEADER_LENGTH, 96),
        (f::AT_HEADER_LENGTH, 108),
        (f::AT_HEADER_LENGTH, 65_544),
        (f::AT_L1_ENTRIES, 1),
        (f::AT_REFCOUNT_TABLE_CLUSTERS, 0),
    ];
    for (at, value) in cases {
        assert_eq!(code_with32(at, value), Code::BadHeader, "{value} at {at}");
    }
    let cases = [
        (f::AT_L1_OFFSET, 0x30001),
        (f::AT_VIRTUAL_SIZE, 1 << 63),
        (f::AT_REFCOUNT_TABLE_OFFSET, 1 << 56),
        (f::AT_SNAPSHOTS_OFFSET, 512),
    ];
    for (at, value) in cases {
        assert_eq!(code_with64(at, value), Code::BadHeader, "{value:#x} at {at}");
    }
    assert_eq!(code_with32(f::AT_L1_ENTRIES, (32 << 20) / 8 + 1), Code::HugeTable);
    assert_eq!(code_with32(f::AT_REFCOUNT_TABLE_CLUSTERS, 129), Code::HugeTable);
    assert_eq!(code_with32(f::AT_SNAPSHOT_COUNT, 65_537), Code::HugeTable);
    assert_eq!(code_with64(f::AT_L1_OFFSET, FILE), Code::Truncated);
    assert_eq!(code_with32(f::AT_MAGIC, 7), Code::NotQcow2);
    assert_eq!(code_of(&[]), Code::NotQcow2);
    assert_eq!(code_of(&image()[..80]), Code::Truncated);
}

#[test]
fn limits_themselves_are_allowed() {
    let mut bytes = image();
    put32(&mut bytes, f::AT_L1_ENTRIES, (32 << 20) / 8);
    put32(&mut bytes, f::AT_REFCOUNT_TABLE_CLUSTERS, 128);
    put32(&mut bytes, f::AT_SNAPSHOT_COUNT, 65_536);
    assert!(Header::parse("x", 0x30000 + (32 << 20), &bytes).is_ok());
    assert!(Header::parse("x", 0x30000 + (32 << 20) - 1, &bytes).is_err());
}

#[test]
fn refused_features() {
    assert_eq!(code_with32(f::AT_CRYPT_METHOD, 1), Code::Encrypted);
    assert_eq!(code_with32(f::AT_CRYPT_METHOD, 2), Code::Encrypted);
    assert_eq!(code_with64(f::AT_INCOMPATIBLE, f::INCOMPATIBLE_DATA_FILE), Code::DataFile);
    assert_eq!(code_with64(f::AT_INCOMPATIBLE, f::INCOMPATIBLE_CORRUPT), Code::MarkedCorrupt);
    assert_eq!(code_with64(f::AT_INCOMPATIBLE, 1 << 63), Code::UnknownFeature);
    let mut bytes = image();
    extension(&mut bytes, 112, f::EXTENSION_ENCRYPTION, &[0; 16]);
    assert_eq!(code_of(&bytes), Code::Encrypted);
}

#[test]
fn unknown_features_are_named() {
    let mut bytes = image();
    put64(&mut bytes, f::AT_INCOMPATIBLE, 1 << 9);
    let mut names = [0; 96];
    names[48] = 0;
    names[49] = 9;
    names[50..55].copy_from_slice(b"quark");
    extension(&mut bytes, 112, f::EXTENSION_FEATURE_NAMES, &names);
    match Header::parse("x", FILE, &bytes) {
        Err(ImageError::Unsupported { feature, .. }) => {
            assert_eq!(feature, "incompatible feature 9 (\"quark\")");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn compression_and_its_bit_agree() {
    let mut bytes = image();
    bytes[f::AT_COMPRESSION_TYPE] = f::COMPRESSION_ZSTD;
    assert_eq!(code_of(&bytes), Code::BadHeader);
    put64(&mut bytes, f::AT_INCOMPATIBLE, f::INCOMPATIBLE_COMPRESSION);
    assert_eq!(Header::parse("x", FILE, &bytes).unwrap().compression, CompressionType::Zstd);
    bytes[f::AT_COMPRESSION_TYPE] = f::COMPRESSION_ZLIB;
    assert_eq!(code_of(&bytes), Code::BadHeader);
    bytes[f::AT_COMPRESSION_TYPE] = 9;
    assert_eq!(code_of(&bytes), Code::UnknownFeature);
}

#[test]
fn extended_entries_need_16_kib() {
    assert_eq!(
        Header::parse("x", FILE, &{
            let mut bytes = image();
            put64(&mut bytes, f::AT_INCOMPATIBLE, f::INCOMPATIBLE_EXTENDED_L2);
            put32(&mut bytes, f::AT_CLUSTER_BITS, 13);
            bytes
        })
        .unwrap_err()
        .code(),
        Code::BadHeader
    );
}

#[test]
fn backing_name_format_and_bitmaps() {
    let mut bytes = image();
    let next = extension(&mut bytes, 112, f::EXTENSION_BACKING_FORMAT, b"qcow2");
    let mut bitmaps = [0; 24];
    put32(&mut bitmaps, 0, 2);
    put64(&mut bitmaps, 8, 64);
    put64(&mut bitmaps, 16, 0x50000);
    let next = extension(&mut bytes, next, f::EXTENSION_BITMAPS, &bitmaps);
    let next = extension(&mut bytes, next, 0x1234_5678, b"unknown and skipped");
    let end = extension(&mut bytes, next, f::EXTENSION_END, &[]);
    bytes[end..end + 4].copy_from_slice(b"base");
    put64(&mut bytes, f::AT_BACKING_OFFSET, end as u64);
    put32(&mut bytes, f::AT_BACKING_LENGTH, 4);
    let header = Header::parse("x", FILE, &bytes).unwrap();
    let backing = header.backing.unwrap();
    assert_eq!((backing.name.as_slice(), backing.format.as_deref()), (&b"base"[..], Some("qcow2")));
    assert!(header.bitmaps.is_none(), "the autoclear bit is clear");
    put64(&mut bytes, f::AT_AUTOCLEAR, f::AUTOCLEAR_BITMAPS);
    assert_eq!(Header::parse("x", FILE, &bytes).unwrap().bitmaps.unwrap().count, 2);
    for (length, code) in [(0, Code::BadHeader), (1024, Code::BadHeader), (u32::MAX, Code::BadHeader)] {
        put32(&mut bytes, f::AT_BACKING_LENGTH, length);
        assert_eq!(code_of(&bytes), code);
    }
    put32(&mut bytes, f::AT_BACKING_LENGTH, 1023);
    put64(&mut bytes, f::AT_BACKING_OFFSET, 65_536 - 1022);
    assert_eq!(code_of(&bytes), Code::BadHeader);
    put64(&mut bytes, f::AT_BACKING_OFFSET, u64::MAX);
    assert_eq!(code_of(&bytes), Code::BadHeader);
}

#[test]
fn the_rest_of_the_cluster_is_asked_for() {
    let mut bytes = image();
    put64(&mut bytes, f::AT_BACKING_OFFSET, 50_000);
    put32(&mut bytes, f::AT_BACKING_LENGTH, 100);
    assert!(parse_prefix("x", FILE, &bytes).unwrap().is_none());
    bytes.resize(65_536, 0);
    assert_eq!(parse_prefix("x", FILE, &bytes).unwrap().unwrap().backing.unwrap().name, [0; 100]);
}

#[test]
fn an_extension_may_not_run_out_of_its_area() {
    let mut bytes = image();
    put32(&mut bytes, 112, 77);
    put32(&mut bytes, 116, u32::MAX);
    assert_eq!(code_of(&bytes), Code::BadHeader);
}

proptest! {
    #[test]
    fn any_bytes_end_in_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..300), length in any::<u64>()) {
        let _ = Header::parse("x", length, &bytes);
    }

    #[test]
    fn mutated_headers_end_in_a_value(
        changes in proptest::collection::vec((0_usize..200, any::<u8>()), 1..12),
        length in prop_oneof![Just(FILE), any::<u64>()],
    ) {
        let mut bytes = image();
        for (at, value) in changes {
            bytes[at] = value;
        }
        if let Ok(header) = Header::parse("x", length, &bytes) {
            prop_assert!(header.l1_bytes() <= f::MAX_L1_BYTES);
            prop_assert!(header.refcount_table_bytes() <= f::MAX_REFCOUNT_TABLE_BYTES);
        }
    }
}
