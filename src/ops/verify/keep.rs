//! What is noted of a look: when which bytes were read, and what is damaged.

use std::collections::BTreeSet;
use std::ops::Range;

use serde::Serialize;

use super::{Checked, Context, Looked, Verdict, VerifyReport};
use crate::backend::FileKind;
use crate::chain::graph::{Key, NodeId};
use crate::digest::block_count;
use crate::failure::{Code, Severity};
use crate::ids::StorePath;
use crate::ops::Result;
use crate::store::manifest::reads::{self, Reads};
use crate::store::manifest::shelf::{self, Known};
use crate::store::manifest::{Blocks, MAX_DAMAGED, Manifest, Quarantine, stem};
use crate::store::scan::Finding;
use crate::store::{Store, StoreError};
use crate::units::BLOCK_BYTES;

/// How long ago the oldest byte of a member was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Debt {
    /// The member.
    pub member: String,
    /// Whether it is adopted: else there is nothing to compare with.
    pub adopted: bool,
    /// When the byte that was left alone for longest was read, nanoseconds since 1970; `None`: never.
    pub oldest_ns: Option<i64>,
    /// How long ago that is, in seconds.
    pub age_seconds: Option<u64>,
}

/// What is noted of one member.
pub(super) fn debt_of(
    store: &Store,
    name: &str,
    member: &StorePath,
    known: &Known,
    now_ns: i64,
) -> Result<Debt> {
    let mut oldest_ns = None;
    if let Some(manifest) = known.current() {
        let noted = reads::load(store.backend(), member, manifest.file.inode);
        let noted = noted.map_err(|source| StoreError::backend(store, source))?;
        oldest_ns = noted.oldest_ns(block_count(manifest.virtual_bytes));
    }
    let age =
        oldest_ns.map(|oldest| u64::try_from(now_ns.saturating_sub(oldest)).unwrap_or(0) / 1_000_000_000);
    Ok(Debt { member: name.to_owned(), adopted: known.current().is_some(), oldest_ns, age_seconds: age })
}

impl Context<'_> {
    /// The members in the order of their debt, what was never read first; without a limit as they are.
    pub(super) fn by_age(&self, members: &[NodeId]) -> Result<Vec<NodeId>> {
        if self.options.deadline.is_none() {
            return Ok(members.to_vec());
        }
        let mut aged = Vec::with_capacity(members.len());
        for id in members {
            let key = &self.scan.graph.node(*id).key;
            let debt = debt_of(self.stores.get(key.store)?, "", &key.path, &self.known(*id)?, 0)?;
            aged.push((debt.oldest_ns, *id));
        }
        aged.sort_by_key(|(oldest, _)| *oldest);
        Ok(aged.into_iter().map(|(_, id)| id).collect())
    }

    /// Notes that blocks were read and found right.
    pub(super) fn note_read(&self, id: NodeId, read: &[Range<u64>], mut noted: Reads) -> Result<()> {
        let key = &self.scan.graph.node(id).key;
        let store = self.stores.get(key.store)?;
        let Some(member) = self.scan.member(id) else { return Ok(()) };
        if self.known(id)?.current().is_none() || store.record().is_none() {
            return Ok(());
        }
        for range in read {
            noted.mark(range.clone(), self.options.now_ns);
        }
        match reads::save(store.backend().as_ref(), &key.path, member.stat.id.inode, &noted) {
            // Whoever may only read has read for himself.
            Err(error) if error.is_denied() || error.is_read_only() => Ok(()),
            done => Ok(done.map_err(|source| StoreError::backend(store, source))?),
        }
    }

    /// Tells of members that are known, whose names stand for something that is no image any more. What is gone was
    /// deleted.
    pub(super) fn lost(&self, report: &mut VerifyReport) -> Result<()> {
        for (index, store) in self.stores.iter() {
            let Some(manifests) = self.shelves.get(index) else { continue };
            let members = self.scan.members.iter().filter(|member| member.key.store == index);
            let there: BTreeSet<String> = members.map(|member| stem(&member.key.path)).collect();
            for member in manifests.others(store, &there)? {
                let stat = match store.backend().stat(&member) {
                    Ok(stat) if stat.kind == FileKind::File => stat,
                    Ok(_) | Err(_) => continue,
                };
                let name = self.stores.display(&Key { store: index, path: member });
                let message = format!("its file of {} bytes is no qcow2 image any more", stat.length);
                report.findings.push(Finding { member: name.clone(), code: Code::NotQcow2, message });
                report.checked.push(Checked {
                    member: name,
                    level: self.options.level,
                    verdict: Verdict::Damaged,
                    bytes_read: 0,
                    complete: true,
                });
            }
        }
        Ok(())
    }

    /// Puts a damaged member into quarantine, or takes a sound one out.
    pub(super) fn note(&self, id: NodeId, looked: &Looked) -> Result<()> {
        let store = self.stores.get(self.scan.graph.node(id).key.store)?;
        let known = self.known(id)?;
        let Some(manifest) = known.manifest().filter(|_| store.record().is_some()) else { return Ok(()) };
        let name = self.stores.display(&self.scan.graph.node(id).key);
        let quarantine = match looked.verdict {
            Verdict::Damaged => {
                // A member that only shows another's damage is none itself.
                let own = |finding: &&Finding| {
                    let error = finding.code.severity() == Severity::Error;
                    let others = matches!(finding.code, Code::ParentChanged | Code::ShowsDamage);
                    finding.member == name && error && !others
                };
                let Some(first) = looked.findings.iter().find(own) else { return Ok(()) };
                let blocks = looked.damage.iter().filter(|damage| damage.member == name).map(|damage| {
                    Blocks { first: damage.start / BLOCK_BYTES, count: damage.length.div_ceil(BLOCK_BYTES) }
                });
                Some(Quarantine {
                    since_ns: manifest
                        .quarantine
                        .as_ref()
                        .map_or(self.options.now_ns, |known| known.since_ns),
                    code: first.code.as_str().to_owned(),
                    message: first.message.clone(),
                    blocks: blocks.take(MAX_DAMAGED).collect(),
                })
            }
            Verdict::Sound if looked.complete => None,
            Verdict::Sound | Verdict::Unknown => return Ok(()),
        };
        if quarantine == manifest.quarantine {
            return Ok(());
        }
        let noted = shelf::write(store, &Manifest { quarantine, ..manifest.clone() });
        match noted {
            Err(StoreError::Backend { source, .. }) if source.is_denied() || source.is_read_only() => Ok(()),
            done => Ok(done?),
        }
    }
}
