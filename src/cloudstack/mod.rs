//! CloudStack's own facts: text in, values out.
//!
//! and its database. Does not own: files, images, or what to do about any of it. Pure; everything read here
//! was written by somebody else and is taken for hostile.
//!
//! - [`paths`]: install paths, and what a file name says.
//! - [`prefix`]: under which directories hosts mount a store.
//!
//! Facts are those of CloudStack 4.21 and 4.22, named by their class where they are used.

pub mod paths;
pub mod prefix;
