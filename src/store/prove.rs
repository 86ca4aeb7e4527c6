//! The claim *plan* for a new image: parsed again from the store, it resolves to the same sources as the chain
//! that it replaces.

use rayon::prelude::*;

use crate::chain::proof::{Proof, ProofError, Range, prove as prove_maps};
use crate::failure::{Failure as _, with_causes};
use crate::qcow2::check::{Limits, check};
use crate::qcow2::layout::Layout;
use crate::qcow2::{Header, Image, ImageError};
use crate::store::chain::OpenChain;
use crate::store::error::{Result, StoreError};
use crate::store::merge::MergeInput;

/// Bytes compared at once by one thread.
const COMPARE_BYTES: u64 = 1 << 20;

/// Proves that `image`, the sealed result of `layout`, opened anew, replaces the members of `input`. `name` is
/// what messages call the survivor. Reads tables of both sides, and the bytes of what was composed.
///
/// # Errors
///
/// [`StoreError::Proof`] if it does not; what the store or the old chain fails with stays what it is.
pub fn prove(layout: &Layout, input: &MergeInput, image: &Image, name: &str) -> Result<Proof> {
    let failed = |message: String| StoreError::Proof {
        member: name.to_owned(),
        message: format!("the new file was thrown away: {message}"),
    };
    let new_name = image.name().to_owned();
    // What is wrong with the new file itself is a failed proof; what the store or the old chain fails with
    // stays what it is.
    let judged = |error: ImageError| match error {
        error @ (ImageError::Store { .. } | ImageError::Cancelled { .. }) => image_failed(name, error),
        error if error.member() == Some(&new_name) => failed(with_causes(&error)),
        error => image_failed(name, error),
    };
    if let Some(difference) = header_differs(layout, image.header()) {
        return Err(failed(format!("its header has another {difference}")));
    }
    let (sound, proof) = rayon::join(
        || match check(image, &Limits::default()).map_err(judged)? {
            report if report.is_damaged() || report.leaked_clusters > 0 || report.incomplete => {
                let first = report.findings.first().map(|finding| finding.message.clone());
                Err(failed(format!("its structure is not sound: {}", first.unwrap_or_default())))
            }
            _ => Ok(()),
        },
        || {
            let new = OpenChain::of(vec![image.clone()]);
            let above = std::iter::once(image.clone());
            let replacement = OpenChain::of(above.chain(input.lower.images().cloned()).collect());
            let old_view = OpenChain::of(input.upper.images().chain(input.lower.images()).cloned().collect());
            let equal = |ranges: &[Range]| first_difference(&old_view, &replacement, ranges);
            prove_maps(layout, input.map(), new.map(), layout.options().below_end(), equal)
        },
    );
    sound?;
    proof.map_err(|error| match error {
        ProofError::Read(error) => judged(error),
        error => failed(error.to_string()),
    })
}

fn image_failed(name: &str, source: ImageError) -> StoreError {
    StoreError::Image { member: name.to_owned(), source }
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
