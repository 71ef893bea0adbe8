//! The load generator: starts relays, sends through them, and says what it cost.

mod case;
mod clock;
mod connection;
mod device;
mod fleet;
mod frames;
mod gates;
mod goals;
mod measure;
mod midspan;
mod number;
mod poller;
mod process;
mod receiver;
mod records;
mod relays;
mod report;
mod rounds;
mod scale;
mod sender;
mod suite;
mod system;
mod systems;
mod tls;
mod variants;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result};
use case::Case;
use clap::{Args, Parser, Subcommand};
use measure::{
    calls, end_to_end, idle, instructions, latency, peak,
    relay::{self, Plan},
    setup, stalled,
};
use report::text;
use tls::Certificate;
use variants::Variant;

/// Before a measurement begins, the traffic runs for so long.
const WARM_UP: Duration = Duration::from_millis(250);

#[derive(Debug, Parser)]
#[command(version, about = "Measures Midspan's data path beside other relays")]
struct Arguments {
    #[command(subcommand)]
    measurement: Measurement,
}

#[derive(Debug, Subcommand)]
enum Measurement {
    /// CPU and throughput, from the service to the device
    Relay(RelayArguments),
    /// Round trips of 64 bytes, with everything on one CPU
    Latency(LatencyArguments),
    /// The relay's CPU for opening and closing streams
    Setup(SetupArguments),
    /// Memory of idle streams, and all of them used at once
    Idle(IdleArguments),
    /// Memory with four streams of 64 MiB messages
    Peak(PeakArguments),
    /// Memory with readers that do not read, and when they read again
    Stalled(StalledArguments),
    /// From a TCP client to a TCP server through local proxies, beside other tunnels
    EndToEnd(EndToEndArguments),
    /// Midspan's user instructions per message, by callgrind
    Instructions,
    /// Midspan's system calls per message, by strace
    Calls,
    /// What noise hardly moves, against bounds; fails when one is not kept
    Gates,
    /// Everything, with the results written to files
    All(AllArguments),
    /// Device links, handshakes, and the ways to the owner among one, two and four edges; needs redis-server
    Scale(ScaleArguments),
    /// Write the results and the chart again, from results.json
    Report(FolderArguments),
}

#[derive(Debug, Args)]
struct AllArguments {
    /// Short turns and few rounds
    #[arg(long)]
    quick: bool,
    /// Other tunnels, too, from end to end
    #[arg(long)]
    peers: bool,
    #[command(flatten)]
    folder: FolderArguments,
}

#[derive(Debug, Args)]
struct ScaleArguments {
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Device links
    #[arg(long, default_value_t = 15_000)]
    links: usize,
    /// Requests for streams
    #[arg(long, default_value_t = 8000)]
    handshakes: usize,
    /// How long the links rest
    #[arg(long, default_value_t = 60.0)]
    rest_seconds: f64,
    /// Length of a turn
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    #[command(flatten)]
    folder: FolderArguments,
}

#[derive(Debug, Args)]
struct FolderArguments {
    /// Folder of the results
    #[arg(long, default_value = "benches/results")]
    results: PathBuf,
}

#[derive(Debug, Args)]
struct LatencyArguments {
    /// What is compared
    #[arg(long, value_delimiter = ',', default_values_t = latency::VARIANTS)]
    variants: Vec<Variant>,
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Length of a turn
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Whose added time is 1
    #[arg(long, default_value = "tcp-copy")]
    reference: Variant,
}

#[derive(Debug, Args)]
struct SetupArguments {
    /// What is compared
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "midspan,tungstenite,fastwebsockets,midspan-tls,tungstenite-tls"
    )]
    variants: Vec<Variant>,
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Pairs that are opened and closed in one turn
    #[arg(long, default_value_t = 512)]
    pairs: usize,
}

#[derive(Debug, Args)]
struct IdleArguments {
    /// What is looked at
    #[arg(long, value_delimiter = ',', default_value = "midspan,midspan-tls")]
    variants: Vec<Variant>,
    /// Streams
    #[arg(long, default_value_t = 4000)]
    pairs: usize,
}

#[derive(Debug, Args)]
struct PeakArguments {
    /// What is looked at
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "midspan,tungstenite,fastwebsockets,midspan-tls,tungstenite-tls"
    )]
    variants: Vec<Variant>,
}

#[derive(Debug, Args)]
struct StalledArguments {
    /// What is looked at
    #[arg(long, value_delimiter = ',', default_value = "midspan")]
    variants: Vec<Variant>,
    /// Streams
    #[arg(long, default_value_t = 1000)]
    streams: usize,
}

#[derive(Debug, Args)]
struct EndToEndArguments {
    /// Streams at a time
    #[arg(long, value_delimiter = ',', default_value = "1,32")]
    streams: Vec<usize>,
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Length of a turn
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Idle streams
    #[arg(long, default_value_t = 500)]
    idle: usize,
}

#[derive(Debug, Args)]
struct RelayArguments {
    /// What is compared
    #[arg(long, value_delimiter = ',', default_value = "midspan,tcp-splice,tungstenite,fastwebsockets")]
    variants: Vec<Variant>,
    /// What is sent
    #[arg(long = "case", value_delimiter = ',', default_value = "16k")]
    cases: Vec<Case>,
    /// Streams at a time
    #[arg(long, value_delimiter = ',', default_value = "1,32")]
    streams: Vec<usize>,
    /// Rounds, in each of which every variant has one turn
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Length of a turn
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Which variant the ratios refer to; the second one, unless it is said
    #[arg(long)]
    reference: Option<Variant>,
    /// Write all figures of all rounds to this file (JSON)
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    system::raise_open_files()?;
    let folder = tempfile::tempdir()?;
    let certificate = Certificate::new(folder.path())?;
    let (folder, certificate) = (folder.path(), &certificate);
    match arguments.measurement {
        Measurement::Relay(arguments) => relay(&arguments, folder, certificate),
        Measurement::Latency(LatencyArguments { variants, rounds, seconds, reference }) => {
            let plan = Plan { rounds, warm_up: WARM_UP, time: Duration::try_from_secs_f64(seconds)? };
            let series = latency::compare(&variants, plan, folder, certificate)?;
            text::print(&text::latency(&series, reference));
            Ok(())
        }
        Measurement::Setup(SetupArguments { variants, rounds, pairs }) => {
            let series = setup::compare(&variants, rounds, pairs, folder, certificate)?;
            text::print(&text::setup(&series));
            Ok(())
        }
        Measurement::Idle(IdleArguments { variants, pairs }) => variants.iter().try_for_each(|&variant| {
            text::print(&text::idle(&idle::measure(variant, pairs, folder, certificate)?));
            Ok(())
        }),
        Measurement::Peak(PeakArguments { variants }) => variants.iter().try_for_each(|&variant| {
            text::print(&text::peak(&peak::measure(variant, folder, certificate)?));
            Ok(())
        }),
        Measurement::Instructions => {
            let counted = instructions::measure(folder)?.context("valgrind is not installed")?;
            text::print(&text::instructions(&counted));
            Ok(())
        }
        Measurement::Stalled(StalledArguments { variants, streams }) => {
            variants.iter().try_for_each(|&variant| {
                text::print(&text::stalled(&stalled::measure(variant, streams, folder, certificate)?));
                Ok(())
            })
        }
        Measurement::EndToEnd(arguments) => end_to_end(&arguments, folder, certificate),
        Measurement::Calls => {
            text::print(&text::calls(&calls::measure(folder, certificate)?));
            Ok(())
        }
        Measurement::Gates => gates::run(folder, certificate),
        Measurement::All(AllArguments { quick, peers, folder: results }) => {
            report::write(&suite::run(quick, peers, folder, certificate)?, &results.results)
        }
        Measurement::Scale(ScaleArguments {
            rounds,
            links,
            handshakes,
            rest_seconds,
            seconds,
            folder: results,
        }) => {
            let extent = scale::Extent {
                rounds,
                links,
                handshakes,
                rest: Duration::try_from_secs_f64(rest_seconds)?,
                turn: Duration::try_from_secs_f64(seconds)?,
            };
            scale::run(extent, &results.results, folder, certificate)
        }
        Measurement::Report(FolderArguments { results: folder }) => {
            let file = folder.join("results.json");
            let text =
                fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            report::write(&serde_json::from_str(&text)?, &folder)
        }
    }
}

fn end_to_end(arguments: &EndToEndArguments, folder: &Path, certificate: &Certificate) -> Result<()> {
    let EndToEndArguments { streams, rounds, seconds, idle } = arguments;
    let plan = Plan { rounds: *rounds, warm_up: WARM_UP, time: Duration::try_from_secs_f64(*seconds)? };
    let (results, missing) = end_to_end::measure(streams, plan, *idle, folder, certificate)?;
    for one in &results.idle {
        text::print(&text::idle(one));
    }
    for missing in &missing {
        text::print(missing);
    }
    Ok(())
}

fn relay(arguments: &RelayArguments, folder: &Path, certificate: &Certificate) -> Result<()> {
    let reference = arguments.reference.or(arguments.variants.get(1).copied());
    let plan = Plan {
        rounds: arguments.rounds,
        warm_up: WARM_UP,
        time: Duration::try_from_secs_f64(arguments.seconds)?,
    };
    let with_streams = |&case| arguments.streams.iter().map(move |&streams| (case, streams));
    let cases: Vec<_> = arguments.cases.iter().flat_map(with_streams).collect();
    let all = relay::compare(&arguments.variants, &cases, plan, folder, certificate, |one| {
        text::print(&text::comparison(one, reference));
        Ok(())
    })?;
    if let Some(file) = &arguments.json {
        fs::write(file, serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}

#[expect(clippy::print_stderr, reason = "the one message of a program that failed")]
fn complain(error: &anyhow::Error) {
    eprintln!("bench: {error:#}");
}
