//! The chart: bars for CPU and throughput, at one stream and at many.

use std::fmt::Write as _;

use crate::{
    case::Case,
    measure::relay::{Comparison, Figures, Series},
    report::text::number,
    rounds::median,
    suite::{Results, STREAMS},
};

const WIDTH: f64 = 880.0;
const LABELS: f64 = 290.0;
const PANEL: f64 = 280.0;
/// Room behind a bar for its figure.
const FIGURE: f64 = 48.0;
const ROW: f64 = 21.0;
const BAR: f64 = 14.0;
const HEAD: f64 = 60.0;
const GAP: f64 = 46.0;

/// Colours that can be read on light and on dark ground.
const STYLE: &str = "text{font:13px system-ui,sans-serif;fill:#57606a}.t{font-weight:600;font-size:15px}.n{font-size:12px}\
    .o{fill:#0a7ea4}.p{fill:#9aa4ae}.b{font-weight:600}\
    @media(prefers-color-scheme:dark){text{fill:#b1bac4}.o{fill:#3fb6dd}.p{fill:#6e7781}}";

struct Block<'a> {
    title: String,
    series: Vec<&'a Series>,
}

/// Nothing but a title when there is nothing to show.
pub(crate) fn write(results: &Results) -> String {
    let blocks: Vec<_> = blocks(results);
    let rows: usize = blocks.iter().map(|block| block.series.len()).sum();
    let height =
        HEAD + (0..rows).fold(0.0, |sum, _| sum + ROW) + (0..blocks.len()).fold(0.0, |sum, _| sum + GAP);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         role=\"img\" aria-label=\"CPU and throughput of relays\">\n<style>{STYLE}</style>\n"
    );
    text(
        &mut svg,
        0.0,
        20.0,
        "t",
        "Relaying messages of 16 KiB over loopback, relays interleaved in one run, medians",
    );
    text(&mut svg, LABELS, 44.0, "b", "relay CPU, s per GiB (less is better)");
    text(&mut svg, LABELS + PANEL + 10.0, 44.0, "b", "throughput, GiB/s (more is better)");
    let mut y = HEAD;
    for block in &blocks {
        text(&mut svg, 0.0, y + 16.0, "b", &block.title);
        y += GAP / 2.0;
        y = draw(&mut svg, block, y) + GAP / 2.0;
    }
    svg.push_str("</svg>\n");
    svg
}

fn blocks(results: &Results) -> Vec<Block<'_>> {
    let plain = STREAMS.map(|streams| (results.comparison(Case::KiB16, streams), streams, ""));
    let tls = STREAMS.map(|streams| (results.tls_comparison(Case::KiB16, streams), streams, "TLS, "));
    let ends = STREAMS.map(|streams| (results.end_to_end_comparison(streams), streams, "End to end, "));
    let mut blocks = Vec::new();
    for (comparison, streams, kind) in plain.into_iter().chain(tls).chain(ends) {
        let Some(comparison) = comparison else { continue };
        let many = if streams == 1 { "stream" } else { "streams" };
        let tls = kind == "TLS, ";
        blocks.push(Block { title: format!("{kind}{streams} {many}"), series: shown(comparison, tls) });
    }
    blocks
}

fn shown(comparison: &Comparison, tls: bool) -> Vec<&Series> {
    let of = |series: &&Series| series.variant.has_relay() && series.variant.is_tls() == tls;
    let mut series: Vec<_> = comparison.series.iter().filter(of).collect();
    series.sort_by_key(|series| !series.variant.is_ours());
    series
}

type Figure = fn(&Figures) -> f64;

fn draw(svg: &mut String, block: &Block<'_>, top: f64) -> f64 {
    let panels: [(f64, Figure); 2] = [(LABELS, |one| one.relay_cpu), (LABELS + PANEL + 10.0, |one| one.rate)];
    let value = |series: &Series, figure: Figure| median(series.rounds.iter().map(figure));
    let mut y = top;
    for series in &block.series {
        let ours = series.variant.is_ours();
        let title = series.variant.title().trim_start_matches("TLS: ");
        text(svg, 8.0, y + BAR - 2.0, if ours { "b" } else { "" }, title);
        for (x, figure) in panels {
            let most =
                block.series.iter().map(|series| value(series, figure)).fold(f64::MIN_POSITIVE, f64::max);
            let (value, class) = (value(series, figure), if ours { "o" } else { "p" });
            let width = ((PANEL - FIGURE) * value / most).max(1.0);
            let _ = writeln!(
                svg,
                "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"2\"/>"
            );
            text(svg, x + width + 5.0, y + BAR - 3.0, "n", &number(value));
        }
        y += ROW;
    }
    y
}

fn text(svg: &mut String, x: f64, y: f64, class: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{text}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::variants::Variant;

    #[test]
    fn a_bar_is_as_long_as_its_figure() {
        let series = |variant, relay_cpu, rate| Series {
            variant,
            rounds: vec![Figures { relay_cpu, total_cpu: 1.0, rate, messages: 1.0 }],
        };
        let one = Comparison {
            case: Case::KiB16,
            streams: 1,
            series: vec![series(Variant::Tungstenite, 0.8, 1.0), series(Variant::Midspan, 0.2, 2.0)],
        };
        let svg = write(&Results { relays: vec![one], ..Results::default() });
        let full = PANEL - FIGURE;
        // Ours comes first: a quarter of the CPU, and all of the throughput.
        assert!(
            svg.contains(&format!("class=\"o\" x=\"290\" y=\"83\" width=\"{:.1}\"", full / 4.0)),
            "{svg}"
        );
        assert!(svg.contains(&format!("class=\"o\" x=\"580\" y=\"83\" width=\"{full:.1}\"")), "{svg}");
        assert!(svg.contains("tokio-tungstenite"));
    }
}
