//! Which files of a store this process writes to, or has something of that is not durable yet.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use nfs3_client::nfs3_types::nfs3::nfs_fh3;

use super::fault::Fault;
use super::pool::lock;
use super::unstable::Unstable;

/// The files of a store that are open for writing, or of which something is kept, by their handles. (A file id may be
/// another file's by the time, a handle is not.)
#[derive(Debug, Default)]
pub(super) struct Writers {
    files: Mutex<HashMap<Vec<u8>, Arc<Unstable>>>,
    begun: AtomicUsize,
    ended: AtomicUsize,
}

impl Writers {
    /// What is kept of a file, if it is open for writing or something is.
    pub(super) fn of(&self, handle: &nfs_fh3) -> Option<Arc<Unstable>> {
        lock(&self.files).get(handle.data.as_ref()).cloned()
    }

    /// What of a file was written and not answered yet.
    pub(super) fn under_way(&self, handle: &nfs_fh3) -> Option<Arc<Unstable>> {
        self.of(handle).filter(|file| file.is_under_way())
    }

    /// The same for one more who writes; [`Writers::leave`] is his end.
    pub(super) fn enter(&self, handle: &nfs_fh3) -> Arc<Unstable> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        let mut files = lock(&self.files);
        let unstable = files.entry(handle.data.to_vec()).or_default();
        unstable.come();
        unstable.clone()
    }

    /// How often somebody began to write.
    pub(super) fn begun(&self) -> usize {
        self.begun.load(Ordering::Relaxed)
    }

    /// A write was answered.
    pub(super) fn end_one(&self) {
        self.ended.fetch_add(1, Ordering::SeqCst);
    }

    /// How many writes were answered.
    pub(super) fn ended(&self) -> usize {
        self.ended.load(Ordering::SeqCst)
    }

    /// One who wrote is gone; what is kept then, if he was the last one.
    pub(super) fn leave(&self, handle: &nfs_fh3) -> Option<Arc<Unstable>> {
        let mut files = lock(&self.files);
        let unstable = files.get(handle.data.as_ref())?;
        if !unstable.go() {
            return None;
        }
        if unstable.is_empty() {
            files.remove(handle.data.as_ref());
            return None;
        }
        Some(unstable.clone())
    }

    /// Forgets a file that nobody writes to and of which nothing is kept.
    pub(super) fn tidy(&self, handle: &nfs_fh3) {
        self.forget_if(handle, Unstable::is_empty);
    }

    /// What could not be made durable after the last one who wrote was gone is given up, unless somebody writes again.
    pub(super) fn give_up(&self, handle: &nfs_fh3, fault: Fault) {
        let files = lock(&self.files);
        let left = files.get(handle.data.as_ref()).filter(|file| !file.has_users());
        if let Some(file) = left {
            file.give_up(fault);
        }
    }

    /// Forgets that what was written to a file was given up: it lost a name, and nobody has it open to write.
    pub(super) fn forget_given_up(&self, handle: &nfs_fh3) {
        self.forget_if(handle, Unstable::is_given_up);
    }

    fn forget_if(&self, handle: &nfs_fh3, is: impl Fn(&Unstable) -> bool) {
        let mut files = lock(&self.files);
        if files.get(handle.data.as_ref()).is_some_and(|file| !file.has_users() && is(file)) {
            files.remove(handle.data.as_ref());
        }
    }

    /// Forgets what is kept of a file that is no more.
    pub(super) fn drop_kept(&self, handle: &nfs_fh3) {
        if let Some(unstable) = self.of(handle) {
            unstable.forget();
        }
        self.tidy(handle);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nfs3_client::nfs3_types::nfs3::{nfs_fh3, nfsstat3};
    use nfs3_client::nfs3_types::xdr_codec::Opaque;

    use super::{Fault, Writers};

    #[test]
    fn a_file_is_known_as_long_as_something_is_kept() {
        let writers = Writers::default();
        let handle = nfs_fh3 { data: Opaque::borrowed(b"handle") };
        let (first, second) = (writers.enter(&handle), writers.enter(&handle));
        assert!(Arc::ptr_eq(&first, &second));
        assert!(first.hold(0, b"x", 10));
        assert!(writers.under_way(&handle).is_some());
        assert!(writers.leave(&handle).is_none(), "one is left");
        assert!(writers.leave(&handle).is_some());
        writers.tidy(&handle);
        assert!(writers.of(&handle).is_some(), "it may be synced yet");
        writers.drop_kept(&handle);
        assert!(writers.of(&handle).is_none());
    }

    #[test]
    fn what_was_given_up_is_known_until_the_file_goes_or_is_written_anew() {
        let writers = Writers::default();
        let handle = nfs_fh3 { data: Opaque::borrowed(b"handle") };
        let refused = || Fault::Status(nfsstat3::NFS3ERR_NOSPC);
        let leave = || {
            assert!(writers.enter(&handle).hold(0, b"x", 10));
            writers.leave(&handle).unwrap()
        };
        let file = leave();
        let other = writers.enter(&handle);
        writers.give_up(&handle, refused());
        assert!(!other.is_given_up(), "somebody writes again");
        assert!(writers.leave(&handle).is_some());
        writers.give_up(&handle, refused());
        assert!(file.is_given_up());
        writers.tidy(&handle);
        assert!(writers.of(&handle).is_some());
        writers.forget_given_up(&handle);
        assert!(writers.of(&handle).is_none());
    }
}
