//! Trees: several children, several trees, several stores, names of every form, checkpoint files.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qchain::backend::posix::PosixStore;
use qchain::change::{Guard, Site, SystemClock};
use qchain::failure::{Code, Failure, Kind};
use qchain::ids::StoreId;
use qchain::ops::delete::{ModeChoice, Report, Request, Status, Terms, plan, run};
use qchain::ops::{OpError, Result};
use qchain::progress::Cancel;
use qchain::store::chain::OpenChain;
use qchain::store::record::{StoreKind, StoreRecord, ZoneStore};
use qchain::store::{Store, StoreConfig, Stores, names};
use qchain::units::GuestOffset;

use super::support::mounts::{FsKind, LoopMount};
use super::support::qemu::{io, must, text};
use super::support::store::{
    LEASE, backing, context, delete, delete_well, files, init, left, open, owner_and_mode, scan,
};

const SIZE: u64 = 1 << 20;

/// Members made so far, with what each shows; and backing names that wait for [`Made::alias`].
#[derive(Default)]
struct Made(BTreeMap<PathBuf, Vec<u8>>, Vec<(PathBuf, String)>);

impl Made {
    /// A member with a few writes; `name` is what its header calls its parent.
    fn add(&mut self, path: &Path, parent: Option<&Path>, name: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let size = SIZE.to_string();
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", "cluster_size=16384"];
        if let Some(parent) = parent {
            arguments.extend(["-b", text(parent), "-F", "qcow2"]);
        }
        arguments.extend([text(path), &size]);
        must("qemu-img", &arguments);
        let mut bytes = parent.map_or_else(|| vec![0; 1 << 20], |parent| self.0[parent].clone());
        let number = self.0.len();
        let byte = u8::try_from(number % 255 + 1).unwrap();
        let (own, shared) = (number * 20_480 % 900_000 / 512 * 512, 512 * (number % 7));
        io(path, &[&format!("write -P {byte} {own} 40960"), &format!("write -P {byte} {shared} 8192")]);
        bytes[own..own + 40_960].fill(byte);
        bytes[shared..shared + 8192].fill(byte);
        // QEMU could make no child of a member whose backing name leads nowhere on this host.
        if ALIASES.iter().any(|alias| name.starts_with(alias)) {
            self.1.push((path.to_owned(), name.to_owned()));
        } else if parent.is_some() {
            rebase(path, name);
        }
        self.0.insert(path.to_owned(), bytes);
    }

    /// Gives the members their names on other hosts.
    fn alias(&mut self) {
        self.1.drain(..).for_each(|(path, name)| rebase(&path, &name));
    }

    /// In one directory, by file names.
    fn add_beside(&mut self, directory: &Path, name: &str, parent: Option<&str>) {
        let below = parent.map(|parent| directory.join(parent));
        self.add(&directory.join(name), below.as_deref(), parent.unwrap_or_default());
    }

    /// Every member that is still there shows what it showed, and QEMU finds it sound.
    fn check(&self, stores: &Stores) {
        let scan = scan(stores);
        for (path, truth) in self.0.iter().filter(|(path, _)| path.exists()) {
            // Alone: what is below may have a name that leads nowhere on this host.
            let file = serde_json::json!({"driver": "file", "filename": text(path)});
            let alone = serde_json::json!({"driver": "qcow2", "file": file, "backing": null});
            must("qemu-img", &["check", "-q", &format!("json:{alone}")]);
            let found = scan.graph.ids().find(|id| {
                let key = &scan.graph.node(*id).key;
                let root = stores.get(key.store).unwrap().config().root.clone();
                Path::new(&root).join(key.path.as_str()) == *path
            });
            let chain = OpenChain::open(stores, &scan.graph, found.unwrap()).unwrap();
            let mut bytes = vec![1; truth.len()];
            chain.read(GuestOffset(0), &mut bytes).unwrap();
            assert!(bytes == *truth, "{}", path.display());
        }
    }
}

fn rebase(path: &Path, name: &str) {
    must("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", text(path)]);
}

/// As [`delete`], with something happening between plan and run.
fn delete_while(stores: &Stores, members: &[&str], meanwhile: impl FnOnce()) -> Result<Report> {
    let scan = scan(stores);
    let members: Vec<String> = members.iter().map(|name| (*name).to_owned()).collect();
    let targets = names::resolve_all(stores, &scan, &members).map_err(OpError::from)?;
    let request = Request { targets, assume_deleted: true, end_of_chain: true, ..Request::default() };
    let plan = plan(stores, &scan, &request)?;
    meanwhile();
    let guard = Guard::take(stores).map_err(OpError::from)?;
    let cancel = Cancel::default();
    let site = Site::new(stores, &SystemClock, &cancel, LEASE);
    run(&context(&site, &scan, &plan, 3, Terms::default()), &guard)
}

/// base <- a <- {b, c <- {d, e}}, base <- f.
fn branched(store: &Path) -> Made {
    let mut made = Made::default();
    let parents = [
        ("base", None),
        ("a", Some("base")),
        ("b", Some("a")),
        ("c", Some("a")),
        ("d", Some("c")),
        ("e", Some("c")),
    ];
    for (name, parent) in parents {
        made.add_beside(store, name, parent);
    }
    made.add_beside(store, "f", Some("base"));
    init(store, StoreKind::Plain);
    made
}

#[test]
fn each_of_several_children_gets_it() {
    for (deleted, parents) in [
        (&["a"][..], &[("b", "base"), ("c", "base"), ("d", "c"), ("f", "base")][..]),
        (&["a", "c"], &[("b", "base"), ("d", "base"), ("e", "base"), ("f", "base")]),
        (&["base"], &[("a", ""), ("f", ""), ("b", "a")]),
        (&["base", "a", "c", "e"], &[("b", ""), ("d", ""), ("f", "")]),
        (&["c", "d", "e"], &[("b", "a"), ("f", "base")]),
        (&["base", "a", "b", "c", "d", "e", "f"], &[]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let made = branched(folder.path());
        delete_well(folder.path(), deleted, ModeChoice::Auto);
        made.check(&open(folder.path()));
        for (name, parent) in parents {
            let wanted = Some((*parent).to_owned()).filter(|parent| !parent.is_empty());
            assert_eq!(backing(&folder.path().join(name)).0, wanted, "{name} without {deleted:?}");
        }
        let all = ["a", "b", "base", "c", "d", "e", "f"];
        let stay: Vec<&str> = all.into_iter().filter(|name| !deleted.contains(name)).collect();
        assert_eq!(left(folder.path()), stay);
    }
}

#[test]
fn its_file_goes_only_when_all_children_have_it() {
    let folder = tempfile::tempdir().unwrap();
    let made = branched(folder.path());
    let stores = open(folder.path());
    let touched = folder.path().join("b");
    // Somebody changes one of the children after the plan was made.
    let report = delete_while(&stores, &["a"], || {
        fs::set_permissions(&touched, fs::Permissions::from_mode(0o600)).unwrap();
    })
    .unwrap();
    let codes: Vec<_> =
        report.outcomes.iter().map(|outcome| outcome.error.as_ref().map(Failure::code)).collect();
    assert_eq!(codes, [Some(Code::ChangedMeanwhile); 2], "one tree, one decision");
    assert_eq!(backing(&touched).0.as_deref(), Some("a"));
    assert_eq!(backing(&folder.path().join("c")).0.as_deref(), Some("a"));
    made.check(&open(folder.path()));
    delete_well(folder.path(), &["a"], ModeChoice::Auto);
    made.check(&open(folder.path()));
    assert_eq!(left(folder.path()), ["b", "base", "c", "d", "e", "f"]);
}

#[test]
fn a_child_that_appears_meanwhile_keeps_its_parent() {
    let folder = tempfile::tempdir().unwrap();
    let mut made = branched(folder.path());
    let stores = open(folder.path());
    let report = delete_while(&stores, &["a"], || made.add_beside(folder.path(), "late", Some("a"))).unwrap();
    assert_eq!(report.first_failure().map(Failure::code), Some(Code::Kept));
    assert!(folder.path().join("a").exists());
    made.check(&open(folder.path()));
}

#[test]
fn one_tree_is_refused_and_the_others_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut made = Made::default();
    for tree in 0..6 {
        let directory = folder.path().join(format!("t{tree}"));
        made.add_beside(&directory, "base", None);
        made.add_beside(&directory, "a", Some("base"));
        made.add_beside(&directory, "b", Some("a"));
    }
    init(folder.path(), StoreKind::Plain);
    must("qemu-img", &["snapshot", "-c", "inside", text(&folder.path().join("t1/a"))]);
    fs::hard_link(folder.path().join("t3/b"), folder.path().join("t3/other")).unwrap();
    let targets: Vec<String> = (0..6).map(|tree| format!("t{tree}/a")).collect();
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    let report = delete(&open(folder.path()), &targets, ModeChoice::Auto).unwrap();
    let outcomes: Vec<_> = report
        .outcomes
        .iter()
        .map(|outcome| (outcome.status, outcome.error.as_ref().map(Failure::code)))
        .collect();
    let fine = (Status::Done, None);
    let inside = (Status::Refused, Some(Code::HasInternalSnapshots));
    let linked = (Status::Refused, Some(Code::HardLinked));
    assert_eq!(outcomes, [fine, inside, fine, linked, fine, fine]);
    for tree in 0..6 {
        let stays = folder.path().join(format!("t{tree}/a")).exists();
        assert_eq!(stays, [1, 3].contains(&tree), "{tree}");
    }
    made.check(&open(folder.path()));
    // All of them refused: the call is.
    let error = delete(&open(folder.path()), &["t1/a", "t3/a"], ModeChoice::Auto).unwrap_err();
    assert_eq!(error.code(), Code::HasInternalSnapshots);
}

const ALIASES: [&str; 2] =
    ["/mnt/11111111-2222-3333-8444-555555555555", "/mnt/66666666-7777-3888-9999-aaaaaaaaaaaa"];

/// Two directories as the stores `one` and `two` of a zone, each with an alias.
fn zone(parent: &Path) -> (PathBuf, PathBuf) {
    let roots = [parent.join("one"), parent.join("two")];
    let zone: Vec<ZoneStore> = roots
        .iter()
        .map(|root| ZoneStore { id: format!("test-{}", root.display()), name: text(root).to_owned() })
        .collect();
    for root in &roots {
        init(root, StoreKind::Plain);
        let record = fs::read(root.join(".qchain/store.json")).unwrap();
        let record = StoreRecord { zone: zone.clone(), ..StoreRecord::decode(&record).unwrap() };
        fs::write(root.join(".qchain/store.json"), record.encode()).unwrap();
    }
    let [one, two] = roots;
    (one, two)
}

fn open_zone(roots: &[&Path]) -> Stores {
    let store = |(root, alias): (&&Path, &str)| {
        let config = StoreConfig {
            id: StoreId::parse(root.file_name().unwrap().to_str().unwrap()).unwrap(),
            root: text(root).to_owned(),
            url: None,
            aliases: vec![alias.to_owned()],
            backing: qchain::cloudstack::backing::Style::Keep,
            layout: qchain::cloudstack::paths::Layout::Secondary,
        };
        Store::open(config, Arc::new(PosixStore::open(root).unwrap())).unwrap()
    };
    Stores::new(roots.iter().zip(ALIASES).map(store).collect()).unwrap()
}

#[test]
fn a_child_on_another_store() {
    for (by_alias, mode) in [(true, ModeChoice::Auto), (false, ModeChoice::Copy), (true, ModeChoice::Copy)] {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = zone(folder.path());
        let prefix = if by_alias { ALIASES[0] } else { text(&one) };
        let mut made = Made::default();
        made.add(&one.join("x/base"), None, "");
        made.add(&one.join("x/a"), Some(&one.join("x/base")), "base");
        made.add(&one.join("x/b"), Some(&one.join("x/a")), "a");
        made.add(&two.join("y/c"), Some(&one.join("x/a")), &format!("{prefix}/x/a"));
        made.add(&two.join("y/d"), Some(&two.join("y/c")), "c");
        made.alias();
        // Without the other store the child would not be seen.
        let error = delete(&open_zone(&[&one]), &["x/a"], mode).unwrap_err();
        assert_eq!((error.kind(), error.code()), (Kind::Refused, Code::StoreAbsent), "{error}");
        assert!(one.join("x/a").exists());

        let stores = open_zone(&[&one, &two]);
        made.check(&stores);
        let report = delete(&stores, &["one:x/a"], mode).unwrap();
        assert!(report.first_failure().is_none(), "{:?}", report.first_failure());
        assert_eq!(report.outcomes.len(), 2);
        made.check(&open_zone(&[&one, &two]));
        assert_eq!(backing(&one.join("x/b")).0.as_deref(), Some("base"));
        assert_eq!(backing(&two.join("y/c")).0, Some(format!("{prefix}/x/base")));
        assert_eq!(left(&one), ["x/b", "x/base"]);
        assert_eq!(left(&two), ["y/c", "y/d"]);
        // The base goes too: the child on the other store stands alone.
        let report = delete(&open_zone(&[&one, &two]), &["x/base"], mode).unwrap();
        assert!(report.first_failure().is_none(), "{:?}", report.first_failure());
        made.check(&open_zone(&[&one, &two]));
        assert_eq!(backing(&two.join("y/c")).0, None);
    }
}

#[test]
fn a_child_on_another_store_shares_its_own_extents() {
    let mount = LoopMount::new(FsKind::Xfs, 512 << 20);
    let (one, two) = zone(&mount.path());
    let mut made = Made::default();
    made.add(&one.join("base"), None, "");
    made.add(&one.join("a"), Some(&one.join("base")), "base");
    made.add(&two.join("b"), Some(&one.join("a")), text(&one.join("a")));
    let report = delete(&open_zone(&[&one, &two]), &["one:a"], ModeChoice::Clone).unwrap();
    assert!(report.first_failure().is_none(), "{:?}", report.first_failure());
    let outcome = &report.outcomes[0];
    assert!(outcome.bytes_cloned > 0 && outcome.bytes_written > 0, "its own by clone, the other's by copy");
    made.check(&open_zone(&[&one, &two]));
}

#[test]
fn names_keep_their_form_across_directories() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = zone(folder.path());
    let mut made = Made::default();
    let own = text(&one).to_owned();
    made.add(&one.join("p/base"), None, "");
    made.add(&one.join("q/r/a"), Some(&one.join("p/base")), "../../p/base");
    made.add(&one.join("q/b"), Some(&one.join("q/r/a")), "./r/a");
    made.add(&one.join("s/c"), Some(&one.join("q/b")), &format!("{}/q/b", ALIASES[0]));
    made.add(&one.join("s/d"), Some(&one.join("s/c")), &format!("{own}/s/c"));
    made.add(&one.join("s/e"), Some(&one.join("s/d")), "d");
    made.alias();
    made.check(&open_zone(&[&one, &two]));
    for (deleted, child, name) in [
        ("q/r/a", "q/b", "../p/base".to_owned()),
        ("q/b", "s/c", format!("{}/p/base", ALIASES[0])),
        ("s/c", "s/d", format!("{own}/p/base")),
        ("s/d", "s/e", "../p/base".to_owned()),
    ] {
        let report = delete(&open_zone(&[&one, &two]), &[deleted], ModeChoice::Auto).unwrap();
        assert!(report.first_failure().is_none(), "{deleted}: {:?}", report.first_failure());
        assert_eq!(backing(&one.join(child)), (Some(name), Some("qcow2".to_owned())), "without {deleted}");
        made.check(&open_zone(&[&one, &two]));
    }
    assert_eq!(left(&one), ["p/base", "s/e"]);
}

/// As `virsh checkpoint-dumpxml` prints it; with `domain` it has names of its own.
fn checkpoint(name: &str, parent: Option<&str>, domain: bool) -> String {
    let parent = parent
        .map_or_else(String::new, |parent| format!("\n  <parent>\n    <name>{parent}</name>\n  </parent>"));
    let domain = if domain {
        format!(
            "\n  <domain type='kvm'>\n    <name>i-2-7-VM</name>\n    <metadata><name>{name}</name></metadata>\n  </domain>"
        )
    } else {
        String::new()
    };
    format!(
        "<domaincheckpoint>\n  <name>{name}</name>{parent}\n  <creationTime>1700000000</creationTime>\n  <disks>\n    \
         <disk name='vda' checkpoint='bitmap' bitmap='{name}'/>\n  </disks>{domain}\n</domaincheckpoint>\n"
    )
}

/// As CloudStack saves it, by Java's XML library.
fn saved(name: &str, parent: Option<&str>) -> String {
    let xml = checkpoint(name, parent, false).replace('\'', "\"");
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\" standalone=\"no\"?>{}", xml.trim_end())
}

const VOLUME: &str = "2/7";

fn uuid(index: usize) -> String {
    format!("00000000-0000-4000-8000-{index:012}")
}

/// Five members with checkpoint files in CloudStack's layout.
fn cloudstack(root: &Path, text_of: impl Fn(&str, Option<&str>) -> String) -> Made {
    let (snapshots, checkpoints) =
        (root.join("snapshots").join(VOLUME), root.join("checkpoints").join(VOLUME));
    fs::create_dir_all(&checkpoints).unwrap();
    let mut made = Made::default();
    for index in 0..5_usize {
        let parent = index.checked_sub(1).map(uuid);
        made.add_beside(&snapshots, &uuid(index), parent.as_deref());
        let path = checkpoints.join(uuid(index));
        fs::write(&path, text_of(&uuid(index), parent.as_deref())).unwrap();
        std::os::unix::fs::chown(&path, Some(107), Some(64_055)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    }
    init(root, StoreKind::Cloudstack);
    made
}

/// The text of a checkpoint file from its name and parent.
type Form<'a> = &'a dyn Fn(&str, Option<&str>) -> String;

#[test]
fn checkpoint_files_follow() {
    let forms: [Form; 3] = [
        &|name, parent| checkpoint(name, parent, true),
        &|name, parent| checkpoint(name, parent, false),
        &|name, parent| saved(name, parent),
    ];
    for form in forms {
        let folder = tempfile::tempdir().unwrap();
        let made = cloudstack(folder.path(), form);
        let checkpoints = folder.path().join("checkpoints").join(VOLUME);
        let content = |index| fs::read_to_string(checkpoints.join(uuid(index))).unwrap();
        // A middle one and the base: one parent is renamed, one goes with the white space before it.
        delete_well(folder.path(), &[&uuid(2), &uuid(0)], ModeChoice::Auto);
        assert_eq!(content(1), form(&uuid(1), None));
        assert_eq!(content(3), form(&uuid(3), Some(&uuid(1))));
        assert_eq!(content(4), form(&uuid(4), Some(&uuid(3))), "not touched");
        for index in [1, 3, 4] {
            assert_eq!(owner_and_mode(&checkpoints.join(uuid(index))), (107, 64_055, 0o100_640));
        }
        // The tip goes: nobody's parent changes.
        delete_well(folder.path(), &[&uuid(4)], ModeChoice::Auto);
        assert_eq!(content(3), form(&uuid(3), Some(&uuid(1))));
        made.check(&open(folder.path()));
        let both = |area: &str| [1, 3].map(|index| format!("{area}/{VOLUME}/{}", uuid(index)));
        assert_eq!(left(folder.path()), [both("checkpoints"), both("snapshots")].concat());
    }
}

#[test]
fn a_checkpoint_that_cannot_be_edited_refuses() {
    for (bad, code) in [
        ("<domaincheckpoint><name>x</name>", Code::CheckpointUnreadable),
        ("", Code::CheckpointUnreadable),
        ("no xml \u{0}", Code::CheckpointUnreadable),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let made = cloudstack(folder.path(), saved);
        let file = folder.path().join("checkpoints").join(VOLUME).join(uuid(3));
        fs::write(&file, bad).unwrap();
        let snapshot = |path: &PathBuf| (path.clone(), fs::read(folder.path().join(path)).unwrap());
        let members = || files(folder.path()).into_iter().filter(|path| !path.starts_with(".qchain"));
        let before: Vec<_> = members().map(|path| snapshot(&path)).collect();
        let error = delete(&open(folder.path()), &[&uuid(2)], ModeChoice::Auto).unwrap_err();
        assert_eq!((error.kind(), error.code()), (Kind::Refused, code), "{error}");
        let after: Vec<_> = members().map(|path| snapshot(&path)).collect();
        assert!(before == after, "nothing changed");
        // What does not need that file goes on.
        delete_well(folder.path(), &[&uuid(0)], ModeChoice::Auto);
        made.check(&open(folder.path()));
        assert_eq!(fs::read_to_string(&file).unwrap(), bad);
    }
}

#[test]
fn incoming_and_unknown_members_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let made = cloudstack(folder.path(), saved);
    let checkpoints = folder.path().join("checkpoints").join(VOLUME);
    // The newest has no checkpoint file yet: it is being made, its parent may not be merged into it, and the
    // member below must stay the tip's parent.
    fs::remove_file(checkpoints.join(uuid(4))).unwrap();
    for index in [4, 3] {
        let error = delete(&open(folder.path()), &[&uuid(index)], ModeChoice::Auto).unwrap_err();
        assert_eq!((error.kind(), error.code()), (Kind::Busy, Code::Incoming), "{error}");
    }
    let error = delete(&open(folder.path()), &["nobody"], ModeChoice::Auto).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    delete_well(folder.path(), &[&uuid(1)], ModeChoice::Auto);
    made.check(&open(folder.path()));
}
