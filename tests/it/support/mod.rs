//! Builders and oracles.

pub mod images;
pub mod qemu;
pub mod raw_file;
