//! Ends that a store has to be told of, for the first time or once more.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// The ends of streams, or of links, that one process knows of and its store may not know.
#[derive(Debug)]
pub struct Ends<T> {
    /// Those that could not be told, the oldest first.
    untold: VecDeque<T>,
    /// Those that were told lately. A server that takes the place of another one may have missed them, and would list what has
    /// ended for as long as its process lives.
    told: VecDeque<(Instant, T)>,
    /// How often the store may have forgotten.
    forgets: u64,
}

/// How many of either are kept, at some 200 bytes each. Of what goes beyond that, the store hears when their edge is gone.
const KEPT_MAX: usize = 50_000;

/// How far behind its master a server may be that takes its place.
const BEHIND_MAX: Duration = Duration::from_secs(10);

impl<T> Ends<T> {
    /// One could not be told. False when the oldest one is left out for it.
    pub fn failed(&mut self, end: T) -> bool {
        let has_room = self.untold.len() < KEPT_MAX;
        if !has_room {
            self.untold.pop_front();
        }
        self.untold.push_back(end);
        has_room
    }

    /// How often the store may have forgotten so far. To be asked for when something begins to be told.
    pub fn forgets(&self) -> u64 {
        self.forgets
    }

    /// One was told. If the store may have forgotten since that began, who heard of it may have been the server of before.
    pub fn told(&mut self, end: T, began: u64, now: Instant) {
        if began != self.forgets {
            self.failed(end);
            return;
        }
        if self.told.len() == KEPT_MAX {
            self.told.pop_front();
        }
        self.told.push_back((now, end));
    }

    /// The lease was renewed, and the store may have forgotten, or has not. What it may have missed is to be told again.
    pub fn renewed(&mut self, forgotten: bool, now: Instant) {
        if forgotten {
            self.forgets += 1;
            for (_, end) in std::mem::take(&mut self.told) {
                self.failed(end);
            }
        }
        while self.told.front().is_some_and(|(told, _)| now.saturating_duration_since(*told) > BEHIND_MAX) {
            self.told.pop_front();
        }
    }

    /// Up to `most` that are to be told now. Each comes back with [`Ends::failed`] or [`Ends::told`].
    pub fn take(&mut self, most: usize) -> Vec<T> {
        let count = self.untold.len().min(most);
        self.untold.drain(..count).collect()
    }

    /// Whether nothing is to be told.
    pub fn is_empty(&self) -> bool {
        self.untold.is_empty()
    }
}

impl<T> Default for Ends<T> {
    fn default() -> Self {
        Self { untold: VecDeque::new(), told: VecDeque::new(), forgets: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn what_was_told_lately_is_told_again_to_a_store_that_has_forgotten() {
        let (mut ends, start) = (Ends::default(), clock::now());
        let later = |seconds| start + Duration::from_secs(seconds);
        ends.told(1, 0, start);
        ends.renewed(false, later(5));
        ends.told(2, ends.forgets(), later(6));
        ends.renewed(false, later(11));
        assert!(ends.is_empty());
        // However long it has been away.
        ends.renewed(true, later(100));
        assert_eq!(ends.take(10), [2]);
        ends.renewed(true, later(101));
        assert!(ends.is_empty(), "who takes them tells them");
        assert!(ends.failed(2));
        assert_eq!(ends.take(1), [2]);
        // What was on its way in the meantime.
        let began = ends.forgets();
        ends.renewed(true, later(102));
        ends.told(3, began, later(102));
        assert_eq!(ends.take(10), [3]);
        ends.told(3, ends.forgets(), later(102));
        assert!(ends.is_empty());
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let (mut ends, now) = (Ends::default(), clock::now());
        for n in 0..=KEPT_MAX {
            assert_eq!(ends.failed(n), n < KEPT_MAX);
            ends.told(n, 0, now);
        }
        assert_eq!((ends.untold.len(), ends.told.len()), (KEPT_MAX, KEPT_MAX));
    }
}
