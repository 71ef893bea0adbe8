//! `GET /v1/endpoints`: the streaming endpoints.

use http::StatusCode;
use midspan_core::{api::Endpoints, problem::Problem};
use midspan_platform::http::{HttpRequest, HttpResponse, json};

use crate::control::Control;

impl Control {
    pub(crate) fn list_endpoints(&self, request: &HttpRequest) -> Result<HttpResponse, Problem> {
        self.service(request)?;
        let view = self.view();
        let edges = view.edges.alive.iter().map(|lease| lease.owner.name.as_str());
        let mut streaming_endpoints: Vec<_> = if self.edge_url.names_owner() {
            edges.filter_map(|edge| self.edge_url.of(edge).ok()).collect()
        } else {
            vec![self.edge_url.to_string()]
        };
        streaming_endpoints.dedup();
        Ok(json(StatusCode::OK, &Endpoints { streaming_endpoints }))
    }
}
