//! From a service's request to the device's answer.

mod ask;
pub mod search;

use std::sync::Arc;

use midspan_core::{
    api::{StreamGrant, StreamRequest, Timeouts},
    close::CloseReason,
    credential::ServiceIdentity,
    id::{DeviceAddress, Role, StreamId},
    limit::{LimitName, LimitReached},
    problem::{Problem, ProblemKind},
    record::{self, StreamEnd, StreamRecord, StreamState},
    ticket::{Owner, Ticket},
    time::UnixTime,
    trace::TraceParent,
};
use midspan_platform::{
    activity::Subject,
    clock,
    metrics::Counted,
    rendezvous::{CreateError, LinkRecord, ServerRole, StoreError, StoreFailure, StreamLimits},
};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};
use tracing::{Instrument as _, Span, error, info, info_span, warn};

use crate::{
    control::{Control, STORE_LIMIT},
    view::Presence,
};

impl Control {
    /// Asks the device for a stream, and answers when it has answered.
    ///
    /// Whatever comes of it is logged, counted and recorded once, also when the caller stops waiting and drops the future.
    pub(crate) async fn open_stream(
        self: &Arc<Self>,
        service: ServiceIdentity,
        address: DeviceAddress,
        request: StreamRequest,
        trace: TraceParent,
    ) -> Result<StreamGrant, Problem> {
        let stream = StreamId::from_random(clock::random());
        let span =
            info_span!("initiation", stream.id = %stream, device.id = %address, trace.id = trace.trace_id());
        let mut attempt = Attempt {
            control: Arc::clone(self),
            service,
            address,
            request,
            trace,
            stream,
            expires: clock::unix().plus(self.settings.handshake_limit),
            owner: None,
            edge_url: String::new(),
            asked: false,
            started: Instant::now(),
            span: span.clone(),
            over: false,
        };
        let result = attempt.run().instrument(span).await;
        attempt.over(result.as_ref().map(drop)).await;
        result
    }

    /// Ends a stream that did not come about. Only a device that was asked can have sent a leg.
    async fn end_attempt(&self, stream: StreamId, owner: &Owner, asked: bool, reason: CloseReason) {
        if asked && self.owners.end(owner, stream, reason).await.is_err() {
            warn!("the owner of a stream that did not come about could not be told; its legs will time out");
        }
        self.announce(stream, StreamState::Ended(StreamEnd::unused(reason, clock::unix()))).await;
    }

    async fn announce(&self, stream: StreamId, next: StreamState) {
        let advanced = timeout(STORE_LIMIT, self.rendezvous.advance_stream(stream, next)).await;
        if !matches!(advanced, Ok(Ok(_))) {
            warn!("a stream could not be announced");
        }
    }
}

struct Attempt {
    control: Arc<Control>,
    service: ServiceIdentity,
    address: DeviceAddress,
    request: StreamRequest,
    trace: TraceParent,
    stream: StreamId,
    /// Until when the legs must be joined.
    expires: UnixTime,
    /// Once the stream is recorded.
    owner: Option<Owner>,
    /// The owner's.
    edge_url: String,
    /// Whether the device may have heard of the stream.
    asked: bool,
    started: Instant,
    span: Span,
    over: bool,
}

impl Attempt {
    async fn run(&mut self) -> Result<StreamGrant, Problem> {
        let control = Arc::clone(&self.control);
        let settings = &control.settings;
        if control.lifecycle.closing().is_cancelled() {
            return Err(Problem::new(
                ProblemKind::Unavailable,
                "this relay process is going away; try again",
            ));
        }
        control.rates.take(&self.service.name, clock::now())?;
        let _place = control.waiting.try_acquire().map_err(|_| LimitReached {
            name: LimitName::WaitingInitiations,
            value: settings.limit_waiting_initiations as u64,
            scope: "this relay process".to_owned(),
            retry_after_seconds: 1,
        })?;
        let _counted = Counted::new(&control.metrics.waiting_initiations);

        let timeouts = Timeouts::clamp(
            settings.handshake_limit,
            self.request.connect_timeout_seconds,
            self.request.response_timeout_seconds,
        );
        let (owner, link) = self.record().await?;
        let service_ticket = self.ticket(Role::Service, &owner);
        let capabilities = self.ask(&service_ticket, link, timeouts).await?;
        if control.view().presence(ServerRole::Edge, &owner, clock::now()) == Presence::Gone {
            return Err(Problem::from_close(CloseReason::EdgeLost));
        }
        let (announcer, stream) = (Arc::clone(&control), self.stream);
        control.lifecycle.spawn(self.span.clone(), async move {
            announcer.announce(stream, StreamState::Accepted).await;
        });
        let keys = control.secrets.ticket_keys();
        let text = keys.sign(&service_ticket).map_err(|_| cannot_sign())?;
        Ok(StreamGrant {
            stream: self.stream,
            url: self.leg_url(Role::Service),
            ticket: text,
            expires: self.expires,
            capabilities,
            connect_timeout_seconds: timeouts.connect.as_secs(),
            response_timeout_seconds: timeouts.response.as_secs(),
            traceparent: self.trace,
        })
    }

    /// Picks the owner and records the stream. Gives the owner, and the device's link if there is one.
    async fn record(&mut self) -> Result<(Owner, Option<LinkRecord>), Problem> {
        let control = &self.control;
        let now = clock::unix();
        // Not by a view of before the drain: an edge of this process drains as well.
        let draining = control.lifecycle.draining().is_cancelled();
        let owner = match control.view().owner_of(self.stream).filter(|_| !draining) {
            Some(owner) => owner,
            // An edge may have come just now.
            None => control.look().await?.owner_of(self.stream).ok_or_else(|| {
                Problem::new(ProblemKind::Unavailable, "no streaming edge can take a stream now; try again")
            })?,
        };
        let edge_url = control.edge_url.of(&owner.name).map_err(|error| {
            error!(%error, "an edge that --edge-url cannot name");
            Problem::new(ProblemKind::Internal, error.to_string())
        })?;
        let record = StreamRecord {
            version: record::VERSION,
            stream: self.stream,
            address: self.address.clone(),
            name: self.request.name.clone(),
            credential: self.service.name.clone(),
            owner: owner.clone(),
            created: now,
            expires: self.expires,
            state: StreamState::Requested,
        };
        let limits = StreamLimits {
            per_device: control.settings.limit_streams_per_device,
            per_service: control.settings.limit_streams_per_service,
            per_relay: control.settings.limit_streams_per_relay,
        };
        let link = match timeout(STORE_LIMIT, control.rendezvous.create_stream(record, limits)).await {
            Ok(Ok(link)) => link,
            Ok(Err(CreateError::Limit(limit))) => return Err(limit.into()),
            Ok(Err(CreateError::Store(error))) => return Err(store_problem(&error)),
            Err(_) => {
                return Err(store_problem(&StoreError::new(StoreFailure::TimedOut, "it took too long")));
            }
        };
        (self.owner, self.edge_url) = (Some(owner.clone()), edge_url);
        Ok((owner, link))
    }

    fn ticket(&self, role: Role, owner: &Owner) -> Ticket {
        Ticket {
            stream: self.stream,
            role,
            owner: owner.clone(),
            address: self.address.clone(),
            name: self.request.name.clone(),
            credential: self.service.name.clone(),
            credential_expires: self.service.expires,
            expires: self.expires,
            trace: self.trace,
        }
    }

    fn leg_url(&self, role: Role) -> String {
        let base = &self.edge_url;
        let base = match base.split_once("://") {
            Some(("http", rest)) => format!("ws://{rest}"),
            Some((_, rest)) => format!("wss://{rest}"),
            None => format!("wss://{base}"),
        };
        format!("{base}/bridges/{}/{role}", self.stream)
    }

    /// Logs, counts and records what came of the request, and ends the stream if nothing did.
    async fn over(&mut self, result: Result<(), &Problem>) {
        self.over = true;
        self.tell(result);
        if let Err(problem) = result {
            // An error means that the task was dropped with the process.
            let _ = self.end(problem.close_reason().unwrap_or(CloseReason::RelayFailed)).await;
        }
    }

    /// Ends a stream that did not come about: a leg of the device may already be waiting.
    ///
    /// In a task of its own, because the service may hang up while it lasts.
    fn end(&mut self, reason: CloseReason) -> oneshot::Receiver<()> {
        let (done, ended) = oneshot::channel();
        if let Some(owner) = self.owner.take() {
            let (control, stream, asked) = (Arc::clone(&self.control), self.stream, self.asked);
            self.control.lifecycle.spawn(self.span.clone(), async move {
                control.end_attempt(stream, &owner, asked, reason).await;
                // Nobody may wait for it any more.
                let _ = done.send(());
            });
        }
        ended
    }

    fn tell(&self, result: Result<(), &Problem>) {
        let took = self.started.elapsed();
        let name = result.err().and_then(Problem::name);
        self.control.metrics.initiation(name.unwrap_or("accepted"));
        let _entered = self.span.enter();
        let (credential, stream_name, took_ms) = (&self.service.name, &self.request.name, took.as_millis());
        match name {
            None => info!(credential, stream.name = %stream_name, took_ms, "device accepted"),
            Some(reason) => info!(credential, stream.name = %stream_name, took_ms, reason, "no stream"),
        }
        let subject = Subject {
            stream: Some(self.stream),
            address: &self.address,
            name: Some(&self.request.name),
            credential: &self.service.name,
        };
        self.control.activity.initiation(&subject, result, clock::unix(), took);
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        // The service hung up, and hyper dropped the future that waited.
        let problem = Problem::from_close(CloseReason::ServiceGaveUp);
        self.tell(Err(&problem));
        drop(self.end(CloseReason::ServiceGaveUp));
    }
}

fn store_problem(error: &StoreError) -> Problem {
    warn!(%error, "the rendezvous store failed");
    Problem::new(ProblemKind::Unavailable, "the relay's store does not answer; try again")
}

fn cannot_sign() -> Problem {
    Problem::new(ProblemKind::Internal, "a ticket could not be signed")
}
