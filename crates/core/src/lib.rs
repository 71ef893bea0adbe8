//! What a Midspan stream is, without any I/O.
//!
//! Nothing in this crate reads a clock, an environment variable or a socket, draws a random number or spawns
//! a task: time, randomness and bytes come in as arguments, decisions go out as values. That is what makes
//! every rule of the relay testable without waiting and replayable from a seed.

pub mod admission;
pub mod api;
pub mod capability;
pub mod close;
pub mod connection_string;
pub mod credential;
pub mod deny;
pub mod forwarded;
pub mod frame;
pub mod id;
pub mod internal;
pub mod json;
pub mod key;
pub mod limit;
pub mod link;
pub mod owner_name;
pub mod passed;
pub mod path;
pub mod placement;
pub mod problem;
pub mod proxy;
pub mod record;
pub mod sas;
pub mod session;
pub mod ticket;
pub mod time;
pub mod trace;
