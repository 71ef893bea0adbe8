//! Tables on the terminal.

use std::fmt::Write as _;

use crate::{
    gates::{Gate, Line},
    goals::{Goal, Verdict},
    measure::{
        calls::Calls,
        idle::Idle,
        instructions::Instructions,
        latency,
        peak::Peak,
        relay::{Comparison, Figures, Series},
        setup,
        stalled::Stalled,
    },
    rounds::{median, ratio},
    variants::Variant,
};

#[expect(clippy::print_stdout, reason = "tables are what this program is for")]
pub(crate) fn print(text: &str) {
    println!("{text}");
}

/// Median round trips, and what the relay adds to those between the same ends without one.
pub(crate) fn latency(series: &[latency::Series], reference: Variant) -> String {
    let mut text = format!(
        "{:24} {:>12} {:>12} {:>24}",
        "round trips, one CPU", "p50 us", "added us", "added, to the reference"
    );
    for one in series {
        let added = latency::added(series, one.variant).map(median);
        let ratio = latency::ratio(series, one.variant, reference);
        let cell = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        let _ = write!(
            text,
            "\n{:24} {:>12.2} {:>12} {:>24}",
            one.variant.name(),
            median(one.p50.iter().copied()),
            cell(added),
            cell(ratio)
        );
    }
    text
}

/// CPU of the relay for each pair.
pub(crate) fn setup(series: &[setup::Series]) -> String {
    let mut text = format!(
        "{:24} {:>14} {:>14} {:>14} {:>22}",
        "CPU us a pair", "opening", "closing", "both", "opened a CPU second"
    );
    for one in series {
        let of = |part: fn(&setup::Cost) -> f64| median(one.rounds.iter().map(part));
        let open = of(|cost| cost.open);
        let _ = write!(
            text,
            "\n{:24} {open:>14.1} {:>14.1} {:>14.1} {:>22.0}",
            one.variant.name(),
            of(|cost| cost.close),
            of(|cost| cost.both()),
            1e6 / open
        );
    }
    text
}

/// Memory of idle streams.
pub(crate) fn idle(idle: &Idle) -> String {
    let Idle { variant, pairs, user, resident, used_at_once } = idle;
    format!(
        "{:24} {pairs} idle streams: {user:.2} KiB of user memory a stream ({resident:.2} KiB resident); \
         all of them used at once: {pairs} messages arrived in {used_at_once:.2} s",
        variant.name()
    )
}

/// Memory with large messages.
pub(crate) fn peak(peak: &Peak) -> String {
    format!("{:24} peak with four streams of 64 MiB messages: {:.1} MiB", peak.variant.name(), peak.mib)
}

/// What callgrind counted.
pub(crate) fn instructions(one: &Instructions) -> String {
    let Instructions { per_small_message, per_byte } = one;
    format!("user instructions: {per_small_message:.0} per 64-byte message, {per_byte:.3} per byte at 16 KiB")
}

/// Memory with readers that do not read.
pub(crate) fn stalled(one: &Stalled) -> String {
    let Stalled { variant, streams, held, peak } = one;
    format!(
        "{:24} {streams} stalled readers: {held:.1} MiB more while none reads, {peak:.1} MiB at the most; every byte arrived",
        variant.name()
    )
}

/// What strace counted.
pub(crate) fn calls(one: &Calls) -> String {
    let Calls { per_small_message, per_gib, writes_per_read, per_gib_tls } = one;
    format!(
        "system calls: {per_small_message:.2} per 64-byte message, one at a time; {per_gib:.0} per GiB at 16 KiB, \
         {writes_per_read:.2} writes per read; {per_gib_tls:.0} per GiB with TLS"
    )
}

/// What the gates say.
pub(crate) fn gates(lines: &[Line]) -> String {
    let mut text = format!("{:58} {:>10} {:>10} {:>10}", "figure", "measured", "bound", "goal");
    for line in lines {
        let Gate { what, bound, must } = line.gate;
        let cell = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
        let verdict = if line.holds() { "ok" } else { "MISSED" };
        let _ = write!(
            text,
            "\n{what:58} {:>10} {:>10} {:>10}  {verdict}",
            cell(line.measured),
            number(bound),
            cell(must)
        );
    }
    text
}

/// The goals of the data path.
pub(crate) fn goals(goals: &[Goal]) -> String {
    let mut text = String::new();
    for goal in goals {
        let measured = goal.measured.map_or_else(|| "-".to_owned(), number);
        let line =
            format!("{:>2} {:<84} {measured:>10}  {}\n", goal.number, goal.what, verdict(goal.verdict()));
        text.push_str(&line);
    }
    text
}

/// Three digits that count, and no more.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        middle if middle >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

pub(crate) fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Aim => "aim met",
        Verdict::Must => "must met, aim missed",
        Verdict::Missed => "MISSED",
        Verdict::NotMeasured => "not measured",
    }
}

/// One comparison: the medians, and the ratios to a reference in brackets.
pub(crate) fn comparison(comparison: &Comparison, reference: Option<Variant>) -> String {
    let Comparison { case, streams, series } = comparison;
    let reference = reference.and_then(|reference| series.iter().find(|series| series.variant == reference));
    let against = reference.map(|reference| format!(" (ratios to {})", reference.variant.name()));
    let mut text = format!(
        "\n{} x {streams}{}\n{:24} {:>17} {:>17} {:>17} {:>22}",
        case.name(),
        against.unwrap_or_default(),
        "",
        "relay CPU s/GiB",
        "all CPU s/GiB",
        "GiB/s",
        "messages/s"
    );
    for series in series {
        let _ = write!(text, "\n{:24}", series.variant.name());
        for figure in FIGURES {
            let digits = if figure.name == "messages" { 0 } else { 3 };
            let _ =
                write!(text, " {:>width$}", cell(series, reference, figure, digits), width = figure.width);
        }
    }
    text
}

struct Figure {
    name: &'static str,
    width: usize,
    of: fn(&Figures) -> f64,
}

const FIGURES: [&Figure; 4] = [
    &Figure { name: "relay_cpu", width: 17, of: |figures| figures.relay_cpu },
    &Figure { name: "total_cpu", width: 17, of: |figures| figures.total_cpu },
    &Figure { name: "rate", width: 17, of: |figures| figures.rate },
    &Figure { name: "messages", width: 22, of: |figures| figures.messages },
];

fn cell(series: &Series, reference: Option<&Series>, figure: &Figure, digits: usize) -> String {
    let value = median(series.rounds.iter().map(figure.of));
    if figure.name == "relay_cpu" && !series.variant.has_relay() {
        return "-".to_owned();
    }
    let ratio = reference.map(|reference| ratio(&series.rounds, &reference.rounds, figure.of));
    let ratio = ratio.filter(|ratio| ratio.is_finite()).map(|ratio| format!(" ({ratio:.2})"));
    format!("{value:.digits$}{}", ratio.unwrap_or_default())
}
