//! Install paths: where CloudStack keeps what, relative to a store's root.
//!
//! | path | what |
//! |---|---|
//! | `snapshots/<account>/<volume>/<uuid>` | a volume snapshot of KVM; no extension |
//! | `snapshots/<account>/<volume>/<uuid>_temp` | CloudStack's own flattened copy of one, short-lived |
//! | `checkpoints/<account>/<volume>/<uuid>` | its libvirt checkpoint; the same uuid |
//! | `template/tmpl/<account>/<template>/<file>` | a template, beside its `template.properties` |
//! | `volumes/<account>/<volume>/<file>` | an uploaded or migrated volume |
//!
//! On primary storage, where snapshots that are not backed up stay, account and volume are missing:
//! `snapshots/<uuid>`, `checkpoints/<uuid>`; and the row names the file by its absolute path on KVM hosts,
//! `/mnt/<pool uuid>/snapshots/<uuid>`.
//!
//! The directory names are those of CloudStack's `TemplateConstants`, the suffix that of
//! `ConvertSnapshotCommand`. Account, volume and template are numbers of database rows.

use crate::ids::StorePath;

/// The directory of snapshots.
pub const SNAPSHOTS: &str = "snapshots";
/// The directory of checkpoint files.
pub const CHECKPOINTS: &str = "checkpoints";
/// What CloudStack appends to the name of a snapshot that it has flattened for a moment.
pub const TEMPORARY_SUFFIX: &str = "_temp";

/// Where a store keeps its snapshots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// Secondary storage: by account and volume.
    #[default]
    Secondary,
    /// A pool of primary storage: all in one directory.
    Primary,
}

/// Which of CloudStack's directories a path lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Area {
    /// `snapshots/`.
    Snapshots,
    /// `checkpoints/`.
    Checkpoints,
    /// `template/tmpl/`.
    Template,
    /// `volumes/`.
    Volumes,
}

impl Area {
    /// The directory, relative to the store's root.
    #[must_use]
    pub fn directory(self) -> &'static str {
        match self {
            Self::Snapshots => SNAPSHOTS,
            Self::Checkpoints => CHECKPOINTS,
            Self::Template => "template/tmpl",
            Self::Volumes => "volumes",
        }
    }
}

/// A path of CloudStack's layout, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InstallPath<'a> {
    /// Which directory.
    pub area: Area,
    /// The account's number.
    pub account: u64,
    /// The number of the volume (snapshots, checkpoints, volumes) or of the template.
    pub owner: u64,
    /// The file name.
    pub file: &'a str,
}

impl<'a> InstallPath<'a> {
    /// Takes a path apart; `None` if it is not of CloudStack's layout (numbers with leading zeros are not).
    #[must_use]
    pub fn parse(path: &'a StorePath) -> Option<Self> {
        let text = path.as_str();
        [Area::Snapshots, Area::Checkpoints, Area::Template, Area::Volumes].into_iter().find_map(|area| {
            let mut parts = text.strip_prefix(area.directory())?.strip_prefix('/')?.split('/');
            let (account, owner, file) = (number(parts.next()?)?, number(parts.next()?)?, parts.next()?);
            parts.next().is_none().then_some(Self { area, account, owner, file })
        })
    }

    /// What the file name says.
    #[must_use]
    pub fn name_kind(&self) -> NameKind {
        name_kind(self.file)
    }
}

/// What the name of a file under `snapshots/` says. The content may still be something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameKind {
    /// Nothing special: a member, if it is a qcow2 image.
    Plain,
    /// `<uuid>_temp`: CloudStack's own flattened copy, rewritten and removed at any time.
    Temporary,
    /// By its extension a file of another hypervisor (XenServer, VMware, Hyper-V): left alone.
    Foreign,
}

/// Extensions of other hypervisors' snapshot files, lower case, and whose they are.
const FOREIGN: [(&str, &str); 8] = [
    ("vhd", XENSERVER),
    ("vhdx", "Hyper-V"),
    ("vmdk", VMWARE),
    ("ova", VMWARE),
    ("ovf", VMWARE),
    ("vmsd", VMWARE),
    ("vmsn", VMWARE),
    ("mf", VMWARE),
];

/// Whose snapshots are single files with an extension.
const XENSERVER: &str = "XenServer";
/// Whose snapshots are directories of files.
pub const VMWARE: &str = "VMware";

/// Which other hypervisor a file is one of, by its extension.
#[must_use]
pub fn foreign_hypervisor(file: &str) -> Option<&'static str> {
    let (_, extension) = file.rsplit_once('.')?;
    let of = FOREIGN.iter().find(|(foreign, _)| extension.eq_ignore_ascii_case(foreign));
    of.map(|(_, hypervisor)| *hypervisor)
}

/// What a file name says.
#[must_use]
pub fn name_kind(file: &str) -> NameKind {
    if file.strip_suffix(TEMPORARY_SUFFIX).is_some_and(is_uuid) {
        return NameKind::Temporary;
    }
    if foreign_hypervisor(file).is_some() { NameKind::Foreign } else { NameKind::Plain }
}

/// Takes the absolute install path of a snapshot on primary storage apart: the pool's mount on KVM hosts, and the
/// path below it. `None` for a path of another form.
#[must_use]
pub fn primary_path(install_path: &str) -> Option<(&str, StorePath)> {
    let (directory, file) = install_path.strip_prefix('/')?.rsplit_once('/')?;
    let mount = directory.strip_suffix(SNAPSHOTS)?;
    let path = StorePath::parse(&format!("{SNAPSHOTS}/{file}")).ok()?;
    // The leading slash again, without the trailing one.
    install_path.get(..mount.len()).filter(|_| mount.ends_with('/')).map(|mount| (mount, path))
}

/// The checkpoint file that belongs to a snapshot: the same path under `checkpoints/`. Also for primary
/// storage, where both lie right in their directories. `None` if the path is not under `snapshots/`.
#[must_use]
pub fn checkpoint_of(snapshot: &StorePath) -> Option<StorePath> {
    moved(snapshot, SNAPSHOTS, CHECKPOINTS)
}

/// The snapshot that a checkpoint file belongs to, the reverse of [`checkpoint_of`].
#[must_use]
pub fn snapshot_of(checkpoint: &StorePath) -> Option<StorePath> {
    moved(checkpoint, CHECKPOINTS, SNAPSHOTS)
}

fn moved(path: &StorePath, from: &str, to: &str) -> Option<StorePath> {
    let rest = path.as_str().strip_prefix(from)?.strip_prefix('/')?;
    StorePath::parse(&format!("{to}/{rest}")).ok()
}

/// Whether a text has the form 8-4-4-4-12 of hex digits.
#[must_use]
pub fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(index, byte)| match index {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// A decimal number in the one form that CloudStack writes.
fn number(text: &str) -> Option<u64> {
    let canonical = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if canonical { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::{
        Area, InstallPath, NameKind, checkpoint_of, foreign_hypervisor, is_uuid, name_kind, primary_path,
        snapshot_of,
    };
    use crate::ids::StorePath;

    const UUID: &str = "908a9b1c-7c2f-4f0e-9a57-3d7d0a6c11ab";

    fn path(text: &str) -> StorePath {
        StorePath::parse(text).unwrap()
    }

    #[test]
    fn each_area_is_taken_apart() {
        for (text, area, owner) in [
            (format!("snapshots/2/7/{UUID}"), Area::Snapshots, 7),
            (format!("checkpoints/2/7/{UUID}"), Area::Checkpoints, 7),
            (format!("template/tmpl/2/201/{UUID}"), Area::Template, 201),
            (format!("volumes/2/0/{UUID}"), Area::Volumes, 0),
        ] {
            let path = path(&text);
            assert_eq!(
                InstallPath::parse(&path),
                Some(InstallPath { area, account: 2, owner, file: UUID }),
                "{text}"
            );
            assert!(text.starts_with(area.directory()));
        }
    }

    #[test]
    fn other_paths_are_not_cloudstacks() {
        for text in [
            "",
            "snapshots",
            "snapshots/2/7",
            "snapshots/2/7/dir/x",
            "snapshots/02/7/x",
            "snapshots/+2/7/x",
            "snapshots/2/99999999999999999999999/x",
            "snapshotss/2/7/x",
            "template/2/201/x",
            "systemvm/x",
        ] {
            assert_eq!(InstallPath::parse(&path(text)), None, "{text}");
        }
    }

    #[test]
    fn names_tell_temporary_and_foreign_files() {
        for (name, kind) in [
            (UUID.to_owned(), NameKind::Plain),
            ("s1.qcow2".to_owned(), NameKind::Plain),
            (format!("{UUID}_temp"), NameKind::Temporary),
            ("_temp".to_owned(), NameKind::Plain),
            ("mine_temp".to_owned(), NameKind::Plain),
            (format!("{UUID}.vhd"), NameKind::Foreign),
            (format!("{UUID}.VMDK"), NameKind::Foreign),
        ] {
            assert_eq!(name_kind(&name), kind, "{name}");
        }
        let temporary = path(&format!("snapshots/2/7/{UUID}_temp"));
        assert_eq!(InstallPath::parse(&temporary).map(|p| p.name_kind()), Some(NameKind::Temporary));
        assert!(!is_uuid("908a9b1c07c2f-4f0e-9a57-3d7d0a6c11ab"));
        assert!(!is_uuid("{08a9b1c-7c2f-4f0e-9a57-3d7d0a6c11a}"));
    }

    #[test]
    fn checkpoints_are_counterparts() {
        for rest in [format!("2/7/{UUID}"), UUID.to_owned()] {
            let (snapshot, checkpoint) =
                (path(&format!("snapshots/{rest}")), path(&format!("checkpoints/{rest}")));
            assert_eq!(checkpoint_of(&snapshot), Some(checkpoint.clone()));
            assert_eq!(snapshot_of(&checkpoint), Some(snapshot));
            assert_eq!(checkpoint_of(&checkpoint), None);
        }
        assert_eq!(checkpoint_of(&path("snapshots")), None);
    }

    #[test]
    fn paths_on_primary_storage() {
        let mount = "/mnt/5a2f7c80-0000-3000-8000-000000000001";
        let whole = format!("{mount}/snapshots/{UUID}");
        let (found, below) = primary_path(&whole).unwrap();
        assert_eq!((found, below), (mount, path(&format!("snapshots/{UUID}"))));
        for other in ["snapshots/2/7/x", "/mnt/pool/x", "/mnt/pool/mysnapshots/x", "/snapshots/x", ""] {
            assert_eq!(primary_path(other), None, "{other}");
        }
    }

    #[test]
    fn extensions_tell_the_hypervisor() {
        for (name, hypervisor) in
            [("a.vhd", Some("XenServer")), ("a.VMDK", Some("VMware")), ("a.qcow2", None), (UUID, None)]
        {
            assert_eq!(foreign_hypervisor(name), hypervisor, "{name}");
        }
    }
}
