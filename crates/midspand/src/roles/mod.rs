//! The roles that one process can have.

pub(crate) mod control;
pub(crate) mod dev;
pub(crate) mod edge;
