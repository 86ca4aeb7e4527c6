//! Images that are open: whoever asks for one that is, need not look through the stores again.
//!
//! An open image pins its files: names may get other files meanwhile, the image stays what it was. It is given to
//! further requests only while all of its names stand for these files and nobody wrote to them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::chain::graph::NodeId;
use crate::ops::flatten::{Arrangement, Request, stream};
use crate::ops::{OpError, Result};
use crate::qcow2::layout::canonical::Form;
use crate::service::jobs::request::Format;
use crate::service::problem::Problem;
use crate::service::view::View;
use crate::store::Stores;
use crate::store::stream::Stream;
use crate::units::ClusterBits;

/// How many are kept.
pub const MOST: usize = 32;
/// How long one is kept that nobody asks for.
const IDLE: Duration = Duration::from_secs(30);
/// How long one is given to further requests: then it is looked at anew what is known of it.
const OLD: Duration = Duration::from_mins(5);

/// One image.
pub struct Opened {
    stores: Stores,
    pub stream: Stream,
    /// Its strong validator with its quotes; `None` while a member is not adopted.
    pub tag: Option<String>,
    since: Instant,
}

impl Opened {
    fn new(view: View, member: NodeId, format: Format) -> Result<Self> {
        let form = match format {
            Format::Qcow2 => Form::Qcow2(ClusterBits::DEFAULT),
            Format::Raw => Form::Raw,
        };
        let request = Request {
            member,
            form,
            compress: None,
            arrangement: Arrangement::Canonical,
            read: false,
            force: false,
            keep_cache: true,
        };
        let stream = stream(&view.stores, &view.scan, &request)?;
        let tag = stream.validator().map(|digest| format!("\"{digest}\""));
        Ok(Self { stores: view.stores, stream, tag, since: Instant::now() })
    }

    /// Whether its names still stand for its files, and nobody wrote to them.
    fn is_current(&self) -> bool {
        let source = self.stream.source();
        let named = source.keys().iter().zip(source.files()).all(|(key, file)| {
            let found = self.stores.get(key.store).map(|store| store.backend().stat(&key.path));
            matches!(found, Ok(Ok(stat)) if stat.id == file)
        });
        named && self.since.elapsed() < OLD && source.unchanged().is_ok()
    }
}

/// The place of one image. Who opens it holds it, so that all others wait for that.
#[derive(Default)]
struct Slot {
    image: Mutex<Option<Arc<Opened>>>,
    used: Mutex<Option<Instant>>,
}

impl Slot {
    fn touch(&self) {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn used(&self) -> Option<Instant> {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A member by its full name, and the format.
type Key = (String, Format);

/// The images that are open.
#[derive(Default)]
pub struct OpenImages(Mutex<HashMap<Key, Arc<Slot>>>);

impl OpenImages {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Arc<Slot>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image, open. `find` is called if it has to be opened. Blocks.
    pub fn open(
        &self,
        name: &str,
        format: Format,
        find: impl FnOnce() -> std::result::Result<(View, NodeId), Problem>,
    ) -> std::result::Result<Arc<Opened>, Problem> {
        let slot = self.slot(name, format);
        let mut image = slot.image.lock().unwrap_or_else(PoisonError::into_inner);
        slot.touch();
        if let Some(opened) = image.as_ref().filter(|opened| opened.is_current()) {
            return Ok(opened.clone());
        }
        *image = None;
        let (view, member) = find()?;
        let opened =
            Arc::new(Opened::new(view, member, format).map_err(|error: OpError| Problem::of(&error))?);
        *image = Some(opened.clone());
        Ok(opened)
    }

    fn slot(&self, name: &str, format: Format) -> Arc<Slot> {
        let mut slots = self.lock();
        let key = (name.to_owned(), format);
        if slots.len() >= MOST && !slots.contains_key(&key) {
            let oldest = slots.iter().min_by_key(|(_, slot)| slot.used()).map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                slots.remove(&oldest);
            }
        }
        slots.entry(key).or_default().clone()
    }

    /// Closes what nobody asked for in a while; who still sends it has it open himself. Blocks.
    pub fn sweep(&self) {
        let idle = |slot: &Slot| slot.used().is_none_or(|used| used.elapsed() > IDLE);
        let gone: Vec<Arc<Slot>> = {
            let mut slots = self.lock();
            let keys: Vec<Key> =
                slots.iter().filter(|(_, slot)| idle(slot)).map(|(key, _)| key.clone()).collect();
            keys.iter().filter_map(|key| slots.remove(key)).collect()
        };
        // Files are closed here, which may take its time on a network mount.
        drop(gone);
    }
}
