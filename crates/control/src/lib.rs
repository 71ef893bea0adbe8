//! The control plane: who may open which stream, and asking the device.
//!
//! `api` has one file for each endpoint; `device` has the device links. `handshake` leads from a request
//! to the device's answer, `replicas` to the replica that holds the device's link.

mod api;
mod auth;
mod balance;
mod control;
pub mod device;
pub mod handshake;
mod metrics;
mod rates;
mod replicas;
mod settings;
pub mod view;

pub use control::{Control, ControlParts};
pub use settings::ControlSettings;
