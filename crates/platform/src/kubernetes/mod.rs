//! Which edges Kubernetes calls ready: the `EndpointSlice`s of their Service, watched.
//!
//! They say earlier than leases that an edge goes, and say it also of one that died without a word. They only ever take
//! edges out of the choice: who is there, and who is gone, is decided by leases. So a relay without an API server lives on.

mod client;
mod pods;
mod trust;
mod watch;

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::Args;
use http::Uri;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use prometheus::{IntCounterVec, IntGauge};
use tokio::sync::watch::Sender;
use tracing::info_span;

pub use self::pods::Pods;
use self::{
    client::{Account, ApiServer},
    trust::Trust,
    watch::{Failure, Watch},
};
use crate::{clock, lifecycle::Lifecycle, metrics::Metrics, watched::Watched};

/// Where Kubernetes says which edges are ready.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Kubernetes")]
pub struct KubernetesSettings {
    /// The headless Service of the edges: no new streams for pods that its `EndpointSlice`s do not call ready. An edge's name must be that of its pod. Without it, leases alone decide
    #[arg(long, env = "MIDSPAN_KUBERNETES_EDGES_SERVICE", value_name = "NAME", value_parser = name)]
    pub kubernetes_edges_service: Option<String>,
    /// The namespace of that Service; that of this pod without it
    #[arg(long, env = "MIDSPAN_KUBERNETES_NAMESPACE", value_name = "NAME", value_parser = name)]
    pub kubernetes_namespace: Option<String>,
    /// The API server
    #[arg(
        long,
        env = "MIDSPAN_KUBERNETES_API",
        default_value = "https://kubernetes.default.svc",
        value_name = "URL"
    )]
    pub kubernetes_api: Uri,
    /// Folder of the service account: its token, the CA, the namespace; read again at each connection
    #[arg(
        long,
        env = "MIDSPAN_KUBERNETES_ACCOUNT_DIR",
        default_value = "/var/run/secrets/kubernetes.io/serviceaccount",
        value_name = "DIR"
    )]
    pub kubernetes_account_dir: PathBuf,
}

/// The times that the watch lives by.
#[derive(Debug, Clone, Copy)]
pub struct KubernetesTiming {
    /// How long a watch lasts; then the next one takes over where it ended. One that says nothing for 5 s more is given up.
    pub watch: Duration,
    /// How long a list, or the beginning of a watch, may take.
    pub answer: Duration,
    /// The least time between two requests.
    pub between_requests: Duration,
    /// After failing for so long, a view is out of date.
    pub patience: Duration,
    /// After a list and so long without a failure it is current again.
    pub proof: Duration,
}

impl Default for KubernetesTiming {
    fn default() -> Self {
        Self {
            watch: Duration::from_secs(30),
            answer: Duration::from_secs(10),
            between_requests: Duration::from_millis(500),
            patience: Duration::from_secs(15),
            proof: Duration::from_secs(2),
        }
    }
}

/// What is counted about Kubernetes.
#[derive(Debug, Clone)]
pub struct KubernetesMetrics {
    failures: IntCounterVec,
    current: IntGauge,
}

impl KubernetesMetrics {
    /// Registers them.
    pub fn new(metrics: &Metrics) -> Self {
        let this = Self {
            failures: metrics.counters(
                "midspan_kubernetes_failures_total",
                "Requests to the API server of Kubernetes that failed, by how: unreachable, timed_out, refused, gone, throttled, server_error, unreadable.",
                "failure",
            ),
            current: metrics.gauge(
                "midspan_kubernetes_current",
                "1 while it is known which edges Kubernetes calls ready, 0 while that is out of date or nobody asks.",
            ),
        };
        for failure in Failure::ALL {
            this.failures.with_label_values(&[failure.label()]);
        }
        this
    }
}

impl KubernetesSettings {
    /// Begins to watch, and gives what is known at any time. Nothing is waited for but the service account's files.
    ///
    /// Fails when these cannot be read now; all else is tried again until the process ends.
    pub async fn start(
        &self,
        timing: KubernetesTiming,
        metrics: KubernetesMetrics,
        lifecycle: &Lifecycle,
    ) -> anyhow::Result<Watched<Pods>> {
        let Some(service) = &self.kubernetes_edges_service else {
            return Ok(Watched::fixed(Pods::default()));
        };
        let account = Account(self.kubernetes_account_dir.clone());
        let usable = async {
            account.authorization().await?;
            account.tls().await?;
            match &self.kubernetes_namespace {
                Some(namespace) => Ok(namespace.clone()),
                None => account.namespace().await,
            }
        };
        let namespace = usable.await.context("--kubernetes-edges-service needs the pod's service account")?;
        let server = ApiServer::new(&self.kubernetes_api, account, timing, lifecycle.clone())
            .with_context(|| format!("--kubernetes-api {}", self.kubernetes_api))?;
        let slices = Api::<EndpointSlice>::namespaced(server.client(&namespace), &namespace);
        let pods = Sender::new(Arc::new(Pods::default()));
        let known = Watched::kept_by(&pods);
        let trust = Trust::new(timing.patience, timing.proof, clock::now());
        let watch = Watch::new(slices, service, timing, trust, metrics, pods);
        let stopped = lifecycle.stopped().clone();
        lifecycle.spawn(info_span!("kubernetes"), async move {
            tokio::select! {
                () = watch.run() => {}
                () = stopped.cancelled() => {}
            }
        });
        Ok(known)
    }
}

/// A name as Kubernetes gives them to Services and namespaces.
fn name(text: &str) -> Result<String, &'static str> {
    let valid = (1..=63).contains(&text.len())
        && text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    valid.then(|| text.to_owned()).ok_or("expected up to 63 lower-case letters, digits and hyphens")
}
