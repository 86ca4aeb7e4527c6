//! Members in the words of CloudStack's rows.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::view::View;
use crate::chain::graph::NodeId;
use crate::cloudstack::paths::checkpoint_of;

/// A member as `snapshot_store_ref` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Row {
    /// As it can be written on the command line.
    pub member: String,
    /// The URL of its store, if the configuration has it.
    pub store_url: Option<String>,
    /// Its path on the store.
    pub install_path: String,
    /// The length of its file in bytes: what CloudStack calls the physical size.
    pub physical_size: u64,
    /// The size of its disk in bytes; null if its header cannot be read.
    pub virtual_size: Option<u64>,
    /// Its checkpoint file, if it has one.
    pub checkpoint_path: Option<String>,
    /// The member that it stands on; null for a full base.
    pub parent: Option<String>,
}

impl Row {
    /// Of a member of a scan.
    pub fn of(view: &View, id: NodeId) -> Option<Self> {
        let member = view.scan.member(id)?;
        let store = view.stores.get(member.key.store).ok()?;
        let checkpoint = checkpoint_of(&member.key.path);
        let there = checkpoint.filter(|path| store.backend().stat(path).is_ok());
        Some(Self {
            member: view.name(id),
            store_url: store.config().url.as_ref().map(ToString::to_string),
            install_path: member.key.path.to_string(),
            physical_size: member.stat.length,
            virtual_size: member.reading.header().map(|header| header.virtual_bytes),
            checkpoint_path: there.map(|path| path.to_string()),
            parent: view.scan.graph.parent(id).map(|parent| view.name(parent)),
        })
    }

    /// Of members by their names, those that are there.
    pub fn all<'a>(view: &View, names: impl IntoIterator<Item = &'a str>) -> Vec<Self> {
        let mut rows: Vec<Self> = Vec::new();
        for name in names {
            let found = view.scan.graph.ids().find(|id| view.name(*id) == name);
            if let Some(row) = found.and_then(|id| Self::of(view, id))
                && !rows.contains(&row)
            {
                rows.push(row);
            }
        }
        rows
    }
}
