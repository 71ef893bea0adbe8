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
    /// The lease was renewed. Whether all joined streams are to be announced again.
    pub fn renewed(&mut self, renewal: Renewal, now: Instant) -> bool {
        if renewal.forgotten {
            self.owed = true;
            // Also without any stream here: one may come whose record is forgotten.
            self.forgot = Some(now);
        }
        self.owed
    }

    /// All joined streams have been announced again.
    pub fn restored(&mut self) {
        self.owed = false;
    }

    /// A joined stream could not be announced. A store that was away for less than a lease forgets nothing, so nothing else would
    /// bring it up again, and the store would take the handshake for failed.
    pub fn failed(&mut self) {
        self.owed = true;
    }

    /// The store did not know a stream that was joined, or knew better. Whether it is to be announced again.
    pub fn unknown(&self, now: Instant) -> bool {
        self.forgot.is_some_and(|forgot| now.saturating_duration_since(forgot) < HANDSHAKES)
    }
}

#[cfg(test)]
mod tests {
    use midspan_platform::clock;

    use super::*;

    #[test]
    fn what_the_store_may_not_know_is_announced_again_until_it_does() {
        let (mut announcements, now) = (Announcements::default(), clock::now());
        let [kept, forgotten] = [false, true].map(|forgotten| Renewal { forgotten });
        assert!(!announcements.renewed(kept, now) && !announcements.unknown(now));
        announcements.failed();
        assert!(announcements.renewed(kept, now));
        assert!(announcements.renewed(kept, now), "it has not been announced yet");
        announcements.restored();
        assert!(!announcements.renewed(kept, now));
        assert!(announcements.renewed(forgotten, now));
        announcements.restored();
        assert!(announcements.unknown(now + HANDSHAKE_MAX), "it was asked for before");
        assert!(!announcements.unknown(now + HANDSHAKES));
    }
}
