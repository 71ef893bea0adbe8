//! How long a device waits before it tries the relay again.

use std::time::Duration;

use midspan_core::link::Goodbye;

/// The time between tries: a random time of up to 1 s, doubled at every failure in a row up to 60 s.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The wait after one more failure. `fraction` is a random number from 0 up to 1.
    pub(crate) fn after_failure(&mut self, fraction: f64) -> Duration {
        let most = FIRST_MOST.saturating_mul(1 << self.failures.min(16)).min(MOST);
        self.failures = self.failures.saturating_add(1);
        most.mul_f64(fraction.clamp(0.0, 1.0))
    }

    /// Forgets the failures, because a link was welcomed.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// The wait that a goodbye asks for, and a random part of it on top.
pub(crate) fn after_goodbye(goodbye: &Goodbye, fraction: f64) -> Duration {
    let told = Duration::from_secs(goodbye.come_back_seconds).min(LONGEST_GOODBYE);
    told + told.mul_f64(fraction.clamp(0.0, 1.0))
}

const FIRST_MOST: Duration = Duration::from_secs(1);
const MOST: Duration = Duration::from_secs(60);

/// No relay can send a device away for good.
const LONGEST_GOODBYE: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use midspan_core::link::GoodbyeReason;

    use super::*;

    #[test]
    fn the_wait_doubles_up_to_a_minute() {
        let mut backoff = Backoff::default();
        let most: Vec<_> = (0..9).map(|_| backoff.after_failure(1.0).as_secs()).collect();
        assert_eq!(most, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        backoff.reset();
        assert_eq!(backoff.after_failure(0.5), Duration::from_millis(500));
        assert_eq!(backoff.after_failure(0.0), Duration::ZERO);
    }

    #[test]
    fn very_many_failures_do_not_overflow() {
        let mut backoff = Backoff { failures: u32::MAX };
        assert_eq!(backoff.after_failure(1.0), MOST);
    }

    #[test]
    fn a_goodbye_is_obeyed_with_a_random_part_more() {
        let goodbye = |come_back_seconds| Goodbye {
            reason: GoodbyeReason::Draining,
            message: String::new(),
            come_back_seconds,
        };
        assert_eq!(after_goodbye(&goodbye(300), 0.0).as_secs(), 300);
        assert_eq!(after_goodbye(&goodbye(300), 0.5).as_secs(), 450);
        assert_eq!(after_goodbye(&goodbye(0), 0.9), Duration::ZERO);
        assert_eq!(after_goodbye(&goodbye(u64::MAX), 1.0), LONGEST_GOODBYE * 2);
    }
}
