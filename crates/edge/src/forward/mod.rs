//! A leg that came to another edge than its owner: one hop to the owner, its bytes untouched.

mod pipe;

use std::{
    collections::HashMap,
    future::poll_fn,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use midspan_core::{
    close::CloseReason,
    id::StreamId,
    problem::{Problem, ProblemKind},
    ticket::{Owner, Ticket},
};
use midspan_platform::{
    http::{HttpRequest, HttpResponse, authenticated, first_subprotocol, websocket},
    internal::{CallError, Internal},
    metrics::Counted,
    owners::Owners as _,
    rendezvous::ServerRole,
    tls::TlsStream,
};
use tokio::{net::TcpStream, runtime::Handle, time::timeout};
use tracing::{debug, warn};

use crate::{edge::Edge, upgrade::Admitted};

/// The header by which the owner learns where a forwarded leg comes from.
pub(crate) const CLIENT_ADDRESS: &str = "midspan-client-address";

/// How long the owner may take to take a leg.
const LIMIT: Duration = Duration::from_secs(5);

/// The longest refusal of an owner that is passed on, in bytes.
const REFUSAL_MAX: usize = 16 * 1024;

/// The legs that this edge forwards.
#[derive(Debug, Default)]
pub(crate) struct Forwards {
    last: AtomicU64,
    legs: Mutex<HashMap<u64, (StreamId, Owner)>>,
}

/// One of them, until it is dropped.
#[derive(Debug)]
struct Forwarded {
    forwards: Arc<Forwards>,
    number: u64,
    _counted: Counted,
}

impl Forwards {
    fn add(self: &Arc<Self>, stream: StreamId, owner: Owner, counted: Counted) -> Forwarded {
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        self.legs().insert(number, (stream, owner));
        Forwarded { forwards: Arc::clone(self), number, _counted: counted }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.legs().is_empty()
    }

    /// The streams whose legs come through here, and who owns them.
    pub(crate) fn streams(&self) -> HashMap<StreamId, Owner> {
        self.legs().values().cloned().collect()
    }

    fn legs(&self) -> MutexGuard<'_, HashMap<u64, (StreamId, Owner)>> {
        self.legs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Forwarded {
    fn drop(&mut self) {
        self.forwards.legs().remove(&self.number);
    }
}

impl Edge {
    /// Takes a leg to its owner. The answer to the upgrade is the owner's.
    pub(crate) async fn forward(
        self: &Arc<Self>,
        request: &HttpRequest,
        admitted: Admitted,
        client: Option<&str>,
    ) -> Result<HttpResponse, Problem> {
        let Admitted { ticket, accept } = admitted;
        let Ticket { stream, role, owner, .. } = ticket;
        // An edge that is alone has no way to another one.
        let internal = self.internal.as_ref().ok_or_else(owner_gone)?;
        authenticated(request);
        let opened = timeout(LIMIT, open(internal, request, &owner, client)).await;
        let (connection, early) = opened.unwrap_or_else(|_| {
            warn!(stream.id = %stream, edge = owner.name, "the owner of a stream does not take a leg in time");
            Err(unreachable())
        })?;
        debug!(stream.id = %stream, %role, edge = owner.name, "leg forwarded");
        let forwarded = self.forwards.add(stream, owner, self.metrics.forwarded(role));
        let edge = Arc::clone(self);
        Ok(websocket(accept, first_subprotocol(request.headers()), move |leg, sent| {
            let lifecycle = edge.lifecycle.clone();
            lifecycle.spawn_on(&Handle::current(), async move {
                let stopped = edge.lifecycle.stopped().cancelled();
                let piped = pipe::pipe(leg, connection, [sent, early], edge.splices.clone(), &edge.limits);
                let ended = tokio::select! {
                    ended = piped => ended,
                    () = stopped => return,
                };
                edge.metrics.forwarded_bytes(role, ended.bytes);
                if let Err(error) = ended.result {
                    debug!(stream.id = %stream, %role, %error, "forwarded leg broke");
                }
                drop(forwarded);
            });
        }))
    }

    /// Asks the owners of all streams whose legs come through here to end them: only an owner can put a close frame
    /// between two others.
    pub(crate) async fn end_forwarded(&self) {
        let Some(owners) = &self.other_owners else { return };
        let ends = self.forwards.streams().into_iter().map(|(stream, owner)| async move {
            if owners.end(&owner, stream, CloseReason::Draining).await.is_err() {
                warn!(stream.id = %stream, edge = owner.name, "the owner of a stream could not be told that a leg ends");
            }
        });
        futures_util::future::join_all(ends).await;
    }
}

/// Opens a leg at its owner, and gives the connection and what came behind the answer.
async fn open(
    internal: &Internal,
    request: &HttpRequest,
    owner: &Owner,
    client: Option<&str>,
) -> Result<(TlsStream<TcpStream>, Bytes), Problem> {
    let failed = |error: &dyn std::fmt::Display| {
        warn!(edge = owner.name, %error, "the owner of a stream cannot be reached");
        unreachable()
    };
    let socket = internal.dial(ServerRole::Edge, owner).await.map_err(|error| match error {
        CallError::Gone => owner_gone(),
        CallError::Unreachable(_) | CallError::Refused(_) | CallError::TimedOut => failed(&error),
    })?;
    let (mut sender, mut connection) =
        http1::handshake(TokioIo::new(socket)).await.map_err(|error| failed(&error))?;
    let asked = asked(request, client).map_err(|error| failed(&error))?;
    let answer = async move {
        let response = sender.send_request(asked).await?;
        let status = response.status();
        if status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok((status, Bytes::new()));
        }
        // A body that breaks off is a refusal without a text.
        let body = Limited::new(response.into_body(), REFUSAL_MAX).collect().await;
        hyper::Result::Ok((status, body.map(http_body_util::Collected::to_bytes).unwrap_or_default()))
    };
    let driven = poll_fn(|cx| connection.poll_without_shutdown(cx));
    let (answer, driven) = tokio::join!(answer, driven);
    let (status, body) = answer.map_err(|error| failed(&error))?;
    if status != StatusCode::SWITCHING_PROTOCOLS {
        return Err(
            serde_json::from_slice(&body).unwrap_or_else(|_| failed(&format!("it answered {status}")))
        );
    }
    driven.map_err(|error| failed(&error))?;
    let parts = connection.into_parts();
    Ok((parts.io.into_inner(), parts.read_buf))
}

/// The request that the owner gets.
fn asked(request: &HttpRequest, client: Option<&str>) -> http::Result<Request<Empty<Bytes>>> {
    const PASSED_ON: [header::HeaderName; 6] = [
        header::AUTHORIZATION,
        header::CONNECTION,
        header::UPGRADE,
        header::SEC_WEBSOCKET_KEY,
        header::SEC_WEBSOCKET_VERSION,
        header::SEC_WEBSOCKET_PROTOCOL,
    ];
    let mut asked = Request::builder()
        .method(Method::GET)
        .uri(request.uri().path())
        .header(header::HOST, HeaderValue::from_static("edge.midspan.internal"));
    for name in PASSED_ON {
        for value in request.headers().get_all(&name) {
            asked = asked.header(&name, value);
        }
    }
    if let Some(client) = client {
        asked = asked.header(CLIENT_ADDRESS, client);
    }
    asked.body(Empty::new())
}

pub(crate) fn owner_gone() -> Problem {
    let detail = "the edge that was to join this stream has gone; ask for a new stream";
    Problem::new(ProblemKind::OwnerGone, detail)
}

fn unreachable() -> Problem {
    let mut problem = Problem::new(
        ProblemKind::Unavailable,
        "the edge that joins this stream cannot be reached from here; try again with the same ticket",
    );
    problem.retry_after_seconds = Some(1);
    problem
}
