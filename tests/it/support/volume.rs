//! Chains on a mounted file system, in CloudStack's layout, of which members are made full bases.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use super::chains::{Kind, Numbers, assert_true, write_truth};
use super::crash::{Files, checkpoint, outside};
use super::mounts::{FsKind, LoopMount};
use super::qemu::{io, must, text};
use super::world::COLUMNS;

/// The URL of the store in rows.
const URL: &str = "nfs://192.0.2.10/export/secondary";
/// Virtual sizes of members in bytes, in turn: disks grow, and a revert may make them smaller.
const SIZES: [u64; 4] = [4 << 20, (4 << 20) - 70_144, (4 << 20) + 33_280, 4 << 20];

/// A store with one volume, and the truth of each of its members.
pub struct Volume {
    /// Where it is mounted.
    pub mount: LoopMount,
    aside: TempDir,
    /// Parents and virtual sizes, by names.
    members: BTreeMap<String, (String, u64)>,
}

impl Volume {
    /// Makes members with checkpoint files, each over its parent; `(name, parent)`. Not opted in yet.
    pub fn new(fs: FsKind, members: &[(&str, &str)]) -> Self {
        let mount = LoopMount::in_memory(fs, 400 << 20);
        let aside = tempfile::tempdir().unwrap();
        let mut volume = Self { mount, aside, members: BTreeMap::new() };
        let mut numbers = Numbers(7);
        for (name, parent) in members {
            volume.make(name, parent, &mut numbers);
        }
        volume
    }

    fn make(&mut self, name: &str, parent: &str, numbers: &mut Numbers) {
        let size = SIZES[self.members.len() % SIZES.len()];
        let spec = Kind { compressed: true, ..Kind::PLAIN }.member(size, 12, numbers);
        let path = self.file(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let bytes = size.to_string();
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &spec.options];
        if !parent.is_empty() {
            arguments.extend(["-b", parent, "-F", "qcow2"]);
        }
        arguments.extend([text(&path), &bytes]);
        must("qemu-img", &arguments);
        io(&path, &spec.commands.iter().map(String::as_str).collect::<Vec<_>>());
        write_truth(&path, &self.truth(name));
        self.checkpoint(name, Some(parent).filter(|parent| !parent.is_empty()));
        self.members.insert(name.to_owned(), (parent.to_owned(), size));
    }

    /// Writes a member's checkpoint file.
    pub fn checkpoint(&self, name: &str, parent: Option<&str>) {
        let path = self.checkpoint_file(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, checkpoint(name, parent)).unwrap();
    }

    /// A member's checkpoint file.
    pub fn checkpoint_file(&self, name: &str) -> PathBuf {
        self.root().join("checkpoints/2/7").join(name)
    }

    /// The store's directory.
    pub fn root(&self) -> PathBuf {
        self.mount.path().join("s")
    }

    /// A member's file.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root().join("snapshots/2/7").join(name)
    }

    /// A member's name on its store.
    pub fn member(name: &str) -> String {
        format!("snapshots/2/7/{name}")
    }

    fn truth(&self, name: &str) -> PathBuf {
        self.aside.path().join(name)
    }

    /// All files outside of `.qchain`.
    pub fn files(&self) -> Files {
        outside(&self.root())
    }

    /// The names of the files that differ from what they were.
    pub fn changed(&self, before: &Files) -> Vec<String> {
        super::crash::difference(before, &self.files())
    }

    /// QEMU finds these members sound, and reads of each what it always did.
    pub fn assert_views(&self, names: &[&str], context: &str) {
        for name in names {
            assert_true(&self.file(name), &self.truth(name), context);
        }
    }

    /// The same of all members.
    pub fn assert_all_views(&self, context: &str) {
        let names: Vec<&str> = self.members.keys().map(String::as_str).collect();
        self.assert_views(&names, context);
    }

    /// Rows of all members as an export: `(name, state, created)`, numbered from 1 in that order; each has the parent
    /// that its file was made with.
    pub fn export(&self, rows: &[(&str, &str, &str)]) -> String {
        let number = |name: &str| rows.iter().position(|(other, ..)| *other == name).map_or(0, |at| at + 1);
        let line = |(name, state, created): &(&str, &str, &str)| {
            let (id, parent, path) = (number(name), number(&self.members[*name].0), Self::member(name));
            let size = self.members[*name].1;
            format!(
                "store\t{URL}\tImage\t{id}\tx\tn\t2\t7\tKVM\tx\t{state}\t{path}\t{parent}\t0\t{size}\t1\tNULL\t\
                 {created}\n"
            )
        };
        let lines: String = rows.iter().map(line).collect();
        let path = self.aside.path().join("rows.tsv");
        fs::write(&path, format!("{COLUMNS}\n{lines}")).unwrap();
        text(&path).to_owned()
    }

    /// A configuration; gives its path.
    pub fn configure(&self, content: &str) -> String {
        let path = self.aside.path().join("qchain.toml");
        fs::write(&path, content).unwrap();
        text(&path).to_owned()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qchain"));
        command.arg("--store").arg(format!("{},url={URL}", self.root().display())).args(arguments);
        command.env("XDG_CACHE_HOME", self.aside.path().join("caches"));
        command.env_remove("QCHAIN_STORE").env_remove("QCHAIN_CONFIG").env_remove("QCHAIN_DATABASE");
        command
    }

    /// Runs the program with `--json`; its exit code and the document.
    pub fn run(&self, arguments: &[&str]) -> (i32, Value) {
        let output = self.command(arguments).arg("--json").output().unwrap();
        let document = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {output:?}"));
        (output.status.code().unwrap(), document)
    }

    /// Runs what must end well.
    pub fn does(&self, arguments: &[&str]) -> Value {
        let (exit, document) = self.run(arguments);
        assert_eq!(exit, 0, "{arguments:?}: {document}");
        document
    }

    /// What it prints for people.
    pub fn prints(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Makes members bases, and keeps the old files for an hour; gives the document.
    pub fn consolidates(&self, more: &[&str]) -> Value {
        let call = ["consolidate", "--now", "--yes", "--grace", "0s", "--retention", "1h"];
        self.does(&[&call[..], more].concat())
    }

    /// What must be refused and change nothing: exit code and code of the error.
    pub fn refuses(&self, arguments: &[&str], expected: (i32, &str)) {
        let before = self.files();
        let (exit, document) = self.run(arguments);
        let code = document["error"]["code"].as_str().map(str::to_owned);
        let code = code.or_else(|| Some(document["results"][0]["error"]["code"].as_str()?.to_owned()));
        assert_eq!((exit, code.as_deref()), (expected.0, Some(expected.1)), "{arguments:?}: {document}");
        assert_eq!(self.changed(&before), Vec::<String>::new(), "{arguments:?}");
    }
}

/// The findings of a document as `(code, member)`, without the volume's path, sorted.
pub fn findings(document: &Value) -> Vec<(String, String)> {
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap().to_owned();
    let all = document["findings"].as_array().unwrap_or_else(|| panic!("{document}"));
    let mut found: Vec<_> = all
        .iter()
        .map(|one| (text(one, "code"), text(one, "member").replace("snapshots/2/7/", "")))
        .collect();
    found.sort();
    found
}

/// Whether a path is a qcow2 image without backing file.
pub fn is_base(path: &Path) -> bool {
    super::store::backing(path).0.is_none()
}
