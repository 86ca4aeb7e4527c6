//! A store on a real directory, and the verbs called as the command line calls them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use qchain::backend::posix::PosixStore;
use qchain::backend::{Backend, Means};
use qchain::change::leaving::leaving;
use qchain::change::{Clock as _, Site, SystemClock};
use qchain::ids::StoreId;
use qchain::ops::adopt::AdoptReport;
use qchain::ops::delete::{Aim, Context, ModeChoice, Plan, Report, Request, Terms, plan, run};
use qchain::ops::recover::begin;
use qchain::ops::verify::{Level, Options, VerifyReport};
use qchain::ops::{OpError, Result};
use qchain::progress::{Cancel, Pace, Silent};
use qchain::store::chain::OpenChain;
use qchain::store::digest::view_digest;
use qchain::store::record::{DIRECTORIES, StoreKind, StoreRecord, ZoneStore};
use qchain::store::scan::{Scan, ScanOptions};
use qchain::store::{Store, StoreConfig, Stores, names};

use super::qemu::{must, text};

/// How long an instance of the tests waits for another that does not move.
pub const LEASE: Duration = Duration::from_millis(400);

/// Opts a directory in, as `qchain init` does.
pub fn init(root: &Path, kind: StoreKind) {
    fs::create_dir_all(root.join(".qchain")).unwrap();
    for directory in DIRECTORIES {
        fs::create_dir_all(root.join(".qchain").join(directory)).unwrap();
    }
    let scratch = qchain::store::record::own(&["tmp"]);
    let capabilities = PosixStore::open(root).unwrap().probe(&scratch).ok();
    let record = StoreRecord { capabilities, ..record(&format!("test-{}", root.display()), kind) };
    fs::write(root.join(".qchain/store.json"), record.encode()).unwrap();
}

/// What the only store of a zone says of itself.
pub fn record(id: &str, kind: StoreKind) -> StoreRecord {
    let zone = vec![ZoneStore { id: id.to_owned(), name: "test".to_owned() }];
    StoreRecord { schema: 1, id: id.to_owned(), format: 1, least_writer: 1, kind, zone, capabilities: None }
}

/// Opens a directory as the only store.
pub fn open(root: &Path) -> Stores {
    open_with(root, Arc::new(PosixStore::open(root).unwrap()))
}

/// What a store is reached by: its directory, or the URL of an export.
pub fn backend(root: &Path, url: Option<&str>) -> Arc<dyn Backend> {
    match url {
        Some(url) => Arc::new(super::nfs::open(url)),
        None => Arc::new(PosixStore::open(root).unwrap()),
    }
}

/// Opens a backend as the only store; `root` is what backing names may call it.
pub fn open_with(root: &Path, backend: Arc<dyn Backend>) -> Stores {
    try_open_with(root, backend).unwrap()
}

/// The same for one that may fail.
pub fn try_open_with(root: &Path, backend: Arc<dyn Backend>) -> qchain::store::Result<Stores> {
    let config = StoreConfig {
        id: StoreId::parse("test").unwrap(),
        root: text(root).to_owned(),
        url: None,
        aliases: Vec::new(),
        backing: qchain::cloudstack::backing::Style::Relative,
        layout: qchain::cloudstack::paths::Layout::Secondary,
    };
    Stores::new(vec![Store::open(config, backend)?])
}

/// Scans without waiting for files to settle.
pub fn scan(stores: &Stores) -> Scan {
    let options = ScanOptions { now_ns: 0, settle_ns: 0, caches: &[], progress: &Silent };
    Scan::run(stores, &options).unwrap()
}

/// `qchain delete NAMES --mode MODE --grace 0s --retention 0s --assume-deleted --end-of-chain`.
pub fn delete(stores: &Stores, members: &[&str], mode: ModeChoice) -> Result<Report> {
    delete_on(stores, members, mode, Terms::default())
}

/// The same on other terms.
pub fn delete_on(stores: &Stores, members: &[&str], mode: ModeChoice, terms: Terms) -> Result<Report> {
    let cancel = Cancel::default();
    let site = Site::new(stores, &SystemClock, &cancel, LEASE);
    delete_at(&site, members, mode, terms)
}

/// The same by a given instance.
pub fn delete_at(site: &Site<'_>, members: &[&str], mode: ModeChoice, terms: Terms) -> Result<Report> {
    delete_by(site, members, mode, terms, 2)
}

/// The same with so many threads; one makes its calls in the same order each time.
pub fn delete_by(
    site: &Site<'_>,
    members: &[&str],
    mode: ModeChoice,
    terms: Terms,
    jobs: usize,
) -> Result<Report> {
    change_by(site, (Aim::Delete, members), mode, terms, jobs)
}

/// The same, or what makes the members full bases.
pub fn change_by(
    site: &Site<'_>,
    (aim, members): (Aim, &[&str]),
    mode: ModeChoice,
    terms: Terms,
    jobs: usize,
) -> Result<Report> {
    let stores = site.stores;
    let guard = begin(site, terms.witness)?;
    let scan = scan(stores);
    let members: Vec<String> = members.iter().map(|name| (*name).to_owned()).collect();
    let targets = names::resolve_all(stores, &scan, &members).map_err(OpError::from)?;
    let leaving = leaving(site, &scan)?;
    let request = Request {
        targets,
        aim,
        mode,
        assume_deleted: true,
        end_of_chain: true,
        leaving,
        ..Request::default()
    };
    let plan = plan(stores, &scan, &request)?;
    run(&context(site, &scan, &plan, jobs, terms), &guard)
}

/// What a plan is carried out with, when nobody watches.
pub fn context<'a>(
    site: &'a Site<'a>,
    scan: &'a Scan,
    plan: &'a Plan,
    jobs: usize,
    terms: Terms,
) -> Context<'a> {
    Context {
        site,
        stores: site.stores,
        scan,
        plan,
        jobs,
        force: false,
        gate: None,
        terms,
        progress: &Silent,
        cancel: site.cancel,
    }
}

/// The same; every outcome must be good.
pub fn delete_well(root: &Path, members: &[&str], mode: ModeChoice) -> Report {
    let report = delete(&open(root), members, mode).unwrap_or_else(|error| panic!("{members:?}: {error}"));
    if let Some(error) = report.first_failure() {
        panic!("{members:?} by {mode:?}: {error}");
    }
    report
}

/// `qchain adopt --now`, of all members; each must be adopted.
pub fn adopt_well(root: &Path) -> AdoptReport {
    let report = adopt(root, false);
    assert!(
        report.failure.is_none() && report.findings.is_empty(),
        "{}: {:?}",
        root.display(),
        report.findings
    );
    report
}

/// `qchain adopt --now`, of all members.
pub fn adopt(root: &Path, accept_changed: bool) -> AdoptReport {
    adopt_in(&open(root), accept_changed)
}

/// The same on opened stores.
pub fn adopt_in(stores: &Stores, accept_changed: bool) -> AdoptReport {
    let scan = scan(stores);
    let request = qchain::ops::adopt::Request {
        targets: scan.graph.ids().collect(),
        accept_changed,
        jobs: 2,
        now_ns: SystemClock.wall_ns(),
        ..Default::default()
    };
    qchain::ops::adopt::adopt(stores, &scan, &request, &Silent, &Cancel::default(), &Pace::default()).unwrap()
}

/// `qchain verify --level LEVEL`, of all members.
pub fn verify(root: &Path, level: Level) -> VerifyReport {
    verify_in(&open(root), level)
}

/// The same on opened stores.
pub fn verify_in(stores: &Stores, level: Level) -> VerifyReport {
    let scan = scan(stores);
    let options = Options {
        level,
        fraction: None,
        seed: 0,
        deadline: None,
        note: true,
        all: true,
        now_ns: SystemClock.wall_ns(),
    };
    let all: Vec<_> = scan.graph.ids().collect();
    qchain::ops::verify::verify(stores, &scan, &all, &options, &Silent, &Cancel::default(), &Pace::default())
        .unwrap()
}

/// The mode that uses those means.
pub fn mode_of(means: Means) -> ModeChoice {
    match means {
        Means::Clone => ModeChoice::Clone,
        Means::Copy => ModeChoice::Copy,
    }
}

/// What an image's header says of its backing file, as `qemu-img info` reads it: name and format.
pub fn backing(path: &Path) -> (Option<String>, Option<String>) {
    let info: serde_json::Value =
        serde_json::from_str(&must("qemu-img", &["info", "-U", "--output=json", text(path)])).unwrap();
    let field = |key: &str| info.get(key).and_then(|value| value.as_str()).map(str::to_owned);
    (field("backing-filename"), field("backing-filename-format"))
}

/// Owner, group and mode.
pub fn owner_and_mode(path: &Path) -> (u32, u32, u32) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.uid(), metadata.gid(), metadata.permissions().mode())
}

/// All files below a directory, relative, sorted.
pub fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else {
                found.push(path.strip_prefix(root).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// What of a store is no lasting record of qchain's: members, and whatever a change left lying about.
pub fn left(root: &Path) -> Vec<String> {
    let lasting = ["store.json", "locks/", "generations/", "manifests/", "leaves/", "log/"];
    let record = |path: &String| {
        path.strip_prefix(".qchain/").is_some_and(|own| lasting.iter().any(|name| own.starts_with(name)))
    };
    files(root).iter().map(|path| path.display().to_string()).filter(|path| !record(path)).collect()
}

/// The view digests of members, `(name, digest)`.
pub fn digests(stores: &Stores, members: &[&str]) -> Vec<(String, String)> {
    let scan = scan(stores);
    let digest = |name: &&str| {
        let id = names::resolve_one(stores, &scan, name).unwrap();
        let chain = OpenChain::of_member(stores, &scan, id).unwrap();
        ((*name).to_owned(), view_digest(&chain, &Silent, &Cancel::default()).unwrap().to_string())
    };
    members.iter().map(digest).collect()
}
