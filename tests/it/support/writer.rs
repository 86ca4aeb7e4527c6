//! Small qcow2 images written straight from the format's text: a thousand of them in a second, where a
//! thousand calls of qemu-img take half a minute.

use std::collections::BTreeMap;
use std::path::Path;

/// 64 KiB clusters.
pub const CLUSTER: u64 = 65_536;

/// The flag of a cluster that is referred to once.
const COPIED: u64 = 1 << 63;

/// What a member says of one guest cluster.
#[derive(Clone, Copy, Debug)]
pub enum Says {
    /// Filled with this byte.
    Byte(u8),
    /// Zeros, by flag.
    Zero,
}

fn put(bytes: &mut [u8], at: u64, value: u64, length: usize) {
    let at = usize::try_from(at).unwrap();
    bytes[at..at + length].copy_from_slice(&value.to_be_bytes()[8 - length..]);
}

/// Writes a version 3 image of one L2 table (up to 512 MiB): header, refcount table and block, L1, L2, data.
pub fn write(path: &Path, size: u64, backing: Option<&str>, says: &BTreeMap<u64, Says>) {
    assert!(size <= CLUSTER * CLUSTER / 8);
    let data = says.values().filter(|says| matches!(says, Says::Byte(_))).count() as u64;
    let used = 5 + data;
    let mut bytes = vec![0; usize::try_from(used * CLUSTER).unwrap()];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    let fields = [
        (4, 4, 3),
        (20, 4, 16),
        (24, 8, size),
        (36, 4, 1),
        (40, 8, 3 * CLUSTER),
        (48, 8, CLUSTER),
        (56, 4, 1),
        (96, 4, 4),
        (100, 4, 104),
    ];
    for (at, length, value) in fields {
        put(&mut bytes, at, value, length);
    }
    if let Some(name) = backing {
        put(&mut bytes, 104, 0xe279_2aca, 4);
        put(&mut bytes, 108, 5, 4);
        bytes[112..117].copy_from_slice(b"qcow2");
        put(&mut bytes, 8, 512, 8);
        put(&mut bytes, 16, name.len() as u64, 4);
        bytes[512..512 + name.len()].copy_from_slice(name.as_bytes());
    }
    put(&mut bytes, CLUSTER, 2 * CLUSTER, 8);
    for index in 0..used {
        put(&mut bytes, 2 * CLUSTER + 2 * index, 1, 2);
    }
    put(&mut bytes, 3 * CLUSTER, (4 * CLUSTER) | COPIED, 8);
    let mut next = 5 * CLUSTER;
    for (index, says) in says {
        match says {
            Says::Zero => put(&mut bytes, 4 * CLUSTER + 8 * index, 1, 8),
            Says::Byte(byte) => {
                put(&mut bytes, 4 * CLUSTER + 8 * index, next | COPIED, 8);
                let from = usize::try_from(next).unwrap();
                bytes[from..from + usize::try_from(CLUSTER).unwrap()].fill(*byte);
                next += CLUSTER;
            }
        }
    }
    std::fs::write(path, bytes).unwrap();
}
