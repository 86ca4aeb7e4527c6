//! Graphs built by hand, large ones, and random ones against plain walks.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{ChainError, Graph, GraphError, Key, Node, NodeId, Parent};
use crate::failure::{Code, Failure};
use crate::ids::StorePath;

fn key(name: &str) -> Key {
    Key { store: 0, path: StorePath::parse(name).unwrap() }
}

/// A graph from `(name, parent index)`.
fn graph(nodes: &[(&str, Option<usize>)]) -> Graph {
    Graph::new(
        nodes
            .iter()
            .map(|(name, parent)| Node {
                key: key(name),
                parent: parent.map_or(Parent::None, |index| Parent::Node(NodeId(index))),
            })
            .collect(),
    )
    .unwrap()
}

fn ids(list: &[usize]) -> Vec<NodeId> {
    list.iter().copied().map(NodeId).collect()
}

#[test]
fn trees_are_base_first_and_sorted() {
    // d <- b <- {a, c}, and x <- y listed child first.
    let graph =
        graph(&[("a", Some(2)), ("c", Some(2)), ("b", Some(3)), ("d", None), ("y", Some(5)), ("x", None)]);
    let trees: Vec<_> = graph.trees().iter().map(|tree| tree.members.clone()).collect();
    assert_eq!(trees, [ids(&[3, 2, 0, 1]), ids(&[5, 4])]);
    assert_eq!(graph.tree_of(NodeId(1)), 0);
    assert_eq!(graph.tree_of(NodeId(4)), 1);
    assert_eq!(graph.tips(0).collect::<Vec<_>>(), ids(&[0, 1]));
    assert_eq!(graph.tips(7).count(), 0);
    assert_eq!(graph.children(NodeId(2)), ids(&[0, 1]));
    assert_eq!(graph.ancestors(NodeId(0)).unwrap(), ids(&[2, 3]));
    assert_eq!(graph.chain(NodeId(0)).unwrap(), ids(&[3, 2, 0]));
    assert_eq!(graph.depth(NodeId(0)), Some(2));
    assert_eq!(graph.find(&key("y")), Some(NodeId(4)));
    assert_eq!(graph.find(&key("z")), None);
    assert!(graph.is_tip(NodeId(4)) && !graph.is_tip(NodeId(5)));
    assert_eq!(graph.len(), 6);
}

#[test]
fn siblings_stay_with_what_is_above_them() {
    let graph = graph(&[("r", None), ("s", Some(0)), ("t", Some(0)), ("u", Some(1)), ("v", Some(2))]);
    assert_eq!(graph.trees()[0].members, ids(&[0, 1, 3, 2, 4]));
}

#[test]
fn a_cycle_is_found_and_what_hangs_off_it() {
    // c -> b -> a -> c, and d above b; e on itself; f is a base.
    let graph =
        graph(&[("c", Some(1)), ("b", Some(2)), ("a", Some(0)), ("d", Some(1)), ("e", Some(4)), ("f", None)]);
    assert_eq!(graph.trees().len(), 3);
    assert_eq!(graph.trees()[0].members, ids(&[2, 1, 0, 3]));
    assert!(graph.trees()[0].cyclic && graph.trees()[1].cyclic && !graph.trees()[2].cyclic);
    assert_eq!(
        graph.ids().map(|id| graph.on_cycle(id)).collect::<Vec<_>>(),
        [true, true, true, false, true, false]
    );
    let error = graph.ancestors(NodeId(3)).unwrap_err();
    assert_eq!(error, ChainError::Cycle { member: key("d") });
    assert_eq!((error.code(), error.member()), (Code::Cycle, Some("d")));
    assert_eq!(graph.depth(NodeId(3)), None);
    assert!(graph.chain(NodeId(5)).is_ok());
}

#[test]
fn broken_chains_name_the_place_and_the_reason() {
    for (parent, code) in [
        (Parent::Missing("/mnt/x".into()), Code::MissingParent),
        (Parent::Outside("json:{}".into()), Code::OutsideName),
        (Parent::Ambiguous("x".into()), Code::AmbiguousParent),
        (Parent::Unreadable, Code::BadHeader),
    ] {
        let graph = Graph::new(vec![
            Node { key: key("tip"), parent: Parent::Node(NodeId(1)) },
            Node { key: key("low"), parent },
        ])
        .unwrap();
        assert_eq!(graph.ancestors(NodeId(0)).unwrap(), ids(&[1]));
        let error = graph.chain(NodeId(0)).unwrap_err();
        assert_eq!(error.code(), code);
        assert!(error.to_string().contains("broken at low"), "{error}");
        assert!(graph.complete(NodeId(1)).is_err());
    }
}

#[test]
fn a_wrong_list_is_refused() {
    let node = |name: &str, parent| Node { key: key(name), parent };
    assert_eq!(
        Graph::new(vec![node("a", Parent::None), node("a", Parent::None)]).unwrap_err(),
        GraphError::Duplicate { key: key("a") }
    );
    assert_eq!(
        Graph::new(vec![node("a", Parent::Node(NodeId(1)))]).unwrap_err(),
        GraphError::NoSuchParent { key: key("a") }
    );
    assert!(Graph::new(Vec::new()).unwrap().is_empty());
}

#[test]
fn one_path_on_two_stores_is_two_members() {
    let node = |store| Node { key: Key { store, ..key("a") }, parent: Parent::None };
    let graph = Graph::new(vec![node(1), node(0)]).unwrap();
    assert_eq!(graph.trees()[0].members, ids(&[1]));
}

#[test]
fn deep_and_wide_graphs_take_no_time() {
    let started = Instant::now();
    let count = 100_000;
    let name = |index: usize| format!("m{:06}", index * 7919 % count);
    let chain = Graph::new(
        (0..count)
            .map(|index| Node {
                key: key(&name(index)),
                parent: index.checked_sub(1).map_or(Parent::None, |below| Parent::Node(NodeId(below))),
            })
            .collect(),
    )
    .unwrap();
    assert_eq!(chain.chain(NodeId(count - 1)).unwrap().len(), count);
    let ring = Graph::new(
        (0..count)
            .map(|index| Node {
                key: key(&name(index)),
                parent: Parent::Node(NodeId((index + count - 1) % count)),
            })
            .collect(),
    )
    .unwrap();
    assert_eq!(ring.trees().len(), 1);
    assert!(ring.on_cycle(NodeId(17)));
    // Many small cycles: looking for each must not cost a walk over the whole graph.
    let rings = Graph::new(
        (0..count)
            .map(|index| Node { key: key(&name(index)), parent: Parent::Node(NodeId(index ^ 1)) })
            .collect(),
    )
    .unwrap();
    assert_eq!(rings.trees().len(), count / 2);
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

proptest! {
    #[test]
    fn agrees_with_plain_walks(parents in prop::collection::vec(prop::option::of(0_usize..40), 1..40)) {
        let count = parents.len();
        let parents: Vec<_> = parents.into_iter().map(|parent| parent.map(|index| index % count)).collect();
        let names: Vec<_> = (0..count).map(|index| format!("m{:02}", index * 17 % 41)).collect();
        let list: Vec<_> = names.iter().map(String::as_str).zip(parents.iter().copied()).collect();
        let graph = graph(&list);

        let mut seen = BTreeSet::new();
        for (index, tree) in graph.trees().iter().enumerate() {
            for (place, id) in tree.members.iter().enumerate() {
                prop_assert!(seen.insert(*id));
                prop_assert_eq!(graph.tree_of(*id), index);
                if place > 0 {
                    let parent = graph.parent(*id).unwrap();
                    prop_assert!(tree.members[..place].contains(&parent));
                }
            }
        }
        prop_assert_eq!(seen.len(), count);

        for id in graph.ids() {
            let mut walk = Vec::new();
            let mut at = parents[id.0];
            while let Some(below) = at.filter(|_| walk.len() <= count) {
                walk.push(NodeId(below));
                at = parents[below];
            }
            prop_assert_eq!(graph.on_cycle(id), walk.contains(&id));
            if walk.len() > count {
                prop_assert!(graph.ancestors(id).is_err() && graph.chain(id).is_err());
            } else {
                prop_assert_eq!(graph.depth(id), Some(walk.len()));
                prop_assert_eq!(graph.ancestors(id).unwrap(), walk);
            }
        }
    }
}
