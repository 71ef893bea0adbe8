//! `GET /v1/endpoints`: the streaming endpoints.

use http::StatusCode;
use midspan_core::{api::Endpoints, problem::Problem};
use midspan_platform::http::{HttpRequest, HttpResponse, json};

use crate::control::Control;

impl Control {
    pub(crate) fn list_endpoints(&self, request: &HttpRequest) -> Result<HttpResponse, Problem> {
        self.service(request)?;
        Ok(json(StatusCode::OK, &Endpoints { streaming_endpoints: vec![self.edge_url.clone()] }))
    }
}
