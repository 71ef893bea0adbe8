//! `POST /v1/devices/{device}/streams`: ask a device for a stream.

use std::sync::Arc;

use http::{StatusCode, header};
use midspan_core::{
    api::StreamRequest,
    credential::Permission,
    id::DeviceAddress,
    json,
    problem::{Problem, ProblemKind},
    trace::TraceParent,
};
use midspan_platform::{
    clock,
    http::{HttpRequest, HttpResponse, body, header as header_value, json},
};
use tokio::time::timeout;

use super::{BODY_LIMIT, BODY_MAX, bad_request};
use crate::{auth::out_of_scope, control::Control};

impl Control {
    pub(crate) async fn initiate(
        self: &Arc<Self>,
        request: HttpRequest,
        address: DeviceAddress,
    ) -> Result<HttpResponse, Problem> {
        let service = self.service_that_may(&request, Permission::Open)?;
        if !service.reaches(&address) {
            return Err(out_of_scope(&service, &address));
        }
        if !self.credentials.current().knows(&address) {
            let detail = format!("device {address} is not registered with this relay");
            return Err(Problem::new(ProblemKind::DeviceUnknown, detail));
        }
        if self.secrets.deny.current().has_device(&address) {
            return Err(Problem::new(ProblemKind::NotAllowed, format!("device {address} has been revoked")));
        }
        let kind = header_value(&request, header::CONTENT_TYPE).unwrap_or_default();
        if !kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) {
            return Err(Problem::new(ProblemKind::NotJson, "send `Content-Type: application/json`"));
        }
        let trace = header_value(&request, "traceparent")
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(|| TraceParent::new(clock::random(), clock::random_u64()));
        let body = timeout(BODY_LIMIT, body(request, BODY_MAX)).await;
        let body = body.map_err(|_| bad_request("the body took too long to arrive"))??;
        let asked: StreamRequest = json::parse(&body).map_err(|error| bad_request(error.to_string()))?;
        let grant = self.open_stream(service, address, asked, trace).await?;
        Ok(json(StatusCode::CREATED, &grant))
    }
}
