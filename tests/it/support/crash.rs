//! Chains to be hurt: their shapes, how they are put on a store, and what must be true of them at any moment.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use qchain::ops::delete::ModeChoice;
use qchain::store::record::StoreKind;
use tempfile::TempDir;

use super::chains::{Kind, Numbers};
use super::mounts::FsKind;
use super::qemu::{io, must, run, text};
use super::store::{adopt_well, init};

/// The virtual size of all members, in bytes.
const SIZE: u64 = 1 << 20;

/// Which members there are, and which are deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One member between others.
    Middle,
    /// Three neighbours into one survivor.
    Several,
    /// Two members apart, each into its own child.
    Apart,
    /// A member with two children.
    Fork,
    /// The newest member.
    Tip,
    /// The oldest one.
    Base,
    /// As `Middle`, in CloudStack's layout, with checkpoint files.
    Cloudstack,
    /// The same, and nobody is deleted: a member in the middle becomes a full base.
    Consolidate,
}

const FORK: &[(&str, &str)] = &[("base", ""), ("a", "base"), ("b", "a"), ("c", "a")];
const CHAIN: &[(&str, &str)] = &[("base", ""), ("a", "base"), ("b", "a"), ("c", "b"), ("d", "c")];

impl Shape {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Middle,
        Self::Several,
        Self::Apart,
        Self::Fork,
        Self::Tip,
        Self::Base,
        Self::Cloudstack,
        Self::Consolidate,
    ];

    /// The members, lowest first, each with its parent.
    fn members(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Middle | Self::Cloudstack | Self::Consolidate => &CHAIN[..4],
            Self::Several | Self::Apart => CHAIN,
            Self::Fork => FORK,
            Self::Tip | Self::Base => &CHAIN[..3],
        }
    }

    fn deleted(self) -> &'static [&'static str] {
        match self {
            Self::Middle | Self::Fork | Self::Cloudstack => &["a"],
            Self::Several => &["a", "b", "c"],
            Self::Apart => &["a", "c"],
            Self::Tip => &["b"],
            Self::Base => &["base"],
            Self::Consolidate => &[],
        }
    }

    /// The members that the verb is told.
    fn targets(self) -> &'static [&'static str] {
        if self == Self::Consolidate { &["b"] } else { self.deleted() }
    }

    /// Whether it has CloudStack's layout.
    fn is_cloudstack(self) -> bool {
        matches!(self, Self::Cloudstack | Self::Consolidate)
    }

    /// The modes that can delete this shape there. Where no bytes move the mode makes no difference: then it
    /// is `Auto` alone.
    pub fn modes(self, fs: FsKind) -> Vec<ModeChoice> {
        if self == Self::Tip {
            return vec![ModeChoice::Auto];
        }
        let mut modes = vec![ModeChoice::Copy];
        if fs != FsKind::Ext4 {
            modes.push(ModeChoice::Clone);
        }
        if !matches!(self, Self::Fork | Self::Consolidate) {
            modes.push(ModeChoice::InPlace);
        }
        modes
    }

    /// What the store is.
    pub fn store_kind(self) -> StoreKind {
        if self.is_cloudstack() { StoreKind::Cloudstack } else { StoreKind::Plain }
    }

    /// A member's path on its store.
    fn path(self, name: &str) -> String {
        match self {
            Self::Cloudstack | Self::Consolidate => format!("snapshots/2/7/{}", uuid(name)),
            _ => name.to_owned(),
        }
    }
}

/// The mode's word in tables.
pub fn word(mode: ModeChoice) -> &'static str {
    match mode {
        ModeChoice::Auto => "remove",
        ModeChoice::Clone => "clone",
        ModeChoice::InPlace => "in-place",
        ModeChoice::Copy => "copy",
    }
}

/// The file name of a member in the layout of CloudStack.
pub fn uuid(name: &str) -> String {
    let number = CHAIN.iter().position(|(other, _)| *other == name).unwrap();
    format!("6f9619ff-8b86-4d01-b42d-00cf4fc9640{number}")
}

/// A checkpoint file as libvirt writes it.
pub fn checkpoint(name: &str, parent: Option<&str>) -> Vec<u8> {
    let parent = parent.map(|parent| format!("  <parent>\n    <name>{parent}</name>\n  </parent>\n"));
    format!(
        "<domaincheckpoint>\n  <name>{name}</name>\n{}  <creationTime>1700000000</creationTime>\n  <disks>\n    \
         <disk name='vda' checkpoint='bitmap' bitmap='{name}'/>\n  </disks>\n</domaincheckpoint>\n",
        parent.unwrap_or_default()
    )
    .into_bytes()
}

/// The files of a store, without qchain's own.
pub type Files = BTreeMap<String, Vec<u8>>;

/// A chain of QEMU's making, kept in memory to be put on a store again and again.
pub struct Chain {
    /// Which.
    pub shape: Shape,
    /// All files.
    pub files: Files,
    /// The members that stay.
    pub survivors: Vec<String>,
    /// The members to be deleted.
    pub deleted: Vec<String>,
    /// The members that the verb is told: those, or the one that is to be a base.
    pub targets: Vec<String>,
    /// Whether its members are adopted wherever it is put.
    pub adopted: bool,
    truths: TempDir,
}

impl Chain {
    /// Makes one; the same seed gives the same content.
    pub fn make(shape: Shape, seed: u64) -> Self {
        let (made, truths) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut numbers = Numbers(seed);
        let kind = Kind { compressed: shape == Shape::Fork, ..Kind::PLAIN };
        let targets = shape.targets().iter().map(|name| shape.path(name)).collect();
        let (survivors, deleted) = (Vec::new(), Vec::new());
        let (files, adopted) = (Files::new(), false);
        let mut chain = Self { shape, files, survivors, deleted, targets, adopted, truths };
        for (name, parent) in shape.members() {
            let spec = kind.member(SIZE, 7, &mut numbers);
            let path = made.path().join(shape.path(name));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let below = if parent.is_empty() { String::new() } else { shape.path(parent) };
            let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &spec.options];
            if !parent.is_empty() {
                arguments.extend(["-b", below.rsplit('/').next().unwrap(), "-F", "qcow2"]);
            }
            let size = SIZE.to_string();
            arguments.extend([text(&path), &size]);
            must("qemu-img", &arguments);
            io(&path, &spec.commands.iter().map(String::as_str).collect::<Vec<_>>());
        }
        for (name, parent) in shape.members() {
            let member = shape.path(name);
            let path = made.path().join(&member);
            let truth = chain.truth(&member);
            must("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&path), text(&truth)]);
            chain.files.insert(member.clone(), fs::read(&path).unwrap());
            if shape.is_cloudstack() {
                let parent = (!parent.is_empty()).then(|| uuid(parent));
                let file = checkpoint(&uuid(name), parent.as_deref());
                chain.files.insert(member.replace("snapshots/", "checkpoints/"), file);
            }
            let gone = shape.deleted().contains(name);
            if gone { &mut chain.deleted } else { &mut chain.survivors }.push(member);
        }
        chain
    }

    /// The same, adopted wherever it is put.
    pub fn adopted(self) -> Self {
        Self { adopted: true, ..self }
    }

    /// What it is called in tables.
    pub fn label(&self) -> String {
        let shape = format!("{:?}", self.shape).to_lowercase();
        if self.adopted { shape + "-adopted" } else { shape }
    }

    /// Where a member's view lies, as raw bytes.
    pub fn truth(&self, member: &str) -> PathBuf {
        self.truths.path().join(member.replace('/', "_"))
    }

    /// Puts it on a store that has nothing else, and opts that in. Nothing is shared with another file.
    pub fn put(&self, root: &Path) {
        clear(root);
        for (name, bytes) in &self.files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        init(root, self.shape.store_kind());
        if self.adopted {
            adopt_well(root);
        }
    }

    /// What is wrong with members that stay: views that are not what they were, images that QEMU finds faults
    /// in. `leaks` says whether leaked clusters are a fault.
    pub fn wrong(&self, judge: &Judge, now: &Files, leaks: bool) -> Vec<String> {
        let mut wrong = self.wrong_views(judge, now);
        for name in self.survivors.iter().chain(&self.deleted).filter(|name| now.contains_key(*name)) {
            wrong.extend(judge.sound(now, name, leaks));
        }
        wrong
    }

    /// Of that, the views.
    pub fn wrong_views(&self, judge: &Judge, now: &Files) -> Vec<String> {
        self.survivors.iter().filter_map(|name| judge.view(now, name, &self.truth(name))).collect()
    }
}

/// Removes a directory; of one in which something is mounted all but that.
fn clear(directory: &Path) {
    if fs::remove_dir_all(directory).is_ok() || !directory.exists() {
        return;
    }
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { clear(&path) } else { fs::remove_file(path).unwrap() }
    }
}

/// QEMU's verdicts. What it says depends on nothing but the bytes of the files, so it is asked once for each
/// set of them.
pub struct Judge {
    scratch: TempDir,
    views: Mutex<HashMap<blake3::Hash, Option<String>>>,
    checks: Mutex<HashMap<blake3::Hash, (i32, String)>>,
}

impl Default for Judge {
    fn default() -> Self {
        let (views, checks) = (Mutex::default(), Mutex::default());
        Self { scratch: tempfile::tempdir().unwrap(), views, checks }
    }
}

impl Judge {
    /// What is wrong with a member's view.
    pub fn view(&self, now: &Files, member: &str, truth: &Path) -> Option<String> {
        let chain = chain_of(now, member);
        let mut key = blake3::Hasher::new();
        key.update(text(truth).as_bytes());
        for (name, bytes) in &chain {
            key.update(name.as_bytes());
            key.update(bytes.map_or(blake3::hash(b"missing"), blake3::hash).as_bytes());
        }
        let mut views = self.views.lock().unwrap();
        views.entry(key.finalize()).or_insert_with(|| compare(&self.put(&chain), member, truth)).clone()
    }

    /// What `qemu-img check` finds in one file.
    pub fn sound(&self, now: &Files, member: &str, leaks: bool) -> Option<String> {
        let bytes = now.get(member).map(Vec::as_slice);
        let key = blake3::hash(bytes.unwrap_or_default());
        let mut checks = self.checks.lock().unwrap();
        let (code, said) = checks.entry(key).or_insert_with(|| {
            let path = self.put(&[("checked".to_owned(), bytes)]);
            // Alone: what is below it is looked at for itself.
            let file = format!("{{'driver': 'file', 'filename': '{}'}}", text(&path));
            let image =
                format!("json:{{'driver': 'qcow2', 'backing': null, 'file': {file}}}").replace('\'', "\"");
            let output = run("qemu-img", &["check", &image]);
            let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
            (output.status.code().unwrap_or(-1), said.concat())
        });
        // 3: leaked clusters and nothing else.
        let sound = *code == 0 || (*code == 3 && !leaks);
        (!sound).then(|| format!("check of {member}: {code}: {said}"))
    }

    /// Has files where QEMU can read them; gives the first one's place.
    fn put(&self, files: &[(String, Option<&[u8]>)]) -> PathBuf {
        for entry in fs::read_dir(self.scratch.path()).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let place = |name: &str| self.scratch.path().join(name.rsplit('/').next().unwrap());
        for (name, bytes) in files {
            if let Some(bytes) = bytes {
                fs::write(place(name), bytes).unwrap();
            }
        }
        place(&files[0].0)
    }
}

/// A member and all below it, by the backing names in the headers.
fn chain_of<'a>(now: &'a Files, member: &str) -> Vec<(String, Option<&'a [u8]>)> {
    let mut chain: Vec<(String, Option<&[u8]>)> = Vec::new();
    let mut next = Some(member.to_owned());
    while let Some(name) = next {
        // Round and round: QEMU will say so.
        if chain.len() > 20 {
            break;
        }
        let bytes = now.get(&name).map(Vec::as_slice);
        next = bytes.and_then(backing).map(|below| {
            let below = below.trim_start_matches("./");
            name.rsplit_once('/').map_or(below.to_owned(), |(directory, _)| format!("{directory}/{below}"))
        });
        chain.push((name, bytes));
    }
    chain
}

fn compare(path: &Path, member: &str, truth: &Path) -> Option<String> {
    let output = run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(path), text(truth)]);
    let said =
        [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    let same = output.status.success() && !said.contains("mismatch");
    (!same).then(|| format!("view of {member}: {said}"))
}

/// The backing name in an image's header.
pub fn backing(image: &[u8]) -> Option<String> {
    let number = |at: usize, length: usize| {
        let bytes = image.get(at..at + length)?;
        Some(bytes.iter().fold(0_usize, |number, byte| number << 8 | usize::from(*byte)))
    };
    let (at, length) = (number(8, 8)?, number(16, 4)?);
    let name = image.get(at..at + length).filter(|_| at > 0)?;
    Some(String::from_utf8_lossy(name).into_owned())
}

/// All files below a directory but those in `.qchain`, and all directories, which end in `/`.
pub fn outside(root: &Path) -> Files {
    let mut found = Files::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = text(path.strip_prefix(root).unwrap()).to_owned();
            if name == ".qchain" {
                continue;
            }
            if path.is_dir() {
                found.insert(name + "/", Vec::new());
                pending.push(path);
            } else {
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// What lies in `.qchain` that an operation must not leave there.
pub fn left_inside(root: &Path) -> Vec<String> {
    let stays = ["generations/", "locks/", "log/", "manifests/", "leaves/", "store.json"];
    let own = root.join(".qchain");
    let names = super::store::files(&own);
    let names = names.iter().map(|path| text(path).to_owned());
    names.filter(|name| !stays.iter().any(|kept| name.starts_with(kept))).collect()
}

/// The names by which two states differ.
pub fn difference(a: &Files, b: &Files) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    names.into_iter().filter(|name| a.get(*name) != b.get(*name)).cloned().collect()
}

/// Whether the full matrices are asked for.
pub fn full() -> bool {
    std::env::var_os("QCHAIN_FULL").is_some()
}

/// The seed: of the content, and of which points a bounded matrix takes.
pub fn seed() -> u64 {
    std::env::var("QCHAIN_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// One line of the table.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// What was done, and cut off.
    pub verb: String,
    /// How data moves.
    pub mode: &'static str,
    /// The file system.
    pub fs: String,
    /// The chain.
    pub shape: String,
    /// The number of the call.
    pub number: u64,
    /// The call.
    pub call: String,
    /// What the end was.
    pub end: String,
    /// What was wrong before recovery.
    pub before: Vec<String>,
    /// What was wrong after it.
    pub after: Vec<String>,
    /// What was left over.
    pub leaks: Vec<String>,
}

/// All lines; fails at its end if one is wrong.
pub struct Table {
    name: String,
    /// The lines.
    pub rows: Vec<Row>,
}

impl Table {
    /// An empty one.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), rows: Vec::new() }
    }

    /// Writes it below `target/tmp`, where `scripts/crash-matrix` finds it, and fails if a point is wrong.
    pub fn finish(self) {
        let mut lines = vec!["verb\tmode\tfs\tshape\tnumber\tcall\tend\tbefore\tafter\tleaks".to_owned()];
        let flat = |wrong: &[String]| wrong.join("; ").replace(['\n', '\t'], " ");
        let mut bad = Vec::new();
        for row in &self.rows {
            let Row { verb, mode, fs, shape, number, call, end, .. } = row;
            let [before, after, leaks] = [&row.before, &row.after, &row.leaks].map(|wrong| flat(wrong));
            let line =
                format!("{verb}\t{mode}\t{fs}\t{shape}\t{number}\t{call}\t{end}\t{before}\t{after}\t{leaks}");
            if !before.is_empty() || !after.is_empty() || !leaks.is_empty() {
                bad.push(line.clone());
            }
            lines.push(line);
        }
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.tsv", self.name));
        fs::write(&path, lines.join("\n") + "\n").unwrap();
        eprintln!("{}: {} points, {} wrong", self.name, self.rows.len(), bad.len());
        assert!(!self.rows.is_empty() && bad.is_empty(), "{}\n{}", bad.len(), bad.join("\n"));
    }
}
