//! What one more process costs: the unit costs behind docs/scaling.md, and the step from one edge to two and four.

use std::{fs, path::Path, time::Duration};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::{
    WARM_UP,
    case::Case,
    measure::{
        links::{self, Links},
        relay::{self, Comparison, Plan},
        setup,
    },
    report::{scale, text},
    suite::{Machine, machine},
    tls::Certificate,
    variants::Variant,
};

/// One edge, and then the ways to the owner among several.
pub(crate) const VARIANTS: [Variant; 7] = [
    Variant::MidspanTls,
    Variant::Edges2Straight,
    Variant::Edges2Passed,
    Variant::Edges2Forwarded,
    Variant::Edges4Straight,
    Variant::Edges4Passed,
    Variant::Edges4Forwarded,
];

/// A multiple of the cube of four, so that four edges have equal shares.
const STREAMS: usize = 64;
const PAIRS: usize = 8 * STREAMS;

/// All that was measured in one run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Scale {
    pub(crate) machine: Machine,
    pub(crate) rounds: usize,
    pub(crate) links: Links,
    pub(crate) setup: Vec<setup::Series>,
    pub(crate) relay: Vec<Comparison>,
}

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent {
    pub(crate) rounds: usize,
    pub(crate) links: usize,
    pub(crate) handshakes: usize,
    pub(crate) rest: Duration,
    pub(crate) turn: Duration,
}

/// Measures, and writes scale.json and scale.md.
pub(crate) fn run(extent: Extent, results: &Path, folder: &Path, certificate: &Certificate) -> Result<()> {
    let Extent { rounds, links, handshakes, rest, turn } = extent;
    let machine = machine();
    let links = links::measure(links, rest, handshakes, folder, certificate)?;
    let setup = setup::compare(&VARIANTS, rounds, PAIRS, folder, certificate)?;
    text::print(&text::setup(&setup));
    let plan = Plan { rounds, warm_up: WARM_UP, time: turn };
    let relay = relay::compare(&VARIANTS, &[(Case::KiB16, STREAMS)], plan, folder, certificate, |one| {
        text::print(&text::comparison(one, Some(Variant::MidspanTls)));
        Ok(())
    })?;
    let scale = Scale { machine, rounds, links, setup, relay };
    fs::create_dir_all(results)?;
    fs::write(results.join("scale.json"), serde_json::to_string_pretty(&scale)? + "\n")?;
    let page = scale::write(&scale);
    fs::write(results.join("scale.md"), &page)?;
    text::print(&page);
    Ok(())
}
