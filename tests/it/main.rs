//! The one integration test binary.

#![expect(clippy::unwrap_used, reason = "helpers outside of #[test] functions fail a test by panicking, too")]

mod audit_cli;
mod change_cli;
mod change_cost;
mod cli_read;
mod conformance;
mod consolidate;
mod consolidate_rows;
mod crash_errors;
mod crash_foreign;
mod crash_incoming;
mod crash_kill;
mod damage;
mod delete_cli;
mod delete_deep;
mod delete_faults;
mod delete_identity;
mod delete_oracle;
mod delete_sequences;
mod delete_trees;
mod frozen;
mod image_locks;
mod libvirt;
mod merge_model;
mod merge_onto;
mod merge_onto_qemu;
mod merge_qemu;
mod merge_tamper;
mod nfs3_conformance;
mod other_mount;
mod power_cut;
mod power_log;
mod primary_cli;
mod qcow2_check;
mod qcow2_read;
mod qemu_readers;
mod readers_meanwhile;
mod reclaim;
mod simulation;
mod ssvm_client;
mod support;
mod tidy;
mod two_instances;
mod undo_stubs;
