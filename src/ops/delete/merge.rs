//! One merge: build the survivor's new file, prove it, publish it, let the checkpoint file follow.

use std::sync::Arc;

use rayon::prelude::*;

use crate::backend::{Capabilities, StoreFile};
use crate::chain::delete::Merge;
use crate::chain::proof::{Proof, ProofError, Range, prove};
use crate::change::{Guard, Staged, checkpoint};
use crate::failure::{Code, Failure, with_causes};
use crate::ops::delete::context::Context;
use crate::ops::delete::follow::{has_checkpoint, new_parent_name};
use crate::ops::delete::plan::{Entry, Mode};
use crate::ops::{OpError, Result};
use crate::qcow2::check::{Limits, check};
use crate::qcow2::layout::Layout;
use crate::qcow2::write::{Sources, Written, write};
use crate::qcow2::{Header, Image, ImageError};
use crate::store::Stores;
use crate::store::chain::OpenChain;
use crate::store::facts::Stamp;
use crate::store::merge::MergeInput;
use crate::store::scan::Scan;

/// Bytes compared at once by one thread of the proof.
const COMPARE_BYTES: u64 = 1 << 20;

/// What a merge did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Merged {
    /// What was written.
    pub written: Written,
    /// What was proved.
    pub proof: Proof,
    /// The allocation of the new file in bytes.
    pub allocated_bytes: u64,
}

/// Carries out one merge of the plan, with its input opened before anything of its tree was published.
pub fn execute(context: &Context<'_>, guard: &Guard, entry: &Entry, input: &MergeInput) -> Result<Merged> {
    let Some(merge) = &entry.merge else { return Ok(Merged::default()) };
    let (stores, scan) = (context.stores, context.scan);
    unchanged(stores, scan, merge, input)?;
    let key = &scan.graph.node(merge.survivor).key;
    let store = stores.get(key.store)?;
    let layout = input.layout()?;
    let capabilities: Option<&Capabilities> =
        context.plan.capabilities.get(&key.store).filter(|_| entry.mode == Mode::Clone);
    let alignment = input.clone_alignment(capabilities);
    if input.cost(&layout, &alignment) != entry.cost {
        return Err(changed(stores, scan, merge));
    }
    let images: Vec<Image> = input.upper.images().cloned().collect();
    let Some(old) = images.first() else { return Ok(Merged::default()) };
    let staged = Staged::create(guard, store.backend(), &key.path, old.file().as_ref())
        .map_err(|error| change_error(stores, scan, merge, &error))?;
    let below = |at, buffer: &mut [u8]| input.lower.read(at, buffer);
    let sources = Sources {
        layers: &images,
        clone_alignment: &alignment,
        below: &below,
        progress: context.progress,
        cancel: context.cancel,
    };
    let written = write(&layout, staged.file(), &sources, input.upper.map())?;
    let sealed = staged.seal().map_err(|error| change_error(stores, scan, merge, &error))?;
    let proof = prove_sealed(&layout, input, &sealed, &stores.display(key))?;
    let allocated_bytes = sealed.stat().map(|stat| stat.allocated_bytes).unwrap_or_default();
    context.cancel.check()?;
    unchanged(stores, scan, merge, input)?;
    staged.publish().map_err(|error| change_error(stores, scan, merge, &error))?;
    if has_checkpoint(scan, merge) {
        let followed = checkpoint::follow(guard, store.backend(), &key.path, new_parent_name(scan, merge));
        if !context.force {
            followed.map_err(|error| change_error(stores, scan, merge, &error))?;
        }
    }
    Ok(Merged { written, proof, allocated_bytes })
}

/// The files that were opened are the ones that were planned with, and still have their names.
fn unchanged(stores: &Stores, scan: &Scan, merge: &Merge, input: &MergeInput) -> Result<()> {
    let newest_first = std::iter::once(&merge.survivor).chain(merge.merged.iter().rev());
    for (id, image) in newest_first.zip(input.upper.images()) {
        let key = &scan.graph.node(*id).key;
        let backend = stores.get(key.store)?.backend();
        let planned = scan.member(*id).map(|member| Stamp::from(&member.stat));
        let opened = image.file().stat().ok().as_ref().map(Stamp::from);
        let named = backend.stat(&key.path).ok().as_ref().map(Stamp::from);
        if planned != opened || planned != named {
            let message = "it was changed or replaced by somebody else meanwhile".to_owned();
            let member = stores.display(key);
            return Err(OpError::Refused { code: Code::ChangedMeanwhile, member, message });
        }
    }
    Ok(())
}

/// Parses the sealed file again and proves that it replaces the members it was made from.
fn prove_sealed(
    layout: &Layout,
    input: &MergeInput,
    sealed: &Arc<dyn StoreFile>,
    name: &str,
) -> Result<Proof> {
    let failed = |message: String| OpError::Refused {
        code: Code::ProofFailed,
        member: name.to_owned(),
        message: format!("the new file was thrown away: {message}"),
    };
    let new_name = format!("the new file of {name}");
    // What is wrong with the new file itself is a failed proof; what the store or the old chain fails with
    // stays what it is.
    let judged = |error: ImageError| match error {
        ImageError::Store { .. } | ImageError::Cancelled { .. } => OpError::Image(error),
        error if error.member() == Some(&new_name) => failed(with_causes(&error)),
        error => OpError::Image(error),
    };
    let image = Image::open(sealed.clone(), &new_name).map_err(judged)?;
    if let Some(difference) = header_differs(layout, image.header()) {
        return Err(failed(format!("its header has another {difference}")));
    }
    let report = check(&image, &Limits::default()).map_err(judged)?;
    if report.is_damaged() || report.leaked_clusters > 0 || report.incomplete {
        let first = report.findings.first().map(|finding| finding.message.clone()).unwrap_or_default();
        return Err(failed(format!("its structure is not sound: {first}")));
    }
    let new = OpenChain::of(vec![image.clone()]);
    let replacement = OpenChain::of(std::iter::once(image).chain(input.lower.images().cloned()).collect());
    let old_view = OpenChain::of(input.upper.images().chain(input.lower.images()).cloned().collect());
    let equal = |ranges: &[Range]| first_difference(&old_view, &replacement, ranges);
    prove(layout, input.upper.map(), new.map(), input.lower.virtual_size(), equal).map_err(
        |error| match error {
            ProofError::Read(error) => judged(error),
            error => failed(error.to_string()),
        },
    )
}

/// The first field in which a new header is not what was planned.
fn header_differs(layout: &Layout, header: &Header) -> Option<&'static str> {
    let options = layout.options();
    let backing = header.backing.as_ref().map(|backing| (backing.name.as_slice(), backing.format.as_deref()));
    let wanted =
        options.backing.as_ref().map(|backing| (backing.name.as_slice(), Some(backing.format.as_str())));
    [
        (header.version == layout.version(), "version"),
        (header.cluster_bits == options.cluster_bits, "cluster size"),
        (header.virtual_size == options.virtual_size, "virtual size"),
        (header.refcount_order == options.refcount_order, "refcount width"),
        (header.extended_l2 == options.extended_l2, "form of L2 entries"),
        (header.compression == options.compression, "compression type"),
        (backing == wanted, "backing file"),
        (!header.dirty && header.snapshot_count == 0 && header.bitmaps.is_none(), "state"),
    ]
    .into_iter()
    .find_map(|(same, field)| (!same).then_some(field))
}

/// Reads guest ranges through both chains, in parallel.
fn first_difference(
    old: &OpenChain,
    new: &OpenChain,
    ranges: &[Range],
) -> std::result::Result<Option<Range>, ImageError> {
    let differs = |range: &Range| -> std::result::Result<Option<Range>, ImageError> {
        let (start, length) = *range;
        let mut done = 0;
        while done < length {
            let step = (length - done).min(COMPARE_BYTES);
            let size = usize::try_from(step).unwrap_or_default();
            let (mut a, mut b) = (vec![0; size], vec![0; size]);
            old.read(start.plus(done), &mut a)?;
            new.read(start.plus(done), &mut b)?;
            if a != b {
                return Ok(Some((start.plus(done), step)));
            }
            done += step;
        }
        Ok(None)
    };
    let found: Vec<Option<Range>> =
        ranges.par_iter().map(differs).collect::<std::result::Result<_, ImageError>>()?;
    Ok(found.into_iter().flatten().next())
}

fn changed(stores: &Stores, scan: &Scan, merge: &Merge) -> OpError {
    OpError::Refused {
        code: Code::ChangedMeanwhile,
        member: stores.display(&scan.graph.node(merge.survivor).key),
        message: "its map is not the one that was planned with".to_owned(),
    }
}

fn change_error(stores: &Stores, scan: &Scan, merge: &Merge, error: &crate::change::ChangeError) -> OpError {
    OpError::Refused {
        code: error.code(),
        member: stores.display(&scan.graph.node(merge.survivor).key),
        message: with_causes(error),
    }
}
