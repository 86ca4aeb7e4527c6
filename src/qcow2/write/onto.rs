//! Writes a planned image behind the end of a file that is kept, and makes the file that image.
//!
//! Until [`switch`] nothing that the file's old header refers to has changed: whatever part of the work was
//! done when it stopped, the file is the image it was, and [`write_onto`] may be done again with the same plan.
//! The switch is one write inside the first sector. After it the file is the new image, whose every byte was
//! durable before.

use crate::backend::{StoreFile, read_padded};
use crate::failure::Code;
use crate::qcow2::error::{ImageError, Result};
use crate::qcow2::image::Image;
use crate::qcow2::layout::{Layout, Switch, Switched};
use crate::qcow2::map::Run;
use crate::qcow2::write::{Sources, Written, fill, store_error};

/// Writes all of the image but the header into the file that the layout keeps, and syncs once: the old header
/// names nothing of it, so there is no order to keep.
///
/// `runs` gives the very map that the layout was planned from. A file that an earlier attempt with the
/// same plan has grown is written again, whole, to the same bytes: the kept layer is read as it was, up to
/// the base. Fails with `changed-meanwhile` if the file ends before the base or behind the plan's end; with
/// `mode-impossible` for a layout that keeps no file. After any failure the file is still the old image.
pub fn write_onto(
    layout: &Layout,
    target: &dyn StoreFile,
    sources: &Sources<'_>,
    runs: impl Iterator<Item = Result<Run>> + Send,
) -> Result<Written> {
    let Some((kept, base)) = layout.kept() else {
        return Err(refuse(target, Code::ModeImpossible, "the plan is one for a file of its own"));
    };
    let length = target.stat().map_err(|source| store_error(target, source))?.length;
    if layout.options().cluster_bits.round_up(length) < base || length > layout.file_length() {
        return Err(refuse(target, Code::ChangedMeanwhile, "it has another length than it was planned with"));
    }
    // What lies behind the base now was not there when the plan was made.
    let cut = |(index, image): (usize, &Image)| {
        if index == kept { image.ending_at(base) } else { image.clone() }
    };
    let layers: Vec<Image> = sources.layers.iter().enumerate().map(cut).collect();
    let sources = Sources { layers: &layers, ..*sources };
    if length < layout.file_length() {
        target.set_length(layout.file_length()).map_err(|source| store_error(target, source))?;
    }
    let (written, _) = fill(layout, target, &sources, runs)?;
    target.sync().map_err(|source| store_error(target, source))?;
    Ok(written)
}

/// Which image a file is. Errors: the store's.
pub fn switch_state(switch: &Switch, file: &dyn StoreFile) -> Result<Switched> {
    let mut bytes = vec![0; switch.new.len()];
    read_padded(file, switch.at, &mut bytes).map_err(|source| store_error(file, source))?;
    Ok(switch.state(&bytes))
}

/// Makes the kept file the new image: one write of at most 60 bytes inside the first sector, and a sync. All
/// of [`write_onto`] must have succeeded and been proved before.
///
/// May be done again; a file that is neither image is left alone (`changed-meanwhile`). When this fails or is
/// cut off, the file is the old image or the new one, which [`switch_state`] tells.
pub fn switch(switch: &Switch, target: &dyn StoreFile) -> Result<()> {
    match switch_state(switch, target)? {
        Switched::Foreign => {
            return Err(refuse(target, Code::ChangedMeanwhile, "its header was changed by somebody else"));
        }
        // One that is there may have been written without having been synced; if its sync failed, the kernel
        // may have forgotten what readers still see, and only a new write is made durable by another sync.
        Switched::Not | Switched::Torn | Switched::Done => {
            target.write_at(switch.at, &switch.new).map_err(|source| store_error(target, source))?;
        }
    }
    target.sync().map_err(|source| store_error(target, source))
}

fn refuse(target: &dyn StoreFile, code: Code, detail: &str) -> ImageError {
    ImageError::Bad { image: target.path().to_string(), code, detail: detail.to_owned() }
}
