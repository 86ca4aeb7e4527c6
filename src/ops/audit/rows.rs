//! CloudStack's rows against files.

use std::collections::{HashMap, HashSet};

use super::AuditFinding;
use super::ground::Ground;
use crate::chain::graph::{Key, NodeId, Parent};
use crate::cloudstack::records::{RefState, Row};
use crate::failure::Code;
use crate::store::facts::CheckpointFacts;
use crate::store::scan::Member;

/// How far up a line of rows without files is followed: no chain is longer.
const MAX_DEPTH: usize = 100_000;

pub fn check(ground: &Ground<'_>) -> Vec<AuditFinding> {
    let Some(records) = ground.options.records else { return Vec::new() };
    let mut found: Vec<AuditFinding> = ground.unknown_stores().cloned().map(AuditFinding::from).collect();
    let mut by_snapshot: HashMap<u64, Vec<&Row>> = HashMap::new();
    // What is there and cannot be a member, like a symbolic link, has a finding of the scan's.
    let told: HashSet<&str> = ground.scan.findings.iter().map(|finding| finding.member.as_str()).collect();
    for row in records.rows() {
        by_snapshot.entry(row.snapshot_id).or_default().push(row);
        found.extend(without_file(ground, row, &told));
    }
    for (id, member) in ground.members() {
        let Some(row) = ground.row(id).filter(|_| !ground.leaves(id)) else { continue };
        found.extend(given_up(ground, id, member, row));
        if !matches!(row.ref_state, RefState::Ready | RefState::Hidden) {
            continue;
        }
        found.extend(sizes(ground, id, member, row));
        found.extend(checkpoint(ground, id, member, row));
        found.extend(parent(ground, &by_snapshot, id, member, row));
    }
    found
}

/// A row that should have a file and has none.
fn without_file(ground: &Ground<'_>, row: &Row, told: &HashSet<&str>) -> Option<AuditFinding> {
    if !matches!(row.ref_state, RefState::Ready | RefState::Hidden) {
        return None;
    }
    let key = ground.place(row).filter(|key| ground.scan.graph.find(key).is_none())?;
    let member = ground.stores.display(&key);
    if told.contains(member.as_str()) {
        return None;
    }
    let message =
        format!("snapshot {} is {}, and its file is missing", row.snapshot_id, row.ref_state.as_str());
    Some(AuditFinding { code: Code::RowWithoutFile, member, message, bytes: row.physical_bytes })
}

/// A file that CloudStack has given up and that takes space.
fn given_up(ground: &Ground<'_>, id: NodeId, member: &Member, row: &Row) -> Option<AuditFinding> {
    let read = ground.is_read(id);
    let snapshot = row.snapshot_id;
    let (code, message) = match row.ref_state {
        RefState::Hidden if member.stub => return None,
        RefState::Hidden if read => {
            (Code::HiddenBytes, format!("snapshot {snapshot} is deleted, and kept for what builds on it"))
        }
        RefState::Hidden => {
            // On another store, or in the making, somebody may build on it; who is a full base does not.
            let alone = |row: &Row| {
                let place = ground.place(row).and_then(|key| ground.scan.graph.find(&key));
                place.is_some_and(|id| ground.scan.stands_alone(id))
            };
            let rows = ground.rows.as_ref();
            let expected = rows.is_some_and(|rows| rows.children(snapshot).any(|row| !alone(row)));
            if expected || member.incoming.is_some() || !ground.is_old(&member.stat) {
                return None;
            }
            (Code::HiddenTip, format!("snapshot {snapshot} is Hidden, and nobody builds on it"))
        }
        RefState::Destroyed => {
            let readers = if read { ", and other members read through it" } else { "" };
            (Code::DestroyedFile, format!("snapshot {snapshot} is Destroyed, and its file is there{readers}"))
        }
        RefState::Ready | RefState::Other(_) => return None,
    };
    Some(ground.of_member(id, code, message))
}

/// Sizes that disagree. A 0 in a row means that nobody filled it in.
fn sizes(ground: &Ground<'_>, id: NodeId, member: &Member, row: &Row) -> Vec<AuditFinding> {
    let mut found = Vec::new();
    let mut hold = |code, what: &str, row: Option<u64>, file: u64| {
        if let Some(row) = row.filter(|row| *row != 0 && *row != file) {
            let message = format!("{what} is {file} bytes, by its row {row}");
            let bytes = Some(row.abs_diff(file));
            found.push(AuditFinding { code, member: ground.name(id), message, bytes });
        }
    };
    // The stub of a deleted member is small, and its row stays as it was.
    if member.incoming.is_none() && !member.stub {
        hold(Code::FileSizeDisagrees, "its file", row.physical_bytes, member.stat.length);
    }
    if let Some(header) = member.reading.header() {
        hold(Code::DiskSizeDisagrees, "its disk", row.size_bytes, header.virtual_bytes);
    }
    found
}

/// A checkpoint file that the row names and that is not there.
fn checkpoint(ground: &Ground<'_>, id: NodeId, member: &Member, row: &Row) -> Option<AuditFinding> {
    let path = row.kvm_checkpoint_path.as_deref()?;
    if row.ref_state != RefState::Ready || member.checkpoint != CheckpointFacts::None {
        return None;
    }
    let message = format!("its row names the checkpoint file {path}, which is not there");
    Some(AuditFinding { code: Code::CheckpointMissing, member: ground.name(id), message, bytes: None })
}

/// A row whose parent is not the one that the header names.
fn parent(
    ground: &Ground<'_>,
    by_snapshot: &HashMap<u64, Vec<&Row>>,
    id: NodeId,
    member: &Member,
    row: &Row,
) -> Option<AuditFinding> {
    // A stub names what the deleted member's children were given; its row stays as it was.
    if member.stub || member.incoming.is_some() {
        return None;
    }
    let node = |id: NodeId| &ground.scan.graph.node(id).key;
    let header: Option<&Key> = match &ground.scan.graph.node(id).parent {
        Parent::None => None,
        Parent::Node(parent) => Some(node(*parent)),
        // The scan has told what is wrong.
        Parent::Missing(_) | Parent::Outside(_) | Parent::Ambiguous(_) | Parent::Unreadable => return None,
    };
    let mut named = row.parent_snapshot_id;
    for _ in 0..MAX_DEPTH {
        let Some(snapshot) = named else { break };
        let rows = by_snapshot.get(&snapshot).map_or(&[][..], Vec::as_slice);
        let places: Vec<(&Row, Option<Key>)> = rows.iter().map(|row| (*row, ground.place(row))).collect();
        if header.is_some() && places.iter().any(|(_, place)| place.as_ref() == header) {
            return None;
        }
        // Merged away, its children stand on what was below it; its row may stay as it was.
        let gone = places.iter().find(|(row, place)| {
            let at = place.as_ref().and_then(|key| ground.scan.graph.find(key));
            match at.and_then(|id| Some((id, ground.scan.member(id)?))) {
                Some((id, member)) => member.stub || ground.leaves(id),
                None => row.deletable(),
            }
        });
        let Some((gone, _)) = gone else { break };
        named = gone.parent_snapshot_id;
    }
    if named.is_none() && header.is_none() {
        return None;
    }
    if ground.scan.stands_alone(id) {
        let by_row = named.map_or_else(String::new, |snapshot| format!(" on snapshot {snapshot}"));
        let message = format!("by its row it stands{by_row}; it is a full base, and does not read that");
        return Some(AuditFinding { code: Code::StandsAlone, member: ground.name(id), message, bytes: None });
    }
    let by_row = named.map_or_else(|| "no parent".to_owned(), |snapshot| format!("snapshot {snapshot}"));
    let by_header = header.map_or_else(|| "no parent".to_owned(), |key| ground.stores.display(key));
    let message = format!("by its row it stands on {by_row}, by its header on {by_header}");
    Some(AuditFinding { code: Code::ParentDisagrees, member: ground.name(id), message, bytes: None })
}
