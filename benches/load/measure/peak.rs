//! How much memory a relay needs for messages that are very large.

use std::{path::Path, thread};

use anyhow::{Context as _, Result, anyhow};
use serde::{Deserialize, Serialize};

use crate::{
    connection::Scratch,
    frames::Pattern,
    measure::latency::receive_messages,
    number::{count, float},
    relays::Relay,
    system,
    tls::Certificate,
    variants::Variant,
};

/// Streams that carry them at the same time.
pub(crate) const STREAMS: usize = 4;
/// Size of a message.
pub(crate) const PAYLOAD: usize = 64 << 20;
const MESSAGES: u64 = 2;

/// One variant's figure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Peak {
    pub(crate) variant: Variant,
    /// MiB between what was resident at the start and the most that was.
    pub(crate) mib: f64,
}

pub(crate) fn measure(variant: Variant, folder: &Path, certificate: &Certificate) -> Result<Peak> {
    let name = format!("peak-{}", variant.name());
    let mut relay = Relay::start(variant, folder, &name, certificate)?;
    let process = relay.process().context("there is no relay whose memory could be looked at")?;
    let start = system::memory(process)?;
    let mut pairs = relay.open(STREAMS)?;
    let pattern = Pattern::single(PAYLOAD);
    thread::scope(|scope| {
        let mut work = Vec::new();
        for sender in &mut pairs.senders {
            work.push(scope.spawn(|| (0..MESSAGES).try_for_each(|_| Ok(sender.send_all(pattern.bytes())?))));
        }
        for receiver in &mut pairs.receivers {
            work.push(scope.spawn(|| receive_messages(receiver, MESSAGES, &mut Scratch::new())));
        }
        work.into_iter().try_for_each(|work| work.join().map_err(|_| anyhow!("a stream panicked"))?)
    })
    .with_context(|| format!("{}, messages of {} MiB", variant.name(), count(PAYLOAD) >> 20))?;
    let end = system::memory(process)?;
    Ok(Peak { variant, mib: float(end.peak.saturating_sub(start.resident)) / 1024.0 })
}
