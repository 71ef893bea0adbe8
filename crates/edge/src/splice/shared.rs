//! What all streams of a process share: the memory for blocked ones, and the counters.

use std::{sync::Arc, time::Duration};

use midspan_core::id::Role;
use midspan_platform::metrics::Metrics;
use prometheus::{Counter, IntCounter, IntGauge};

/// The most that is read at once from a leg without TLS, in bytes.
///
/// What was read is best still in the core's own cache when it is written. With one stream, 384 KiB carried a twentieth less
/// and 512 KiB a tenth; with 32, 256 and 384 KiB are alike.
pub(super) const READ_PLAIN: usize = 256 * 1024;

/// The most that is read at once from any leg, in bytes.
///
/// With TLS, 512 KiB took a tenth more of the relay's time with one stream, and 1.5 MiB no less.
pub(super) const READ_MOST: usize = 1024 * 1024;

/// The least that is read at once, however little room is left, in bytes.
pub(super) const READ_LEAST: usize = 4 * 1024;

/// A read may take this part of the room that is left, so that many streams find some.
const READ_SHARE: usize = 16;

/// Frames are held while more than this part of the room is left.
const HOLD_SHARE: usize = 16;

/// What all streams of a process share.
#[derive(Debug, Clone)]
pub struct Shared(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limit: usize,
    kept: IntGauge,
    legs: [LegCounters; 2],
}

/// What is counted of all legs of a role.
#[derive(Debug)]
pub(super) struct LegCounters {
    /// Bytes of messages that were passed on to them.
    pub(super) payload: IntCounter,
    /// Messages that were passed on to them.
    pub(super) messages: IntCounter,
    /// How long bytes waited for them.
    blocked: Counter,
}

impl LegCounters {
    pub(super) fn blocked_for(&self, time: Duration) {
        self.blocked.inc_by(time.as_secs_f64());
    }
}

impl Shared {
    /// Registers the metrics. Streams may keep up to `limit` bytes in all.
    pub fn new(limit: usize, metrics: &Metrics) -> Self {
        let payload = metrics.counters(
            "midspan_edge_payload_bytes_total",
            "Payload that was passed on, by the role that it went to; a few seconds late.",
            "to",
        );
        let messages = metrics.counters(
            "midspan_edge_messages_total",
            "Messages that were passed on, by the role that they went to; a few seconds late.",
            "to",
        );
        let blocked = metrics.seconds(
            "midspan_edge_blocked_seconds_total",
            "How long bytes waited because a leg took none, summed over all streams, by the leg's role.",
            "role",
        );
        let legs = Role::ALL.map(|role| {
            let label = &[role.as_str()];
            LegCounters {
                payload: payload.with_label_values(label),
                messages: messages.with_label_values(label),
                blocked: blocked.with_label_values(label),
            }
        });
        let kept = metrics.gauge(
            "midspan_edge_buffered_bytes",
            "Bytes that streams keep because a leg takes none or a frame is not whole; at most --max-buffered-mib and a little.",
        );
        Self(Arc::new(Inner { limit, kept, legs }))
    }

    pub(super) fn leg(&self, role: Role) -> &LegCounters {
        let [service, device] = &self.0.legs;
        match role {
            Role::Service => service,
            Role::Device => device,
        }
    }

    /// How much may be read now, in bytes: all of it may have to be kept.
    pub(crate) fn read_size(&self) -> usize {
        (self.room() / READ_SHARE).clamp(READ_LEAST, READ_MOST)
    }

    /// Whether a frame may be held until it is whole.
    pub(super) fn may_hold(&self) -> bool {
        self.room() > self.0.limit / HOLD_SHARE
    }

    fn room(&self) -> usize {
        self.0.limit.saturating_sub(usize::try_from(self.0.kept.get()).unwrap_or(0))
    }
}

/// What one stream keeps, as part of what all keep.
#[derive(Debug)]
pub(crate) struct Kept {
    shared: Shared,
    bytes: usize,
}

impl Kept {
    pub(crate) fn new(shared: Shared) -> Self {
        Self { shared, bytes: 0 }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Says how much it is now.
    #[inline]
    pub(crate) fn set(&mut self, bytes: usize) {
        if bytes == self.bytes {
            return;
        }
        let signed = |bytes| i64::try_from(bytes).unwrap_or(i64::MAX);
        self.shared.0.kept.add(signed(bytes) - signed(self.bytes));
        self.bytes = bytes;
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1024 * 1024;

    #[test]
    fn reads_shrink_as_room_gets_scarce() {
        let shared = Shared::new(64 * MIB, &Metrics::new());
        let mut kept = Kept::new(shared.clone());
        let mut read_size = |bytes| {
            kept.set(bytes);
            shared.read_size()
        };
        assert_eq!(read_size(0), READ_MOST);
        assert_eq!(read_size(48 * MIB), READ_MOST);
        assert_eq!(read_size(56 * MIB), MIB / 2);
        assert_eq!(read_size(64 * MIB), READ_LEAST);
        assert_eq!(read_size(80 * MIB), READ_LEAST);
        assert!(!shared.may_hold());
        drop(kept);
        assert!(shared.may_hold());
        assert_eq!(shared.read_size(), READ_MOST);
    }

    /// However many streams are blocked one after the other, each after one read, the sum stays near the limit.
    #[test]
    fn the_limit_is_kept_but_for_the_least_reads() {
        let shared = Shared::new(64 * MIB, &Metrics::new());
        let mut streams = Vec::new();
        for _ in 0..1000 {
            let mut kept = Kept::new(shared.clone());
            kept.set(shared.read_size());
            streams.push(kept);
        }
        let sum: usize = streams.iter().map(|kept| kept.bytes).sum();
        assert!(sum < 64 * MIB + 1000 * READ_LEAST, "{sum}");
    }
}
