//! The rules of the protocol that stand between an operation and a late or dead instance, somebody else's hand, or another operation: one
//! a test, each with the other at every call at which it could come.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use qchain::backend::faulty::{Call, Faulty, Lasting};
use qchain::backend::memory::MemoryStore;
use qchain::backend::{Backend, LockKind};
use qchain::change::recover::Action;
use qchain::ops::delete::{ModeChoice, Terms};
use qchain::store::record::own;

use super::support::small::{CheckpointFile, KEPT, SECOND, Small, delete_at, kinds};

const EIO: i32 = 5;

/// Calls `play` with 0, 1, 2 and so on, until it says that there is no such call.
fn at_each_call(mut play: impl FnMut(u64) -> bool) {
    let mut met = 0;
    while play(met) {
        met += 1;
    }
    assert!(met > 5, "only {met} calls were met");
}

/// Right before a mutating call of one instance another one does something; gives what that gave.
fn meanwhile<T: Send + Sync + 'static>(
    small: &Small,
    faulty: &Faulty,
    call: u64,
    act: impl FnOnce(&Small) -> T + Send + 'static,
) -> Arc<OnceLock<T>> {
    let gave = Arc::new(OnceLock::new());
    let (note, other) = (Arc::clone(&gave), small.clone());
    faulty.before_mutation(call, move || assert!(note.set(act(&other)).is_ok()));
    gave
}

/// The first mutating call, from that one on, that takes a member's name.
fn takes(faulty: &Faulty, from: u64, name: &str) -> Option<Call> {
    let later = |made: &Call| made.mutation.is_some_and(|number| number >= from);
    let member = Small::member(name);
    faulty.trace().into_iter().find(|made| later(made) && made.from.as_ref() == Some(&member))
}

/// The mutating call that switches a member's file over: the last that writes into it.
fn switches(faulty: &Faulty, name: &str) -> Option<u64> {
    let written = |made: &Call| made.name == "write_at" && made.path == Small::member(name);
    faulty.trace().into_iter().rfind(written).and_then(|made| made.mutation)
}

/// Which member is deleted.
#[derive(Clone, Copy, Debug)]
enum Deleted {
    /// One that others stand on.
    Middle,
    /// One that nobody would miss.
    Leaf,
    /// The same, and nothing goes with it.
    LeafAlone,
}

const DELETED: [Deleted; 3] = [Deleted::Middle, Deleted::Leaf, Deleted::LeafAlone];

impl Deleted {
    fn on(self, store: MemoryStore) -> (Small, &'static str) {
        let small = Small::new(store, 0);
        match self {
            Self::Middle => (small, "m1"),
            Self::Leaf => (small, "m3"),
            Self::LeafAlone => {
                small.forget_checkpoints();
                (small, "m3")
            }
        }
    }
}

#[test]
fn what_was_undone_stays_so_when_the_one_who_did_it_goes_on() {
    for ((kind, store), deleted) in kinds().into_iter().flat_map(|kind| DELETED.map(|one| (kind, one))) {
        at_each_call(|call| {
            let (small, member) = deleted.on(store());
            let before = ["m1", "m2", "m3"].map(|name| small.checkpoint(name));
            let context = format!("{kind}, {deleted:?}, {call}");
            let faulty = small.faulty();
            let gave = meanwhile(&small, &faulty, call, |small| {
                small.recover().unwrap();
                small.undo_on(small.calm()).is_some_and(|undone| undone.is_ok())
            });
            let _ = small.delete(faulty.clone(), &[member], ModeChoice::Copy, KEPT);
            let undone = gave.get() == Some(&true);
            if undone {
                // Too late, it does not begin with it: it takes back what it was about to do.
                assert!(small.is_there(member), "{context}");
                assert_eq!(takes(&faulty, call + 1, member), None, "{context}");
            }
            small.recover().unwrap();
            small.check(&["m0", "m2"], &context);
            if undone {
                small.check(&["m1", "m3"], &context);
                assert_eq!(["m1", "m2", "m3"].map(|name| small.checkpoint(name)), before, "{context}");
            }
            gave.get().is_some()
        });
    }
}

#[test]
fn what_was_undone_stays_so_when_its_grace_ends_for_a_late_one() {
    for ((kind, store), deleted) in kinds().into_iter().flat_map(|kind| DELETED.map(|one| (kind, one))) {
        at_each_call(|call| {
            let (small, member) = deleted.on(store());
            let before = ["m1", "m2", "m3"].map(|name| small.checkpoint(name));
            let context = format!("{kind}, {deleted:?}, {call}");
            let terms = Terms { grace_ns: 10 * SECOND, ..KEPT };
            small.delete_well(&[member], ModeChoice::Copy, terms);
            small.passes(20);
            let faulty = small.faulty();
            let gave = meanwhile(&small, &faulty, call, |small| {
                small.undo_on(small.calm()).is_some_and(|undone| undone.is_ok())
            });
            let _ = small.recover_on(faulty.clone());
            if gave.get() == Some(&true) {
                assert!(small.is_there(member), "{context}");
                assert_eq!(takes(&faulty, call + 1, member), None, "{context}");
                small.recover().unwrap();
                small.check(&["m1", "m3"], &context);
                assert_eq!(["m1", "m2", "m3"].map(|name| small.checkpoint(name)), before, "{context}");
            }
            small.recover().unwrap();
            small.check(&["m0", "m2"], &context);
            gave.get().is_some()
        });
    }
}

#[test]
fn a_member_that_got_a_reader_never_goes() {
    let small = Small::new(kinds()[0].1(), 0);
    small.delete_well(&["m1"], ModeChoice::Copy, Terms { grace_ns: 10 * SECOND, ..KEPT });
    small.add_child("n0", "m1");
    small.passes(20);
    let faulty = small.faulty();
    small.recover_on(faulty.clone()).unwrap();
    small.check(&["m0", "m1", "m2", "m3", "n0"], "it has a reader");
    assert!(faulty.mutations() > 0);
    assert_eq!(takes(&faulty, 0, "m1"), None, "not for a moment");
}

#[test]
fn what_another_was_built_on_is_not_undone() {
    let small = Small::new(kinds()[0].1(), 0);
    small.delete_well(&["m1"], ModeChoice::Copy, KEPT);
    small.delete_well(&["m2"], ModeChoice::Copy, KEPT);
    let refused = small.undo_on(small.calm()).unwrap().unwrap_err();
    assert!(refused.to_string().contains("builds on it"), "{refused}");
    small.check(&["m0", "m3"], "refused");
    assert!(!small.is_there("m1") && !small.is_there("m2"));
}

#[test]
fn what_is_not_merged_in_place_is_not_deleted() {
    let mut left = 0;
    at_each_call(|call| {
        let (small, context) = (Small::new(kinds()[0].1(), 0), format!("{call}"));
        let faulty = small.faulty();
        // Decided, and not made yet: then its owner removes what it was to be merged into.
        let gave = meanwhile(&small, &faulty, call, |small| {
            let decided = !small.history().is_empty() && small.own("tmp", ".0.image").is_none();
            small.memory.remove_file(&Small::member("m3")).is_ok() && decided && small.shows("m2").is_ok()
        });
        let terms = Terms { retention_ns: 0, ..KEPT };
        let _ = small.delete(faulty.clone(), &["m2"], ModeChoice::InPlace, terms);
        small.recover().unwrap();
        // Between the last look and the switch nobody can notice it.
        if gave.get() == Some(&true) && switches(&faulty, "m2") != Some(call) {
            left += 1;
            small.check(&["m2"], &context);
        }
        small.nobody_reads("m2");
        small.check(&["m0", "m1"], &context);
        gave.get().is_some()
    });
    assert!(left > 2, "{left}");
}

#[test]
fn what_was_merged_in_place_is_published_whatever_becomes_of_the_deleted() {
    let [linking @ .., _, _] = kinds();
    for (kind, store) in linking {
        let merged = Small::new(store(), 0);
        let faulty = merged.faulty();
        let terms = || Terms { retention_ns: 0, ..KEPT };
        merged.delete(faulty.clone(), &["m1", "m2"], ModeChoice::InPlace, terms()).unwrap();
        let switch = switches(&faulty, "m1").unwrap();
        let mut saved = 0;
        for (dies, removes) in (switch + 1..faulty.mutations()).flat_map(|dies| [(dies, true), (dies, false)])
        {
            let (small, context) = (Small::new(store(), 0), format!("{kind}, {dies}, removes: {removes}"));
            let faulty = small.faulty();
            faulty.fail_at(dies, EIO, Lasting::Dead);
            let _ = small.delete(faulty, &["m1", "m2"], ModeChoice::InPlace, terms());
            let unpublished = small.backing("m3").as_deref() == Some("m2");
            if small.is_there("m2") && removes {
                small.memory.remove_file(&Small::member("m2")).unwrap();
            } else if small.is_there("m2") {
                small.rebase("m2", "m0");
            }
            small.nobody_reads("m1");
            small.nobody_reads("m2");
            small.recover().unwrap();
            small.check(&["m0", "m3"], &context);
            assert_eq!(small.backing("m3").as_deref(), Some("m0"), "{context}");
            saved += u32::from(unpublished);
        }
        assert!(saved > 2, "{kind}: {saved}");
    }
}

#[test]
fn what_is_decided_is_done_whatever_the_power_takes() {
    for (mode, stubs) in [(ModeChoice::Copy, false), (ModeChoice::Copy, true), (ModeChoice::InPlace, false)] {
        let mut decided = 0;
        at_each_call(|call| {
            let (small, context) = (Small::new(kinds()[0].1(), 0), format!("{mode:?}, {stubs}, {call}"));
            let faulty = small.faulty();
            faulty.fail_at(call, EIO, Lasting::Dead);
            let _ = small.delete(faulty.clone(), &["m1"], mode, Terms { retention_ns: 0, stubs, ..KEPT });
            // All that was not made durable is gone.
            small.memory.crash();
            let begun = !small.history().is_empty();
            small.recover().unwrap();
            if begun {
                decided += 1;
                let backing = small.backing("m2");
                assert_eq!(backing.as_deref(), Some("m0"), "{context}: it was decided, and not done");
            }
            small.nobody_reads("m1");
            small.check(&["m0", "m2", "m3"], &context);
            faulty.mutations() > call
        });
        assert!(decided > 3, "{mode:?}, {stubs}: {decided}");
    }
}

#[test]
fn a_survivor_keeps_its_owner_whatever_the_power_takes() {
    for mode in [ModeChoice::Copy, ModeChoice::InPlace] {
        at_each_call(|call| {
            let (small, context) = (Small::new(kinds()[0].1(), 0), format!("{mode:?}, {call}"));
            small.give_to("m2", 107);
            let others = small.owner("m3");
            let faulty = small.faulty();
            faulty.fail_at(call, EIO, Lasting::Dead);
            let _ = small.delete(faulty.clone(), &["m1"], mode, Terms { retention_ns: 0, ..KEPT });
            small.memory.crash();
            // And once more, right after the recovery.
            for _ in 0..2 {
                small.recover().unwrap();
                small.memory.crash();
                assert_eq!((small.owner("m2"), small.owner("m3")), ((107, 0o640), others), "{context}");
            }
            faulty.mutations() > call
        });
    }
}

#[test]
fn an_undo_that_died_finds_what_it_reads_through() {
    let mut back = 0;
    let mut ended = false;
    for dies in 0.. {
        let small = Small::new(kinds()[0].1(), 1);
        // A leaf over m1; then m1, for which nobody has to be merged but m2.
        small.delete_well(&["m3"], ModeChoice::Copy, Terms { retention_ns: 100 * 3600 * SECOND, ..KEPT });
        small.delete_well(&["m1"], ModeChoice::Copy, Terms { grace_ns: 60 * SECOND, ..KEPT });
        let faulty = small.faulty();
        faulty.fail_at(dies, EIO, Lasting::Dead);
        ended |= small.undo_on(faulty).unwrap().is_ok();
        small.passes(2 * 3600);
        small.recover().unwrap();
        small.recover().unwrap();
        small.check(&["m0", "m2", "m4"], &dies.to_string());
        back += u32::from(small.is_there("m3"));
        if ended {
            break;
        }
    }
    assert!(back > 1, "it came back {back} times");
}

#[test]
fn members_that_go_in_each_other_s_grace_take_their_checkpoint_files() {
    let small = Small::new(kinds()[0].1(), 0);
    small.delete_well(&["m2"], ModeChoice::Copy, Terms { grace_ns: 60 * SECOND, ..KEPT });
    // It stays as long as m2 has its name.
    let _ = small.delete(small.calm(), &["m1"], ModeChoice::Copy, KEPT);
    small.passes(100);
    small.recover().unwrap();
    small.recover().unwrap();
    small.check(&["m0", "m3"], "after the grace");
    for name in ["m1", "m2"] {
        assert_eq!((small.is_there(name), small.checkpoint(name)), (false, CheckpointFile::Gone), "{name}");
    }
    assert_eq!(small.checkpoint("m3"), CheckpointFile::over("m0"));
}

#[test]
fn nothing_comes_back_over_what_is_lost() {
    for (kind, store) in kinds() {
        at_each_call(|call| {
            let (small, context) = (Small::new(store(), 0), format!("{kind}, {call}"));
            small.delete_well(&["m1"], ModeChoice::Copy, KEPT);
            let faulty = small.faulty();
            // As an instance does that was stopped in the middle of a purge, or a person who needs the space.
            let gave = meanwhile(&small, &faulty, call, |small| {
                if let Some(kept) = small.own("trash", ".member") {
                    small.memory.remove_file(&kept).unwrap();
                }
            });
            let _ = small.undo_on(faulty);
            small.recover().unwrap();
            small.check(&["m0", "m2", "m3"], &context);
            gave.get().is_some()
        });
    }
}

#[test]
fn two_instances_never_merge_into_one_file() {
    let small = Small::new(kinds()[0].1(), 0);
    let inode = small.memory.stat(&Small::member("m1")).unwrap().id.inode;
    let lock = own(&["locks", &format!("in-place-{inode}")]);
    let held = small.memory.try_lock(&lock, LockKind::Exclusive).unwrap().unwrap();
    let terms = Terms { retention_ns: 0, ..KEPT };
    let report = small.delete(small.calm(), &["m1"], ModeChoice::InPlace, terms);
    let refusal = match &report {
        Ok(report) => report.first_failure().map(ToString::to_string),
        Err(error) => Some(error.to_string()),
    };
    assert!(refusal.as_ref().is_some_and(|text| text.contains("merging into")), "{refusal:?}");
    small.check(&["m0", "m1", "m2", "m3"], "while another one merges");
    drop(held);
    small.recover().unwrap();
    small.check(&["m0", "m2", "m3"], "afterwards");
    assert!(!small.is_there("m1"));
}

#[test]
fn space_is_given_back_only_after_those_who_know_the_file() {
    let small = Small::new(kinds()[0].1(), 0);
    let terms = |grace: i64| Terms { grace_ns: grace * SECOND, retention_ns: 10 * SECOND, ..KEPT };
    small.delete_well(&["m1"], ModeChoice::InPlace, terms(0));
    small.delete_well(&["m2"], ModeChoice::Copy, terms(100));
    small.passes(50);
    small.recover().unwrap();
    small.check(&["m0", "m2", "m3"], "in the grace");
    small.passes(200);
    small.recover().unwrap();
    small.recover().unwrap();
    small.check(&["m0", "m3"], "after it");
    assert!(!small.is_there("m2"), "its file is not the one that was deleted any more");
    assert_eq!(small.own("intents", ""), None, "all is over");
}

#[test]
fn what_somebody_wrote_into_trash_stays() {
    let small = Small::new(kinds()[0].1(), 0);
    small.delete_well(&["m2"], ModeChoice::Copy, Terms { retention_ns: 10 * SECOND, ..KEPT });
    let kept = small.own("trash", ".image").unwrap();
    small.memory.open_writable(&kept).unwrap().write_at(600, b"written by others").unwrap();
    // Its name is nobody's any more, so it cannot come back.
    small.memory.remove_file(&Small::member("m3")).unwrap();
    small.passes(20);
    for _ in 0..2 {
        let recovered = small.recover().unwrap();
        assert!(matches!(&recovered[..], [one] if matches!(one.action, Action::Stuck(_))), "{recovered:?}");
        assert!(small.memory.stat(&kept).is_ok(), "{kept} is gone");
    }
    small.check(&["m0", "m1"], "stuck");
}

#[test]
fn a_tree_that_loses_its_root_is_the_same_tree() {
    let small = Small::new(kinds()[0].1(), 0);
    small.on(small.calm(), |site| {
        for name in ["m0", "m1"] {
            let report = delete_at(site, &[name], ModeChoice::Copy, KEPT).unwrap();
            assert!(report.first_failure().is_none(), "{name}");
        }
    });
    let trees: BTreeSet<_> = small.history().into_iter().map(|done| done.tree).collect();
    assert_eq!(trees.len(), 1, "{trees:?}");
    small.check(&["m2", "m3"], "without its root");
}

#[test]
fn who_comes_as_a_member_goes_is_whole_after_the_next_recovery() {
    at_each_call(|call| {
        let mut met = false;
        for later in 1..6 {
            let (small, context) = (Small::new(kinds()[0].1(), 0), format!("{call}, {later} later"));
            let faulty = small.faulty();
            let gave = meanwhile(&small, &faulty, call, |small| {
                let there = small.is_there("m1");
                if there {
                    small.add_child("n0", "m1");
                }
                there
            });
            faulty.fail_at(call + later, EIO, Lasting::Dead);
            let _ = small.delete(faulty, &["m1"], ModeChoice::Copy, KEPT);
            small.recover().unwrap();
            small.check(&["m0", "m2", "m3"], &context);
            met |= gave.get().is_some();
        }
        met
    });
}

#[test]
fn a_checkpoint_file_comes_back_with_its_member() {
    let small = Small::new(kinds()[0].1(), 0);
    small.delete_well(&["m1"], ModeChoice::Copy, KEPT);
    assert_eq!((small.is_there("m1"), small.checkpoint("m1")), (false, CheckpointFile::Gone));
    // A power cut brings one name back and not the other, and somebody comes to read through it.
    let kept = small.own("trash", ".member").unwrap();
    small.memory.rename(&kept, &Small::member("m1")).unwrap();
    small.add_child("n0", "m1");
    small.recover().unwrap();
    small.check(&["m0", "m1", "m2", "m3", "n0"], "it has a reader");
    assert_eq!(small.checkpoint("m1"), CheckpointFile::over("m0"));
}

/// How others write into a survivor, on which kind of store, in which mode.
struct Write {
    way: String,
    store: fn() -> MemoryStore,
    mode: ModeChoice,
    act: fn(&Small),
}

fn writes() -> Vec<Write> {
    let mut ways = Vec::new();
    // Where a file can have one name only, and names cannot be exchanged, nobody sees what is written at the moment of the rename.
    for (kind, store) in &kinds()[..3] {
        for mode in [ModeChoice::Copy, ModeChoice::InPlace] {
            if mode == ModeChoice::InPlace && *kind == "exchange" {
                continue;
            }
            let way = format!("{kind}, {mode:?}, data");
            ways.push(Write { way, store: *store, mode, act: |small| small.write_into("m3") });
            // As `qemu-img rebase -u` does it.
            let way = format!("{kind}, {mode:?}, name");
            ways.push(Write { way, store: *store, mode, act: |small| small.rebase("m3", "m1") });
        }
    }
    ways
}

/// A small store on which m2 is to be deleted that way.
fn written(store: fn() -> MemoryStore, mode: ModeChoice) -> Small {
    let small = Small::new(store(), 0);
    if mode == ModeChoice::InPlace {
        // What it shows ends before its name does.
        small.nobody_reads("m2");
    }
    small
}

#[test]
fn what_others_write_into_a_survivor_is_not_lost() {
    for Write { way, store, mode, act } in writes() {
        at_each_call(|call| {
            let small = written(store, mode);
            let faulty = small.faulty();
            let (acted, other) = (Arc::new(OnceLock::new()), small.clone());
            let note = Arc::clone(&acted);
            faulty.before(call, move || {
                act(&other);
                note.set(()).unwrap();
            });
            let _ = small.delete(faulty, &["m2"], mode, Terms { retention_ns: 0, ..KEPT });
            small.recover().unwrap();
            small.check(&["m0", "m1", "m3"], &format!("{way}, {call}"));
            acted.get().is_some()
        });
    }
}

#[test]
fn what_others_write_into_a_survivor_is_not_lost_when_nobody_looks_any_more() {
    for Write { way, store, mode, act } in writes() {
        at_each_call(|call| {
            let mut met = false;
            for later in 1..4 {
                let small = written(store, mode);
                let faulty = small.faulty();
                let gave = meanwhile(&small, &faulty, call, act);
                faulty.fail_at(call + later, EIO, Lasting::Dead);
                let _ = small.delete(faulty, &["m2"], mode, Terms { retention_ns: 0, ..KEPT });
                small.recover().unwrap();
                small.recover().unwrap();
                small.check(&["m0", "m1", "m3"], &format!("{way}, {call}, {later} later"));
                met |= gave.get().is_some();
            }
            met
        });
    }
}

#[test]
fn what_would_read_a_merged_file_does_not_come_back() {
    let small = Small::new(kinds()[0].1(), 1);
    small.delete_well(&["m3"], ModeChoice::Copy, KEPT);
    let terms = Terms { grace_ns: 3600 * SECOND, ..KEPT };
    small.delete_well(&["m1"], ModeChoice::InPlace, terms);
    // It has its name for its grace, and shows what m2 does.
    small.nobody_reads("m1");
    small.check(&["m0", "m1", "m2", "m4"], "merged");
    let refused = small.undo_on(small.calm()).unwrap().unwrap_err();
    assert!(refused.to_string().contains("was deleted since"), "{refused}");
    small.check(&["m0", "m1", "m2", "m4"], "refused");
    assert!(!small.is_there("m3"));
}
