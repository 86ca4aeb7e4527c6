//! A simulated world: a store in memory, several instances of the program on it, and a seed that decides
//! who runs when and what goes wrong.
//!
//! Every instance is a thread that runs only while it has the turn; it may lose it before each call of the
//! store. Time is virtual. So a history is the same each time that its seed is run.

pub mod backend;
pub mod dice;
pub mod exact;
pub mod foreign;
pub mod history;
pub mod image;
pub mod script;
pub mod stage;
pub mod truth;
pub mod world;

pub const EIO: i32 = 5;
pub const ENOSPC: i32 = 28;
