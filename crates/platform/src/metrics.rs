//! Metrics of one process, in a registry that it owns, so that tests run side by side.

use prometheus::{
    CounterVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
    core::{Collector, GenericGauge},
};

/// The metrics of one process.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// A gauge without labels.
    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::new(name, help))
    }

    /// A gauge with one label.
    pub fn gauges(&self, name: &str, help: &str, label: &str) -> IntGaugeVec {
        self.register(IntGaugeVec::new(Opts::new(name, help), &[label]))
    }

    /// A gauge that is always 1 and tells facts of the process in its labels.
    pub fn info(&self, name: &str, help: &str, facts: &[(&str, &str)]) {
        let (labels, values): (Vec<_>, Vec<_>) = facts.iter().copied().unzip();
        self.register(IntGaugeVec::new(Opts::new(name, help), &labels)).with_label_values(&values).set(1);
    }

    /// A counter without labels.
    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::new(name, help))
    }

    /// A counter with one label.
    pub fn counters(&self, name: &str, help: &str, label: &str) -> IntCounterVec {
        self.register(IntCounterVec::new(Opts::new(name, help), &[label]))
    }

    /// A histogram of seconds, from a quarter of a millisecond to eight seconds.
    pub fn histogram(&self, name: &str, help: &str) -> Histogram {
        let buckets = (0..16).map(|power| 0.000_25 * f64::from(1 << power)).collect();
        self.register(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)))
    }

    /// A counter of seconds with one label.
    pub fn seconds(&self, name: &str, help: &str, label: &str) -> CounterVec {
        self.register(CounterVec::new(Opts::new(name, help), &[label]))
    }

    /// All metrics in Prometheus' text form.
    pub fn render(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }

    /// Makes and registers one metric. A mistake in a name shows at every start, and so in every test.
    #[expect(clippy::panic, reason = "names are constants, and every start passes here")]
    fn register<M: Collector + Clone + 'static>(&self, metric: prometheus::Result<M>) -> M {
        let registered = metric.and_then(|metric| {
            self.registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        });
        match registered {
            Ok(metric) => metric,
            Err(error) => panic!("a metric cannot be registered: {error}"),
        }
    }
}

/// Counts something for as long as it lives.
#[derive(Debug)]
pub struct Counted(IntGauge);

impl Counted {
    /// One more, until this value is dropped.
    pub fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(GenericGauge::clone(gauge))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
