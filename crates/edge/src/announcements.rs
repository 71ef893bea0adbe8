//! What the store has to be told of again.

use std::time::{Duration, Instant};

use midspan_core::api::HANDSHAKE_MAX;
use midspan_platform::rendezvous::Renewal;

/// For how long a stream may come up of which the store has forgotten that it was asked for.
const HANDSHAKES: Duration = HANDSHAKE_MAX.saturating_mul(2);

/// What an edge knows of a store that may forget.
#[derive(Debug, Default)]
pub struct Announcements {
    forgot: Option<Instant>,
    owed: bool,
}

impl Announcements {
    /// The lease was renewed while there were streams, or none. Whether all joined streams are to be announced again.
    pub fn renewed(&mut self, renewal: Renewal, busy: bool, now: Instant) -> bool {
        if renewal.forgotten && busy {
            self.owed = true;
            self.forgot = Some(now);
        }
        self.owed
    }

    /// All joined streams have been announced again, or could not be.
    pub fn restored(&mut self, done: bool) {
        self.owed = !done;
    }

    /// The store did not know a stream that was joined, or knew better. Whether it is to be announced again.
    pub fn unknown(&self, now: Instant) -> bool {
        self.forgot.is_some_and(|forgot| now.saturating_duration_since(forgot) < HANDSHAKES)
    }
}
