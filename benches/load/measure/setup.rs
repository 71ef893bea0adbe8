//! What it costs a relay to join two legs and to let them go again.

use std::{path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    clock,
    connection::{Received, Scratch},
    frames::{CLOSE, FrameCounter},
    number::{count, float},
    relays::{Pairs, Relay},
    rounds,
    tls::Certificate,
    variants::Variant,
};

/// The relay has done its work when it uses less than this in a pause.
const QUIET: Duration = Duration::from_micros(500);
const PAUSE: Duration = Duration::from_millis(40);
const PATIENCE: Duration = Duration::from_secs(5);
const WARM_UP: usize = 64;

/// Microseconds of the relay's CPU for each pair.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Cost {
    /// From nothing to two legs that are joined.
    pub(crate) open: f64,
    /// From there to nothing, both ends saying goodbye.
    pub(crate) close: f64,
}

impl Cost {
    pub(crate) fn both(self) -> f64 {
        self.open + self.close
    }
}

/// All rounds of one variant.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Series {
    pub(crate) variant: Variant,
    pub(crate) rounds: Vec<Cost>,
}

/// Opens and closes `pairs` pairs in each turn.
pub(crate) fn compare(
    variants: &[Variant],
    rounds: usize,
    pairs: usize,
    folder: &Path,
    certificate: &Certificate,
) -> Result<Vec<Series>> {
    let mut running = Vec::new();
    for &variant in variants {
        ensure!(variant.is_websocket(), "{} has no handshake", variant.name());
        let name = format!("setup-{}", variant.name());
        let mut relay = Relay::start(variant, folder, &name, certificate)?;
        turn(&mut relay, WARM_UP)?;
        running.push(relay);
    }
    let figures = rounds::run(rounds, &mut running, |_, relay| {
        turn(relay, pairs).with_context(|| format!("{}, opening and closing", relay.variant.name()))
    })?;
    Ok(variants.iter().zip(figures).map(|(&variant, rounds)| Series { variant, rounds }).collect())
}

fn turn(relay: &mut Relay, pairs: usize) -> Result<Cost> {
    let start = settle(relay)?;
    let mut all = relay.open(pairs)?;
    let opened = settle(relay)?;
    close_all(&mut all, &mut Scratch::new())?;
    drop(all);
    let closed = settle(relay)?;
    let each = |spent: Duration| spent.as_secs_f64() * 1e6 / float(count(pairs));
    Ok(Cost { open: each(opened.saturating_sub(start)), close: each(closed.saturating_sub(opened)) })
}

/// Both ends say goodbye, and wait until the relay has.
fn close_all(pairs: &mut Pairs, scratch: &mut Scratch) -> Result<()> {
    for leg in pairs.senders.iter_mut().chain(&mut pairs.receivers) {
        leg.send_all(&CLOSE)?;
    }
    for leg in pairs.senders.iter_mut().chain(&mut pairs.receivers) {
        let mut counter = FrameCounter::default();
        while !counter.closed {
            if leg.receive(scratch, |bytes| counter.feed(bytes))? == Received::End {
                break;
            }
        }
    }
    Ok(())
}

/// Waits until the relay rests, and gives the CPU time that it has used.
pub(crate) fn settle(relay: &Relay) -> Result<Duration> {
    let (mut before, end) = (relay.cpu()?, clock::now() + PATIENCE);
    loop {
        thread::sleep(PAUSE);
        let now = relay.cpu()?;
        if now.saturating_sub(before) < QUIET || clock::now() > end {
            return Ok(now);
        }
        before = now;
    }
}
