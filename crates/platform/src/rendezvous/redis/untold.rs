//! Ends that could not be told, which are told once the store can be reached again.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::join_all;
use midspan_core::{id::StreamId, record::StreamState};
use tracing::{info, warn};

use super::RedisRendezvous;
use crate::lifecycle::Lifecycle;

/// Ends that the store does not know of, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Untold(Mutex<VecDeque<(StreamId, StreamState)>>);

/// How many are kept, at some 200 bytes each. Of what goes beyond that, the store hears when their edge is gone.
const KEPT_MAX: usize = 50_000;

/// How often they are tried.
const AGAIN: Duration = Duration::from_millis(500);

/// How many are told at the same time.
const AT_ONCE: usize = 64;

impl Untold {
    pub(super) fn push(&self, stream: StreamId, end: StreamState) {
        let mut ends = self.ends();
        if ends.len() == KEPT_MAX {
            warn!("too many ends that the store has not heard of; the oldest is left out");
            ends.pop_front();
        }
        ends.push_back((stream, end));
    }

    fn take(&self) -> Vec<(StreamId, StreamState)> {
        let mut ends = self.ends();
        let count = ends.len().min(AT_ONCE);
        ends.drain(..count).collect()
    }

    fn ends(&self) -> MutexGuard<'_, VecDeque<(StreamId, StreamState)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RedisRendezvous {
    /// Tells what could not be told, again and again, to the end of the process.
    pub(super) async fn tell_again(self: Arc<Self>, lifecycle: Lifecycle) {
        while tokio::time::timeout(AGAIN, lifecycle.silent().cancelled()).await.is_err() {
            self.tell_untold().await;
        }
        self.tell_untold().await;
    }

    async fn tell_untold(&self) {
        let mut told = 0;
        loop {
            let ends = self.untold.take();
            if ends.is_empty() {
                break;
            }
            // One that fails stands in line again.
            let results = join_all(ends.into_iter().map(|(stream, end)| self.advance(stream, end))).await;
            told += results.iter().filter(|result| result.is_ok()).count();
            if results.iter().any(Result::is_err) {
                break;
            }
        }
        if told > 0 {
            info!(told, "ends told that the store had not heard of");
        }
    }
}
