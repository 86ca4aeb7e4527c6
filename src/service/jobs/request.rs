//! What a job is asked to do, as requests and records have it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ops::delete::ModeChoice;
use crate::ops::verify::Level;
use crate::service::view::MemberName;

/// A job of one of the kinds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum JobRequest {
    /// Merge members into their children, or remove a tip.
    Delete(DeleteRequest),
    /// Check members for damage.
    Verify(VerifyRequest),
    /// Read settled members once, and keep the digests by which damage is found.
    Adopt(AdoptRequest),
    /// Make one image of a member's view that stands alone.
    Flatten(FlattenRequest),
    /// Hold files against headers, checkpoint files and the policy.
    Audit(AuditRequest),
    /// Finish or take back what was interrupted, and end what is due.
    Recover(RecoverRequest),
    /// Merge what CloudStack has deleted; stubs keep the names for it, its rows stay as they are.
    Reclaim(ReclaimRequest),
    /// Bring members from another zone.
    Copy(CopyRequest),
}

/// `delete`, with the flags of the command line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub struct DeleteRequest {
    /// The members to delete.
    #[schema(min_items = 1)]
    pub members: Vec<MemberName>,
    /// You vouch that CloudStack has given the members up. Else its rows have to show it, those of the configuration: `[schedule]
    /// records`, or the variable `QCHAIN_DATABASE`.
    #[serde(default)]
    pub assume_deleted: bool,
    /// You vouch that the chain has been ended, so that its newest member may go.
    #[serde(default)]
    pub end_of_chain: bool,
    /// Leave checkpoint files that cannot be edited as they are.
    #[serde(default)]
    pub force: bool,
    /// Do not wait until files without checkpoint have settled.
    #[serde(default)]
    pub now: bool,
    /// Build and prove everything, report, and throw it away.
    #[serde(default)]
    pub rehearse: bool,
    /// How to move data.
    #[serde(default)]
    pub mode: Mode,
    /// You vouch that nobody else, on any host, has the members open: merge in place where no locks prove it, as on an
    /// export without a mount.
    #[serde(default)]
    pub exclusive: bool,
    /// How long deleted members keep their names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_seconds: Option<u32>,
    /// How long old files are kept after that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention_seconds: Option<u32>,
}

/// How to move data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The cheapest that works.
    #[default]
    Auto,
    /// By sharing extents.
    Clone,
    /// By writing into the lowest deleted member.
    InPlace,
    /// By copying.
    Copy,
}

impl From<Mode> for ModeChoice {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Auto => Self::Auto,
            Mode::Clone => Self::Clone,
            Mode::InPlace => Self::InPlace,
            Mode::Copy => Self::Copy,
        }
    }
}

/// `verify`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// The members; all if none is given.
    #[serde(default)]
    pub members: Vec<MemberName>,
    /// How far to look.
    #[serde(default)]
    pub level: Depth,
    /// At level data: read only so much of each member, chosen by chance: above 0, at most 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 1)]
    pub fraction: Option<f64>,
    /// At level data: stop reading after this time; what was left alone for longest comes first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_seconds: Option<u32>,
    /// At level data: leave out what was read, all of it, since so long; and members that are not adopted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub older_than_seconds: Option<u32>,
    /// Read so many bytes a second at most, beside the limit of all jobs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_bytes_per_second: Option<u64>,
}

/// How far to look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Depth {
    /// Headers and backing names.
    Links,
    /// Tables and reference counts too.
    #[default]
    Structure,
    /// Every byte of adopted members.
    Data,
}

impl From<Depth> for Level {
    fn from(depth: Depth) -> Self {
        match depth {
            Depth::Links => Self::Links,
            Depth::Structure => Self::Structure,
            Depth::Data => Self::Data,
        }
    }
}

/// `adopt`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AdoptRequest {
    /// The members, with all below each; all settled ones if none is given.
    #[serde(default)]
    pub members: Vec<MemberName>,
    /// Do not wait until files without checkpoint have settled.
    #[serde(default)]
    pub now: bool,
    /// Take what a changed or quarantined member is now for right.
    #[serde(default)]
    pub accept_changed: bool,
    /// Begin no member after this time; another job goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_seconds: Option<u32>,
}

/// `flatten`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FlattenRequest {
    /// The member.
    pub member: MemberName,
    /// Where the image goes.
    pub to: Destination,
    /// Its format.
    #[serde(default)]
    pub format: Format,
    /// The cluster size of a qcow2 image in bytes: a power of two from 512 to 2 MiB; 64 KiB if none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_bytes: Option<u32>,
    /// Compress clusters; for qcow2 in the cheapest layout.
    #[serde(default)]
    pub compress: Compress,
    /// The same bytes wherever the same view is flattened.
    #[serde(default)]
    pub canonical: bool,
    /// Read the new image back before it gets its name.
    #[serde(default)]
    pub read: bool,
    /// Take members that were found damaged.
    #[serde(default)]
    pub force: bool,
}

impl FlattenRequest {
    /// A qcow2 image of a member.
    #[must_use]
    pub fn of(member: MemberName, to: Destination) -> Self {
        Self {
            member,
            to,
            format: Format::Qcow2,
            cluster_bytes: None,
            compress: Compress::None,
            canonical: false,
            read: false,
            force: false,
        }
    }
}

/// Where an image goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Destination {
    /// A template of CloudStack's: `[STORE:]ACCOUNT/ID/NAME`.
    Template(String),
    /// A volume on secondary storage: `[STORE:]ACCOUNT/ID/NAME`.
    Volume(String),
    /// A file of that name in the directory `[server] exports` of the host that runs the job.
    Export(String),
    /// `<member>_temp` beside the member, where CloudStack's own flatten puts it; an older one is replaced.
    Temporary,
}

/// The format of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Version 3.
    #[default]
    Qcow2,
    /// The bytes of the disk.
    Raw,
}

impl Format {
    /// The word in requests.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Compress {
    /// Not at all.
    #[default]
    None,
    /// By Zstandard.
    Zstd,
    /// By deflate.
    Zlib,
}

/// `audit`: files against headers and checkpoint files, and against the rows of the configuration, if it has any.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AuditRequest {
    /// How long a file must have been left alone to count as left behind; 8 hours if none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_age_seconds: Option<u32>,
}

/// `recover`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RecoverRequest {
    /// First let the tree be changed again that this operation froze; the beginning of its id is enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thaw: Option<String>,
}

/// `reclaim`. Rows are those of the configuration: `[schedule] records`, or the variable `QCHAIN_DATABASE`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReclaimRequest {
    /// Tell what would be merged, and merge nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// Do not wait until files without checkpoint have settled.
    #[serde(default)]
    pub now: bool,
    /// Begin no merge after this time; what was begun is finished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_seconds: Option<u32>,
}

/// `copy`: this side pulls.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub struct CopyRequest {
    /// The members, as the other zone names them: `[STORE:]install/path`.
    #[schema(min_items = 1)]
    pub members: Vec<String>,
    /// The zone, by its name in this service's configuration.
    pub from: String,
    /// The id of the store that takes them; needed if there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Bring each as one full image.
    #[serde(default)]
    pub flatten: bool,
    /// Tell what would come, and bring nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// Read what was written back before it gets its name.
    #[serde(default)]
    pub read: bool,
    /// Bring checkpoint files, too; where the volume here has some that is done anyway.
    #[serde(default)]
    pub checkpoints: bool,
    /// Other accounts and volumes here: `ACCOUNT/VOLUME=ACCOUNT/VOLUME`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub map: Vec<String>,
    /// Ask for so many bytes a second at most, beside the limit of all jobs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_bytes_per_second: Option<u64>,
}

impl JobRequest {
    /// The words of all kinds.
    pub const KINDS: [&str; 8] =
        ["delete", "verify", "adopt", "flatten", "audit", "recover", "reclaim", "copy"];

    /// Its kind, as the tag has it.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Delete(_) => "delete",
            Self::Verify(_) => "verify",
            Self::Adopt(_) => "adopt",
            Self::Flatten(_) => "flatten",
            Self::Audit(_) => "audit",
            Self::Recover(_) => "recover",
            Self::Reclaim(_) => "reclaim",
            Self::Copy(_) => "copy",
        }
    }

    /// The members that it names.
    #[must_use]
    pub fn members(&self) -> &[MemberName] {
        match self {
            Self::Delete(request) => &request.members,
            Self::Verify(request) => &request.members,
            Self::Adopt(request) => &request.members,
            Self::Flatten(request) => std::slice::from_ref(&request.member),
            // Those of a copy are another zone's.
            Self::Audit(_) | Self::Recover(_) | Self::Reclaim(_) | Self::Copy(_) => &[],
        }
    }

    /// The same with members by their full names.
    pub fn set_members(&mut self, full: Vec<String>) {
        let mut full = full.into_iter().map(MemberName::Plain);
        match self {
            Self::Delete(request) => request.members = full.collect(),
            Self::Verify(request) => request.members = full.collect(),
            Self::Adopt(request) => request.members = full.collect(),
            Self::Flatten(request) => {
                if let Some(member) = full.next() {
                    request.member = member;
                }
            }
            Self::Audit(_) | Self::Recover(_) | Self::Reclaim(_) | Self::Copy(_) => {}
        }
    }

    /// Whether it writes to a store, beside notes of what was read.
    #[must_use]
    pub fn changes(&self) -> bool {
        match self {
            // A copy that is only looked at keeps leaf tables for a moment.
            Self::Delete(_) | Self::Adopt(_) | Self::Recover(_) | Self::Copy(_) => true,
            Self::Flatten(request) => !matches!(request.to, Destination::Export(_)),
            Self::Reclaim(request) => !request.dry_run,
            Self::Verify(_) | Self::Audit(_) => false,
        }
    }
}

/// What of a kind is done first: 0 for what somebody waits for, 3 for what can wait. An unknown kind comes last.
#[must_use]
pub fn rank(kind: &str) -> u8 {
    match kind {
        "flatten" => 0,
        "delete" | "recover" => 1,
        "audit" | "adopt" | "reclaim" => 2,
        _ => 3,
    }
}

/// Whether two jobs of those kinds may not run at once on one chain.
#[must_use]
pub fn excludes(one: &str, other: &str) -> bool {
    let changes = |kind: &str| matches!(kind, "delete" | "adopt" | "reclaim");
    changes(one) || changes(other)
}

#[cfg(test)]
mod tests {
    use super::{Destination, JobRequest};

    #[test]
    fn requests_are_read_strictly() {
        let request: JobRequest =
            serde_json::from_str(r#"{"kind": "flatten", "member": "a", "to": {"export": "x"}}"#).unwrap();
        let JobRequest::Flatten(flatten) = &request else { panic!("{request:?}") };
        assert_eq!(flatten.to, Destination::Export("x".to_owned()));
        assert_eq!(
            serde_json::from_value::<JobRequest>(serde_json::to_value(&request).unwrap()).unwrap(),
            request
        );
        for bad in [
            r#"{"kind": "dig"}"#,
            r#"{"kind": "delete"}"#,
            r#"{"kind": "verify", "colour": 1}"#,
            r#"{"kind": "verify", "level": "deep"}"#,
            r#"{"kind": "flatten", "member": "a", "to": {"file": "/etc/passwd"}}"#,
        ] {
            assert!(serde_json::from_str::<JobRequest>(bad).is_err(), "{bad}");
        }
        let every = JobRequest::KINDS.map(|kind| {
            let text = format!(
                r#"{{"kind": "{kind}", "members": [], "member": "a", "to": "temporary", "from": "x"}}"#
            );
            serde_json::from_str::<JobRequest>(&text).map(|request| request.kind() == kind)
        });
        assert!(every.iter().flatten().all(|same| *same));
    }
}
