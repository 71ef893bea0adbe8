//! Ends that could not be told, or may have been lost, which are told once the store can be reached again.

use std::{
    sync::{Arc, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::join_all;
use midspan_core::{
    id::StreamId,
    record::{StreamRecord, StreamState},
};
use tracing::info;

use super::RedisRendezvous;
use crate::{
    lifecycle::Lifecycle,
    rendezvous::{Ends, StoreError},
};

/// How often they are tried.
const AGAIN: Duration = Duration::from_millis(500);

/// How many are told at the same time.
const AT_ONCE: usize = 64;

/// An end that a server has not heard of, or may have lost.
#[derive(Debug)]
pub(super) struct Untold {
    pub(super) stream: StreamId,
    pub(super) end: StreamState,
    /// Whether the end is still to be recorded when the store takes it.
    pub(super) is_deletion: bool,
}

impl RedisRendezvous {
    pub(super) fn ends(&self) -> MutexGuard<'_, Ends<Untold>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn deleted_late(&self) -> MutexGuard<'_, Vec<StreamRecord>> {
        self.deleted_late.lock().unwrap_or_else(PoisonError::into_inner)
    }

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
            let ends = self.ends().take(AT_ONCE);
            if ends.is_empty() {
                break;
            }
            // One that fails stands in line again.
            let results = join_all(ends.into_iter().map(|untold| self.tell(untold))).await;
            told += results.iter().filter(|result| result.is_ok()).count();
            if results.iter().any(Result::is_err) {
                break;
            }
        }
        if told > 0 {
            info!(told, "ends told that the store had not heard of, or may have forgotten");
        }
    }

    async fn tell(&self, Untold { stream, end, is_deletion }: Untold) -> Result<(), StoreError> {
        if let Some(record) = self.advance(stream, end, is_deletion).await?
            && is_deletion
        {
            self.deleted_late().push(record);
        }
        Ok(())
    }
}
