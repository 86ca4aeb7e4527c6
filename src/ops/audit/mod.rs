//! `audit`: what lies on the stores against headers, checkpoint files, CloudStack's rows and the policy. Writes
//! nothing, and needs no store to be opted in.
//!
//! The scan's own findings come first (missing parents, unknown prefixes, cycles, images that cannot be read), then
//! files, rows, policy, each in the order of the stores' paths.

mod files;
mod ground;
mod policy;
mod rows;
mod totals;

use serde::Serialize;
use serde::ser::SerializeStruct as _;

use crate::cloudstack::records::Records;
use crate::failure::{Code, Severity};
use crate::ops::Result;
use crate::ops::policy::Policy;
use crate::progress::Cancel;
use crate::store::Stores;
use crate::store::scan::survey::Survey;
use crate::store::scan::{Finding, Scan};
use ground::Ground;
pub use totals::{ChainTotal, Owner, OwnerTotal, Sum, Totals};

/// What to hold the stores against.
#[derive(Debug, Default)]
pub struct AuditOptions<'a> {
    /// CloudStack's rows.
    pub records: Option<&'a Records>,
    /// How chains should be.
    pub policy: Policy,
    /// The time, nanoseconds since 1970.
    pub now_ns: i128,
    /// How long a file must have been left alone to count as left behind, in nanoseconds.
    pub min_age_ns: i128,
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq, utoipa::ToSchema)]
pub struct AuditFinding {
    /// The reason code; `severity` (`info`, `warning`, `error`) follows from it.
    #[schema(value_type = String)]
    pub code: Code,
    /// The member or other file, or the store, as it can be written on the command line.
    pub member: String,
    /// What is so.
    pub message: String,
    /// The bytes it is about.
    pub bytes: Option<u64>,
}

impl Serialize for AuditFinding {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        let mut fields = to.serialize_struct("AuditFinding", 5)?;
        fields.serialize_field("code", &self.code)?;
        fields.serialize_field("severity", self.code.severity().word())?;
        fields.serialize_field("member", &self.member)?;
        fields.serialize_field("message", &self.message)?;
        fields.serialize_field("bytes", &self.bytes)?;
        fields.end()
    }
}

impl From<Finding> for AuditFinding {
    fn from(finding: Finding) -> Self {
        let Finding { member, code, message } = finding;
        Self { code, member, message, bytes: None }
    }
}

/// All that was found.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct AuditReport {
    /// What is worth telling.
    pub findings: Vec<AuditFinding>,
    /// What takes how much.
    pub totals: Totals,
}

impl AuditReport {
    /// Whether anything is wrong, and not only worth knowing.
    #[must_use]
    pub fn anything_wrong(&self) -> bool {
        self.findings.iter().any(|finding| finding.code.severity() >= Severity::Warning)
    }
}

/// Looks through all stores. Reads directories and, beyond the scan, no file.
pub fn audit(
    stores: &Stores,
    scan: &Scan,
    options: &AuditOptions<'_>,
    cancel: &Cancel,
) -> Result<AuditReport> {
    let survey = Survey::run(stores)?;
    cancel.check()?;
    let ground = Ground::new(stores, scan, options, cancel);
    let mut findings: Vec<AuditFinding> = scan.findings.iter().cloned().map(AuditFinding::from).collect();
    findings.extend(files::check(&ground, &survey));
    findings.extend(rows::check(&ground));
    findings.extend(policy::check(&ground));
    Ok(AuditReport { findings, totals: totals::sum(&ground) })
}
