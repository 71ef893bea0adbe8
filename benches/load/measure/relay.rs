//! Throughput and CPU: as much as goes through, from the service to the device.

use std::{
    path::Path,
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    case::Case,
    clock,
    frames::{FrameCounter, Pattern},
    number::{GIB, count, float},
    receiver::{self, Progress},
    relays::{Pairs, Relay},
    rounds, sender, system,
    tls::Certificate,
    variants::Variant,
};

/// A relay that is slow with small messages has seconds of them in the sockets at the end of a turn. They are not waited for
/// any longer than this, as long as they keep coming.
const DRAIN: Duration = Duration::from_millis(1500);
/// In this time something comes, if anything is to come.
const FLOW: Duration = Duration::from_millis(500);
/// A relay from which nothing comes for so long does not work.
const SILENCE: Duration = Duration::from_secs(10);
/// Payload of the message that shows that a stream works.
const CHECKED: usize = 5000;

/// What one turn gave.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// CPU seconds of the relay per GiB of payload.
    pub(crate) relay_cpu: f64,
    /// CPU seconds of relay, local proxies and generator per GiB of payload.
    pub(crate) total_cpu: f64,
    /// GiB of payload per second.
    pub(crate) rate: f64,
    /// Messages per second.
    pub(crate) messages: f64,
}

/// All rounds of one variant.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Series {
    pub(crate) variant: Variant,
    pub(crate) rounds: Vec<Figures>,
}

/// One comparison.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Comparison {
    pub(crate) case: Case,
    pub(crate) streams: usize,
    pub(crate) series: Vec<Series>,
}

/// How long, and how often.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) rounds: usize,
    /// Before a measurement begins, the traffic runs for so long.
    pub(crate) warm_up: Duration,
    pub(crate) time: Duration,
}

/// Compares variants in some cases. All of them are up all the time.
pub(crate) fn compare(
    variants: &[Variant],
    cases: &[(Case, usize)],
    plan: Plan,
    folder: &Path,
    certificate: &Certificate,
    mut done: impl FnMut(&Comparison) -> Result<()>,
) -> Result<Vec<Comparison>> {
    let mut running = variants
        .iter()
        .map(|&variant| Relay::start(variant, folder, variant.name(), certificate))
        .collect::<Result<Vec<_>>>()?;
    let mut comparisons = Vec::new();
    for &(case, streams) in cases {
        let pattern = Pattern::new(case.payload());
        let mut up = running
            .iter_mut()
            .map(|relay| Ok(Up { pairs: open(relay, streams)?, relay }))
            .collect::<Result<Vec<_>>>()?;
        let mut behind = usize::MAX;
        let figures = rounds::run(plan.rounds, &mut up, |round, up| {
            let name = up.relay.variant.name();
            if behind < round {
                up.pairs = open(up.relay, streams)?;
            }
            let (figures, is_behind) = turn(up.relay, &mut up.pairs, case, &pattern, plan)
                .with_context(|| format!("{name}, {} x {streams}", case.name()))?;
            if is_behind {
                behind = behind.min(round);
                // The relay is to rest in the turns of the others.
                up.pairs = Pairs::default();
            }
            Ok(figures)
        })?;
        let series =
            variants.iter().zip(figures).map(|(&variant, rounds)| Series { variant, rounds }).collect();
        let comparison = Comparison { case, streams, series };
        done(&comparison)?;
        comparisons.push(comparison);
    }
    Ok(comparisons)
}

/// A relay and its streams in one case.
///
/// All relays begin a case with new streams, and keep them as long as all can: what the kernels have learned of a connection
/// changes what it is like in the next turn. When one relay has to get new ones, because messages are under way at the end
/// of its turn, all get new ones in the rounds that follow.
struct Up<'a> {
    relay: &'a mut Relay,
    pairs: Pairs,
}

/// What one turn gave, and whether messages are still under way.
fn turn(
    relay: &Relay,
    pairs: &mut Pairs,
    case: Case,
    pattern: &Pattern,
    plan: Plan,
) -> Result<(Figures, bool)> {
    let (senders, receivers) = (&mut pairs.senders, &mut pairs.receivers);
    // From end to end, a client writes one piece at a time.
    let batched = case.batched() && !relay.variant.is_end_to_end();
    let alike = pattern.alike(!relay.variant.is_websocket());
    let progress = Progress::new();
    let (sent, arrived, figures) = thread::scope(|scope| {
        let sending = scope.spawn(|| sender::run(senders, pattern, batched, &progress));
        let receiving = scope.spawn(|| receiver::run(receivers, alike, &progress));
        let figures = sample(relay, &progress, plan);
        progress.stop();
        let end = clock::now() + DRAIN;
        wait_for(&sending, end);
        if !sending.is_finished() {
            progress.abandon();
        }
        let sent = sending.join().map_err(|_| anyhow!("the sender panicked"))?;
        // Without a sender's count, the receiver is released by what it has.
        progress.expect(sent.as_ref().map_or(0, |sent| sent.iter().sum()));
        wait_for(&receiving, end);
        let flows = !receiving.is_finished() && still_flows(&progress);
        if flows {
            progress.abandon();
        }
        let arrived = receiving.join().map_err(|_| anyhow!("the receiver panicked"))?;
        anyhow::Ok((sent?, arrived?, figures?))
    })?;
    let is_behind = progress.is_abandoned();
    if !is_behind {
        verify(&sent, &arrived, count(pattern.payload()))?;
    }
    Ok((figures, is_behind))
}

fn sample(relay: &Relay, progress: &Progress, plan: Plan) -> Result<Figures> {
    thread::sleep(plan.warm_up);
    let before = Sample::take(relay, progress)?;
    // Where much else runs, nothing may come in a short turn, which gives no figure; so it goes on until something has.
    loop {
        thread::sleep(plan.time);
        let after = Sample::take(relay, progress)?;
        if after.payload > before.payload {
            return Ok(after.since(&before));
        }
        ensure!(before.at.elapsed() < SILENCE, "it delivers nothing");
    }
}

fn wait_for<T>(thread: &thread::ScopedJoinHandle<'_, T>, end: Instant) {
    while !thread.is_finished() && clock::now() < end {
        thread::sleep(Duration::from_millis(2));
    }
}

/// Whether more arrives. If not, something was lost, and the receiver will say so.
fn still_flows(progress: &Progress) -> bool {
    let before = progress.payload.load(Ordering::Relaxed);
    thread::sleep(FLOW);
    progress.payload.load(Ordering::Relaxed) > before
}

fn open(relay: &mut Relay, count: usize) -> Result<Pairs> {
    let mut pairs = relay.open_checked(count, CHECKED)?;
    pairs.set_nonblocking(true)?;
    Ok(pairs)
}

/// Whether all that went into each stream came out of it.
pub(crate) fn verify(sent: &[u64], arrived: &[FrameCounter], payload: u64) -> Result<()> {
    for (&sent, arrived) in sent.iter().zip(arrived) {
        ensure!(
            arrived.messages == sent && arrived.payload == sent * payload && arrived.is_between(),
            "{sent} messages of {payload} bytes went in, and {} with {} bytes in all came out",
            arrived.messages,
            arrived.payload
        );
    }
    Ok(())
}

struct Sample {
    relay: Duration,
    others: Duration,
    payload: u64,
    messages: u64,
    at: Instant,
}

impl Sample {
    fn take(relay: &Relay, progress: &Progress) -> Result<Self> {
        Ok(Self {
            relay: relay.cpu()?,
            others: system::cpu(std::process::id())? + relay.proxies_cpu()?,
            payload: progress.payload.load(Ordering::Relaxed),
            messages: progress.messages.load(Ordering::Relaxed),
            at: clock::now(),
        })
    }

    fn since(&self, before: &Self) -> Figures {
        let gib = float(self.payload - before.payload) / GIB;
        let relay = (self.relay.saturating_sub(before.relay)).as_secs_f64();
        let others = (self.others.saturating_sub(before.others)).as_secs_f64();
        let time = self.at.duration_since(before.at).as_secs_f64();
        Figures {
            relay_cpu: relay / gib,
            total_cpu: (relay + others) / gib,
            rate: gib / time,
            messages: float(self.messages - before.messages) / time,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter(messages: u64, payload: u64) -> FrameCounter {
        let mut counter = FrameCounter::default();
        (counter.messages, counter.payload) = (messages, payload);
        counter
    }

    #[test]
    fn what_is_missing_is_noticed() {
        assert!(verify(&[2, 1], &[counter(2, 20), counter(1, 10)], 10).is_ok());
        assert!(verify(&[2, 1], &[counter(2, 20), counter(1, 9)], 10).is_err());
        assert!(verify(&[2, 1], &[counter(1, 20), counter(1, 10)], 10).is_err());
    }
}
