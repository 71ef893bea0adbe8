//! Ends of streams that a store has to be told of, for the first time or once more.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use midspan_core::{id::StreamId, record::StreamState};

/// What one process knows of ends that its store may not know.
#[derive(Debug, Default)]
pub struct Ends {
    /// Those that could not be told, the oldest first.
    untold: VecDeque<(StreamId, StreamState)>,
    /// Those that were told lately. A server that takes the place of another one may have missed them, and would list these
    /// streams for as long as their edges live.
    told: VecDeque<(Instant, StreamId, StreamState)>,
}

/// How many of either are kept, at some 200 bytes each. Of what goes beyond that, the store hears when their edge is gone.
const KEPT_MAX: usize = 50_000;

/// How far behind its master a server may be that takes its place.
const BEHIND_MAX: Duration = Duration::from_secs(10);

impl Ends {
    /// An end could not be told. False when the oldest one is left out for it.
    pub fn failed(&mut self, stream: StreamId, end: StreamState) -> bool {
        let has_room = self.untold.len() < KEPT_MAX;
        if !has_room {
            self.untold.pop_front();
        }
        self.untold.push_back((stream, end));
        has_room
    }

    /// An end was told.
    pub fn told(&mut self, stream: StreamId, end: StreamState, now: Instant) {
        if self.told.len() == KEPT_MAX {
            self.told.pop_front();
        }
        self.told.push_back((now, stream, end));
    }

    /// The lease was renewed, and the store may have forgotten, or has not. What it may have missed is to be told again.
    pub fn renewed(&mut self, forgotten: bool, now: Instant) {
        if forgotten {
            for (_, stream, end) in std::mem::take(&mut self.told) {
                self.failed(stream, end);
            }
        }
        while self.told.front().is_some_and(|(told, ..)| now.saturating_duration_since(*told) > BEHIND_MAX) {
            self.told.pop_front();
        }
    }

    /// Up to `most` ends that are to be told now. Each comes back with [`Ends::failed`] or [`Ends::told`].
    pub fn take(&mut self, most: usize) -> Vec<(StreamId, StreamState)> {
        let count = self.untold.len().min(most);
        self.untold.drain(..count).collect()
    }

    /// Whether nothing is to be told.
    pub fn is_empty(&self) -> bool {
        self.untold.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use midspan_core::{close::CloseReason, record::StreamEnd, time::UnixTime};

    use super::*;
    use crate::clock;

    #[test]
    fn what_was_told_lately_is_told_again_to_a_store_that_has_forgotten() {
        let (mut ends, start) = (Ends::default(), clock::now());
        let id = StreamId::from_random;
        let end = || StreamState::Ended(StreamEnd::unused(CloseReason::Deleted, UnixTime(1)));
        let later = |seconds| start + Duration::from_secs(seconds);
        ends.told(id(1), end(), start);
        ends.renewed(false, later(5));
        ends.told(id(2), end(), later(6));
        ends.renewed(false, later(11));
        assert!(ends.is_empty());
        // However long it has been away.
        ends.renewed(true, later(100));
        assert_eq!(ends.take(10), [(id(2), end())]);
        ends.renewed(true, later(101));
        assert!(ends.is_empty(), "who takes them tells them");
        assert!(ends.failed(id(2), end()));
        assert_eq!(ends.take(1), [(id(2), end())]);
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let (mut ends, now) = (Ends::default(), clock::now());
        let end = StreamState::Ended(StreamEnd::unused(CloseReason::Deleted, UnixTime(1)));
        for n in 0..=KEPT_MAX as u128 {
            assert_eq!(ends.failed(StreamId::from_random(n), end.clone()), n < KEPT_MAX as u128);
            ends.told(StreamId::from_random(n), end.clone(), now);
        }
        assert_eq!((ends.untold.len(), ends.told.len()), (KEPT_MAX, KEPT_MAX));
    }
}
