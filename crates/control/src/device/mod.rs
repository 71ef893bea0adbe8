//! The device links of this process.

mod link;
mod links;

pub(crate) use links::{Answer, InviteError, Links};
