//! Keeps what a source reads from being merged into.

use std::fmt;

use rayon::prelude::*;

use crate::store::chain::OpenChain;

/// The lock by which a reading QEMU is known, on all members that are read; given back when dropped.
///
/// Most changes give a name to another file, which is nothing to whoever has the old one open. A merge in place grows
/// the very file of a deleted member, and takes the space of what is unused since: neither is done to a file that
/// somebody has open, in this process or another one, as far as the store's locks are seen there. (Where they are not,
/// it takes the operator's word that nobody has it open.) QEMU is kept from nothing.
pub(super) struct Pins(Vec<Box<dyn Send + Sync>>);

impl Pins {
    /// Takes them. What cannot be had is done without: a file that is written to all the same is seen at the end.
    pub(super) fn hold(chain: &OpenChain) -> Self {
        let images: Vec<_> = chain.images().collect();
        Self(images.into_par_iter().filter_map(|image| image.file().hold_reader_lock().ok()).collect())
    }
}

impl fmt::Debug for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pins").field(&self.0.len()).finish()
    }
}
