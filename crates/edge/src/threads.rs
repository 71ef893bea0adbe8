//! The threads that move bytes. Each has a runtime of its own, accepts connections, and keeps the streams that it has.
//!
//! So whoever wakes a stream is the thread that runs it: no other thread is woken for it, and what it reads and writes
//! stays in one core's caches.

use std::{io, iter, sync::Arc, thread};

use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
};

use crate::moderation;

/// Where joined streams run: at least one thread.
#[derive(Debug)]
pub struct DataThreads {
    first: DataThread,
    others: Vec<DataThread>,
}

#[derive(Debug)]
struct DataThread {
    runtime: Handle,
    /// Each of its streams has a clone.
    streams: Arc<()>,
    /// Dropped to end the thread.
    _stop: Option<oneshot::Sender<()>>,
}

/// A stream's seat on one of the threads, until it is dropped.
#[derive(Debug)]
pub(crate) struct Seat(#[expect(dead_code, reason = "counts by being there")] Arc<()>);

impl DataThreads {
    /// Starts `count` threads, which end when this is dropped. 0 means one for each core.
    pub fn start(count: usize) -> io::Result<Self> {
        let count = match count {
            0 => thread::available_parallelism().map_or(1, usize::from),
            count => count,
        };
        let others = (1..count).map(DataThread::start).collect::<io::Result<_>>()?;
        Ok(Self { first: DataThread::start(0)?, others })
    }

    /// Streams run where the caller does.
    pub fn current() -> Self {
        let first = DataThread { runtime: Handle::current(), streams: Arc::new(()), _stop: None };
        Self { first, others: Vec::new() }
    }

    /// The runtimes of all threads.
    pub fn runtimes(&self) -> Vec<Handle> {
        self.all().map(|thread| thread.runtime.clone()).collect()
    }

    /// A seat on the thread that has the fewest streams; on the caller's, if none has fewer.
    pub(crate) fn seat(&self) -> (&Handle, Seat) {
        let here = Handle::current().id();
        let least = self.all().min_by_key(|thread| (thread.streams(), thread.runtime.id() != here));
        let least = least.unwrap_or(&self.first);
        (&least.runtime, Seat(Arc::clone(&least.streams)))
    }

    fn all(&self) -> impl Iterator<Item = &DataThread> {
        iter::once(&self.first).chain(&self.others)
    }
}

impl DataThread {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .on_thread_park(moderation::before_sleep)
            .on_thread_unpark(moderation::after_sleep)
            .build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        thread::Builder::new().name(format!("midspan-data-{number}")).spawn(move || {
            // The error says that the sender was dropped, which is what is waited for.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        })?;
        Ok(Self { runtime: handle, streams: Arc::new(()), _stop: Some(stop) })
    }

    fn streams(&self) -> usize {
        Arc::strong_count(&self.streams) - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn streams_are_spread_over_the_threads() {
        let threads = DataThreads::start(2).unwrap();
        let mut seats: Vec<_> = (0..4).map(|_| threads.seat().1).collect();
        let counts = || [threads.first.streams(), threads.others[0].streams()];
        assert_eq!(counts(), [2, 2]);
        seats.truncate(1);
        assert_eq!(counts(), [1, 0]);
        let (runtime, _seat) = threads.seat();
        let name = runtime.spawn(async { thread::current().name().map(str::to_owned) }).await.unwrap();
        assert_eq!(name.as_deref(), Some("midspan-data-1"));
    }

    #[tokio::test]
    async fn a_stream_stays_on_its_thread_unless_another_one_has_fewer() {
        let threads = Arc::new(DataThreads::start(3).unwrap());
        let last = threads.others[1].runtime.clone();
        let on_last = Arc::clone(&threads);
        let take = async move {
            let (runtime, seat) = on_last.seat();
            (runtime.id(), seat)
        };
        let (first, _seat) = last.spawn(take).await.unwrap();
        assert_eq!(first, last.id());
        let on_last = Arc::clone(&threads);
        let second = last.spawn(async move { on_last.seat().0.id() }).await.unwrap();
        assert_ne!(second, last.id());
    }
}
