//! Chains against the policy of the configuration.

use super::AuditFinding;
use super::ground::Ground;
use super::totals::is_chain;
use crate::chain::graph::{NodeId, Tree};
use crate::failure::Code;
use crate::ops::policy::created_ns;

pub fn check(ground: &Ground<'_>) -> Vec<AuditFinding> {
    let trees = ground.scan.graph.trees().iter();
    trees.filter(|tree| is_chain(ground, tree)).flat_map(|tree| of_tree(ground, tree)).collect()
}

fn of_tree(ground: &Ground<'_>, tree: &Tree) -> Vec<AuditFinding> {
    let policy = &ground.options.policy;
    let mut found = Vec::new();
    let Some(base) = tree.members.first().copied() else { return found };
    if let Some((tip, length)) = longest(ground, tree)
        && policy.max_length > 0
        && length > policy.max_length
    {
        let message = format!(
            "with it the chain of {} has {length} members, more than {}",
            ground.name(base),
            policy.max_length
        );
        found.push(AuditFinding { code: Code::ChainTooLong, member: ground.name(tip), message, bytes: None });
    }
    let limit = i128::try_from(policy.max_base_age.as_nanos()).unwrap_or(i128::MAX);
    // Alone it holds nobody up.
    let is_base = tree.members.len() > 1 && ground.scan.graph.complete(base).is_ok();
    if let Some(age) = age_ns(ground, base).filter(|age| limit > 0 && is_base && *age > limit) {
        let days = age / 86_400_000_000_000;
        let message = format!("the full base of {} members is {days} days old", tree.members.len());
        found.push(ground.of_member(base, Code::BaseTooOld, message));
    }
    let held: u64 = tree.members.iter().map(|id| ground.held_bytes(*id)).sum();
    if policy.max_pinned_bytes > 0 && held > policy.max_pinned_bytes {
        let message =
            format!("deleted members of its chain hold {held} bytes, more than {}", policy.max_pinned_bytes);
        let (code, member, bytes) = (Code::PinnedBytes, ground.name(base), Some(held));
        found.push(AuditFinding { code, member, message, bytes });
    }
    found
}

/// The member with most below it, and how many the chain then has; stubs that nobody reads through do not count.
fn longest(ground: &Ground<'_>, tree: &Tree) -> Option<(NodeId, usize)> {
    let counted = tree.members.iter().filter(|id| !ground.scan.is_idle_stub(**id) && !ground.leaves(**id));
    let lengths = counted.filter_map(|id| Some((*id, ground.scan.graph.depth(*id)? + 1)));
    // The first of those with the most, whatever the order of equals.
    lengths.reduce(|most, next| if next.1 > most.1 { next } else { most })
}

/// How old a member is.
fn age_ns(ground: &Ground<'_>, id: NodeId) -> Option<i128> {
    Some(ground.options.now_ns - created_ns(ground.row(id), ground.scan.member(id)?))
}
