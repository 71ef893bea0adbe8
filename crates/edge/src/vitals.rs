//! When a leg is pinged, and when a stream is given up. Decides only; the splice acts.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use midspan_core::{close::CloseReason, id::Role};

/// How long what may last.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// A leg that was quiet for this long is pinged.
    pub ping: Duration,
    /// A leg that was read from, has nothing left to read itself, and gave no sign of life for this long is given up.
    pub silence: Duration,
    /// A stream without payload for this long is ended.
    pub idle: Duration,
    /// A leg that took no byte for this long, although some waited, is given up.
    pub stall: Duration,
    /// At a clean end, a leg that takes no byte for this long loses the rest.
    pub close: Duration,
}

/// What happened at one leg since the last tick.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seen {
    /// Bytes came from it.
    pub(crate) heard: bool,
    /// It was not read from, because its peer takes nothing, or because it was not the stream's turn.
    pub(crate) held_back: bool,
    /// It took bytes.
    pub(crate) took: bool,
    /// Bytes wait for it.
    pub(crate) owed: bool,
    /// Frames of a message were passed on to it, or put aside for it.
    pub(crate) sent: bool,
    /// It answered a ping.
    pub(crate) ponged: bool,
    /// Payload came from it.
    pub(crate) payload: bool,
}

/// What to do now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Which legs to ping: the service's, the device's.
    pub(crate) ping: [bool; 2],
    /// Why the stream is over, if it is.
    pub(crate) end: Option<CloseReason>,
}

/// The signs of life of both legs. There is one of it for each stream, so it is small: moments are counted from its start.
#[derive(Debug)]
pub(crate) struct Vitals {
    /// Those of the edge, which all its streams share.
    limits: Arc<Limits>,
    start: Instant,
    /// When the credential behind the stream is past use; `None` if that is out of sight.
    expiry: Option<Instant>,
    legs: [LegVitals; 2],
    payload: Moment,
}

#[derive(Debug, Clone, Copy, Default)]
struct LegVitals {
    heard: Moment,
    pinged: Moment,
    took: Moment,
    /// Whether messages may lie unread in the buffers on the way. A ping behind them cannot be answered before they
    /// are read, so its missing answer proves nothing; an answer proves that everything before the ping was read.
    unread: bool,
    /// Whether a ping was sent after the last message.
    ping_is_last: bool,
}

/// Milliseconds since the start of a stream. After 49 days it stands still; by then the credential is long past use.
#[derive(Debug, Clone, Copy, Default)]
struct Moment(u32);

impl Moment {
    fn since(self, then: Self) -> Duration {
        Duration::from_millis(u64::from(self.0.saturating_sub(then.0)))
    }
}

impl Vitals {
    pub(crate) fn new(limits: Arc<Limits>, expiry: Option<Instant>, now: Instant) -> Self {
        Self { limits, start: now, expiry, legs: [LegVitals::default(); 2], payload: Moment::default() }
    }

    /// When [`Vitals::tick`] should be called next.
    pub(crate) fn next_tick(&self, now: Instant) -> Instant {
        let Limits { ping, silence, idle, stall, .. } = *self.limits;
        let shortest = ping.min(silence).min(idle).min(stall);
        let tick = now + (shortest / 4).clamp(Duration::from_millis(10), Duration::from_secs(5));
        self.expiry.map_or(tick, |expiry| tick.min(expiry))
    }

    /// The limits that it goes by.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Lets time pass. `seen` is about the service's leg, then the device's.
    pub(crate) fn tick(&mut self, at: Instant, seen: [Seen; 2]) -> Verdict {
        let mut verdict = Verdict::default();
        let now = self.moment(at);
        if seen.iter().any(|seen| seen.payload || seen.owed) {
            self.payload = now;
        }
        for (role, seen) in Role::ALL.into_iter().zip(seen) {
            let index = usize::from(role == Role::Device);
            let leg = &mut self.legs[index];
            // While bytes wait for it, what counts is whether it takes them.
            if seen.heard || seen.held_back || seen.owed {
                leg.heard = now;
            }
            if seen.took || !seen.owed {
                leg.took = now;
            }
            if seen.sent {
                (leg.unread, leg.ping_is_last) = (true, false);
            } else if seen.ponged && leg.ping_is_last {
                leg.unread = false;
            }
            let silence = if leg.unread { self.limits.stall } else { self.limits.silence };
            if now.since(leg.took) >= self.limits.stall {
                verdict.end = Some(CloseReason::stalled(role));
            } else if now.since(leg.heard) >= silence {
                verdict.end = Some(CloseReason::unresponsive(role));
            }
            if now.since(leg.heard) >= self.limits.ping && now.since(leg.pinged) >= self.limits.ping {
                (leg.pinged, leg.ping_is_last) = (now, true);
                verdict.ping[index] = true;
            }
        }
        if self.expiry.is_some_and(|expiry| at >= expiry) {
            verdict.end = Some(CloseReason::CredentialExpired);
        }
        if now.since(self.payload) >= self.limits.idle {
            verdict.end = verdict.end.or(Some(CloseReason::Idle));
        }
        verdict
    }

    fn moment(&self, at: Instant) -> Moment {
        let since = at.saturating_duration_since(self.start).as_millis();
        Moment(u32::try_from(since).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEARD: Seen = Seen {
        heard: true,
        held_back: false,
        took: false,
        owed: false,
        sent: false,
        ponged: false,
        payload: false,
    };
    const QUIET: Seen = Seen { heard: false, ..HEARD };

    #[test]
    fn a_quiet_leg_is_pinged_and_given_up() {
        let (mut vitals, start) = vitals();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(vitals.tick(at(24), [HEARD, QUIET]), Verdict::default());
        assert_eq!(vitals.tick(at(25), [HEARD, QUIET]).ping, [false, true]);
        assert_eq!(vitals.tick(at(26), [HEARD, QUIET]).ping, [false, false]);
        assert_eq!(vitals.tick(at(74), [HEARD, QUIET]).end, None);
        assert_eq!(vitals.tick(at(75), [HEARD, QUIET]).end, Some(CloseReason::DeviceUnresponsive));
    }

    #[test]
    fn a_leg_that_is_held_back_is_not_silent() {
        let (mut vitals, start) = vitals();
        let held_back = Seen { held_back: true, ..QUIET };
        let owed = Seen { owed: true, heard: true, ..QUIET };
        for seconds in (0..850).step_by(10) {
            let verdict = vitals.tick(start + Duration::from_secs(seconds), [held_back, owed]);
            assert_eq!(verdict.end, None, "after {seconds} s");
        }
        let end = vitals.tick(start + Duration::from_secs(900), [held_back, owed]).end;
        assert_eq!(end, Some(CloseReason::DeviceStalled));
    }

    #[test]
    fn a_leg_with_unread_messages_may_be_silent_until_it_has_answered_a_ping_behind_them() {
        let (mut vitals, start) = vitals();
        let at = |seconds| start + Duration::from_secs(seconds);
        let sent = Seen { sent: true, took: true, ..QUIET };
        let ponged = Seen { ponged: true, ..HEARD };
        vitals.tick(at(1), [HEARD, sent]);
        assert_eq!(vitals.tick(at(25), [HEARD, QUIET]).ping, [false, true]);
        assert_eq!(vitals.tick(at(800), [HEARD, QUIET]).end, None);
        assert_eq!(vitals.tick(at(801), [HEARD, ponged]).end, None);
        assert_eq!(vitals.tick(at(875), [HEARD, QUIET]).end, None);
        assert_eq!(vitals.tick(at(876), [HEARD, QUIET]).end, Some(CloseReason::DeviceUnresponsive));
    }

    #[test]
    fn progress_however_slow_is_no_stall() {
        let (mut vitals, start) = vitals();
        for minutes in (0..1000).step_by(14) {
            let slow = Seen { owed: true, took: true, ..HEARD };
            let now = start + Duration::from_secs(minutes * 60);
            assert_eq!(vitals.tick(now, [HEARD, slow]).end, None);
        }
    }

    #[test]
    fn pongs_alone_do_not_keep_a_stream_from_being_idle() {
        let (mut vitals, start) = vitals();
        let payload = Seen { payload: true, ..HEARD };
        let hour = Duration::from_secs(3600);
        assert_eq!(vitals.tick(start + hour / 2, [payload, HEARD]).end, None);
        assert_eq!(vitals.tick(start + hour, [HEARD, HEARD]).end, None);
        assert_eq!(vitals.tick(start + hour * 3 / 2, [HEARD, HEARD]).end, Some(CloseReason::Idle));
    }

    #[test]
    fn a_stream_ends_with_its_credential() {
        let (mut vitals, start) = vitals();
        let expiry = start + Duration::from_secs(7);
        vitals.expiry = Some(expiry);
        assert_eq!(vitals.next_tick(start), start + Duration::from_secs(5));
        assert_eq!(vitals.next_tick(start + Duration::from_secs(5)), expiry);
        assert_eq!(vitals.tick(start + Duration::from_millis(6999), [HEARD, HEARD]).end, None);
        assert_eq!(vitals.tick(expiry, [HEARD, HEARD]).end, Some(CloseReason::CredentialExpired));
    }

    fn vitals() -> (Vitals, Instant) {
        let limits = Limits {
            ping: Duration::from_secs(25),
            silence: Duration::from_secs(75),
            idle: Duration::from_secs(3600),
            stall: Duration::from_secs(900),
            close: Duration::from_secs(60),
        };
        let now = midspan_platform::clock::now();
        (Vitals::new(Arc::new(limits), None, now), now)
    }
}
