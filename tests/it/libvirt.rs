//! Real libvirt and QEMU go on with their increments after merges, as CloudStack drives them.

use std::fs;

use super::support::agent::Agent;

/// A machine of which so many snapshots were taken, with writes that overlap.
fn with_snapshots(count: usize) -> Agent {
    let mut agent = Agent::start();
    for number in 1..=count {
        grow(&mut agent, number);
    }
    agent
}

/// Writes something of its own, part of it over what was there, and takes a snapshot.
fn grow(agent: &mut Agent, number: usize) -> String {
    let writes = [
        format!("write -P {number} {}M 3M", number % 8),
        format!("write -P {} {}k 4k", 100 + number, number * 96 + 8),
        format!("write -z {}M 192k", (number + 3) % 14),
    ];
    agent.writes(&writes.each_ref().map(String::as_str));
    agent.snapshot()
}

#[test]
fn the_next_increment_follows_on_a_merge() {
    let mut agent = with_snapshots(5);
    agent.is_true();
    // The base, one in the middle, and the parent of the newest.
    for (round, which) in [0, 1, usize::MAX].into_iter().enumerate() {
        let at = which.min(agent.snapshots.len() - 2);
        let (deleted, child) = (agent.snapshots[at].clone(), agent.snapshots[at + 1].clone());
        let stale = fs::read_to_string(agent.checkpoint(&child)).unwrap();
        agent.forget();
        agent.delete(&deleted);
        agent.is_true();

        // As it was before, libvirt would not have it: without the edit there is no next increment.
        let said = agent.refused(&stale);
        assert!(said.contains(&format!("parent {deleted} for moment {child} not found")), "{said}");
        agent.redefine();
        grow(&mut agent, 6 + round);
        agent.is_true();
    }
    assert_eq!(agent.snapshots.len(), 5);
}

#[test]
fn and_on_a_merge_while_libvirt_knows_the_checkpoints() {
    let mut agent = with_snapshots(3);
    let deleted = agent.snapshots[1].clone();
    agent.delete(&deleted);
    // libvirt still knows the deleted one, and tracks on: nobody told it.
    grow(&mut agent, 4);
    agent.is_true();
    agent.forget();
    agent.redefine();
    grow(&mut agent, 5);
    agent.is_true();
}

#[test]
fn and_on_members_that_became_bases() {
    let mut agent = with_snapshots(4);
    // One in the middle, and the newest, while libvirt knows the old parents; then again after it has forgotten all.
    for at in [1, 3, 4] {
        let base = agent.snapshots[at].clone();
        agent.consolidate(&base);
        agent.is_true();
        grow(&mut agent, 5 + 2 * at);
        agent.forget();
        agent.redefine();
        grow(&mut agent, 6 + 2 * at);
        agent.is_true();
    }
    // The first base goes, as any: into the one above it.
    agent.forget();
    let base = agent.snapshots[1].clone();
    agent.delete(&base);
    agent.redefine();
    grow(&mut agent, 20);
    agent.is_true();
}

#[test]
fn and_after_detach_and_attach_and_a_cold_migration() {
    let mut agent = with_snapshots(4);
    agent.detach();
    let middle = agent.snapshots[1].clone();
    agent.delete(&middle);
    agent.attach("sdb");
    grow(&mut agent, 5);
    agent.is_true();

    let base = agent.snapshots[0].clone();
    agent.delete(&base);
    agent.stop_machine();
    agent.migrate();
    agent.start_machine();
    agent.redefine();
    grow(&mut agent, 6);
    agent.is_true();

    agent.stop_machine();
    let parent = agent.snapshots[agent.snapshots.len() - 2].clone();
    agent.delete(&parent);
    agent.start_machine();
    agent.redefine();
    grow(&mut agent, 7);
    agent.is_true();
}
