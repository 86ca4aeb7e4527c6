//! Other zones: what is said between services, and the client that says it.
//!
//! | module | owns |
//! |---|---|
//! | [`wire`] | messages as values and bytes: requests, frames of blocks. Pure |
//! | [`zone`] | what the configuration says of a zone: address, token, certificate |
//! | [`client`] | a zone as a [`Peer`](crate::ops::copy::Peer): HTTP/1.1, over TLS 1.3 unless it is this very host |
//! | `connection` | sockets: deadlines, TLS, counted bytes |
//!
//! A peer is named in the configuration, never by a URL in a request; no redirect is followed. Each answer has a length
//! that is known before its first byte and held against what was asked for, each pause has an end, and no byte is
//! believed before it was hashed by who asked.

pub mod client;
mod connection;
pub mod wire;
pub mod zone;

pub use client::HttpPeer;
pub use zone::Zone;
