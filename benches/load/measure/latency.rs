//! Round trips of small messages, one at a time, with everything on one CPU.

use std::{path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    case::Case,
    clock,
    connection::{Connection, Received, Scratch},
    frames::{FrameCounter, Pattern},
    measure::relay::Plan,
    relays::{Pairs, Relay},
    rounds, system,
    tls::Certificate,
    variants::Variant,
};

const WARM_UP: usize = 500;

/// What is compared.
pub(crate) const VARIANTS: [Variant; 9] = [
    Variant::Direct,
    Variant::DirectTls,
    Variant::TcpCopy,
    Variant::TcpBidirectional,
    Variant::Midspan,
    Variant::Tungstenite,
    Variant::Fastwebsockets,
    Variant::MidspanTls,
    Variant::TungsteniteTls,
];

/// Whose added time is 1.
pub(crate) const REFERENCE: Variant = Variant::TcpCopy;

/// The median round trip of each round, in microseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Series {
    pub(crate) variant: Variant,
    pub(crate) p50: Vec<f64>,
}

/// What a relay adds, round by round, to a round trip between the same ends without a relay: what they do for TLS is theirs.
pub(crate) fn added(all: &[Series], variant: Variant) -> Option<Vec<f64>> {
    let direct = if variant.is_tls() { Variant::DirectTls } else { Variant::Direct };
    let find = |variant| all.iter().find(|series| series.variant == variant);
    let (one, direct) = (find(variant)?, find(direct)?);
    Some(one.p50.iter().zip(&direct.p50).map(|(one, direct)| one - direct).collect())
}

/// What one relay adds against what another one adds.
pub(crate) fn ratio(all: &[Series], variant: Variant, reference: Variant) -> Option<f64> {
    Some(rounds::ratio(&added(all, variant)?, &added(all, reference)?, |&added| added))
}

/// Compares variants, all of them up all the time.
pub(crate) fn compare(
    variants: &[Variant],
    plan: Plan,
    folder: &Path,
    certificate: &Certificate,
) -> Result<Vec<Series>> {
    let cpu = system::last_cpu()?;
    let mut running = Vec::new();
    for &variant in variants {
        let name = format!("latency-{}", variant.name());
        let mut relay = Relay::start(variant, folder, &name, certificate)?;
        let pairs = relay.open_checked(1, Case::Bytes64.payload())?;
        if let Some(process) = relay.process() {
            system::pin_process(process, cpu)?;
        }
        running.push((relay, pairs));
    }
    // A thread of its own, so that what comes later is not tied to this CPU.
    thread::scope(|scope| {
        let measuring = scope.spawn(|| {
            system::pin_thread(cpu)?;
            rounds::run(plan.rounds, &mut running, |_, (relay, pairs)| {
                turn(pairs, plan.time).with_context(|| format!("{}, round trips", relay.variant.name()))
            })
        });
        let figures = measuring.join().map_err(|_| anyhow!("the measurement panicked"))??;
        Ok(variants.iter().zip(figures).map(|(&variant, p50)| Series { variant, p50 }).collect())
    })
}

fn turn(pairs: &mut Pairs, time: Duration) -> Result<f64> {
    let (one, other) = (&mut pairs.senders[0], &mut pairs.receivers[0]);
    let (pattern, mut scratch) = (Pattern::single(Case::Bytes64.payload()), Scratch::new());
    for _ in 0..WARM_UP {
        round_trip(one, other, &pattern, &mut scratch)?;
    }
    let (mut times, start) = (Vec::new(), clock::now());
    while start.elapsed() < time {
        let sent = clock::now();
        round_trip(one, other, &pattern, &mut scratch)?;
        times.push(sent.elapsed().as_secs_f64() * 1e6);
    }
    Ok(rounds::median(times))
}

/// One message there, and one back.
pub(crate) fn round_trip(
    one: &mut Connection,
    other: &mut Connection,
    pattern: &Pattern,
    scratch: &mut Scratch,
) -> Result<()> {
    hop(one, other, pattern, scratch)?;
    hop(other, one, pattern, scratch)
}

fn hop(from: &mut Connection, to: &mut Connection, pattern: &Pattern, scratch: &mut Scratch) -> Result<()> {
    from.send_all(pattern.bytes())?;
    receive_messages(to, 1, scratch)
}

/// Reads whole messages from a blocking connection.
pub(crate) fn receive_messages(from: &mut Connection, messages: u64, scratch: &mut Scratch) -> Result<()> {
    let mut counter = FrameCounter::default();
    while counter.messages < messages {
        let more = from.receive(scratch, |bytes| counter.feed(bytes))?;
        ensure!(more != Received::End && !counter.closed, "the relay closed the stream");
    }
    ensure!(counter.messages == messages && counter.is_between(), "more came than was sent");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_to_the_same_ends_is_compared() {
        let series = |variant, p50: &[f64]| Series { variant, p50: p50.to_vec() };
        let all = [
            series(Variant::Direct, &[10.0, 20.0, 10.0]),
            series(Variant::DirectTls, &[15.0, 25.0, 15.0]),
            series(Variant::TcpCopy, &[20.0, 40.0, 20.0]),
            series(Variant::Midspan, &[21.0, 42.0, 21.0]),
            series(Variant::MidspanTls, &[27.0, 49.0, 27.0]),
        ];
        for (variant, expected) in [(Variant::Midspan, 1.1), (Variant::MidspanTls, 1.2)] {
            assert!((ratio(&all, variant, Variant::TcpCopy).unwrap() - expected).abs() < 1e-9);
        }
        assert_eq!(ratio(&all[1..], Variant::Midspan, Variant::TcpCopy), None);
    }
}
