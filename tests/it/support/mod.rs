//! Builders and oracles.

pub mod images;
pub mod mounts;
pub mod qemu;
pub mod raw_file;
