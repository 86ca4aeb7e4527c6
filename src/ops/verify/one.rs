//! A look at one member: links, structure, data.

use std::fmt::Write as _;

use super::damage::Dependents;
use super::{Context, Level, Looked, Verdict, damage, data};
use crate::chain::graph::NodeId;
use crate::cloudstack::paths::SNAPSHOTS;
use crate::digest::block_count;
use crate::failure::{Code, Failure, Kind, Severity, with_causes};
use crate::ops::Result;
use crate::qcow2::ImageError;
use crate::qcow2::check::{Limits, Report};
use crate::qcow2::fingerprint::{Fingerprint, fingerprint};
use crate::store::chain::{OpenChain, open_image};
use crate::store::compare::{Expected, blame, compare};
use crate::store::manifest::shelf::Known;
use crate::store::manifest::{Manifest, leaves, reads};
use crate::store::record::StoreKind;
use crate::store::scan::{Finding, Incoming, Member, Scan};
use crate::store::{StoreError, Stores};

impl Context<'_> {
    /// Looks at a member as far as the level asks.
    pub(super) fn look(&self, id: NodeId, name: &str, told: &[&Finding]) -> Result<Looked> {
        let mut looked = Looked {
            verdict: Verdict::Unknown,
            findings: told.iter().map(|finding| (*finding).clone()).collect(),
            damage: Vec::new(),
            bytes_read: 0,
            complete: true,
            view_proved: false,
        };
        let Some(member) = self.scan.member(id) else { return Ok(looked) };
        looked.verdict = links(self.scan, member, id, name, &mut looked.findings);
        if let Some((code, _)) = member.reading.fault() {
            let elsewhere = code == Code::NotQcow2 && !should_be_image(self.stores, member);
            looked.verdict = if code == Code::Io || elsewhere { Verdict::Unknown } else { Verdict::Damaged };
        } else if self.options.level >= Level::Structure {
            let known = self.known(id)?;
            let (verdict, taken) = structure(self.stores, member, name, &mut looked.findings)?;
            looked.verdict = looked.verdict.max(verdict);
            if let Some(taken) = taken {
                self.metadata(id, name, &known, taken, &mut looked);
            }
            if self.options.level == Level::Data && looked.verdict != Verdict::Damaged {
                self.data(id, name, member, &known, &mut looked)?;
            }
        }
        if looked.verdict == Verdict::Damaged && member.incoming == Some(Incoming::Writer) {
            // What is half-written is no damage.
            looked.verdict = Verdict::Unknown;
        }
        Ok(looked)
    }

    /// Whether header and tables are what they were.
    fn metadata(&self, id: NodeId, name: &str, known: &Known, taken: Fingerprint, looked: &mut Looked) {
        let mut tell = |code: Code, message: &str| {
            looked.findings.push(Finding { member: name.to_owned(), code, message: message.to_owned() });
        };
        match known {
            Known::Damaged(detail) => {
                tell(Code::ManifestDamaged, &format!("its manifest cannot be read: {detail}"));
            }
            Known::Current(manifest)
                if taken.meta != manifest.meta_blake3 || taken.start != manifest.start_blake3 =>
            {
                tell(
                    Code::MetadataDamaged,
                    "its header or tables changed, although nothing wrote to the file",
                );
                looked.verdict = Verdict::Damaged;
            }
            Known::Current(_) | Known::Nothing => {}
            Known::Changed(manifest) if taken.meta != manifest.meta_blake3 => {
                tell(Code::ChangedSinceAdoption, "its file was changed or replaced, header or tables too");
                looked.verdict = looked.verdict.max(Verdict::Unknown);
            }
            Known::Changed(manifest) => {
                let header = self.scan.member(id).and_then(|member| member.reading.header());
                let same = header.is_some_and(|header| {
                    let named =
                        header.backing.as_ref().map(|name| String::from_utf8_lossy(name).into_owned());
                    named == manifest.qcow2.backing
                });
                if same && taken.start != manifest.start_blake3 {
                    tell(
                        Code::Rewritten,
                        "its header was written anew; what it says of the image is the same",
                    );
                } else if !same {
                    let below = self.scan.graph.parent(id).map(|id| &self.scan.graph.node(id).key.path);
                    if below == manifest.parent.as_ref().map(|parent| &parent.member) {
                        tell(Code::Relinked, "its backing name was changed, and leads to the same parent");
                    } else {
                        tell(Code::ReParented, "its backing name was changed, and leads to another parent");
                    }
                }
            }
        }
    }

    /// Compares the bytes that the member decides with what is known of them.
    fn data(
        &self,
        id: NodeId,
        name: &str,
        member: &Member,
        known: &Known,
        looked: &mut Looked,
    ) -> Result<()> {
        let tell = |code: Code, message: String| Finding { member: name.to_owned(), code, message };
        let manifest = match known {
            Known::Current(manifest) | Known::Changed(manifest) => manifest,
            Known::Nothing => {
                looked.findings.push(tell(Code::NotAdopted, "it was never adopted".to_owned()));
                looked.verdict = looked.verdict.max(Verdict::Unknown);
                return Ok(());
            }
            Known::Damaged(_) => {
                looked.verdict = looked.verdict.max(Verdict::Unknown);
                return Ok(());
            }
        };
        match self.compare(id, name, member, manifest, matches!(known, Known::Changed(_)), looked) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == Kind::Cancelled || error.code() == Code::Unreachable => Err(error),
            Err(error) => {
                let verdict = if error.kind() == Kind::Corrupt { Verdict::Damaged } else { Verdict::Unknown };
                looked.verdict = looked.verdict.max(verdict);
                looked.findings.push(tell(error.code(), with_causes(&error)));
                looked.complete = false;
                Ok(())
            }
        }
    }

    fn compare(
        &self,
        id: NodeId,
        name: &str,
        member: &Member,
        manifest: &Manifest,
        changed: bool,
        looked: &mut Looked,
    ) -> Result<()> {
        let store = self.stores.get(member.key.store)?;
        let chain = OpenChain::of_member(self.stores, self.scan, id)?;
        let mut expected = if changed {
            data::other(self, id)?
        } else {
            Expected::Same(leaves::open(store, name, &manifest.leaves)?)
        };
        let blocks = block_count(chain.virtual_size());
        let noted = reads::load(store.backend(), &member.key.path, member.stat.id.inode);
        let noted = noted.map_err(|source| StoreError::backend(store, source))?;
        let agenda = data::agenda(blocks, &noted, self.options);
        let compared = compare(&chain, &mut expected, &agenda, self.options.deadline, &self.job)?;
        looked.bytes_read = compared.bytes;
        looked.view_proved = changed && compared.complete && compared.unknown == 0 && compared.bad.is_empty();
        looked.complete = compared.complete;
        if blocks > 0 && compared.read.is_empty() || compared.unknown > 0 {
            looked.verdict = looked.verdict.max(Verdict::Unknown);
        }
        if self.options.note && store.record().is_some() && compared.bad.is_empty() {
            self.note_read(id, &compared.read, noted)?;
        }
        if chain.virtual_size() != manifest.virtual_bytes {
            let message =
                format!("its view has {} bytes, and had {}", chain.virtual_size(), manifest.virtual_bytes);
            looked.findings.push(Finding {
                member: name.to_owned(),
                code: Code::ChangedSinceAdoption,
                message,
            });
            looked.verdict = Verdict::Damaged;
        }
        if !compared.bad.is_empty() {
            self.damaged(id, &chain, &compared.bad, looked)?;
        } else if looked.view_proved
            && let Some(finding) =
                looked.findings.iter_mut().find(|finding| finding.code == Code::ChangedSinceAdoption)
            && looked.verdict != Verdict::Damaged
        {
            // Somebody wrote it anew: what it says is what it said.
            finding.code = Code::Rewritten;
            "its file was written anew since it was adopted; its content is the same"
                .clone_into(&mut finding.message);
            looked.verdict = Verdict::Sound;
        }
        Ok(())
    }

    /// Says what is damaged, whose it is, and who shows it.
    fn damaged(&self, id: NodeId, chain: &OpenChain, bad: &[u64], looked: &mut Looked) -> Result<()> {
        looked.verdict = Verdict::Damaged;
        let line: Vec<NodeId> =
            std::iter::once(id).chain(self.scan.graph.ancestors(id).unwrap_or_default()).collect();
        let (stood, complete) = data::bound_line(self, id)?;
        // If it stands on something else now its blocks cannot be told apart.
        let mut tables = if complete && stood == line { data::tables(self, &line)?.0 } else { Vec::new() };
        let mut by_layer: Vec<(usize, Vec<u64>)> = Vec::new();
        for (index, block) in bad.iter().enumerate() {
            // Whose each one is costs reads; after many the member itself is as good an answer.
            let layer = if index < 256 { blame(chain, &mut tables, *block)? } else { 0 };
            match by_layer.iter_mut().find(|(other, _)| *other == layer) {
                Some((_, blocks)) => blocks.push(*block),
                None => by_layer.push((layer, vec![*block])),
            }
        }
        let mut dependents = Dependents::new(self);
        for (layer, blocks) in by_layer {
            let Some((whose, image)) = line.get(layer).copied().zip(chain.images().nth(layer)) else {
                continue;
            };
            let ranges = damage::join(&blocks);
            let damages = damage::describe(self, &mut dependents, whose, image, &ranges)?;
            let member = self.stores.display(&self.scan.graph.node(whose).key);
            if let Some(first) = damages.first() {
                let message = words(first, blocks.len(), ranges.len());
                looked.findings.push(Finding { member, code: Code::DataDamaged, message });
            }
            looked.damage.extend(damages);
        }
        Ok(())
    }
}

/// The finding's sentence.
fn words(first: &damage::Damage, blocks: usize, ranges: usize) -> String {
    let mut text =
        format!("{blocks} blocks do not read as they did: {} bytes at {}", first.length, first.start);
    if let Some(host) = first.host.first() {
        let _ = write!(text, " (at {} in the file)", host.offset);
    }
    if ranges > 1 {
        let _ = write!(text, " and {} more ranges", ranges - 1);
    }
    if !first.dependents.is_empty() {
        let _ = write!(text, "; also shown by {}", first.dependents.join(", "));
    }
    text
}

/// Whether the chain below a member is whole; tells if nothing else did.
fn links(scan: &Scan, member: &Member, id: NodeId, name: &str, findings: &mut Vec<Finding>) -> Verdict {
    let Err(error) = scan.graph.complete(id) else { return Verdict::Sound };
    let told = findings.iter().any(|finding| finding.code.severity() == Severity::Error);
    if !told && member.reading.fault().is_none() {
        findings.push(Finding { member: name.to_owned(), code: error.code(), message: error.to_string() });
    }
    Verdict::Damaged
}

/// Beside templates and volumes CloudStack has files of other formats.
fn should_be_image(stores: &Stores, member: &Member) -> bool {
    let plain = stores.get(member.key.store).is_ok_and(|store| store.kind() == StoreKind::Plain);
    plain || member.key.path.components().next() == Some(SNAPSHOTS)
}

/// Checks tables and reference counts, and takes their fingerprint. Only a failing store is an error: one whose server
/// is away says nothing of the other members, either.
fn structure(
    stores: &Stores,
    member: &Member,
    name: &str,
    findings: &mut Vec<Finding>,
) -> Result<(Verdict, Option<Fingerprint>)> {
    let mut tell = |code: Code, message: String| {
        findings.push(Finding { member: name.to_owned(), code, message });
    };
    let (report, taken): (Report, Option<Fingerprint>) = match open_image(stores, &member.key) {
        Ok(image) => match fingerprint(&image, &Limits::default()) {
            Ok(found) => found,
            Err(source) if source.code() == Code::Unreachable => {
                return Err(StoreError::Image { member: name.to_owned(), source }.into());
            }
            Err(error) => {
                tell(error.code(), error.to_string());
                return Ok((verdict_of(&error), None));
            }
        },
        Err(StoreError::Image { source, .. }) if source.code() != Code::Unreachable => {
            tell(source.code(), source.to_string());
            return Ok((verdict_of(&source), None));
        }
        // Gone since the scan: a delete came between.
        Err(error @ StoreError::NotFound { .. }) => {
            tell(error.code(), error.to_string());
            return Ok((Verdict::Unknown, None));
        }
        Err(error) => return Err(error.into()),
    };
    let verdict = match (report.is_damaged(), report.incomplete) {
        (true, _) => Verdict::Damaged,
        (false, true) => Verdict::Unknown,
        (false, false) => Verdict::Sound,
    };
    let last = report.findings.last().map(|found| found.code);
    for found in report.findings {
        tell(found.code, found.message);
    }
    if let (true, Some(code)) = (report.findings_omitted > 0, last) {
        tell(code, format!("and {} more findings", report.findings_omitted));
    }
    Ok((verdict, taken))
}

/// An image that cannot be read is damaged; a store that cannot be read says nothing.
fn verdict_of(error: &ImageError) -> Verdict {
    if error.kind() == Kind::Corrupt { Verdict::Damaged } else { Verdict::Unknown }
}
