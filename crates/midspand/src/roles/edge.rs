//! `midspand edge`: the streaming edge alone.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context as _;
use clap::Args;
use midspan_core::{id::Incarnation, ticket::Owner};
use midspan_edge::{DataThreads, Edge, EdgeParts, EdgeSettings, Passing, PassingSettings};
use midspan_platform::{
    clock,
    http::handler,
    internal::InternalSettings,
    listener::{Listener, Passer},
    rendezvous::{RedisSettings, ServerRole},
    telemetry::LogSettings,
};

use crate::server::{self, DrainSettings, ServerSettings};

#[derive(Debug, Args)]
pub(crate) struct EdgeArguments {
    /// Public address of the legs
    #[arg(long, env = "MIDSPAN_LISTEN", default_value = "0.0.0.0:8444", value_name = "ADDRESS")]
    listen: SocketAddr,
    #[command(flatten)]
    edge: EdgeSettings,
    #[command(flatten)]
    passing: PassingSettings,
    #[command(flatten)]
    internal: InternalSettings,
    #[command(flatten)]
    server: ServerSettings,
    #[command(flatten)]
    redis: RedisSettings,
    #[command(flatten)]
    drain: DrainSettings,
    #[command(flatten)]
    pub(crate) log: LogSettings,
}

pub(crate) async fn run(arguments: EdgeArguments) -> anyhow::Result<()> {
    let EdgeArguments {
        listen,
        edge: settings,
        passing,
        internal,
        redis,
        server: server_settings,
        drain,
        log: _,
    } = arguments;
    let public_names: Vec<_> = passing.public_name(&settings.edge_name)?.into_iter().collect();
    let threads = DataThreads::start(settings.data_threads).context("the data threads do not start")?;
    let public = Listener::bind_on("public", listen, &threads.runtimes())?.behind(&server_settings.proxies);
    let passed = match passing.passed_listen {
        Some(address) => Some(Listener::bind_on("passed", address, &threads.runtimes())?),
        None => None,
    };
    let passed_address = passed.as_ref().map(|passed| passing.address(passed.address())).transpose()?;
    let process = server_settings.prepare().await?;
    let port = process.internal(&server_settings, &internal, ServerRole::Edge, &threads.runtimes()).await?;
    let tls = server_settings.tls(&public_names, &process.lifecycle).await?;
    let owner = Owner {
        name: settings.edge_name.clone(),
        incarnation: Incarnation::from_random(clock::random()),
        address: port.as_ref().map(|port| port.address.clone()).unwrap_or_default(),
    };
    let passes_on = passing.owner_domain.is_some();
    let edge = Edge::start(EdgeParts {
        settings,
        owner,
        secrets: process.secrets.clone(),
        lifecycle: process.lifecycle.clone(),
        metrics: process.metrics.clone(),
        rendezvous: process.rendezvous(&redis)?,
        activity: process.activity.clone(),
        threads,
        internal: port.as_ref().map(|port| port.calls.clone()),
        passing: Passing { domain: passing.owner_domain, address: passed_address },
    });
    let legs = Arc::clone(&edge);
    let answers = handler(move |request| {
        let legs = Arc::clone(&legs);
        async move { legs.handle(&request).await }
    });
    if let Some(port) = port {
        let others = Arc::clone(&edge);
        let answers = handler(move |request| {
            let edge = Arc::clone(&others);
            async move { edge.handle_internal(request).await }
        });
        process.serve_internal(&server_settings, port, answers);
    }
    anyhow::ensure!(tls.is_some() || !passes_on, "--owner-domain is of no use without TLS");
    if let Some(passed) = passed {
        let passed = passed.for_passed(process.secrets.tickets.clone(), &server_settings.proxies);
        let tls = tls.clone().context("--passed-listen is of no use without TLS")?;
        process.serve_also(passed, tls, Arc::clone(&answers));
    }
    let public = if passes_on { public.passing(Arc::clone(&edge) as Arc<dyn Passer>) } else { public };
    let lifecycle = process.serve(&server_settings, public, tls, answers);
    server::run(lifecycle, drain, edge.drain(drain.drain_grace)).await;
    Ok(())
}
