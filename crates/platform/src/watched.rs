//! Files that are read again while the process runs, and what else changes meanwhile.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::sync::watch;
use tracing::{Span, error, info};

use crate::lifecycle::Lifecycle;

/// The newest of something, mostly the parsed contents of a file that made sense.
#[derive(Debug, Clone)]
pub struct Watched<T>(watch::Receiver<Arc<T>>);

impl<T: Send + Sync + 'static> Watched<T> {
    /// Reads `file` now, and looks every `interval` whether it has changed.
    ///
    /// Fails when it cannot be read and parsed now. Later, contents that cannot be used are logged and the ones before
    /// stay in force. Files are compared by content, since a mounted secret changes through links.
    pub async fn read(
        file: PathBuf,
        interval: Duration,
        lifecycle: &Lifecycle,
        parse: impl Fn(&str) -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let name = file.display().to_string();
        let mut text =
            tokio::fs::read_to_string(&file).await.with_context(|| format!("cannot read {name}"))?;
        let (sender, receiver) = watch::channel(Arc::new(parse(&text).with_context(|| name.clone())?));
        let stopped = lifecycle.stopped().clone();
        lifecycle.spawn(Span::current(), async move {
            let mut failed = false;
            loop {
                tokio::select! {
                    () = stopped.cancelled() => return,
                    () = sender.closed() => return,
                    () = tokio::time::sleep(interval) => {}
                }
                let parsed = match tokio::fs::read_to_string(&file).await {
                    Ok(new) if new == text => continue,
                    Ok(new) => {
                        let parsed = parse(&new);
                        text = new;
                        parsed
                    }
                    Err(_) if failed => continue,
                    Err(error) => Err(error.into()),
                };
                failed = parsed.is_err();
                match parsed {
                    Ok(value) => {
                        info!(file = name, "file read again");
                        sender.send_replace(Arc::new(value));
                    }
                    Err(error) => {
                        error!(
                            file = name,
                            error = format!("{error:#}"),
                            "changed file cannot be used, the old contents stay in force"
                        );
                    }
                }
            }
        });
        Ok(Self(receiver))
    }

    /// What somebody else keeps up to date.
    pub(crate) fn kept_by(sender: &watch::Sender<Arc<T>>) -> Self {
        Self(sender.subscribe())
    }

    /// Contents that never change.
    pub fn fixed(value: T) -> Self {
        Self(watch::channel(Arc::new(value)).1)
    }

    /// The contents of now.
    pub fn current(&self) -> Arc<T> {
        Arc::clone(&self.0.borrow())
    }

    /// Waits for the next contents. Never returns when there will be none.
    pub async fn changed(&mut self) -> Arc<T> {
        match self.0.changed().await {
            Ok(()) => Arc::clone(&self.0.borrow_and_update()),
            Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn changed_contents_are_taken_and_broken_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("number");
        std::fs::write(&file, "1").unwrap();
        let lifecycle = Lifecycle::new();
        let parse = |text: &str| Ok(text.trim().parse::<u32>()?);
        let mut watched =
            Watched::read(file.clone(), Duration::from_millis(5), &lifecycle, parse).await.unwrap();
        assert_eq!(*watched.current(), 1);
        std::fs::write(&file, "one").unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(*watched.current(), 1);
        std::fs::write(&file, "2").unwrap();
        assert_eq!(*watched.changed().await, 2);
        lifecycle.stopped().cancel();
        lifecycle.finished().await;
    }

    #[tokio::test]
    async fn a_missing_file_is_an_error_that_names_it() {
        let lifecycle = Lifecycle::new();
        let missing =
            Watched::read("/nonexistent/file".into(), Duration::from_secs(1), &lifecycle, |_| Ok(()));
        assert!(format!("{:#}", missing.await.unwrap_err()).contains("/nonexistent/file"));
    }
}
