//! What streams cost that carry nothing.

use std::{path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    clock,
    connection::Scratch,
    frames::Pattern,
    measure::{latency::receive_messages, setup::settle},
    number::{count, float},
    receiver::{self, Progress},
    relays::{Pairs, Relay},
    system,
    tls::Certificate,
    variants::Variant,
};

/// Streams that are opened first, so that what every process needs once is not counted.
const FIRST: usize = 64;
/// Payload of the message that each stream carries.
const PAYLOAD: usize = 1024;
const CALM: Duration = Duration::from_secs(2);

/// One variant's figures.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Idle {
    pub(crate) variant: Variant,
    pub(crate) pairs: usize,
    /// KiB of user memory (anonymous pages) per stream.
    pub(crate) user: f64,
    /// KiB of resident memory per stream.
    pub(crate) resident: f64,
    /// Seconds until every stream had carried a message, all at the same time.
    pub(crate) used_at_once: f64,
}

/// Opens `pairs` pairs, lets each carry a message, looks at the relay's memory, and uses all of them at once.
pub(crate) fn measure(
    variant: Variant,
    pairs: usize,
    folder: &Path,
    certificate: &Certificate,
) -> Result<Idle> {
    let name = format!("idle-{}", variant.name());
    let mut relay = Relay::start(variant, folder, &name, certificate)?;
    let process = relay.process().context("there is no relay whose memory could be looked at")?;
    let pattern = Pattern::single(PAYLOAD);
    let mut first = relay.open(FIRST)?;
    one_by_one(&mut first, &pattern)?;
    let before = calm(&relay, process)?;
    let mut all = relay.open(pairs)?;
    one_by_one(&mut all, &pattern)?;
    let after = calm(&relay, process)?;
    let each = |before: u64, after: u64| float(after.saturating_sub(before)) / float(count(pairs));
    let used_at_once = at_once(&mut all, &pattern)?;
    Ok(Idle {
        variant,
        pairs,
        user: each(before.anonymous, after.anonymous),
        resident: each(before.resident, after.resident),
        used_at_once,
    })
}

fn calm(relay: &Relay, process: u32) -> Result<system::Memory> {
    thread::sleep(CALM);
    settle(relay)?;
    system::memory(process)
}

fn one_by_one(pairs: &mut Pairs, pattern: &Pattern) -> Result<()> {
    let mut scratch = Scratch::new();
    for (sender, receiver) in pairs.senders.iter_mut().zip(&mut pairs.receivers) {
        sender.send_all(pattern.bytes())?;
        receive_messages(receiver, 1, &mut scratch)?;
    }
    Ok(())
}

/// Each stream carries one message; every one of them must arrive.
fn at_once(pairs: &mut Pairs, pattern: &Pattern) -> Result<f64> {
    let start = clock::now();
    for receiver in &mut pairs.receivers {
        receiver.set_nonblocking(true)?;
    }
    let (senders, receivers, progress) = (&mut pairs.senders, &mut pairs.receivers, Progress::new());
    progress.expect(count(senders.len()));
    thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver::run(receivers, None, &progress));
        for sender in senders {
            sender.send_all(pattern.bytes())?;
        }
        let arrived = receiving.join().map_err(|_| anyhow!("the receiver panicked"))??;
        for counter in arrived {
            let whole = counter.messages == 1 && counter.payload == count(pattern.payload());
            ensure!(whole && counter.is_between(), "a stream carried something else than it was given");
        }
        Ok(start.elapsed().as_secs_f64())
    })
}
