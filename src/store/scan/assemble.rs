//! From members to their graph: backing names mapped, faults told, incoming ones marked.

use std::collections::HashMap;

use crate::chain::graph::{Graph, Key, Node, NodeId, Parent};
use crate::cloudstack::backing::{At, NameMap, Target};
use crate::failure::Code;
use crate::ids::StorePath;
use crate::store::Stores;
use crate::store::error::{Result, StoreError};
use crate::store::facts::CheckpointFacts;
use crate::store::scan::{Checkpoints, Finding, Incoming, Member, Scan, ScanOptions};

pub fn assemble(
    stores: &Stores,
    mut members: Vec<Member>,
    mut findings: Vec<Finding>,
    options: &ScanOptions<'_>,
    checkpoints: &Checkpoints,
) -> Result<Scan> {
    let names = NameMap::new(stores.iter().map(|(_, store)| store.names()).collect());
    let ids: HashMap<Key, NodeId> =
        members.iter().enumerate().map(|(index, member)| (member.key.clone(), NodeId(index))).collect();
    let mut nodes = Vec::with_capacity(members.len());
    for member in &mut members {
        let display = stores.display(&member.key);
        let parent = parent_of(&names, member, &ids, |code, message| {
            findings.push(Finding { member: display.clone(), code, message });
        });
        nodes.push(Node { key: member.key.clone(), parent });
    }
    let graph = Graph::new(nodes).map_err(|error| StoreError::Usage { detail: error.to_string() })?;
    for (index, member) in members.iter_mut().enumerate() {
        let id = NodeId(index);
        let display = stores.display(&member.key);
        if graph.on_cycle(id) {
            let message = "its backing names lead back to itself".to_owned();
            findings.push(Finding { member: display.clone(), code: Code::Cycle, message });
        }
        let store = stores.get(member.key.store)?.record().map(|record| record.id.as_str());
        let made_for = member.reading.header().and_then(|header| header.stub.as_deref());
        member.stub = made_for.is_some() && made_for == store;
        member.incoming = incoming(member, &graph, id, options, checkpoints.has(&member.key));
        if let CheckpointFacts::Unreadable(reason) = &member.checkpoint {
            let message = format!("its checkpoint file cannot be read: {reason}");
            findings.push(Finding { member: display, code: Code::CheckpointUnreadable, message });
        }
    }
    Ok(Scan { members, graph, findings })
}

/// What is below a member, and a finding if that is not as it should be.
fn parent_of(
    names: &NameMap,
    member: &mut Member,
    ids: &HashMap<Key, NodeId>,
    mut tell: impl FnMut(Code, String),
) -> Parent {
    if let Some((code, message)) = member.reading.fault() {
        if code != Code::Io {
            tell(code, message);
        }
        return Parent::Unreadable;
    }
    let Some(header) = member.reading.header() else { return Parent::Unreadable };
    let Some(name) = header.backing.as_deref() else { return Parent::None };
    let text = String::from_utf8_lossy(name).into_owned();
    if let Some(format) = header.backing_format.as_deref().filter(|format| *format != "qcow2") {
        tell(Code::WrongFormat, format!("its backing format is {format:?}, not qcow2"));
        return Parent::Outside(text);
    }
    let exists = |store: usize, path: &StorePath| ids.contains_key(&Key { store, path: path.clone() });
    let child = At { store: member.key.store, path: &member.key.path };
    let target = names.resolve(name, child, &exists);
    match target.code() {
        Some(Code::UnknownPrefix) => {
            tell(Code::UnknownPrefix, format!("its backing name {text:?} has a prefix of no store"));
        }
        Some(code) => tell(code, format!("its backing name is {text:?}")),
        None => {}
    }
    match target {
        Target::Member { store, path, form } => {
            member.form = Some((form, store));
            ids.get(&Key { store, path }).map_or(Parent::Missing(text), |id| Parent::Node(*id))
        }
        Target::Missing => Parent::Missing(text),
        Target::Ambiguous(_) => Parent::Ambiguous(text),
        Target::Outside(_) => Parent::Outside(text),
    }
}

/// Whether a member is still being made.
fn incoming(
    member: &Member,
    graph: &Graph,
    id: NodeId,
    options: &ScanOptions<'_>,
    has_checkpoints: bool,
) -> Option<Incoming> {
    if member.locks.writer {
        return Some(Incoming::Writer);
    }
    // Whole since it has its name, and never compared with a checkpoint file.
    if member.stub {
        return None;
    }
    if member.temporary || !has_checkpoints {
        let settled = member.stat.modified_ns + options.settle_ns <= options.now_ns;
        return (!settled && options.settle_ns > 0).then_some(Incoming::Unsettled);
    }
    let header = match &graph.node(id).parent {
        Parent::None => None,
        Parent::Node(parent) => Some(graph.node(*parent).key.path.file_name().to_owned()),
        Parent::Missing(name) | Parent::Outside(name) | Parent::Ambiguous(name) => {
            Some(name.rsplit('/').next().unwrap_or_default().to_owned())
        }
        // A damaged header is damage, not a backup under way.
        Parent::Unreadable => return None,
    };
    match &member.checkpoint {
        CheckpointFacts::None => Some(Incoming::NoCheckpoint),
        CheckpointFacts::Parent(checkpoint) if *checkpoint != header => {
            Some(Incoming::ParentsDisagree { header, checkpoint: checkpoint.clone() })
        }
        // What cannot be read disagrees with nothing; whoever must edit it will refuse.
        CheckpointFacts::Parent(_) | CheckpointFacts::Unreadable(_) => None,
    }
}
