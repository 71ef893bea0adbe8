//! Streams that have much to move take turns, one at a time on each thread.
//!
//! A stream that only now and then has something to say waits for one slice of one such stream, however many there are. And
//! the one whose turn it is moves what its sender has just written, which costs less than what waited while others had
//! theirs: its caches are still warm.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::yield_now,
};
use tokio_util::sync::PollSemaphore;

/// A stream moves at least so many bytes before other tasks of the thread go on and new events are looked for: the reads that
/// reach this, which take a millisecond or two.
pub(super) const SLICE: usize = 1024 * 1024;

/// A direction that always had bytes to move, in so many slices in a row, goes on when it is the stream's turn.
pub(super) const AT_ONCE: u8 = 4;

/// A direction of which less was moved in a slice has little to say, even if it never fell silent.
pub(super) const LITTLE: usize = SLICE / 4;

/// How long it takes until all who take turns had theirs, unless they are so many that the least turns take longer.
const ROUND: Duration = Duration::from_millis(500);

/// How long a turn is at the least.
const TURN_LEAST: Duration = Duration::from_millis(2);

/// How long a turn is at the most.
const TURN_MOST: Duration = Duration::from_millis(30);

thread_local! {
    static LINE: Arc<Line> = Arc::new(Line { turn: Arc::new(Semaphore::new(1)), length: AtomicU32::new(0) });
}

/// Those of a thread who take turns.
#[derive(Debug)]
struct Line {
    turn: Arc<Semaphore>,
    length: AtomicU32,
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
    end: Instant,
    /// When the stream stood aside last, or got its turn.
    aside: Instant,
    /// It may go on until then before it stands aside: others had as long since it last did.
    slice_end: Instant,
}

impl Place {
    /// The last place.
    pub(super) fn new() -> Self {
        let line = LINE.with(Arc::clone);
        line.length.fetch_add(1, Ordering::Relaxed);
        Self { next: PollSemaphore::new(Arc::clone(&line.turn)), turn: None, line }
    }

    /// Ready when it is the stream's turn.
    pub(super) fn poll(&mut self, now: Instant, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(turn) = &mut self.turn {
            turn.slice_end = now + now.saturating_duration_since(turn.aside);
            return Poll::Ready(());
        }
        let length = self.line.length.load(Ordering::Relaxed);
        // Nobody closes the semaphore.
        self.turn = std::task::ready!(self.next.poll_acquire(cx)).map(|permit| Turn {
            _permit: permit,
            end: now + share(length),
            aside: now,
            slice_end: now,
        });
        Poll::Ready(())
    }

    /// Whether the stream may go on without standing aside: it is its turn, and others had more of the thread's time. So those
    /// who take turns have half of it, however many go on without.
    pub(super) fn may_go_on(&self, now: Instant) -> bool {
        self.turn.as_ref().is_some_and(|turn| now < turn.end.min(turn.slice_end))
    }

    /// The stream stands aside. If its turn is over, it goes to the end of the line.
    pub(super) fn stand_aside(&mut self, now: Instant) {
        self.turn.take_if(|turn| now >= turn.end);
        if let Some(turn) = &mut self.turn {
            turn.aside = now;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.line.length.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How many streams of this thread take turns.
pub(super) fn in_line() -> u32 {
    LINE.with(|line| line.length.load(Ordering::Relaxed))
}

/// How long the turn of one of so many is.
fn share(length: u32) -> Duration {
    (ROUND / length.max(1)).clamp(TURN_LEAST, TURN_MOST)
}

/// Has the task polled again when every other one that can go on has been, and new events were looked for.
pub(super) fn stand_aside(cx: &mut Context<'_>) {
    let _ = pin!(yield_now()).poll(cx);
}

#[cfg(test)]
mod tests {
    use futures_util::task::noop_waker_ref;
    use midspan_platform::clock;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_round_takes_half_a_second_unless_there_are_very_many() {
        assert_eq!([1, 16, 50, 250, 1000].map(share), [30, 30, 10, 2, 2].map(|turn| turn * MS));
    }

    #[test]
    fn each_has_its_turn_in_the_order_of_arrival() {
        let cx = &mut Context::from_waker(noop_waker_ref());
        let mut places = [Place::new(), Place::new(), Place::new()];
        let mut now = clock::now();
        for turn in 0..6 {
            for at in 0..3 {
                let ready = places[(turn + at) % 3].poll(now, cx).is_ready();
                assert_eq!(ready, at == 0, "turn {turn}, place {at}");
            }
            let place = &mut places[turn % 3];
            now += 29 * MS;
            place.stand_aside(now);
            assert!(place.poll(now, cx).is_ready());
            now += MS;
            place.stand_aside(now);
        }
    }

    #[test]
    fn who_leaves_gives_its_turn_to_the_next() {
        let cx = &mut Context::from_waker(noop_waker_ref());
        let (mut first, mut second, mut third) = (Place::new(), Place::new(), Place::new());
        let now = clock::now();
        assert!(first.poll(now, cx).is_ready());
        assert!(second.poll(now, cx).is_pending() && third.poll(now, cx).is_pending());
        drop(second);
        assert!(third.poll(now, cx).is_pending());
        drop(first);
        assert!(third.poll(now, cx).is_ready());
    }

    #[test]
    fn a_slice_is_as_long_as_others_had_and_no_longer_than_the_turn() {
        let cx = &mut Context::from_waker(noop_waker_ref());
        let (mut place, mut other) = (Place::new(), Place::new());
        let start = clock::now();
        assert!(!place.may_go_on(start));
        assert!(place.poll(start, cx).is_ready() && other.poll(start, cx).is_pending());
        assert!(!place.may_go_on(start), "nobody else had any time");
        assert!(!other.may_go_on(start), "it is not its turn");
        place.stand_aside(start + MS);
        assert!(place.poll(start + 11 * MS, cx).is_ready());
        assert!(place.may_go_on(start + 20 * MS) && !place.may_go_on(start + 21 * MS));
        place.stand_aside(start + 21 * MS);
        assert!(place.poll(start + 29 * MS, cx).is_ready());
        assert!(place.may_go_on(start + 29 * MS) && !place.may_go_on(start + TURN_MOST));
    }
}
