//! The control plane: who may open which stream, and asking the device.
//!
//! `api` has one file for each endpoint; `device` has the device links. `handshake` leads from a request
//! to the device's answer.

mod api;
mod auth;
mod control;
mod device;
mod handshake;
mod metrics;
mod rates;
mod settings;

pub use control::{Control, ControlParts};
pub use settings::ControlSettings;
