//! `copy` between two stores of one host: every kind of image, increments, merges on either side, names that are taken.

use std::fs;

use qchain::ids::StorePath;
use qchain::store::manifest::stem;
use serde_json::{Value, json};

use super::support::chains::{Kind, NAMES, Numbers, Spec, build};
use super::support::qemu::{io, text};
use super::support::world::World;
use super::support::zones::{PEER, adopt, copy, giving, path, same_as, serve, taking, temporaries, truth};

const MIB: u64 = 1 << 20;

fn outcomes(report: &Value) -> Vec<(String, String)> {
    let copied = report["copied"].as_array().unwrap_or_else(|| panic!("{report}"));
    copied
        .iter()
        .map(|one| {
            let name = one["member"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
            (name, one["outcome"].as_str().unwrap().to_owned())
        })
        .collect()
}

fn owned(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(name, outcome)| ((*name).to_owned(), (*outcome).to_owned())).collect()
}

/// A zone with a chain of QEMU's making.
fn zone_of(specs: &[Spec]) -> World {
    let world = World::new();
    let truths = world.directory.path().join("truths");
    fs::create_dir_all(&truths).unwrap();
    build(&world.root().join("snapshots/2/7"), &truths, specs);
    for name in &NAMES[..specs.len()] {
        fs::rename(truths.join(name), truth(&world, name)).unwrap();
    }
    assert_eq!(world.run(&["init"]).0, 0);
    adopt(&world);
    world
}

#[test]
fn chains_of_every_kind_arrive_as_they_are() {
    let kinds = [
        Kind::PLAIN,
        Kind { cluster: 4096, compressed: true, ..Kind::PLAIN },
        Kind { cluster: 2 << 20, ..Kind::PLAIN },
        Kind { extended: true, ..Kind::PLAIN },
        Kind { cluster: 512, old: true, ..Kind::PLAIN },
        Kind { cluster: 1 << 20, zstd: true, compressed: true, ..Kind::PLAIN },
    ];
    for seed in 0..3 {
        let mut numbers = Numbers(seed);
        // Growing, shrinking, and ends within clusters and blocks.
        let sizes = [9 * MIB, 9 * MIB + 512, 5 * MIB + 66_048, 12 * MIB, 12 * MIB, 11 * MIB + 512];
        let specs: Vec<Spec> = kinds
            .iter()
            .zip(sizes)
            .map(|(kind, size)| {
                let size = if seed == 0 { 8 * MIB } else { size };
                kind.member(size, 12, &mut numbers)
            })
            .collect();
        let east = zone_of(&specs);
        let west = taking();
        let (exit, report) = copy(&west, &east.root(), &[&path("e")]);
        assert_eq!(exit, 0, "{report}");
        assert_eq!(outcomes(&report), NAMES.map(|name| (name.to_owned(), "copied".to_owned())), "{report}");
        same_as(&west, &east, &NAMES);
        // Cluster sizes stay, parents are named by their bare names.
        for (name, kind) in NAMES.iter().zip(kinds) {
            let info =
                super::support::qemu::must("qemu-img", &["info", "--output=json", text(&west.member(name))]);
            let info: Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["cluster-size"], kind.cluster);
        }
        let (exit, again) = copy(&west, &east.root(), &[&path("e"), &path("b")]);
        assert_eq!((exit, outcomes(&again)), (0, owned(&[("e", "present"), ("b", "present")])));
        assert_eq!(again["bytes_on_wire"], 0);
        // What was not copied over comes flattened.
        let flat = taking();
        let (exit, report) = copy(&flat, &east.root(), &["--flatten", "--read", &path("d")]);
        assert_eq!((exit, outcomes(&report)), (0, owned(&[("d", "copied")])), "{report}");
        same_as(&flat, &east, &["d"]);
    }
}

/// a <- b <- {c, d}, and an empty zone.
fn forked() -> (World, World) {
    (giving(World::forked(), &["a", "b", "c", "d"]), taking())
}

#[test]
fn increments_bring_what_is_new_and_nothing_twice() {
    let (east, west) = forked();
    let (exit, first) = copy(&west, &east.root(), &[&path("b")]);
    assert_eq!((exit, outcomes(&first)), (0, owned(&[("a", "copied"), ("b", "copied")])), "{first}");
    let (exit, dry) = copy(&west, &east.root(), &["--dry-run", &path("c"), &path("d")]);
    assert_eq!((exit, outcomes(&dry)), (0, owned(&[("c", "planned"), ("d", "planned")])), "{dry}");
    assert!(!west.member("c").exists());
    assert_eq!(temporaries(&west), Vec::<String>::new());
    let (exit, second) = copy(&west, &east.root(), &[&path("c"), &path("d")]);
    assert_eq!((exit, outcomes(&second)), (0, owned(&[("c", "copied"), ("d", "copied")])));
    // Two blocks of 3s, one of 4s: those of one kind are sent once.
    assert_eq!(
        (&second["copied"][0]["blocks_sent"], &second["copied"][1]["blocks_sent"]),
        (&2.into(), &0.into())
    );
    assert_eq!(dry["copied"][0]["blocks_sent"], 2);
    // An increment that writes what was there before takes it from there.
    east.make("e", "c", &["write -P 1 8M 256k", "write -P 9 9M 64k", "write -z 0 128k"]);
    super::support::chains::write_truth(&east.member("e"), &truth(&east, "e"));
    adopt(&east);
    let (_, third) = copy(&west, &east.root(), &[&path("e")]);
    assert_eq!(outcomes(&third), owned(&[("e", "copied")]), "{third}");
    assert_eq!(
        (&third["copied"][0]["blocks_sent"], &third["copied"][0]["blocks_present"]),
        (&1.into(), &4.into())
    );
    same_as(&west, &east, &["a", "b", "c", "d", "e"]);
    // Audit takes them for replicas.
    let records = west.directory.path().join("records.tsv");
    fs::write(&records, format!("{}\n", super::support::world::COLUMNS)).unwrap();
    let (_, audit) = west.run(&["audit", "--records", text(&records), "--min-age", "0s"]);
    let orphans = audit["findings"].as_array().unwrap().iter().filter(|one| one["code"] == "orphan-file");
    assert_eq!(orphans.count(), 0, "{audit}");
}

#[test]
fn what_a_killed_copy_left_beside_what_it_named_goes_with_the_next() {
    let (east, west) = forked();
    let (exit, report) = copy(&west, &east.root(), &[&path("a")]);
    assert_eq!(exit, 0, "{report}");
    let stem = stem(&StorePath::parse(&path("a")).unwrap());
    let digest = report["copied"][0]["digest"].as_str().unwrap();
    let own = west.root().join(".qchain");
    let left = own.join("tmp").join(format!("copy.{stem}.{}.leaves-x", &digest[..16]));
    // Of another view of the same name: a copy may be at it.
    let other = own.join("tmp").join(format!("copy.{stem}.{:016x}.leaves-x", 0));
    let lock = own.join("locks").join(format!("copy-{stem}"));
    for file in [&left, &other, &lock] {
        fs::write(file, "").unwrap();
    }
    let (exit, dry) = copy(&west, &east.root(), &["--dry-run", &path("a")]);
    assert_eq!((exit, outcomes(&dry)), (0, owned(&[("a", "present")])), "{dry}");
    assert!(left.exists() && lock.exists());
    let (exit, again) = copy(&west, &east.root(), &[&path("a")]);
    assert_eq!((exit, outcomes(&again)), (0, owned(&[("a", "present")])), "{again}");
    assert!(!left.exists() && !lock.exists() && other.exists(), "{:?}", temporaries(&west));
    // Without the lock nothing is looked for.
    fs::write(&left, "").unwrap();
    assert_eq!(copy(&west, &east.root(), &[&path("a")]).0, 0);
    assert!(left.exists());
}

#[test]
fn merges_on_either_side_are_no_reason_to_send() {
    let (east, west) = forked();
    assert_eq!(copy(&west, &east.root(), &[&path("c"), &path("d")]).0, 0);
    let delete = |world: &World, name: &str| {
        let arguments =
            ["delete", name, "--yes", "--assume-deleted", "--now", "--grace", "0s", "--retention", "0s"];
        let (exit, report) = world.run(&arguments);
        assert_eq!(exit, 0, "{report}");
    };
    delete(&east, "b");
    delete(&west, "a");
    east.make("e", "c", &["write -P 7 7M 64k"]);
    super::support::chains::write_truth(&east.member("e"), &truth(&east, "e"));
    adopt(&east);
    let (exit, report) = copy(&west, &east.root(), &[&path("c"), &path("d"), &path("e")]);
    assert_eq!(exit, 0, "{report}");
    assert_eq!(outcomes(&report), owned(&[("c", "present"), ("d", "present"), ("e", "copied")]), "{report}");
    assert_eq!(report["copied"][2]["blocks_sent"], 1);
    same_as(&west, &east, &["b", "c", "d", "e"]);
}

#[test]
fn names_that_are_taken_are_left_alone() {
    let (east, west) = forked();
    west_directory(&west);
    west.make("c", "", &["write -P 77 0 64k"]);
    let before = fs::read(west.member("c")).unwrap();
    let fails = |arguments: &[&str]| {
        let (exit, report) = copy(&west, &east.root(), arguments);
        (exit, report["error"]["code"].as_str().unwrap_or_else(|| panic!("{report}")).to_owned())
    };
    assert_eq!(fails(&[&path("c")]), (3, "not-adopted".to_owned()));
    adopt(&west);
    assert_eq!(fails(&[&path("c")]), (3, "other-view".to_owned()));
    assert_eq!(fails(&[&path("nobody")]), (4, "not-found".to_owned()));
    assert_eq!(fs::read(west.member("c")).unwrap(), before);
    assert!(!west.member("a").exists(), "nothing comes if not all can come");
    // Under another volume there is room.
    let (exit, report) = copy(&west, &east.root(), &["--map", "2/7=5/9", &path("c")]);
    assert_eq!(exit, 0, "{report}");
    let copied = west.root().join("snapshots/5/9/c");
    super::support::chains::assert_true(&copied, &truth(&east, "c"), "mapped");
    // What is not adopted there is not given.
    io(&east.member("d"), &["write -P 5 0 64k"]);
    let (exit, report) = copy(&west, &east.root(), &[&path("d"), "--map", "2/7=5/9"]);
    assert_eq!((exit, &report["error"]["code"]), (3, &json!("not-adopted")), "{report}");
}

fn west_directory(west: &World) {
    fs::create_dir_all(west.root().join("snapshots/2/7")).unwrap();
}

/// What lies scattered is read in the order of the file, not of the guest.
#[test]
fn answers_come_in_the_order_of_the_files() {
    let world = World::new();
    let writes: Vec<String> =
        (0..32).map(|step| format!("write -q -P {} {}k 64k", step + 1, step * 13 % 32 * 64)).collect();
    let writes: Vec<&str> = writes.iter().map(String::as_str).collect();
    world.make("a", "", &writes[..20]);
    world.make("b", "a", &writes[20..]);
    let east = giving(world, &["a", "b"]);
    let (_, map) = east.run(&["map", &path("b")]);
    let place = |block: u64| {
        let runs = map["runs"].as_array().unwrap();
        let found = runs.iter().find(|run| {
            let from = run["start"].as_u64().unwrap();
            (from..from + run["length"].as_u64().unwrap()).contains(&(block * 65536))
        });
        let run = found.unwrap();
        let inside = block * 65536 - run["start"].as_u64().unwrap();
        (run["member"].as_str().unwrap() < "snapshots/2/7/b", run["offset"].as_u64().unwrap() + inside)
    };
    let served = serve(&east, "");
    let chain = served.send("GET", &format!("/v1/peer/chain?member={}", path("b")), PEER, None).is(200);
    let digest = &chain["members"][1]["view_digest"];
    let request = json!({"member": path("b"), "digest": digest, "ranges": [[0, 32]], "plain": true});
    let body = served.send("POST", "/v1/peer/blocks", PEER, Some(&request)).body;
    let frames = body.chunks(12 + 65536);
    let order: Vec<u64> = frames.map(|frame| u64::from_le_bytes(frame[..8].try_into().unwrap())).collect();
    let places: Vec<(bool, u64)> = order.iter().map(|block| place(*block)).collect();
    assert_eq!(order.len(), 32);
    assert!(places.is_sorted(), "{order:?} {places:?}");
    assert!(!order.is_sorted(), "the test shows nothing");
}

/// The runbook of the README: another installation gets a replica, and makes a template of it.
#[test]
fn another_installation_recovers_from_a_replica() {
    let east = World::forked();
    let checkpoints = east.root().join("checkpoints/2/7");
    fs::create_dir_all(&checkpoints).unwrap();
    for (name, parent) in [("a", ""), ("b", "a"), ("c", "b"), ("d", "b")] {
        let parent =
            if parent.is_empty() { String::new() } else { format!("<parent><name>{parent}</name></parent>") };
        let xml = format!("<domaincheckpoint><name>{name}</name>{parent}</domaincheckpoint>");
        fs::write(checkpoints.join(name), xml).unwrap();
    }
    let east = giving(east, &["a", "b", "c", "d"]);
    let west = taking();
    let rows = west.directory.path().join("rows.json");
    let arguments = ["--map", "2/7=5/9", "--records-out", text(&rows), &path("c")];
    let (exit, report) = copy(&west, &east.root(), &arguments);
    assert_eq!(exit, 0, "{report}");
    let rows: Value = serde_json::from_str(&fs::read_to_string(&rows).unwrap()).unwrap();
    let last = &rows["rows"][2];
    assert_eq!(last["install_path"], "snapshots/5/9/c", "{rows}");
    assert_eq!(last["parent_install_path"], "snapshots/5/9/b");
    assert_eq!(last["kvm_checkpoint_path"], "checkpoints/5/9/c");
    assert_eq!(last["size"], 10 * MIB);
    let file = west.root().join("snapshots/5/9/c");
    assert_eq!(last["physical_size"], fs::metadata(&file).unwrap().len());
    let checkpoint = fs::read_to_string(west.root().join("checkpoints/5/9/c")).unwrap();
    assert!(checkpoint.contains("<name>b</name>"), "{checkpoint}");
    let (_, listed) = west.run(&["list"]);
    let members = listed["chains"][0]["members"].as_array().unwrap();
    assert!(members.iter().all(|one| one["state"] != "incoming"), "{listed}");
    assert_eq!(west.run(&["verify", "--level", "data"]).0, 0);
    let (exit, flat) = west.run(&["flatten", "snapshots/5/9/c", "--template", "5/201/web"]);
    assert_eq!(exit, 0, "{flat}");
    let made = west.root().join("template/tmpl/5/201/web.qcow2");
    super::support::chains::assert_true(&made, &truth(&east, "c"), "the template");
}
