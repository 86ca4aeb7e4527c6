//! Reads small plain images straight from their bytes: what QEMU would see, without any code of qchain's.

use std::collections::HashMap;
use std::sync::Arc;

use qchain::backend::Backend;
use qchain::backend::memory::MemoryStore;
use qchain::ids::StorePath;

/// Bits 9 to 55: a host offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Which version of which file.
pub type Version = (u64, i128);

/// One image: what it says of each cluster, `None` where it says nothing.
#[derive(Debug)]
pub struct Layer {
    pub backing: Option<String>,
    pub clusters: Vec<Option<Vec<u8>>>,
}

/// Layers that were read before.
#[derive(Debug, Default)]
pub struct Layers(HashMap<Version, Arc<Layer>>);

/// A chain that ends where it should.
pub struct Chain {
    pub paths: Vec<StorePath>,
    pub versions: Vec<Version>,
    layers: Vec<Arc<Layer>>,
}

fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(length)?)?;
    Some(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

fn small(number: u64) -> Option<usize> {
    usize::try_from(number).ok()
}

/// The bytes of a file.
pub fn bytes(store: &MemoryStore, path: &StorePath) -> Option<Vec<u8>> {
    let file = store.open(path).ok()?;
    let mut bytes = vec![0; small(file.stat().ok()?.length)?];
    let count = file.read_at(0, &mut bytes).ok()?;
    bytes.truncate(count);
    Some(bytes)
}

fn cluster(bytes: &[u8]) -> Option<usize> {
    1_usize.checked_shl(u32::try_from(number(bytes, 20, 4)?).ok()?)
}

/// What the tables say of each cluster.
fn entries(bytes: &[u8]) -> Option<Vec<u64>> {
    let (cluster, size) = (cluster(bytes)?, small(number(bytes, 24, 8)?)?);
    let l1_at = small(number(bytes, 40, 8)?)?;
    let entry = |guest: usize| match number(bytes, l1_at + guest / (cluster / 8) * 8, 8)? & OFFSET {
        0 => Some(0),
        table => number(bytes, small(table)? + guest % (cluster / 8) * 8, 8),
    };
    (0..size.div_ceil(cluster)).map(entry).collect()
}

/// The first cluster of which an image holds data: its number, and where that lies in the file.
pub fn first_data(bytes: &[u8]) -> Option<(usize, u64)> {
    let entries = entries(bytes)?.into_iter().enumerate();
    let mut data = entries.filter(|(_, entry)| entry & 1 == 0).map(|(guest, entry)| (guest, entry & OFFSET));
    data.find(|(_, host)| *host != 0)
}

/// Writes another name over that of the backing file, for good; it is as long as the one before.
pub fn rename_backing(store: &MemoryStore, path: &StorePath, name: &str) -> Option<()> {
    let at = number(&bytes(store, path)?, 8, 8)?;
    let file = store.open_writable(path).ok()?;
    file.write_at(at, name.as_bytes()).ok()?;
    file.sync().ok()
}

fn parse(bytes: &[u8]) -> Option<Layer> {
    if bytes.get(..4)? != b"QFI\xfb" || number(bytes, 72, 8)? != 0 {
        return None;
    }
    let (name_at, name_length) = (small(number(bytes, 8, 8)?)?, small(number(bytes, 16, 4)?)?);
    let backing = match name_at {
        0 => None,
        at => Some(String::from_utf8(bytes.get(at..at + name_length)?.to_vec()).ok()?),
    };
    let cluster = cluster(bytes)?;
    let mut clusters = Vec::new();
    for entry in entries(bytes)? {
        clusters.push(match (entry & 1, entry & OFFSET) {
            _ if entry >> 62 & 1 == 1 => return None,
            (1, _) => Some(vec![0; cluster]),
            (_, 0) => None,
            (_, host) => {
                let host = small(host)?;
                let mut data = bytes.get(host..bytes.len().min(host + cluster))?.to_vec();
                data.resize(cluster, 0);
                Some(data)
            }
        });
    }
    Some(Layer { backing, clusters })
}

impl Layers {
    /// One image by its name; what is wrong with it else.
    pub fn layer(&mut self, store: &MemoryStore, path: &StorePath) -> Result<(Version, Arc<Layer>), String> {
        let stat = store.stat(path).map_err(|_| format!("{path} is missing"))?;
        let version = (stat.id.inode, stat.modified_ns);
        if let Some(layer) = self.0.get(&version) {
            return Ok((version, Arc::clone(layer)));
        }
        let layer = bytes(store, path).and_then(|bytes| parse(&bytes));
        let layer = Arc::new(layer.ok_or_else(|| format!("{path} cannot be read"))?);
        self.0.insert(version, Arc::clone(&layer));
        Ok((version, layer))
    }

    /// A member and all below it.
    pub fn chain(&mut self, store: &MemoryStore, path: &StorePath) -> Result<Chain, String> {
        let mut chain = Chain { paths: Vec::new(), versions: Vec::new(), layers: Vec::new() };
        let mut next = Some(path.clone());
        while let Some(path) = next {
            if chain.paths.contains(&path) {
                return Err(format!("{path} reads through itself"));
            }
            let (version, layer) = self.layer(store, &path)?;
            next = layer.backing.as_ref().map(|name| path.parent().join(name).unwrap());
            chain.paths.push(path);
            chain.versions.push(version);
            chain.layers.push(layer);
        }
        Ok(chain)
    }

    /// After a power cut a file may have old bytes under a version that was seen with others.
    pub fn forget(&mut self) {
        self.0.clear();
    }
}

impl Chain {
    /// What a guest reads.
    pub fn view(&self) -> Vec<u8> {
        self.view_of(0)
    }

    /// What a guest reads of the member that is that many below.
    pub fn view_of(&self, depth: usize) -> Vec<u8> {
        let layers = &self.layers[depth..];
        let Some(top) = layers.first() else { return Vec::new() };
        let size = layers.iter().flat_map(|layer| layer.clusters.iter().flatten()).next();
        let size = size.map_or(0, Vec::len);
        let cluster = |index: usize| {
            let found = layers.iter().find_map(|layer| layer.clusters.get(index).and_then(Option::as_ref));
            found.cloned().unwrap_or_else(|| vec![0; size])
        };
        (0..top.clusters.len()).flat_map(cluster).collect()
    }
}
