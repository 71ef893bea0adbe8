//! Where time of day and chance come from.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use midspan_core::time::UnixTime;
use rand::RngExt as _;

/// The time of day, and chance for jitter.
///
/// Waiting goes through tokio's timer, which tests pause by themselves.
pub trait Clock: fmt::Debug + Send + Sync {
    /// The time of day.
    fn unix_now(&self) -> UnixTime;

    /// A random number from 0 up to, and without, 1.
    fn fraction(&self) -> f64;
}

/// The machine's clock and the thread's random generator.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the one place where the client reads the clock")]
    fn unix_now(&self) -> UnixTime {
        // A clock before 1970 cannot sign anything useful; the relay's answer will say so.
        UnixTime(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs())
    }

    fn fraction(&self) -> f64 {
        rand::rng().random()
    }
}

/// What is wrong with this machine's clock, if it is.
pub(crate) fn difference(here: UnixTime, relay: UnixTime) -> Option<String> {
    let (behind, ahead) = (relay.since(here), here.since(relay));
    if behind > TOLERANCE {
        Some(format!("this machine's clock is {} s behind the relay's", behind.as_secs()))
    } else if ahead > TOLERANCE {
        Some(format!("this machine's clock is {} s ahead of the relay's", ahead.as_secs()))
    } else {
        None
    }
}

/// Clocks may differ by this much before it is worth a word.
const TOLERANCE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_clock_is_named() {
        let words = |here, relay| difference(UnixTime(here), UnixTime(relay));
        assert_eq!(words(1000, 1600).unwrap(), "this machine's clock is 600 s behind the relay's");
        assert_eq!(words(1600, 1000).unwrap(), "this machine's clock is 600 s ahead of the relay's");
        assert_eq!(words(1000, 1060), None);
    }
}
