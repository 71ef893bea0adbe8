//! Limits that explain themselves.

use std::{
    fmt,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// Which limit was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitName {
    /// Streams of one device or module at a time, half-open ones included.
    StreamsPerDevice,
    /// Streams of one service credential at a time, half-open ones included.
    StreamsPerService,
    /// Streams of all services at a time, half-open ones included.
    StreamsPerRelay,
    /// Requests for streams by one service credential.
    InitiationsPerSecond,
    /// Requests that wait for a device in one control-plane process.
    WaitingInitiations,
    /// Device links of one control-plane process.
    DeviceLinks,
}

impl LimitName {
    /// The limit in errors, logs and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::StreamsPerDevice => "streams_per_device",
            Self::StreamsPerService => "streams_per_service",
            Self::StreamsPerRelay => "streams_per_relay",
            Self::InitiationsPerSecond => "initiations_per_second",
            Self::WaitingInitiations => "waiting_initiations",
            Self::DeviceLinks => "device_links",
        }
    }
}

/// A limit that was reached: which, how high it is, whose it is, and when to come back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitReached {
    /// Which limit.
    pub name: LimitName,
    /// How high it is, in the unit that its name says.
    pub value: u64,
    /// Whose limit: `device dev1`, `service support`, `this relay process`.
    pub scope: String,
    /// How long to wait before another try, in whole seconds, at least 1.
    pub retry_after_seconds: u64,
}

impl fmt::Display for LimitReached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, value, scope, retry_after_seconds } = self;
        let name = name.label().replace('_', " ");
        write!(f, "the limit of {value} {name} for {scope} is reached; try again in {retry_after_seconds} s")
    }
}

/// A token bucket: `rate` tokens per second, and up to one second's worth at once.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    rate: f64,
    tokens: f64,
    filled: Instant,
}

impl TokenBucket {
    /// A full bucket. `rate` is in tokens per second.
    pub fn new(rate: u32, now: Instant) -> Self {
        let rate = f64::from(rate.max(1));
        Self { rate, tokens: rate, filled: now }
    }

    /// Takes one token, or says how long it takes until there is one.
    pub fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + passed * self.rate).min(self.rate);
        self.filled = self.filled.max(now);
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - self.tokens) / self.rate))
    }

    /// Whether nothing has been taken for so long that a new bucket would be the same.
    pub fn is_full(&self, now: Instant) -> bool {
        self.tokens + now.saturating_duration_since(self.filled).as_secs_f64() * self.rate >= self.rate
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_burst_of_one_second_then_the_rate() {
        let start = start();
        let mut bucket = TokenBucket::new(5, start);
        assert_eq!((0..20).filter(|_| bucket.take(start).is_ok()).count(), 5);
        let wait = bucket.take(start).unwrap_err();
        assert_eq!(wait, Duration::from_millis(200));
        assert!(bucket.take(start + wait).is_ok());
        assert!(!bucket.is_full(start + wait));
        assert!(bucket.is_full(start + Duration::from_secs(2)));
    }

    #[test]
    fn the_text_tells_which_limit_whose_and_when() {
        let reached = LimitReached {
            name: LimitName::StreamsPerDevice,
            value: 10,
            scope: "device dev1".to_owned(),
            retry_after_seconds: 3,
        };
        assert_eq!(
            reached.to_string(),
            "the limit of 10 streams per device for device dev1 is reached; try again in 3 s"
        );
    }

    proptest! {
        #[test]
        fn never_more_than_rate_times_time_plus_one_burst(
            rate in 1u32..100, steps in prop::collection::vec(0u64..500, 1..200),
        ) {
            let start = start();
            let mut bucket = TokenBucket::new(rate, start);
            let (mut now, mut taken) = (start, 0u64);
            for milliseconds in steps {
                now += Duration::from_millis(milliseconds);
                taken += u64::from(bucket.take(now).is_ok());
            }
            let allowed = f64::from(rate) * (1.0 + (now - start).as_secs_f64()) + 1.0;
            prop_assert!(f64::from(u32::try_from(taken).unwrap()) <= allowed);
        }
    }

    #[expect(clippy::disallowed_methods, reason = "an arbitrary point in time; nothing depends on which")]
    fn start() -> Instant {
        Instant::now()
    }
}
