//! One qcow2 image: header, tables, refcounts, compressed clusters, map, layout, check.
//!
//! Owns: the format (`FORMAT.md`, beside this file), for reading and for writing whole images. Does not own:
//! how images relate (`chain`), names and files (`backend`), or what to make of a finding.
//!
//! - [`header`], [`tables`], [`refcount`], [`compressed`]: bytes in, values out, and back. Pure.
//! - [`map`]: an image's own allocation as an iterator of runs; the types every layer above speaks in.
//! - [`image`]: an open image: a file, its header, windows of its tables.
//! - [`layout`]: the byte-exact plan of an image to be, as a pure function of a map.
//! - [`mod@write`]: puts a planned image into a file: an empty one, or behind the end of one that is kept.
//! - [`check`]: refcounts, overlaps, metadata past the end: findings, not errors.
//! - [`mod@fingerprint`]: a digest of the metadata, that says whether it changed.
//!
//! Every number from a file is untrusted: sizes are capped before memory is taken, arithmetic is checked,
//! walks are bounded, and no name inside an image is ever opened.
#![doc = include_str!("FORMAT.md")]

pub mod check;
pub mod compressed;
mod error;
pub mod fingerprint;
pub mod format;
pub mod header;
pub mod image;
pub mod layout;
pub mod map;
pub mod refcount;
pub mod tables;
pub mod unused;
pub mod write;

pub use error::{ImageError, Result};
pub use header::{BackingName, CompressionType, Header};
pub use image::Image;
pub use map::{CompressedCluster, Content, Extent, ExtentKind, Run};
