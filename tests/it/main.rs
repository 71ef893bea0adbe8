//! The relay and its clients as a whole: every test starts the real programs and speaks to them over real sockets.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

mod api;
mod balancers;
mod cli;
mod conformance;
mod credentials;
mod demo;
mod docs;
mod edge;
mod ends;
mod fleet;
mod frames;
mod fuzz_seeds;
mod gathering;
mod half_close;
mod handshake;
mod idle;
mod kubernetes;
mod legs;
mod lifecycle;
mod limits;
mod load;
mod owners;
mod python;
mod rendezvous;
mod replicas;
mod soak;
mod splice;
mod ssh;
mod stalled;
mod strangers;
mod tickets;
mod tls;
mod tools;
mod turns;
mod web;
