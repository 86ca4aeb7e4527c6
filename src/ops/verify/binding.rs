//! Whether members stand on what they were adopted on.

use std::collections::{BTreeSet, HashMap};

use super::damage::Dependents;
use super::{Context, Level, Looked, Verdict, data};
use crate::chain::graph::NodeId;
use crate::digest::view::view_digest;
use crate::failure::Code;
use crate::ops::Result;
use crate::store::manifest::shelf::Known;
use crate::store::manifest::{Blocks, Manifest};
use crate::store::scan::Finding;

/// What is to be said of a member's parent.
enum Bound {
    /// It shows what it showed.
    Same,
    /// It cannot be told.
    Unknown(Code, String),
    /// It shows something else.
    Other(String),
}

impl Context<'_> {
    /// Looks at the parents of members that were looked at, once all of them were.
    pub(super) fn bind(&self, looked: &mut [(NodeId, String, Looked)]) -> Result<()> {
        if self.options.level != Level::Data {
            return Ok(());
        }
        let sound = |looked: &Looked| looked.verdict == Verdict::Sound && looked.complete;
        let verdicts: HashMap<NodeId, (Verdict, bool)> =
            looked.iter().map(|(id, _, looked)| (*id, (looked.verdict, sound(looked)))).collect();
        let shown = self.shown(looked, &verdicts)?;
        for (id, name, looked) in looked.iter_mut() {
            if let Some(whose) = shown.get(id) {
                let message = format!("it shows what is damaged of {whose}");
                looked.findings.push(Finding { member: name.clone(), code: Code::ShowsDamage, message });
                looked.verdict = Verdict::Damaged;
            }
            let known = self.known(*id)?;
            let Some(manifest) = known.manifest().filter(|_| !looked.view_proved) else { continue };
            let (verdict, code, message) = match self.bound(*id, manifest, &verdicts)? {
                Bound::Same => continue,
                Bound::Unknown(code, message) => (Verdict::Unknown, code, message),
                Bound::Other(message) => (Verdict::Damaged, Code::ParentChanged, message),
            };
            looked.findings.push(Finding { member: name.clone(), code, message });
            looked.verdict = looked.verdict.max(verdict);
        }
        Ok(())
    }

    /// Members that show damage of others: found just now, or in quarantine since before and not read anew.
    fn shown(
        &self,
        looked: &[(NodeId, String, Looked)],
        verdicts: &HashMap<NodeId, (Verdict, bool)>,
    ) -> Result<HashMap<NodeId, String>> {
        let mut shown = HashMap::new();
        let mut told = std::collections::HashSet::new();
        for damage in looked.iter().flat_map(|(_, _, looked)| &looked.damage) {
            told.insert(damage.member.as_str());
            for (id, name, _) in looked {
                if damage.dependents.contains(name) {
                    shown.insert(*id, damage.member.clone());
                }
            }
        }
        // What lies below those that were looked at, and these themselves: nobody asks about others.
        let mut lines: BTreeSet<NodeId> = verdicts.keys().copied().collect();
        for id in verdicts.keys() {
            lines.extend(self.scan.graph.ancestors(*id).unwrap_or_default());
        }
        let mut dependents = Dependents::new(self);
        for id in lines {
            let verdict = verdicts.get(&id);
            let name = self.stores.display(&self.scan.graph.node(id).key);
            if matches!(verdict, Some((_, true))) || told.contains(name.as_str()) {
                continue;
            }
            let known = self.known(id)?;
            let quarantine = known.manifest().and_then(|manifest| manifest.quarantine.as_ref());
            let tables = matches!(verdict, Some((Verdict::Damaged, _)));
            let Some(blocks) = quarantine.map(|known| known.blocks.as_slice()).or(tables.then_some(&[]))
            else {
                continue;
            };
            let whole = [Blocks { first: 0, count: u64::MAX }];
            for range in if blocks.is_empty() { &whole } else { blocks } {
                for dependent in dependents.of(id, *range)? {
                    shown.entry(dependent).or_insert_with(|| name.clone());
                }
            }
        }
        Ok(shown)
    }

    fn bound(
        &self,
        id: NodeId,
        manifest: &Manifest,
        verdicts: &HashMap<NodeId, (Verdict, bool)>,
    ) -> Result<Bound> {
        let Some(parent) = self.scan.graph.parent(id) else {
            return self.alone(id, manifest);
        };
        let name = self.stores.display(&self.scan.graph.node(parent).key);
        let known = self.known(parent)?;
        let is = match &known {
            Known::Nothing | Known::Damaged(_) => {
                let message = format!("its parent {name} is not adopted");
                return Ok(Bound::Unknown(Code::NotAdopted, message));
            }
            Known::Changed(is) => match verdicts.get(&parent) {
                // It was read just now, and is what it was.
                Some((_, true)) => is,
                Some((Verdict::Damaged, _)) => {
                    return Ok(Bound::Other(format!("its parent {name} is not what it was adopted on")));
                }
                _ => {
                    let message =
                        format!("its parent {name} was changed since it was adopted; verify that, too");
                    return Ok(Bound::Unknown(Code::ChangedSinceAdoption, message));
                }
            },
            Known::Current(is) => is,
        };
        match &manifest.parent {
            Some(was) if was.digest == is.view_digest => Ok(Bound::Same),
            _ => self.alone(id, manifest),
        }
    }

    /// A member that stands on something else than it did: by the tables it may show the same for all that.
    fn alone(&self, id: NodeId, manifest: &Manifest) -> Result<Bound> {
        if manifest.parent.is_none() && self.scan.graph.parent(id).is_none() {
            return Ok(Bound::Same);
        }
        let line: Vec<NodeId> =
            std::iter::once(id).chain(self.scan.graph.ancestors(id).unwrap_or_default()).collect();
        let (mut tables, all) = data::tables(self, &line)?;
        if !all {
            return Ok(Bound::Unknown(Code::NotAdopted, "not all below it is adopted".to_owned()));
        }
        let digest = view_digest(&mut tables).map_err(data::leaves_failed)?;
        if digest == manifest.view_digest {
            return Ok(Bound::Same);
        }
        Ok(Bound::Other(format!(
            "on its parent of today its view digest is {digest}; it was {}",
            manifest.view_digest
        )))
    }
}
