//! What deleted members hold and how old the knowledge of bytes is, by store, for the figures.
//!
//! It takes a look at all members, so it is found out once a minute at most, however often figures are asked for.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::config::Config;
use super::problem::Problem;
use super::rows::Shown;
use super::view::{View, now_ns};
use crate::ops::list::{Entry, ListOptions, list};
use crate::ops::verify::debt;
use crate::progress::Cancel;

/// How long what was found is told again.
const FRESH: Duration = Duration::from_mins(1);

/// What is so on one store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// What members take that are deleted and have their names still, in bytes.
    pub leaving_bytes: u64,
    /// What members take that CloudStack's rows have given up, in bytes; none if there are no rows.
    pub pinned_bytes: Option<u64>,
    /// Adopted members all of whose bytes were read since.
    pub read: usize,
    /// Adopted members with a byte that was never read since.
    pub never_read: usize,
    /// Members that are not adopted.
    pub not_adopted: usize,
    /// The age of the oldest reading of any byte, in seconds; none if none was read.
    pub age_seconds: Option<u64>,
}

/// What was found last.
#[derive(Default)]
pub struct Holdings(Mutex<Option<(Instant, BTreeMap<String, Held>)>>);

impl Holdings {
    /// What is so, by store. Blocks; who asks while another looks waits for that look.
    pub fn get(&self, config: &Config, rows: &Shown) -> Result<BTreeMap<String, Held>, Problem> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, found)) = last.as_ref()
            && at.elapsed() < FRESH
        {
            return Ok(found.clone());
        }
        let found = look(config, rows)?;
        *last = Some((Instant::now(), found.clone()));
        Ok(found)
    }
}

fn look(config: &Config, rows: &Shown) -> Result<BTreeMap<String, Held>, Problem> {
    let view = View::read(config)?;
    let records = rows.get(config).unwrap_or_else(|why| {
        tracing::debug!("no rows for the figures: {why}");
        None
    });
    let options = ListOptions { members: None, records: records.as_deref() };
    let report = list(&view.stores, &view.scan, &options, &Cancel::default())?;
    let entries = report.chains.iter().flat_map(|chain| &chain.members);
    let entries: HashMap<&str, &Entry> = entries.map(|entry| (entry.member.as_str(), entry)).collect();
    let nothing = Held { pinned_bytes: records.is_some().then_some(0), ..Held::default() };
    let mut found: BTreeMap<String, Held> =
        config.stores.iter().map(|store| (store.id.to_string(), nothing)).collect();
    let ids: Vec<_> = view.scan.graph.ids().collect();
    for one in debt(&view.stores, &view.scan, &ids, now_ns())? {
        // Templates and volumes that stand alone are no chains.
        let Some(entry) = entries.get(one.member.as_str()) else { continue };
        let held = found.entry(entry.store.clone()).or_default();
        if entry.state == "leaving" {
            held.leaving_bytes = held.leaving_bytes.saturating_add(entry.allocated_bytes);
        }
        if entry.is_given_up()
            && let Some(pinned) = &mut held.pinned_bytes
        {
            *pinned = pinned.saturating_add(entry.allocated_bytes);
        }
        match (one.adopted, one.oldest_ns) {
            (false, _) => held.not_adopted += 1,
            (true, None) => held.never_read += 1,
            (true, Some(_)) => held.read += 1,
        }
        held.age_seconds = held.age_seconds.max(one.age_seconds);
    }
    Ok(found)
}
