//! qchain: the storage-side owner of qcow2 snapshot chains.
//!
//! Layers, in import order; nothing imports from a line below its own (held by `tests/it/tidy.rs`):
//!
//! | module | owns |
//! |---|---|
//! | [`units`] [`ids`] [`failure`] [`progress`] | newtypes, parsed names, kinds of failure, progress and cancel |
//! | [`backend`] | bytes and names on one store; the only file I/O |
//! | [`qcow2`] | one image: header, tables, map, layout, check |
//! | [`digest`] | blocks, leaves, view digests. Pure |
//! | [`chain`] | how images relate: graph, view, planning. Pure |
//! | [`cloudstack`] | CloudStack's own facts: text in, values out |
//! | [`database`] | CloudStack's rows over a connection, or from an export |
//! | [`store`] | what lies on a share: scan, names, opened chains |
//! | [`change`] | changing a share safely: locks, publishing order |
//! | [`ops`] | the verbs: plan, run, report |
//! | [`peer`] | messages between zones, and the client |
//! | [`service`] | verbs as durable jobs over HTTP |
//! | [`cli`] | the same for a terminal |
//!
//! Every verb is three steps: **map** a sub-chain, **lay out** the wanted image as a pure function of that
//! map, **write** it by the cheapest means the store has. A published member is never written again: a
//! change is a new file that takes the old name.

pub mod backend;
pub mod chain;
pub mod change;
pub mod cli;
pub mod cloudstack;
pub mod database;
pub mod digest;
pub mod failure;
pub mod ids;
pub mod ops;
pub mod peer;
pub mod progress;
pub mod qcow2;
pub mod service;
pub mod store;
pub mod units;
