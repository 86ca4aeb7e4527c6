//! A damaged member gets its bad blocks back, from whatever has them, and nothing else is touched.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::support::chains::{assert_true, write_truth};
use super::support::mounts::FsKind;
use super::support::qemu::{Writer, must, text};
use super::support::rot::rot;
use super::support::volume::Volume;
use super::support::world::{World, listing};

/// A store of three members, adopted, and a copy of it elsewhere; the truth of each member.
struct Places {
    world: World,
}

impl Places {
    fn new() -> Self {
        let world = World::forked();
        let places = Self { world };
        fs::create_dir(places.truth("")).unwrap();
        for name in ["a", "b", "c", "d"] {
            write_truth(&places.world.member(name), &places.truth(name));
        }
        must("cp", &["-a", text(&places.world.root()), text(&places.elsewhere())]);
        assert_eq!(places.world.run(&["init"]).0, 0);
        let (exit, document) = places.world.run(&["adopt", "--now"]);
        assert_eq!((exit, document["adopted"].as_array().unwrap().len()), (0, 4), "{document}");
        places
    }

    fn truth(&self, name: &str) -> PathBuf {
        self.world.directory.path().join("truth").join(name)
    }

    fn elsewhere(&self) -> PathBuf {
        self.world.directory.path().join("s2")
    }

    /// Changes bytes of a member as bad storage does.
    fn rot(&self, name: &str, at: u64, bytes: &[u8]) {
        rot(&self.world.member(name), at, bytes);
    }

    fn verdict(&self, name: &str) -> String {
        let (_, document) = self.world.run(&["verify", name, "--level", "data"]);
        document["checked"][0]["verdict"].as_str().unwrap().to_owned()
    }

    fn is_whole(&self) {
        for name in ["a", "b", "c", "d"] {
            assert_true(&self.world.member(name), &self.truth(name), name);
            assert_eq!(self.verdict(name), "sound", "{name}");
        }
    }

    fn repair(&self, name: &str, from: &Path) -> (i32, serde_json::Value) {
        self.world.run(&["repair", name, "--from", text(from), "--yes"])
    }
}

/// Where the guest's byte lies in the member's file.
fn host(path: &Path, guest: u64) -> u64 {
    let map: serde_json::Value =
        serde_json::from_str(&must("qemu-img", &["map", "-U", "--output=json", text(path)])).unwrap();
    let run = map.as_array().unwrap().iter().find(|run| {
        let start = run["start"].as_u64().unwrap();
        run["depth"] == 0 && start <= guest && guest < start + run["length"].as_u64().unwrap()
    });
    let run = run.unwrap();
    run["offset"].as_u64().unwrap() + guest - run["start"].as_u64().unwrap()
}

#[test]
fn blocks_come_from_a_copy_of_the_chain_a_raw_image_or_a_template() {
    let places = Places::new();
    let template = places.world.directory.path().join("template");
    must("qemu-img", &["convert", "-O", "qcow2", "-c", text(&places.world.member("b")), text(&template)]);
    for from in [places.elsewhere(), places.truth("b"), template] {
        places.rot("b", host(&places.world.member("b"), 1 << 20), &vec![7; 70_000]);
        assert_eq!(places.verdict("b"), "damaged");
        let before = fs::read(places.world.member("a")).unwrap();
        let own = listing(&places.world.root());
        let (exit, document) =
            places.world.run(&["--read-only", "repair", "b", "--from", text(&from), "--dry-run"]);
        assert_eq!(listing(&places.world.root()), own, "a dry run writes nothing");
        assert_eq!(
            (exit, document["status"].as_str(), document["blocks"].as_u64()),
            (0, Some("repairable"), Some(2))
        );
        assert_eq!(places.verdict("b"), "damaged", "a dry run changes nothing");
        let (exit, document) = places.repair("b", &from);
        assert_eq!((exit, document["status"].as_str()), (0, Some("repaired")), "{document}");
        assert_eq!(document["from"][text(&from)], 2, "{document}");
        assert_eq!(fs::read(places.world.member("a")).unwrap(), before);
        places.is_whole();
    }
    let (exit, document) = places.repair("b", &places.elsewhere());
    assert_eq!((exit, document["status"].as_str()), (0, Some("sound")));
}

#[test]
fn header_and_tables_come_from_a_copy_of_the_file() {
    let places = Places::new();
    // An L2 entry of a: cluster 4 of an image of QEMU's own.
    places.rot("a", 4 * 65_536 + 8, &[0x80, 0, 0, 0, 0, 9, 0, 0]);
    assert_eq!(places.verdict("a"), "damaged");
    let (exit, document) = places.repair("a", &places.truth("a"));
    assert_eq!((exit, document["error"]["code"].as_str()), (1, Some("metadata-damaged")), "{document}");
    let (exit, document) = places.repair("a", &places.elsewhere().join("snapshots/2/7/a"));
    assert_eq!(
        (exit, document["status"].as_str(), document["metadata"].as_bool()),
        (0, Some("repaired"), Some(true))
    );
    places.is_whole();
    // A tail that is lost.
    let length = fs::metadata(places.world.member("a")).unwrap().len();
    File::options().write(true).open(places.world.member("a")).unwrap().set_len(length / 2).unwrap();
    assert_eq!(places.verdict("a"), "damaged");
    let (exit, document) = places.repair("a", &places.elsewhere());
    assert_eq!((exit, document["status"].as_str()), (0, Some("repaired")), "{document}");
    places.is_whole();
}

#[test]
fn compressed_clusters_come_from_a_copy_of_the_file() {
    let places = Places::new();
    let map: serde_json::Value = serde_json::from_str(&must(
        "qemu-img",
        &["map", "-U", "--output=json", text(&places.world.member("c"))],
    ))
    .unwrap();
    let compressed = map.as_array().unwrap().iter().any(|run| run["compressed"] == true);
    assert!(compressed, "{map}");
    // The last bytes of the file are the compressed cluster's.
    let length = fs::metadata(places.world.member("c")).unwrap().len();
    let copy = fs::read(places.world.member("c")).unwrap();
    let last = copy.iter().rposition(|byte| *byte != 0).unwrap() as u64;
    places.rot("c", last.saturating_sub(16), &[0xff; 16]);
    assert_eq!(fs::metadata(places.world.member("c")).unwrap().len(), length);
    assert_eq!(places.verdict("c"), "damaged");
    let (exit, document) = places.repair("c", &places.truth("c"));
    assert_eq!((exit, document["error"]["code"].as_str()), (1, Some("data-damaged")), "{document}");
    let (exit, document) = places.repair("c", &places.elsewhere());
    assert_eq!((exit, document["status"].as_str()), (0, Some("repaired")), "{document}");
    places.is_whole();
}

#[test]
fn what_nobody_has_is_refused_and_nothing_changes() {
    let places = Places::new();
    places.rot("b", host(&places.world.member("b"), 1 << 20), &[7; 10]);
    let damaged = fs::read(places.world.member("b")).unwrap();
    let (exit, document) = places.repair("b", &places.truth("a"));
    assert_eq!((exit, document["error"]["code"].as_str()), (1, Some("data-damaged")), "{document}");
    assert_eq!(fs::read(places.world.member("b")).unwrap(), damaged);
    assert_eq!(
        places.world.fails(&["repair", "b", "--from", "/nowhere", "--yes"]),
        (4, "not-found".to_owned())
    );
    assert_eq!(places.world.fails(&["repair", "nobody", "--from", "/dev/null", "--yes"]).0, 4);
    // An undo brings the damaged file back, and what is known of it.
    let (exit, document) = places.repair("b", &places.elsewhere());
    assert_eq!(exit, 0, "{document}");
    assert_eq!(places.world.run(&["history"]).1["operations"][0]["did"], "repair");
    let operation = document["operation"].as_str().unwrap().to_owned();
    assert_eq!(places.world.run(&["undo", &operation, "--yes"]).0, 0);
    assert_eq!(fs::read(places.world.member("b")).unwrap(), damaged);
    assert_eq!(places.verdict("b"), "damaged");
    let (exit, log) = places.world.run(&["history", "--log"]);
    let verbs: Vec<&str> =
        log["lines"].as_array().unwrap().iter().map(|line| line["verb"].as_str().unwrap()).collect();
    assert_eq!((exit, verbs), (0, vec!["repair", "undo"]));
}

#[test]
fn a_member_that_qemu_writes_is_busy() {
    let places = Places::new();
    let path = places.world.member("b");
    places.rot("b", host(&path, 1 << 20), &[7; 10]);
    let damaged = fs::read(&path).unwrap();
    let from = places.elsewhere();
    let writer = Writer::of(&path);
    let before = fs::read(&path).unwrap();
    for more in ["--yes", "--dry-run"] {
        let call = ["repair", "b", "--from", text(&from), more];
        assert_eq!(places.world.fails(&call), (5, "locked".to_owned()), "{more}");
        assert!(fs::read(&path).unwrap() == before, "{more}: a file in use was changed");
    }
    drop(writer);
    assert!(fs::read(&path).unwrap() == damaged, "a writer that wrote nothing");
    let (exit, document) = places.repair("b", &from);
    assert_eq!((exit, document["status"].as_str()), (0, Some("repaired")), "{document}");
    places.is_whole();
}

#[test]
fn too_little_room_is_told_in_bytes_before_the_first_one() {
    let volume = Volume::new(FsKind::Ext4, &[("a", ""), ("b", "a")]);
    volume.does(&["init"]);
    volume.does(&["adopt", "--now"]);
    let (path, aside) = (volume.file("b"), tempfile::tempdir().unwrap());
    let copy = aside.path().join("copy");
    fs::copy(&path, &copy).unwrap();
    let map = must("qemu-img", &["map", "-U", "--output=json", text(&path)]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let run = map.as_array().unwrap().iter().find(|run| run["depth"] == 0 && run["offset"].is_u64()).unwrap();
    rot(&path, run["offset"].as_u64().unwrap(), &[0x5a; 512]);
    let needed = fs::metadata(&path).unwrap().len() + 65_536;
    let filler = File::create(volume.mount.path().join("filler")).unwrap();
    let space = rustix::fs::statvfs(volume.mount.path()).unwrap();
    let room = space.f_bavail * space.f_frsize - needed / 2;
    rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), 0, room).unwrap();
    volume.refuses(&["repair", "b", "--from", text(&copy), "--yes"], (7, "no-space"));
    let (_, document) = volume.run(&["repair", "b", "--from", text(&copy), "--yes"]);
    let message = document["error"]["message"].as_str().unwrap();
    assert!(message.ends_with(&format!(" bytes free; {needed} are needed")), "{message}");
    assert_eq!(volume.does(&["history"])["operations"], serde_json::json!([]));
    filler.set_len(0).unwrap();
    let done = volume.does(&["repair", "b", "--from", text(&copy), "--yes"]);
    assert_eq!((&done["status"], &done["blocks"]), (&"repaired".into(), &1.into()), "{done}");
    assert!(fs::read(&path).unwrap() == fs::read(&copy).unwrap());
    volume.assert_all_views("repaired");
}
