//! A member's chain, opened: images, the view, random reads.
//!
//! All files are opened before anything is read, so that a merge that publishes meanwhile cannot mix old and
//! new: an open file stays what it was.

use std::sync::Arc;

use rayon::prelude::*;

use crate::backend::BackendError;
use crate::chain::graph::{ChainError, Graph, Key, NodeId};
use crate::chain::view::{Layer, view};
use crate::failure::{Code, Severity};
use crate::qcow2::image::Extents;
use crate::qcow2::layout::SourceFacts;
use crate::qcow2::{Content, Image, ImageError, Run};
use crate::store::Stores;
use crate::store::error::{Result, StoreError};
use crate::store::scan::{Finding, Scan};
use crate::units::GuestOffset;

/// The deepest chain that is read: each layer costs an open file and a table window.
pub const MAX_DEPTH: usize = 10_000;
/// Memory for the table windows of one view, in bytes: shared out among the layers.
const WINDOWS_BYTES: usize = 32 << 20;

/// From how many members on a chain's tables are read ahead, and how much of them, in bytes.
const MANY: usize = 8;
const ANNOUNCED_BYTES: u64 = 1 << 30;

/// One opened image with the size of table window its place in a chain leaves it.
#[derive(Clone, Debug)]
pub struct ImageLayer {
    image: Image,
    window_bytes: usize,
}

impl Layer for ImageLayer {
    type Error = ImageError;
    type Extents = Extents;

    fn virtual_size(&self) -> u64 {
        self.image.header().virtual_size
    }

    fn extents(&self, from: GuestOffset) -> Extents {
        self.image.extents_windowed(from, self.window_bytes)
    }

    fn seek(&self, extents: &mut Extents, to: GuestOffset) {
        extents.seek(to);
    }
}

/// Some neighbouring members of a chain, newest first.
#[derive(Clone, Debug)]
pub struct OpenChain {
    layers: Arc<[ImageLayer]>,
}

impl OpenChain {
    /// Opens a member and all below it; every member must be there and readable.
    pub fn open(stores: &Stores, graph: &Graph, id: NodeId) -> Result<Self> {
        Self::open_upper(stores, graph, id, usize::MAX)
    }

    /// As [`OpenChain::open`], only the newest `count` members of it.
    pub fn open_upper(stores: &Stores, graph: &Graph, id: NodeId, count: usize) -> Result<Self> {
        let ancestors = graph.ancestors(id).and_then(|ancestors| graph.complete(id).map(|()| ancestors));
        let display = stores.display(&graph.node(id).key);
        let ancestors = ancestors.map_err(|source| StoreError::Chain { member: display.clone(), source })?;
        if ancestors.len() >= MAX_DEPTH {
            let detail = format!("its chain has {} members, more than {MAX_DEPTH}", ancestors.len() + 1);
            let source = ImageError::Bad { image: display.clone(), code: Code::TooDeep, detail };
            return Err(StoreError::Image { member: display, source });
        }
        let keys = std::iter::once(id).chain(ancestors).map(|id| &graph.node(id).key);
        let images = keys.take(count).map(|key| open_image(stores, key)).collect::<Result<Vec<_>>>()?;
        Ok(Self::of(images))
    }

    /// Opens a scanned member and all below it; what the scan has found wrong is told in its words.
    pub fn of_member(stores: &Stores, scan: &Scan, id: NodeId) -> Result<Self> {
        if let Err(ChainError::Broken { at, .. }) = scan.graph.complete(id) {
            let (member, at) = (stores.display(&scan.graph.node(id).key), stores.display(&at));
            let is_cause =
                |finding: &&Finding| finding.member == at && finding.code.severity() == Severity::Error;
            if let Some(Finding { code, message, .. }) = scan.findings.iter().find(is_cause) {
                let source = ImageError::Bad { image: at, code: *code, detail: message.clone() };
                return Err(StoreError::Image { member, source });
            }
        }
        Self::open(stores, &scan.graph, id)
    }

    /// A chain of images already open, newest first.
    #[must_use]
    pub fn of(images: Vec<Image>) -> Self {
        let window_bytes = WINDOWS_BYTES / images.len().max(1);
        Self { layers: images.into_iter().map(|image| ImageLayer { image, window_bytes }).collect() }
    }

    /// The first `count` members (newest), and the rest.
    #[must_use]
    pub fn split(&self, count: usize) -> (Self, Self) {
        let (upper, lower) = self.layers.split_at(count.min(self.layers.len()));
        (Self { layers: upper.into() }, Self { layers: lower.into() })
    }

    /// How many members it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Whether it has none: what lies below a full base.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// The images, newest first; the index is the layer in the runs of the view.
    #[must_use]
    pub fn images(&self) -> impl ExactSizeIterator<Item = &Image> {
        self.layers.iter().map(|layer| &layer.image)
    }

    /// The newest member's virtual size in bytes, 0 for no members.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.layers.first().map_or(0, Layer::virtual_size)
    }

    /// What a layout must know of each.
    #[must_use]
    pub fn source_facts(&self) -> Vec<SourceFacts> {
        let facts = |image: &Image| SourceFacts {
            cluster_bits: image.header().cluster_bits,
            compression: image.header().compression,
            virtual_size: image.header().virtual_size,
            file_length: image.file_length(),
        };
        self.images().map(facts).collect()
    }

    /// Tells the stores that the tables of a chain of many members are going to be read: one after the other, each in
    /// pieces of what a window holds, they would be waited for thousands of times.
    pub fn announce_tables(&self) {
        if self.layers.len() >= MANY {
            let most = ANNOUNCED_BYTES / self.layers.len() as u64;
            // Whoever reads them finds what is wrong with them.
            self.layers.par_iter().for_each(|layer| drop(layer.image.announce_tables(most)));
        }
    }

    /// The map of all of the newest member's disk, as far as these members decide it.
    pub fn map(&self) -> impl Iterator<Item = std::result::Result<Run, ImageError>> + use<> {
        self.map_range(GuestOffset(0), GuestOffset(u64::MAX))
    }

    /// The map of a part of it.
    pub fn map_range(
        &self,
        from: GuestOffset,
        to: GuestOffset,
    ) -> impl Iterator<Item = std::result::Result<Run, ImageError>> + use<> {
        view(&self.layers, from, to)
    }

    /// Reads the view; zeros past its end, and where no member says anything.
    pub fn read(&self, at: GuestOffset, buffer: &mut [u8]) -> std::result::Result<(), ImageError> {
        buffer.fill(0);
        for run in self.map_range(at, at.plus(buffer.len() as u64)) {
            let run = run?;
            let from = usize::try_from(run.start.0 - at.0).unwrap_or(usize::MAX);
            let to = from.saturating_add(usize::try_from(run.length).unwrap_or(usize::MAX));
            if let Some(place) = buffer.get_mut(from..to) {
                self.read_run(&run, place)?;
            }
        }
        Ok(())
    }

    /// Reads one run of this chain's map, or the beginning of one; `buffer` is as long as what is wanted.
    pub fn read_run(&self, run: &Run, buffer: &mut [u8]) -> std::result::Result<(), ImageError> {
        match run.content {
            Content::Zero | Content::Below => buffer.fill(0),
            Content::Data { layer, host } => self.image(layer)?.read_data(host, buffer)?,
            Content::Compressed { layer, cluster } => {
                let inflated = self.image(layer)?.read_compressed(&cluster)?;
                let skip = usize::try_from(run.start.0 - cluster.guest.0).unwrap_or(usize::MAX);
                buffer.fill(0);
                let bytes = inflated.get(skip..).unwrap_or_default();
                buffer.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            }
        }
        Ok(())
    }

    fn image(&self, layer: usize) -> std::result::Result<&Image, ImageError> {
        self.layers.get(layer).map(|layer| &layer.image).ok_or_else(|| ImageError::Bad {
            image: "the map".to_owned(),
            code: Code::BadEntry,
            detail: format!("layer {layer} does not exist"),
        })
    }
}

/// Opens the image of a member.
pub fn open_image(stores: &Stores, key: &Key) -> Result<Image> {
    let store = stores.get(key.store)?;
    let display = stores.display(key);
    let file = match store.backend().open(&key.path) {
        Ok(file) => file,
        Err(BackendError::NotFound { .. }) => return Err(StoreError::NotFound { name: display }),
        Err(source) => return Err(StoreError::backend(store, source)),
    };
    Image::open(file, &display).map_err(|source| StoreError::Image { member: display, source })
}
