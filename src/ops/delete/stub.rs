//! The empty image that takes a deleted member's name.

use crate::chain::graph::NodeId;
use crate::change::Operation;
use crate::change::record::Stub;
use crate::failure::Code;
use crate::ops::delete::context::Context;
use crate::ops::{OpError, Result};
use crate::progress::Silent;
use crate::qcow2::check::{Limits, check};
use crate::qcow2::layout::{Backing, ImageOptions, Layout};
use crate::qcow2::write::{Sources, write};
use crate::qcow2::{Content, Image, ImageError, Run};
use crate::store::StoreError;
use crate::store::chain::OpenChain;
use crate::units::GuestOffset;

/// Makes a member's stub: as its own header is, with the same backing name, without data. Durable, parsed again
/// from the store and found empty. `what` tells it from the operation's other files.
pub fn make(context: &Context<'_>, operation: &Operation<'_>, member: NodeId, what: &str) -> Result<Stub> {
    let key = &context.scan.graph.node(member).key;
    let store = context.stores.get(key.store)?;
    let name = context.stores.display(key);
    let file = store.backend().open(&key.path).map_err(|source| StoreError::backend(store, source))?;
    let header = Image::open(file.clone(), &name)?.header().clone();
    let backing = header.backing.as_ref().map(|backing| Backing {
        name: backing.name.clone(),
        format: backing.format.clone().unwrap_or_else(|| "qcow2".to_owned()),
        virtual_size: header.virtual_size,
    });
    let mut options = ImageOptions::like(&header, backing);
    options.stub = Some(store.writable_record()?.id.clone());
    let kind = if options.backing.is_some() { Content::Below } else { Content::Zero };
    let run = Run { start: GuestOffset(0), length: header.virtual_size, content: kind };
    let runs = || (run.length > 0).then_some(Ok(run)).into_iter();
    let layout = Layout::plan(&options, &[], runs())?;
    let staged = operation.stage(key, what, file.as_ref())?;
    let sources = Sources {
        layers: &[],
        clone_alignment: &[],
        below: &|_, _| Ok(()),
        progress: &Silent,
        cancel: context.cancel,
        pace: &context.site.pace,
    };
    write(&layout, staged.file(), &sources, runs())?;
    let sealed = staged.seal(context.site)?;
    let wrong = |detail: String| OpError::Refused {
        code: Code::ProofFailed,
        member: name.clone(),
        message: format!("its stub was thrown away: {detail}"),
    };
    let image = Image::open(sealed.file, &format!("the stub of {name}"))?;
    let report = check(&image, &Limits::default())?;
    let same = |header: &crate::qcow2::Header| {
        (header.virtual_size, &header.stub) == (options.virtual_size, &options.stub)
            && header.backing.as_ref().map(|backing| &backing.name)
                == options.backing.as_ref().map(|backing| &backing.name)
    };
    if !same(image.header()) || report.is_damaged() || !holds_nothing(&image).map_err(OpError::from)? {
        return Err(wrong("it is not what was written".to_owned()));
    }
    Ok(Stub { from: sealed.publication.from, mark: sealed.publication.new })
}

/// Whether an image has no data and no zeros of its own. Reads its tables.
pub fn holds_nothing(image: &Image) -> std::result::Result<bool, ImageError> {
    for run in OpenChain::of(vec![image.clone()]).map() {
        match run?.content {
            Content::Below => {}
            Content::Zero if image.header().backing.is_none() => {}
            _ => return Ok(false),
        }
    }
    Ok(true)
}
