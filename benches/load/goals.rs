//! The goals of the data path, and whether a run meets them.

use crate::{
    case::Case,
    measure::{
        latency,
        relay::{Comparison, Figures},
    },
    rounds::median,
    suite::{LIBRARIES, Results, STREAMS},
    variants::Variant,
};

/// A bound that a figure has to keep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

use Bound::{AtLeast, AtMost};

impl Bound {
    /// Something that is not a number keeps none.
    pub(crate) fn holds(self, value: f64) -> bool {
        match self {
            AtMost(most) => value <= most,
            AtLeast(least) => value >= least,
        }
    }
}

/// What came of one goal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Aim,
    Must,
    Missed,
    NotMeasured,
}

/// One figure that is judged.
#[derive(Debug, Clone)]
pub(crate) struct Goal {
    /// The group of figures that it belongs to.
    pub(crate) number: u8,
    pub(crate) what: String,
    pub(crate) must: Bound,
    pub(crate) aim: Bound,
    pub(crate) measured: Option<f64>,
}

impl Goal {
    pub(crate) fn verdict(&self) -> Verdict {
        match self.measured {
            None => Verdict::NotMeasured,
            Some(value) if self.must.holds(value) && self.aim.holds(value) => Verdict::Aim,
            Some(value) if self.must.holds(value) => Verdict::Must,
            Some(_) => Verdict::Missed,
        }
    }
}

const RELAY_CPU: fn(&Figures) -> f64 = |figures| figures.relay_cpu;
const RATE: fn(&Figures) -> f64 = |figures| figures.rate;

/// Judges a run.
pub(crate) fn judge(results: &Results) -> Vec<Goal> {
    let mut goals = Goals(Vec::new());
    goals.against_splice(results);
    goals.against_tungstenite(results);
    goals.against_libraries(results);
    goals.tls(results);
    goals.latency(results);
    goals.memory(results);
    goals.setup(results);
    goals.end_to_end(results);
    goals.instructions(results);
    goals.0
}

struct Goals(Vec<Goal>);

impl Goals {
    fn add(&mut self, number: u8, what: impl Into<String>, must: Bound, aim: Bound, measured: Option<f64>) {
        self.0.push(Goal { number, what: what.into(), must, aim, measured });
    }

    fn against_splice(&mut self, results: &Results) {
        let of = |streams, figure| {
            results.comparison(Case::KiB16, streams)?.ratio(Variant::Midspan, Variant::TcpSplice, figure)
        };
        for (streams, must, aim) in [(1, 1.1, 1.0), (32, 1.8, 1.5)] {
            let what = format!("relay CPU/GiB against a splice(2) TCP relay, {}", many(streams));
            self.add(1, what, AtMost(must), AtMost(aim), of(streams, RELAY_CPU));
        }
        for (streams, must, aim) in [(1, 1.1, 1.2), (32, 1.3, 1.5)] {
            let what = format!("throughput against a splice(2) TCP relay, {}", many(streams));
            self.add(2, what, AtLeast(must), AtLeast(aim), of(streams, RATE));
        }
    }

    fn against_tungstenite(&mut self, results: &Results) {
        let of = |case, streams, figure| {
            results.comparison(case, streams)?.ratio(Variant::Midspan, Variant::Tungstenite, figure)
        };
        for streams in STREAMS {
            for (case, must, aim) in
                [(Case::KiB16, 1.9, 2.4), (Case::KiB1, 8.0, 12.0), (Case::Bytes64, 40.0, 80.0)]
            {
                let what = format!(
                    "throughput against tokio-tungstenite message by message, {}, {}",
                    case.title(),
                    many(streams)
                );
                self.add(3, what, AtLeast(must), AtLeast(aim), of(case, streams, RATE));
            }
            let what = format!(
                "relay CPU/GiB against tokio-tungstenite message by message, 16 KiB, {}",
                many(streams)
            );
            self.add(3, what, AtMost(0.45), AtMost(0.35), of(Case::KiB16, streams, RELAY_CPU));
        }
    }

    fn against_libraries(&mut self, results: &Results) {
        for case in Case::ALL {
            for streams in STREAMS {
                let comparison = results.comparison(case, streams);
                let mut add = |what: &str, figure, worst: fn(f64, f64) -> bool, must, aim| {
                    let worst = comparison.and_then(|one| worst_of(one, figure, worst));
                    let library = worst.map_or("any library", |(library, _)| library.name());
                    let what = format!("{what} against {library}, {}, {}", case.title(), many(streams));
                    self.add(4, what, must, aim, worst.map(|(_, ratio)| ratio));
                };
                add("relay CPU/GiB", RELAY_CPU, |one, other| one > other, AtMost(1.0), AtMost(0.9));
                add("throughput", RATE, |one, other| one < other, AtLeast(1.0), AtLeast(1.1));
            }
        }
    }

    fn tls(&mut self, results: &Results) {
        let of = |streams, reference| {
            results.tls_comparison(Case::KiB16, streams)?.ratio(Variant::MidspanTls, reference, RELAY_CPU)
        };
        for streams in STREAMS {
            let what = format!("TLS: relay CPU/GiB against tokio-tungstenite with TLS, {}", many(streams));
            self.add(5, what, AtMost(0.5), AtMost(0.45), of(streams, Variant::TungsteniteTls));
            let what = format!("TLS: relay CPU/GiB against our own plaintext, {}", many(streams));
            self.add(5, what, AtMost(1.9), AtMost(1.6), of(streams, Variant::Midspan));
        }
    }

    fn latency(&mut self, results: &Results) {
        let of = |variant| latency::ratio(&results.latency, variant, latency::REFERENCE);
        let what = "added p50 round trip on one CPU against a TCP copy hop";
        self.add(6, what, AtMost(1.03), AtMost(1.0), of(Variant::Midspan));
        self.add(6, format!("TLS: {what}"), AtMost(1.2), AtMost(1.13), of(Variant::MidspanTls));
    }

    fn memory(&mut self, results: &Results) {
        // The figure of the most streams, where there are several.
        let idle = |variant| {
            let of = results.idle.iter().filter(|idle| idle.variant == variant);
            of.max_by_key(|idle| idle.pairs).map(|idle| idle.user)
        };
        let what = "idle user memory per stream, KiB";
        self.add(7, what, AtMost(2.0), AtMost(1.5), idle(Variant::Midspan));
        self.add(7, format!("TLS: {what}"), AtMost(6.0), AtMost(5.0), idle(Variant::MidspanTls));
        let peak = results.peak.iter().find(|peak| peak.variant == Variant::Midspan).map(|peak| peak.mib);
        self.add(7, "peak with four streams of 64 MiB messages, MiB", AtMost(16.0), AtMost(12.0), peak);
    }

    fn setup(&mut self, results: &Results) {
        let of = |variant| {
            let series = results.setup.iter().find(|series| series.variant == variant)?;
            Some(1e6 / median(series.rounds.iter().map(|cost| cost.open)))
        };
        let what = "streams opened per CPU second";
        self.add(8, what, AtLeast(15_000.0), AtLeast(18_000.0), of(Variant::Midspan));
        let what = format!("TLS, full handshakes: {what}");
        self.add(8, what, AtLeast(4500.0), AtLeast(5000.0), of(Variant::MidspanTls));
    }

    fn end_to_end(&mut self, results: &Results) {
        let of = |streams, peer, figure| {
            results.end_to_end_comparison(streams)?.ratio(Variant::MidspanProxies, peer, figure)
        };
        for peer in [Variant::Rathole, Variant::Bore] {
            for streams in STREAMS {
                let what = format!("end to end: throughput against {peer}, {}", many(streams));
                self.add(9, what, AtLeast(1.0), AtLeast(1.0), of(streams, peer, RATE));
            }
        }
        for (streams, must, aim) in [(1, 0.9, 1.05), (32, 1.05, 1.3)] {
            let what = format!("end to end: throughput against wstunnel, {}", many(streams));
            self.add(9, what, AtLeast(must), AtLeast(aim), of(streams, Variant::Wstunnel, RATE));
        }
        let what = "end to end: relay CPU/GiB against wstunnel, 32 streams";
        self.add(9, what, AtMost(0.7), AtMost(0.6), of(32, Variant::Wstunnel, RELAY_CPU));
    }

    fn instructions(&mut self, results: &Results) {
        let measured = results.instructions;
        let what = "user instructions per 64-byte message";
        self.add(10, what, AtMost(250.0), AtMost(150.0), measured.map(|one| one.per_small_message));
        let what = "user instructions per byte at 16 KiB";
        self.add(10, what, AtMost(0.12), AtMost(0.08), measured.map(|one| one.per_byte));
    }
}

fn many(streams: usize) -> String {
    if streams == 1 { "1 stream".to_owned() } else { format!("{streams} streams") }
}

/// The library against which we look worst.
fn worst_of(
    comparison: &Comparison,
    figure: fn(&Figures) -> f64,
    worse: fn(f64, f64) -> bool,
) -> Option<(Variant, f64)> {
    let ratios = LIBRARIES
        .into_iter()
        .filter_map(|library| Some((library, comparison.ratio(Variant::Midspan, library, figure)?)));
    ratios.reduce(|worst, one| if worse(one.1, worst.1) { one } else { worst })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{end_to_end::EndToEnd, relay::Series};

    fn goal(must: Bound, aim: Bound, measured: Option<f64>) -> Verdict {
        Goal { number: 0, what: String::new(), must, aim, measured }.verdict()
    }

    #[test]
    fn a_figure_is_judged_by_its_bounds() {
        let (must, aim) = (AtMost(1.1), AtMost(1.0));
        assert_eq!(goal(must, aim, Some(1.0)), Verdict::Aim);
        assert_eq!(goal(must, aim, Some(1.05)), Verdict::Must);
        assert_eq!(goal(must, aim, Some(1.11)), Verdict::Missed);
        assert_eq!(goal(must, aim, Some(f64::NAN)), Verdict::Missed);
        assert_eq!(goal(must, aim, None), Verdict::NotMeasured);
        assert_eq!(goal(AtLeast(1.3), AtLeast(1.5), Some(1.4)), Verdict::Must);
        assert_eq!(goal(AtLeast(1.3), AtLeast(1.5), Some(1.2)), Verdict::Missed);
    }

    fn series(variant: Variant, relay_cpu: f64, rate: f64) -> Series {
        Series { variant, rounds: vec![Figures { relay_cpu, total_cpu: 1.0, rate, messages: rate }; 3] }
    }

    #[test]
    fn an_empty_run_meets_nothing() {
        let goals = judge(&Results::default());
        assert!(goals.iter().all(|goal| goal.verdict() == Verdict::NotMeasured));
        let mut numbers: Vec<_> = goals.iter().map(|goal| goal.number).collect();
        numbers.dedup();
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    }

    #[test]
    fn the_worst_library_is_the_one_that_counts() {
        let series = vec![
            series(Variant::TcpSplice, 0.2, 2.0),
            series(Variant::Tungstenite, 0.8, 1.0),
            series(Variant::Fastwebsockets, 0.3, 3.0),
            series(Variant::Midspan, 0.24, 2.4),
        ];
        let comparison = Comparison { case: Case::KiB16, streams: 1, series };
        let results = Results { relays: vec![comparison], ..Results::default() };
        let goals = judge(&results);
        let find = |number, text: &str| {
            goals.iter().find(|goal| goal.number == number && goal.what.contains(text)).unwrap()
        };
        assert_eq!(find(1, "1 stream").verdict(), Verdict::Missed);
        assert_eq!(find(2, "1 stream").verdict(), Verdict::Aim);
        assert_eq!(find(3, "CPU/GiB against tokio-tungstenite").verdict(), Verdict::Aim);
        assert_eq!(find(4, "relay CPU/GiB against fastwebsockets, 16 KiB").verdict(), Verdict::Aim);
        assert_eq!(find(4, "throughput against fastwebsockets, 16 KiB").verdict(), Verdict::Missed);
    }

    #[test]
    fn tunnels_are_compared_from_end_to_end() {
        let series = vec![
            series(Variant::MidspanProxies, 0.3, 1.0),
            series(Variant::Wstunnel, 0.4, 0.9),
            series(Variant::Rathole, 0.5, 1.1),
        ];
        let comparison = Comparison { case: Case::KiB16, streams: 32, series };
        let end_to_end = EndToEnd { comparisons: vec![comparison], idle: Vec::new() };
        let goals = judge(&Results { end_to_end, ..Results::default() });
        let find = |text: &str| {
            goals.iter().find(|goal| goal.number == 9 && goal.what.contains(text)).unwrap().verdict()
        };
        assert_eq!(find("throughput against wstunnel, 32"), Verdict::Must);
        assert_eq!(find("relay CPU/GiB against wstunnel, 32"), Verdict::Missed);
        assert_eq!(find("throughput against rathole, 32"), Verdict::Missed);
        assert_eq!(find("throughput against rathole, 1 stream"), Verdict::NotMeasured);
        assert_eq!(find("throughput against bore, 32"), Verdict::NotMeasured);
    }
}
