//! An undo looks at what old files would read through: not through the stub of what they stood on.

use super::support::mounts::FsKind;
use super::support::volume::Volume;

#[test]
fn an_undo_never_has_an_old_file_read_through_a_stand_in() {
    // a <- b <- {c, d}: c goes, then b, of which a stub is left.
    let volume = Volume::new(FsKind::Xfs, &[("a", ""), ("b", "a"), ("c", "b"), ("d", "b")]);
    volume.does(&["init"]);
    let call = ["delete", "c", "--assume-deleted", "--end-of-chain", "--now", "--yes", "--grace", "0s"];
    let first = volume.does(&call)["results"][0]["operation"].as_str().unwrap().to_owned();
    let rows = volume.export(&[("a", "Ready", "NULL"), ("b", "Hidden", "NULL"), ("d", "Ready", "NULL")]);
    let call = ["reclaim", "--records", &rows, "--now", "--yes", "--grace", "0s", "--retention", "1h"];
    let second = volume.does(&call)["results"][0]["operation"].as_str().unwrap().to_owned();
    assert!(volume.file("b").exists() && !volume.file("c").exists());
    volume.refuses(&["undo", &first, "--yes"], (3, "not-undoable"));
    for operation in [second, first] {
        volume.does(&["undo", &operation, "--yes"]);
    }
    volume.assert_all_views("both undone, the later one first");
}
