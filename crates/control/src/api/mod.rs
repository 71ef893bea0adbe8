//! The HTTP API: one endpoint, one file. This file is the table of paths.

mod devices;
mod endpoints;
mod initiate;
mod streams;

use std::{borrow::Cow, sync::Arc, time::Duration};

use http::{HeaderValue, Method};
use midspan_core::{
    api::{PAGE_DEFAULT, PAGE_MAX},
    id::DeviceAddress,
    problem::{Problem, ProblemKind},
};
use midspan_platform::{
    clock,
    http::{HttpRequest, HttpResponse, REQUEST_ID, client_address, problem},
};
use percent_encoding::percent_decode_str;
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
        let path = request.uri().path().to_owned();
        let segments: Vec<_> = path.split('/').skip(1).map(decode).collect::<Result<_, _>>()?;
        let segments: Vec<&str> = segments.iter().map(AsRef::as_ref).collect();
        let method = request.method().clone();
        match segments.as_slice() {
            ["v1", "endpoints"] => {
                only(&method, "GET")?;
                self.list_endpoints(&request)
            }
            ["v1", "devices"] => {
                only(&method, "GET")?;
                self.list_devices(&request).await
            }
            ["v1", "devices", device @ ..] => {
                let (address, rest) = address(device)?;
                match rest {
                    [] => {
                        only(&method, "GET")?;
                        self.device_status(&request, &address).await
                    }
                    ["streams"] => {
                        only(&method, "POST")?;
                        self.initiate(request, address).await
                    }
                    ["link"] => {
                        only(&method, "GET")?;
                        self.open_link(request, &address)
                    }
                    _ => Err(nothing_here(&path)),
                }
            }
            ["v1", "streams"] => {
                only(&method, "GET")?;
                self.list_streams(&request).await
            }
            ["v1", "streams", stream] => match method {
                Method::GET => self.stream_status(&request, stream).await,
                Method::DELETE => self.end_stream(&request, stream).await,
                _ => Err(use_method("GET, DELETE")),
            },
            _ => Err(nothing_here(&path)),
        }
    }
}

/// Which page of a list is asked for.
struct PageQuery {
    limit: usize,
    after: Option<String>,
}

impl PageQuery {
    fn parse(request: &HttpRequest) -> Result<Self, Problem> {
        let mut page = Self { limit: PAGE_DEFAULT, after: None };
        for field in request.uri().query().unwrap_or_default().split('&').filter(|field| !field.is_empty()) {
            let (name, value) = field.split_once('=').unwrap_or((field, ""));
            match name {
                "limit" => {
                    page.limit = value
                        .parse()
                        .ok()
                        .filter(|limit| (1..=PAGE_MAX).contains(limit))
                        .ok_or_else(|| {
                            Problem::new(ProblemKind::BadRequest, format!("limit must be 1 to {PAGE_MAX}"))
                        })?;
                }
                "after" => page.after = Some(decode(value)?.into_owned()),
                _ => return Err(bad_request("the query has `limit` and `after` only")),
            }
        }
        Ok(page)
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

fn bad_request(detail: impl Into<String>) -> Problem {
    Problem::new(ProblemKind::BadRequest, detail)
}

/// `{device}` or `{device}/modules/{module}`, and what follows.
fn address<'a>(segments: &'a [&'a str]) -> Result<(DeviceAddress, &'a [&'a str]), Problem> {
    let id = |error: midspan_core::id::IdError| bad_request(error.to_string());
    match segments {
        [device, "modules", module, rest @ ..] => {
            let address = DeviceAddress {
                device: device.parse().map_err(id)?,
                module: Some(module.parse().map_err(id)?),
            };
            Ok((address, rest))
        }
        [device, rest @ ..] => {
            Ok((DeviceAddress { device: device.parse().map_err(id)?, module: None }, rest))
        }
        [] => Err(bad_request("a device id is missing")),
    }
}

fn decode(segment: &str) -> Result<Cow<'_, str>, Problem> {
    percent_decode_str(segment)
        .decode_utf8()
        .map_err(|_| bad_request("the path must be percent-encoded UTF-8"))
}

fn only(method: &Method, allowed: &'static str) -> Result<(), Problem> {
    if method.as_str() == allowed { Ok(()) } else { Err(use_method(allowed)) }
}

fn use_method(allowed: &'static str) -> Problem {
    let mut problem = Problem::new(ProblemKind::MethodNotAllowed, format!("use {allowed}"));
    problem.allow = Some(allowed);
    problem
}

fn nothing_here(path: &str) -> Problem {
    let path = midspan_core::link::cut(path, 200);
    Problem::new(
        ProblemKind::NotFound,
        format!("there is nothing at {path}; the API is described in docs/protocol.md"),
    )
}
