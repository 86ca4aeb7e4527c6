//! A reader of plain qcow2 chains that shares nothing with qchain: QEMU crashes on chains near 900 deep, so
//! deep ones need a second opinion of their own. Straight from the format's text, no cache but whole tables;
//! no compression, no subclusters (a chain that has any fails the test).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bits 9 to 55: a host offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What one member says of one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Its bytes lie there.
    Data(u64),
    /// It is zeros.
    Zero,
}

/// One member: its clusters by guest offset.
pub struct Layer {
    file: File,
    /// Virtual size in bytes.
    pub size: u64,
    /// Cluster size in bytes.
    pub cluster: u64,
    /// The backing name.
    pub backing: Option<String>,
    /// What is not from below, by guest offset.
    pub clusters: BTreeMap<u64, Cluster>,
}

fn read(file: &File, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut done = 0;
    while done < length {
        match file.read_at(&mut bytes[done..], at + done as u64).unwrap() {
            0 => break,
            count => done += count,
        }
    }
    bytes
}

fn be(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A table of 8-byte numbers.
fn table(file: &File, at: u64, entries: u64) -> Vec<u64> {
    let bytes = read(file, at, usize::try_from(entries * 8).unwrap());
    bytes.chunks(8).map(|entry| be(entry, 0, 8)).collect()
}

impl Layer {
    /// Reads a member's header and tables.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let header = read(&file, 0, 112);
        assert_eq!(&header[..4], b"QFI\xfb", "{}", path.display());
        let version = be(&header, 4, 4);
        let features = if version >= 3 { be(&header, 72, 8) } else { 0 };
        assert_eq!(features & !1, 0, "{} needs features this reader has not", path.display());
        let (name_at, name_length) = (be(&header, 8, 8), be(&header, 16, 4));
        let name = read(&file, name_at, usize::try_from(name_length).unwrap());
        let backing = (name_at > 0).then(|| String::from_utf8(name).unwrap());
        let cluster = 1 << be(&header, 20, 4);
        let mut clusters = BTreeMap::new();
        for (index, l1) in (0..).zip(table(&file, be(&header, 40, 8), be(&header, 36, 4))) {
            if l1 & OFFSET == 0 {
                continue;
            }
            for (slot, entry) in (0..).zip(table(&file, l1 & OFFSET, cluster / 8)) {
                let guest = (index * (cluster / 8) + slot) * cluster;
                assert_eq!(entry >> 62 & 1, 0, "{}: compressed at {guest}", path.display());
                if version >= 3 && entry & 1 == 1 {
                    clusters.insert(guest, Cluster::Zero);
                } else if entry & OFFSET != 0 {
                    clusters.insert(guest, Cluster::Data(entry & OFFSET));
                }
            }
        }
        Ok(Self { file, size: be(&header, 24, 8), cluster, backing, clusters })
    }

    /// What this member alone says of `[at, at + length)`, which lies in one cluster; `None`: from below.
    fn own(&self, at: u64, length: u64) -> Option<Vec<u8>> {
        let wanted = usize::try_from(length).unwrap();
        if at >= self.size {
            return Some(vec![0; wanted]);
        }
        let found = self.clusters.get(&(at / self.cluster * self.cluster))?;
        let mut bytes = match found {
            Cluster::Zero => vec![0; wanted],
            Cluster::Data(host) => read(&self.file, host + at % self.cluster, wanted),
        };
        let inside = usize::try_from((self.size - at).min(length)).unwrap();
        bytes[inside..].fill(0);
        Some(bytes)
    }
}

/// A chain, newest first.
pub struct Layers(pub Vec<Layer>);

impl Layers {
    /// Opens a member and all below it; names are relative.
    pub fn open(path: &Path) -> Self {
        Self::try_open(path).unwrap()
    }

    /// The same where names may go meanwhile.
    pub fn try_open(path: &Path) -> io::Result<Self> {
        let mut layers = Vec::new();
        let mut next: Option<PathBuf> = Some(path.to_owned());
        while let Some(path) = next {
            let layer = Layer::open(&path)?;
            next = layer.backing.as_ref().map(|name| path.parent().unwrap().join(name));
            layers.push(layer);
        }
        Ok(Self(layers))
    }

    /// Reads the view. Steps of 512 bytes lie in one cluster of every layer and on one side of every end.
    pub fn read(&self, at: u64, length: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for start in (at..at + length).step_by(512) {
            let step = (at + length - start).min(512);
            let found = self.0.iter().find_map(|layer| layer.own(start, step));
            bytes.extend(found.unwrap_or_else(|| vec![0; usize::try_from(step).unwrap()]));
        }
        bytes
    }
}
