//! `verify`: whether members are sound, by what their headers and tables say.
//!
//! - `links`: the header can be read, and the chain below is complete, of the right format, and no circle.
//! - `structure`: the same, and reference counts and tables agree ([`check`]).
//!
//! Damage is data here, not a failure.

use std::collections::HashMap;

use rayon::prelude::*;
use serde::Serialize;

use crate::chain::graph::NodeId;
use crate::cloudstack::paths::SNAPSHOTS;
use crate::failure::{Code, Failure, Kind, Severity};
use crate::ops::Result;
use crate::progress::{Cancel, Progress};
use crate::qcow2::ImageError;
use crate::qcow2::check::{Limits, Report, check};
use crate::store::chain::open_image;
use crate::store::record::StoreKind;
use crate::store::scan::{Finding, Incoming, Member, Scan};
use crate::store::{StoreError, Stores};

/// How far to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Headers and backing names.
    Links,
    /// Tables and reference counts too.
    Structure,
}

/// What was found out about a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Nothing is wrong at this level.
    Sound,
    /// It could not be told: being written, not an image, or too large for the limits.
    Unknown,
    /// Some of it cannot be read right.
    Damaged,
}

/// One member checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// The member.
    pub member: String,
    /// How far it was looked at.
    pub level: Level,
    /// What was found.
    pub verdict: Verdict,
}

/// What was checked and found.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// Each member, in the order asked for.
    pub checked: Vec<Checked>,
    /// What is wrong, or worth knowing, by member in the same order.
    pub findings: Vec<Finding>,
}

impl VerifyReport {
    /// Whether any member is damaged.
    #[must_use]
    pub fn any_damaged(&self) -> bool {
        self.checked.iter().any(|checked| checked.verdict == Verdict::Damaged)
    }
}

/// Checks members.
pub fn verify(
    stores: &Stores,
    scan: &Scan,
    members: &[NodeId],
    level: Level,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<VerifyReport> {
    progress.phase("checking", members.len() as u64);
    let mut by_member: HashMap<&str, Vec<&Finding>> = HashMap::new();
    for finding in &scan.findings {
        by_member.entry(&finding.member).or_default().push(finding);
    }
    let one = |id: &NodeId| {
        cancel.check()?;
        let name = stores.display(&scan.graph.node(*id).key);
        let known = by_member.get(name.as_str()).map_or(&[][..], Vec::as_slice);
        let looked = look(stores, scan, *id, &name, known, level)?;
        progress.advance(1);
        Ok((name, looked))
    };
    let looked: Vec<(String, (Verdict, Vec<Finding>))> =
        members.par_iter().map(one).collect::<Result<_>>()?;
    let mut report = VerifyReport { checked: Vec::with_capacity(looked.len()), findings: Vec::new() };
    for (member, (verdict, findings)) in looked {
        report.checked.push(Checked { member, level, verdict });
        report.findings.extend(findings);
    }
    Ok(report)
}

fn look(
    stores: &Stores,
    scan: &Scan,
    id: NodeId,
    name: &str,
    known: &[&Finding],
    level: Level,
) -> Result<(Verdict, Vec<Finding>)> {
    let Some(member) = scan.member(id) else { return Ok((Verdict::Unknown, Vec::new())) };
    let mut findings: Vec<Finding> = known.iter().map(|finding| (*finding).clone()).collect();
    let mut verdict = links(scan, member, id, name, &mut findings);
    if let Some((code, _)) = member.reading.fault() {
        let elsewhere = code == Code::NotQcow2 && !should_be_image(stores, member);
        verdict = if code == Code::Io || elsewhere { Verdict::Unknown } else { Verdict::Damaged };
    } else if level == Level::Structure {
        let (structure, more) = structure(stores, member, name)?;
        verdict = verdict.max(structure);
        findings.extend(more);
    }
    if verdict == Verdict::Damaged && member.incoming == Some(Incoming::Writer) {
        // What is half-written is no damage.
        verdict = Verdict::Unknown;
    }
    Ok((verdict, findings))
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

/// Checks tables and reference counts. Only a failing store is an error.
fn structure(stores: &Stores, member: &Member, name: &str) -> Result<(Verdict, Vec<Finding>)> {
    let told = |code: Code, message: String| Finding { member: name.to_owned(), code, message };
    let report: Report = match open_image(stores, &member.key) {
        Ok(image) => match check(&image, &Limits::default()) {
            Ok(report) => report,
            Err(error) => return Ok((verdict_of(&error), vec![told(error.code(), error.to_string())])),
        },
        Err(StoreError::Image { source, .. }) => {
            return Ok((verdict_of(&source), vec![told(source.code(), source.to_string())]));
        }
        // Gone since the scan: a delete came between.
        Err(error @ StoreError::NotFound { .. }) => {
            return Ok((Verdict::Unknown, vec![told(error.code(), error.to_string())]));
        }
        Err(error) => return Err(error.into()),
    };
    let verdict = match (report.is_damaged(), report.incomplete) {
        (true, _) => Verdict::Damaged,
        (false, true) => Verdict::Unknown,
        (false, false) => Verdict::Sound,
    };
    let mut findings: Vec<Finding> =
        report.findings.into_iter().map(|found| told(found.code, found.message)).collect();
    if let (true, Some(last)) = (report.findings_omitted > 0, findings.last()) {
        findings.push(told(last.code, format!("and {} more findings", report.findings_omitted)));
    }
    Ok((verdict, findings))
}

/// An image that cannot be read is damaged; a store that cannot be read says nothing.
fn verdict_of(error: &ImageError) -> Verdict {
    if error.kind() == Kind::Corrupt { Verdict::Damaged } else { Verdict::Unknown }
}
