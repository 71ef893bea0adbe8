//! The activity log: one record for every initiation and for every end of a stream.
//!
//! The layout is that of Azure Monitor's resource log, category `DeviceStreams`: one JSON object a line, in which
//! `properties` is itself JSON in a string, and numbers in it are strings.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use midspan_core::{
    close::{CloseReason, Side},
    id::{DeviceAddress, StreamId, StreamName},
    problem::Problem,
    record::StreamEnd,
    time::UnixTime,
};
use prometheus::IntCounter;
use serde::Serialize;
use tokio::{io::AsyncWriteExt as _, sync::mpsc};
use tracing::{Span, error};

use crate::{lifecycle::Lifecycle, metrics::Metrics};

/// Where records go. Clones write to the same place.
#[derive(Debug, Clone)]
pub struct ActivityLog {
    queue: mpsc::Sender<String>,
    lost: IntCounter,
}

/// What a record is about.
#[derive(Debug, Clone)]
pub struct Subject<'a> {
    /// The stream; absent when a request was refused before there was one.
    pub stream: Option<StreamId>,
    /// The device or module.
    pub address: &'a DeviceAddress,
    /// What the stream is for.
    pub name: Option<&'a StreamName>,
    /// The service credential.
    pub credential: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Record<'a> {
    time: UnixTime,
    resource_id: &'static str,
    operation_name: &'static str,
    category: &'static str,
    result_type: &'a str,
    result_description: &'a str,
    level: &'static str,
    duration_ms: String,
    properties: String,
    location: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Properties<'a> {
    device_id: String,
    module_id: Option<String>,
    request_name: Option<&'a str>,
    stream_id: Option<StreamId>,
    credential: &'a str,
    status_code: Option<String>,
    direction: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_to_device: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_to_service: Option<String>,
}

/// How many records may wait to be written.
const QUEUE: usize = 4096;

/// How long the first of some records waits for the others, so that they are written together.
const GATHER: Duration = Duration::from_millis(50);

impl ActivityLog {
    /// Writes records to `file`, or to standard output without one.
    pub async fn start(
        file: Option<PathBuf>,
        lifecycle: &Lifecycle,
        metrics: &Metrics,
    ) -> anyhow::Result<Self> {
        let lost = metrics.counter(
            "midspan_activity_records_lost_total",
            "Activity records that were dropped because writing them took too long or failed.",
        );
        let mut sink: Box<dyn tokio::io::AsyncWrite + Send + Unpin> = match &file {
            None => Box::new(tokio::io::stdout()),
            Some(path) => {
                let open = tokio::fs::OpenOptions::new().create(true).append(true).open(path).await;
                Box::new(open.with_context(|| format!("cannot write the activity log {}", path.display()))?)
            }
        };
        let (queue, mut records) = mpsc::channel::<String>(QUEUE);
        let (silent, failures) = (lifecycle.silent().clone(), lost.clone());
        lifecycle.spawn_recorder(Span::current(), async move {
            let mut batch = String::new();
            loop {
                let line = tokio::select! {
                    biased;
                    line = records.recv() => line,
                    // What is queued by now is still written.
                    () = silent.cancelled() => records.try_recv().ok(),
                };
                let Some(line) = line else { break };
                batch.push_str(&line);
                // Each write goes through another thread; so one is made of all that comes in a moment.
                let _ = tokio::time::timeout(GATHER, silent.cancelled()).await;
                while let Ok(line) = records.try_recv() {
                    batch.push_str(&line);
                }
                let written = async {
                    sink.write_all(batch.as_bytes()).await?;
                    sink.flush().await
                };
                if let Err(error) = written.await {
                    failures.inc_by(batch.lines().count() as u64);
                    error!(%error, "activity records could not be written");
                }
                batch = String::new();
            }
        });
        Ok(Self { queue, lost })
    }

    /// A service asked for a stream, and this came of it: `Ok`, or the problem that it was told.
    pub fn initiation(
        &self,
        subject: &Subject<'_>,
        result: Result<(), &Problem>,
        now: UnixTime,
        took: Duration,
    ) {
        let (kind, description, level, status) = match result {
            Ok(()) => ("", "", "Information", 201),
            Err(problem) => {
                let level = if problem.fault == Side::Relay { "Error" } else { "Warning" };
                (problem.name().unwrap_or_default(), problem.title.as_str(), level, problem.status)
            }
        };
        self.write(subject, ("invoke", kind, description, level), now, took, Some(status.to_string()), None);
    }

    /// A stream ended. `took` is the time since it was asked for.
    pub fn end(&self, subject: &Subject<'_>, end: &StreamEnd, took: Duration) {
        let row = end.reason.row();
        let clean = matches!(end.reason, CloseReason::ServiceClosed | CloseReason::DeviceClosed);
        let level = if clean { "Information" } else { "Warning" };
        let what = ("end", row.label, row.text, level);
        self.write(subject, what, end.ended, took, None, Some((end.bytes_to_device, end.bytes_to_service)));
    }

    fn write(
        &self,
        subject: &Subject<'_>,
        (operation_name, result_type, result_description, level): (&'static str, &str, &str, &'static str),
        time: UnixTime,
        took: Duration,
        status_code: Option<String>,
        bytes: Option<(u64, u64)>,
    ) {
        let properties = Properties {
            device_id: subject.address.device.to_string(),
            module_id: subject.address.module.as_ref().map(ToString::to_string),
            request_name: subject.name.map(StreamName::as_str),
            stream_id: subject.stream,
            credential: subject.credential,
            status_code,
            direction: "c2d",
            bytes_to_device: bytes.map(|bytes| bytes.0.to_string()),
            bytes_to_service: bytes.map(|bytes| bytes.1.to_string()),
        };
        let record = Record {
            time,
            resource_id: "midspan",
            operation_name,
            category: "DeviceStreams",
            result_type,
            result_description,
            level,
            duration_ms: took.as_millis().to_string(),
            properties: serde_json::to_string(&properties).unwrap_or_default(),
            location: "",
        };
        let line = serde_json::to_string(&record).map(|line| line + "\n").unwrap_or_default();
        if self.queue.try_send(line).is_err() {
            self.lost.inc();
        }
    }
}
