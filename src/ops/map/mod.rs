//! `map`: where the bytes of a member's view are.
//!
//! The runs cover exactly the disk, ascending and maximal; a compressed cluster is a run of its own. They are
//! an iterator, never a list.

use serde::Serialize;

use crate::chain::graph::NodeId;
use crate::ops::Result;
use crate::progress::Cancel;
use crate::qcow2::map::coalesce;
use crate::qcow2::{Content, Run};
use crate::store::Stores;
use crate::store::chain::OpenChain;
use crate::store::scan::Scan;
use crate::units::GuestOffset;

/// What kind of run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RunKind {
    /// Plain data.
    Data,
    /// Zeros, by a member's word or because no member has anything.
    Zero,
    /// One compressed cluster.
    Compressed,
}

/// One run as it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MapRun<'a> {
    /// The first guest byte.
    pub start: u64,
    /// How many bytes.
    pub length: u64,
    /// What is there.
    pub kind: RunKind,
    /// The member that holds it; none for zeros.
    pub member: Option<&'a str>,
    /// Where in that member's file; none for zeros.
    pub offset: Option<u64>,
}

/// A member's map, opened.
#[derive(Debug)]
pub struct MapReport {
    /// The member.
    pub member: String,
    /// The size of its disk.
    pub virtual_bytes: u64,
    chain: OpenChain,
    names: Vec<String>,
}

/// Opens the chain of a member for its map.
pub fn map(stores: &Stores, scan: &Scan, id: NodeId) -> Result<MapReport> {
    let chain = OpenChain::of_member(stores, scan, id)?;
    let names: Vec<String> = chain.images().map(|image| image.name().to_owned()).collect();
    let member = stores.display(&scan.graph.node(id).key);
    Ok(MapReport { member, virtual_bytes: chain.virtual_size(), chain, names })
}

impl MapReport {
    /// The runs. After an error nothing follows.
    pub fn runs<'a>(&'a self, cancel: &'a Cancel) -> impl Iterator<Item = Result<MapRun<'a>>> {
        self.runs_from(0, cancel)
    }

    /// The runs from a guest byte on: the first is cut there. What is before costs nothing. None past the disk's end.
    pub fn runs_from<'a>(
        &'a self,
        from: u64,
        cancel: &'a Cancel,
    ) -> impl Iterator<Item = Result<MapRun<'a>>> {
        let below_is_zero = |run: Run| match run.content {
            Content::Below => Run { content: Content::Zero, ..run },
            _ => run,
        };
        let runs = self.chain.map_range(GuestOffset(from.min(self.virtual_bytes)), GuestOffset(u64::MAX));
        coalesce(runs.map(move |run| run.map(below_is_zero))).map(|run| {
            cancel.check()?;
            Ok(self.shown(&run?))
        })
    }

    fn shown(&self, run: &Run) -> MapRun<'_> {
        let (kind, place) = match run.content {
            Content::Zero | Content::Below => (RunKind::Zero, None),
            Content::Data { layer, host } => (RunKind::Data, Some((layer, host))),
            Content::Compressed { layer, cluster } => (RunKind::Compressed, Some((layer, cluster.host))),
        };
        MapRun {
            start: run.start.0,
            length: run.length,
            kind,
            member: place.and_then(|(layer, _)| self.names.get(layer)).map(String::as_str),
            offset: place.map(|(_, host)| host.0),
        }
    }
}
