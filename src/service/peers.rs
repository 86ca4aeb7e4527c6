//! Members that other zones copy: kept open between requests, so that a copy goes on with the files that it began with,
//! whatever happens to their names.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::auth::Caller;
use super::config::Config;
use super::problem::Problem;
use super::view::View;
use crate::cloudstack::paths::InstallPath;
use crate::failure::{Code, Kind};
use crate::ids::{Digest, StorePath};
use crate::ops::copy::Offer;
use crate::store::names::resolve_one;

/// How many are kept open.
const MOST: usize = 64;
/// How long one is kept that nobody asks for: longer than a zone pauses between its tries.
const IDLE: Duration = Duration::from_mins(2);

/// One that is open.
struct Kept {
    offer: Arc<Offer>,
    used: Instant,
}

/// Those that are open, by name and view digest.
#[derive(Default)]
pub struct Offers(Mutex<HashMap<(String, Digest), Kept>>);

impl Offers {
    fn lock(&self) -> MutexGuard<'_, HashMap<(String, Digest), Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a member as it is now. Blocks.
    pub fn open(&self, config: &Config, caller: &Caller, member: &str) -> Result<Arc<Offer>, Problem> {
        granted(caller, &full(member)?)?;
        let view = View::read(config)?;
        let id = resolve_one(&view.stores, &view.scan, member)?;
        // What is given counts, however it was called.
        granted(caller, &view.scan.graph.node(id).key.path)?;
        let offer = Arc::new(Offer::open(&view.stores, &view.scan, id)?);
        let name = view.name(id);
        if let Some(own) = offer.own() {
            self.keep(&name, own.view_digest, &offer);
        }
        Ok(offer)
    }

    /// A member with that view: as it was opened, or as it is now if that has the same view. Blocks.
    pub fn of(
        &self,
        config: &Config,
        caller: &Caller,
        member: &str,
        digest: Digest,
    ) -> Result<Arc<Offer>, Problem> {
        granted(caller, &full(member)?)?;
        if let Some(kept) = self.lock().get_mut(&(member.to_owned(), digest)) {
            kept.used = Instant::now();
            let offer = kept.offer.clone();
            if let Some(own) = offer.own() {
                granted(caller, &own.member)?;
            }
            return Ok(offer);
        }
        let offer = self.open(config, caller, member)?;
        if offer.own().is_none_or(|own| own.view_digest != digest) {
            let detail = format!("{member}: its view is another one by now");
            return Err(Problem::new(Kind::Refused, Code::ChangedMeanwhile, detail));
        }
        Ok(offer)
    }

    fn keep(&self, name: &str, digest: Digest, offer: &Arc<Offer>) {
        let mut open = self.lock();
        if open.len() >= MOST {
            let oldest = open.iter().min_by_key(|(_, kept)| kept.used).map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                open.remove(&oldest);
            }
        }
        open.insert((name.to_owned(), digest), Kept { offer: offer.clone(), used: Instant::now() });
    }

    /// Closes what nobody asked for in a while. Blocks.
    pub fn sweep(&self) {
        let gone: Vec<Kept> = {
            let mut open = self.lock();
            let idle = |kept: &Kept| kept.used.elapsed() > IDLE;
            let keys: Vec<_> =
                open.iter().filter(|(_, kept)| idle(kept)).map(|(key, _)| key.clone()).collect();
            keys.iter().filter_map(|key| open.remove(key)).collect()
        };
        // Files are closed here, which may take its time on a network mount.
        drop(gone);
    }
}

/// The path in a whole name. Others, which stand for whatever is there, are not answered.
fn full(member: &str) -> Result<StorePath, Problem> {
    let path = member.split_once(':').map_or(member, |(_, path)| path);
    let parsed = StorePath::parse(path).or_else(|_| StorePath::parse(member));
    parsed.map_err(|_| Problem::usage("a member is asked for by its whole name: [STORE:]install/path"))
}

fn granted(caller: &Caller, path: &StorePath) -> Result<(), Problem> {
    if caller.may_copy(InstallPath::parse(path).map(|path| path.account)) {
        return Ok(());
    }
    let detail = format!("{} may not copy {path}", caller.name);
    let problem = Problem::new(Kind::Refused, Code::Forbidden, detail);
    Err(problem.with_status(axum::http::StatusCode::FORBIDDEN))
}
