//! What a merge reads: the members that become one, what lies below them, and the image wanted.

use crate::backend::Capabilities;
use crate::chain::delete::Merge;
use crate::chain::graph::NodeId;
use crate::cloudstack::backing::{At, NameMap};
use crate::failure::Code;
use crate::qcow2::layout::hostset::HostSet;
use crate::qcow2::layout::{Backing, ImageOptions, Kept, Layout, Unfit, in_place_possible};
use crate::qcow2::write::clonable;
use crate::qcow2::{Content, Image, ImageError, Run};
use crate::store::Stores;
use crate::store::chain::OpenChain;
use crate::store::error::{Result, StoreError};
use crate::store::scan::Scan;
use crate::units::GuestOffset;

/// One merge with all its files open, so that it reads one state whatever is published meanwhile.
#[derive(Debug)]
pub struct MergeInput {
    /// The survivor (layer 0) and the members merged into it, newest first.
    pub upper: OpenChain,
    /// What stays below.
    pub lower: OpenChain,
    /// The image wanted.
    pub options: ImageOptions,
    /// Whether each layer of `upper` lies on the survivor's store, so that it can be cloned from.
    same_store: Vec<bool>,
    /// Which units of the view hold something, if it is known, and how long a unit is in bytes.
    filled: Option<(HostSet, u64)>,
}

/// How a merge moves its data, and what that costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that are shared by cloning.
    pub clone_bytes: u64,
    /// Runs that are cloned.
    pub clone_runs: u64,
    /// Bytes of data that are written.
    pub data_bytes: u64,
    /// Runs that are copied.
    pub copy_runs: u64,
    /// Bytes of tables that are written.
    pub metadata_bytes: u64,
}

impl Cost {
    /// All bytes that are written.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.data_bytes + self.metadata_bytes
    }

    /// The space that the new file takes, or that a kept one takes more, extents shared with others counted in full.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.written_bytes() + self.clone_bytes
    }
}

/// A run without the units that are known to be zeros, in pieces.
struct Cut<'a> {
    filled: Option<&'a (HostSet, u64)>,
    rest: Option<std::result::Result<Run, ImageError>>,
}

impl Iterator for Cut<'_> {
    type Item = std::result::Result<Run, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        let run = match self.rest.take()? {
            Ok(run) => run,
            error => return Some(error),
        };
        let Some((filled, unit)) = self.filled.filter(|_| matches!(run.content, Content::Data { .. })) else {
            return Some(Ok(run));
        };
        let first = run.start.0 / unit;
        let (count, zero) = match filled.run_from(first) {
            0 => (filled.gap_from(first), true),
            count => (count, false),
        };
        let end = GuestOffset(first.saturating_add(count).saturating_mul(*unit));
        let mut part = run.clip(run.start, end)?;
        self.rest = run.clip(part.end(), run.end()).map(Ok);
        if zero {
            part.content = Content::Zero;
        }
        Some(Ok(part))
    }
}

impl MergeInput {
    /// Opens the survivor's chain and works out the image that replaces it.
    pub fn open(stores: &Stores, scan: &Scan, merge: &Merge) -> Result<Self> {
        let chain = OpenChain::open(stores, &scan.graph, merge.survivor)?;
        let (upper, lower) = chain.split(merge.merged.len() + 1);
        let lower_bytes = lower.virtual_size();
        Self::of(stores, scan, merge, (upper, lower), lower_bytes)
    }

    /// As [`MergeInput::open`], for laying out and costing only: what stays below is not opened, `lower` is empty.
    /// In long chains that is most of the files.
    pub fn open_upper(stores: &Stores, scan: &Scan, merge: &Merge) -> Result<Self> {
        let upper = OpenChain::open_upper(stores, &scan.graph, merge.survivor, merge.merged.len() + 1)?;
        let header = merge.new_parent.and_then(|id| scan.member(id)?.reading.header());
        let lower_bytes = header.map_or(0, |header| header.virtual_bytes);
        Self::of(stores, scan, merge, (upper, OpenChain::of(Vec::new())), lower_bytes)
    }

    fn of(
        stores: &Stores,
        scan: &Scan,
        merge: &Merge,
        (upper, lower): (OpenChain, OpenChain),
        lower_bytes: u64,
    ) -> Result<Self> {
        let survivor = scan.graph.node(merge.survivor);
        let backing = match merge.new_parent {
            Some(parent) => Some(Backing {
                name: backing_name(stores, scan, merge, parent)?,
                format: "qcow2".to_owned(),
                virtual_size: lower_bytes,
            }),
            None => None,
        };
        let Some(image) = upper.images().next() else {
            return Err(StoreError::NotFound { name: stores.display(&survivor.key) });
        };
        let options =
            ImageOptions { opaque: merge.merged_stay, ..ImageOptions::like(image.header(), backing) };
        let newest_first = std::iter::once(merge.survivor).chain(merge.merged.iter().rev().copied());
        let same_store = newest_first.map(|id| scan.graph.node(id).key.store == survivor.key.store).collect();
        Ok(Self { upper, lower, options, same_store, filled: None })
    }

    /// A whole chain that becomes an image of its own. `same_store` says of each member, newest first, whether it can
    /// be cloned from; `filled` tells which units (of so many bytes, a multiple of 64 KiB) of the view are not known to
    /// be zeros, if anything is known.
    #[must_use]
    pub fn standalone(
        chain: OpenChain,
        options: ImageOptions,
        same_store: Vec<bool>,
        filled: Option<(HostSet, u64)>,
    ) -> Self {
        Self { upper: chain, lower: OpenChain::of(Vec::new()), options, same_store, filled }
    }

    /// The map of the members that become one; what is known to be zeros is zeros, whatever holds them.
    pub fn map(&self) -> impl Iterator<Item = std::result::Result<Run, ImageError>> + Send + '_ {
        self.map_range(GuestOffset(0), GuestOffset(u64::MAX))
    }

    /// The map of a part of it.
    pub fn map_range(
        &self,
        from: GuestOffset,
        to: GuestOffset,
    ) -> impl Iterator<Item = std::result::Result<Run, ImageError>> + Send + '_ {
        self.upper
            .map_range(from, to)
            .flat_map(move |run| Cut { filled: self.filled.as_ref(), rest: Some(run) })
    }

    /// Lays the image out: one pass over the tables of the members concerned.
    pub fn layout(&self) -> std::result::Result<Layout, ImageError> {
        Layout::plan(&self.options, &self.upper.source_facts(), self.map())
    }

    /// As [`MergeInput::layout`], with the map as it was read for that, if it has at most so many runs.
    pub fn layout_with_map(
        &self,
        most: usize,
    ) -> std::result::Result<(Layout, Option<Vec<Run>>), ImageError> {
        let mut kept = Some(Vec::new());
        let runs = self.map().inspect(|run| match (&mut kept, run) {
            (Some(runs), Ok(run)) if runs.len() < most => runs.push(*run),
            _ => kept = None,
        });
        let layout = Layout::plan(&self.options, &self.upper.source_facts(), runs)?;
        Ok((layout, kept))
    }

    /// Whether the lowest merged member's file can become the image wanted, as far as headers tell.
    pub fn fits_onto(&self) -> std::result::Result<(), Unfit> {
        let headers: Vec<_> = self.upper.images().map(Image::header).collect();
        match headers.split_last() {
            Some((kept, above)) => in_place_possible(kept, above, &self.options),
            None => Ok(()),
        }
    }

    /// Lays the image out in the file of the lowest merged member, all that is new behind its end. `base` is
    /// where an earlier plan began that has grown the file since, in bytes; `None` before the first.
    /// The result can be costed as any other: what stays costs nothing.
    pub fn layout_onto(&self, base: Option<u64>) -> std::result::Result<Layout, ImageError> {
        let mut facts = self.upper.source_facts();
        let Some((image, source)) = self.upper.images().last().zip(facts.last_mut()) else {
            return self.layout();
        };
        let kept = Kept::of(self.upper.len() - 1, image, base)?;
        source.file_length = source.file_length.min(kept.base);
        Layout::plan_onto(&self.options, &facts, &kept, self.upper.map())
    }

    /// The alignment in bytes that cloning from each layer needs, 0 where it must be copied.
    #[must_use]
    pub fn clone_alignment(&self, capabilities: Option<&Capabilities>) -> Vec<u64> {
        self.alignments(capabilities.filter(|can| can.clone).map_or(0, |can| can.clone_alignment))
    }

    /// As [`MergeInput::clone_alignment`], for a store whose clones need `alignment`; 0: it has none.
    #[must_use]
    pub fn alignments(&self, alignment: u64) -> Vec<u64> {
        self.same_store.iter().map(|same| if *same { alignment } else { 0 }).collect()
    }

    /// What writing the layout costs with those alignments; none at all: everything is copied.
    #[must_use]
    pub fn cost(&self, layout: &Layout, clone_alignment: &[u64]) -> Cost {
        let lengths: Vec<u64> = self.upper.images().map(Image::file_length).collect();
        let mut cost = Cost {
            data_bytes: layout.composed_bytes() + layout.compressed_bytes(),
            metadata_bytes: layout.metadata_bytes(),
            ..Cost::default()
        };
        for run in layout.moves() {
            // What lies behind the end of a file is a hole, and costs nothing.
            let end = lengths.get(run.source).copied().unwrap_or_default();
            let bytes = run.length.min(end.saturating_sub(run.from));
            if clonable(&run, clone_alignment) {
                cost.clone_bytes += bytes;
                cost.clone_runs += 1;
            } else {
                cost.data_bytes += bytes;
                cost.copy_runs += 1;
            }
        }
        cost
    }
}

/// What the survivor's header will call its parent: as it did before if that can be said, else as the lowest
/// merged member did, which names that very parent.
fn backing_name(stores: &Stores, scan: &Scan, merge: &Merge, parent: NodeId) -> Result<Vec<u8>> {
    let names = NameMap::new(stores.iter().map(|(_, store)| store.names()).collect());
    let key = |id: NodeId| &scan.graph.node(id).key;
    let (child, parent) = (key(merge.survivor), key(parent));
    let style = stores.get(child.store)?.config().backing;
    let mut failure = None;
    for user in [Some(merge.survivor), merge.merged.first().copied()].into_iter().flatten() {
        let Some((form, old_store)) = scan.member(user).and_then(|member| member.form.as_ref()) else {
            continue;
        };
        let parent_at = At { store: parent.store, path: &parent.path };
        let child_at = At { store: child.store, path: &child.path };
        match names.name_for(parent_at, child_at, style, form, *old_store) {
            Ok(name) => return Ok(name.into_bytes()),
            Err(error) => failure = failure.or(Some(error.to_string())),
        }
    }
    let member = stores.display(child);
    let detail = failure.unwrap_or_else(|| "the form of its backing name is not known".to_owned());
    let source = ImageError::Bad { image: member.clone(), code: Code::UnknownPrefix, detail };
    Err(StoreError::Image { member, source })
}
