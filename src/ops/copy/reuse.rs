//! Other members of the account that a member comes to: what of it lies in their views need not be asked for.
//!
//! It is this side that looks, in its own leaf tables, by leaves that the peer gave before; the peer sees no more than what it is
//! then asked for. Members of other accounts are never looked at: whoever gives a member must not learn from what is
//! asked for what they have.

use super::need::{Here, Index};
use super::{Below, Ground, Run};
use crate::chain::graph::NodeId;
use crate::cloudstack::paths::{Area, InstallPath};
use crate::ids::StorePath;
use crate::ops::Result;
use crate::store::StoreError;
use crate::store::chain::OpenChain;
use crate::store::manifest::TableMark;
use crate::store::manifest::leaves;
use crate::store::manifest::shelf::{Known, known};
use crate::units::{BLOCK_BYTES, GuestOffset};

/// What blocks are looked for in, before they are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reuse {
    /// The line that the member is put on.
    #[default]
    Chain,
    /// All adopted members of the account that it comes to, too.
    Account,
}

/// The account of a snapshot.
#[must_use]
pub fn account(path: &StorePath) -> Option<u64> {
    InstallPath::parse(path).filter(|path| path.area == Area::Snapshots).map(|path| path.account)
}

/// The members of an account.
pub(super) struct Account<'a> {
    run: &'a Run<'a>,
    ground: &'a Ground<'a>,
    members: Vec<(NodeId, TableMark)>,
    open: Option<(u32, Option<OpenChain>)>,
}

impl<'a> Account<'a> {
    /// Those that are adopted and what they were, on all stores here, but for those that a member is put on.
    pub fn of(run: &'a Run<'a>, ground: &'a Ground<'a>, account: u64, below: &Below) -> Result<Self> {
        let (stores, scan) = (run.to.site.stores, ground.scan);
        let mut members = Vec::new();
        for id in scan.graph.ids() {
            let key = &scan.graph.node(id).key;
            if self::account(&key.path) != Some(account) || below.keys.contains(key) {
                continue;
            }
            if let Known::Current(manifest) = known(stores, scan, &ground.manifests, id)?
                && manifest.quarantine.is_none()
            {
                members.push((id, manifest.leaves));
            }
        }
        Ok(Self { run, ground, members, open: None })
    }

    /// Looks for blocks in all of them. A table that cannot be read is none.
    pub fn look_for(&self, index: &mut Index) -> Result<()> {
        let stores = self.run.to.site.stores;
        for (number, (id, mark)) in (0..).zip(&self.members) {
            self.run.work.cancel.check()?;
            if index.is_complete() {
                break;
            }
            let key = &self.ground.scan.graph.node(*id).key;
            let name = stores.display(key);
            let Ok(mut table) = leaves::usable(stores.get(key.store)?, &name, mark)? else { continue };
            index
                .look_through(&mut table, |block| Here::Other(number, block))
                .map_err(|source| StoreError::Leaves { member: name, source })?;
        }
        Ok(())
    }

    /// Reads a block of a member's view, whatever it is by now; whether that could be done.
    pub fn read(&mut self, number: u32, block: u64, bytes: &mut [u8]) -> bool {
        if self.open.as_ref().is_none_or(|(open, _)| *open != number) {
            let member = usize::try_from(number).ok().and_then(|number| self.members.get(number));
            let scan = self.ground.scan;
            let chain =
                member.and_then(|(id, _)| OpenChain::of_member(self.run.to.site.stores, scan, *id).ok());
            self.open = Some((number, chain));
        }
        let chain = self.open.as_ref().and_then(|(_, chain)| chain.as_ref());
        chain.is_some_and(|chain| chain.read(GuestOffset(block * BLOCK_BYTES), bytes).is_ok())
    }
}
