//! `midspan connect`: the service-local proxy.

use std::{
    net::SocketAddr,
    pin::Pin,
    str::FromStr,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use clap::Args;
use midspan_client::{
    Capabilities, DeviceAddress, OpenError, Service, Stream, StreamError, StreamName, StreamRequest, Traffic,
    describe, stream_request,
};
use midspan_pacing::{Acceptor, Listening};
use tokio::{
    io::{AsyncWrite, Stdout, stdin, stdout},
    net::{TcpStream, lookup_host},
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep},
};
use tracing::{info, warn};

use crate::{
    commands::stop_signal,
    exit::Failure,
    options::{Global, seconds, seconds_or_none},
    output::notice,
};

/// Run the service-local proxy: open streams to a device
///
/// With -L every TCP connection to the local port becomes a stream. With --stdio one stream is opened for standard input
/// and output, as in `ssh -o ProxyCommand='midspan connect --stdio %h' dev1`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("way").required(true).args(["listen", "stdio"])))]
pub(crate) struct Arguments {
    /// The device, or one of its modules
    #[arg(value_name = "DEVICE[/MODULE]")]
    device: DeviceAddress,
    /// What the device is asked for
    #[arg(value_name = "NAME", default_value = "ssh")]
    name: StreamName,
    /// Listen on this local port; the address is 127.0.0.1 unless given, port 0 takes a free one
    #[arg(short = 'L', long, value_name = "[ADDR:]PORT")]
    listen: Option<Listen>,
    /// Use standard input and output
    #[arg(long)]
    stdio: bool,
    /// How long to wait for a device that is not connected
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = seconds_or_none)]
    connect_timeout: Duration,
    /// How long to wait for the answer of a connected device; both times together are at most 50s
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = seconds)]
    response_timeout: Duration,
}

pub(crate) async fn run(arguments: Arguments, global: &Global) -> Result<(), Failure> {
    let Arguments { device, name, listen, stdio: _, connect_timeout, response_timeout } = arguments;
    let mut request = stream_request(name, Capabilities::of_this_client());
    request.connect_timeout_seconds = Some(connect_timeout.as_secs());
    request.response_timeout_seconds = Some(response_timeout.as_secs());
    let opener = Opener { service: global.service()?, device, request };
    match listen {
        Some(listen) => {
            let address = listen.resolve().await?;
            let listener = Listening::bind(address, false).map_err(|error| {
                Failure::other(format!("cannot listen on {address}: {}", describe(&error)))
            })?;
            let address = listener.local_addr()?;
            let listener = listener.acceptor()?;
            notice(&format!("listening on {address}"));
            tokio::select! {
                // Signals have to be listened for before the first stream is there to be ended.
                biased;
                stopped = stop_signal() => stopped,
                () = opener.accept_all(listener) => Ok(()),
            }
        }
        None => opener.standard_streams().await,
    }
}

struct Opener {
    service: Service,
    device: DeviceAddress,
    request: StreamRequest,
}

impl Opener {
    async fn accept_all(self, listener: Acceptor) {
        let opener = Arc::new(self);
        let places = Arc::new(Semaphore::new(STREAMS_MAX));
        let mut streams = JoinSet::new();
        let mut full = false;
        loop {
            // A connection beyond the bound waits in the listener's queue.
            let place = if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
                full = false;
                place
            } else {
                if !full {
                    warn!(
                        streams = STREAMS_MAX,
                        "as many streams as can be: further connections wait until one ends"
                    );
                }
                full = true;
                let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
                place
            };
            match listener.accept().await {
                Ok((local, peer)) => {
                    let opener = Arc::clone(&opener);
                    streams.spawn(async move {
                        opener.carry(local, peer).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    warn!("cannot accept a connection: {}", describe(&error));
                    sleep(ACCEPT_PAUSE).await;
                }
            }
            while streams.try_join_next().is_some() {}
        }
    }

    /// Opens a stream. A relay that says to come back soon is asked again for a while.
    async fn open(&self) -> Result<Stream, OpenError> {
        let started = Instant::now();
        loop {
            let error = match self.service.open(&self.device, &self.request).await {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            let problem = error.request().problem().filter(|problem| matches!(problem.status, 429 | 503));
            let pause = problem.and_then(|problem| problem.retry_after_seconds).map(Duration::from_secs);
            match pause {
                Some(pause) if pause <= PAUSE_MAX && started.elapsed() + pause <= PATIENCE => {
                    sleep(pause).await;
                }
                _ => return Err(error),
            }
        }
    }

    async fn carry(&self, local: TcpStream, peer: SocketAddr) {
        let device = &self.device;
        let stream = match self.open().await {
            Ok(stream) => stream,
            Err(error) => {
                warn!(%peer, "no stream: {}", Failure::opening(device, &error).message);
                // A reset tells the local program that this was no answer.
                let _ = local.set_zero_linger();
                return;
            }
        };
        let id = stream.id();
        info!(%peer, stream = %id, "opened a stream to {device}");
        match stream.proxy(local).await {
            Ok(Traffic { sent, received }) => {
                info!(%peer, stream = %id, sent, received, "the stream is over");
            }
            Err(error) => warn!(%peer, stream = %id, "the stream was cut: {error}"),
        }
    }

    async fn standard_streams(&self) -> Result<(), Failure> {
        let open = async { self.open().await.map_err(|error| Failure::opening(&self.device, &error)) };
        let stream = tokio::select! {
            biased;
            stopped = stop_signal() => return stopped,
            opened = open => opened?,
        };
        tokio::select! {
            result = stream.proxy_io(stdin(), StandardOutput(stdout())) => match result {
                // A broken pipe: the program that reads us has gone first, as ssh does.
                Ok(_) | Err(StreamError::Local { kind: std::io::ErrorKind::BrokenPipe, .. }) => Ok(()),
                Err(error) => Err(error.into()),
            },
            stopped = stop_signal() => stopped,
        }
    }
}

/// Standard output, which its reader sees ending as soon as the device sends no more.
struct StandardOutput(Stdout);

impl AsyncWrite for StandardOutput {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        ready!(Pin::new(&mut self.0).poll_flush(context))?;
        // Nothing may be closed without unsafe code, but something else can take its place.
        let nowhere = std::fs::File::options().write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdout(nowhere)?;
        Poll::Ready(Ok(()))
    }
}

/// Where to listen: `[ADDR:]PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listen {
    host: String,
    port: u16,
}

impl Listen {
    async fn resolve(&self) -> Result<SocketAddr, Failure> {
        let Self { host, port } = self;
        let mut addresses = lookup_host((host.as_str(), *port)).await.map_err(|error| {
            Failure::usage(format!("cannot find the address of {host}: {}", describe(&error)))
        })?;
        addresses.next().ok_or_else(|| Failure::usage(format!("{host} has no address")))
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = text.rsplit_once(':').unwrap_or(("127.0.0.1", text));
        let port = port.parse().map_err(|_| "write [ADDR:]PORT, as in 2222 or 127.0.0.1:2222")?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        Ok(Self { host: if host.is_empty() { "127.0.0.1" } else { host }.to_owned(), port })
    }
}

/// The longest pause before a relay that has no room, or restarts, is asked again.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long such a relay is asked again.
const PATIENCE: Duration = Duration::from_secs(15);

/// The most streams of one listener; further connections wait.
const STREAMS_MAX: usize = 1024;

/// After a failed accept, usually because there are no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addresses_are_read() {
        let read = |text: &str| text.parse::<Listen>().map(|listen| (listen.host, listen.port));
        assert_eq!(read("2222"), Ok(("127.0.0.1".to_owned(), 2222)));
        assert_eq!(read(":0"), Ok(("127.0.0.1".to_owned(), 0)));
        assert_eq!(read("0.0.0.0:2222"), Ok(("0.0.0.0".to_owned(), 2222)));
        assert_eq!(read("[::1]:2222"), Ok(("::1".to_owned(), 2222)));
        assert!(read("ssh").is_err());
    }
}
