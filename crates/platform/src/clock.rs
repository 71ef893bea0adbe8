//! The one place where servers read the clock and draw random numbers.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use midspan_core::time::UnixTime;

/// Monotonic time, which stands still while a test has paused it.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Wall-clock time.
pub fn unix() -> UnixTime {
    UnixTime(unix_milliseconds() / 1000)
}

/// Wall-clock time in milliseconds since 1970-01-01 UTC.
#[expect(clippy::disallowed_methods, reason = "this is where it is allowed")]
pub fn unix_milliseconds() -> u64 {
    // A clock before 1970 is as wrong as one that stands at 1970.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// 128 unpredictable bits.
#[expect(clippy::disallowed_methods, reason = "this is where it is allowed")]
pub fn random() -> u128 {
    rand::random()
}

/// 64 unpredictable bits.
#[expect(clippy::disallowed_methods, reason = "this is where it is allowed")]
pub fn random_u64() -> u64 {
    rand::random()
}
