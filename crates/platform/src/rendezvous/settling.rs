use std::time::{Duration, Instant};

use super::Timing;

/// When a missing lease proves nothing: while nobody could renew, and for two renewals after that.
#[derive(Debug, Clone, Default)]
pub(super) struct Settling {
    renewed: Option<Instant>,
    until: Option<Instant>,
}

impl Settling {
    /// As if everybody had renewed at `now`, and for some time before.
    pub(super) fn over(now: Instant) -> Self {
        Self { renewed: Some(now), until: None }
    }

    /// Some process has renewed its lease.
    pub(super) fn renewed(&mut self, timing: &Timing, now: Instant) {
        if !self.is_continuous(timing, now) {
            self.until = Some(now + timing.renewal * 2);
        }
        self.renewed = Some(now);
    }

    /// Whether a missing lease means that its owner is gone.
    pub(super) fn is_over(&self, timing: &Timing, now: Instant) -> bool {
        self.is_over_since(timing, now, Duration::ZERO)
    }

    /// Whether it was so `margin` ago already: to end what belongs to a missing process takes more than to doubt it.
    pub(super) fn is_over_since(&self, timing: &Timing, now: Instant, margin: Duration) -> bool {
        self.is_continuous(timing, now) && self.until.is_none_or(|until| now >= until + margin)
    }

    /// Whether there was no time of more than half a lease without any renewal.
    fn is_continuous(&self, timing: &Timing, now: Instant) -> bool {
        self.renewed.is_some_and(|renewed| now.saturating_duration_since(renewed) <= timing.lease / 2)
    }
}
