//! All members of all stores, and how they hang together.
//!
//! One walk a store, then headers and checkpoint files in parallel, then the graph. Memory: some hundred bytes
//! a member. A scan is a snapshot of a directory that others change: whoever acts on it looks again.

mod assemble;
mod list;
pub mod survey;

use std::collections::HashMap;

use rayon::prelude::*;
use serde::ser::SerializeStruct as _;

use crate::backend::{BackendError, FileKind, ImageLocks, Stat};
use crate::chain::graph::{Graph, Key, NodeId, Parent};
use crate::cloudstack::backing::Form;
use crate::cloudstack::paths::checkpoint_of;
use crate::failure::{Code, with_causes};
use crate::progress::Progress;
use crate::store::cache::{Cache, Known};
use crate::store::error::{Result, StoreError};
use crate::store::facts::{CheckpointFacts, Reading, Stamp, read_checkpoint, read_member};
use crate::store::record::StoreKind;
use crate::store::{Store, Stores};

/// A cached member that changed at least this long ago is not opened again to look for QEMU's locks: a
/// backup job writes all the time. Nanoseconds; one day.
const LOCKS_OF_OLD_FILES_NS: i128 = 86_400_000_000_000;

/// Something worth telling about a member or a name on a store.
#[derive(Clone, Debug, PartialEq, Eq, utoipa::ToSchema)]
pub struct Finding {
    /// The member, as it can be written on the command line.
    pub member: String,
    /// The reason code; `severity` (`info`, `warning`, `error`) follows from it.
    #[schema(value_type = String)]
    pub code: Code,
    /// What is so.
    pub message: String,
}

impl serde::Serialize for Finding {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        let mut fields = to.serialize_struct("Finding", 4)?;
        fields.serialize_field("member", &self.member)?;
        fields.serialize_field("code", &self.code)?;
        fields.serialize_field("severity", self.code.severity().word())?;
        fields.serialize_field("message", &self.message)?;
        fields.end()
    }
}

/// Why a member counts as still being made (design, "incoming").
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// QEMU has it open for writing.
    Writer,
    /// Its volume has checkpoint files, but none of its name.
    NoCheckpoint,
    /// Header and checkpoint file name different parents.
    ParentsDisagree {
        /// What the header's backing name ends in.
        header: Option<String>,
        /// What the checkpoint file says.
        checkpoint: Option<String>,
    },
    /// It changed less than the settle time ago.
    Unsettled,
}

impl Incoming {
    /// The reason in words.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            Self::Writer => "QEMU has it open for writing".to_owned(),
            Self::NoCheckpoint => "its volume has checkpoint files, but none of its name yet".to_owned(),
            Self::ParentsDisagree { header, checkpoint } => format!(
                "its header names {} as parent, its checkpoint file {}",
                header.as_deref().unwrap_or("nobody"),
                checkpoint.as_deref().unwrap_or("nobody")
            ),
            Self::Unsettled => "it changed less than the settle time ago".to_owned(),
        }
    }
}

/// One member.
#[derive(Clone, Debug)]
pub struct Member {
    /// What names it.
    pub key: Key,
    /// Its file.
    pub stat: Stat,
    /// Its header.
    pub reading: Reading,
    /// In which form its header names its parent, and the parent's store; `None` without a known parent.
    pub form: Option<(Form, usize)>,
    /// Its checkpoint file.
    pub checkpoint: CheckpointFacts,
    /// QEMU's locks on it, when it was looked at.
    pub locks: ImageLocks,
    /// One of CloudStack's own temporaries.
    pub temporary: bool,
    /// An empty image that stands in for a deleted member, made by qchain on this very store.
    pub stub: bool,
    /// Whether, and why, it is still being made.
    pub incoming: Option<Incoming>,
}

/// What a scan found.
#[derive(Debug)]
pub struct Scan {
    /// All members; the index is the node's id.
    pub members: Vec<Member>,
    /// How they hang together.
    pub graph: Graph,
    /// What is worth telling.
    pub findings: Vec<Finding>,
}

/// How to scan.
pub struct ScanOptions<'a> {
    /// The time, nanoseconds since 1970.
    pub now_ns: i128,
    /// How long a file of a volume without checkpoints must have been left alone, in nanoseconds; 0 waives it.
    pub settle_ns: i128,
    /// One cache a store, by the store's index; empty to read everything.
    pub caches: &'a [Cache],
    /// Told of members read.
    pub progress: &'a dyn Progress,
}

impl Scan {
    /// The member of a node.
    #[must_use]
    pub fn member(&self, id: NodeId) -> Option<&Member> {
        self.members.get(id.0)
    }

    /// Whether a member is a stub that nobody reads through, but for other stubs.
    #[must_use]
    pub fn is_idle_stub(&self, id: NodeId) -> bool {
        let mut left = vec![id];
        // A graph may have cycles, and whoever is on one is no idle stub.
        for _ in 0..self.members.len() {
            let Some(one) = left.pop() else { return true };
            if !self.member(one).is_some_and(|member| member.stub) {
                return false;
            }
            left.extend(self.graph.children(one));
        }
        left.is_empty()
    }

    /// Whether a member is surely a full base, whatever its row says of a parent: whole, without backing name, and by its
    /// checkpoint file without parent, too. An increment that is being written has no backing name either, until the
    /// agent gives it one; it has no checkpoint file before that. So in a volume without checkpoint files nothing is
    /// sure.
    #[must_use]
    pub fn stands_alone(&self, id: NodeId) -> bool {
        self.member(id).is_some_and(|member| {
            self.graph.node(id).parent == Parent::None
                && member.checkpoint == CheckpointFacts::Parent(None)
                && member.incoming.is_none()
                && !member.temporary
                && !member.stub
        })
    }

    /// The bytes that a member's file takes on its store; 0 for a node of another scan.
    #[must_use]
    pub fn allocated_bytes(&self, id: NodeId) -> u64 {
        self.member(id).map_or(0, |member| member.stat.allocated_bytes)
    }

    /// Scans all stores. Files that cannot be read are findings; only a store that cannot be walked is an
    /// error.
    pub fn run(stores: &Stores, options: &ScanOptions<'_>) -> Result<Self> {
        let mut findings = Vec::new();
        let mut found = Vec::new();
        let (listed, checkpoints) = rayon::join(
            || {
                stores.iter().try_for_each(|(index, store)| {
                    list::members(stores, index, store, &mut found, &mut findings)
                })
            },
            || Checkpoints::read(stores),
        );
        listed?;
        let checkpoints = checkpoints?;
        options.progress.phase("reading headers", found.len() as u64);
        let look = |key: Key| {
            let member = read_one(stores, key, options, &checkpoints);
            options.progress.advance(1);
            member
        };
        let count = found.len();
        let read: Vec<Option<(Member, Vec<Finding>)>> = stores
            .spread(count, || found.into_par_iter().with_max_len(4).map(look).collect::<Result<_>>())??;
        let mut members = Vec::with_capacity(read.len());
        for (member, told) in read.into_iter().flatten() {
            findings.extend(told);
            // A plain store may hold anything; only images are its business.
            let foreign = stores.get(member.key.store)?.kind() == StoreKind::Plain;
            if !(foreign && member.reading == Reading::NotQcow2) {
                members.push(member);
            }
        }
        assemble::assemble(stores, members, findings, options, &checkpoints)
    }
}

/// Which volumes have checkpoint files: directory path by store. On primary storage all volumes share one
/// directory, so there each file speaks for itself only.
struct Checkpoints(HashMap<Key, bool>);

impl Checkpoints {
    fn read(stores: &Stores) -> Result<Self> {
        let mut volumes = HashMap::new();
        for (index, store) in stores.iter() {
            let alone = store.kind() == StoreKind::Primary;
            for path in list::checkpoint_files(store)? {
                let path = if alone { path } else { path.parent() };
                volumes.insert(Key { store: index, path }, true);
            }
        }
        Ok(Self(volumes))
    }

    /// Whether the volume of a snapshot has checkpoint files.
    fn has(&self, member: &Key) -> bool {
        let of = |path| self.0.contains_key(&Key { store: member.store, path });
        checkpoint_of(&member.path).is_some_and(|checkpoint| of(checkpoint.parent()) || of(checkpoint))
    }
}

/// Reads what there is to read of one member, from the cache where it can be; `None` if it is gone.
fn read_one(
    stores: &Stores,
    key: Key,
    options: &ScanOptions<'_>,
    checkpoints: &Checkpoints,
) -> Result<Option<(Member, Vec<Finding>)>> {
    let store = stores.get(key.store)?;
    let mut told = Vec::new();
    let mut tell = |code, message: String| {
        told.push(Finding { member: stores.display(&key), code, message });
    };
    let stat = match store.backend().stat(&key.path) {
        Ok(stat) if stat.kind == FileKind::File => stat,
        // Removed or replaced since the directory was read: as if it had not been there.
        Ok(_) | Err(BackendError::NotFound { .. }) => return Ok(None),
        Err(source) => return Err(StoreError::backend(store, source)),
    };
    if stat.links > 1 {
        tell(Code::HardLinked, "the file has more than one name".to_owned());
    }
    let cache = options.caches.get(key.store);
    let stamp = Stamp::from(&stat);
    let known = cache.and_then(|cache| cache.get(&stamp));
    let old = stat.modified_ns + LOCKS_OF_OLD_FILES_NS < options.now_ns;
    let (reading, locks) = match known {
        Some(Known::Member(reading)) if old => (reading, ImageLocks::default()),
        _ => match read_member(store.backend(), &key.path) {
            Ok(opened) => {
                if let Some(cache) = cache {
                    cache.put(stamp, Known::Member(opened.reading.clone()), options.now_ns);
                }
                (opened.reading, opened.locks)
            }
            // Taken for unreadable, it would be taken for a possible child of its neighbours.
            Err(BackendError::NotFound { .. }) => return Ok(None),
            // Says nothing of this one.
            Err(source) if source.is_unreachable() => return Err(StoreError::backend(store, source)),
            Err(error) => {
                let message = with_causes(&error);
                tell(Code::Io, message.clone());
                let reading = Reading::Bad { code: Code::Io.as_str().to_owned(), message };
                (reading, ImageLocks::default())
            }
        },
    };
    let checkpoint = if checkpoints.has(&key) {
        checkpoint_facts(store, &key, cache, options.now_ns)?
    } else {
        CheckpointFacts::None
    };
    let temporary = crate::cloudstack::paths::name_kind(key.path.file_name())
        == crate::cloudstack::paths::NameKind::Temporary;
    let member =
        Member { key, stat, reading, form: None, checkpoint, locks, temporary, stub: false, incoming: None };
    Ok(Some((member, told)))
}

fn checkpoint_facts(
    store: &Store,
    key: &Key,
    cache: Option<&Cache>,
    now_ns: i128,
) -> Result<CheckpointFacts> {
    let Some(path) = checkpoint_of(&key.path) else { return Ok(CheckpointFacts::None) };
    let fail = |source| StoreError::backend(store, source);
    let stamp = match (cache, store.backend().stat(&path)) {
        (Some(_), Ok(stat)) => Some(Stamp::from(&stat)),
        (_, Err(BackendError::NotFound { .. })) => return Ok(CheckpointFacts::None),
        (_, Err(error)) => return Err(fail(error)),
        (None, Ok(_)) => None,
    };
    if let (Some(cache), Some(stamp)) = (cache, stamp)
        && let Some(Known::Checkpoint(facts)) = cache.get(&stamp)
    {
        return Ok(facts);
    }
    let facts = read_checkpoint(store.backend(), &path).map_err(fail)?;
    if let (Some(cache), Some(stamp)) = (cache, stamp) {
        cache.put(stamp, Known::Checkpoint(facts.clone()), now_ns);
    }
    Ok(facts)
}
