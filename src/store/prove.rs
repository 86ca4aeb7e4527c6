//! The claim *plan* for a new image: parsed again from the store, it resolves to the same sources as the chain
//! that it replaces.

use rayon::prelude::*;

use crate::chain::proof::{Proof, ProofError, Range, prove_moves, prove_part};
use crate::failure::{Failure as _, with_causes};
use crate::qcow2::check::{Limits, check};
use crate::qcow2::layout::Layout;
use crate::qcow2::{Header, Image, ImageError};
use crate::store::chain::OpenChain;
use crate::store::error::{Result, StoreError};
use crate::store::merge::MergeInput;
use crate::units::GuestOffset;

/// Bytes compared at once by one thread.
const COMPARE_BYTES: u64 = 1 << 20;
/// The disk is proved in parts of a multiple of so many bytes, side by side: no cluster is larger.
const PART_BYTES: u64 = 64 << 20;
/// Chains of more members are proved in one part: each part has table windows of all of them.
const MOST_MEMBERS_IN_PARTS: usize = 8;

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
            prove_moves(layout)?;
            let parts = parts(layout.options().virtual_size, input.upper.len());
            let proofs: Vec<std::result::Result<Proof, ProofError<ImageError>>> = parts
                .into_par_iter()
                .map(|(from, to)| {
                    let (old, new) = (input.map_range(from, to), new.map_range(from, to));
                    prove_part(layout, old, new, layout.options().below_end(), equal)
                })
                .collect();
            proofs.into_iter().try_fold(Proof::default(), |mut all, one| {
                all += one?;
                Ok(all)
            })
        },
    );
    sound?;
    proof.map_err(|error| match error {
        ProofError::Read(error) => judged(error),
        error => failed(error.to_string()),
    })
}

/// `[from, to)` of the parts in which the disk is proved; the last has no end, so that a map that goes on behind the disk's end
/// is seen.
fn parts(virtual_size: u64, members: usize) -> Vec<(GuestOffset, GuestOffset)> {
    let most = if members > MOST_MEMBERS_IN_PARTS { 1 } else { rayon::current_num_threads() as u64 };
    cut(virtual_size, most)
}

fn cut(virtual_size: u64, most: u64) -> Vec<(GuestOffset, GuestOffset)> {
    let length = virtual_size.div_ceil(most).max(1).checked_next_multiple_of(PART_BYTES).unwrap_or(u64::MAX);
    let starts =
        (0..most).map(|part| part.saturating_mul(length)).take_while(|at| *at == 0 || *at < virtual_size);
    let mut parts: Vec<(GuestOffset, GuestOffset)> =
        starts.map(|at| (GuestOffset(at), GuestOffset(at.saturating_add(length)))).collect();
    if let Some((_, end)) = parts.last_mut() {
        *end = GuestOffset(u64::MAX);
    }
    parts
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

#[cfg(test)]
mod tests {
    use super::{PART_BYTES, cut};
    use crate::units::GuestOffset;

    #[test]
    fn the_parts_are_the_disk_and_all_behind_it() {
        let sizes =
            [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 7 * PART_BYTES, u64::MAX - 1, u64::MAX];
        for (size, most) in sizes.into_iter().flat_map(|size| [1, 2, 3, 8, 64].map(|most| (size, most))) {
            let parts = cut(size, most);
            let context = format!("{size} in {most}: {parts:?}");
            assert!(!parts.is_empty() && parts.len() as u64 <= most, "{context}");
            assert_eq!(
                (parts[0].0, parts[parts.len() - 1].1),
                (GuestOffset(0), GuestOffset(u64::MAX)),
                "{context}"
            );
            assert!(parts.windows(2).all(|pair| pair[0].1 == pair[1].0), "{context}");
            assert!(parts.iter().all(|(from, to)| from < to && from.0 % PART_BYTES == 0), "{context}");
        }
        assert_eq!(cut(7 * PART_BYTES, 3).len(), 3);
    }
}
