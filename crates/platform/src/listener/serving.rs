//! HTTP on one connection.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::FutureExt as _;
use http::{HeaderValue, header};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{Connection, HEADER_MAX};
use crate::{
    http::{Handler, HttpRequest, Peer, Upgrade},
    internal::{CALLS_MAX, Tasks},
    lifecycle::Lifecycle,
};

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
        let (upgrade, switching, draining) = (&upgrade, &switching, lifecycle.draining());
        handler(request).map(move |mut response| {
            if let Some(next) = response.extensions_mut().remove::<Upgrade>() {
                *upgrade.lock().unwrap_or_else(PoisonError::into_inner) = Some(next);
                switching.cancel();
            } else if draining.is_cancelled() {
                // The next request goes to another process, and not into a connection that ends in that moment.
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
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
pub(super) async fn serve_http2(
    connection: Connection,
    peer: Arc<Peer>,
    lifecycle: &Lifecycle,
    handler: &Handler,
) {
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
