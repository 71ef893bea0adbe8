//! Everything, one after the other, as `scripts/bench` runs it.

use std::{path::Path, process::Command, time::Duration};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::{
    case::Case,
    measure::{
        end_to_end::{self, EndToEnd},
        idle::{self, Idle},
        instructions::{self, Instructions},
        latency,
        peak::{self, Peak},
        relay::{self, Comparison, Plan},
        setup,
    },
    report::text,
    rounds, system,
    tls::Certificate,
    variants::Variant,
};

/// All that was measured in one run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) machine: Machine,
    /// Whether everything was kept short, so that the figures are rough.
    pub(crate) quick: bool,
    pub(crate) rounds: usize,
    pub(crate) relays: Vec<Comparison>,
    pub(crate) tls: Vec<Comparison>,
    pub(crate) latency: Vec<latency::Series>,
    pub(crate) setup: Vec<setup::Series>,
    pub(crate) idle: Vec<Idle>,
    pub(crate) peak: Vec<Peak>,
    pub(crate) instructions: Option<Instructions>,
    #[serde(default)]
    pub(crate) end_to_end: EndToEnd,
    /// What could not be measured, and why.
    pub(crate) missing: Vec<String>,
}

/// Where it was measured.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) kernel: String,
    /// TCP's, which decides whether what is sent is paced; nothing in results from before it was recorded.
    #[serde(default)]
    pub(crate) congestion_control: String,
    pub(crate) compiler: String,
    /// Other work per CPU at the start: the load average of the last minute.
    pub(crate) load: f64,
}

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent {
    rounds: usize,
    warm_up: Duration,
    long: Duration,
    short: Duration,
    round_trips: Duration,
    setup_pairs: usize,
    idle_pairs: usize,
    many_pairs: usize,
    /// `midspan connect` has up to 1,024 streams at a time.
    proxied_pairs: usize,
}

impl Extent {
    pub(crate) fn full() -> Self {
        Self {
            rounds: 7,
            warm_up: Duration::from_millis(200),
            long: Duration::from_secs(1),
            short: Duration::from_millis(600),
            round_trips: Duration::from_millis(400),
            setup_pairs: 1024,
            idle_pairs: 4000,
            many_pairs: 9000,
            proxied_pairs: 900,
        }
    }

    pub(crate) fn quick() -> Self {
        Self {
            rounds: 3,
            warm_up: Duration::from_millis(80),
            long: Duration::from_millis(150),
            short: Duration::from_millis(100),
            round_trips: Duration::from_millis(100),
            setup_pairs: 128,
            idle_pairs: 500,
            many_pairs: 1500,
            proxied_pairs: 200,
        }
    }
}

/// Relays that know frames and are made with a library.
pub(crate) const LIBRARIES: [Variant; 4] = [
    Variant::Tungstenite,
    Variant::TungsteniteForward,
    Variant::Fastwebsockets,
    Variant::FastwebsocketsBatched,
];

pub(crate) const STREAMS: [usize; 2] = [1, 32];

pub(crate) fn run(quick: bool, peers: bool, folder: &Path, certificate: &Certificate) -> Result<Results> {
    let extent = if quick { Extent::quick() } else { Extent::full() };
    let mut results = Results { machine: machine(), quick, rounds: extent.rounds, ..Results::default() };
    let show = |one: &Comparison, reference| text::print(&text::comparison(one, Some(reference)));

    let mut all = vec![Variant::Direct, Variant::TcpSplice, Variant::TcpCopy, Variant::TcpBidirectional];
    all.extend(LIBRARIES);
    all.push(Variant::Midspan);
    let long = Plan { rounds: extent.rounds, warm_up: extent.warm_up, time: extent.long };
    let cases = STREAMS.map(|streams| (Case::KiB16, streams));
    results.relays = relay::compare(&all, &cases, long, folder, certificate, |one| {
        show(one, Variant::TcpSplice);
        Ok(())
    })?;

    let mut frames = vec![Variant::TcpSplice];
    frames.extend(LIBRARIES);
    frames.push(Variant::Midspan);
    let short = Plan { rounds: extent.rounds, warm_up: extent.warm_up, time: extent.short };
    let others = Case::ALL.into_iter().filter(|&case| case != Case::KiB16);
    let cases: Vec<_> = others.flat_map(|case| STREAMS.map(|streams| (case, streams))).collect();
    results.relays.extend(relay::compare(&frames, &cases, short, folder, certificate, |one| {
        show(one, Variant::Fastwebsockets);
        Ok(())
    })?);

    let tls = [Variant::Midspan, Variant::TungsteniteTls, Variant::MidspanTls];
    let cases = STREAMS.map(|streams| (Case::KiB16, streams));
    results.tls = relay::compare(&tls, &cases, long, folder, certificate, |one| {
        show(one, Variant::TungsteniteTls);
        Ok(())
    })?;

    let round_trips = Plan { rounds: extent.rounds, warm_up: extent.warm_up, time: extent.round_trips };
    results.latency = latency::compare(&latency::VARIANTS, round_trips, folder, certificate)?;
    text::print(&text::latency(&results.latency, latency::REFERENCE));

    let handshakes = [
        Variant::Midspan,
        Variant::Tungstenite,
        Variant::Fastwebsockets,
        Variant::MidspanTls,
        Variant::TungsteniteTls,
    ];
    results.setup = setup::compare(&handshakes, extent.rounds, extent.setup_pairs, folder, certificate)?;
    text::print(&text::setup(&results.setup));

    let mut idle = handshakes.map(|variant| (variant, extent.idle_pairs)).to_vec();
    idle.push((Variant::Midspan, extent.many_pairs));
    for (variant, pairs) in idle {
        let one = idle::measure(variant, pairs, folder, certificate)?;
        text::print(&text::idle(&one));
        results.idle.push(one);
    }
    for variant in handshakes {
        let one = peak::measure(variant, folder, certificate)?;
        text::print(&text::peak(&one));
        results.peak.push(one);
    }
    match instructions::measure(folder) {
        Ok(Some(one)) => {
            text::print(&text::instructions(&one));
            results.instructions = Some(one);
        }
        Ok(None) => results.missing.push("instructions: valgrind is not installed".to_owned()),
        Err(error) => results.missing.push(format!("instructions: {error:#}")),
    }
    if peers {
        // The last part, and the one with programs of others: what was measured before it is kept.
        match end_to_end::measure(&STREAMS, long, extent.proxied_pairs, folder, certificate) {
            Ok((one, missing)) => {
                results.end_to_end = one;
                results.missing.extend(missing);
            }
            Err(error) => results.missing.push(format!("end to end: {error:#}")),
        }
    } else {
        results.missing.push("end to end: not measured without `--peers`".to_owned());
    }
    Ok(results)
}

pub(crate) fn machine() -> Machine {
    let (cpu, cores, kernel) = system::machine();
    let compiler = Command::new("rustc").arg("--version").output();
    let compiler = compiler.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    Machine {
        cpu,
        cores,
        kernel,
        congestion_control: system::congestion_control(),
        compiler: compiler.unwrap_or_default(),
        load: system::load(),
    }
}

impl Results {
    /// One comparison.
    pub(crate) fn comparison(&self, case: Case, streams: usize) -> Option<&Comparison> {
        find(&self.relays, case, streams)
    }

    pub(crate) fn end_to_end_comparison(&self, streams: usize) -> Option<&Comparison> {
        find(&self.end_to_end.comparisons, Case::KiB16, streams)
    }

    pub(crate) fn tls_comparison(&self, case: Case, streams: usize) -> Option<&Comparison> {
        find(&self.tls, case, streams)
    }
}

fn find(comparisons: &[Comparison], case: Case, streams: usize) -> Option<&Comparison> {
    comparisons.iter().find(|one| one.case == case && one.streams == streams)
}

impl Comparison {
    /// The median of the ratios of two variants.
    pub(crate) fn ratio(
        &self,
        ours: Variant,
        reference: Variant,
        figure: fn(&relay::Figures) -> f64,
    ) -> Option<f64> {
        let of = |variant| self.series.iter().find(|series| series.variant == variant);
        Some(rounds::ratio(&of(ours)?.rounds, &of(reference)?.rounds, figure))
    }
}
