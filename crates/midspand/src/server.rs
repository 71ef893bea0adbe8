//! What all roles share: listeners, the admin port, and the way down.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::bail;
use clap::Args;
use midspan_platform::{
    activity::ActivityLog,
    admin::admin,
    http::Handler,
    internal::{Internal, InternalSettings},
    kubernetes::{KubernetesMetrics, KubernetesSettings, KubernetesTiming, Pods},
    lifecycle::Lifecycle,
    listener::{Listener, ListenerMetrics, ListenerSettings, ProxySettings, Room},
    metrics::Metrics,
    rendezvous::{
        MemoryRendezvous, RedisRendezvous, RedisSettings, Rendezvous, ServerRole, StoreMetrics, Timing,
    },
    secrets::{SecretSettings, Secrets},
    tls::{self, TlsFiles},
    watched::Watched,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustls::ServerConfig;
use tokio::runtime::Handle;
use tracing::{Span, info, warn};

/// Where a process listens, and how it ends.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct ServerSettings {
    /// Address of /livez, /readyz and /metrics (plain HTTP)
    #[arg(long, env = "MIDSPAN_ADMIN_LISTEN", default_value = "127.0.0.1:9090", value_name = "ADDRESS")]
    pub(crate) admin_listen: SocketAddr,
    /// TLS certificate chain (PEM), read again when it changes
    #[arg(long, env = "MIDSPAN_TLS_CERTIFICATE", value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_certificate: Option<PathBuf>,
    /// Private key of the certificate (PEM)
    #[arg(long, env = "MIDSPAN_TLS_KEY", value_name = "FILE", requires = "tls_certificate")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Serve without TLS; credentials and payload travel in the clear
    #[arg(long, env = "MIDSPAN_INSECURE_PLAINTEXT", conflicts_with_all = ["tls_certificate", "tls_key"])]
    pub(crate) insecure_plaintext: bool,
    /// File for the activity log, one JSON record a line; standard output without one
    #[arg(long, env = "MIDSPAN_ACTIVITY_LOG", value_name = "FILE")]
    pub(crate) activity_log: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) connections: ListenerSettings,
    #[command(flatten)]
    pub(crate) proxies: ProxySettings,
    #[command(flatten)]
    pub(crate) secrets: SecretSettings,
}

/// How long a process takes to go down.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Drain")]
pub(crate) struct DrainSettings {
    /// After the first signal, place no new streams but serve as usual for this long, while balancers notice
    #[arg(long, env = "MIDSPAN_DRAIN_DELAY", default_value = "5s", value_name = "TIME", value_parser = midspan_platform::duration::any)]
    pub(crate) drain_delay: Duration,
    /// Then let streams end by themselves for this long, before they are closed with 1012
    #[arg(long, env = "MIDSPAN_DRAIN_GRACE", default_value = "30s", value_name = "TIME", value_parser = midspan_platform::duration::any)]
    pub(crate) drain_grace: Duration,
}

/// A process that has not begun to listen yet.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) lifecycle: Lifecycle,
    pub(crate) metrics: Metrics,
    pub(crate) secrets: Secrets,
    pub(crate) activity: ActivityLog,
    store_metrics: StoreMetrics,
    kubernetes_metrics: KubernetesMetrics,
    admin: Listener,
    listener_metrics: ListenerMetrics,
    /// For clients, however they come in.
    room: Room,
}

/// The port for other processes of the relay, not served yet.
#[derive(Debug)]
pub(crate) struct InternalPort {
    /// The way to the others.
    pub(crate) calls: Internal,
    /// Where the others find it.
    pub(crate) address: String,
    pub(crate) listener: Listener,
    tls: Arc<ServerConfig>,
}

/// Descriptors that are no connection of the public listener: files, listeners, the admin port, the runtime.
const OTHER_DESCRIPTORS: u64 = 100;

/// How long tasks may take to end once everything has been told to.
const LAST_TASKS: Duration = Duration::from_secs(10);

/// How long they may take when the process is stopped hard.
const LAST_TASKS_HARD: Duration = Duration::from_secs(1);

impl ServerSettings {
    /// Makes room for descriptors, reads secrets and takes the admin port.
    pub(crate) async fn prepare(&self) -> anyhow::Result<Process> {
        self.raise_descriptor_limit();
        let lifecycle = Lifecycle::new();
        let metrics = Metrics::new();
        let secrets = Secrets {
            tickets: self.secrets.ticket_keys(&lifecycle).await?,
            deny: self.secrets.deny_list(&lifecycle).await?,
        };
        Ok(Process {
            activity: ActivityLog::start(self.activity_log.clone(), &lifecycle, &metrics).await?,
            admin: Listener::bind("admin", self.admin_listen)?.trusted(),
            store_metrics: StoreMetrics::new(&metrics),
            kubernetes_metrics: KubernetesMetrics::new(&metrics),
            listener_metrics: ListenerMetrics::new(&metrics),
            room: self.connections.room(),
            lifecycle,
            metrics,
            secrets,
        })
    }

    /// Raises the soft limit on open files to the hard one, and warns when that is too few for `--max-connections`.
    fn raise_descriptor_limit(&self) {
        let limit = getrlimit(Resource::Nofile);
        let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
        let limit = if raised.is_ok() { limit.maximum } else { limit.current };
        let needed = self.connections.max_connections as u64 + OTHER_DESCRIPTORS;
        if limit.is_some_and(|limit| limit < needed) {
            warn!(limit, needed, "too few open files are allowed for --max-connections; raise `ulimit -n`");
        }
    }

    /// The TLS configuration of the public listener, or `None` for plaintext.
    pub(crate) async fn tls(
        &self,
        hosts: &[String],
        lifecycle: &Lifecycle,
    ) -> anyhow::Result<Option<Arc<ServerConfig>>> {
        let files = match (&self.tls_certificate, &self.tls_key) {
            (Some(certificate), Some(key)) => TlsFiles { certificate: certificate.clone(), key: key.clone() },
            _ if self.insecure_plaintext => {
                warn!("serving without TLS: credentials and payload travel in the clear");
                return Ok(None);
            }
            _ => bail!("give --tls-certificate and --tls-key, or --insecure-plaintext"),
        };
        let interval = self.secrets.reload_interval;
        Ok(Some(tls::server_config(files, hosts.to_vec(), interval, lifecycle).await?))
    }
}

impl Process {
    /// Takes the port for other processes of the relay, to be served on `runtimes`. `None` for a process that is alone.
    pub(crate) async fn internal(
        &self,
        settings: &ServerSettings,
        internal: &InternalSettings,
        role: ServerRole,
        runtimes: &[Handle],
    ) -> anyhow::Result<Option<InternalPort>> {
        let (Some(address), Some((calls, tls))) = (
            internal.internal_listen,
            internal.start(role, settings.secrets.reload_interval, &self.lifecycle).await?,
        ) else {
            return Ok(None);
        };
        let listener = Listener::bind_on("internal", address, runtimes)?.trusted();
        let listener = match role {
            // Calls may be held open for long, and share one connection.
            ServerRole::Control => listener.http2(),
            ServerRole::Edge => listener,
        };
        let address = internal.address(listener.address())?;
        Ok(Some(InternalPort { calls, address, listener, tls }))
    }

    /// Begins to accept connections of other processes of the relay.
    pub(crate) fn serve_internal(&self, settings: &ServerSettings, port: InternalPort, handler: Handler) {
        let InternalPort { listener, tls, .. } = port;
        let room = settings.connections.room();
        listener.serve(Some(tls), &room, &self.listener_metrics, &self.lifecycle, handler);
    }

    /// Begins to accept connections of clients on one more listener.
    pub(crate) fn serve_also(&self, listener: Listener, tls: Arc<ServerConfig>, handler: Handler) {
        listener.serve(Some(tls), &self.room, &self.listener_metrics, &self.lifecycle, handler);
    }

    /// The store that all processes of the relay share, or the memory of this one.
    pub(crate) fn rendezvous(&self, settings: &RedisSettings) -> anyhow::Result<Arc<dyn Rendezvous>> {
        if settings.redis_url.is_empty() {
            warn!("without --redis-url, no other process sees the streams and devices of this one");
            return Ok(Arc::new(MemoryRendezvous::default()));
        }
        let metrics = self.store_metrics.clone();
        Ok(RedisRendezvous::start(settings, Timing::default(), metrics, &self.lifecycle)?)
    }

    /// Which edges Kubernetes calls ready, if it is asked.
    pub(crate) async fn pods(&self, settings: &KubernetesSettings) -> anyhow::Result<Watched<Pods>> {
        settings.start(KubernetesTiming::default(), self.kubernetes_metrics.clone(), &self.lifecycle).await
    }

    /// Begins to accept connections.
    pub(crate) fn serve(
        self,
        settings: &ServerSettings,
        public: Listener,
        tls: Option<Arc<ServerConfig>>,
        handler: Handler,
    ) -> Lifecycle {
        let Self { lifecycle, metrics, admin: admin_listener, listener_metrics, room, .. } = self;
        let answers = admin(lifecycle.clone(), metrics);
        admin_listener.serve(None, &settings.connections.room(), &listener_metrics, &lifecycle, answers);
        public.serve(tls, &room, &listener_metrics, &lifecycle, handler);
        lifecycle.set_ready();
        lifecycle
    }
}

/// Serves until a signal comes, drains, and waits until everything has ended.
///
/// `drain` is what the roles have to do once nothing new is taken any more.
pub(crate) async fn run(lifecycle: Lifecycle, settings: DrainSettings, drain: impl Future<Output = ()>) {
    let signals = lifecycle.clone();
    lifecycle.spawn(Span::current(), async move {
        if let Err(error) = signals.watch_signals().await {
            warn!(%error, "signals cannot be watched");
        }
    });
    lifecycle.draining().cancelled().await;
    let drained = async {
        tokio::time::sleep(settings.drain_delay).await;
        info!("draining: no new streams and links");
        lifecycle.closing().cancel();
        drain.await;
    };
    let limit = tokio::select! {
        () = drained => LAST_TASKS,
        () = lifecycle.stopped().cancelled() => LAST_TASKS_HARD,
    };
    lifecycle.closing().cancel();
    lifecycle.stopped().cancel();
    match tokio::time::timeout(limit, lifecycle.finished()).await {
        Ok(()) => info!("everything has ended"),
        Err(_) => warn!("tasks were left behind"),
    }
    if tokio::time::timeout(LAST_TASKS_HARD, lifecycle.recorded()).await.is_err() {
        warn!("the activity log could not be written to its end");
    }
}
