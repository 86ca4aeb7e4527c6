//! What a simulated history begins with: a few small chains, in either layout, and what they show.

use std::sync::{Arc, OnceLock};

use qchain::backend::memory::MemoryStore;
use qchain::backend::{Backend, Capabilities, Identity};
use qchain::ids::StorePath;
use qchain::store::record::{DIRECTORIES, StoreKind, StoreRecord};

use super::super::builder::{Cell, Format, Spec, mix};
use super::super::store::record;

/// Clusters of each disk.
pub const CLUSTERS: u64 = 6;

/// Which chains: the parent of each member.
const SHAPES: &[&[Option<usize>]] = &[
    &[None, Some(0), Some(1), Some(2)],
    &[None, Some(0), Some(1), Some(1), Some(2)],
    &[None, Some(0), Some(0), Some(1)],
    &[None, Some(0), None, Some(2)],
];

/// How the cluster size is chosen: small ones are copied, large ones can be cloned.
const BITS: &[u32] = &[9, 12];

/// One member as it is made.
#[derive(Clone, Debug)]
pub struct Made {
    pub name: String,
    pub parent: Option<String>,
    pub bytes: Vec<u8>,
    pub view: Vec<u8>,
}

/// Chains that are made once.
#[derive(Debug)]
pub struct Template {
    pub members: Vec<Made>,
}

/// A small image of random clusters.
pub fn image(bits: u32, backing: Option<&str>, seed: u64) -> Spec {
    let mut spec = Spec::new(Format::plain(bits), CLUSTERS << bits, seed);
    spec.backing = backing.map(str::to_owned);
    for cluster in 0..CLUSTERS {
        match mix(seed, cluster) % 8 {
            0..=3 => spec = spec.cell(cluster, Cell::Data),
            4 => spec = spec.cell(cluster, Cell::Zero),
            _ => {}
        }
    }
    // No image says nothing at all.
    spec.cell(seed % CLUSTERS, Cell::Data)
}

fn template(index: usize) -> Template {
    let (shape, bits) = (SHAPES[index % SHAPES.len()], BITS[index / SHAPES.len() % BITS.len()]);
    let mut members: Vec<Made> = Vec::new();
    for (number, parent) in shape.iter().enumerate() {
        let below = parent.map(|parent| members[parent].clone());
        let seed = mix(index as u64, number as u64);
        let name = below.as_ref().map(|below| below.name.as_str());
        let spec = image(bits, name, seed);
        let view = spec.view(below.as_ref().map_or(&[], |below| &below.view));
        let parent = below.map(|below| below.name);
        members.push(Made { name: format!("m{number}"), parent, bytes: spec.build(), view });
    }
    Template { members }
}

/// All of them.
pub fn templates() -> &'static [Template] {
    static TEMPLATES: OnceLock<Vec<Template>> = OnceLock::new();
    TEMPLATES.get_or_init(|| (0..4 * SHAPES.len() * BITS.len()).map(template).collect())
}

/// Whose a member's file is, so that none is taken for another's.
pub fn owner(number: usize) -> u32 {
    1000 + u32::try_from(number).unwrap()
}

/// Where things lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout(pub StoreKind);

impl Layout {
    pub fn member(self, name: &str) -> StorePath {
        match self.0 {
            StoreKind::Plain | StoreKind::Primary => path(name),
            StoreKind::Cloudstack => path(&format!("snapshots/2/7/{name}")),
        }
    }

    /// The checkpoint file of a member, where there are such.
    pub fn checkpoint(self, name: &str) -> Option<StorePath> {
        (self.0 == StoreKind::Cloudstack).then(|| path(&format!("checkpoints/2/7/{name}")))
    }
}

pub fn path(text: &str) -> StorePath {
    StorePath::parse(text).unwrap()
}

/// A checkpoint file; the stamp stands for what others write into it.
pub fn xml(name: &str, parent: Option<&str>, stamp: u64) -> Vec<u8> {
    let parent =
        parent.map(|parent| format!("\n  <parent><name>{parent}</name></parent>")).unwrap_or_default();
    let text = format!(
        "<domaincheckpoint>\n  <name>{name}</name>{parent}\n  <stamp>{stamp}</stamp>\n</domaincheckpoint>\n"
    );
    text.into_bytes()
}

/// A file that is there for good.
pub fn put(store: &MemoryStore, path: &StorePath, bytes: &[u8]) -> u64 {
    let file = store.create(path).unwrap();
    file.write_at(0, bytes).unwrap();
    file.sync().unwrap();
    store.sync_dir(&path.parent()).unwrap();
    file.stat().unwrap().id.inode
}

fn directory(store: &MemoryStore, path: &StorePath) {
    if !path.is_root() && store.stat(path).is_err() {
        directory(store, &path.parent());
        store.create_dir(path, true).unwrap();
        store.sync_dir(&path.parent()).unwrap();
    }
}

/// A store with these members, opted in.
pub fn build(store: MemoryStore, layout: Layout, template: &Template) -> Arc<MemoryStore> {
    for name in DIRECTORIES {
        directory(&store, &path(".qchain").join(name).unwrap());
    }
    // As `init` leaves it where locks are seen across processes: without that nothing is merged in place.
    let capabilities = Some(Capabilities {
        clone: false,
        clone_alignment: 0,
        hard_links: true,
        byte_range_locks: true,
        rename_exchange: true,
        direct_io: false,
        network: false,
    });
    let record = StoreRecord { capabilities, ..record("one", layout.0) };
    put(&store, &path(".qchain/store.json"), &record.encode());
    for (number, member) in template.members.iter().enumerate() {
        let name = layout.member(&member.name);
        directory(&store, &name.parent());
        put(&store, &name, &member.bytes);
        let file = store.open_writable(&name).unwrap();
        let uid = owner(number);
        file.set_identity(&Identity { uid, gid: uid, mode: 0o640, attributes: Vec::new() }).unwrap();
        file.sync().unwrap();
        if let Some(checkpoint) = layout.checkpoint(&member.name) {
            directory(&store, &checkpoint.parent());
            put(&store, &checkpoint, &xml(&member.name, member.parent.as_deref(), 0));
        }
    }
    Arc::new(store)
}
