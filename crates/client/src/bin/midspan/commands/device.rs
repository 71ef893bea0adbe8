//! `midspan device`: the device-local proxy.

use std::time::Duration;

use clap::Args;
use midspan_client::{Device, DeviceSettings, Handler, Invitation, Stream, describe};
use tokio::{net::TcpStream, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    allow::{AllowList, Allowed, Target},
    commands::stop_signal,
    exit::Failure,
    options::{Global, seconds_or_none},
};

/// Run the device-local proxy: take streams and connect them to local targets
///
/// The stream's name picks the target; any other name is rejected. Runs until SIGTERM or SIGINT, whatever happens to
/// the network or the relay.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Offer a local target under a stream name, as in `ssh=127.0.0.1:22`; may be given many times
    #[arg(long = "allow", value_name = "NAME=HOST:PORT", required = true)]
    allow: Vec<Allowed>,
    /// Reject further streams while this many are open
    #[arg(long, value_name = "COUNT", default_value_t = 256)]
    max_streams: usize,
    /// How long open streams may go on after SIGTERM or SIGINT; a second signal cuts them at once
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = seconds_or_none)]
    grace: Duration,
}

pub(crate) async fn run(arguments: Arguments, global: &Global) -> Result<(), Failure> {
    let Arguments { allow, max_streams, grace } = arguments;
    let allow = AllowList::new(allow).map_err(Failure::usage)?;
    let connection = global.connection_string()?;
    let options = global.options(&connection)?;
    let device = Device::new(connection, options, DeviceSettings { max_streams, grace })?;
    for (name, target) in allow.iter() {
        info!("offering {name} at {target}");
    }
    serve(device, LocalProxy { allow }).await
}

/// Runs a device until a signal; a second signal ends it at once.
pub(super) async fn serve<H: Handler>(device: Device, handler: H) -> Result<(), Failure> {
    let stop = CancellationToken::new();
    let signals = async {
        stop_signal().await?;
        info!("stopping");
        stop.cancel();
        stop_signal().await
    };
    tokio::select! {
        // Signals have to be listened for before the first stream is there to be ended.
        biased;
        result = signals => result,
        () = device.run(handler, stop.clone()) => Ok(()),
    }
}

struct LocalProxy {
    allow: AllowList,
}

impl Handler for LocalProxy {
    type Accepted = (Target, TcpStream);

    async fn decide(&self, invitation: &Invitation) -> Result<Self::Accepted, String> {
        let target = self.allow.target(&invitation.name)?;
        let address = (target.host.as_str(), target.port);
        match timeout(DIAL_TIMEOUT, midspan_pacing::connect(address)).await {
            Ok(Ok(local)) => Ok((target.clone(), local)),
            Ok(Err(error)) => Err(format!("cannot reach {target}: {}", describe(&error))),
            Err(_) => {
                Err(format!("cannot reach {target}: no connection within {} s", DIAL_TIMEOUT.as_secs()))
            }
        }
    }

    async fn serve(&self, (target, local): Self::Accepted, stream: Stream) {
        let id = stream.id();
        match stream.proxy(local).await {
            Ok(traffic) => {
                info!(stream = %id, %target, sent = traffic.sent, received = traffic.received, "the stream is over");
            }
            Err(error) => warn!(stream = %id, %target, "the stream was cut: {error}"),
        }
    }
}

/// A local target answers at once or not at all.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
