//! From a TCP client through a local proxy, a relay and another local proxy to a TCP server.

use serde::{Deserialize, Serialize};

use crate::{measure::relay::Figures, rounds};

/// One comparison, with some streams at a time.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct EndToEnd {
    pub(crate) streams: usize,
    pub(crate) series: Vec<Series>,
}

/// All rounds of one system.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Series {
    pub(crate) system: String,
    pub(crate) rounds: Vec<Figures>,
}

impl EndToEnd {
    /// The median of the ratios of two systems.
    pub(crate) fn ratio(&self, ours: &str, reference: &str, figure: fn(&Figures) -> f64) -> Option<f64> {
        let of = |system| self.series.iter().find(|series| series.system == system);
        Some(rounds::ratio(&of(ours)?.rounds, &of(reference)?.rounds, figure))
    }
}
