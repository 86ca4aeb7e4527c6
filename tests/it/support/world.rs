//! The real program on a store that QEMU made.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use super::qemu::{io, must, text};

/// Where hosts mount the pool of [`World::pool`].
pub const MOUNT: &str = "/mnt/5a2f7c80-0000-3000-8000-000000000001";

/// The columns of `scripts/export-records.sql`.
pub const COLUMNS: &str = "store_uuid\tstore_url\tstore_role\tsnapshot_id\tsnapshot_uuid\tsnapshot_name\taccount_id\t\
    volume_id\thypervisor_type\tsnapshot_status\tref_state\tinstall_path\tparent_snapshot_id\tend_of_chain\t\
    size\tphysical_size\tkvm_checkpoint_path\tcreated";

/// A store of CloudStack's layout, and a home for the caches.
pub struct World {
    /// Removed at the end.
    pub directory: TempDir,
}

impl World {
    /// An empty store: `s1` in a temporary directory.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("s1/snapshots/2/7")).unwrap();
        Self { directory }
    }

    /// The store's directory.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("s1")
    }

    /// The path of a member of the one volume.
    pub fn member(&self, name: &str) -> PathBuf {
        self.root().join("snapshots/2/7").join(name)
    }

    /// Makes a member of 10 MiB over `backing`, and runs commands of qemu-io on it.
    pub fn make(&self, name: &str, backing: &str, commands: &[&str]) {
        let path = self.member(name);
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if !backing.is_empty() {
            arguments.extend(["-u", "-F", "qcow2", "-b", backing]);
        }
        arguments.extend([text(&path), "10M"]);
        must("qemu-img", &arguments);
        if !commands.is_empty() {
            io(&path, commands);
        }
    }

    /// a <- b <- {c, d}
    pub fn forked() -> Self {
        let world = Self::new();
        world.make("a", "", &["write -P 1 0 3M"]);
        world.make("b", "a", &["write -P 2 1M 128k", "write -z 2M 64k"]);
        world.make("c", "b", &["write -P 3 5M 128k", "write -c -P 4 6M 64k"]);
        world.make("d", "b", &[]);
        world
    }

    /// A pool of primary storage: a <- b, and one alone, which has no checkpoint file; and a volume in use, which is
    /// no business of qchain's.
    pub fn pool(&self) -> PathBuf {
        let pool = self.directory.path().join("pool");
        fs::create_dir_all(pool.join("snapshots")).unwrap();
        fs::create_dir_all(pool.join("checkpoints")).unwrap();
        let create = |name: &str, below: Option<&str>| {
            let below = below.map(|name| format!("{MOUNT}/snapshots/{name}"));
            let mut call = vec!["create", "-q", "-f", "qcow2"];
            if let Some(below) = &below {
                call.extend(["-u", "-F", "qcow2", "-b", below]);
            }
            let path = pool.join("snapshots").join(name);
            must("qemu-img", &[&call[..], &[text(&path), "10M"]].concat());
        };
        create("a", None);
        create("b", Some("a"));
        create("alone", None);
        for (name, parent) in [("a", ""), ("b", "<parent><name>a</name></parent>")] {
            let xml = format!("<domaincheckpoint><name>{name}</name>{parent}</domaincheckpoint>");
            fs::write(pool.join("checkpoints").join(name), xml).unwrap();
        }
        must("qemu-img", &["create", "-q", "-f", "qcow2", text(&pool.join("volume")), "10M"]);
        pool
    }

    /// Runs the program with `--json` on the store; its exit code and the document.
    pub fn run(&self, arguments: &[&str]) -> (i32, Value) {
        self.run_on(text(&self.root()), arguments)
    }

    /// The same on other stores.
    pub fn run_on(&self, store: &str, arguments: &[&str]) -> (i32, Value) {
        let output = Command::new(env!("CARGO_BIN_EXE_qchain"))
            .args(["--json", "--store", store])
            .args(arguments)
            .env("XDG_CACHE_HOME", self.directory.path().join("caches"))
            .env_remove("QCHAIN_STORE")
            .env_remove("QCHAIN_CONFIG")
            .output()
            .unwrap();
        let document: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {output:?}"));
        assert_eq!(document["schema"], 1, "{arguments:?}");
        (output.status.code().unwrap(), document)
    }

    /// Runs what must fail; the exit code, and `code` of the error.
    pub fn fails(&self, arguments: &[&str]) -> (i32, String) {
        let (exit, document) = self.run(arguments);
        let error = &document["error"];
        assert!(error["kind"].is_string() && error["message"].is_string(), "{arguments:?}: {document}");
        (exit, error["code"].as_str().unwrap().to_owned())
    }
}

/// Everything below a directory with all that a write would change.
pub fn listing(directory: &Path) -> BTreeMap<PathBuf, (u64, u64, i64, i64)> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![directory.to_owned()];
    while let Some(path) = waiting.pop() {
        let data = fs::symlink_metadata(&path).unwrap();
        if data.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        found.insert(path, (data.ino(), data.len(), data.ctime(), data.ctime_nsec()));
    }
    found
}
