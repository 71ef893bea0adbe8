//! The life of a process: ready, draining, closing, stopped.
//!
//! ```text
//!   starting --> ready --> draining --> closing --> stopped
//!                  |  first signal   delay over    |  second signal, or everything has ended
//!                  |  /readyz false  no new streams, links are told to go, streams have their grace period
//! ```

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{
    runtime::Handle,
    signal::unix::{SignalKind, signal},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, Span, info};

/// Where the process stands, and all its tasks. Clones share one life.
#[derive(Debug, Clone, Default)]
pub struct Lifecycle {
    ready: Arc<AtomicBool>,
    draining: CancellationToken,
    closing: CancellationToken,
    stopped: CancellationToken,
    tasks: TaskTracker,
    silent: CancellationToken,
    recorders: TaskTracker,
}

impl Lifecycle {
    /// A process that is starting.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs a task that belongs to the process and is waited for at its end.
    pub fn spawn<F>(&self, span: Span, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tasks.spawn(task.instrument(span));
    }

    /// Does the same on a runtime of the caller's choice. The task is in no span, which would cost a stream more than its
    /// own state.
    pub fn spawn_on<F>(&self, runtime: &Handle, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tasks.spawn_on(task, runtime);
    }

    /// Runs a task that writes down what the others do, and so ends after them, once [`Lifecycle::silent`] says so.
    pub fn spawn_recorder<F>(&self, span: Span, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.recorders.spawn(task.instrument(span));
    }

    /// All other tasks have ended.
    pub fn silent(&self) -> &CancellationToken {
        &self.silent
    }

    /// Everything listens: `/readyz` may say yes.
    pub fn set_ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
    }

    /// Whether new work is welcome.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed) && !self.draining.is_cancelled()
    }

    /// The first signal came: `/readyz` says no, everything else goes on as usual.
    pub fn draining(&self) -> &CancellationToken {
        &self.draining
    }

    /// No new streams and links from here on; what runs may go on until it is told otherwise.
    pub fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    /// Everything ends at once.
    pub fn stopped(&self) -> &CancellationToken {
        &self.stopped
    }

    /// Waits for SIGTERM or SIGINT and begins to drain. The next signal stops the process.
    pub async fn watch_signals(&self) -> std::io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        for order in ["drain", "stop"] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                () = self.stopped.cancelled() => return Ok(()),
            }
            info!(order, "signal received");
            match order {
                "drain" => self.draining.cancel(),
                _ => self.stopped.cancel(),
            }
        }
        Ok(())
    }

    /// How many tasks have not ended.
    pub fn task_count(&self) -> usize {
        self.tasks.len()
    }

    /// Waits until every task but the recorders has ended.
    pub async fn finished(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Lets the recorders write what they have, and waits for them.
    pub async fn recorded(&self) {
        self.silent.cancel();
        self.recorders.close();
        self.recorders.wait().await;
    }
}
