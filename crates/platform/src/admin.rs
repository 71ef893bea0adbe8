//! The admin port: `/livez`, `/readyz`, `/metrics`. Plain HTTP, for the inside of a cluster only.

use http::{HeaderValue, Method, StatusCode, header};

use crate::{
    http::{Handler, handler, text},
    lifecycle::Lifecycle,
    metrics::Metrics,
};

/// Answers the requests of the admin port.
pub fn admin(lifecycle: Lifecycle, metrics: Metrics) -> Handler {
    let tasks = metrics.gauge("midspan_process_tasks", "Tasks of the process that have not ended.");
    handler(move |request| {
        let answer = match (request.method(), request.uri().path()) {
            (&Method::GET, "/livez") => text(StatusCode::OK, "alive\n"),
            (&Method::GET, "/readyz") if lifecycle.is_ready() => text(StatusCode::OK, "ready\n"),
            (&Method::GET, "/readyz") => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
            (&Method::GET, "/metrics") => {
                tasks.set(i64::try_from(lifecycle.task_count()).unwrap_or(i64::MAX));
                text(StatusCode::OK, metrics.render())
            }
            (&Method::GET, _) => text(StatusCode::NOT_FOUND, "here are /livez, /readyz and /metrics\n"),
            _ => {
                let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered here\n");
                answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET"));
                answer
            }
        };
        async { answer }
    })
}
