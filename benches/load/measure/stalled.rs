//! How much memory a relay needs for readers that do not read.

use std::{path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::net::sockopt;

use crate::{
    clock,
    frames::Pattern,
    measure::relay::verify,
    number::{count, float},
    receiver::{self, Progress},
    relays::{Pairs, Relay},
    sender, system,
    tls::Certificate,
    variants::Variant,
};

/// Payload of a message: as long as a frame that a relay may want to hold whole.
const PAYLOAD: usize = 65_000;
/// The kernel's buffers at each end: small, so that many streams do not fill the machine's memory there.
const BUFFERS: usize = 16 << 10;
/// A relay that uses no more CPU than this in a pause takes nothing any more.
const QUIET: Duration = Duration::from_millis(2);
const PAUSE: Duration = Duration::from_millis(500);
/// By then the senders are held back.
const LIMIT: Duration = Duration::from_secs(40);

/// MiB that a relay grew by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stalled {
    pub(crate) variant: Variant,
    pub(crate) streams: usize,
    /// While no reader reads, and nothing more is taken from the senders.
    pub(crate) held: f64,
    /// The most at any time, until the readers have read everything.
    pub(crate) peak: f64,
}

/// Sends on all streams until nothing more is taken, looks at the relay's memory, and lets the readers read everything.
pub(crate) fn measure(
    variant: Variant,
    streams: usize,
    folder: &Path,
    certificate: &Certificate,
) -> Result<Stalled> {
    let mut relay = Relay::start(variant, folder, &format!("stalled-{}", variant.name()), certificate)?;
    let process = relay.process().context("there is no relay whose memory could be looked at")?;
    let mut pairs = relay.open(streams)?;
    pairs.set_nonblocking(true)?;
    for connection in pairs.senders.iter().chain(&pairs.receivers) {
        sockopt::set_socket_send_buffer_size(connection, BUFFERS)?;
        sockopt::set_socket_recv_buffer_size(connection, BUFFERS)?;
    }
    let idle = system::memory(process)?.resident;
    let held = stall(&relay, process, &mut pairs)?;
    let peak = system::memory(process)?.peak;
    let grown = |kib: u64| float(kib.saturating_sub(idle)) / 1024.0;
    Ok(Stalled { variant, streams, held: grown(held), peak: grown(peak) })
}

/// What was resident while nobody read.
fn stall(relay: &Relay, process: u32, pairs: &mut Pairs) -> Result<u64> {
    let (senders, receivers) = (&mut pairs.senders, &mut pairs.receivers);
    let (pattern, progress) = (Pattern::new(PAYLOAD), Progress::new());
    thread::scope(|scope| {
        let sending = scope.spawn(|| sender::run(senders, &pattern, true, &progress));
        let held = held_back(relay).and_then(|()| system::memory(process));
        progress.stop();
        if held.is_err() {
            progress.abandon();
        }
        let receiving = scope.spawn(|| receiver::run(receivers, None, &progress));
        let sent = sending.join().map_err(|_| anyhow!("the sender panicked"))?;
        progress.expect(sent.as_ref().map_or(0, |sent| sent.iter().sum()));
        let arrived = receiving.join().map_err(|_| anyhow!("the receiver panicked"))?;
        let held = held?.resident;
        verify(&sent?, &arrived?, count(pattern.payload()))?;
        Ok(held)
    })
}

/// Waits until the relay takes nothing more.
fn held_back(relay: &Relay) -> Result<()> {
    let (mut before, end) = (relay.cpu()?, clock::now() + LIMIT);
    loop {
        thread::sleep(PAUSE);
        let now = relay.cpu()?;
        if now.saturating_sub(before) < QUIET {
            return Ok(());
        }
        ensure!(clock::now() < end, "the senders are not held back");
        before = now;
    }
}
