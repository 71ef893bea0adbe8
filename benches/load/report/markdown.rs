//! The results for readers.

use crate::{
    goals::{Goal, Verdict},
    measure::{
        end_to_end::EndToEnd,
        idle::Idle,
        latency,
        relay::{Comparison, Figures},
    },
    report::{
        json::bound,
        text::{number, verdict},
    },
    rounds::median,
    suite::Results,
    variants::Variant,
};

pub(crate) fn write(results: &Results, goals: &[Goal]) -> String {
    let mut page = Page(String::new());
    page.head(results, goals);
    page.goals(goals);
    page.comparisons("Relays", &results.relays);
    page.comparisons("TLS", &results.tls);
    page.end_to_end(results);
    page.latency(results);
    page.setup(results);
    page.memory(results);
    page.0
}

struct Page(String);

impl Page {
    fn line(&mut self, text: impl AsRef<str>) {
        self.0.push_str(text.as_ref());
        self.0.push('\n');
    }

    fn row(&mut self, cells: &[String]) {
        self.line(format!("| {} |", cells.join(" | ")));
    }

    fn table(&mut self, heads: &[&str]) {
        self.line(format!("\n| {} |", heads.join(" | ")));
        self.line(format!("|{}", "---|".repeat(heads.len())));
    }

    fn head(&mut self, results: &Results, goals: &[Goal]) {
        let machine = &results.machine;
        let tally = |verdict| goals.iter().filter(|goal| goal.verdict() == verdict).count();
        self.line("# What the data path costs\n");
        self.line(
            "Written by `make bench`; not edited. Only ratios carry over to another machine: a ratio is the median of the \
             ratios that two relays had in the same round. CPU is seconds of CPU per GiB of payload; *all* is the relay and \
             the load generator together.\n",
        );
        self.line(format!(
            "* Machine: {}, {} CPUs, Linux {}, loopback with TCP's {}. Load average per CPU at the start: {:.2}.",
            machine.cpu, machine.cores, machine.kernel, machine.congestion_control, machine.load
        ));
        self.line(format!("* Built with {}, profile `release`.", machine.compiler));
        self.line(format!(
            "* {} rounds; in each of them every relay has one turn, in reverse order every other round.",
            results.rounds
        ));
        self.line(
            "* All relays begin a case with new streams, and keep them from round to round. Where one has to get new ones, because \
             messages are still under way when its turn is over, all get new ones in every later round.",
        );
        self.line(
            "* Midspan is `midspand edge` as a user runs it, with tickets, metrics and logs; limits on connections are raised, and \
             pings are 10 minutes apart, because the load generator answers none. The other relays are in `benches/peers` and run \
             on one thread.",
        );
        self.line(
            "* Where the kernel paces what it sends, as with bbr, Midspan spares connections from nearby (ARCHITECTURE.md), \
             which all are here; the other relays take what the kernel gives them.",
        );
        self.line(
            "* Payload goes from the service to the device. Every byte is counted, and the first message of each stream is compared. \
             The load generator is to cost less than a relay, so it looks at headers only: at those of frames, and with TLS at those \
             of records, of which it opens the first in each read.",
        );
        if results.quick {
            self.line("* **A quick run: turns are short, and the figures rough.**");
        }
        for missing in &results.missing {
            self.line(format!("* Missing: {missing}."));
        }
        self.line(format!(
            "\nOf {} figures, {} meet their aim, {} meet what they must and miss the aim, {} miss what they must, {} were not measured.",
            goals.len(),
            tally(Verdict::Aim),
            tally(Verdict::Must),
            tally(Verdict::Missed),
            tally(Verdict::NotMeasured)
        ));
    }

    fn goals(&mut self, goals: &[Goal]) {
        self.line("\n## Goals");
        self.line(
            "\nIn group 4 the library is the one against which Midspan looks worst. `tungstenite-forward` and \
             `fastwebsockets-batched` write several small messages at once, which the libraries leave to their users.",
        );
        self.table(&["#", "figure", "must", "aim", "measured", ""]);
        for goal in goals {
            let measured = goal.measured.map_or_else(|| "-".to_owned(), number);
            self.row(&[
                goal.number.to_string(),
                goal.what.clone(),
                bound(goal.must),
                bound(goal.aim),
                format!("**{measured}**"),
                verdict(goal.verdict()).to_owned(),
            ]);
        }
    }

    fn comparisons(&mut self, title: &str, comparisons: &[Comparison]) {
        if comparisons.is_empty() {
            return;
        }
        self.line(format!("\n## {title}"));
        for one in comparisons {
            self.line(format!("\n### {}, {} at a time", one.case.title(), streams(one.streams)));
            self.table(&["relay", "relay CPU s/GiB", "all CPU s/GiB", "GiB/s", "messages/s"]);
            for series in &one.series {
                let of = |figure: fn(&Figures) -> f64| number(median(series.rounds.iter().map(figure)));
                let relay = if series.variant.has_relay() { of(|one| one.relay_cpu) } else { "-".to_owned() };
                self.row(&[
                    name(series.variant),
                    relay,
                    of(|one| one.total_cpu),
                    of(|one| one.rate),
                    of(|one| one.messages),
                ]);
            }
        }
    }

    fn end_to_end(&mut self, results: &Results) {
        let EndToEnd { comparisons, idle } = &results.end_to_end;
        self.comparisons("End to end", comparisons);
        if !idle.is_empty() {
            self.line(
                "\nFrom a TCP client through a local proxy, the relay and another local proxy to a TCP server, one write for every \
                 16 KiB; *all* has the local proxies, too. haproxy and nginx pass WebSocket frames on that the load generator makes \
                 and counts, without reading them and with one hop less: a ceiling, and no competitors.",
            );
            self.idle(idle);
        }
    }

    fn latency(&mut self, results: &Results) {
        if results.latency.is_empty() {
            return;
        }
        self.line("\n## Round trips of 64 bytes, everything on one CPU");
        self.line("\nWhat a relay adds is the difference to a round trip between the same ends without one, with TLS where they use it.");
        self.table(&["relay", "p50, us", "added by the relay, us", "added, against a TCP copy hop"]);
        for one in &results.latency {
            let added = latency::added(&results.latency, one.variant).map(median);
            let ratio = latency::ratio(&results.latency, one.variant, latency::REFERENCE);
            let cell = |value: Option<f64>| {
                value.filter(|_| one.variant.has_relay()).map_or_else(|| "-".to_owned(), number)
            };
            self.row(&[name(one.variant), number(median(one.p50.iter().copied())), cell(added), cell(ratio)]);
        }
    }

    fn setup(&mut self, results: &Results) {
        if results.setup.is_empty() {
            return;
        }
        self.line("\n## Opening and closing streams");
        self.line("\nMicroseconds of the relay's CPU for each stream: both legs connect and upgrade, then both say goodbye. TLS handshakes are full ones.");
        self.table(&["relay", "opening", "closing", "both", "streams opened per CPU second"]);
        for one in &results.setup {
            let open = median(one.rounds.iter().map(|cost| cost.open));
            self.row(&[
                name(one.variant),
                number(open),
                number(median(one.rounds.iter().map(|cost| cost.close))),
                number(median(one.rounds.iter().map(|cost| cost.both()))),
                number(1e6 / open),
            ]);
        }
    }

    fn memory(&mut self, results: &Results) {
        if !results.idle.is_empty() {
            self.line("\n## Idle streams");
            self.line("\nEach has carried one message of 1 KiB. User memory is anonymous pages of the relay. At the end every stream carries a message at the same time.");
            self.idle(&results.idle);
        }
        if !results.peak.is_empty() {
            self.line("\n## Peak memory with four streams of 64 MiB messages");
            self.table(&["relay", "MiB more than at the start"]);
            for one in &results.peak {
                self.row(&[name(one.variant), number(one.mib)]);
            }
        }
        if let Some(one) = results.instructions {
            self.line("\n## User instructions (callgrind)\n");
            self.line(format!(
                "{} per 64-byte message, {} per byte at 16 KiB.",
                number(one.per_small_message),
                number(one.per_byte)
            ));
        }
    }

    fn idle(&mut self, idle: &[Idle]) {
        self.table(&[
            "relay",
            "streams",
            "user KiB a stream",
            "resident KiB a stream",
            "all used at once, s",
        ]);
        for one in idle {
            let figures = [number(one.user), number(one.resident), number(one.used_at_once)];
            self.row(&[&[name(one.variant), one.pairs.to_string()][..], &figures].concat());
        }
    }
}

fn streams(count: usize) -> String {
    if count == 1 { "1 stream".to_owned() } else { format!("{count} streams") }
}

fn name(variant: Variant) -> String {
    if variant.is_ours() { format!("**{}**", variant.title()) } else { variant.title().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::goals;

    #[test]
    fn misses_are_told() {
        let results = Results { missing: vec!["nginx: not installed".to_owned()], ..Results::default() };
        let page = write(&results, &goals::judge(&results));
        assert!(page.contains("* Missing: nginx: not installed."));
        assert!(page.contains(
            "| 10 | user instructions per byte at 16 KiB | <= 0.12 | <= 0.08 | **-** | not measured |"
        ));
    }
}
