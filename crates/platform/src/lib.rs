//! What every Midspan server process has.
//!
//! The rendezvous store, listeners and TLS, the life of the process from start to drain, files that are read
//! again while running, logs, metrics and the activity log. Only this crate knows where records are kept, and that there is a
//! Kubernetes.

pub mod activity;
pub mod admin;
pub mod clock;
pub mod copy;
pub mod duration;
pub mod http;
pub mod internal;
pub mod kubernetes;
pub mod lifecycle;
pub mod listener;
pub mod metrics;
pub mod owners;
pub mod rendezvous;
pub mod secrets;
pub mod telemetry;
pub mod tls;
pub mod unsent;
pub mod watched;
