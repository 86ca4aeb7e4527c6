//! Merges of chains in memory: what a delete does between the lock and the rename.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use qchain::backend::memory::MemoryStore;
use qchain::backend::{Backend, StoreFile};
use qchain::chain::proof::{Proof, ProofError, prove_moves, prove_part};
use qchain::ids::StorePath;
use qchain::progress::{Cancel, Pace, Silent};
use qchain::qcow2::layout::{Backing, ImageOptions, Layout};
use qchain::qcow2::write::{Sources, Written, write};
use qchain::qcow2::{CompressionType, Image, ImageError};
use qchain::store::chain::OpenChain;
use qchain::units::GuestOffset;

use super::builder::{Cell, Format, Spec, mix};

/// What stores of this kind align clones to.
pub const CLONE_ALIGNMENT: u64 = 4096;

/// A chain in a store, the base first.
#[derive(Debug)]
pub struct Chain {
    pub store: Arc<dyn Backend>,
    pub specs: Vec<Spec>,
    pub images: Vec<Image>,
    pub views: Vec<Vec<u8>>,
    pub clones: bool,
    pub cancel: Cancel,
}

/// The file name of layer `index`.
pub fn layer_name(index: usize) -> String {
    format!("layer{index}")
}

pub fn path(text: &str) -> StorePath {
    StorePath::parse(text).unwrap()
}

/// Puts a file of these bytes into a store.
pub fn put(store: &dyn Backend, name: &str, bytes: &[u8]) -> Arc<dyn StoreFile> {
    let file = store.create(&path(name)).unwrap();
    file.write_at(0, bytes).unwrap();
    file
}

/// All bytes of a file.
pub fn bytes_of(file: &dyn StoreFile) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.stat().unwrap().length).unwrap()];
    assert_eq!(file.read_at(0, &mut bytes).unwrap(), bytes.len());
    bytes
}

impl Chain {
    /// Builds the images; each gets the one before as backing file.
    pub fn build(store: Arc<dyn Backend>, clones: bool, mut specs: Vec<Spec>) -> Self {
        let mut below = Vec::new();
        let (mut images, mut views) = (Vec::new(), Vec::new());
        for (index, spec) in specs.iter_mut().enumerate() {
            spec.backing = index.checked_sub(1).map(layer_name);
            let file = put(&*store, &layer_name(index), &spec.build());
            images.push(Image::open(file, &layer_name(index)).unwrap());
            // A disk of many TiB is nobody's vector.
            if spec.size < 1 << 30 {
                below = spec.view(&below);
                views.push(below.clone());
            }
        }
        Self { store, specs, images, views, clones, cancel: Cancel::default() }
    }

    /// In a store of its own.
    pub fn in_memory(clones: bool, specs: Vec<Spec>) -> Self {
        Self::build(Arc::new(MemoryStore::new().with_clone(clones)), clones, specs)
    }

    /// The members from `top` down to `bottom`, and those below.
    pub fn split(&self, bottom: usize, top: usize) -> (OpenChain, OpenChain) {
        let images: Vec<Image> = self.images[..=top].iter().rev().cloned().collect();
        OpenChain::of(images).split(top - bottom + 1)
    }

    pub fn options(&self, bottom: usize, top: usize) -> ImageOptions {
        let (_, lower) = self.split(bottom, top);
        let backing = bottom.checked_sub(1).map(|below| Backing {
            name: layer_name(below).into_bytes(),
            format: "qcow2".to_owned(),
            virtual_size: lower.virtual_size(),
        });
        ImageOptions::like(self.images[top].header(), backing)
    }

    pub fn plan(&self, bottom: usize, top: usize) -> Result<Layout, ImageError> {
        let (upper, _) = self.split(bottom, top);
        Layout::plan(&self.options(bottom, top), &upper.source_facts(), upper.map())
    }

    /// Merges members `bottom..=top` into a file of that name.
    pub fn merge(&self, bottom: usize, top: usize, name: &str) -> Result<Merged, ImageError> {
        let (upper, lower) = self.split(bottom, top);
        let layout = self.plan(bottom, top)?;
        let file = self.store.create(&path(name)).unwrap();
        let layers: Vec<Image> = upper.images().cloned().collect();
        let sources = Sources {
            layers: &layers,
            clone_alignment: &vec![if self.clones { CLONE_ALIGNMENT } else { 0 }; layers.len()],
            below: &|at, buffer| lower.read(at, buffer),
            progress: &Silent,
            cancel: &self.cancel,
            pace: &Pace::default(),
        };
        let written = write(&layout, &*file, &sources, upper.map())?;
        file.sync().unwrap();
        Ok(Merged { layout, written, file, name: name.to_owned(), upper, lower })
    }
}

/// A merge's result.
#[derive(Debug)]
pub struct Merged {
    pub layout: Layout,
    pub written: Written,
    pub file: Arc<dyn StoreFile>,
    pub name: String,
    pub upper: OpenChain,
    pub lower: OpenChain,
}

impl Merged {
    pub fn image(&self) -> Result<Image, ImageError> {
        Image::open(Arc::clone(&self.file), &self.name)
    }

    /// The result over what lies below.
    pub fn chain(&self) -> Result<OpenChain, ImageError> {
        Ok(OpenChain::of(std::iter::once(self.image()?).chain(self.lower.images().cloned()).collect()))
    }

    /// All that a guest reads of it.
    pub fn view(&self) -> Result<Vec<u8>, ImageError> {
        let chain = self.chain()?;
        let mut view = vec![0; usize::try_from(chain.virtual_size()).unwrap()];
        chain.read(GuestOffset(0), &mut view)?;
        Ok(view)
    }

    /// Parses the file again and proves it.
    pub fn prove(&self) -> Result<Proof, ProofError<ImageError>> {
        let image = self.image().map_err(ProofError::Read)?;
        proof(&self.layout, &self.upper, &self.lower, image)
    }
}

/// Proves that an image over `lower` shows what `upper` does there.
pub fn proof(
    layout: &Layout,
    upper: &OpenChain,
    lower: &OpenChain,
    image: Image,
) -> Result<Proof, ProofError<ImageError>> {
    let below = || lower.images().cloned();
    let old = OpenChain::of(upper.images().cloned().chain(below()).collect());
    let new = OpenChain::of(std::iter::once(image.clone()).chain(below()).collect());
    let alone = OpenChain::of(vec![image]);
    prove_moves(layout)?;
    prove_part(layout, upper.map(), alone.map(), lower.virtual_size(), |ranges| {
        for (at, length) in ranges {
            let length = usize::try_from(*length).unwrap();
            let (mut a, mut b) = (vec![0; length], vec![0; length]);
            old.read(*at, &mut a)?;
            new.read(*at, &mut b)?;
            if a != b {
                return Ok(Some((*at, length as u64)));
            }
        }
        Ok(None)
    })
}

/// A runner that makes the same cases each time, so that a failure can be looked at again.
pub fn seeded(cases: u32) -> TestRunner {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    TestRunner::new_with_rng(Config { cases, failure_persistence: None, ..Config::default() }, rng)
}

/// Any format that QEMU knows.
pub fn format() -> impl Strategy<Value = Format> {
    let bits = prop::sample::select(vec![9u32, 12, 14, 16]);
    (bits, 0u32..=6, any::<bool>(), any::<bool>(), 0u8..4).prop_map(|(bits, order, extended, zstd, old)| {
        if old == 0 {
            return Format { version: 2, ..Format::plain(bits) };
        }
        let compression = if zstd { CompressionType::Zstd } else { CompressionType::Zlib };
        Format { version: 3, bits, order, extended: extended && bits >= 14, compression }
    })
}

/// Any image of one of these sizes.
pub fn spec(sizes: impl Strategy<Value = u64>) -> impl Strategy<Value = Spec> {
    (format(), sizes, shuffle()).prop_map(|(format, size, shuffle)| spec_of(format, size, shuffle))
}

/// What an image of one format and size is made from: seed, scattered, stale, calm.
pub type Shuffle = (u64, bool, bool, u64);

pub fn shuffle() -> impl Strategy<Value = Shuffle> {
    (any::<u64>(), any::<bool>(), any::<bool>(), 1u64..24)
}

/// An image with clusters of all kinds.
pub fn spec_of(format: Format, size: u64, (seed, scattered, stale, calm): Shuffle) -> Spec {
    let mut spec = Spec { scattered, stale, ..Spec::new(format, size, seed) };
    for cluster in 0..size.div_ceil(format.cluster()) {
        // Neighbours are often alike.
        let kind = mix(seed, (cluster + seed % 7) / calm.div_ceil(4) + 1_000_000) % 8;
        let (a, b) = (mix(seed, cluster + 2_000_000), mix(seed, cluster + 3_000_000));
        let low = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap();
        let (allocated, zero) = (low(a & b >> 7), low(b));
        let cell = match kind {
            0 | 1 => Cell::Below,
            2 if format.version == 3 => Cell::Zero,
            3 if format.version == 3 => Cell::ZeroKept,
            4 => Cell::Compressed,
            5 | 6 if format.extended => Cell::Subs(allocated, zero & !allocated),
            _ => Cell::Data,
        };
        spec.cells.insert(cluster, cell);
    }
    spec
}

/// Disk sizes with a liking for edges; whole sectors.
pub fn sizes(most: u64) -> impl Strategy<Value = u64> {
    prop_oneof![
        1 => Just(0u64),
        1 => Just(512u64),
        2 => prop::sample::select(vec![4096u64, 16_384, 65_536, 131_072]).prop_map(move |size| size.min(most)),
        6 => (1..=most / 512).prop_map(|sectors| sectors * 512),
    ]
}
