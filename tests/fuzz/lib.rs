//! What is done with bytes of libFuzzer's: nothing may panic, hang, or contradict itself.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use qchain::backend::memory::MemoryStore;
use qchain::backend::{Backend, StoreFile};
use qchain::chain::graph::{Graph, Key, Node, NodeId, Parent};
use qchain::cloudstack::backing::{At, NameMap, StoreNames, Target};
use qchain::cloudstack::checkpoint::Checkpoint;
use qchain::digest::block_count;
use qchain::digest::table::{BlockRun, FOOT_LENGTH, HEAD_LENGTH, RUN_LENGTH, Shape};
use qchain::digest::view::{Leaves, view_digest};
use qchain::ids::{Digest, StoreId, StorePath};
use qchain::ops::copy::plan::{check_line, destination};
use qchain::peer::wire::{Chain, FrameFault, Frames};
use qchain::qcow2::check::{Limits, check};
use qchain::qcow2::fingerprint::fingerprint;
use qchain::qcow2::{ExtentKind, Image};
use qchain::store::cache::Cache;
use qchain::store::manifest::leaves::{LeafFile, path};
use qchain::store::manifest::{Manifest, TableMark};
use qchain::units::GuestOffset;

/// A file of these bytes on a store in memory.
fn file(store: &MemoryStore, name: &StorePath, bytes: &[u8]) -> Arc<dyn StoreFile> {
    if !name.parent().is_root() {
        let mut at = StorePath::root();
        for part in name.parent().components() {
            at = at.join(part).unwrap();
            let _ = store.create_dir(&at, false);
        }
    }
    let file = store.create(name).unwrap();
    file.write_at(0, bytes).unwrap();
    file
}

/// Header, map, compressed clusters, check and fingerprint of an image.
pub fn image(data: &[u8]) {
    let store = MemoryStore::new();
    let name = StorePath::parse("image").unwrap();
    let Ok(image) = Image::open(file(&store, &name, data), "image") else { return };
    let size = image.header().virtual_size;
    let (mut end, mut decompressed) = (0, 0);
    for extent in image.extents(GuestOffset(0)).take(100_000) {
        let Ok(extent) = extent else { break };
        assert!(extent.start.0 == end && extent.length > 0, "a gap, or an empty extent");
        end = extent.end().0;
        assert!(end <= size, "an extent behind the end of the disk");
        match extent.kind {
            ExtentKind::Compressed(cluster) if decompressed < 4 => {
                decompressed += 1;
                if let Ok(bytes) = image.read_compressed(&cluster) {
                    assert_eq!(bytes.len() as u64, image.header().cluster_bits.bytes());
                }
            }
            // A walk from within says the same.
            ExtentKind::Data { host } if extent.length > 1 => {
                let half = extent.length / 2;
                let next = image.extents(GuestOffset(extent.start.0 + half)).next();
                if let Some(Ok(next)) = next {
                    assert_eq!(next.kind, ExtentKind::Data { host: host.plus(half) });
                }
            }
            _ => {}
        }
    }
    let limits = Limits { findings: 10, counter_bytes: 1 << 20, table_bytes: 1 << 22, ..Limits::default() };
    let (report, taken) = fingerprint(&image, &limits).unwrap();
    assert!(taken.is_none() || !report.incomplete);
    let again = check(&image, &limits).unwrap();
    assert_eq!((again.findings, again.errors), (report.findings, report.errors));
}

/// Backing names and the graph: each line is a member's name and its backing name, parted by a blank.
pub fn chain(data: &[u8]) {
    let mut members: BTreeMap<StorePath, &[u8]> = BTreeMap::new();
    for line in data.split(|byte| *byte == b'\n').take(64) {
        let at = line.iter().position(|byte| *byte == b' ').unwrap_or(line.len());
        let (name, backing) = line.split_at(at);
        if let Ok(path) = StorePath::parse(&String::from_utf8_lossy(name)) {
            members.insert(path, backing.get(1..).unwrap_or_default());
        }
    }
    let paths: Vec<&StorePath> = members.keys().collect();
    let aliases = ["/mnt/alias".to_owned()];
    let names = |id: &str, root| StoreNames::new(StoreId::parse(id).unwrap(), Some(root), None, &aliases);
    let map = NameMap::new(vec![names("one", "/mnt/one"), names("two", "/mnt/two")]);
    // Both stores have the same files.
    let exists = |_: usize, path: &StorePath| members.contains_key(path);
    let mut nodes = Vec::new();
    for (path, backing) in &members {
        let parent = if backing.is_empty() {
            Parent::None
        } else {
            match map.resolve(backing, At { store: 0, path }, &exists) {
                Target::Member { path, .. } => {
                    Parent::Node(NodeId(paths.iter().position(|other| **other == path).unwrap()))
                }
                Target::Missing => Parent::Missing(String::new()),
                Target::Ambiguous(found) => {
                    assert!(found.len() > 1);
                    Parent::Ambiguous(String::new())
                }
                Target::Outside(_) => Parent::Outside(String::new()),
            }
        };
        nodes.push(Node { key: Key { store: 0, path: path.clone() }, parent });
    }
    let graph = Graph::new(nodes).unwrap();
    let mut seen = HashSet::new();
    for tree in graph.trees() {
        assert!(tree.members.iter().all(|id| seen.insert(*id)), "a member of two trees");
    }
    assert_eq!(seen.len(), graph.len());
    for id in graph.ids() {
        if let Ok(chain) = graph.chain(id) {
            assert!(chain.last() == Some(&id) && !graph.on_cycle(id));
            assert!(chain.windows(2).all(|pair| graph.parent(pair[1]) == Some(pair[0])));
        }
    }
}

/// Manifests, and the other small files that somebody may have written: caches and checkpoint files.
pub fn manifest(data: &[u8]) {
    let _ = Checkpoint::parse(data);
    let _ = Cache::decode(data);
    if let Ok(manifest) = Manifest::decode(data) {
        assert_eq!(Manifest::decode(&manifest.encode()).as_ref(), Ok(&manifest));
    }
    // The same as the body of an envelope, which no mutation would keep whole.
    if let Ok(body) = std::str::from_utf8(data) {
        let whole =
            format!("{{\"schema\":1,\"blake3\":\"{}\",\"manifest\":{body}}}", blake3::hash(data).to_hex());
        if let Ok(manifest) = Manifest::decode(whole.as_bytes()) {
            assert_eq!(Manifest::decode(&manifest.encode()).as_ref(), Ok(&manifest));
        }
    }
}

/// Leaf tables: with the checksum that their bytes have, so that what lies behind it is reached.
pub fn leaves(data: &[u8]) {
    let Some(body) = data.len().checked_sub(32).filter(|body| *body >= HEAD_LENGTH + FOOT_LENGTH - 32) else {
        return;
    };
    let mut bytes = data[..body].to_vec();
    bytes.extend(blake3::hash(&data[..body]).as_bytes());
    let foot = &bytes[bytes.len() - FOOT_LENGTH..];
    let Ok((shape, _)) = Shape::decode(bytes.len() as u64, &bytes[..HEAD_LENGTH], foot) else { return };
    let blocks = block_count(shape.virtual_size);
    let mut before: Option<BlockRun> = None;
    let at = usize::try_from(shape.runs_at()).unwrap();
    for (index, raw) in (0..shape.runs).zip(bytes[at..].chunks(RUN_LENGTH)) {
        let Ok(run) = BlockRun::decode(raw, index, before.as_ref(), blocks) else { break };
        assert!(run.end() <= blocks && before.is_none_or(|before| before.end() <= run.first));
        assert_eq!(run.encode(), raw);
        before = Some(run);
    }
    let store = MemoryStore::new();
    file(&store, &path("table"), &bytes);
    let blake3 = Digest(*blake3::hash(&bytes).as_bytes());
    let mark = TableMark { name: "table".to_owned(), blake3, leaves: shape.leaves, runs: shape.runs };
    let mut table = LeafFile::open(&store, &mark).unwrap();
    let mut runs = 0;
    while let Ok(Some(_)) = table.next_run() {
        runs += 1;
    }
    assert!(runs <= shape.runs);
    table.rewind();
    for block in [0, blocks / 2, blocks.saturating_sub(1)] {
        if let Ok(stretch) = table.stretch(block) {
            assert!(stretch.end > block);
        }
    }
    let _ = view_digest(&mut [table]);
}

/// What another zone sends: its chain, and its frames, which are the same in whatever pieces they come.
pub fn peer(data: &[u8]) {
    if let Ok(chain) = Chain::decode(data) {
        let _ = check_line("peer", &chain.members);
        for one in &chain.members {
            if let Ok(path) = destination(&one.member, &[], one.leaves % 2 == 0) {
                assert!(!path.as_str().starts_with(".qchain"), "a place of qchain's own");
            }
        }
    }
    let read = |step: usize| {
        let (mut frames, mut found) = (Frames::default(), Vec::new());
        for part in data.chunks(step) {
            frames.push::<FrameFault>(part, |block, bytes| {
                assert!(bytes.len() <= 65536, "more than a block");
                found.push((block, blake3::hash(bytes)));
                Ok(())
            })?;
        }
        frames.finish().map(|()| found)
    };
    let step = data.first().map_or(1, |byte| usize::from(*byte) + 1);
    assert_eq!(read(step), read(1 << 20), "other frames in pieces of {step}");
}
