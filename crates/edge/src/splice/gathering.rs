//! How a leg that brings much, and is alone with that on its thread, is waited for.
//!
//! A relay that keeps up with its sender finds little whenever it looks, sleeps, and is woken for little again. And what it
//! has not read yet is acknowledged only when it is read: a congestion control like BBR takes that for a slower path, and
//! sends less. So the socket of such a leg gets a low-water mark: the kernel acknowledges at once what comes in below it,
//! and wakes the relay for that much, or for the end of the connection. What does not come in time is fetched all the same,
//! and the leg has to bring much again before it is waited for once more.

use std::{cell::Cell, future::Future as _, pin::Pin, task::Context, time::Duration};

use tokio::time::{Sleep, sleep};

use super::{half::Pipe, turns};

/// A leg is waited for once it has brought so many bytes while nobody else on the thread said anything.
const ALONE: usize = 16 * 1024 * 1024;

/// The low-water mark, in bytes. 1 MiB gained a little less, half a MiB half as much, and 2 MiB no more.
const GATHERED: usize = 1536 * 1024;

/// How long the relay waits for that; a timer takes up to a millisecond more.
const WAIT: Duration = Duration::from_millis(1);

thread_local! {
    /// How many reads there were on this thread, of all legs.
    static READS: Cell<u32> = const { Cell::new(0) };
}

/// Whether more of a leg's input is to come together, and since when it is waited for.
#[derive(Debug, Default)]
pub(super) struct Gathering {
    streak: Streak,
    /// Whether the low-water mark is set.
    marked: bool,
    wait: Option<Pin<Box<Sleep>>>,
}

impl Gathering {
    /// The leg was read from.
    pub(super) fn heard(&mut self, bytes: usize) {
        self.wait = None;
        let reads = READS.get().wrapping_add(1);
        READS.set(reads);
        self.streak.add(bytes, reads);
    }

    /// There is nothing to read from the leg now. The task that sees this is polled again when the wait is over.
    pub(super) fn dry(&mut self, leg: &impl Pipe, cx: &mut Context<'_>) {
        if let Some(wait) = &mut self.wait {
            if wait.as_mut().poll(cx).is_ready() {
                self.streak = Streak::default();
                self.end(leg);
            }
        } else if self.streak.is_long(READS.get()) && turns::in_line() <= 1 {
            // Not with TLS: it gains nothing.
            self.marked = self.marked || leg.set_low_water(GATHERED);
            if self.marked {
                let _ = self.wait.insert(Box::pin(sleep(WAIT))).as_mut().poll(cx);
            }
        } else {
            self.end(leg);
        }
    }

    /// The leg is no longer waited for: each byte counts.
    pub(super) fn end(&mut self, leg: &impl Pipe) {
        self.wait = None;
        if std::mem::take(&mut self.marked) {
            leg.set_low_water(1);
        }
    }
}

/// What a leg brought since anybody else on its thread was heard.
#[derive(Debug, Default)]
struct Streak {
    bytes: usize,
    /// Which of the thread's reads was its last.
    last: u32,
}

impl Streak {
    fn add(&mut self, bytes: usize, reads: u32) {
        let before = if self.last == reads.wrapping_sub(1) { self.bytes } else { 0 };
        *self = Self { bytes: before.saturating_add(bytes), last: reads };
    }

    fn is_long(&self, reads: u32) -> bool {
        self.last == reads && self.bytes >= ALONE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leg_is_waited_for_once_it_has_brought_much_alone() {
        let mut streak = Streak::default();
        for reads in 1..=16 {
            assert!(!streak.is_long(reads - 1), "{reads}");
            streak.add(ALONE / 16, reads);
        }
        assert!(streak.is_long(16));
        assert!(!streak.is_long(17), "another was heard since");
    }

    #[test]
    fn what_it_brought_before_another_was_heard_does_not_count() {
        let mut streak = Streak::default();
        streak.add(ALONE, u32::MAX);
        streak.add(1, 0);
        assert!(streak.is_long(0), "the count of reads starts again");
        streak.add(ALONE - 1, 2);
        assert!(!streak.is_long(2));
    }
}
