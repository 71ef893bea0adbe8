//! The streaming edge: where the two legs of a stream meet.
//!
//! The path of a leg is the list of modules: `upgrade` checks the ticket and opens the WebSocket, `pairing` knows which
//! legs are there (a leg whose stream belongs to another edge goes there with `forward`, and a connection that asks for another edge by name with `passing`), `leg` keeps the first one waiting, `threads` gives the joined stream a thread, `splice` moves the bytes,
//! and the end is reported once.

pub mod announcements;
mod edge;
mod forward;
pub mod leg;
mod metrics;
pub mod milestones;
mod moderation;
pub mod pairing;
mod passing;
mod relaying;
mod settings;
pub mod splice;
mod threads;
mod upgrade;
mod vitals;

pub use edge::{Edge, EdgeParts};
pub use passing::{Passing, PassingSettings};
pub use settings::EdgeSettings;
pub use threads::DataThreads;
