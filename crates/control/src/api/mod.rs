//! The HTTP API: one endpoint, one file. This file is the table of paths.

mod devices;
mod endpoints;
mod initiate;
mod streams;

use std::{sync::Arc, time::Duration};

use http::HeaderValue;
use midspan_core::{
    path::ApiPath,
    problem::{Problem, ProblemKind},
};
use midspan_platform::{
    clock,
    http::{HttpRequest, HttpResponse, REQUEST_ID, client_address, problem},
};
use tracing::{Instrument as _, debug, info, info_span};

use crate::control::{Control, STORE_LIMIT};

/// The longest body of a request, in bytes.
const BODY_MAX: usize = 16 * 1024;

/// How long a request's body may take to arrive.
const BODY_LIMIT: Duration = Duration::from_secs(10);

impl Control {
    /// Answers a request to the API, or opens a device link.
    pub async fn handle(self: Arc<Self>, request: HttpRequest) -> HttpResponse {
        let id = format!("{:032x}", clock::random());
        let span = info_span!(
            "request",
            request.id = id,
            client.address = client_address(&request),
            method = %request.method(),
            path = request.uri().path()
        );
        async {
            match self.route(request).await {
                Ok(mut response) => {
                    debug!(status = response.status().as_u16(), "request answered");
                    if let Ok(id) = HeaderValue::from_str(&id) {
                        response.headers_mut().insert(REQUEST_ID, id);
                    }
                    response
                }
                Err(mut error) => {
                    error.request_id.clone_from(&id);
                    // What became of a stream has its own line.
                    if error.close_reason().is_none() {
                        info!(
                            status = error.status,
                            problem = error.name(),
                            detail = error.detail,
                            "request refused"
                        );
                    }
                    problem(&error)
                }
            }
        }
        .instrument(span)
        .await
    }

    async fn route(self: &Arc<Self>, request: HttpRequest) -> Result<HttpResponse, Problem> {
        let path = ApiPath::parse(request.uri().path())?;
        match (path, request.method().as_str()) {
            (ApiPath::Endpoints, "GET") => self.list_endpoints(&request),
            (ApiPath::Devices, "GET") => self.list_devices(&request).await,
            (ApiPath::Device(address), "GET") => self.device_status(&request, &address).await,
            (ApiPath::DeviceStreams(address), "POST") => self.initiate(request, address).await,
            (ApiPath::DeviceLink(address), "GET") => self.open_link(&request, &address),
            (ApiPath::Streams, "GET") => self.list_streams(&request).await,
            (ApiPath::Stream(stream), "GET") => self.stream_status(&request, &stream).await,
            (ApiPath::Stream(stream), "DELETE") => self.end_stream(&request, &stream).await,
            (path, _) => Err(use_method(path.methods())),
        }
    }
}

/// Calls the store, and turns its failure into an answer.
pub(crate) async fn in_time<T>(
    call: impl Future<Output = Result<T, midspan_platform::rendezvous::StoreError>>,
) -> Result<T, Problem> {
    match tokio::time::timeout(STORE_LIMIT, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(_)) | Err(_) => {
            Err(Problem::new(ProblemKind::Unavailable, "the relay's store does not answer; try again"))
        }
    }
}

/// What is answered while a device that is not found may be there all the same.
pub(crate) fn not_known_yet() -> Problem {
    let detail = "the relay does not know yet which devices are connected; try again";
    Problem::new(ProblemKind::Unavailable, detail)
}

fn bad_request(detail: impl Into<String>) -> Problem {
    Problem::new(ProblemKind::BadRequest, detail)
}

fn use_method(allowed: &'static str) -> Problem {
    let mut problem = Problem::new(ProblemKind::MethodNotAllowed, format!("use {allowed}"));
    problem.allow = Some(allowed);
    problem
}
