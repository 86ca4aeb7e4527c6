//! What was decided in a tree and may not be carried out yet: nothing is built on a tree in such a state, and
//! nothing goes from it.
//!
//! The stores do not show all of it: a member that an undo is about to bring back is in trash, where nobody
//! looks for readers.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::change::decided::Decided;
use crate::change::error::{ChangeError, Result};
use crate::change::in_place;
use crate::change::journal::{Found, Journal};
use crate::change::operation::take_back;
use crate::change::places::IntentName;
use crate::change::record::{Decision, OperationId, TreeId};
use crate::change::site::Site;

/// The number of the next operation of a tree whose lease the caller holds: the one after the last that was
/// claimed, so that of all who begin from one state of the tree only one can decide. Who has announced himself
/// and not decided is dead, or was stopped for so long that he lost the lease: his number is claimed for
/// nothing. `undoes` is an operation that is to be taken back, which may be anywhere; those that were `begun` by
/// this process from the same state are about other members, and have their numbers.
///
/// # Errors
///
/// [`ChangeError::Busy`] if something was decided in the tree that this process has not seen through: after it
/// looked at the stores, or such as could not be carried out.
pub fn next_number(
    site: &Site<'_>,
    home: usize,
    tree: &TreeId,
    undoes: Option<&OperationId>,
    begun: &[IntentName],
) -> Result<u64> {
    let own = begun.iter().filter(|name| name.tree == *tree).map(|name| name.generation).max().unwrap_or(0);
    let journal = Journal::new(site.stores.get(home)?.backend());
    loop {
        // Before the intents: what is decided after this look takes the number.
        let used = journal.generations(tree)?.last().copied().unwrap_or(0);
        let mut dead = false;
        for name in journal.intents()?.iter().filter(|name| name.tree == *tree) {
            let is_undone = undoes == Some(&name.operation);
            if is_undone || begun.contains(name) || site.is_settled(&name.operation) {
                continue;
            }
            match journal.claim(tree, name.generation)? {
                Found::Nothing | Found::Torn(_) => {
                    take_back(site, home, name)?;
                    dead = true;
                }
                Found::Record(claim)
                    if claim.operation == name.operation && claim.decision != Decision::Abort =>
                {
                    let owner = format!("operation {}, decided meanwhile or not over", name.operation);
                    return Err(ChangeError::Busy { owner });
                }
                Found::Record(_) => {}
            }
        }
        if !dead {
            return Ok(used.max(own) + 1);
        }
    }
}

/// Carries out what was decided after these operations in their trees, and not by this process just now.
pub fn carry_out_later(site: &Site<'_>, operations: &[&Decided<'_>]) -> Result<()> {
    let mut intents: BTreeMap<usize, Vec<IntentName>> = BTreeMap::new();
    let begun = site.begun().clone();
    for decided in operations {
        let open = match intents.entry(decided.home) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(place) => place.insert(decided.journal()?.intents()?),
        };
        let own = decided.name();
        let later = open.iter().filter(|name| name.tree == own.tree && name.generation > own.generation);
        for name in later.filter(|name| !site.is_settled(&name.operation) && !begun.contains(name)) {
            carry_out(site, decided.home, name)?;
        }
    }
    Ok(())
}

fn carry_out(site: &Site<'_>, home: usize, name: &IntentName) -> Result<()> {
    let journal = Journal::new(site.stores.get(home)?.backend());
    if let Found::Record(claim) = journal.claim(&name.tree, name.generation)?
        && claim.operation == name.operation
        && let Some(decided) = Decided::new(site, home, name.clone(), claim, None)
        && !decided.is_undone()?
    {
        in_place::take_over(site, &decided)?;
        decided.publish()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::next_number;
    use crate::backend::Backend;
    use crate::backend::memory::MemoryStore;
    use crate::change::error::ChangeError;
    use crate::change::operation::Operation;
    use crate::change::record::{Purpose, TreeId};
    use crate::change::trial::{commit, on, opted_in, place};

    /// It may have begun several side by side, and was only stopped: what it planned stands on what was.
    #[test]
    fn who_was_taken_for_dead_can_decide_nothing_any_more() {
        let backend = opted_in(MemoryStore::new()) as Arc<dyn Backend>;
        let tree = TreeId::of(1);
        on(&backend, |stopped| {
            let announce = |number| {
                Operation::announce(stopped, 0, (tree.clone(), number), vec![place("m")], None).unwrap()
            };
            let begun = [announce(1), announce(2)];
            let number = on(&backend, |other| next_number(other, 0, &tree, None, &[])).unwrap();
            assert_eq!(number, 3);
            for operation in begun {
                let decided = operation.decide(commit(Purpose::Delete, Vec::new()), &[]);
                assert!(matches!(decided, Err(ChangeError::Decided { .. })), "{:?}", decided.err());
            }
        });
    }
}
