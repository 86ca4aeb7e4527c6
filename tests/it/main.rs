//! The one integration test binary.

mod qcow2_read;
mod support;
mod tidy;
