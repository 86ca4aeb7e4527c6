//! `copy` takes blocks from what the account has already, where that is configured, and from nobody else.

use std::fs;

use serde_json::{Value, json};

use super::support::chains::{assert_true, write_truth};
use super::support::qemu::{must, text};
use super::support::rot::rot;
use super::support::service::Served;
use super::support::world::World;
use super::support::zones::{Line, PEER, adopt, giving, know, pull, serve, taking};

const MIB: u64 = 1 << 20;

/// A zone with volumes that were made from one template of 8 MiB, with two blocks of their own each: two of account 2, one of
/// account 3.
fn east() -> (World, Served) {
    let world = World::new();
    let mut bytes = vec![0; 8 << 20];
    blake3::Hasher::new().update(b"template").finalize_xof().fill(&mut bytes);
    for (volume, own) in [("2/7", 1_u8), ("2/8", 2), ("3/9", 3)] {
        let directory = world.root().join("snapshots").join(volume);
        fs::create_dir_all(&directory).unwrap();
        let raw = world.directory.path().join("raw");
        let mut changed = bytes.clone();
        let at = usize::from(own) << 20;
        blake3::Hasher::new().update(&[own]).finalize_xof().fill(&mut changed[at..at + 131_072]);
        fs::write(&raw, &changed).unwrap();
        must("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&directory.join("m"))]);
    }
    let east = giving(world, &[]);
    for volume in ["2/7", "2/8", "3/9"] {
        write_truth(&member(&east, volume), &truth(&east, volume));
    }
    adopt(&east);
    let served = serve(&east, "");
    (east, served)
}

fn member(world: &World, volume: &str) -> std::path::PathBuf {
    world.root().join("snapshots").join(volume).join("m")
}

fn truth(world: &World, volume: &str) -> std::path::PathBuf {
    world.directory.path().join(format!("{}.truth", volume.replace('/', "-")))
}

/// Copies a volume's member; the report of it, and what came.
fn bring(west: &World, line: &Line, arguments: &[&str]) -> (Value, u64) {
    let before = line.came();
    let (exit, report) = pull(west, arguments);
    assert_eq!(exit, 0, "{report}");
    (report["copied"][0].clone(), line.came() - before)
}

#[test]
fn a_second_volume_of_one_template_receives_next_to_nothing() {
    let (east, served) = east();
    let line = Line::plain(&served.address);
    let west = taking();
    let reuse = |what: &str| know(&west, &line.url(), PEER, &format!("reuse = {what:?}\n"));
    reuse("account");
    let (first, came) = bring(&west, &line, &["snapshots/2/7/m"]);
    assert_eq!((&first["blocks_sent"], &first["blocks_present"]), (&json!(128), &json!(0)));
    assert!(came > 8 * MIB);
    // Unless it is said, nothing outside of the chain counts.
    know(&west, &line.url(), PEER, "");
    let (dry, _) = bring(&west, &line, &["--dry-run", "snapshots/2/8/m"]);
    assert_eq!((&dry["blocks_sent"], &dry["blocks_present"]), (&json!(128), &json!(0)));
    reuse("account");
    let (dry, _) = bring(&west, &line, &["--dry-run", "snapshots/2/8/m"]);
    // Two blocks of its own, and two where the other one has its own.
    assert_eq!((&dry["blocks_sent"], &dry["blocks_present"]), (&json!(4), &json!(124)));
    let (second, came) = bring(&west, &line, &["snapshots/2/8/m"]);
    assert_eq!((&second["blocks_sent"], &second["blocks_present"]), (&json!(4), &json!(124)));
    assert!(came < 4 * 65536 + 16_384, "{came} bytes came");
    // Flattened, too.
    let (flat, _) = bring(&west, &line, &["--flatten", "--map", "2/8=2/99", "snapshots/2/8/m"]);
    assert_eq!(flat["blocks_sent"], 0, "{flat}");
    for volume in ["2/7", "2/8"] {
        assert_true(&member(&west, volume), &truth(&east, volume), volume);
    }
    assert_true(&member(&west, "2/99"), &truth(&east, "2/8"), "2/99");
    assert_eq!(west.run(&["verify", "--level", "data"]).0, 0);
}

#[test]
fn another_account_has_nothing_to_do_with_it() {
    let (east, served) = east();
    let line = Line::plain(&served.address);
    let west = taking();
    know(&west, &line.url(), PEER, "reuse = \"account\"\n");
    bring(&west, &line, &["snapshots/2/7/m"]);
    let (other, came) = bring(&west, &line, &["snapshots/3/9/m"]);
    assert_eq!((&other["blocks_sent"], &other["blocks_present"]), (&json!(128), &json!(0)), "{other}");
    assert!(came > 8 * MIB);
    // What counts is the account here.
    let (moved, _) = bring(&west, &line, &["--map", "2/8=3/10", "snapshots/2/8/m"]);
    assert_eq!((&moved["blocks_sent"], &moved["blocks_present"]), (&json!(4), &json!(124)), "{moved}");
    assert_true(&member(&west, "3/9"), &truth(&east, "3/9"), "3/9");
    assert_true(&member(&west, "3/10"), &truth(&east, "2/8"), "3/10");
}

#[test]
fn what_is_damaged_or_gone_here_is_asked_for() {
    let (east, served) = east();
    let line = Line::plain(&served.address);
    let west = taking();
    know(&west, &line.url(), PEER, "reuse = \"account\"\n");
    bring(&west, &line, &["snapshots/2/7/m"]);
    // A block rots, which nobody has noticed yet.
    let first = member(&west, "2/7");
    let times = fs::metadata(&first).unwrap();
    rot(&first, times.len() - 70_000, b"rot");
    let (second, _) = bring(&west, &line, &["snapshots/2/8/m"]);
    assert_eq!((&second["blocks_sent"], &second["blocks_present"]), (&json!(5), &json!(123)), "{second}");
    assert_true(&member(&west, "2/8"), &truth(&east, "2/8"), "2/8");
    // A leaf table that cannot be read is none.
    fs::remove_file(member(&west, "2/8")).unwrap();
    for entry in fs::read_dir(west.root().join(".qchain/leaves")).unwrap() {
        let table = entry.unwrap().path();
        let mut bytes = fs::read(&table).unwrap();
        bytes[20] ^= 1;
        fs::write(&table, bytes).unwrap();
    }
    let (third, _) = bring(&west, &line, &["snapshots/2/8/m"]);
    assert_eq!((&third["blocks_sent"], &third["blocks_present"]), (&json!(128), &json!(0)), "{third}");
    assert_true(&member(&west, "2/8"), &truth(&east, "2/8"), "2/8");
}
