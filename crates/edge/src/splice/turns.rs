//! Streams that have much to move take turns, one at a time on each thread.
//!
//! A stream that only now and then has something to say waits for one slice of one such stream, however many there are. And
//! the one whose turn it is moves what its sender has just written, which costs less than what waited while others had
//! theirs: its caches are still warm.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::yield_now,
};
use tokio_util::sync::PollSemaphore;

/// A stream moves about so many bytes before other tasks of the thread go on and new events are looked for: a millisecond at
/// most.
pub(super) const SLICE: usize = 1024 * 1024;

/// A direction that has moved so many slices in a row goes on when it is the stream's turn.
pub(super) const AT_ONCE: u8 = 4;

/// What all who take turns move in a round: what a thread moves in a third of a second or so.
const ROUND: usize = 1024 * 1024 * 1024;

/// What one moves in its turn at the least, however many there are.
const TURN_LEAST: usize = 4 * 1024 * 1024;

/// What one moves in its turn at the most.
const TURN_MOST: usize = 64 * 1024 * 1024;

thread_local! {
    static LINE: Arc<Line> = Arc::new(Line { turn: Arc::new(Semaphore::new(1)), length: AtomicUsize::new(0) });
}

/// Those of a thread who take turns.
#[derive(Debug)]
struct Line {
    turn: Arc<Semaphore>,
    length: AtomicUsize,
}

/// A stream's place in the line, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    line: Arc<Line>,
    next: PollSemaphore,
    turn: Option<Turn>,
}

#[derive(Debug)]
struct Turn {
    _permit: OwnedSemaphorePermit,
    /// How many bytes it may still move.
    left: usize,
}

impl Place {
    /// The last place.
    pub(super) fn new() -> Self {
        let line = LINE.with(Arc::clone);
        line.length.fetch_add(1, Ordering::Relaxed);
        Self { next: PollSemaphore::new(Arc::clone(&line.turn)), turn: None, line }
    }

    /// Ready when it is the stream's turn.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.turn.is_none() {
            // Nobody closes the semaphore.
            self.turn = std::task::ready!(self.next.poll_acquire(cx)).map(|permit| Turn {
                _permit: permit,
                left: share(self.line.length.load(Ordering::Relaxed)),
            });
        }
        Poll::Ready(())
    }

    /// So many bytes were moved. When that was its share, the stream goes to the end of the line.
    pub(super) fn moved(&mut self, bytes: usize) {
        if let Some(turn) = &mut self.turn {
            turn.left = turn.left.saturating_sub(bytes);
        }
        self.turn.take_if(|turn| turn.left == 0);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.line.length.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How much one of so many moves in its turn.
fn share(length: usize) -> usize {
    (ROUND / length.max(1)).clamp(TURN_LEAST, TURN_MOST)
}

/// Has the task polled again when every other one that can go on has been, and new events were looked for.
pub(super) fn stand_aside(cx: &mut Context<'_>) {
    let _ = pin!(yield_now()).poll(cx);
}

#[cfg(test)]
mod tests {
    use futures_util::task::noop_waker_ref;

    use super::*;

    const MIB: usize = 1024 * 1024;

    #[test]
    fn a_round_takes_a_while_however_many_there_are() {
        assert_eq!([1, 16, 32, 128, 1000].map(share), [64, 64, 32, 8, 4].map(|mib| mib * MIB));
    }

    #[test]
    fn each_has_its_share_in_the_order_of_arrival() {
        let cx = &mut Context::from_waker(noop_waker_ref());
        let mut places = [Place::new(), Place::new(), Place::new()];
        for turn in 0..6 {
            for at in [1, 2, 0] {
                let ready = places[(turn + at) % 3].poll(cx).is_ready();
                // The first who asks has the first turn.
                assert_eq!(ready, at == 1, "turn {turn}, place {at}");
            }
            let place = &mut places[(turn + 1) % 3];
            place.moved(TURN_MOST - 1);
            assert!(place.poll(cx).is_ready());
            place.moved(1);
        }
    }

    #[test]
    fn who_leaves_gives_its_turn_to_the_next() {
        let cx = &mut Context::from_waker(noop_waker_ref());
        let (mut first, mut second, mut third) = (Place::new(), Place::new(), Place::new());
        assert!(first.poll(cx).is_ready());
        assert!(second.poll(cx).is_pending() && third.poll(cx).is_pending());
        drop(second);
        assert!(third.poll(cx).is_pending());
        drop(first);
        assert!(third.poll(cx).is_ready());
    }

    #[test]
    fn one_alone_goes_on() {
        let cx = &mut Context::from_waker(noop_waker_ref());
        let mut place = Place::new();
        for _ in 0..3 {
            assert!(place.poll(cx).is_ready());
            place.moved(TURN_MOST);
        }
    }
}
