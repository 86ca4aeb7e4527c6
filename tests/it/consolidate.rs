//! `qchain consolidate`: members become full bases, by QEMU's verdict on every member before and after; what it
//! leaves alone, what it refuses, what the policy chooses.

use std::fs;

use serde_json::{Value, json};

use super::support::crash::{checkpoint, difference};
use super::support::mounts::FsKind;
use super::support::qemu::{must, text};
use super::support::volume::{Volume, is_base};
use super::support::world::listing;

/// a <- b <- {c <- d, e}
const FORKED: &[(&str, &str)] = &[("a", ""), ("b", "a"), ("c", "b"), ("d", "c"), ("e", "b")];
const CHAIN: &[(&str, &str)] =
    &[("a", ""), ("b", "a"), ("c", "b"), ("d", "c"), ("e", "d"), ("f", "e"), ("g", "f")];

fn folded(document: &Value) -> Vec<(String, Vec<String>)> {
    let name = |value: &Value| value.as_str().unwrap().replace("snapshots/2/7/", "");
    let entry = |entry: &Value| {
        (name(&entry["into"]), entry["members"].as_array().unwrap().iter().map(name).collect())
    };
    document["plan"].as_array().unwrap().iter().map(entry).collect()
}

#[test]
fn a_member_anywhere_becomes_a_base_and_an_undo_brings_its_file_back() {
    for (fs, mode) in [(FsKind::Xfs, "clone"), (FsKind::Ext4, "copy")] {
        let volume = Volume::new(fs, FORKED);
        volume.does(&["init"]);
        let before = volume.files();
        for (name, below) in [("b", &["a"][..]), ("c", &["a", "b"]), ("d", &["a", "b", "c"])] {
            let context = format!("{fs:?} {name}");
            let done = volume.consolidates(&[name]);
            let result = &done["results"][0];
            assert_eq!(folded(&done), [(name.to_owned(), below.iter().map(ToString::to_string).collect())]);
            assert_eq!((&result["status"], &result["mode"]), (&json!("done"), &json!(mode)), "{done}");
            assert!(is_base(&volume.file(name)), "{context}");
            volume.assert_all_views(&context);
            let own = [format!("checkpoints/2/7/{name}"), Volume::member(name)];
            assert_eq!(volume.changed(&before), own, "{context}: nobody else is touched");
            let parent = below.last().copied();
            assert_eq!(before[&own[0]], checkpoint(name, parent));
            assert_eq!(fs::read(volume.checkpoint_file(name)).unwrap(), checkpoint(name, None), "{context}");
            let listed = volume.does(&["list"]);
            let chains = listed["chains"].as_array().unwrap();
            assert_eq!((chains.len(), &listed["findings"]), (2, &json!([])), "{context}: {listed}");
            assert!(!listed.to_string().contains("incoming\":\""), "{context}: {listed}");
            volume.refuses(&["consolidate", name, "--now", "--yes"], (3, "already-base"));

            let operation = result["operation"].as_str().unwrap();
            let history = volume.does(&["history"]);
            let last = history["operations"].as_array().unwrap().last().unwrap().clone();
            assert_eq!(
                (&last["operation"], &last["did"], &last["members"], &last["survivors"]),
                (&json!(operation), &json!("consolidate"), &json!([]), &json!([Volume::member(name)]))
            );
            volume.does(&["undo", operation, "--yes"]);
            assert_eq!(volume.changed(&before), Vec::<String>::new(), "{context}: undone");
        }
        volume.assert_all_views("after all");
    }
}

#[test]
fn it_reads_the_same_over_whatever_it_was_made_of() {
    // A migration of CloudStack's puts it over the parent that its row names.
    for (fs, name) in [(FsKind::Xfs, "d"), (FsKind::Ext4, "c")] {
        let volume = Volume::new(fs, FORKED);
        volume.does(&["init"]);
        volume.consolidates(&[name]);
        for below in ["a", "b", "c"].into_iter().filter(|below| *below != name) {
            let file = volume.file(name);
            must("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, text(&file)]);
            volume.assert_views(&[name], &format!("{name} over {below}"));
        }
    }
}

#[test]
fn several_at_once_each_of_its_own_and_space_is_as_announced() {
    for (fs, mode) in [(FsKind::Xfs, "clone"), (FsKind::Ext4, "copy")] {
        let volume = Volume::new(fs, CHAIN);
        volume.does(&["init"]);
        let plan = volume.does(&["consolidate", "--dry-run", "--now", "c", "f"]);
        let whole = [("c", &["a", "b"][..]), ("f", &["a", "b", "c", "d", "e"])];
        let whole =
            whole.map(|(name, below)| (name.to_owned(), below.iter().map(ToString::to_string).collect()));
        assert_eq!(folded(&plan), whole);
        let sum = |key: &str| {
            plan["plan"].as_array().unwrap().iter().map(|one| one[key].as_u64().unwrap()).sum::<u64>()
        };
        let done = volume.does(&[
            "consolidate",
            "--now",
            "--yes",
            "--mode",
            mode,
            "--grace",
            "0s",
            "--retention",
            "0s",
            "f",
            "c",
        ]);
        assert!(done["results"].as_array().unwrap().iter().all(|one| one["status"] == "done"), "{done}");
        let written = done["results"].as_array().unwrap().iter().map(|one| {
            one["bytes_written"].as_u64().unwrap() + one["metadata_bytes_written"].as_u64().unwrap()
        });
        assert_eq!(sum("bytes_to_write"), written.sum::<u64>());
        if fs == FsKind::Xfs {
            assert!(sum("bytes_to_take") < 3 << 20 && sum("bytes_to_clone") > 0, "{plan}");
        } else {
            assert!(sum("bytes_to_take") > 0 && sum("bytes_to_clone") == 0, "{plan}");
        }
        volume.assert_all_views(mode);
        let listed = volume.does(&["list"]);
        let lengths: Vec<usize> = listed["chains"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["members"].as_array().unwrap().len())
            .collect();
        assert_eq!(lengths, [2, 3, 2], "{listed}");
        // What is one tree by its records is three by its files: each can be changed further, in one call, too.
        volume.does(&[
            "delete",
            "--assume-deleted",
            "--now",
            "--yes",
            "--grace",
            "0s",
            "--retention",
            "0s",
            "a",
            "d",
            "f",
        ]);
        volume.assert_views(&["b", "c", "e", "g"], mode);
    }
}

#[test]
fn a_dry_run_or_a_rehearsal_changes_nothing() {
    let volume = Volume::new(FsKind::Xfs, FORKED);
    volume.does(&["init"]);
    let (all, before) = (listing(&volume.root()), volume.files());
    let plan = volume.does(&["consolidate", "c", "--dry-run", "--now"]);
    assert_eq!((folded(&plan).len(), &plan["results"]), (1, &json!([])), "{plan}");
    assert_eq!(listing(&volume.root()), all);
    let rehearsed = volume.does(&["consolidate", "c", "--rehearse", "--now", "--yes"]);
    assert_eq!((&rehearsed["rehearsed"], &rehearsed["results"][0]["status"]), (&json!(true), &json!("done")));
    assert!(difference(&before, &volume.files()).is_empty());
    assert_eq!(volume.does(&["history"])["operations"], json!([]));
    let said = volume.prints(&["consolidate", "c", "--dry-run", "--now"]);
    assert!(said.contains("make snapshots/2/7/c a full base") && !said.contains("merge into"), "{said}");
    volume.refuses(&["consolidate", "c", "--now"], (3, "not-confirmed"));
    volume.refuses(&["--read-only", "consolidate", "c", "--now", "--yes"], (3, "read-only"));
}

#[test]
fn what_cannot_be_a_base_is_refused() {
    let volume = Volume::new(FsKind::Xfs, FORKED);
    volume.refuses(&["consolidate", "c", "--now", "--yes"], (3, "not-initialised"));
    volume.does(&["init"]);
    let refuses = |more: &[&str], expected| {
        volume.refuses(&[&["consolidate", "--now", "--yes"], more].concat(), expected);
    };
    refuses(&["a"], (3, "already-base"));
    refuses(&["c", "--mode", "in-place"], (3, "mode-impossible"));
    refuses(&["nobody"], (4, "not-found"));
    refuses(&["c", "--rows", "print"], (2, "usage"));
    refuses(&["c", "--rows", "apply"], (2, "usage"));
    let rows = volume.export(&[
        ("a", "Ready", "2026-01-01 00:00:00"),
        ("b", "Ready", "2026-01-02 00:00:00"),
        ("c", "Copying", "2026-01-03 00:00:00"),
    ]);
    refuses(&["c", "--records", &rows], (3, "not-consolidable"));

    // What is below it, or it itself, is still being made.
    for (member, parent) in [("b", Some("a")), ("c", Some("b"))] {
        fs::remove_file(volume.checkpoint_file(member)).unwrap();
        refuses(&["c"], (5, "incoming"));
        volume.checkpoint(member, Some("another"));
        refuses(&["c"], (5, "incoming"));
        volume.checkpoint(member, parent);
    }
    fs::write(volume.checkpoint_file("c"), "<nothing/>").unwrap();
    refuses(&["c"], (3, "checkpoint-unreadable"));
    fs::write(volume.checkpoint_file("b"), "<nothing/>").unwrap();
    volume.consolidates(&["c", "--force"]);
    volume.assert_all_views("with checkpoint files that nobody can read");

    // Deleted, with a name for its readers yet; and the stand-in of one that is gone.
    volume.checkpoint("c", None);
    volume.checkpoint("b", Some("a"));
    let rows = volume.export(&[
        ("a", "Hidden", "NULL"),
        ("b", "Ready", "NULL"),
        ("e", "Ready", "NULL"),
        ("c", "Ready", "NULL"),
        ("d", "Ready", "NULL"),
    ]);
    let delete = ["delete", "a", "--records", &rows, "--now", "--yes", "--grace", "1h"];
    volume.does(&delete);
    refuses(&["a"], (3, "leaving"));
}

#[test]
fn an_undo_looks_at_what_the_old_file_stands_on() {
    let volume = Volume::new(FsKind::Xfs, CHAIN);
    volume.does(&["init"]);
    let done = volume.consolidates(&["d"]);
    let operation = done["results"][0]["operation"].as_str().unwrap();
    let delete = |member: &str, more: &[&str]| {
        let call = ["delete", member, "--assume-deleted", "--now", "--yes", "--grace", "0s"];
        let done = volume.does(&[&call[..], more].concat());
        done["results"][0]["operation"].as_str().unwrap().to_owned()
    };
    // It may stand on a member that was merged into meanwhile, as that reads the same; not on one that is gone.
    delete("b", &[]);
    let gone = delete("c", &["--end-of-chain"]);
    volume.refuses(&["undo", operation, "--yes"], (3, "not-undoable"));
    volume.does(&["undo", &gone, "--yes"]);
    volume.does(&["undo", operation, "--yes"]);
    volume.assert_views(&["a", "c", "d", "e", "f", "g"], "d over a c of another making");
    assert!(!is_base(&volume.file("d")) && !is_base(&volume.file("c")));
}

/// A configuration that limits length and age.
fn policy(volume: &Volume, length: usize, age: &str) -> String {
    volume.configure(&format!("[policy]\nmax_length = {length}\nmax_base_age = \"{age}\"\n"))
}

#[test]
fn the_policy_cuts_long_chains_in_half_until_all_obey() {
    let volume = Volume::new(FsKind::Xfs, CHAIN);
    volume.does(&["init"]);
    let config = policy(&volume, 4, "0");
    let call = ["--config", &config, "consolidate", "--now", "--yes", "--grace", "0s", "--retention", "0s"];
    // f <- g are left of seven; a <- ... <- e are five, which is too many still.
    for (member, said) in [("f", "has 7 members, more than 4"), ("d", "has 5 members, more than 4")] {
        let plan = volume.does(&["--config", &config, "consolidate", "--now", "--dry-run"]);
        assert!(plan["plan"][0]["reason"].as_str().unwrap().contains(said), "{plan}");
        let done = volume.does(&call);
        assert_eq!(folded(&done).len(), 1, "{done}");
        assert_eq!(done["results"][0]["into"], Volume::member(member).as_str());
        volume.assert_all_views(member);
    }
    let again = volume.does(&call);
    assert_eq!((&again["plan"], &again["results"]), (&json!([]), &json!([])));
    let audit = volume.does(&["--config", &config, "audit"]);
    assert_eq!(audit["findings"], json!([]));
    assert!(volume.prints(&["consolidate", "--dry-run", "--now"]).contains("as the policy wants it"));
}

#[test]
fn the_policy_gives_old_bases_successors_and_leaves_old_chains_alone() {
    let volume = Volume::new(FsKind::Xfs, FORKED);
    volume.does(&["init"]);
    let days = |days: u64| {
        let time = std::time::SystemTime::now() - std::time::Duration::from_hours(24 * days);
        humantime::format_rfc3339_seconds(time).to_string().replace('T', " ").replace('Z', "")
    };
    let rows = |ages: [u64; 5]| {
        let ages = ages.map(days);
        let row = |index: usize| (["a", "b", "c", "d", "e"][index], "Ready", ages[index].as_str());
        volume.export(&[row(0), row(1), row(2), row(3), row(4)])
    };
    let config = policy(&volume, 0, "30days");
    let chosen = |ages: [u64; 5]| {
        let rows = rows(ages);
        let plan =
            volume.does(&["--config", &config, "consolidate", "--records", &rows, "--now", "--dry-run"]);
        folded(&plan).into_iter().map(|(name, _)| name).collect::<Vec<_>>()
    };
    assert_eq!(chosen([29, 20, 10, 5, 5]), Vec::<String>::new(), "young enough");
    assert_eq!(chosen([31, 14, 10, 5, 5]), ["b"], "one for both branches");
    assert_eq!(chosen([40, 35, 14, 10, 20]), ["c", "e"], "the newest where none is young");
    assert_eq!(chosen([90, 80, 70, 60, 50]), Vec::<String>::new(), "nobody builds on it any more");
    let done = volume.does(&[
        "--config",
        &config,
        "consolidate",
        "--records",
        &rows([31, 14, 10, 5, 5]),
        "--now",
        "--yes",
    ]);
    assert!(done["plan"][0]["reason"].as_str().unwrap().contains("31 days old"), "{done}");
    volume.assert_all_views("a new base");
    assert_eq!(chosen([31, 14, 10, 5, 5]), Vec::<String>::new());
}
