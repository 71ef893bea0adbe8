//! The monotonic clock.

use std::time::Instant;

#[expect(clippy::disallowed_methods, reason = "a measurement is about the real clock")]
pub(crate) fn now() -> Instant {
    Instant::now()
}
