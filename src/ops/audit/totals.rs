//! What chains, volumes and accounts take.

use std::collections::BTreeMap;

use serde::Serialize;

use super::ground::Ground;
use crate::chain::graph::{NodeId, Tree};
use crate::cloudstack::paths::{Area, InstallPath};
use crate::ops::policy::is_snapshot;
use crate::store::scan::Member;

/// What some snapshots take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Sum {
    /// How many files they are.
    pub members: u64,
    /// The lengths of their files.
    pub file_bytes: u64,
    /// What the files take on the store.
    pub allocated_bytes: u64,
    /// What of that deleted ones hold for those that build on them; null without rows.
    pub hidden_bytes: Option<u64>,
}

/// Whose snapshots they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, utoipa::ToSchema)]
pub struct Owner {
    /// The account's number.
    pub account: u64,
    /// The volume's; none for all of an account.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume: Option<u64>,
}

/// What the snapshots of an account or a volume take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct OwnerTotal {
    /// Whose they are.
    #[serde(flatten)]
    pub owner: Owner,
    /// What they take.
    #[serde(flatten)]
    pub sum: Sum,
}

/// What a chain, with all its branches, takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct ChainTotal {
    /// The full base, or the lowest member that is known.
    pub member: String,
    /// The most members of one branch, the base among them; null for a cycle.
    pub length: Option<usize>,
    /// What it takes.
    #[serde(flatten)]
    pub sum: Sum,
}

/// All sums.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Totals {
    /// By account.
    pub accounts: Vec<OwnerTotal>,
    /// By volume.
    pub volumes: Vec<OwnerTotal>,
    /// By chain, in the order of the bases' names.
    pub chains: Vec<ChainTotal>,
}

impl Sum {
    fn add(&mut self, ground: &Ground<'_>, id: NodeId, member: &Member) {
        self.members += 1;
        // What a server says of lengths may be anything.
        self.file_bytes = self.file_bytes.saturating_add(member.stat.length);
        self.allocated_bytes = self.allocated_bytes.saturating_add(member.stat.allocated_bytes);
        if ground.rows.is_some() {
            *self.hidden_bytes.get_or_insert(0) += ground.held_bytes(id);
        }
    }
}

pub fn sum(ground: &Ground<'_>) -> Totals {
    let mut accounts: BTreeMap<Owner, Sum> = BTreeMap::new();
    let mut volumes: BTreeMap<Owner, Sum> = BTreeMap::new();
    for (id, member) in ground.members() {
        let Some((account, volume)) = owner(ground, id, member) else { continue };
        volumes.entry(Owner { account, volume: Some(volume) }).or_default().add(ground, id, member);
        accounts.entry(Owner { account, volume: None }).or_default().add(ground, id, member);
    }
    let total = |(owner, sum): (Owner, Sum)| OwnerTotal { owner, sum };
    let chains = ground.scan.graph.trees().iter().filter(|tree| is_chain(ground, tree));
    Totals {
        accounts: accounts.into_iter().map(total).collect(),
        volumes: volumes.into_iter().map(total).collect(),
        chains: chains.filter_map(|tree| chain(ground, tree)).collect(),
    }
}

/// Whose a snapshot is: by its path, or on primary storage by its row.
fn owner(ground: &Ground<'_>, id: NodeId, member: &Member) -> Option<(u64, u64)> {
    if let Some(path) = InstallPath::parse(&member.key.path) {
        return (path.area == Area::Snapshots).then_some((path.account, path.owner));
    }
    ground.row(id).map(|row| (row.account_id, row.volume_id))
}

fn chain(ground: &Ground<'_>, tree: &Tree) -> Option<ChainTotal> {
    let mut sum = Sum::default();
    for id in &tree.members {
        sum.add(ground, *id, ground.scan.member(*id)?);
    }
    let depths = tree.members.iter().filter_map(|id| ground.scan.graph.depth(*id));
    let length = depths.max().map(|depth| depth + 1);
    Some(ChainTotal { member: ground.name(*tree.members.first()?), length, sum })
}

/// Whether a tree is one of snapshots: no template, volume or temporary that stands alone.
pub fn is_chain(ground: &Ground<'_>, tree: &Tree) -> bool {
    let mut members = tree.members.iter().filter_map(|id| ground.scan.member(*id));
    members.any(|member| is_snapshot(ground.stores, member))
}
