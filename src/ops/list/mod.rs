//! `list`: chains, sizes, states, and what a merge would free.

mod frees;
mod records;

use std::collections::{BTreeSet, HashSet};

use serde::Serialize;

use crate::backend::Capabilities;
use crate::chain::graph::{Graph, NodeId, Tree};
use crate::cloudstack::paths::SNAPSHOTS;
use crate::cloudstack::records::{Records, RefState, Row};
use crate::ops::Result;
use crate::progress::{Cancel, Progress};
use crate::store::Stores;
use crate::store::record::StoreKind;
use crate::store::scan::{Finding, Incoming, Member, Scan};

/// All chains that were asked for.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct ListReport {
    /// The stores that were looked at.
    pub stores: Vec<StoreEntry>,
    /// The chains.
    pub chains: Vec<Chain>,
    /// What is worth telling about them.
    pub findings: Vec<Finding>,
}

/// One store.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct StoreEntry {
    /// Its id on the command line.
    pub store: String,
    /// `cloudstack` or `plain`; guessed if it was not opted in.
    pub kind: StoreKind,
    /// Whether it was opted in.
    pub initialised: bool,
    /// What it could do when it was opted in last.
    pub capabilities: Option<Capabilities>,
}

/// One tree of members.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct Chain {
    /// A number for it, of no meaning in another call.
    pub tree: usize,
    /// Parents before children; each member is followed by all above it before its next sibling.
    pub members: Vec<Entry>,
    /// Bytes that members take which CloudStack has given up; only with its rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pinned_bytes: Option<u64>,
    /// Bytes that merging those away would free, about; null where it cannot be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub merge_frees_bytes: Option<Option<u64>>,
}

/// One member.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct Entry {
    /// As it can be written on the command line.
    pub member: String,
    /// The store's id.
    pub store: String,
    /// The member below, if it is known.
    pub parent: Option<String>,
    /// The members right above.
    pub children: Vec<String>,
    /// The size of its disk; null if its header cannot be read.
    pub virtual_bytes: Option<u64>,
    /// The length of its file.
    pub file_bytes: u64,
    /// What the file takes on the store.
    pub allocated_bytes: u64,
    /// `leaving` (deleted, waiting for the end of its grace), `incoming`, `damaged`, `temporary`, `settled`, or
    /// for a settled member with a row that row's state.
    pub state: String,
    /// Its cluster size; null if its header cannot be read.
    pub cluster_bytes: Option<u64>,
    /// CloudStack's state of it.
    pub record: Option<String>,
    /// Why it counts as still being made.
    pub incoming: Option<String>,
}

impl Entry {
    /// Whether its row says that CloudStack has given it up.
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        self.record.as_deref().is_some_and(|state| RefState::parse(state).is_given_up())
    }
}

/// What to list.
#[derive(Debug, Default)]
pub struct ListOptions<'a> {
    /// Members whose trees are listed; none for all.
    pub members: Option<&'a [NodeId]>,
    /// CloudStack's rows.
    pub records: Option<&'a Records>,
}

/// Lists trees. What their members hold is told by [`weigh`].
pub fn list(stores: &Stores, scan: &Scan, options: &ListOptions<'_>, cancel: &Cancel) -> Result<ListReport> {
    let named: Option<BTreeSet<usize>> =
        options.members.map(|members| members.iter().map(|id| scan.graph.tree_of(*id)).collect());
    let wanted = |(index, tree): &(usize, &Tree)| match &named {
        Some(named) => named.contains(index),
        None => has_snapshots(stores, &scan.graph, tree),
    };
    let trees: Vec<(usize, &Tree)> = scan.graph.trees().iter().enumerate().filter(wanted).collect();
    let mut chains = Vec::with_capacity(trees.len());
    let known = records::read(stores, scan, cancel);
    for (index, tree) in &trees {
        let members = tree.members.iter().filter_map(|id| {
            let mut entry = entry(stores, scan, options.records, *id)?;
            if known.leaving.contains(id) {
                "leaving".clone_into(&mut entry.state);
            }
            Some(entry)
        });
        let members = members.collect();
        chains.push(Chain { tree: *index, members, pinned_bytes: None, merge_frees_bytes: None });
    }
    let mut findings = scan.findings.clone();
    findings.extend(known.findings);
    if named.is_some() {
        let shown: HashSet<&str> =
            chains.iter().flat_map(|chain| &chain.members).map(|entry| entry.member.as_str()).collect();
        findings.retain(|finding| shown.contains(finding.member.as_str()));
    }
    let stores = stores.iter().map(|(_, store)| StoreEntry {
        store: store.id().to_string(),
        kind: store.kind(),
        initialised: store.record().is_some(),
        capabilities: store.record().and_then(|record| record.capabilities),
    });
    Ok(ListReport { stores: stores.collect(), chains, findings })
}

/// Tells of chains that were listed what members given up hold, and what merging those away would free. That lays out the
/// merges, so it takes longer than listing them.
pub fn weigh(
    stores: &Stores,
    scan: &Scan,
    records: &Records,
    chains: &mut [Chain],
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<()> {
    let all = scan.graph.trees();
    let trees: Vec<Option<&Tree>> = chains.iter().map(|chain| all.get(chain.tree)).collect();
    let gains = frees::estimate(stores, scan, records, &trees, progress, cancel)?;
    for (chain, gain) in chains.iter_mut().zip(gains) {
        chain.pinned_bytes = Some(gain.pinned_bytes);
        chain.merge_frees_bytes = Some(gain.frees_bytes);
    }
    Ok(())
}

/// Whether a tree is more than templates or volumes that stand alone.
fn has_snapshots(stores: &Stores, graph: &Graph, tree: &Tree) -> bool {
    tree.members.iter().any(|id| {
        let key = &graph.node(*id).key;
        let plain = stores.get(key.store).is_ok_and(|store| store.kind() == StoreKind::Plain);
        plain || key.path.components().next() == Some(SNAPSHOTS)
    })
}

fn entry(stores: &Stores, scan: &Scan, records: Option<&Records>, id: NodeId) -> Option<Entry> {
    let member = scan.member(id)?;
    let header = member.reading.header();
    let display = |id: &NodeId| stores.display(&scan.graph.node(*id).key);
    let row = records.and_then(|records| row_of(stores, records, member));
    Some(Entry {
        member: stores.display(&member.key),
        store: stores.get(member.key.store).map_or_else(|_| String::new(), |store| store.id().to_string()),
        parent: scan.graph.parent(id).as_ref().map(display),
        children: scan.graph.children(id).iter().map(display).collect(),
        virtual_bytes: header.map(|header| header.virtual_bytes),
        file_bytes: member.stat.length,
        allocated_bytes: member.stat.allocated_bytes,
        state: state(member, &scan.graph, id, row),
        cluster_bytes: header.map(|header| header.cluster_bytes),
        record: row.map(|row| row.ref_state.as_str().to_owned()),
        incoming: member.incoming.as_ref().map(Incoming::reason),
    })
}

/// The row of a member.
fn row_of<'a>(stores: &Stores, records: &'a Records, member: &Member) -> Option<&'a Row> {
    let url = stores.get(member.key.store).ok()?.config().url.as_ref().map(ToString::to_string);
    records.lookup(member.key.path.as_str(), url.as_deref())
}

/// What is the case with a member, in one word. A file that QEMU writes now may look like anything.
fn state(member: &Member, graph: &Graph, id: NodeId, row: Option<&Row>) -> String {
    let word = match &member.incoming {
        Some(Incoming::Writer | Incoming::NoCheckpoint | Incoming::ParentsDisagree { .. }) => "incoming",
        _ if member.reading.fault().is_some() || graph.complete(id).is_err() => "damaged",
        _ if member.temporary => "temporary",
        _ if member.stub => "stub",
        Some(Incoming::Unsettled) => "incoming",
        None => return row.map_or_else(|| "settled".to_owned(), |row| row.ref_state.as_str().to_lowercase()),
    };
    word.to_owned()
}
