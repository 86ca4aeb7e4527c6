//! CloudStack's rows by the files that they name.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::chain::graph::Key;
use crate::cloudstack::prefix::StoreUrl;
use crate::cloudstack::records::{Records, RefState, Row};
use crate::failure::Code;
use crate::ids::StorePath;
use crate::store::Stores;
use crate::store::scan::{Finding, Scan};

/// Rows of KVM snapshots on image stores, by file, by snapshot and by parent.
#[derive(Debug)]
pub struct RowMap<'a> {
    by_key: HashMap<Key, Vec<&'a Row>>,
    by_parent: HashMap<u64, Vec<&'a Row>>,
    /// Where each row's file is, or should be.
    places: HashMap<usize, Key>,
    findings: Vec<Finding>,
}

impl<'a> RowMap<'a> {
    /// Maps each row's store by its URL: the configured one with the same export. A store that is configured
    /// without a URL takes a row whose URL nobody has, if it has that very file and no other store has it.
    #[must_use]
    pub fn new(stores: &Stores, scan: &Scan, records: &'a Records) -> Self {
        let mut map = Self {
            by_key: HashMap::new(),
            by_parent: HashMap::new(),
            places: HashMap::new(),
            findings: Vec::new(),
        };
        let mut urls: BTreeMap<Option<&str>, Option<usize>> = BTreeMap::new();
        let mut unknown: BTreeSet<&str> = BTreeSet::new();
        for row in records.rows().iter().filter(|row| is_ours(row)) {
            if let Some(parent) = row.parent_snapshot_id {
                map.by_parent.entry(parent).or_default().push(row);
            }
            let Some(path) = row.install_path.as_deref() else { continue };
            // An absolute path is one on primary storage.
            let Ok(path) = StorePath::parse(path) else { continue };
            let url = row.store_url.as_deref();
            let store = *urls.entry(url).or_insert_with(|| store_of(stores, url));
            let store = store.or_else(|| only_with(stores, scan, &path));
            let Some(store) = store else {
                if unknown.insert(row.store_uuid.as_deref().unwrap_or_default()) {
                    map.findings.push(unknown_store(row));
                }
                continue;
            };
            let key = Key { store, path };
            map.places.insert(row.line, key.clone());
            map.by_key.entry(key).or_default().push(row);
        }
        map
    }

    /// Stores of the rows that none of the configured ones is.
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// The rows of a file; several snapshots never share one, but rows may be left over.
    #[must_use]
    pub fn of(&self, key: &Key) -> &[&'a Row] {
        self.by_key.get(key).map_or(&[], Vec::as_slice)
    }

    /// The row of a file: one that is in use, if there are several.
    #[must_use]
    pub fn row(&self, key: &Key) -> Option<&'a Row> {
        self.of(key).iter().copied().min_by_key(|row| row.deletable())
    }

    /// Where a row's file is or should be; `None` for one on a store that is not at hand.
    #[must_use]
    pub fn place(&self, row: &Row) -> Option<&Key> {
        self.places.get(&row.line)
    }

    /// The rows that name a snapshot as their parent and are not given up for good.
    pub fn children(&self, snapshot: u64) -> impl Iterator<Item = &'a Row> {
        let rows = self.by_parent.get(&snapshot).map_or(&[][..], Vec::as_slice);
        rows.iter().copied().filter(|row| row.ref_state != RefState::Destroyed)
    }

    /// All files with rows.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.by_key.keys()
    }
}

/// Whether a row is about a KVM snapshot on an image store.
fn is_ours(row: &Row) -> bool {
    row.store_role == "Image" && row.hypervisor_type.as_deref().is_none_or(|kind| kind == "KVM")
}

fn store_of(stores: &Stores, url: Option<&str>) -> Option<usize> {
    let theirs = StoreUrl::parse(url?).ok()?;
    let same = |ours: &StoreUrl| ours.same_export(&theirs);
    stores.iter().find(|(_, store)| store.config().url.as_ref().is_some_and(same)).map(|(index, _)| index)
}

fn only_with(stores: &Stores, scan: &Scan, path: &StorePath) -> Option<usize> {
    let key = |store: usize| Key { store, path: path.clone() };
    let mut fitting = stores
        .iter()
        .filter(|(_, store)| store.config().url.is_none())
        .map(|(index, _)| index)
        .filter(|index| scan.graph.find(&key(*index)).is_some());
    let first = fitting.next()?;
    fitting.next().is_none().then_some(first)
}

fn unknown_store(row: &Row) -> Finding {
    let member = row.store_uuid.clone().unwrap_or_default();
    let url = row.store_url.as_deref().unwrap_or("no URL");
    let message = format!("CloudStack's rows name this image store ({url}), and no configured store is it");
    Finding { member, code: Code::UnknownStore, message }
}
