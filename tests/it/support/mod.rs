//! Builders and oracles.

pub mod qemu;
pub mod raw_file;
