use midspan_core::{close::CloseReason, id::Role, problem::ProblemKind};
use midspan_platform::metrics::{Counted, Metrics};
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use crate::passing::Passed;

/// The metrics of the edge.
#[derive(Debug, Clone)]
pub(crate) struct EdgeMetrics {
    legs: IntGaugeVec,
    pub(crate) half_open: IntGauge,
    pub(crate) joined: IntGauge,
    ends: IntCounterVec,
    refusals: IntCounterVec,
    forwarded: IntGaugeVec,
    forwarded_bytes: IntCounterVec,
    pub(crate) passed_now: IntGauge,
    passed: IntCounterVec,
    passed_bytes: IntCounter,
}

impl EdgeMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        let streams = metrics.gauges(
            "midspan_edge_streams",
            "Streams of which at least one leg has come and that are not over, by state: half_open or joined.",
            "state",
        );
        let this = Self {
            legs: metrics.gauges("midspan_edge_legs", "Open legs, by role: service or device.", "role"),
            half_open: streams.with_label_values(&["half_open"]),
            joined: streams.with_label_values(&["joined"]),
            ends: metrics.counters(
                "midspan_edge_stream_ends_total",
                "Streams that ended here, by reason; the reasons stand in docs/protocol.md.",
                "reason",
            ),
            refusals: metrics.counters(
                "midspan_edge_leg_refusals_total",
                "Legs that were refused, by the name of the problem they were told.",
                "reason",
            ),
            forwarded: metrics.gauges(
                "midspan_edge_forwarded_legs",
                "Open legs that are passed on to the edge that owns their stream, by role.",
                "role",
            ),
            forwarded_bytes: metrics.counters(
                "midspan_edge_forwarded_bytes_total",
                "Bytes of forwarded legs that have ended, both ways together, by role.",
                "role",
            ),
            passed_now: metrics.gauge(
                "midspan_edge_passed_connections",
                "Open connections that are passed on below TLS to the edge whose name they ask for.",
            ),
            passed: metrics.counters(
                "midspan_edge_passed_connections_total",
                "Connections for another edge that are over, by what came of them: ended, broken, or unreachable and so taken here.",
                "result",
            ),
            passed_bytes: metrics.counter(
                "midspan_edge_passed_bytes_total",
                "Bytes of passed connections that have ended, both ways together, without their first message.",
            ),
        };
        for result in Passed::ALL {
            this.passed.with_label_values(&[result.label()]);
        }
        for role in Role::ALL {
            this.legs.with_label_values(&[role.as_str()]);
            this.forwarded.with_label_values(&[role.as_str()]);
            this.forwarded_bytes.with_label_values(&[role.as_str()]);
        }
        for reason in CloseReason::ALL {
            this.ends.with_label_values(&[reason.label()]);
        }
        for kind in [ProblemKind::TicketInvalid, ProblemKind::TicketExpired, ProblemKind::LegTaken] {
            this.refusals.with_label_values(&[kind.row().name]);
        }
        this
    }

    pub(crate) fn leg(&self, role: Role) -> Counted {
        Counted::new(&self.legs.with_label_values(&[role.as_str()]))
    }

    pub(crate) fn forwarded(&self, role: Role) -> Counted {
        Counted::new(&self.forwarded.with_label_values(&[role.as_str()]))
    }

    pub(crate) fn forwarded_bytes(&self, role: Role, bytes: [u64; 2]) {
        self.forwarded_bytes.with_label_values(&[role.as_str()]).inc_by(bytes.iter().sum());
    }

    pub(crate) fn passed(&self, result: Passed) {
        self.passed.with_label_values(&[result.label()]).inc();
    }

    pub(crate) fn passed_bytes(&self, bytes: [u64; 2]) {
        self.passed_bytes.inc_by(bytes.iter().sum());
    }

    /// How many legs are open, those that are being told of their end included.
    pub(crate) fn open_legs(&self) -> i64 {
        Role::ALL.iter().map(|role| self.legs.with_label_values(&[role.as_str()]).get()).sum()
    }

    pub(crate) fn ended(&self, reason: CloseReason) {
        self.ends.with_label_values(&[reason.label()]).inc();
    }

    pub(crate) fn refused(&self, name: &str) {
        self.refusals.with_label_values(&[name]).inc();
    }
}
