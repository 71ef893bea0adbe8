//! How a leg that brings much, and is alone with that on its thread, is waited for.
//!
//! A relay that keeps up with its sender finds little whenever it looks, sleeps, and is woken for little again; and what it
//! has not read yet is not acknowledged either. So the socket of such a leg gets a low-water mark: the kernel acknowledges at
//! once what comes in below it, and wakes the relay for that much, or for the end of the connection. What does not come in
//! time is fetched all the same, and the leg has to bring much again before it is waited for once more.

use std::{cell::Cell, future::Future as _, pin::Pin, task::Context, time::Duration};

use tokio::time::{Instant, Sleep, sleep};

use super::{half::Pipe, turns};

/// A leg is waited for once it has brought so many bytes while nobody else on the thread said anything.
const ALONE: usize = 16 * 1024 * 1024;

/// The low-water mark, in bytes. 1 MiB gained a little less, half a MiB much less, and 2 MiB no more.
const GATHERED: usize = 1536 * 1024;

/// How long the relay waits for that; a timer takes up to a millisecond more.
const WAIT: Duration = Duration::from_millis(1);

thread_local! {
    static STREAK: Cell<Streak> = const { Cell::new(Streak::NONE) };
}

/// Whether more of a leg's input is to come together. There is one for each leg, so it is small.
#[derive(Debug, Default)]
pub(super) struct Gathering {
    /// Which of its thread's reads was the leg's last.
    last: u32,
}

/// What a leg has that is waited for: the low-water mark is set.
#[derive(Debug)]
pub(super) struct Wait {
    /// The leg's last read when the wait began: it is over when there was another since.
    after: u32,
    end: Pin<Box<Sleep>>,
}

impl Gathering {
    /// The leg was read from.
    pub(super) fn heard(&mut self, bytes: usize) {
        let streak = STREAK.get().with(self.last, bytes);
        STREAK.set(streak);
        self.last = streak.reads;
    }

    /// There is nothing to read from the leg now, which is waited for if there is a `wait`. The task that sees this is polled
    /// again when that is over.
    pub(super) fn dry(&self, wait: &mut Option<Wait>, leg: &impl Pipe, cx: &mut Context<'_>) {
        if wait.as_ref().is_none_or(|wait| wait.after != self.last) {
            let goes_on = STREAK.get().is_long_of(self.last) && turns::in_line() <= 1;
            // A leg with TLS takes no mark: it would gain nothing.
            if !goes_on || wait.is_none() && !leg.set_low_water(GATHERED) {
                return end(wait, leg);
            }
            let wait = wait.get_or_insert_with(|| Wait { after: 0, end: Box::pin(sleep(WAIT)) });
            wait.after = self.last;
            wait.end.as_mut().reset(Instant::now() + WAIT);
        }
        if wait.as_mut().is_some_and(|wait| wait.end.as_mut().poll(cx).is_ready()) {
            STREAK.set(STREAK.get().broken());
            end(wait, leg);
        }
    }
}

/// The leg is not waited for any more: each byte counts.
pub(super) fn end(wait: &mut Option<Wait>, leg: &impl Pipe) {
    if wait.take().is_some() {
        leg.set_low_water(1);
    }
}

/// What one leg of a thread brought, and none of the others in between.
#[derive(Debug, Clone, Copy)]
struct Streak {
    bytes: usize,
    /// How many reads there were on the thread, of all legs.
    reads: u32,
}

impl Streak {
    const NONE: Self = Self { bytes: 0, reads: 0 };

    /// One more read, of a leg whose last one was `last`.
    fn with(self, last: u32, bytes: usize) -> Self {
        let before = if last == self.reads { self.bytes } else { 0 };
        Self { bytes: before.saturating_add(bytes), reads: self.reads.wrapping_add(1) }
    }

    /// Whether it is long, and that of the leg whose last read was `last`.
    fn is_long_of(self, last: u32) -> bool {
        last == self.reads && self.bytes >= ALONE
    }

    fn broken(self) -> Self {
        Self { bytes: 0, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leg_is_waited_for_once_it_has_brought_much_alone() {
        let mut streak = Streak::NONE;
        for read in 1..=16 {
            assert!(!streak.is_long_of(streak.reads), "{read}");
            streak = streak.with(streak.reads, ALONE / 16);
        }
        assert!(streak.is_long_of(16));
        assert!(!streak.is_long_of(15), "another leg's");
        assert!(!streak.broken().is_long_of(16));
    }

    #[test]
    fn what_it_brought_before_another_was_heard_does_not_count() {
        let streak = Streak { bytes: ALONE, reads: u32::MAX }.with(u32::MAX, 1);
        assert!(streak.is_long_of(0), "the count of reads starts again");
        let other = streak.with(7, 1);
        assert_eq!((other.bytes, other.reads), (1, 1));
        let back = other.with(0, ALONE - 1);
        assert!(!back.is_long_of(2));
    }
}
