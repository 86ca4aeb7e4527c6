//! One merge up to the decision: build the survivor's new file, prove it. Of a merge in place only the plan is
//! made: its bytes are written after the decision.

use crate::backend::Capabilities;
use crate::chain::delete::Merge;
use crate::chain::proof::Proof;
use crate::change::record::{InPlace, Mark, Publication};
use crate::change::{ChangeError, Operation, Sealed};
use crate::failure::{Code, Failure, with_causes};
use crate::ops::delete::context::Context;
use crate::ops::delete::plan::{Entry, Mode};
use crate::ops::{OpError, Result};
use crate::qcow2::layout::Layout;
use crate::qcow2::write::{Sources, Written, clonable, write};
use crate::qcow2::{Image, ImageError};
use crate::store::Stores;
use crate::store::attest::{Attestor, Carried, Knowledge, Made};
use crate::store::facts::Stamp;
use crate::store::merge::MergeInput;
use crate::store::prove::prove;
use crate::store::scan::Scan;

/// A merge that is ready to be decided.
#[derive(Debug)]
pub struct Built {
    /// How it is to be published.
    pub publication: Publication,
    /// What was written.
    pub written: Written,
    /// What was proved.
    pub proof: Proof,
    /// The allocation of the new file in bytes.
    pub allocated_bytes: u64,
    /// What was proved beside the plan, or why nothing was.
    pub attested: Carried,
}

/// Builds one merge of the plan, with its input opened before anything of its tree was changed. `index` tells
/// its files from others of the operation.
pub fn build(
    context: &Context<'_>,
    operation: &Operation<'_>,
    entry: &Entry,
    merge: &Merge,
    input: &MergeInput,
    index: usize,
) -> Result<Built> {
    let (stores, scan) = (context.stores, context.scan);
    unchanged(stores, scan, merge, input)?;
    let made;
    // The files are the ones that a kept layout was planned from, by their stamps; and the proof reads their maps.
    let layout = if let Some(planned) = &entry.layout {
        planned
    } else {
        made = if entry.mode == Mode::InPlace { input.layout_onto(None)? } else { input.layout()? };
        &made
    };
    let key = &scan.graph.node(merge.survivor).key;
    let capabilities: Option<&Capabilities> =
        context.plan.capabilities.get(&key.store).filter(|can| entry.mode != Mode::Copy && can.clone);
    let alignment = input.clone_alignment(capabilities);
    if input.cost(layout, &alignment) != entry.cost {
        return Err(changed(stores, scan, merge));
    }
    if entry.mode == Mode::InPlace {
        let alignment = capabilities.map_or(0, |can| can.clone_alignment);
        // Damage is refused here; the rest is said again by what is written after the decision.
        let knowledge = Attestor::open(stores, scan, &context.plan.shelves, merge, input, None)?;
        let mut built = plan_in_place(context, operation, merge, input, layout, index, alignment)?;
        if let Knowledge::Missing(why) = knowledge {
            built.attested = Carried::Lost(why);
        }
        return Ok(built);
    }
    // What is known is looked up while the file is made: both wait for the store.
    let (knowledge, file) = rayon::join(
        || Attestor::open(stores, scan, &context.plan.shelves, merge, input, None),
        || make(context, operation, merge, input, (layout, &alignment), index),
    );
    let (File { written, sealed, image, proof }, knowledge) = (file?, knowledge?);
    let made = Made {
        input,
        layout,
        new: &image,
        alignment: &alignment,
        now_ns: context.site.clock.wall_ns(),
        cancel: context.cancel,
        pace: &context.site.pace,
    };
    let attested = knowledge.carry(stores.get(key.store)?, &made)?;
    context.cancel.check()?;
    unchanged(stores, scan, merge, input)?;
    let allocated_bytes = sealed.allocated_bytes;
    Ok(Built { publication: sealed.publication, written, proof, allocated_bytes, attested })
}

/// A survivor's new file, sealed and proved.
struct File {
    written: Written,
    sealed: Sealed,
    image: Image,
    proof: Proof,
}

/// Writes, seals and proves the survivor's new file.
fn make(
    context: &Context<'_>,
    operation: &Operation<'_>,
    merge: &Merge,
    input: &MergeInput,
    (layout, alignment): (&Layout, &[u64]),
    index: usize,
) -> Result<File> {
    let (stores, scan) = (context.stores, context.scan);
    let key = &scan.graph.node(merge.survivor).key;
    let images: Vec<Image> = input.upper.images().cloned().collect();
    let Some(old) = images.first() else { return Err(changed(stores, scan, merge)) };
    let failed = |error| change_error(stores, scan, merge, &error);
    let staged = operation.stage(key, &format!("{index}.image"), old.file().as_ref()).map_err(failed)?;
    reserve(layout, &staged, alignment, &stores.display(key))?;
    let below = |at, buffer: &mut [u8]| input.lower.read(at, buffer);
    let sources = Sources {
        layers: &images,
        clone_alignment: alignment,
        below: &below,
        progress: context.progress,
        cancel: context.cancel,
        pace: &context.site.pace,
    };
    let written = write(layout, staged.file(), &sources, input.upper.map())?;
    let sealed = staged.seal(context.site).map_err(failed)?;
    let name = stores.display(key);
    let image = Image::open(sealed.file.clone(), &format!("the new file of {name}"))
        .map_err(|error| proof_failed(&name, error))?;
    let proof = prove(layout, input, &image, &name)?;
    Ok(File { written, sealed, image, proof })
}

/// A new file that cannot even be opened is a failed proof; a failing store is that.
fn proof_failed(name: &str, error: ImageError) -> OpError {
    match error {
        error @ ImageError::Store { .. } => OpError::Image(error),
        error => OpError::Refused {
            code: Code::ProofFailed,
            member: name.to_owned(),
            message: format!("the new file was thrown away: {}", with_causes(&error)),
        },
    }
}

/// Takes the space for all that will be written, so that running out of it shows before the first byte. What
/// is cloned takes none.
fn reserve(layout: &Layout, staged: &crate::change::Staged, alignment: &[u64], name: &str) -> Result<()> {
    let failed = |source| OpError::Image(ImageError::Store { image: name.to_owned(), source });
    let mut at = 0;
    for run in layout.moves().filter(|run| clonable(run, alignment)) {
        if run.to > at && !staged.file().reserve(at, run.to - at).map_err(failed)? {
            return Ok(());
        }
        at = run.to + run.length;
    }
    if layout.file_length() > at {
        staged.file().reserve(at, layout.file_length() - at).map_err(failed)?;
    }
    Ok(())
}

/// What a merge in place will do, for the record.
fn plan_in_place(
    context: &Context<'_>,
    operation: &Operation<'_>,
    merge: &Merge,
    input: &MergeInput,
    layout: &Layout,
    index: usize,
    clone_alignment: u64,
) -> Result<Built> {
    let (stores, scan, site) = (context.stores, context.scan, context.site);
    let failed = |error| change_error(stores, scan, merge, &error);
    let place = |id| site.place(&scan.graph.node(id).key).map_err(failed);
    let (Some(survivor), Some(lowest), Some((_, base)), Some(switch)) =
        (input.upper.images().next(), input.upper.images().last(), layout.kept(), layout.switch())
    else {
        return Err(changed(stores, scan, merge));
    };
    let stat = |image: &Image| {
        let name = image.name().to_owned();
        image.file().stat().map_err(|source| OpError::Image(ImageError::Store { image: name, source }))
    };
    let (old, new) = (Mark::from(&stat(survivor)?), Mark::from(&stat(lowest)?));
    let key = &scan.graph.node(merge.survivor).key;
    let what = format!("{index}.image");
    // Whether the survivor's owner and attributes can be given to another file must be known by now.
    let trial = operation.stage(key, &format!("{index}.trial"), survivor.file().as_ref()).map_err(failed)?;
    trial.discard(site).map_err(failed)?;
    let members = merge.merged.iter().chain([&merge.survivor]).map(|id| place(*id)).collect::<Result<_>>()?;
    let plan = InPlace {
        members,
        length: new.length,
        base,
        clone_alignment,
        new_parent: merge.new_parent.map(place).transpose()?,
        switch: switch.clone(),
    };
    let publication = Publication {
        at: place(merge.survivor)?,
        from: operation.temporary(key, &what).map_err(failed)?,
        new,
        old,
        kept: operation.kept(key, &what).map_err(failed)?,
        in_place: Some(plan),
    };
    let attested = Carried::Nothing;
    Ok(Built {
        publication,
        written: Written::default(),
        proof: Proof::default(),
        allocated_bytes: 0,
        attested,
    })
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

fn changed(stores: &Stores, scan: &Scan, merge: &Merge) -> OpError {
    OpError::Refused {
        code: Code::ChangedMeanwhile,
        member: stores.display(&scan.graph.node(merge.survivor).key),
        message: "its map is not the one that was planned with".to_owned(),
    }
}

fn change_error(stores: &Stores, scan: &Scan, merge: &Merge, error: &ChangeError) -> OpError {
    OpError::Refused {
        code: error.code(),
        member: stores.display(&scan.graph.node(merge.survivor).key),
        message: with_causes(error),
    }
}
