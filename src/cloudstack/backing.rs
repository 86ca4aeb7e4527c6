//! Backing names: what a name inside an image means, and what qchain writes there.
//!
//! A name is never opened as a path; it is mapped, as text, to a member of a configured store:
//!
//! 1. Anything that QEMU would not open as a plain file (`json:`, `nbd:`, any `protocol:` before the first
//!    slash), control characters, bad UTF-8, or a `..` that leaves the store: [`Target::Outside`].
//! 2. A relative name resolves beside the image, inside its store.
//! 3. An absolute name resolves by the longest prefix that a store is known under: its own directory, its
//!    aliases, the two mounts that its URL implies ([`super::prefix`]).
//! 4. An absolute name under no known prefix is taken by its tail from `snapshots/`, if just one store has
//!    such a member; that is a guess, and marked as one ([`Form::Absolute`] of [`PrefixKind::Unknown`]).
//!
//! The other way, [`NameMap::name_for`] gives the bare file name for a parent in the same directory, which
//! resolves on every mount, and else keeps the form that the child used before.

use super::paths::SNAPSHOTS;
use super::prefix::StoreUrl;
use crate::failure::{Code, Failure, Kind};
use crate::ids::{StoreId, StorePath};

/// The longest backing name that a qcow2 header may hold, in bytes: QEMU's limit.
pub const MAX_NAME_BYTES: usize = 1023;

/// Under which directory a store is known, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PrefixKind {
    /// Its directory on this machine.
    Root,
    /// The mount on KVM hosts that its URL implies.
    Host,
    /// The mount on the secondary storage VM that its URL implies.
    SystemVm,
    /// An alias of the configuration.
    Alias,
    /// None that is configured: the member was found by the tail of the name.
    Unknown,
}

/// A directory that stands for a store's root in absolute backing names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Prefix {
    kind: PrefixKind,
    parts: Vec<String>,
}

/// The names that one store goes by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreNames {
    id: StoreId,
    prefixes: Vec<Prefix>,
}

impl StoreNames {
    /// The names of a store: its directory here (none for one reached by URL alone), its URL in CloudStack,
    /// and further prefixes. A directory or alias that is not absolute stands for nothing and is left out.
    #[must_use]
    pub fn new(id: StoreId, root: Option<&str>, url: Option<&StoreUrl>, aliases: &[String]) -> Self {
        let host = url.map(StoreUrl::host_prefix);
        let system_vm = url.and_then(StoreUrl::system_vm_prefix);
        let prefixes = root
            .into_iter()
            .map(|text| (PrefixKind::Root, text))
            .chain(host.as_deref().map(|text| (PrefixKind::Host, text)))
            .chain(system_vm.as_deref().map(|text| (PrefixKind::SystemVm, text)))
            .chain(aliases.iter().map(|text| (PrefixKind::Alias, text.as_str())))
            .filter(|(_, text)| text.starts_with('/'))
            .filter_map(|(kind, text)| Some(Prefix { kind, parts: normalised(&[], text)? }))
            .collect();
        Self { id, prefixes }
    }

    /// The store's id.
    #[must_use]
    pub fn id(&self) -> &StoreId {
        &self.id
    }
}

/// In which form a child names its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// Relative to the child.
    Relative,
    /// Absolute, under a prefix of the parent's store.
    Absolute {
        /// Why the prefix stands for that store.
        kind: PrefixKind,
        /// The prefix, without a trailing slash (empty for `/`).
        prefix: String,
    },
}

/// What a backing name means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// That member, which exists.
    Member {
        /// The index of its store.
        store: usize,
        /// Its install path.
        path: StorePath,
        /// How the name says so.
        form: Form,
    },
    /// A member that is not there, or a path under no store.
    Missing,
    /// One of several members; the name does not decide.
    Ambiguous(Vec<(usize, StorePath)>),
    /// No member's name at all, for that reason.
    Outside(&'static str),
}

impl Target {
    /// The finding that comes with it, if there is one.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Member { form: Form::Absolute { kind: PrefixKind::Unknown, .. }, .. } => {
                Some(Code::UnknownPrefix)
            }
            Self::Member { .. } => None,
            Self::Missing => Some(Code::MissingParent),
            Self::Ambiguous(_) => Some(Code::AmbiguousParent),
            Self::Outside(_) => Some(Code::OutsideName),
        }
    }
}

/// Which names the configuration prefers for new backing names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// The bare file name where parent and child share a directory, else the child's old form.
    #[default]
    Relative,
    /// The child's old form always.
    Keep,
}

/// Why a parent cannot be named.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A relative name cannot reach another store.
    #[error("{parent} lies on another store than {child}, whose backing name is relative")]
    OtherStore {
        /// The child.
        child: StorePath,
        /// Its parent to be.
        parent: StorePath,
    },
    /// The parent's store has no prefix of the kind that the child used.
    #[error("no known prefix of the store of {parent} corresponds to {prefix:?}, which {child} uses")]
    NoPrefix {
        /// The child.
        child: StorePath,
        /// Its parent to be.
        parent: StorePath,
        /// The prefix used so far.
        prefix: String,
    },
    /// Longer than [`MAX_NAME_BYTES`].
    #[error("the backing name of {child} would be {length} bytes long, more than {MAX_NAME_BYTES}")]
    TooLong {
        /// The child.
        child: StorePath,
        /// The length in bytes.
        length: usize,
    },
}

impl Failure for NameError {
    fn kind(&self) -> Kind {
        Kind::Refused
    }

    fn code(&self) -> Code {
        match self {
            Self::OtherStore { .. } | Self::NoPrefix { .. } => Code::UnknownPrefix,
            Self::TooLong { .. } => Code::Unsupported,
        }
    }

    fn member(&self) -> Option<&str> {
        let (Self::OtherStore { child, .. } | Self::NoPrefix { child, .. } | Self::TooLong { child, .. }) =
            self;
        Some(child.as_str())
    }
}

/// A member as this module names it: the index of its store, and its install path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At<'a> {
    /// Which store, as an index into the list given to [`NameMap::new`].
    pub store: usize,
    /// The install path.
    pub path: &'a StorePath,
}

/// Maps backing names to members of a list of stores, and back.
#[derive(Clone, Debug)]
pub struct NameMap {
    stores: Vec<StoreNames>,
}

impl NameMap {
    /// A map over those stores; their indices are the ones in every answer.
    #[must_use]
    pub fn new(stores: Vec<StoreNames>) -> Self {
        Self { stores }
    }

    /// What the backing name in `child`'s header means. `exists` tells whether a store has a member; it is
    /// asked a bounded number of times (at most once for each store and each `snapshots` in the name).
    #[must_use]
    pub fn resolve(&self, name: &[u8], child: At<'_>, exists: &dyn Fn(usize, &StorePath) -> bool) -> Target {
        let name = match plain_file_name(name) {
            Ok(name) => name,
            Err(reason) => return Target::Outside(reason),
        };
        if !name.starts_with('/') {
            let beside: Vec<String> = child.path.parent().components().map(str::to_owned).collect();
            return match inside(&beside, name) {
                Err(reason) => Target::Outside(reason),
                Ok(path) if exists(child.store, &path) => {
                    Target::Member { store: child.store, path, form: Form::Relative }
                }
                Ok(_) => Target::Missing,
            };
        }
        let found = match self.by_prefix(name) {
            Ok(found) => found,
            Err(reason) => return Target::Outside(reason),
        };
        if found.is_empty() { self.by_tail(name, exists) } else { choose(found, exists) }
    }

    /// The places that the longest known prefix of an absolute name gives: several if stores share it.
    fn by_prefix(&self, name: &str) -> Result<Vec<Candidate>, &'static str> {
        let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        let matching = |prefix: &Prefix| {
            parts.len() >= prefix.parts.len() && prefix.parts.iter().zip(&parts).all(|(a, b)| a == b)
        };
        let all = || self.stores.iter().enumerate().flat_map(|(i, s)| s.prefixes.iter().map(move |p| (i, p)));
        let longest =
            all().filter(|(_, prefix)| matching(prefix)).map(|(_, prefix)| prefix.parts.len()).max();
        let Some(longest) = longest else { return Ok(Vec::new()) };
        let path = inside(&[], &parts[longest..].join("/"))?;
        Ok(all()
            .filter(|(_, prefix)| prefix.parts.len() == longest && matching(prefix))
            .map(|(store, prefix)| Candidate { store, path: path.clone(), form: form(prefix) })
            .collect())
    }

    /// The member that an absolute name under no known prefix means by its tail from `snapshots/`.
    fn by_tail(&self, name: &str, exists: &dyn Fn(usize, &StorePath) -> bool) -> Target {
        // A `..` above every store proves nothing about the tail, so it is resolved first.
        let Some(parts) = normalised(&[], name) else {
            return Target::Outside("it leads above the root directory");
        };
        let mut found = Vec::new();
        for (at, _) in parts.iter().enumerate().filter(|(_, part)| *part == SNAPSHOTS) {
            let Ok(path) = StorePath::parse(&parts[at..].join("/")) else { continue };
            let prefix = parts[..at].iter().fold(String::new(), |text, part| text + "/" + part);
            found.extend((0..self.stores.len()).map(|store| Candidate {
                store,
                path: path.clone(),
                form: Form::Absolute { kind: PrefixKind::Unknown, prefix: prefix.clone() },
            }));
        }
        choose(found, exists)
    }

    /// The backing name to write into `child` so that it means `parent`, given the form that the child used
    /// so far and the store that its old parent lies on.
    pub fn name_for(
        &self,
        parent: At<'_>,
        child: At<'_>,
        style: Style,
        old: &Form,
        old_store: usize,
    ) -> Result<String, NameError> {
        let same_directory = parent.store == child.store && parent.path.parent() == child.path.parent();
        let name = match old {
            _ if same_directory && style == Style::Relative => relative(parent.path, child.path),
            Form::Relative if parent.store == child.store => relative(parent.path, child.path),
            Form::Relative => {
                return Err(NameError::OtherStore { child: child.path.clone(), parent: parent.path.clone() });
            }
            Form::Absolute { prefix, .. } if parent.store == old_store => {
                format!("{prefix}/{}", parent.path.as_str())
            }
            Form::Absolute { kind, prefix } => {
                let Some(other) = self.counterpart(parent.store, *kind) else {
                    return Err(NameError::NoPrefix {
                        child: child.path.clone(),
                        parent: parent.path.clone(),
                        prefix: prefix.clone(),
                    });
                };
                format!("{other}/{}", parent.path.as_str())
            }
        };
        if name.len() > MAX_NAME_BYTES {
            return Err(NameError::TooLong { child: child.path.clone(), length: name.len() });
        }
        Ok(name)
    }

    /// The prefix of that kind of another store. An alias has no counterpart: which alias of the other
    /// store the same hosts use is not known.
    fn counterpart(&self, store: usize, kind: PrefixKind) -> Option<String> {
        if matches!(kind, PrefixKind::Alias | PrefixKind::Unknown) {
            return None;
        }
        let prefix = self.stores.get(store)?.prefixes.iter().find(|prefix| prefix.kind == kind)?;
        Some(text(&prefix.parts))
    }
}

/// A place that a name may mean.
#[derive(Clone, Debug)]
struct Candidate {
    store: usize,
    path: StorePath,
    form: Form,
}

/// The one candidate that exists. Two prefixes of one store that say the same are no ambiguity.
fn choose(found: Vec<Candidate>, exists: &dyn Fn(usize, &StorePath) -> bool) -> Target {
    let mut there: Vec<Candidate> = Vec::new();
    for candidate in found {
        let known = |other: &Candidate| (other.store, &other.path) == (candidate.store, &candidate.path);
        if !there.iter().any(known) && exists(candidate.store, &candidate.path) {
            there.push(candidate);
        }
    }
    if there.len() > 1 {
        return Target::Ambiguous(there.into_iter().map(|c| (c.store, c.path)).collect());
    }
    match there.pop() {
        Some(Candidate { store, path, form }) => Target::Member { store, path, form },
        None => Target::Missing,
    }
}

fn form(prefix: &Prefix) -> Form {
    Form::Absolute { kind: prefix.kind, prefix: text(&prefix.parts) }
}

fn text(parts: &[String]) -> String {
    parts.iter().fold(String::new(), |text, part| text + "/" + part)
}

/// The text of a name that QEMU would open as a plain file, or why it would not.
fn plain_file_name(name: &[u8]) -> Result<&str, &'static str> {
    if name.len() > MAX_NAME_BYTES {
        return Err("it is longer than a backing name may be");
    }
    let name = std::str::from_utf8(name).map_err(|_| "it is not UTF-8")?;
    if name.chars().any(char::is_control) {
        return Err("it has control characters");
    }
    // As QEMU's path_has_protocol(): a colon before the first slash.
    if name.find([':', '/']).is_some_and(|at| name[at..].starts_with(':')) {
        return Err("it names a protocol");
    }
    match name.rsplit('/').next() {
        Some("" | "." | "..") | None => Err("it names no file"),
        Some(_) => Ok(name),
    }
}

/// `name` beside the directory `base`, with `.`, `..` and doubled slashes resolved as text; `None` if it
/// leads above the root.
fn normalised(base: &[String], name: &str) -> Option<Vec<String>> {
    let mut parts = base.to_vec();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part.to_owned()),
        }
    }
    Some(parts)
}

/// The path inside a store that `name` gives beside the directory `base` of it.
fn inside(base: &[String], name: &str) -> Result<StorePath, &'static str> {
    let parts = normalised(base, name).ok_or("it leads out of the store")?;
    if parts.is_empty() {
        return Err("it names the store itself");
    }
    StorePath::parse(&parts.join("/")).map_err(|_| "a part of it is too long")
}

/// The way from a child's directory to its parent, on one store.
fn relative(parent: &StorePath, child: &StorePath) -> String {
    let (directory, target) = (child.parent(), parent.parent());
    let shared = directory.components().zip(target.components()).take_while(|(a, b)| a == b).count();
    let up = directory.components().skip(shared).map(|_| "..");
    let name = up.chain(parent.components().skip(shared)).collect::<Vec<_>>().join("/");
    // Or QEMU would take what stands before the colon for a protocol.
    if name.find([':', '/']).is_some_and(|at| name[at..].starts_with(':')) {
        return format!("./{name}");
    }
    name
}

#[cfg(test)]
#[path = "backing_tests.rs"]
mod tests;
