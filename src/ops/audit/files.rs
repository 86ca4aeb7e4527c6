//! Files against each other: what was left behind, checkpoint files that libvirt would refuse, other hypervisors.

use std::collections::{BTreeMap, HashSet};

use super::AuditFinding;
use super::ground::Ground;
use crate::chain::graph::{Key, NodeId};
use crate::cloudstack::paths::{SNAPSHOTS, checkpoint_of, snapshot_of};
use crate::failure::Code;
use crate::store::facts::CheckpointFacts;
use crate::store::record::StoreKind;
use crate::store::scan::survey::Survey;
use crate::store::scan::{Incoming, Member};

pub fn check(ground: &Ground<'_>, survey: &Survey) -> Vec<AuditFinding> {
    let mut found = Vec::new();
    let names: HashSet<(&str, String)> = survey
        .checkpoints
        .iter()
        .map(|(key, _)| (key.path.file_name(), key.path.parent().as_str().to_owned()))
        .collect();
    for (id, member) in ground.members() {
        found.extend(temporary(ground, id, member));
        found.extend(orphan(ground, id, member));
        found.extend(refused(ground, id, member, &names));
    }
    found.extend(survey.checkpoints.iter().filter_map(|(key, stat)| {
        let snapshot = Key { store: key.store, path: snapshot_of(&key.path)? };
        if ground.scan.graph.find(&snapshot).is_some() || !ground.is_old(stat) {
            return None;
        }
        let message = format!("there is no {}", ground.stores.display(&snapshot));
        let bytes = Some(stat.allocated_bytes);
        Some(AuditFinding {
            code: Code::OrphanCheckpoint,
            member: ground.stores.display(key),
            message,
            bytes,
        })
    }));
    found.extend(foreign(ground, survey));
    found
}

/// One of CloudStack's own temporaries that it left behind.
fn temporary(ground: &Ground<'_>, id: NodeId, member: &Member) -> Option<AuditFinding> {
    let left = member.temporary && !member.locks.any && ground.is_old(&member.stat);
    let message = || "CloudStack flattened a snapshot into it and did not remove it".to_owned();
    left.then(|| ground.of_member(id, Code::LeakedTemporary, message()))
}

/// A file among snapshots that no row names.
fn orphan(ground: &Ground<'_>, id: NodeId, member: &Member) -> Option<AuditFinding> {
    let map = ground.rows.as_ref()?;
    let store = ground.stores.get(member.key.store).ok()?;
    let among_snapshots =
        store.kind() != StoreKind::Plain && member.key.path.components().next() == Some(SNAPSHOTS);
    let in_use = member.temporary
        || member.incoming == Some(Incoming::Writer)
        || ground.leaves(id)
        || !ground.is_old(&member.stat);
    if !among_snapshots || in_use || !map.of(&member.key).is_empty() {
        return None;
    }
    // A row of another hypervisor, or of another role, is a row all the same.
    let url = store.config().url.as_ref().map(ToString::to_string);
    let records = ground.options.records?;
    if records.lookup(member.key.path.as_str(), url.as_deref()).is_some() || ground.is_replica(id) {
        return None;
    }
    let message = if ground.is_read(id) {
        "no row names it, but other members read through it".to_owned()
    } else {
        "no row names it, and no member reads through it".to_owned()
    };
    Some(ground.of_member(id, Code::OrphanFile, message))
}

/// A checkpoint file whose parent is none of its volume's.
fn refused(
    ground: &Ground<'_>,
    id: NodeId,
    member: &Member,
    names: &HashSet<(&str, String)>,
) -> Option<AuditFinding> {
    let CheckpointFacts::Parent(Some(parent)) = &member.checkpoint else { return None };
    let directory = checkpoint_of(&member.key.path)?.parent();
    // A chain may lie on several stores, and its checkpoint files beside it.
    if names.contains(&(parent.as_str(), directory.as_str().to_owned())) {
        return None;
    }
    let message = format!(
        "its checkpoint file names {parent:?} as parent, which has no checkpoint file in {directory}"
    );
    Some(AuditFinding { code: Code::CheckpointRefused, member: ground.name(id), message, bytes: None })
}

/// One finding for each store and other hypervisor.
fn foreign(ground: &Ground<'_>, survey: &Survey) -> Vec<AuditFinding> {
    let mut counted: BTreeMap<(usize, &str), (u64, u64)> = BTreeMap::new();
    for file in &survey.foreign {
        let (files, bytes) = counted.entry((file.key.store, file.hypervisor)).or_default();
        *files += 1;
        *bytes += file.allocated_bytes;
    }
    let finding = |((store, hypervisor), (files, bytes)): ((usize, &str), (u64, u64))| {
        let member = ground.stores.get(store).map_or_else(|_| String::new(), |store| store.id().to_string());
        let (verb, what) = if files == 1 { ("is", "file") } else { ("are", "files") };
        let message = format!("{files} {what} {verb} {hypervisor}'s; nothing was opened");
        AuditFinding { code: Code::ForeignFiles, member, message, bytes: Some(bytes) }
    };
    counted.into_iter().map(finding).collect()
}
