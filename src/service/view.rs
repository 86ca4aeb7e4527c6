//! Stores as requests and jobs see them: opened anew, scanned by the help of the caches, members resolved.

use super::config::Config;
use crate::chain::graph::NodeId;
use crate::change::{Clock as _, SystemClock};
use crate::cloudstack::paths::checkpoint_of;
use crate::cloudstack::prefix::StoreUrl;
use crate::progress::Silent;
use crate::store::caches::Caches;
use crate::store::connect::connect;
use crate::store::names::resolve;
use crate::store::scan::{Scan, ScanOptions};
use crate::store::{Result, StoreError, Stores};

/// The time, in nanoseconds since 1970.
pub fn now_ns() -> i64 {
    SystemClock.wall_ns()
}

/// Stores and what is on them.
pub struct View {
    pub stores: Stores,
    pub scan: Scan,
}

impl View {
    /// For reading: by the help of the caches.
    pub fn read(config: &Config) -> Result<Self> {
        let stores = connect(config.stores.clone())?;
        let caches = Caches::load(&stores, config.cache.as_deref());
        let scan = scan(config, &stores, &caches.loaded, false)?;
        caches.save();
        Ok(Self { stores, scan })
    }

    /// The one member of a name.
    pub fn member(&self, name: &MemberName) -> Result<NodeId> {
        let text = name.text(&self.stores)?;
        match self.members(std::slice::from_ref(&text))?.as_slice() {
            [id] => Ok(*id),
            _ => Err(StoreError::Usage { detail: format!("{text:?} stands for several members") }),
        }
    }

    /// All members of names.
    pub fn members(&self, names: &[String]) -> Result<Vec<NodeId>> {
        let mut found = Vec::new();
        for name in names {
            for id in resolve(&self.stores, &self.scan, name)? {
                if !found.contains(&id) {
                    found.push(id);
                }
            }
        }
        Ok(found)
    }

    /// A member as it can be written.
    pub fn name(&self, id: NodeId) -> String {
        self.stores.display(&self.scan.graph.node(id).key)
    }

    /// The lowest member of the tree that has a member.
    pub fn base(&self, id: NodeId) -> String {
        let tree = self.scan.graph.trees().get(self.scan.graph.tree_of(id));
        let base = tree.and_then(|tree| tree.members.first()).copied();
        self.name(base.unwrap_or(id))
    }
}

/// Scans; with `now` without waiting for files to settle.
pub fn scan(
    config: &Config,
    stores: &Stores,
    caches: &[crate::store::cache::Cache],
    now: bool,
) -> Result<Scan> {
    let settle = if now { 0 } else { i128::try_from(config.settle.as_nanos()).unwrap_or(i128::MAX) };
    let options = ScanOptions { now_ns: i128::from(now_ns()), settle_ns: settle, caches, progress: &Silent };
    Scan::run(stores, &options)
}

/// A member as requests name it: as on the command line, or in CloudStack's words.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
#[serde(untagged)]
pub enum MemberName {
    /// `[STORE:]install/path`, a file name if it is unique, or a prefix that ends in a slash.
    Plain(String),
    /// As CloudStack's rows have it.
    Cloudstack(CloudstackName),
}

/// A member in the words of CloudStack's rows.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloudstackName {
    /// The URL of the image store.
    pub store_url: String,
    /// Its path there.
    pub install_path: String,
    /// Its checkpoint file, by any mount's path: held against the one that belongs to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_path: Option<String>,
}

impl MemberName {
    /// As the command line would have it.
    pub fn text(&self, stores: &Stores) -> Result<String> {
        let name = match self {
            Self::Plain(text) => return Ok(text.clone()),
            Self::Cloudstack(name) => name,
        };
        let usage = |detail: String| StoreError::Usage { detail };
        let url = StoreUrl::parse(&name.store_url).map_err(|error| usage(error.to_string()))?;
        let store = stores
            .iter()
            .find(|(_, store)| store.config().url.as_ref().is_some_and(|own| own.same_export(&url)))
            .ok_or_else(|| StoreError::NotFound {
                name: format!("a store with the URL {}", name.store_url),
            })?;
        let path = name.install_path.trim_start_matches('/');
        let parsed = crate::ids::StorePath::parse(path).map_err(|error| usage(error.to_string()))?;
        if let Some(given) = name.checkpoint_path.as_deref().filter(|given| !given.is_empty()) {
            let own = checkpoint_of(&parsed);
            let tail = given.find("checkpoints/").and_then(|at| given.get(at..)).unwrap_or(given);
            if own.as_ref().map(crate::ids::StorePath::as_str) != Some(tail) {
                return Err(usage(format!("{given} is not the checkpoint file of {path}")));
            }
        }
        Ok(format!("{}:{path}", store.1.id()))
    }
}
