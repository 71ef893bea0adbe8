use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntCounterVec};

use super::StoreFailure;
use crate::metrics::Metrics;

/// What a process asks of a shared store.
#[derive(Debug, Clone)]
pub struct StoreMetrics {
    operations: IntCounterVec,
    failures: IntCounterVec,
    seconds: Histogram,
    unreadable: IntCounter,
}

impl StoreMetrics {
    /// Registers them.
    pub fn new(metrics: &Metrics) -> Self {
        let this = Self {
            operations: metrics.counters(
                "midspan_store_operations_total",
                "Round trips to the shared store, by what was asked.",
                "operation",
            ),
            failures: metrics.counters(
                "midspan_store_failures_total",
                "Round trips and tries to connect that failed, by how: unreachable, timed_out, read_only, full, refused, other.",
                "failure",
            ),
            seconds: metrics.histogram(
                "midspan_store_seconds",
                "How long round trips to the shared store took, failed ones included.",
            ),
            unreadable: metrics.counter(
                "midspan_store_unreadable_records_total",
                "Records of the shared store that this release cannot read, and has left out.",
            ),
        };
        for operation in super::redis::operations() {
            this.operations.with_label_values(&[operation]);
        }
        for failure in StoreFailure::ALL {
            this.failures.with_label_values(&[failure.label()]);
        }
        this
    }

    pub(super) fn took(&self, operation: &'static str, time: Duration) {
        self.operations.with_label_values(&[operation]).inc();
        self.seconds.observe(time.as_secs_f64());
    }

    pub(super) fn failed(&self, failure: StoreFailure) {
        self.failures.with_label_values(&[failure.label()]).inc();
    }

    /// Counts a record that cannot be read. Says whether it is the first.
    pub(super) fn unreadable(&self) -> bool {
        self.unreadable.inc();
        self.unreadable.get() == 1
    }
}
