//! When a connection that is carried between two others is given up.

use std::{
    future::poll_fn,
    io,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use midspan_platform::clock;
use tokio::time::{MissedTickBehavior, interval};

use crate::{leg::FAREWELL, splice::Limits};

/// How it ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Bytes that came from the client, and from the owner.
    pub(crate) bytes: [u64; 2],
    /// What broke, unless both sides have ended.
    pub(crate) result: io::Result<()>,
}

/// One of the two directions.
pub(crate) trait Way {
    /// Whether bytes wait that the receiver has not taken.
    fn is_blocked(&self) -> bool;
    /// Whether the sender has ended.
    fn has_ended(&self) -> bool;
    /// Whether the receiver knows that.
    fn is_shut(&self) -> bool;
    /// When bytes came, or were taken, last.
    fn moved(&self) -> Instant;
}

/// How often the times are looked at, at least.
const LOOK: Duration = Duration::from_secs(1);

/// Polls both ways, from the client and from the owner, until both have ended.
///
/// The owner judges the stream. Here a side is given up when it takes nothing for the stall limit, when the owner, which
/// pings, says nothing for the silence limit, or when it does not end a few seconds after the other one.
pub(crate) async fn run<W: Way>(
    ways: &mut [W; 2],
    limits: &Limits,
    mut poll: impl FnMut(&mut [W; 2], &mut Context<'_>) -> Poll<io::Result<()>>,
) -> io::Result<()> {
    let mut looks = interval(LOOK.min(limits.silence / 4).min(limits.stall / 4));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut over = None;
    loop {
        tokio::select! {
            moved = poll_fn(|cx| poll(ways, cx)) => return moved,
            _ = looks.tick() => {}
        }
        let now = clock::now();
        if ways.iter().any(Way::is_shut) {
            over.get_or_insert(now);
        }
        let since = |moment: Instant| now.saturating_duration_since(moment);
        let stalled = ways.iter().any(|way| way.is_blocked() && since(way.moved()) > limits.stall);
        let [_, outward] = &*ways;
        let silent = !outward.is_blocked() && !outward.has_ended() && since(outward.moved()) > limits.silence;
        let late = over.is_some_and(|over| since(over) > limits.close.max(FAREWELL));
        if stalled || silent || late {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}
