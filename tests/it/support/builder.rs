//! Builds source images by hand, without the product's own layout, so that faults of one do not cancel out in
//! the other: another order of the file, clusters anywhere, holes, old bytes where nobody may look.

use std::collections::BTreeMap;

use qchain::qcow2::CompressionType;
use qchain::qcow2::compressed::compress;
use qchain::qcow2::format as f;
use qchain::qcow2::refcount::RefcountWidth;
use qchain::units::ClusterBits;

/// How an image is stored.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    pub version: u32,
    pub bits: u32,
    pub order: u32,
    pub extended: bool,
    pub compression: CompressionType,
}

impl Format {
    /// Version 3, 16-bit refcounts, zlib.
    pub fn plain(bits: u32) -> Self {
        Self { version: 3, bits, order: 4, extended: false, compression: CompressionType::Zlib }
    }

    pub fn cluster(&self) -> u64 {
        1 << self.bits
    }

    /// Bytes of the least piece that an entry can speak of.
    pub fn unit(&self) -> u64 {
        if self.extended { self.cluster() / 32 } else { self.cluster() }
    }

    fn entry_bytes(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }
}

/// What a cluster holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cell {
    Below,
    Zero,
    /// Zero, with a host cluster full of old bytes.
    ZeroKept,
    Data,
    Compressed,
    /// Subclusters: allocated bits, zero bits; the rest is below, over old bytes.
    Subs(u32, u32),
}

/// An image to build.
#[derive(Clone, Debug)]
pub struct Spec {
    pub format: Format,
    pub size: u64,
    pub backing: Option<String>,
    pub cells: BTreeMap<u64, Cell>,
    /// What its bytes are made from.
    pub seed: u64,
    /// Clusters lie in no order, with holes between them.
    pub scattered: bool,
    /// Old bytes where the disk has ended and in subclusters that are not allocated.
    pub stale: bool,
}

impl Spec {
    pub fn new(format: Format, size: u64, seed: u64) -> Self {
        Self { format, size, backing: None, cells: BTreeMap::new(), seed, scattered: false, stale: true }
    }

    pub fn cell(mut self, cluster: u64, cell: Cell) -> Self {
        self.cells.insert(cluster, cell);
        self
    }

    /// The bytes of a cluster as they would be stored; compressed ones repeat themselves.
    fn bytes(&self, cluster: u64, cell: &Cell) -> Vec<u8> {
        let size = self.format.cluster();
        let grain = if *cell == Cell::Compressed { 128 } else { 8 };
        let byte = |at: u64| {
            let live = match cell {
                Cell::Subs(allocated, _) => allocated >> ((at % size) / self.format.unit()) & 1 == 1,
                _ => at < self.size,
            };
            if live || self.stale { mix(self.seed, at / grain).to_le_bytes()[0] } else { 0 }
        };
        (cluster * size..(cluster + 1) * size).map(byte).collect()
    }

    /// What a guest reads of this image over `below`.
    pub fn view(&self, below: &[u8]) -> Vec<u8> {
        let mut view = below.to_vec();
        view.resize(usize::try_from(self.size).unwrap(), 0);
        let size = self.format.cluster();
        for (cluster, cell) in &self.cells {
            let bytes = self.bytes(*cluster, cell);
            for (at, byte) in (cluster * size..).zip(bytes).take_while(|(at, _)| *at < self.size) {
                let sub = (at % size) / self.format.unit();
                let place = &mut view[usize::try_from(at).unwrap()];
                match cell {
                    Cell::Zero | Cell::ZeroKept => *place = 0,
                    Cell::Data | Cell::Compressed => *place = byte,
                    Cell::Subs(_, zero) if zero >> sub & 1 == 1 => *place = 0,
                    Cell::Subs(allocated, _) if allocated >> sub & 1 == 1 => *place = byte,
                    Cell::Subs(..) | Cell::Below => {}
                }
            }
        }
        view
    }

    /// The file.
    pub fn build(&self) -> Vec<u8> {
        Building::new(self).finish()
    }
}

/// A well mixed number of two (splitmix64).
pub fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

struct Building<'a> {
    spec: &'a Spec,
    bytes: Vec<u8>,
    counts: Vec<u64>,
    /// L2 entries by guest cluster: both words.
    entries: BTreeMap<u64, (u64, u64)>,
    l1_offset: u64,
    l1_entries: u64,
}

impl<'a> Building<'a> {
    fn new(spec: &'a Spec) -> Self {
        let per_table = spec.format.cluster() / spec.format.entry_bytes();
        let l1_entries = spec.size.div_ceil(per_table * spec.format.cluster());
        let mut building = Self {
            spec,
            bytes: Vec::new(),
            counts: Vec::new(),
            entries: BTreeMap::new(),
            l1_offset: 0,
            l1_entries,
        };
        building.take(1);
        building
    }

    /// New clusters at the end, after a hole now and then.
    fn take(&mut self, clusters: u64) -> u64 {
        let size = self.spec.format.cluster();
        let hole = mix(self.spec.seed, self.counts.len() as u64 + 77) % 4;
        if self.spec.scattered && !self.counts.is_empty() && hole < 2 {
            self.counts.extend(vec![0; usize::try_from(hole).unwrap()]);
        }
        let at = self.counts.len() as u64 * size;
        self.counts.extend(vec![1; usize::try_from(clusters).unwrap()]);
        self.bytes.resize(usize::try_from(self.counts.len() as u64 * size).unwrap(), 0);
        at
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).unwrap();
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put32(&mut self, at: usize, value: u32) {
        self.put(at as u64, &value.to_be_bytes());
    }

    fn put64(&mut self, at: usize, value: u64) {
        self.put(at as u64, &value.to_be_bytes());
    }

    fn finish(mut self) -> Vec<u8> {
        let spec = self.spec;
        let mut cells: Vec<_> = spec.cells.iter().collect();
        if spec.scattered {
            cells.sort_by_key(|(cluster, _)| mix(spec.seed ^ 5, **cluster));
        }
        let (compressed, plain): (Vec<_>, Vec<_>) =
            cells.into_iter().partition(|(_, cell)| **cell == Cell::Compressed);
        let half = plain.len() / 2;
        plain[..half].iter().for_each(|(cluster, cell)| self.plain(**cluster, cell));
        self.compressed(&compressed.iter().map(|(cluster, _)| **cluster).collect::<Vec<_>>());
        self.l1_offset = self.take((self.l1_entries * 8).div_ceil(spec.format.cluster()));
        plain[half..].iter().for_each(|(cluster, cell)| self.plain(**cluster, cell));
        self.tables();
        let (table, clusters) = self.refcounts();
        self.header(table, clusters);
        self.bytes
    }

    fn plain(&mut self, cluster: u64, cell: &Cell) {
        let hosted = match cell {
            Cell::Below | Cell::Zero | Cell::Compressed => false,
            Cell::ZeroKept | Cell::Data => true,
            Cell::Subs(allocated, _) => *allocated != 0,
        };
        let mut host = 0;
        if hosted {
            let at = self.take(1);
            let bytes = self.spec.bytes(cluster, cell);
            self.put(at, &bytes);
            host = at | f::ENTRY_COPIED;
        }
        let extended = self.spec.format.extended;
        let words = match cell {
            Cell::Below | Cell::Compressed => return,
            Cell::Zero | Cell::ZeroKept if extended => (host, u64::from(u32::MAX) << 32),
            Cell::Data if extended => (host, u64::from(u32::MAX)),
            Cell::Zero | Cell::ZeroKept => (host | f::ENTRY_ZERO, 0),
            Cell::Data => (host, 0),
            Cell::Subs(allocated, zero) => (host, u64::from(*zero) << 32 | u64::from(*allocated)),
        };
        self.entries.insert(cluster, words);
    }

    /// Packs compressed clusters byte by byte; what does not shrink is stored plain.
    fn compressed(&mut self, clusters: &[u64]) {
        let format = self.spec.format;
        let (size, most) = (format.cluster(), RefcountWidth::new(format.order).unwrap().max());
        let mut area: Option<(u64, u64)> = None;
        for &cluster in clusters {
            let Some(stream) = compress(format.compression, 3, &self.spec.bytes(cluster, &Cell::Compressed))
            else {
                self.plain(cluster, &Cell::Data);
                continue;
            };
            let length = stream.len() as u64;
            let (at, end) = match area {
                Some((next, end))
                    if next + length <= end && self.counts[usize::try_from(next / size).unwrap()] < most =>
                {
                    self.counts[usize::try_from(next / size).unwrap()] += 1;
                    (next, end)
                }
                _ => {
                    let start = self.take(1);
                    // Streams do not begin at sectors.
                    let skip = if length + 3 <= size { 3 } else { 0 };
                    (start + skip, start + size)
                }
            };
            self.put(at, &stream);
            area = Some((at + length, end));
            let sectors = (at % 512 + length).div_ceil(512) - 1;
            let shift = 62 - (format.bits - 8);
            self.entries.insert(cluster, (f::ENTRY_COMPRESSED | sectors << shift | at, 0));
        }
    }

    fn tables(&mut self) {
        let format = self.spec.format;
        let per_table = format.cluster() / format.entry_bytes();
        let entries = std::mem::take(&mut self.entries);
        let mut tables: BTreeMap<u64, u64> = BTreeMap::new();
        for (cluster, (low, high)) in entries {
            let index = cluster / per_table;
            let table = *tables.entry(index).or_insert_with(|| self.take(1));
            self.put64(usize::try_from(self.l1_offset + 8 * index).unwrap(), table | f::ENTRY_COPIED);
            let at = usize::try_from(table + cluster % per_table * format.entry_bytes()).unwrap();
            self.put64(at, low);
            if format.extended {
                self.put64(at + 8, high);
            }
        }
    }

    /// The refcount table and its length in clusters.
    fn refcounts(&mut self) -> (u64, u64) {
        let format = self.spec.format;
        let per_block = (format.cluster() * 8) >> format.order;
        let used = self.counts.len() as u64;
        // One more of each than needed by far, so that they count themselves.
        let mut blocks = used.div_ceil(per_block);
        let mut clusters = 1;
        while (used + blocks + clusters).div_ceil(per_block) > blocks
            || clusters * format.cluster() < blocks * 8
        {
            blocks = (used + blocks + clusters).div_ceil(per_block);
            clusters = (blocks * 8).div_ceil(format.cluster());
        }
        let size = format.cluster();
        let block = used * size;
        let table = block + blocks * size;
        self.counts.extend(vec![1; usize::try_from(blocks + clusters).unwrap()]);
        self.bytes.resize(usize::try_from(self.counts.len() as u64 * size).unwrap(), 0);
        for index in 0..blocks {
            self.put64(usize::try_from(table + 8 * index).unwrap(), block + index * size);
        }
        let width = RefcountWidth::new(format.order).unwrap();
        let start = usize::try_from(block).unwrap();
        let all = &mut self.bytes[start..start + usize::try_from(blocks * size).unwrap()];
        for (cluster, count) in self.counts.iter().enumerate() {
            width.set(all, cluster, *count).unwrap();
        }
        (table, clusters)
    }

    fn header(&mut self, table: u64, clusters: u64) {
        let format = self.spec.format;
        self.put32(f::AT_MAGIC, f::MAGIC);
        self.put32(f::AT_VERSION, format.version);
        self.put32(f::AT_CLUSTER_BITS, ClusterBits::new(format.bits).unwrap().bits());
        self.put64(f::AT_VIRTUAL_SIZE, self.spec.size);
        self.put32(f::AT_L1_ENTRIES, u32::try_from(self.l1_entries).unwrap());
        self.put64(f::AT_L1_OFFSET, if self.l1_entries == 0 { 0 } else { self.l1_offset });
        self.put64(f::AT_REFCOUNT_TABLE_OFFSET, table);
        self.put32(f::AT_REFCOUNT_TABLE_CLUSTERS, u32::try_from(clusters).unwrap());
        let mut at = 72;
        if format.version == 3 {
            let zstd = format.compression == CompressionType::Zstd;
            self.put64(
                f::AT_INCOMPATIBLE,
                if zstd { f::INCOMPATIBLE_COMPRESSION } else { 0 }
                    | if format.extended { f::INCOMPATIBLE_EXTENDED_L2 } else { 0 },
            );
            self.put32(f::AT_REFCOUNT_ORDER, format.order);
            self.put32(f::AT_HEADER_LENGTH, 112);
            self.put(f::AT_COMPRESSION_TYPE as u64, &[u8::from(zstd)]);
            at = 112;
        }
        if let Some(name) = &self.spec.backing {
            self.put32(at, f::EXTENSION_BACKING_FORMAT);
            self.put32(at + 4, 5);
            self.put(at as u64 + 8, b"qcow2");
            let name_at = at + 24;
            self.put64(f::AT_BACKING_OFFSET, name_at as u64);
            self.put32(f::AT_BACKING_LENGTH, u32::try_from(name.len()).unwrap());
            self.put(name_at as u64, name.as_bytes());
        }
    }
}
