//! Builders and oracles.

pub mod agent;
pub mod builder;
pub mod chains;
pub mod crash;
pub mod digest;
pub mod disk;
pub mod forked;
pub mod grounds;
pub mod images;
pub mod killing;
pub mod later;
pub mod libvirt;
pub mod mariadb;
pub mod merging;
pub mod mounts;
pub mod nfs;
pub mod onto;
pub mod open;
pub mod proxy;
pub mod qemu;
pub mod reader;
pub mod sim;
pub mod store;
pub mod volume;
pub mod world;
pub mod writer;
