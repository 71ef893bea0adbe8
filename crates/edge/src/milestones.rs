//! What others wait for in the life of a stream.

use std::{
    pin::pin,
    sync::atomic::{AtomicU8, Ordering},
    task::{Context, Poll},
};

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

/// Something that happens once in the life of a stream.
#[derive(Debug, Clone, Copy)]
pub enum Milestone {
    /// Somebody other than its splice has ended it.
    Ended = 1,
    /// The store knows that it is joined, or could not be told in time.
    Announced = 2,
    /// Its legs have been told of the end.
    Told = 4,
    /// Its end has been logged, counted and recorded.
    Reported = 8,
}

/// Which of them have been reached. There is one of it for each stream, so it is small.
#[derive(Debug, Default)]
pub struct Milestones {
    reached: AtomicU8,
    changed: Notify,
    /// The splice, which waits for its stream to be ended all the time and so needs a cheap way.
    splice: AtomicWaker,
}

impl Milestones {
    /// Wakes all who wait for it, now or later.
    pub fn reach(&self, milestone: Milestone) {
        self.reached.fetch_or(milestone as u8, Ordering::Release);
        self.changed.notify_waiters();
        self.splice.wake();
    }

    /// Whether somebody other than its splice has ended the stream. Only the splice may ask: it alone is woken.
    pub fn poll_ended(&self, cx: &Context<'_>) -> Poll<()> {
        self.splice.register(cx.waker());
        if self.has_reached(Milestone::Ended) { Poll::Ready(()) } else { Poll::Pending }
    }

    fn has_reached(&self, milestone: Milestone) -> bool {
        self.reached.load(Ordering::Acquire) & milestone as u8 != 0
    }

    /// Waits until it is reached.
    pub async fn wait_for(&self, milestone: Milestone) {
        let mut changed = pin!(self.changed.notified());
        loop {
            // From here on no change is missed.
            changed.as_mut().enable();
            if self.has_reached(milestone) {
                return;
            }
            changed.as_mut().await;
            changed.set(self.changed.notified());
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, poll};

    use super::*;

    #[tokio::test]
    async fn who_waits_is_woken_by_what_it_waits_for_alone() {
        let milestones = Milestones::default();
        let mut told = pin!(milestones.wait_for(Milestone::Told));
        assert!(poll!(&mut told).is_pending());
        milestones.reach(Milestone::Ended);
        assert!(poll!(&mut told).is_pending());
        milestones.reach(Milestone::Told);
        assert!(poll!(&mut told).is_ready());
        let splice = std::future::poll_fn(|cx| milestones.poll_ended(cx));
        assert!(splice.now_or_never().is_some());
        assert!(milestones.wait_for(Milestone::Ended).now_or_never().is_some());
        assert!(milestones.wait_for(Milestone::Reported).now_or_never().is_none());
    }
}
