//! The real program on a server in this process that lacks, limits and makes up things on order.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use nfs3_types::nfs3::nfsstat3;
use serde_json::Value;

use super::support::chains::{assert_true, write_truth};
use super::support::crash::{full, left_inside};
use super::support::fake_nfs::{FakeNfs, Fate, Manner};
use super::support::world::World;
use super::support::zones::truth;

const WRITE: u32 = 7;
const COMMIT: u32 = 21;

const MEMBERS: [&str; 4] = ["a", "b", "c", "d"];
const DELETE: [&str; 11] = [
    "delete",
    "b",
    "--assume-deleted",
    "--now",
    "--yes",
    "--mode",
    "copy",
    "--grace",
    "0s",
    "--retention",
    "0s",
];

/// a <- b <- {c, d}; what each shows lies beside the store.
fn world() -> World {
    let world = World::forked();
    for name in MEMBERS {
        write_truth(&world.member(name), &truth(&world, name));
    }
    world
}

fn run(world: &World, fake: &FakeNfs, arguments: &[&str]) -> (i32, Value) {
    world.run_on(&format!("{},id=s1", fake.url("")), arguments)
}

fn well(world: &World, fake: &FakeNfs, arguments: &[&str]) -> Value {
    let (exit, document) = run(world, fake, arguments);
    assert_eq!(exit, 0, "{arguments:?}: {document}");
    document
}

/// What the server has, as files.
fn taken_out(world: &World, fake: &FakeNfs) -> PathBuf {
    let place = world.directory.path().join("out");
    let _ = fs::remove_dir_all(&place);
    fake.tree().write_to(&place).unwrap();
    place
}

/// QEMU's word for what the survivors show.
fn are_true(world: &World, fake: &FakeNfs, names: &[&str], context: &str) {
    let place = taken_out(world, fake);
    for name in names {
        assert_true(
            &place.join("snapshots/2/7").join(name),
            &truth(world, name),
            &format!("{context}: {name}"),
        );
    }
}

#[test]
fn a_chain_lives_its_life_on_a_server_that_lacks_much() {
    let plain = Manner::default;
    for (what, manner, links) in [
        ("nothing", plain(), true),
        ("hard links", Manner { links: false, ..plain() }, false),
        ("all that may be left out", Manner { bare: true, exclusive: false, plus: false, ..plain() }, true),
        ("all but tiny transfers", Manner { told: (512, 512), most: 3000, ..plain() }, true),
    ] {
        let world = world();
        let fake = FakeNfs::of(&world.root(), manner);
        let made = well(&world, &fake, &["init"]);
        assert_eq!(made["capabilities"]["hard_links"], links, "{what}: {made}");
        well(&world, &fake, &["adopt", "--now"]);
        well(&world, &fake, &["verify", "--level", "data"]);
        let done = well(&world, &fake, &DELETE);
        assert_eq!(done["results"][0]["status"], "done", "{what}: {done}");
        well(&world, &fake, &["purge", "--all", "--yes"]);
        let checked = well(&world, &fake, &["verify", "--level", "data"]);
        assert_eq!(checked["checked"].as_array().unwrap().len(), 3, "{what}: {checked}");
        are_true(&world, &fake, &["a", "c", "d"], what);
        let place = taken_out(&world, &fake);
        assert!(!place.join("snapshots/2/7/b").exists(), "{what}");
        assert_eq!(left_inside(&place), Vec::<String>::new(), "{what}");
    }
}

/// From some WRITE or COMMIT on there is no room: the deletion fails and says why, or is finished later.
#[test]
fn a_deletion_that_runs_out_of_room_is_whole() {
    let world = world();
    for procedure in [WRITE, COMMIT] {
        let fresh = || {
            let fake = FakeNfs::of(&world.root(), Manner::default());
            well(&world, &fake, &["init"]);
            fake
        };
        let fake = fresh();
        fake.choose(|_, _| Fate::Pass);
        well(&world, &fake, &DELETE);
        let calls = fake.calls().iter().filter(|call| **call == procedure).count();
        assert!(calls > 5, "{calls}");
        let mut codes: BTreeMap<String, usize> = BTreeMap::new();
        for at in (0..calls).step_by(if full() { 1 } else { 3 }) {
            let fake = fresh();
            fake.choose(move |call, number| {
                let none = call == procedure && number >= at;
                if none { Fate::Answer(nfsstat3::NFS3ERR_DQUOT) } else { Fate::Pass }
            });
            let context = format!("{procedure} from {at}");
            let (exit, document) = run(&world, &fake, &DELETE);
            let errors = [&document["error"], &document["results"][0]["error"]];
            let error = errors.into_iter().find(|error| error.is_object());
            let code = error.map_or("done", |error| error["code"].as_str().unwrap());
            assert!(
                code == "done" || document.to_string().contains("NFS3ERR_DQUOT"),
                "{context}: {document}"
            );
            assert!(
                matches!((exit, code), (0, "done") | (7, "no-space") | (_, "decided")),
                "{context}: {document}"
            );
            *codes.entry(code.to_owned()).or_default() += 1;
            // Of what is not finished everybody reads as before.
            are_true(&world, &fake, &["a", "c", "d"], &context);
            fake.choose(|_, _| Fate::Pass);
            well(&world, &fake, &["recover"]);
            if taken_out(&world, &fake).join("snapshots/2/7/b").exists() {
                are_true(&world, &fake, &MEMBERS, &context);
                well(&world, &fake, &DELETE);
            }
            are_true(&world, &fake, &["a", "c", "d"], &context);
            let place = taken_out(&world, &fake);
            assert!(!place.join("snapshots/2/7/b").exists(), "{context}");
            assert_eq!(left_inside(&place), Vec::<String>::new(), "{context}");
        }
        assert!(codes.contains_key("no-space"), "{codes:?}");
    }
}

/// Lengths and ids that cannot be: an end with one of the known exit codes.
#[test]
fn attributes_that_cannot_be_are_survived() {
    let world = world();
    let plain = Manner::default;
    for manner in [
        Manner { length: Some(u64::MAX), ..plain() },
        Manner { length: Some(i64::MAX.cast_unsigned()), ..plain() },
        Manner { length: Some(0), ..plain() },
        Manner { length: Some(100_000), ..plain() },
        Manner { same_id: true, ..plain() },
    ] {
        let (length, same_id) = (manner.length, manner.same_id);
        let fake = FakeNfs::of(&world.root(), manner);
        for verb in [
            &["list"][..],
            &["map", "c"],
            &["digest", "c"],
            &["verify"],
            &["audit", "--min-age", "0s"],
            &["init"],
            &["adopt", "--now"],
            &DELETE,
        ] {
            let (exit, document) = run(&world, &fake, verb);
            assert!((0..=8).contains(&exit), "{length:?}, {same_id}, {verb:?}: {document}");
        }
        fake.be(plain());
        are_true(&world, &fake, &["a", "c", "d"], &format!("{length:?}, {same_id}"));
    }
}

#[test]
fn limits_are_named_by_init() {
    let world = world();
    let fake = FakeNfs::of(&world.root(), Manner { name_max: 100, ..Manner::default() });
    let (exit, document) = run(&world, &fake, &["init"]);
    assert_eq!((exit, document["error"]["code"].as_str()), (8, Some("io")), "{document}");
    assert!(document["error"]["message"].as_str().unwrap().contains("at most 100 bytes"), "{document}");
    fake.choose(|procedure, _| match procedure {
        2 | 7..=15 | COMMIT => Fate::Answer(nfsstat3::NFS3ERR_ROFS),
        _ => Fate::Pass,
    });
    fake.be(Manner::default());
    let (exit, document) = run(&world, &fake, &["init"]);
    assert_eq!((exit, document["error"]["code"].as_str()), (3, Some("read-only")), "{document}");
}
