//! Merges into the file of the lowest merged member, of whatever chain.

use std::sync::Arc;

use qchain::backend::{Backend, StoreFile};
use qchain::chain::proof::{Proof, ProofError};
use qchain::progress::{Cancel, Pace, Silent};
use qchain::qcow2::layout::{Backing, ImageOptions, Kept, Layout, in_place_possible};
use qchain::qcow2::write::{Sources, Written, write_onto};
use qchain::qcow2::{Image, ImageError};
use qchain::store::chain::OpenChain;
use qchain::units::GuestOffset;

use super::merging::{CLONE_ALIGNMENT, path, proof};

/// The files of one merge as a process that begins now finds them.
#[derive(Debug)]
pub struct Onto {
    pub upper: OpenChain,
    pub lower: OpenChain,
    pub options: ImageOptions,
    pub target: Arc<dyn StoreFile>,
    pub clones: bool,
}

/// Opens members by name, newest first.
pub fn open_chain(store: &dyn Backend, names: &[String]) -> OpenChain {
    let open = |name: &String| Image::open(store.open(&path(name)).unwrap(), name).unwrap();
    OpenChain::of(names.iter().map(open).collect())
}

/// All that a guest reads.
pub fn view(chain: &OpenChain) -> Vec<u8> {
    let mut view = vec![0; usize::try_from(chain.virtual_size()).unwrap()];
    chain.read(GuestOffset(0), &mut view).unwrap();
    view
}

impl Onto {
    /// The newest `merged` of these members, newest first, are to become the last of them.
    pub fn open(store: &dyn Backend, names: &[String], merged: usize, clones: bool) -> Self {
        let (upper, lower) = open_chain(store, names).split(merged);
        let headers: Vec<_> = upper.images().map(Image::header).collect();
        let backing = headers[merged - 1].backing.as_ref().map(|backing| Backing {
            name: backing.name.clone(),
            format: backing.format.clone().unwrap(),
            virtual_size: lower.virtual_size(),
        });
        let options = ImageOptions::like(headers[0], backing);
        assert_eq!(in_place_possible(headers[merged - 1], &headers[..merged - 1], &options), Ok(()));
        let target = store.open_writable(&path(&names[merged - 1])).unwrap();
        Self { upper, lower, options, target, clones }
    }

    pub fn kept(&self) -> &Image {
        self.upper.images().last().unwrap()
    }

    pub fn plan(&self, base: Option<u64>) -> Result<Layout, ImageError> {
        let mut facts = self.upper.source_facts();
        let kept = Kept::of(facts.len() - 1, self.kept(), base)?;
        let source = facts.last_mut().unwrap();
        source.file_length = source.file_length.min(kept.base);
        Layout::plan_onto(&self.options, &facts, &kept, self.upper.map())
    }

    pub fn write(&self, layout: &Layout) -> Result<Written, ImageError> {
        let layers: Vec<Image> = self.upper.images().cloned().collect();
        let sources = Sources {
            layers: &layers,
            clone_alignment: &vec![if self.clones { CLONE_ALIGNMENT } else { 0 }; layers.len()],
            below: &|at, buffer| self.lower.read(at, buffer),
            progress: &Silent,
            cancel: &Cancel::default(),
            pace: &Pace::default(),
        };
        write_onto(layout, &*self.target, &sources, self.upper.map())
    }

    /// The image that the file is going to be, before its header is switched.
    pub fn image_to_be(&self, layout: &Layout) -> Image {
        Image::open_switched(Arc::clone(&self.target), "to be", layout.switch().unwrap()).unwrap()
    }

    /// An image over what lies below.
    pub fn over_lower(&self, image: Image) -> OpenChain {
        OpenChain::of(std::iter::once(image).chain(self.lower.images().cloned()).collect())
    }

    pub fn prove(&self, layout: &Layout) -> Result<Proof, ProofError<ImageError>> {
        proof(layout, &self.upper, &self.lower, self.image_to_be(layout))
    }
}
