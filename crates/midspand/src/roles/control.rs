//! `midspand control`: the control plane alone.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context as _;
use clap::Args;
use midspan_control::{Control, ControlParts, ControlSettings};
use midspan_core::{id::Incarnation, ticket::Owner};
use midspan_platform::{
    clock,
    http::handler,
    internal::{Calls, InternalSettings, NoCalls, answer_call},
    kubernetes::KubernetesSettings,
    listener::Listener,
    owners::RemoteOwners,
    rendezvous::{RedisSettings, ServerRole, Timing},
    telemetry::LogSettings,
};
use tokio::runtime::Handle;

use crate::server::{self, DrainSettings, ServerSettings};

#[derive(Debug, Args)]
pub(crate) struct ControlArguments {
    /// Public address of the API and of device links
    #[arg(long, env = "MIDSPAN_LISTEN", default_value = "0.0.0.0:8443", value_name = "ADDRESS")]
    listen: SocketAddr,
    #[command(flatten)]
    control: ControlSettings,
    #[command(flatten)]
    internal: InternalSettings,
    #[command(flatten)]
    server: ServerSettings,
    #[command(flatten)]
    redis: RedisSettings,
    #[command(flatten)]
    kubernetes: KubernetesSettings,
    #[command(flatten)]
    drain: DrainSettings,
    #[command(flatten)]
    pub(crate) log: LogSettings,
}

pub(crate) async fn run(arguments: ControlArguments) -> anyhow::Result<()> {
    let ControlArguments {
        listen,
        control: settings,
        internal,
        server: server_settings,
        redis,
        kubernetes,
        drain,
        log: _,
    } = arguments;
    let credentials = settings.credentials_file.clone().context("--credentials-file is missing")?;
    let edge_url = settings.edge_url.clone().context("--edge-url is missing")?;
    let hosts = settings.public_hosts.clone();
    anyhow::ensure!(!hosts.is_empty(), "--public-host is missing: the host name that credentials name");
    let public = Listener::bind("public", listen)?.behind(&server_settings.proxies);
    let process = server_settings.prepare().await?;
    let here = [Handle::current()];
    let port = process.internal(&server_settings, &internal, ServerRole::Control, &here).await?;
    let tls = server_settings.tls(&hosts, &process.lifecycle).await?;
    let incarnation = Incarnation::from_random(clock::random());
    let replica = Owner {
        name: settings.control_name.clone(),
        incarnation,
        address: port.as_ref().map(|port| port.address.clone()).unwrap_or_default(),
    };
    let calls: Arc<dyn Calls> = match &port {
        Some(port) => Arc::new(port.calls.clone()),
        None => Arc::new(NoCalls),
    };
    let pods = process.pods(&kubernetes).await?;
    let control = Control::start(ControlParts {
        credentials: server_settings.secrets.credentials(credentials, &process.lifecycle).await?,
        settings,
        hosts,
        replica,
        edge_url,
        secrets: process.secrets.clone(),
        lifecycle: process.lifecycle.clone(),
        metrics: process.metrics.clone(),
        rendezvous: process.rendezvous(&redis)?,
        timing: Timing::default(),
        owners: Arc::new(RemoteOwners::new(Arc::clone(&calls))),
        calls,
        pods,
        activity: process.activity.clone(),
    });
    if let Some(port) = port {
        let others = Arc::clone(&control);
        let answers = handler(move |request| {
            let control = Arc::clone(&others);
            answer_call(request, incarnation, |path, question| {
                Box::pin(async move { control.internal(&path, &question).await })
            })
        });
        process.serve_internal(&server_settings, port, answers);
    }
    let api = Arc::clone(&control);
    let lifecycle = process.serve(
        &server_settings,
        public,
        tls,
        handler(move |request| Arc::clone(&api).handle(request)),
    );
    server::run(lifecycle, drain, control.drain(drain.drain_grace)).await;
    Ok(())
}
