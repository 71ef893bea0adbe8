//! When a data thread lets small messages come together, as network cards do with interrupts.
//!
//! Messages that are sent one by one, faster than the thread can go to sleep, cost a sleep and a wake-up each: of this
//! thread, and of the one that reads them at the other end. A thread that has only such messages, which nobody answers,
//! rests for a moment before it looks for more; each of its reads then finds many, and they leave in one write. The more
//! the messages, the longer the rest, up to a millisecond. Where anything comes back, someone may be waiting for an
//! answer: that ends the rests, so it is held up by one of them at most.

use std::{
    cell::RefCell,
    ops::Range,
    thread,
    time::{Duration, Instant},
};

use midspan_platform::clock;

/// A read of this many bytes is worth a wake-up.
const WORTH: usize = 16 * 1024;

/// After a rest, only a read of this many bytes is more than small messages that came together.
const WORTH_RESTED: usize = 128 * 1024;

/// From so many reads in a row on, the leg's messages count as unanswered.
const UNANSWERED: u8 = 64;

/// A thread that is woken sooner than this would better have rested.
const SHORT: Duration = Duration::from_micros(50);

/// So many short naps in a row, and the thread rests.
const SHORT_MANY: u8 = 16;

/// How long it rests at first; the kernel makes some 100 microseconds of it.
const REST_LEAST: Duration = Duration::from_micros(50);

/// How long it rests at most.
const REST_MOST: Duration = Duration::from_micros(800);

/// A rest that brings so many bytes in all is made longer the next time; one that brings less was too long for what comes,
/// and one that brings more is long enough.
const BROUGHT: Range<usize> = 1024..2 * WORTH;

thread_local! {
    static MODERATION: RefCell<Moderation> = const { RefCell::new(Moderation::new()) };
}

/// A leg was read from: so many bytes, in so many reads in a row without anything from the other leg.
pub(crate) fn note(bytes: usize, unanswered: u8) {
    MODERATION.with_borrow_mut(|moderation| moderation.note(bytes, unanswered));
}

/// The thread has nothing more to do.
pub(crate) fn before_sleep() {
    MODERATION.with_borrow_mut(|moderation| {
        if let Some(rest) = moderation.rest() {
            thread::sleep(rest);
        }
        // How long a nap is matters after small messages only, and the time costs some tens of nanoseconds.
        moderation.asleep = moderation.is_small().then(clock::now);
    });
}

/// The thread was woken.
pub(crate) fn after_sleep() {
    MODERATION.with_borrow_mut(|moderation| {
        let nap = moderation.asleep.take().map(|asleep| clock::now().saturating_duration_since(asleep));
        moderation.slept(nap.unwrap_or(Duration::MAX));
    });
}

#[derive(Debug)]
struct Moderation {
    asleep: Option<Instant>,
    short: u8,
    /// Whether there was anything since the last nap, and all of it small and unanswered.
    small: Option<bool>,
    /// How many bytes there were.
    brought: usize,
    rest: Duration,
}

impl Moderation {
    const fn new() -> Self {
        Self { asleep: None, short: 0, small: None, brought: 0, rest: REST_LEAST }
    }

    fn note(&mut self, bytes: usize, unanswered: u8) {
        let worth = if self.rests() { WORTH_RESTED } else { WORTH };
        let small = bytes < worth && unanswered >= UNANSWERED;
        self.small = Some(small && self.small != Some(false));
        self.brought += bytes;
    }

    fn rests(&self) -> bool {
        self.short >= SHORT_MANY
    }

    /// Whether there was something since the last nap, all of it small and unanswered.
    fn is_small(&self) -> bool {
        self.small == Some(true)
    }

    /// How long to rest, if at all.
    fn rest(&self) -> Option<Duration> {
        self.rests().then_some(self.rest)
    }

    /// A nap is over that lasted for `time`, without the rest before it.
    fn slept(&mut self, time: Duration) {
        let small = self.is_small();
        self.small = None;
        let brought = std::mem::take(&mut self.brought);
        if !small || time >= SHORT {
            (self.short, self.rest) = (0, REST_LEAST);
        } else if !self.rests() {
            self.short += 1;
        } else if BROUGHT.contains(&brought) {
            self.rest = (self.rest * 2).min(REST_MOST);
        } else if brought < BROUGHT.start {
            self.rest = (self.rest / 2).max(REST_LEAST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    fn after(naps: usize, nap: Duration, bytes: usize, unanswered: u8) -> Moderation {
        let mut moderation = Moderation::new();
        for _ in 0..naps {
            moderation.note(bytes, unanswered);
            moderation.slept(nap);
        }
        moderation
    }

    #[test]
    fn a_thread_that_is_woken_at_once_for_every_small_message_rests() {
        assert!(after(16, US, 64, 64).rests());
        assert!(!after(15, US, 64, 64).rests());
    }

    #[test]
    fn slow_messages_answered_messages_and_large_reads_are_never_held_up() {
        assert!(!after(100, 50 * US, 64, 255).rests());
        assert!(!after(100, US, 64, 63).rests());
        assert!(!after(100, US, 16 * 1024, 255).rests());
    }

    #[test]
    fn connections_that_are_opened_are_not_held_up() {
        let mut moderation = after(100, US, 64, 255);
        moderation.slept(US);
        assert!(!moderation.rests());
    }

    #[test]
    fn rests_get_longer_while_that_brings_more() {
        let rest = |naps, bytes| after(naps, US, bytes, 255).rest();
        assert_eq!(rest(16, 4096), Some(REST_LEAST));
        assert_eq!(rest(17, 4096), Some(REST_LEAST * 2));
        assert_eq!(rest(100, 4096), Some(REST_MOST));
        // Nothing comes together, or enough does.
        assert_eq!(rest(100, 64), Some(REST_LEAST));
        let mut moderation = after(16, US, 64, 255);
        moderation.note(WORTH_RESTED - 1, 255);
        moderation.slept(US);
        assert_eq!(moderation.rest(), Some(REST_LEAST));
        moderation.note(WORTH_RESTED, 255);
        moderation.slept(US);
        assert_eq!(moderation.rest(), None);
    }

    #[test]
    fn rests_get_shorter_again_when_less_comes() {
        let mut moderation = after(100, US, 4096, 255);
        for expected in [REST_MOST / 2, REST_MOST / 4, REST_MOST / 8, REST_LEAST, REST_LEAST] {
            moderation.note(1023, 255);
            moderation.slept(US);
            assert_eq!(moderation.rest(), Some(expected));
        }
    }

    #[test]
    fn one_answer_on_the_thread_ends_the_rest() {
        let mut moderation = after(100, US, 64, 255);
        moderation.note(64, 255);
        moderation.note(64, 1);
        moderation.slept(US);
        assert!(!moderation.rests());
    }
}
