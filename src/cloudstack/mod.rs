//! CloudStack's own facts: text in, values out.
//!
//! Owns: what CloudStack calls its files and mounts, and what it writes into backing names, checkpoint files
//! and its database. Does not own: files, images, or what to do about any of it. Pure; everything read here
//! was written by somebody else and is taken for hostile.
//!
//! - [`paths`]: install paths, and what a file name says.
//! - [`prefix`]: under which directories hosts mount a store.
//! - [`backing`]: backing names mapped to members, and members to backing names.
//! - [`checkpoint`]: libvirt's checkpoint files, read and edited without touching any other byte.
//! - [`records`]: rows of CloudStack's database, as exported by one SELECT.
//! - [`row_change`]: what a merge changes in them.
//!
//! Facts are those of CloudStack 4.21 and 4.22, named by their class where they are used.

pub mod backing;
pub mod checkpoint;
pub mod paths;
pub mod prefix;
pub mod records;
pub mod row_change;
