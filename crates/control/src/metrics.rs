use midspan_core::{close::CloseReason, credential::AuthError, link::GoodbyeReason};
use midspan_platform::metrics::Metrics;
use prometheus::{IntCounter, IntCounterVec, IntGauge};

/// The metrics of the control plane.
#[derive(Debug, Clone)]
pub(crate) struct ControlMetrics {
    pub(crate) device_links: IntGauge,
    pub(crate) waiting_initiations: IntGauge,
    pub(crate) unexpected_answers: IntCounter,
    initiations: IntCounterVec,
    auth_failures: IntCounterVec,
    goodbyes: IntCounterVec,
    asked_elsewhere: IntCounterVec,
    ends: IntCounterVec,
}

impl ControlMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        let this = Self {
            device_links: metrics.gauge("midspan_control_device_links", "Open device links."),
            waiting_initiations: metrics.gauge(
                "midspan_control_waiting_initiations",
                "Requests for streams that wait for a device or its answer.",
            ),
            unexpected_answers: metrics.counter(
                "midspan_control_unexpected_answers_total",
                "Answers of devices that nobody waited for: second ones, late ones, invented ones.",
            ),
            initiations: metrics.counters(
                "midspan_control_initiations_total",
                "Requests for streams, by result: accepted, or the name of the problem that the service was told.",
                "result",
            ),
            auth_failures: metrics.counters(
                "midspan_control_auth_failures_total",
                "Requests whose sender could not show who it is, by reason.",
                "reason",
            ),
            goodbyes: metrics.counters(
                "midspan_control_goodbyes_total",
                "Device links that the relay closed, by reason; the reasons stand in docs/protocol.md.",
                "reason",
            ),
            asked_elsewhere: metrics.counters(
                "midspan_control_asked_elsewhere_total",
                "Requests that were passed on to the replica with the device's link, by what came of it: the device's answer, or how it was lost.",
                "result",
            ),
            ends: metrics.counters(
                "midspan_control_stream_ends_total",
                "Accepted streams that ended before any leg came, by reason; the others are counted at the edge.",
                "reason",
            ),
        };
        for reason in [CloseReason::BothLegsMissing, CloseReason::Deleted] {
            this.ends.with_label_values(&[reason.label()]);
        }
        this.initiations.with_label_values(&["accepted"]);
        this.asked_elsewhere.with_label_values(&["accepted"]);
        for label in AuthError::LABELS {
            this.auth_failures.with_label_values(&[label]);
        }
        for reason in GoodbyeReason::ALL {
            this.goodbyes.with_label_values(&[reason.label()]);
        }
        this
    }

    pub(crate) fn initiation(&self, result: &str) {
        self.initiations.with_label_values(&[result]).inc();
    }

    pub(crate) fn asked_elsewhere(&self, result: &str) {
        self.asked_elsewhere.with_label_values(&[result]).inc();
    }

    pub(crate) fn auth_failure(&self, error: &AuthError) {
        self.auth_failures.with_label_values(&[error.label()]).inc();
    }

    pub(crate) fn ended(&self, reason: CloseReason) {
        self.ends.with_label_values(&[reason.label()]).inc();
    }

    pub(crate) fn goodbye(&self, reason: GoodbyeReason) {
        self.goodbyes.with_label_values(&[reason.label()]).inc();
    }
}
