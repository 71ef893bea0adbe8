//! Listeners: accept, TLS, HTTP/1.1, each step bounded in time and number.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use futures_util::FutureExt as _;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{IntCounterVec, IntGaugeVec};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, Interest, ReadBuf},
    net::{TcpListener, TcpSocket, TcpStream},
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, error, info, info_span, warn};

use crate::{
    http::{Handler, HttpRequest, Peer, Upgrade},
    internal::{CALLS_MAX, Tasks},
    lifecycle::Lifecycle,
    metrics::{Counted, Metrics},
    tls::{TlsStream, Turns},
};

/// What strangers may cost.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Limits on connections")]
pub struct ListenerSettings {
    /// Connections at a time, of all kinds
    #[arg(long, env = "MIDSPAN_MAX_CONNECTIONS", default_value_t = 16_000, value_name = "N")]
    pub max_connections: usize,
    /// Connections at a time whose peer has not shown who it is
    #[arg(long, env = "MIDSPAN_MAX_UNAUTHENTICATED", default_value_t = 1024, value_name = "N")]
    pub max_unauthenticated: usize,
    /// Time for the TLS handshake, and again for each request's header; three times that to show who one is
    #[arg(long, env = "MIDSPAN_HEADER_LIMIT", default_value = "10s", value_name = "TIME", value_parser = crate::duration::positive)]
    pub header_limit: Duration,
}

/// A peer that has not shown who it is after this many times the header limit is cut off, whatever it does meanwhile.
const STRANGER_LIMITS: u32 = 3;

/// The longest header of a request, in bytes.
pub const HEADER_MAX: usize = 16 * 1024;

/// The metrics of all listeners of a process.
#[derive(Debug, Clone)]
pub struct ListenerMetrics {
    connections: IntGaugeVec,
    refused: IntCounterVec,
    tls_failures: IntCounterVec,
}

impl ListenerMetrics {
    /// Registers the metrics.
    pub fn new(metrics: &Metrics) -> Self {
        let this = Self {
            connections: metrics.gauges(
                "midspan_listener_connections",
                "Open connections, by listener.",
                "listener",
            ),
            refused: metrics.counters(
                "midspan_listener_refused_connections_total",
                "Connections that were closed because a limit was reached, by limit.",
                "limit",
            ),
            tls_failures: metrics.counters(
                "midspan_listener_tls_failures_total",
                "TLS handshakes that failed or took too long, by cause.",
                "cause",
            ),
        };
        for limit in ["connections", "unauthenticated", "stranger_time"] {
            this.refused.with_label_values(&[limit]);
        }
        for cause in ["protocol", "timeout"] {
            this.tls_failures.with_label_values(&[cause]);
        }
        this
    }
}

/// An address that is taken, on which nothing is accepted yet.
#[derive(Debug)]
pub struct Listener {
    name: &'static str,
    /// Each with the runtime that accepts from it and keeps what it accepts.
    sockets: Vec<(Handle, std::net::TcpListener)>,
    address: SocketAddr,
    trusted: bool,
    http2: bool,
}

/// How many connections may wait in the kernel to be accepted, for each socket.
const BACKLOG: u32 = 1024;

impl Listener {
    /// Takes the address, to be served on the runtime of the caller. Nothing is accepted before [`Listener::serve`].
    pub fn bind(name: &'static str, address: SocketAddr) -> anyhow::Result<Self> {
        Self::bind_on(name, address, &[Handle::current()])
    }

    /// Takes the address, to be served on all of `runtimes`: the kernel spreads connections over them, and each
    /// connection stays where it was accepted.
    pub fn bind_on(name: &'static str, mut address: SocketAddr, runtimes: &[Handle]) -> anyhow::Result<Self> {
        let shared = runtimes.len() > 1;
        let mut sockets = Vec::with_capacity(runtimes.len());
        let taken = |address| {
            format!("cannot listen on {address} ({name}); is another process there? choose another address")
        };
        if shared && address.port() != 0 {
            // Sockets that share an address would share it with another process of ours, too.
            drop(listen(address, false).with_context(|| taken(address))?);
        }
        for runtime in runtimes {
            let _here = runtime.enter();
            let socket = listen(address, shared).with_context(|| taken(address))?;
            address = socket.local_addr().context("the listener has no address")?;
            sockets.push((runtime.clone(), socket));
        }
        Ok(Self { name, sockets, address, trusted: false, http2: false })
    }

    /// A listener that only peers from the inside reach: nobody there has to show who it is.
    #[must_use]
    pub fn trusted(self) -> Self {
        Self { trusted: true, ..self }
    }

    /// A listener that speaks HTTP/2 and nothing else.
    #[must_use]
    pub fn http2(self) -> Self {
        Self { http2: true, ..self }
    }

    /// The address, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts connections until the process stops.
    pub fn serve(
        self,
        tls: Option<Arc<ServerConfig>>,
        settings: &ListenerSettings,
        metrics: &ListenerMetrics,
        lifecycle: &Lifecycle,
        handler: Handler,
    ) {
        let Self { name, sockets, address, trusted, http2 } = self;
        info!(listener = name, %address, tls = tls.is_some(), "listening");
        let front = Arc::new(Front {
            name,
            trusted,
            http2,
            tls,
            header_limit: settings.header_limit,
            places: Arc::new(Semaphore::new(settings.max_connections)),
            strangers: Arc::new(Semaphore::new(settings.max_unauthenticated)),
            metrics: metrics.clone(),
            lifecycle: lifecycle.clone(),
            handler,
        });
        for (runtime, socket) in sockets {
            let accepting =
                Arc::clone(&front).accept(socket).instrument(info_span!("listener", listener = name));
            lifecycle.spawn_on(&runtime, accepting);
        }
    }
}

fn listen(address: SocketAddr, shared: bool) -> io::Result<std::net::TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Connections of a process that has just ended may still be there.
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(shared)?;
    // Small messages must not wait for an acknowledgement. What is accepted inherits this.
    socket.set_nodelay(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)?.into_std()
}

struct Front {
    name: &'static str,
    trusted: bool,
    http2: bool,
    tls: Option<Arc<ServerConfig>>,
    header_limit: Duration,
    places: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    metrics: ListenerMetrics,
    lifecycle: Lifecycle,
    handler: Handler,
}

impl Front {
    async fn accept(self: Arc<Self>, socket: std::net::TcpListener) {
        let socket = match TcpListener::from_std(socket) {
            Ok(socket) => socket,
            Err(error) => return error!(%error, "cannot accept connections"),
        };
        let turns = Arc::new(Turns::here());
        let mut pause = Duration::ZERO;
        loop {
            let accepted = tokio::select! {
                () = self.lifecycle.stopped().cancelled() => return,
                accepted = socket.accept() => accepted,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, most likely: accepting at once again would only burn the processor.
                    pause = (pause * 2).clamp(Duration::from_millis(10), Duration::from_secs(1));
                    warn!(%error, pause_ms = pause.as_millis(), "cannot accept connections");
                    tokio::time::sleep(pause).await;
                    continue;
                }
            };
            pause = Duration::ZERO;
            let Some((held, place)) = self.admit() else { continue };
            let (front, turns) = (Arc::clone(&self), Arc::clone(&turns));
            let peer = Arc::new(Peer::new(address, Some(place)));
            if front.trusted {
                peer.authenticated();
            }
            self.lifecycle.spawn_on(&Handle::current(), async move {
                tokio::select! {
                    () = front.connection(stream, &peer, held, turns) => {}
                    () = peer.stranger_for(front.header_limit * STRANGER_LIMITS) => {
                        front.refuse("stranger_time");
                    }
                    () = front.lifecycle.stopped().cancelled() => {}
                }
            });
        }
    }

    /// A place for the connection, and one among the strangers; `None` when there is none.
    fn admit(&self) -> Option<(Held, OwnedSemaphorePermit)> {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            self.refuse("connections");
            return None;
        };
        let Ok(stranger) = Arc::clone(&self.strangers).try_acquire_owned() else {
            self.refuse("unauthenticated");
            return None;
        };
        let counted = Counted::new(&self.metrics.connections.with_label_values(&[self.name]));
        Some((Held { _place: place, _counted: counted }, stranger))
    }

    fn refuse(&self, limit: &'static str) {
        self.metrics.refused.with_label_values(&[limit]).inc();
        debug!(listener = self.name, limit, "connection refused");
    }

    async fn connection(&self, stream: TcpStream, peer: &Arc<Peer>, held: Held, turns: Arc<Turns>) {
        let transport = match &self.tls {
            None => Transport::Tcp(stream),
            Some(config) => {
                let failed =
                    |cause: &'static str| self.metrics.tls_failures.with_label_values(&[cause]).inc();
                let accepted = TlsStream::accept(stream, Arc::clone(config), turns);
                match tokio::time::timeout(self.header_limit, accepted).await {
                    Ok(Ok(stream)) => Transport::Tls(Box::new(stream)),
                    Ok(Err(error)) => {
                        failed("protocol");
                        debug!(listener = self.name, %error, "TLS handshake failed");
                        return;
                    }
                    Err(_) => {
                        failed("timeout");
                        debug!(listener = self.name, "TLS handshake took too long");
                        return;
                    }
                }
            }
        };
        let connection = Connection { transport, _held: Some(held) };
        let (peer, lifecycle) = (Arc::clone(peer), &self.lifecycle);
        if self.http2 {
            serve_http2(connection, peer, lifecycle, &self.handler).await;
        } else {
            serve_http(connection, peer, self.header_limit, lifecycle, &self.handler).await;
        }
    }
}

/// How long an answer that switches protocols may take to be sent.
const SWITCH_LIMIT: Duration = Duration::from_secs(10);

/// Serves HTTP/1.1 on one connection until it ends, is upgraded, or the process stops.
pub async fn serve_http(
    connection: Connection,
    peer: Arc<Peer>,
    header_limit: Duration,
    lifecycle: &Lifecycle,
    handler: &Handler,
) {
    let (asked, switching) = (CancellationToken::new(), CancellationToken::new());
    let upgrade = Mutex::new(None);
    let service = service_fn(|mut request: HttpRequest| {
        asked.cancel();
        request.extensions_mut().insert(Arc::clone(&peer));
        let (upgrade, switching) = (&upgrade, &switching);
        handler(request).map(move |mut response| {
            if let Some(next) = response.extensions_mut().remove::<Upgrade>() {
                *upgrade.lock().unwrap_or_else(PoisonError::into_inner) = Some(next);
                switching.cancel();
            }
            Ok::<_, Infallible>(response)
        })
    });
    let mut served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_limit)
        .max_buf_size(HEADER_MAX)
        .serve_connection(TokioIo::new(connection), service);
    // A closing process still answers: a connection that has asked nothing yet may be a leg that is expected.
    let closing = async {
        lifecycle.closing().cancelled().await;
        asked.cancelled().await;
    };
    let stuck = async {
        switching.cancelled().await;
        tokio::time::sleep(SWITCH_LIMIT).await;
    };
    let ended = tokio::select! {
        ended = &mut served => ended,
        () = stuck => return debug!("an upgrade took too long"),
        // Requests under way are answered; then the connection closes instead of waiting for the next one.
        () = closing => {
            Pin::new(&mut served).graceful_shutdown();
            (&mut served).await
        }
    };
    if let Err(error) = ended {
        return debug!(%error, "connection ended");
    }
    let parts = served.into_parts();
    let upgrade = upgrade.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(upgrade) = upgrade {
        upgrade.take(parts.io.into_inner(), parts.read_buf);
    }
}

/// Serves HTTP/2 on one connection until it ends or the process stops.
async fn serve_http2(connection: Connection, peer: Arc<Peer>, lifecycle: &Lifecycle, handler: &Handler) {
    let handler = Arc::clone(handler);
    let service = service_fn(move |mut request: HttpRequest| {
        request.extensions_mut().insert(Arc::clone(&peer));
        handler(request).map(Ok::<_, Infallible>)
    });
    let served = hyper::server::conn::http2::Builder::new(Tasks(lifecycle.clone()))
        .timer(TokioTimer::new())
        .keep_alive_interval(HTTP2_KEEP_ALIVE)
        .keep_alive_timeout(HTTP2_KEEP_ALIVE)
        .max_concurrent_streams(CALLS_MAX)
        .serve_connection(TokioIo::new(connection), service);
    if let Err(error) = served.await {
        debug!(%error, "connection ended");
    }
}

/// How often a peer that says nothing is asked whether it is there, and how long it may take to answer.
const HTTP2_KEEP_ALIVE: Duration = Duration::from_secs(10);

/// One connection of a listener, which keeps its place until it is dropped.
#[derive(Debug)]
pub struct Connection {
    transport: Transport,
    _held: Option<Held>,
}

#[derive(Debug)]
struct Held {
    _place: OwnedSemaphorePermit,
    _counted: Counted,
}

#[derive(Debug)]
enum Transport {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Memory(DuplexStream),
}

impl Connection {
    /// One end of a pair that lives in memory, for tests.
    pub fn memory(stream: DuplexStream) -> Self {
        Self { transport: Transport::Memory(stream), _held: None }
    }

    /// Moves it to the runtime of the caller, whose thread waits for it from here on.
    pub fn rehome(self) -> io::Result<Self> {
        let Self { transport, _held: held } = self;
        let transport = match transport {
            Transport::Tcp(stream) => Transport::Tcp(rehome(stream)?),
            Transport::Tls(stream) => Transport::Tls(Box::new(stream.try_map_socket(rehome)?)),
            Transport::Memory(stream) => Transport::Memory(stream),
        };
        Ok(Self { transport, _held: held })
    }

    /// How many bytes it keeps, of what was written to it and of what came in.
    pub fn backlog(&self) -> usize {
        match &self.transport {
            Transport::Tcp(_) | Transport::Memory(_) => 0,
            Transport::Tls(stream) => stream.backlog(),
        }
    }

    /// Whether the peer has ended its direction, also when there are bytes before that end which nobody has read yet.
    ///
    /// Known from the socket's readiness, without reading. Always false in memory.
    pub fn is_read_closed(&self) -> bool {
        let socket = match &self.transport {
            Transport::Tcp(stream) => stream,
            Transport::Tls(stream) => stream.socket(),
            Transport::Memory(_) => return false,
        };
        let ready = socket.ready(Interest::READABLE | Interest::ERROR).now_or_never();
        match ready {
            Some(Ok(ready)) => ready.is_read_closed() || ready.is_error(),
            Some(Err(_)) => true,
            None => false,
        }
    }

    fn io(self: Pin<&mut Self>) -> Pin<&mut (dyn Io + '_)> {
        match &mut self.get_mut().transport {
            Transport::Tcp(stream) => Pin::new(stream),
            Transport::Tls(stream) => Pin::new(stream),
            Transport::Memory(stream) => Pin::new(stream),
        }
    }
}

fn rehome(stream: TcpStream) -> io::Result<TcpStream> {
    TcpStream::from_std(stream.into_std()?)
}

trait Io: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Io for T {}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.io().poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.io().poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io().poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_is_shared_by_the_threads_of_one_process_and_by_nobody_else() {
        let here = [Handle::current(), Handle::current()];
        let first = Listener::bind_on("public", ([127, 0, 0, 1], 0).into(), &here).unwrap();
        assert_eq!(first.sockets.len(), 2);
        for others in [&here[..], &here[..1]] {
            let error = Listener::bind_on("public", first.address(), others).unwrap_err();
            assert!(format!("{error:#}").contains("is another process there?"), "{error:#}");
        }
        let address = first.address();
        drop(first);
        assert_eq!(Listener::bind_on("public", address, &here).unwrap().address(), address);
    }
}
