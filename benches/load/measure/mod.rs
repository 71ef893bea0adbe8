//! The measurements.

pub(crate) mod calls;
pub(crate) mod end_to_end;
pub(crate) mod idle;
pub(crate) mod instructions;
pub(crate) mod latency;
pub(crate) mod links;
pub(crate) mod peak;
pub(crate) mod relay;
pub(crate) mod setup;
pub(crate) mod stalled;
