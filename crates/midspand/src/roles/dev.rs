//! `midspand dev`: a whole relay in one process, for a first try, for development and for tests.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::Args;
use midspan_control::{Control, ControlParts, ControlSettings};
use midspan_core::{
    id::{DeviceAddress, Incarnation},
    ticket::Owner,
};
use midspan_edge::{DataThreads, Edge, EdgeParts, EdgeSettings, Passing};
use midspan_platform::{
    clock,
    http::handler,
    internal::NoCalls,
    kubernetes::Pods,
    listener::Listener,
    owners::Owners,
    rendezvous::{MemoryRendezvous, Timing},
    telemetry::LogSettings,
    watched::Watched,
};

use crate::{
    development::{Development, default_folder},
    server::{self, DrainSettings, ServerSettings},
};

#[derive(Debug, Args)]
pub(crate) struct DevArguments {
    /// Public address of everything: API, device links and legs
    #[arg(long, env = "MIDSPAN_LISTEN", default_value = "127.0.0.1:8443", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Folder for the development CA, keys and connection strings; made when it is missing
    #[arg(long, env = "MIDSPAN_DATA_DIR", default_value_os_t = default_folder(), value_name = "FOLDER")]
    data_dir: PathBuf,
    /// A device, or device/module, to write a connection string for; may be repeated
    #[arg(
        long = "device",
        env = "MIDSPAN_DEVICE",
        default_value = "dev1",
        value_delimiter = ',',
        value_name = "ID"
    )]
    devices: Vec<DeviceAddress>,
    /// After the first signal, place no new streams but serve as usual for this long
    #[arg(long, env = "MIDSPAN_DRAIN_DELAY", default_value = "0s", value_name = "TIME", value_parser = midspan_platform::duration::any)]
    drain_delay: Duration,
    /// Then let streams end by themselves for this long, before they are closed with 1012
    #[arg(long, env = "MIDSPAN_DRAIN_GRACE", default_value = "10s", value_name = "TIME", value_parser = midspan_platform::duration::any)]
    drain_grace: Duration,
    #[command(flatten)]
    control: ControlSettings,
    #[command(flatten)]
    edge: EdgeSettings,
    #[command(flatten)]
    server: ServerSettings,
    #[command(flatten)]
    pub(crate) log: LogSettings,
}

pub(crate) async fn run(arguments: DevArguments) -> anyhow::Result<()> {
    let DevArguments { listen, data_dir, devices, control, edge: edge_settings, mut server, .. } = arguments;
    let public = Listener::bind("public", listen)?.behind(&server.proxies);
    let address = public.address();
    let mut hosts = control.public_hosts.clone();
    if hosts.is_empty() {
        hosts = vec![Development::host_of(address), "localhost".to_owned()];
    }
    let development = Development::prepare(data_dir, &hosts, address, &devices, server.insecure_plaintext)?;
    development.fill_in(&mut server);
    let credentials = control.credentials_file.clone().unwrap_or_else(|| development.credentials());
    let process = server.prepare().await?;
    let tls = server.tls(&hosts, &process.lifecycle).await?;

    let scheme = if tls.is_some() { "https" } else { "http" };
    let edge_url = match &control.edge_url {
        Some(edge_url) => edge_url.clone(),
        None => format!("{scheme}://{}:{}", hosts[0], address.port()).parse()?,
    };
    let owner = Owner {
        name: edge_settings.edge_name.clone(),
        incarnation: Incarnation::from_random(clock::random()),
        address: String::new(),
    };
    let replica = Owner { name: control.control_name.clone(), ..owner.clone() };
    let timing = Timing::default();
    let rendezvous = Arc::new(MemoryRendezvous::alone(timing));
    let threads = DataThreads::start(edge_settings.data_threads).context("the data threads do not start")?;
    let edge = Edge::start(EdgeParts {
        settings: edge_settings,
        owner,
        secrets: process.secrets.clone(),
        lifecycle: process.lifecycle.clone(),
        metrics: process.metrics.clone(),
        rendezvous: Arc::clone(&rendezvous) as _,
        activity: process.activity.clone(),
        threads,
        internal: None,
        passing: Passing::default(),
    });
    let control = Control::start(ControlParts {
        credentials: server.secrets.credentials(credentials, &process.lifecycle).await?,
        settings: control,
        hosts,
        replica,
        edge_url,
        secrets: process.secrets.clone(),
        lifecycle: process.lifecycle.clone(),
        metrics: process.metrics.clone(),
        rendezvous,
        timing,
        owners: Arc::clone(&edge) as Arc<dyn Owners>,
        calls: Arc::new(NoCalls),
        pods: Watched::fixed(Pods::default()),
        activity: process.activity.clone(),
    });

    let (legs, api) = (Arc::clone(&edge), Arc::clone(&control));
    let answers = handler(move |request| {
        let (legs, api) = (Arc::clone(&legs), Arc::clone(&api));
        async move {
            if request.uri().path().starts_with("/bridges/") {
                legs.handle(&request).await
            } else {
                api.handle(request).await
            }
        }
    });
    // Whoever waits for the log line finds the files.
    development.write_connection_strings()?;
    let lifecycle = process.serve(&server, public, tls, answers);
    development.say_what_next(address);
    let drain = DrainSettings { drain_delay: arguments.drain_delay, drain_grace: arguments.drain_grace };
    let roles_drain = async {
        tokio::join!(control.drain(drain.drain_grace), edge.drain(drain.drain_grace));
    };
    server::run(lifecycle, drain, roles_drain).await;
    Ok(())
}
