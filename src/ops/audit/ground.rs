//! What all parts of an audit look at.

use std::collections::{BTreeSet, HashMap};

use super::{AuditFinding, AuditOptions};
use crate::backend::Stat;
use crate::chain::graph::{Key, NodeId};
use crate::change::leaving::leaving;
use crate::change::{Site, SystemClock};
use crate::cloudstack::paths::primary_path;
use crate::cloudstack::records::{RefState, Row};
use crate::failure::Code;
use crate::ids::StorePath;
use crate::progress::Cancel;
use crate::store::Stores;
use crate::store::manifest::shelf::{Shelf, known};
use crate::store::rows::RowMap;
use crate::store::scan::{Finding, Member, Scan};

/// Stores, members and rows.
pub struct Ground<'a> {
    pub stores: &'a Stores,
    pub scan: &'a Scan,
    pub options: &'a AuditOptions<'a>,
    /// Rows by files, if there are rows.
    pub rows: Option<RowMap<'a>>,
    /// Members that were deleted and have their names still.
    leaving: BTreeSet<NodeId>,
    /// Stores of rows that were told by their files, by the uuid in the row.
    told: HashMap<&'a str, usize>,
    /// What is known of members, if there are rows; as for `list`, what cannot be read is as if it were not there.
    shelves: Vec<Shelf>,
}

impl<'a> Ground<'a> {
    pub fn new(
        stores: &'a Stores,
        scan: &'a Scan,
        options: &'a AuditOptions<'a>,
        cancel: &'a Cancel,
    ) -> Self {
        let site = Site::new(stores, &SystemClock, cancel, std::time::Duration::ZERO);
        // As for `list`: what cannot be read is as if it were not there.
        let leaving = leaving(&site, scan).unwrap_or_else(|error| {
            tracing::debug!("which members are leaving is not known: {error}");
            BTreeSet::new()
        });
        let rows = options.records.map(|records| RowMap::new(stores, scan, records));
        let mut told = HashMap::new();
        if let (Some(map), Some(records)) = (&rows, options.records) {
            for row in records.rows() {
                if let (Some(uuid), Some(key)) = (row.store_uuid.as_deref(), map.place(row)) {
                    told.entry(uuid).or_insert(key.store);
                }
            }
        }
        let shelves = if rows.is_some() { Shelf::load_all(stores).unwrap_or_default() } else { Vec::new() };
        Self { stores, scan, options, rows, leaving, told, shelves }
    }

    /// A member's name.
    pub fn name(&self, id: NodeId) -> String {
        self.stores.display(&self.scan.graph.node(id).key)
    }

    /// All members, by their names' order.
    pub fn members(&self) -> impl Iterator<Item = (NodeId, &'a Member)> {
        let scan = self.scan;
        scan.graph.ids().filter_map(move |id| Some((id, scan.member(id)?)))
    }

    /// The row of a member.
    pub fn row(&self, id: NodeId) -> Option<&'a Row> {
        self.rows.as_ref()?.row(&self.scan.graph.node(id).key)
    }

    /// Where a row's file is or should be: also on a store without a URL, if other rows of it have their files there.
    pub fn place(&self, row: &Row) -> Option<Key> {
        if let Some(key) = self.rows.as_ref()?.place(row) {
            return Some(key.clone());
        }
        let kvm = row.hypervisor_type.as_deref().is_none_or(|kind| kind == "KVM");
        let path = row.install_path.as_deref().filter(|_| kvm)?;
        let relative = StorePath::parse(path).ok();
        let path = relative.or_else(|| primary_path(path).map(|(_, path)| path))?;
        let store = *self.told.get(row.store_uuid.as_deref()?)?;
        Some(Key { store, path })
    }

    /// Stores of the rows that are none of those at hand.
    pub fn unknown_stores(&self) -> impl Iterator<Item = &Finding> {
        let findings = self.rows.iter().flat_map(RowMap::findings);
        findings.filter(|finding| !self.told.contains_key(finding.member.as_str()))
    }

    /// Whether a member was deleted and waits for the end of its grace.
    pub fn leaves(&self, id: NodeId) -> bool {
        self.leaving.contains(&id)
    }

    /// Whether a member was copied from another zone or store: no row here need name it.
    pub fn is_replica(&self, id: NodeId) -> bool {
        known(self.stores, self.scan, &self.shelves, id)
            .is_ok_and(|known| known.manifest().is_some_and(|manifest| manifest.replica.is_some()))
    }

    /// Whether a member that stays reads through this one.
    pub fn is_read(&self, id: NodeId) -> bool {
        let stays = |child: &NodeId| !self.scan.is_idle_stub(*child) && !self.leaving.contains(child);
        self.scan.graph.children(id).iter().any(stays)
    }

    /// The bytes that a member holds only for those that build on it: its row is Hidden.
    pub fn held_bytes(&self, id: NodeId) -> u64 {
        let hidden = self.row(id).is_some_and(|row| row.ref_state == RefState::Hidden);
        let whole = self.scan.member(id).is_some_and(|member| !member.stub) && !self.leaves(id);
        if hidden && whole && self.is_read(id) { self.scan.allocated_bytes(id) } else { 0 }
    }

    /// Whether a file has been left alone for long enough to count as left behind.
    pub fn is_old(&self, stat: &Stat) -> bool {
        stat.modified_ns + self.options.min_age_ns <= self.options.now_ns
    }

    /// A finding about a member, with the bytes that it takes.
    pub fn of_member(&self, id: NodeId, code: Code, message: String) -> AuditFinding {
        let bytes = Some(self.scan.allocated_bytes(id));
        AuditFinding { code, member: self.name(id), message, bytes }
    }
}
