//! The half of the generator that receives: it reads headers, and counts.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use anyhow::{Result, ensure};

use crate::{
    clock,
    connection::{Connection, Received, Scratch},
    frames::{Alike, FrameCounter},
    number::count,
    poller::{Poller, Until},
};

const WAIT: Duration = Duration::from_millis(20);
/// A relay from which nothing comes for so long, although something must, does not work.
const SILENCE: Duration = Duration::from_secs(30);

/// What has come so far, and what sender and receiver are told.
#[derive(Debug)]
pub(crate) struct Progress {
    pub(crate) payload: AtomicU64,
    pub(crate) messages: AtomicU64,
    /// How many messages are to come in all, once that is known.
    expected: AtomicU64,
    /// Nothing new is to be sent.
    stop: AtomicBool,
    /// What is under way is not waited for.
    abandon: AtomicBool,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            payload: AtomicU64::new(0),
            messages: AtomicU64::new(0),
            expected: AtomicU64::new(u64::MAX),
            stop: AtomicBool::new(false),
            abandon: AtomicBool::new(false),
        }
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(crate) fn abandon(&self) {
        self.abandon.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.abandon.load(Ordering::Relaxed)
    }

    pub(crate) fn expect(&self, messages: u64) {
        self.expected.store(messages, Ordering::Relaxed);
    }
}

/// Reads from all connections until everything that is expected has come, or is abandoned. What came on each.
///
/// Frames with TLS are counted by the length of their records, where it is known what arrives.
pub(crate) fn run(
    connections: &mut [Connection],
    alike: Option<Alike>,
    progress: &Progress,
) -> Result<Vec<FrameCounter>> {
    let mut poller = Poller::new(connections, Until::Readable)?;
    let mut counters: Vec<FrameCounter> = connections.iter().map(|_| FrameCounter::default()).collect();
    let mut scratch = Scratch::new();
    let (mut payload, mut messages, mut last) = (0, 0, clock::now());
    while messages < progress.expected.load(Ordering::Relaxed) && !progress.is_abandoned() {
        let mut quiet = true;
        for place in poller.wait(WAIT)? {
            let counter = &mut counters[place];
            let before = (counter.payload, counter.messages);
            let connection = &mut connections[place];
            let received = if let Some(alike) = alike.filter(|_| connection.is_tls()) {
                let (received, bytes) = connection.count(&mut scratch)?;
                counter.count(count(bytes), alike);
                received
            } else {
                connection.receive(&mut scratch, |bytes| counter.feed(bytes))?
            };
            ensure!(received != Received::End && !counter.closed, "the relay closed a stream");
            payload += counter.payload - before.0;
            messages += counter.messages - before.1;
            progress.payload.store(payload, Ordering::Relaxed);
            progress.messages.store(messages, Ordering::Relaxed);
            quiet = false;
        }
        if quiet {
            ensure!(last.elapsed() < SILENCE, "the relay delivers nothing");
        } else {
            last = clock::now();
        }
    }
    Ok(counters)
}
