//! The device links of this process.

mod link;
pub mod links;

pub(crate) use links::{Held, InviteError, Links, Question};
