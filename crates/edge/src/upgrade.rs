//! From a request for a leg to an open WebSocket.

use std::sync::Arc;

use futures_util::future::join_all;
use http::{HeaderMap, HeaderValue, Method, header};
use midspan_core::{
    admission::{Entrance, Way, admit, way},
    close::CloseReason,
    internal::{END_PASSED, END_STREAM, EndPassed, EndStream},
    path::LegPath,
    problem::{Problem, ProblemKind},
    ticket::Ticket,
};
use midspan_platform::{
    clock,
    http::{
        HttpRequest, HttpResponse, authenticated, client_address, first_subprotocol, header as header_value,
        passer, problem, websocket, websocket_key,
    },
    internal::{answer_call, question},
};
use tokio::runtime::Handle;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tracing::{Span, debug_span, info};

use crate::{
    edge::Edge,
    forward::{CLIENT_ADDRESS, owner_gone},
    leg::Leg,
};

/// A leg that may be opened: its ticket is good, and its request a WebSocket's.
#[derive(Debug)]
pub(crate) struct Admitted {
    /// What it may do.
    pub(crate) ticket: Ticket,
    /// The value of `Sec-WebSocket-Accept`.
    pub(crate) accept: HeaderValue,
}

impl Edge {
    /// Answers a request below `/bridges/`.
    pub async fn handle(self: &Arc<Self>, request: &HttpRequest) -> HttpResponse {
        let client = client_address(request);
        let opened = match self.admit(request, Entrance::Public) {
            Ok((admitted, Way::Here)) => self.open_leg(request, admitted, client.as_deref()),
            // Boxed, because most legs need no room for it.
            Ok((admitted, Way::ToOwner)) => {
                Box::pin(self.forward(request, admitted, client.as_deref())).await
            }
            Ok((_, Way::Nowhere)) => Err(owner_gone()),
            Err(problem) => Err(problem),
        };
        opened.unwrap_or_else(|problem| self.refuse(problem, client.as_deref()))
    }

    /// Answers a request of another process of the relay: a leg that it forwards, or a call.
    pub async fn handle_internal(self: &Arc<Self>, request: HttpRequest) -> HttpResponse {
        if !request.uri().path().starts_with("/bridges/") {
            let edge = Arc::clone(self);
            return answer_call(request, self.owner.incarnation, |path, question| {
                Box::pin(async move { edge.answer(&path, &question).await })
            })
            .await;
        }
        let client = header_value(&request, CLIENT_ADDRESS);
        let opened = match self.admit(&request, Entrance::Internal) {
            Ok((admitted, Way::Here)) => self.open_leg(&request, admitted, client),
            Ok((_, Way::ToOwner | Way::Nowhere)) => Err(owner_gone()),
            Err(problem) => Err(problem),
        };
        opened.unwrap_or_else(|problem| self.refuse(problem, client))
    }

    async fn answer(&self, path: &str, text: &[u8]) -> Result<Vec<u8>, Problem> {
        match path {
            END_STREAM => {
                let EndStream { stream, reason, .. } = question(text)?;
                self.end_stream(stream, reason).await;
                Ok(b"{}".to_vec())
            }
            END_PASSED => {
                let EndPassed { passer, reason, .. } = question(text)?;
                let live = self.pairing.live();
                let ends = live.iter().filter(|facts| facts.passers.has(passer));
                join_all(ends.map(|facts| self.end_stream(facts.stream, reason))).await;
                Ok(b"{}".to_vec())
            }
            _ => Err(Problem::new(ProblemKind::NotFound, "there is no such call")),
        }
    }

    fn refuse(&self, mut answer: Problem, client: Option<&str>) -> HttpResponse {
        // An owner that refused has given its own.
        if answer.request_id.is_empty() {
            answer.request_id = format!("{:032x}", clock::random());
        }
        let name = answer.name().unwrap_or_default();
        self.metrics.refused(name);
        info!(
            request.id = answer.request_id,
            client.address = client,
            problem = name,
            detail = answer.detail,
            "leg refused"
        );
        problem(&answer)
    }

    fn admit(&self, request: &HttpRequest, entrance: Entrance) -> Result<(Admitted, Way), Problem> {
        let path = LegPath::parse(request.uri().path())?;
        if request.method() != Method::GET {
            let mut problem = Problem::new(ProblemKind::MethodNotAllowed, "a leg is opened with GET");
            problem.allow = Some("GET");
            return Err(problem);
        }
        let ticket = admit(&self.secrets.ticket_keys(), ticket_text(request)?, path, clock::unix())?;
        let way = way(&ticket.owner, &self.owner, entrance);
        Ok((Admitted { ticket, accept: check_upgrade(request.headers())? }, way))
    }

    fn open_leg(
        self: &Arc<Self>,
        request: &HttpRequest,
        admitted: Admitted,
        client: Option<&str>,
    ) -> Result<HttpResponse, Problem> {
        let Admitted { ticket, accept } = admitted;
        let Ticket { stream, role, .. } = ticket;
        let place = self.pairing.take(&ticket, clock::now(), clock::unix(), self.settings.max_streams)?;
        if let Some(passer) = passer(request) {
            place.facts.passers.set(role, passer);
        }
        // Looked at once the place is taken: from here on, a change of the deny list finds the stream.
        if self.is_denied(&ticket.address, &ticket.credential) {
            let (edge, reason) = (Arc::clone(self), CloseReason::Revoked);
            self.lifecycle.spawn(Span::current(), async move { edge.end_stream(stream, reason).await });
            return Err(Problem::from_close(reason));
        }
        authenticated(request);

        let counted = self.metrics.leg(role);
        let edge = Arc::clone(self);
        // The line at the end of a stream says it all: others are for those who look for a fault.
        let span = debug_span!(parent: None, "leg", stream.id = %stream, %role, client.address = client, trace.id = ticket.trace.trace_id());
        Ok(websocket(accept, first_subprotocol(request.headers()), move |io, early| {
            let leg = Leg { io, early, role, counted, home: Handle::current().id() };
            let lifecycle = edge.lifecycle.clone();
            lifecycle.spawn(span, edge.run_leg(place, leg));
        }))
    }
}

fn ticket_text(request: &HttpRequest) -> Result<&str, Problem> {
    let text = header_value(request, header::AUTHORIZATION)
        .and_then(|value| value.split_at_checked("Bearer ".len()))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("Bearer "));
    text.map(|(_, text)| text.trim()).ok_or_else(|| {
        let detail = "send the ticket as `Authorization: Bearer {ticket}`; it is not read from the URL";
        Problem::new(ProblemKind::TicketInvalid, detail)
    })
}

/// Checks the upgrade's headers and gives the value of `Sec-WebSocket-Accept`.
fn check_upgrade(headers: &HeaderMap) -> Result<HeaderValue, Problem> {
    let required = |what: &str| {
        let detail = format!("a leg is a WebSocket: send `{what}` (RFC 6455, section 4.1)");
        Problem::new(ProblemKind::UpgradeRequired, detail)
    };
    let key = websocket_key(headers).map_err(required)?;
    HeaderValue::from_str(&derive_accept_key(key.as_bytes())).map_err(|_| required("Sec-WebSocket-Key"))
}
