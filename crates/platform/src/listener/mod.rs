//! Listeners: accept, what a balancer says of the client, TLS, HTTP, each step bounded in time and number.

mod connection;
mod proxies;
mod serving;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use async_trait::async_trait;
use clap::Args;
use midspan_core::{proxy::Addresses, ticket::TicketKeys};
use midspan_pacing::Listening;
use prometheus::{IntCounterVec, IntGaugeVec};
use rustls::ServerConfig;
use tokio::{
    net::TcpStream,
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tracing::{Instrument as _, debug, error, info, info_span, warn};

pub(crate) use self::proxies::{Forwarders, Told};
pub use self::{connection::Connection, proxies::ProxySettings, serving::serve_http};
use self::{
    connection::Transport,
    proxies::{Expected, HeaderFailure},
    serving::serve_http2,
};
use crate::{
    http::{Handler, Peer},
    lifecycle::Lifecycle,
    metrics::{Counted, Metrics},
    tls::{TlsStream, Turns, asked_name},
    watched::Watched,
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
    header_failures: IntCounterVec,
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
            header_failures: metrics.counters(
                "midspan_listener_proxy_header_failures_total",
                "Connections of proxies, or passed on by edges, without a good PROXY header, by cause.",
                "cause",
            ),
        };
        for limit in ["connections", "unauthenticated", "stranger_time"] {
            this.refused.with_label_values(&[limit]);
        }
        for cause in ["protocol", "timeout"] {
            this.tls_failures.with_label_values(&[cause]);
        }
        for failure in HeaderFailure::ALL {
            this.header_failures.with_label_values(&[failure.label()]);
        }
        this
    }
}

/// The places of connections, which listeners may share.
#[derive(Debug, Clone)]
pub struct Room {
    places: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    header_limit: Duration,
}

impl ListenerSettings {
    /// As many places as these settings say.
    pub fn room(&self) -> Room {
        Room {
            places: Arc::new(Semaphore::new(self.max_connections)),
            strangers: Arc::new(Semaphore::new(self.max_unauthenticated)),
            header_limit: self.header_limit,
        }
    }
}

/// Takes connections elsewhere before their TLS handshake, by the name that they ask for.
#[async_trait]
pub trait Passer: Send + Sync + std::fmt::Debug {
    /// A connection that leads to where `name` is served, with `hello` sent over it; `None` for one that is to be served
    /// here. `hello` is what has been read of the client's connection, and `addresses` are its ends.
    async fn open(&self, name: &str, addresses: Addresses, hello: &[u8]) -> Option<TcpStream>;

    /// Carries bytes both ways, until both ends have ended.
    async fn carry(&self, client: TcpStream, owner: TcpStream);
}

/// An address that is taken, on which nothing is accepted yet.
#[derive(Debug)]
pub struct Listener {
    name: &'static str,
    /// Each with the runtime that accepts from it and keeps what it accepts.
    sockets: Vec<(Handle, Listening)>,
    address: SocketAddr,
    trusted: bool,
    http2: bool,
    expected: Expected,
    forwarders: Option<Arc<Forwarders>>,
    passer: Option<Arc<dyn Passer>>,
}

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
            drop(Listening::bind(address, false).with_context(|| taken(address))?);
        }
        for runtime in runtimes {
            let _here = runtime.enter();
            let socket = Listening::bind(address, shared).with_context(|| taken(address))?;
            address = socket.local_addr().context("the listener has no address")?;
            sockets.push((runtime.clone(), socket));
        }
        Ok(Self {
            name,
            sockets,
            address,
            trusted: false,
            http2: false,
            expected: Expected::Nothing,
            forwarders: None,
            passer: None,
        })
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

    /// A listener with proxies in front, which say whose connections and requests they bring.
    #[must_use]
    pub fn behind(self, proxies: &ProxySettings) -> Self {
        Self { expected: proxies.expected(), forwarders: proxies.forwarders(), ..self }
    }

    /// A listener for connections that other edges pass on, which must say so with one of `keys`.
    #[must_use]
    pub fn for_passed(self, keys: Watched<TicketKeys>, proxies: &ProxySettings) -> Self {
        Self { expected: Expected::FromEdges(keys), forwarders: proxies.forwarders(), ..self }
    }

    /// A listener whose TLS connections `passer` may take elsewhere.
    #[must_use]
    pub fn passing(self, passer: Arc<dyn Passer>) -> Self {
        Self { passer: Some(passer), ..self }
    }

    /// The address, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts connections until the process stops.
    pub fn serve(
        self,
        tls: Option<Arc<ServerConfig>>,
        room: &Room,
        metrics: &ListenerMetrics,
        lifecycle: &Lifecycle,
        handler: Handler,
    ) {
        let Self { name, sockets, address, trusted, http2, expected, forwarders, passer } = self;
        info!(listener = name, %address, tls = tls.is_some(), "listening");
        let front = Arc::new(Front {
            name,
            trusted,
            http2,
            tls,
            expected,
            forwarders,
            passer,
            room: room.clone(),
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

struct Front {
    name: &'static str,
    trusted: bool,
    http2: bool,
    expected: Expected,
    forwarders: Option<Arc<Forwarders>>,
    passer: Option<Arc<dyn Passer>>,
    tls: Option<Arc<ServerConfig>>,
    room: Room,
    metrics: ListenerMetrics,
    lifecycle: Lifecycle,
    handler: Handler,
}

/// What one connection of a listener holds until its end.
#[derive(Debug)]
struct Held {
    _place: OwnedSemaphorePermit,
    _counted: Counted,
}

/// What becomes of a connection whose first bytes have been read.
enum Turn {
    /// It is served here. These bytes have been read.
    Here(Vec<u8>),
    /// It goes on over this one.
    To(TcpStream),
    /// It has failed.
    Nowhere,
}

impl Front {
    async fn accept(self: Arc<Self>, socket: Listening) {
        let acceptor = match socket.acceptor() {
            Ok(acceptor) => acceptor,
            Err(error) => return error!(%error, "cannot accept connections"),
        };
        let turns = Arc::new(Turns::here());
        let mut pause = Duration::ZERO;
        loop {
            let accepted = tokio::select! {
                () = self.lifecycle.stopped().cancelled() => return,
                accepted = acceptor.accept() => accepted,
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
            let peer = Arc::new(Peer::new(address, Some(place)).behind(front.forwarders.clone()));
            if front.trusted {
                peer.authenticated();
            }
            self.lifecycle.spawn_on(&Handle::current(), async move {
                tokio::select! {
                    () = front.connection(stream, &peer, held, turns) => {}
                    () = peer.stranger_for(front.room.header_limit * STRANGER_LIMITS) => {
                        front.refuse("stranger_time");
                    }
                    () = front.lifecycle.stopped().cancelled() => {}
                }
            });
        }
    }

    /// A place for the connection, and one among the strangers; `None` when there is none.
    fn admit(&self) -> Option<(Held, OwnedSemaphorePermit)> {
        let Ok(place) = Arc::clone(&self.room.places).try_acquire_owned() else {
            self.refuse("connections");
            return None;
        };
        let Ok(stranger) = Arc::clone(&self.room.strangers).try_acquire_owned() else {
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

    async fn connection(&self, mut stream: TcpStream, peer: &Arc<Peer>, held: Held, turns: Arc<Turns>) {
        // Boxed, so that connections which have none of this need no room for it.
        if self.expected.applies_to(peer.address().ip())
            && !Box::pin(self.read_header(&mut stream, peer)).await
        {
            return;
        }
        let mut read = Vec::new();
        if let (Some(passer), Some(_)) = (&self.passer, &self.tls) {
            match Box::pin(self.turn(passer.as_ref(), &mut stream, peer)).await {
                Turn::Here(bytes) => read = bytes,
                Turn::To(owner) => {
                    // Who it is, and how long it may be a stranger, is for the owner to say.
                    peer.authenticated();
                    return passer.carry(stream, owner).await;
                }
                Turn::Nowhere => return,
            }
        }
        let transport = match &self.tls {
            None => Transport::Tcp(stream),
            Some(config) => {
                let accepted = TlsStream::accept(stream, Arc::clone(config), turns, read);
                match timeout(self.room.header_limit, accepted).await {
                    Ok(Ok(stream)) => Transport::Tls(Box::new(stream)),
                    Ok(Err(error)) => return self.tls_failed("protocol", Some(&error)),
                    Err(_) => return self.tls_failed("timeout", None),
                }
            }
        };
        let connection = Connection::new(transport, held);
        let (peer, lifecycle) = (Arc::clone(peer), &self.lifecycle);
        if self.http2 {
            serve_http2(connection, peer, lifecycle, &self.handler).await;
        } else {
            serve_http(connection, peer, self.room.header_limit, lifecycle, &self.handler).await;
        }
    }

    /// Reads whose connection a proxy brings. Whether it could be read.
    async fn read_header(&self, stream: &mut TcpStream, peer: &Peer) -> bool {
        let read = timeout(self.room.header_limit, self.expected.read(stream)).await;
        match read.unwrap_or(Err(HeaderFailure::Timeout)) {
            Ok(told) => {
                peer.speaks_for(told);
                true
            }
            Err(failure) => {
                self.metrics.header_failures.with_label_values(&[failure.label()]).inc();
                debug!(listener = self.name, proxy.address = %peer.address(), cause = failure.label(), "no good PROXY header");
                false
            }
        }
    }

    /// Reads the name that a client asks for, and whether the connection is to go elsewhere.
    async fn turn(&self, passer: &dyn Passer, stream: &mut TcpStream, peer: &Peer) -> Turn {
        let mut read = Vec::new();
        let name = match timeout(self.room.header_limit, asked_name(stream, &mut read)).await {
            Ok(Ok(name)) => name,
            Ok(Err(error)) => {
                self.tls_failed("protocol", Some(&error));
                return Turn::Nowhere;
            }
            Err(_) => {
                self.tls_failed("timeout", None);
                return Turn::Nowhere;
            }
        };
        let server = peer.server().or_else(|| stream.local_addr().ok());
        let (Some(name), Some(server)) = (name, server) else { return Turn::Here(read) };
        let addresses = Addresses { client: peer.address(), server };
        match passer.open(&name, addresses, &read).await {
            Some(owner) => Turn::To(owner),
            None => Turn::Here(read),
        }
    }

    fn tls_failed(&self, cause: &'static str, error: Option<&io::Error>) {
        self.metrics.tls_failures.with_label_values(&[cause]).inc();
        match error {
            Some(error) => debug!(listener = self.name, %error, "TLS handshake failed"),
            None => debug!(listener = self.name, "TLS handshake took too long"),
        }
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
