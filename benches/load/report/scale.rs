//! What scale costs, for readers.

use std::fmt::Write as _;

use crate::{
    measure::{relay::Figures, setup::Cost},
    rounds::{median, ratio},
    scale::Scale,
};

pub(crate) fn write(scale: &Scale) -> String {
    let Scale { machine, rounds, links, setup, relay } = scale;
    let mut page = format!(
        "# What scale costs\n\n\
         Written by `make bench-scale`; not edited. Only ratios carry over to another machine. All processes are started as a user \
         starts them, with TLS, tickets, metrics, logs and a real redis-server.\n\n\
         * Machine: {}, {} CPUs, Linux {}, loopback. Load average per CPU at the start: {:.2}.\n\
         * Built with {}, profile `release`. {rounds} rounds.\n\n\
         ## One control replica\n\n\
         | what | cost |\n|---|---|\n",
        machine.cpu, machine.cores, machine.kernel, machine.load, machine.compiler
    );
    let mut row = |what: String, cost: String| {
        let _ = writeln!(page, "| {what} | {cost} |");
    };
    row(
        format!("user memory of a device link, with {} of them", links.count),
        format!("{:.1} KiB", links.user),
    );
    row("the store's memory of a device link".into(), format!("{:.2} KiB", links.store));
    row(
        "opening a device link, full TLS handshake: the replica's CPU".into(),
        format!("{:.0} us", links.open),
    );
    row("opening a device link: the store's CPU".into(), format!("{:.0} us", links.open_store));
    row(
        "a device link that rests, a minute of it: the replica's CPU".into(),
        format!("{:.0} us", links.idle),
    );
    row("round trips to the store while nothing happens".into(), format!("{:.0} a second", links.idle_trips));
    row(
        "announcing a link again to a store that lost everything: the replica's CPU".into(),
        format!("{:.0} us", links.restore),
    );
    row("announcing a link again: the store's CPU".into(), format!("{:.0} us", links.restore_store));
    row(
        format!("a service's request until its answer, {} of them: the replica's CPU", links.handshakes),
        format!("{:.0} us", links.handshake),
    );
    row(
        "a service's request until its answer: the store's CPU".into(),
        format!("{:.0} us", links.handshake_store),
    );
    row(
        "a service's request until its answer: round trips to the store".into(),
        format!("{:.2}", links.handshake_trips),
    );
    row("the store's memory of a stream".into(), format!("{:.2} KiB", links.handshake_memory));

    page.push_str(
        "\n## One edge, two and four\n\n\
         Both legs over TLS, each by a full handshake, spread over the edges evenly. CPU is that of all edges together; a ratio is the \
         median of the ratios to one edge in the same round. *Straight*: the leg connects to the owner. *Passed*: it connects to any \
         edge, which passes the connection on below TLS. *Forwarded*: it connects to any edge, which forwards it in one hop.\n\n\
         | relay | CPU us for each stream opened | streams opened per CPU second, to one edge | CPU s/GiB | bytes per CPU second, to one edge |\n\
         |---|---|---|---|---|\n",
    );
    for (place, (opened, moved)) in setup.iter().zip(relay.iter().flat_map(|one| &one.series)).enumerate() {
        let first = (&setup[0].rounds, &relay[0].series[0].rounds);
        let per_stream: fn(&Cost) -> f64 = |cost| 1.0 / cost.open;
        let per_byte: fn(&Figures) -> f64 = |figures| 1.0 / figures.relay_cpu;
        let to_one = |ratio: f64| if place == 0 { "1".to_owned() } else { format!("{ratio:.2}") };
        let _ = writeln!(
            page,
            "| {} | {:.0} | {} | {:.2} | {} |",
            if place == 0 { "TLS: 1 edge" } else { opened.variant.title() },
            median(opened.rounds.iter().map(|cost| cost.open)),
            to_one(ratio(&opened.rounds, first.0, per_stream)),
            median(moved.rounds.iter().map(|figures| figures.relay_cpu)),
            to_one(ratio(&moved.rounds, first.1, per_byte)),
        );
    }
    page
}
