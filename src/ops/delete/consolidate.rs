//! What may be made a full base of its own: the merge of all its ancestors into a member, which keeps its name. The
//! ancestors stay, untouched, for whoever wants them; only this member, and what stands on it, reads them no more.

use std::collections::BTreeSet;

use crate::chain::delete::{Groups, fold};
use crate::chain::graph::{NodeId, Parent};
use crate::cloudstack::records::RefState;
use crate::failure::Code;
use crate::ops::Result;
use crate::ops::delete::select::{Check, Request};
use crate::store::Stores;
use crate::store::scan::Scan;

/// The merges that make `targets` (all of one tree) full bases, or why not. Nobody departs.
pub fn select(stores: &Stores, scan: &Scan, request: &Request<'_>, targets: &[NodeId]) -> Result<Groups> {
    let check = Check { stores, scan, request };
    for target in targets {
        check.folds(*target)?;
    }
    let merges = fold(&scan.graph, &targets.iter().copied().collect::<BTreeSet<_>>())?;
    // What is read must not change meanwhile, or be half made; it loses nothing, whatever else is in it.
    let below: BTreeSet<NodeId> = merges.iter().flat_map(|merge| &merge.merged).copied().collect();
    for id in below {
        check.settled(id)?;
    }
    Ok(Groups { merges, ..Groups::default() })
}

impl Check<'_> {
    /// A member that is to be made a base.
    fn folds(&self, id: NodeId) -> Result<()> {
        let member = self.member(id)?;
        let refuse = |code, message: &str| Err(self.refuse(member, code, message));
        if self.request.leaving.contains(&id) {
            return refuse(Code::Leaving, "it was deleted, and keeps its name for its readers only");
        }
        if member.stub {
            return refuse(Code::NotConsolidable, "it is the empty stand-in of a deleted member");
        }
        if member.temporary {
            return refuse(Code::NotConsolidable, "it is CloudStack's own temporary file");
        }
        self.usable(id)?;
        if self.scan.graph.node(id).parent == Parent::None {
            return refuse(Code::AlreadyBase, "it is a full base already");
        }
        let Some(records) = self.request.records else { return Ok(()) };
        match self.row(records, member)?.map(|row| &row.ref_state) {
            None | Some(RefState::Ready | RefState::Hidden) => Ok(()),
            Some(state) => {
                let message = format!("CloudStack's records show it as {}", state.as_str());
                refuse(Code::NotConsolidable, &message)
            }
        }
    }
}
