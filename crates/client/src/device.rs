//! The device's end: a link that is always there again, and a handler for what comes over it.

use std::{
    collections::HashMap,
    future::{Future, pending},
    sync::Arc,
    time::Duration,
};

use midspan_core::{
    api::HANDSHAKE_MAX,
    capability::Capabilities,
    connection_string::{ConnectionString, Identity},
    id::{DeviceAddress, RequestId},
    link::{FromDevice, GoodbyeReason, Invitation, REASON_MAX, cut},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    backoff::{Backoff, after_goodbye},
    clock::difference,
    http::{Options, Relay, SetupError},
    leg::Stream,
    link::{Link, LinkEnd, LinkEvent},
};

/// Decides about requests for streams, and serves those that it takes.
pub trait Handler: Send + Sync + 'static {
    /// What stands ready for an accepted stream, such as a connection to a local target.
    type Accepted: Send;

    /// Decides about a request; an error is the reason that the service is told, at most 1,024 bytes of it.
    fn decide(&self, invitation: &Invitation) -> impl Future<Output = Result<Self::Accepted, String>> + Send;

    /// Serves an accepted stream to its end.
    fn serve(&self, accepted: Self::Accepted, stream: Stream) -> impl Future<Output = ()> + Send;
}

/// What bounds a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSettings {
    /// How many streams there may be at a time; beyond it requests are rejected.
    pub max_streams: usize,
    /// How long streams may go on after the device was told to stop.
    pub grace: Duration,
}

impl Default for DeviceSettings {
    fn default() -> Self {
        Self { max_streams: 256, grace: Duration::from_secs(10) }
    }
}

/// A device, or a module of one, of one relay.
#[derive(Debug)]
pub struct Device {
    relay: Arc<Relay>,
    address: DeviceAddress,
    settings: DeviceSettings,
}

impl Device {
    /// A device with the connection string of a device; makes no connection yet.
    pub fn new(
        connection: ConnectionString,
        options: Options,
        settings: DeviceSettings,
    ) -> Result<Self, SetupError> {
        match connection.identity.clone() {
            Identity::Device(address) => {
                Ok(Self { relay: Arc::new(Relay::new(connection, options)?), address, settings })
            }
            Identity::Service(name) => {
                Err(SetupError::Identity { needed: "device", given: format!("service {name}") })
            }
        }
    }

    /// The device's id, with the module's when it is one.
    pub fn address(&self) -> &DeviceAddress {
        &self.address
    }

    /// Keeps a link to the relay until `stop`, whatever happens to the network or the relay.
    ///
    /// After `stop` no new stream is taken, and those that there are may go on for the grace time.
    pub async fn run<H: Handler>(self, handler: H, stop: CancellationToken) {
        let (events_to, mut events) = mpsc::channel(EVENTS);
        let mut run = Run {
            relay: self.relay,
            address: self.address,
            settings: self.settings,
            handler: Arc::new(handler),
            events: events_to,
            stop_links: CancellationToken::new(),
            links: JoinSet::new(),
            streams: JoinSet::new(),
            answers: JoinSet::new(),
            known: HashMap::new(),
            newest: 0,
            backoff: Backoff::default(),
            next_link: Some(Instant::now()),
            told_to_move: false,
        };
        loop {
            tokio::select! {
                // A link's events come before its end.
                biased;
                () = stop.cancelled() => break,
                Some(event) = events.recv() => run.take(event),
                Some(ended) = run.links.join_next() => match ended {
                    Ok((generation, end)) => run.link_ended(generation, &end),
                    Err(error) => {
                        warn!(%error, "the link's task failed");
                        run.retry();
                    }
                },
                () = at(run.next_link) => run.open_link(),
                Some(_) = run.streams.join_next() => {}
                Some(_) = run.answers.join_next() => {}
            }
        }
        run.finish().await;
    }
}

/// A running device.
struct Run<H> {
    relay: Arc<Relay>,
    address: DeviceAddress,
    settings: DeviceSettings,
    handler: Arc<H>,
    events: mpsc::Sender<LinkEvent>,
    stop_links: CancellationToken,
    links: JoinSet<(u64, LinkEnd)>,
    streams: JoinSet<()>,
    answers: JoinSet<()>,
    /// The requests that may come again, over a new link.
    known: HashMap<RequestId, Known>,
    /// The number of the newest link; an older one is replaced by it.
    newest: u64,
    backoff: Backoff,
    next_link: Option<Instant>,
    /// Whether the next link is to take the place of one that still stands.
    told_to_move: bool,
}

/// The answer to a request, once there is one.
type Answer = watch::Receiver<Option<FromDevice>>;

struct Known {
    answer: Answer,
    forget: Instant,
}

impl<H: Handler> Run<H> {
    fn open_link(&mut self) {
        self.next_link = None;
        self.told_to_move = false;
        self.newest += 1;
        debug!(link = self.newest, "opening a link");
        let link = Link {
            generation: self.newest,
            relay: Arc::clone(&self.relay),
            address: self.address.clone(),
            events: self.events.clone(),
            stop: self.stop_links.clone(),
        };
        self.links.spawn(link.run());
    }

    fn take(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Welcomed { generation, life, now } => {
                if generation != self.newest {
                    return;
                }
                self.backoff.reset();
                self.next_link = Some(Instant::now() + life.mul_f64(RENEW_AT).max(RENEW_LEAST));
                if let Some(words) = difference(self.relay.clock.unix_now(), now) {
                    warn!("{words}; set it, or credentials will be refused");
                }
                if self.links.len() == 1 {
                    info!("linked to {} as {}", self.relay.connection.host, self.relay.connection.identity);
                } else {
                    debug!(link = generation, "renewed the link");
                }
            }
            LinkEvent::ToldToMove { generation, goodbye } => {
                if generation != self.newest {
                    return;
                }
                let wait = after_goodbye(&goodbye, self.relay.clock.fraction());
                info!(
                    "the relay asks for a new link: {}; opening it in {:.1} s",
                    goodbye.message,
                    wait.as_secs_f64()
                );
                self.told_to_move = true;
                self.next_link = Some(Instant::now() + wait);
            }
            LinkEvent::Invited { invitation, answers } => self.invited(invitation, answers),
        }
    }

    fn invited(&mut self, invitation: Invitation, answers: mpsc::Sender<FromDevice>) {
        let now = Instant::now();
        self.known.retain(|_, known| known.forget > now);
        let request = invitation.request;
        let within = Duration::from_millis(invitation.answer_within_ms).min(HANDSHAKE_MAX);
        let answer = match self.known.get(&request) {
            Some(known) => known.answer.clone(),
            None => {
                let answer = self.decide(invitation, within);
                let known = Known { answer: answer.clone(), forget: now + HANDSHAKE_MAX };
                self.known.insert(request, known);
                answer
            }
        };
        self.answers.spawn(async move {
            let mut answer = answer;
            let sending = async {
                // The sender is gone without an answer only when the stream's task failed: the relay's time-out tells.
                if let Ok(answer) = answer.wait_for(Option::is_some).await.map(|answer| answer.clone())
                    && let Some(answer) = answer
                {
                    // A link that is gone asks again over the next one.
                    let _ = answers.send(answer).await;
                }
            };
            let _ = timeout(within, sending).await;
        });
    }

    fn decide(&mut self, invitation: Invitation, within: Duration) -> Answer {
        let (tell, answer) = watch::channel(None);
        if self.streams.len() >= self.settings.max_streams {
            let reason = format!("the device is at its limit of {} streams", self.settings.max_streams);
            warn!(stream = %invitation.stream, name = %invitation.name, "rejected a stream: {reason}");
            tell.send_replace(Some(FromDevice::Reject { request: invitation.request, reason }));
            return answer;
        }
        let (relay, handler) = (Arc::clone(&self.relay), Arc::clone(&self.handler));
        self.streams.spawn(async move { serve(&relay, &*handler, invitation, within, &tell).await });
        answer
    }

    fn link_ended(&mut self, generation: u64, end: &LinkEnd) {
        if generation < self.newest {
            debug!(link = generation, "the older link is over");
            return;
        }
        if self.told_to_move {
            debug!(link = generation, "the link is over before there is a new one");
            return;
        }
        let wait = match end {
            LinkEnd::Stopped => return,
            LinkEnd::Goodbye(goodbye) => after_goodbye(goodbye, self.relay.clock.fraction()),
            LinkEnd::NotOpened(error) => {
                let told = error.problem().and_then(|problem| problem.retry_after_seconds).unwrap_or(0);
                let told = Duration::from_secs(told.min(RETRY_AFTER_MOST));
                told + self.backoff.after_failure(self.relay.clock.fraction())
            }
            LinkEnd::Lost(_) => self.backoff.after_failure(self.relay.clock.fraction()),
        };
        let again = format!("trying again in {:.1} s", wait.as_secs_f64());
        match end {
            LinkEnd::Stopped => {}
            LinkEnd::NotOpened(error) => warn!("no link to the relay: {error}; {again}"),
            LinkEnd::Lost(reason) => warn!("the link is lost: {reason}; {again}"),
            LinkEnd::Goodbye(goodbye) if goodbye.reason == GoodbyeReason::Replaced => warn!(
                "another machine uses the identity of {}: its link replaced this one; {again}",
                self.relay.connection.identity
            ),
            LinkEnd::Goodbye(goodbye) => {
                info!("the relay ended the link: {} ({}); {again}", goodbye.message, goodbye.reason.label());
            }
        }
        self.next_link = Some(Instant::now() + wait);
    }

    fn retry(&mut self) {
        self.next_link = Some(Instant::now() + self.backoff.after_failure(self.relay.clock.fraction()));
    }

    async fn finish(mut self) {
        self.stop_links.cancel();
        drop(self.events);
        let _ = timeout(LINK_CLOSE_WAIT, async { while self.links.join_next().await.is_some() {} }).await;
        let open = self.streams.len();
        if open > 0 {
            info!("waiting up to {} s for {open} streams", self.settings.grace.as_secs());
        }
        let drain = async { while self.streams.join_next().await.is_some() {} };
        if timeout(self.settings.grace, drain).await.is_err() {
            warn!("cutting {} streams that did not end in time", self.streams.len());
        }
        self.streams.shutdown().await;
        self.answers.shutdown().await;
        info!("stopped");
    }
}

/// One request, from the decision to the stream's end.
async fn serve<H: Handler>(
    relay: &Relay,
    handler: &H,
    invitation: Invitation,
    within: Duration,
    tell: &watch::Sender<Option<FromDevice>>,
) {
    let (request, stream, name) = (invitation.request, invitation.stream, &invitation.name);
    let decision = timeout(within, handler.decide(&invitation))
        .await
        .unwrap_or_else(|_| Err("the device did not decide in time".to_owned()));
    let accepted = match decision {
        Ok(accepted) => accepted,
        Err(reason) => {
            warn!(%stream, %name, "rejected a stream: {reason}");
            let reason = cut(&reason, REASON_MAX).to_owned();
            tell.send_replace(Some(FromDevice::Reject { request, reason }));
            return;
        }
    };
    let capabilities = Capabilities::of_this_client();
    tell.send_replace(Some(FromDevice::Accept { request, capabilities: capabilities.clone() }));
    let trace = invitation.traceparent.trace_id();
    info!(%stream, %name, %trace, "accepted a stream");
    match relay.leg(&invitation.url, &invitation.ticket).await {
        Ok(leg) => {
            let stream = Stream::new(stream, leg, &capabilities, &invitation.capabilities);
            handler.serve(accepted, stream).await;
        }
        Err(error) => warn!(%stream, %name, "this end of the stream failed: {error}"),
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => pending().await,
    }
}

/// Events of links that wait; links wait when it is full.
const EVENTS: usize = 64;

/// The part of a credential's life after which a new link replaces the old one.
const RENEW_AT: f64 = 0.8;

/// A credential that is over at once does not make the device link without a pause.
const RENEW_LEAST: Duration = Duration::from_secs(1);

/// The most seconds of a `Retry-After` that a device obeys.
const RETRY_AFTER_MOST: u64 = 300;

/// For closing the link in good order when the device stops.
const LINK_CLOSE_WAIT: Duration = Duration::from_secs(2);
