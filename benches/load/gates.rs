//! Figures that noise hardly moves, and the bounds that a change must keep.

use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::{
    measure::{calls, idle, instructions, peak, stalled},
    report::text,
    tls::Certificate,
    variants::Variant,
};

/// Streams that are idle, and streams whose reader does not read.
const IDLE: usize = 2000;
const STALLED: usize = 1000;

/// How often system calls are counted.
const TRIES: usize = 3;

/// One figure that must not grow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gate {
    pub(crate) what: &'static str,
    /// The most that is let through: a little above what was measured when it was set.
    pub(crate) bound: f64,
    /// The goal of the data path that it leads to, where there is one.
    pub(crate) must: Option<f64>,
}

const fn gate(what: &'static str, bound: f64, must: Option<f64>) -> Gate {
    Gate { what, bound, must }
}

// Bounds are lowered when a figure has become better, to 10 or 15 % above it; more where it moves from run to run.
const INSTRUCTIONS: [Gate; 2] = [
    gate("user instructions per 64-byte message", 150.0, Some(250.0)),
    gate("user instructions per byte at 16 KiB", 0.12, Some(0.12)),
];
const CALLS: [Gate; 4] = [
    gate("system calls per 64-byte message, one at a time", 3.5, None),
    // These two depend on how much a socket holds when it is looked at. A relay that writes each message by itself has more than
    // 65,000 calls, and 64 writes per read.
    gate("system calls per GiB at 16 KiB", 15_000.0, None),
    gate("writes per read at 16 KiB", 2.0, None),
    gate("system calls per GiB at 16 KiB, TLS", 15_000.0, None),
];
const IDLE_PLAINTEXT: [Gate; 1] = [gate("KiB of user memory per idle stream", 2.3, Some(2.0))];
const IDLE_TLS: [Gate; 1] = [gate("KiB of user memory per idle stream, TLS", 6.0, Some(6.0))];
const PEAK: [Gate; 1] = [gate("MiB at the most with four streams of 64 MiB messages", 6.0, Some(16.0))];
const PEAK_TLS: [Gate; 1] =
    [gate("MiB at the most with four streams of 64 MiB messages, TLS", 8.0, Some(16.0))];
const READERS: [Gate; 2] = [
    gate("MiB more while 1,000 readers do not read", 110.0, None),
    gate("MiB more at the most, until they have read everything", 120.0, None),
];

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) gate: Gate,
    pub(crate) measured: Option<f64>,
}

impl Line {
    /// What could not be measured keeps no bound, and nor does what is not a number.
    pub(crate) fn holds(&self) -> bool {
        self.measured.is_some_and(|measured| measured <= self.gate.bound)
    }
}

/// Measures everything, prints the table, and fails when a bound is not kept.
pub(crate) fn run(folder: &Path, certificate: &Certificate) -> Result<()> {
    let idle = |variant| idle::measure(variant, IDLE, folder, certificate).map(|one| [one.user]);
    let mut table = Table::default();
    table.add(
        INSTRUCTIONS,
        instructions::measure(folder)
            .and_then(|one| one.context("valgrind is not installed"))
            .map(|one| [one.per_small_message, one.per_byte]),
    );
    table.add(CALLS, least_calls(folder, certificate));
    table.add(IDLE_PLAINTEXT, idle(Variant::Midspan));
    table.add(IDLE_TLS, idle(Variant::MidspanTls));
    let peak = |variant| peak::measure(variant, folder, certificate).map(|one| [one.mib]);
    table.add(PEAK, peak(Variant::Midspan));
    table.add(PEAK_TLS, peak(Variant::MidspanTls));
    table.add(
        READERS,
        stalled::measure(Variant::Midspan, STALLED, folder, certificate).map(|one| [one.held, one.peak]),
    );
    text::print(&text::gates(&table.lines));
    for failure in &table.failures {
        text::print(failure);
    }
    let missed: Vec<_> = table.lines.iter().filter(|line| !line.holds()).map(|line| line.gate.what).collect();
    if !missed.is_empty() {
        bail!("missed: {}", missed.join("; "));
    }
    text::print("every bound is kept");
    Ok(())
}

/// The least of some tries: other work on the machine only adds calls, by putting the relay to sleep more often.
fn least_calls(folder: &Path, certificate: &Certificate) -> Result<[f64; 4]> {
    let mut least = [f64::INFINITY; 4];
    for _ in 0..TRIES {
        let one = calls::measure(folder, certificate)?;
        let figures = [one.per_small_message, one.per_gib, one.writes_per_read, one.per_gib_tls];
        least = std::array::from_fn(|place| least[place].min(figures[place]));
    }
    Ok(least)
}

#[derive(Debug, Default)]
struct Table {
    lines: Vec<Line>,
    failures: Vec<String>,
}

impl Table {
    /// The figures of one measurement. If it failed, the others go on.
    fn add<const N: usize>(&mut self, gates: [Gate; N], measured: Result<[f64; N]>) {
        if let Err(error) = &measured {
            self.failures.push(format!("not measured: {}: {error:#}", gates[0].what));
        }
        let measured = measured.ok();
        let of = |place: usize| measured.map(|measured| measured[place]);
        self.lines.extend((0..N).map(|place| Line { gate: gates[place], measured: of(place) }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_kept_by_what_was_measured_and_is_no_greater() {
        let holds = |measured| Line { gate: gate("x", 2.0, None), measured }.holds();
        assert!(holds(Some(2.0)));
        assert!(!holds(Some(2.1)) && !holds(Some(f64::NAN)) && !holds(None));
    }

    #[test]
    fn a_measurement_that_fails_misses_its_bounds() {
        let mut table = Table::default();
        table.add(CALLS, Err(anyhow::anyhow!("no strace")));
        table.add(PEAK, Ok([1.0]));
        assert_eq!(table.lines.iter().filter(|line| line.holds()).count(), 1);
        assert_eq!(table.lines.len(), CALLS.len() + 1);
        assert!(table.failures[0].ends_with("no strace"));
    }
}
