//! Requests and answers, as all roles make them.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use midspan_core::{
    id::Incarnation,
    problem::{Problem, ProblemKind},
    proxy::Addresses,
};
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use crate::listener::{Connection, Forwarders, Told};

/// A request as it comes from a listener.
pub type HttpRequest = Request<Incoming>;

/// An answer, whole in memory: bodies of the API are small.
pub type HttpResponse = Response<Full<Bytes>>;

/// What answers the requests of one listener.
pub type Handler = Arc<dyn Fn(HttpRequest) -> BoxFuture<'static, HttpResponse> + Send + Sync>;

/// The header that carries the request id.
pub const REQUEST_ID: &str = "x-request-id";

/// Who is at the other end of a connection; an extension of every request.
#[derive(Debug)]
pub struct Peer {
    /// Where the connection came from.
    address: SocketAddr,
    /// Whose it is and where it was opened to, when a proxy in between has said so.
    told: OnceLock<Told>,
    forwarders: Option<Arc<Forwarders>>,
    pending: Mutex<Option<OwnedSemaphorePermit>>,
    known: CancellationToken,
}

impl Peer {
    /// A peer that holds one of the places for those who have not shown who they are.
    pub fn new(address: SocketAddr, place: Option<OwnedSemaphorePermit>) -> Self {
        Self {
            address,
            told: OnceLock::new(),
            forwarders: None,
            pending: Mutex::new(place),
            known: CancellationToken::new(),
        }
    }

    /// A peer that may be one of the HTTP proxies whose word is taken.
    pub(crate) fn behind(self, forwarders: Option<Arc<Forwarders>>) -> Self {
        Self { forwarders, ..self }
    }

    /// The peer is a proxy, and this is whose connection it brings. Said once.
    pub(crate) fn speaks_for(&self, told: Told) {
        let _ = self.told.set(told);
    }

    /// The address that the connection came from, as far as that is known.
    pub fn address(&self) -> SocketAddr {
        self.addresses().map_or(self.address, |told| told.client)
    }

    /// Where the connection was opened to, when a proxy has said so.
    pub(crate) fn server(&self) -> Option<SocketAddr> {
        self.addresses().map(|told| told.server)
    }

    fn addresses(&self) -> Option<Addresses> {
        self.told.get()?.addresses
    }

    /// The peer has shown who it is, and gives its place to the next stranger.
    pub fn authenticated(&self) {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.known.cancel();
    }

    /// Returns when the peer has been a stranger for `limit`, and never once it has shown who it is.
    pub(crate) async fn stranger_for(&self, limit: Duration) {
        tokio::select! {
            () = tokio::time::sleep(limit) => {}
            () = self.known.cancelled() => std::future::pending().await,
        }
    }
}

/// Tells the listener that the sender of `request` has shown who it is.
pub fn authenticated<B>(request: &Request<B>) {
    if let Some(peer) = request.extensions().get::<Arc<Peer>>() {
        peer.authenticated();
    }
}

/// Where the sender of `request` connects from, for the log.
pub fn client_address<B>(request: &Request<B>) -> Option<String> {
    let peer = request.extensions().get::<Arc<Peer>>()?;
    let address = peer.address();
    let forwarded =
        peer.forwarders.as_ref().and_then(|proxies| proxies.client(address.ip(), request.headers()));
    Some(forwarded.map_or_else(|| address.to_string(), |client| client.to_string()))
}

/// The edge that passes the connection of `request` on below TLS.
pub fn passer<B>(request: &Request<B>) -> Option<Incarnation> {
    request.extensions().get::<Arc<Peer>>()?.told.get()?.passer
}

/// The value of a header, when it is there once and readable.
pub fn header<B>(request: &Request<B>, name: impl header::AsHeaderName) -> Option<&str> {
    let mut values = request.headers().get_all(name).iter();
    let first = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(first)
}

/// The `Sec-WebSocket-Key` of an upgrade request (RFC 6455, section 4.2.1), or the header that it lacks.
pub fn websocket_key(headers: &HeaderMap) -> Result<&HeaderValue, &'static str> {
    let has = |name, token: &str| {
        let values = headers.get_all(name).iter().filter_map(|value: &HeaderValue| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(token))
    };
    if !has(header::CONNECTION, "upgrade") {
        return Err("Connection: Upgrade");
    }
    if !has(header::UPGRADE, "websocket") {
        return Err("Upgrade: websocket");
    }
    if !has(header::SEC_WEBSOCKET_VERSION, "13") {
        return Err("Sec-WebSocket-Version: 13");
    }
    // 16 bytes in base64.
    let key = headers.get(header::SEC_WEBSOCKET_KEY).filter(|key| key.len() == 24);
    key.ok_or("Sec-WebSocket-Key: {16 random bytes in base64}")
}

/// The first of the subprotocols that an upgrade request offers (RFC 6455, section 4.2.2), when it offers any.
pub fn first_subprotocol(headers: &HeaderMap) -> Option<HeaderValue> {
    let first = headers.get(header::SEC_WEBSOCKET_PROTOCOL)?.to_str().ok()?.split(',').next()?.trim();
    if first.is_empty() { None } else { HeaderValue::from_str(first).ok() }
}

/// An answer with a JSON body.
pub fn json<T: Serialize>(status: StatusCode, body: &T) -> HttpResponse {
    match serde_json::to_vec(body) {
        Ok(bytes) => with_body(status, "application/json", bytes.into()),
        Err(_) => problem(&Problem::new(ProblemKind::Internal, "the answer could not be written")),
    }
}

/// An answer without a body.
pub fn empty(status: StatusCode) -> HttpResponse {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

/// An answer with a plain text.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> HttpResponse {
    with_body(status, "text/plain; charset=utf-8", body.into())
}

/// An error answer (RFC 9457).
pub fn problem(problem: &Problem) -> HttpResponse {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = serde_json::to_vec(problem).unwrap_or_default();
    let mut response = with_body(status, "application/problem+json", body.into());
    if let Some(seconds) = problem.retry_after_seconds {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    if status == StatusCode::UPGRADE_REQUIRED {
        response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        response.headers_mut().insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    }
    if let Some(methods) = problem.allow {
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(methods));
    }
    if let Ok(id) = HeaderValue::from_str(&problem.request_id)
        && !problem.request_id.is_empty()
    {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    if status == StatusCode::UNAUTHORIZED {
        let of_ticket = problem.name().is_some_and(|name| name.starts_with("ticket_"));
        let scheme = HeaderValue::from_static(if of_ticket { "Bearer" } else { "SharedAccessSignature" });
        response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
    }
    response
}

/// Reads a body of at most `max` bytes, within a time that the caller sets around it.
pub async fn body(request: HttpRequest, max: usize) -> Result<Bytes, Problem> {
    let too_large =
        || Problem::new(ProblemKind::BodyTooLarge, format!("the body has at most {max} bytes here"));
    match http_body_util::Limited::new(request.into_body(), max).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(too_large()),
        Err(_) => Err(Problem::new(ProblemKind::BadRequest, "the body ended early")),
    }
}

/// Makes a handler out of a function.
pub fn handler<F, Answer>(answer: F) -> Handler
where
    F: Fn(HttpRequest) -> Answer + Send + Sync + 'static,
    Answer: Future<Output = HttpResponse> + Send + 'static,
{
    Arc::new(move |request| Box::pin(answer(request)))
}

/// What becomes of a connection once the answer that switches protocols has been sent: an extension of that answer.
#[derive(Clone)]
pub(crate) struct Upgrade(Arc<Mutex<Option<Next>>>);

type Next = Box<dyn FnOnce(Connection, Bytes) + Send>;

impl Upgrade {
    /// Hands over the connection, and what was read of it behind the request.
    pub(crate) fn take(self, connection: Connection, early: Bytes) {
        let next = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(next) = next {
            next(connection, early);
        }
    }
}

/// An answer that turns the connection into a WebSocket (RFC 6455, section 4.2.2).
///
/// Once it has been sent, `next` gets the connection, and what was read of it behind the request; it must not block.
/// When the connection breaks before that, `next` is dropped.
pub fn websocket(
    accept: HeaderValue,
    protocol: Option<HeaderValue>,
    next: impl FnOnce(Connection, Bytes) + Send + 'static,
) -> HttpResponse {
    let mut response = empty(StatusCode::SWITCHING_PROTOCOLS);
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    if let Some(protocol) = protocol {
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
    }
    response.extensions_mut().insert(Upgrade(Arc::new(Mutex::new(Some(Box::new(next))))));
    response
}

pub(crate) fn with_body(status: StatusCode, kind: &'static str, body: Bytes) -> HttpResponse {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
