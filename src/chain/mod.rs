//! How images relate: the graph of members, the view through a chain, and the planning of a merge. Pure:
//! nodes hold plain facts, maps come in as iterators, nothing here sees a backend.
//!
//! - [`graph`]: members and their parents: trees, tips, ancestors, cycles.
//! - [`delete`]: which merges and removals take a set of members away.
//! - [`view`]: what a guest reads through a chain.
//! - [`proof`]: whether a new image resolves to the same sources as the chain it replaces.

pub mod delete;
pub mod graph;
pub mod proof;
pub mod view;
