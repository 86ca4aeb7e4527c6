//! CloudStack's rows by the files that they name.
//!
//! Rows of primary storage count only where a store of that layout is at hand. Their paths are absolute: the pool's
//! mount on KVM hosts, which is an alias of the store, and the path below it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::chain::graph::Key;
use crate::cloudstack::paths::primary_path;
use crate::cloudstack::prefix::StoreUrl;
use crate::cloudstack::records::{Records, RefState, Row};
use crate::failure::Code;
use crate::ids::StorePath;
use crate::store::Stores;
use crate::store::record::StoreKind;
use crate::store::scan::{Finding, Scan};

/// Rows of KVM snapshots, by file, by snapshot and by parent.
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
        let primary = stores.iter().any(|(_, store)| store.kind() == StoreKind::Primary);
        for row in records.rows().iter().filter(|row| is_ours(row, primary)) {
            if let Some(parent) = row.parent_snapshot_id {
                map.by_parent.entry(parent).or_default().push(row);
            }
            let Some(path) = row.install_path.as_deref() else { continue };
            let (path, store) = if row.store_role == PRIMARY {
                let Some((mount, path)) = primary_path(path) else { continue };
                let store = mounted_at(stores, mount);
                let store = store.or_else(|| only_with(stores, scan, &path, true));
                (path, store)
            } else {
                let Ok(path) = StorePath::parse(path) else { continue };
                let url = row.store_url.as_deref();
                let store = *urls.entry(url).or_insert_with(|| store_of(stores, url));
                let store = store.or_else(|| only_with(stores, scan, &path, false));
                (path, store)
            };
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

/// The role of image stores in rows.
const IMAGE: &str = "Image";
/// The role of primary storage in rows.
const PRIMARY: &str = "Primary";

/// Whether a row is about a KVM snapshot on an image store, or with `primary` on primary storage.
fn is_ours(row: &Row, primary: bool) -> bool {
    let role = row.store_role == IMAGE || primary && row.store_role == PRIMARY;
    role && row.hypervisor_type.as_deref().is_none_or(|kind| kind == "KVM")
}

fn store_of(stores: &Stores, url: Option<&str>) -> Option<usize> {
    let theirs = StoreUrl::parse(url?).ok()?;
    let same = |ours: &StoreUrl| ours.same_export(&theirs);
    let secondary = stores.iter().filter(|(_, store)| store.kind() != StoreKind::Primary);
    let mut fitting = secondary.filter(|(_, store)| store.config().url.as_ref().is_some_and(same));
    fitting.next().map(|(index, _)| index)
}

/// The primary storage that hosts mount there.
fn mounted_at(stores: &Stores, mount: &str) -> Option<usize> {
    let mut primary = stores.iter().filter(|(_, store)| store.kind() == StoreKind::Primary);
    let is = |text: &String| text.trim_end_matches('/') == mount;
    let found = primary.find(|(_, store)| is(&store.config().root) || store.config().aliases.iter().any(is));
    found.map(|(index, _)| index)
}

/// The one store without a known URL, or of primary storage, that has that file.
fn only_with(stores: &Stores, scan: &Scan, path: &StorePath, primary: bool) -> Option<usize> {
    let key = |store: usize| Key { store, path: path.clone() };
    let mut fitting = stores
        .iter()
        .filter(|(_, store)| (store.kind() == StoreKind::Primary) == primary)
        .filter(|(_, store)| primary || store.config().url.is_none())
        .map(|(index, _)| index)
        .filter(|index| scan.graph.find(&key(*index)).is_some());
    let first = fitting.next()?;
    fitting.next().is_none().then_some(first)
}

fn unknown_store(row: &Row) -> Finding {
    let member = row.store_uuid.clone().unwrap_or_default();
    let url = row.store_url.as_deref().unwrap_or("no URL");
    let what = if row.store_role == PRIMARY { "primary storage" } else { "image store" };
    let message = format!("CloudStack's rows name this {what} ({url}), and no configured store is it");
    Finding { member, code: Code::UnknownStore, message }
}
