//! The edge itself: what it is made of, what it serves, how it keeps its lease, and how it goes down.

use std::{
    future::poll_fn,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use midspan_core::{
    admission::LEEWAY,
    api::HANDSHAKE_MAX,
    close::{CloseReason, Level},
    id::{DeviceAddress, Role, StreamId},
    record::{self, StreamEnd, StreamRecord, StreamState},
    ticket::Owner,
};
use midspan_platform::{
    activity::{ActivityLog, Subject},
    clock,
    internal::Internal,
    lifecycle::Lifecycle,
    listener::Connection,
    metrics::{Counted, Metrics},
    owners::{OwnerUnreachable, Owners, RemoteOwners},
    rendezvous::{Lease, Rendezvous, ServerRole, Timing},
    secrets::Secrets,
};
use tokio::{runtime::Handle, time::timeout};
use tracing::{debug, error, info, info_span, warn};

use crate::{
    DataThreads, EdgeSettings,
    announcements::Announcements,
    forward::Forwards,
    leg::{self, Leg, Waited},
    metrics::EdgeMetrics,
    milestones::Milestone,
    pairing::{End, Next, Pairing, Place, StreamFacts},
    passing::{Passing, Ways},
    splice::{self, Ending, Splice},
    threads::Seat,
    vitals::Limits,
};

/// The streaming edge of one process.
pub struct Edge {
    pub(crate) settings: EdgeSettings,
    pub(crate) owner: Owner,
    pub(crate) secrets: Secrets,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) metrics: EdgeMetrics,
    pub(crate) pairing: Arc<Pairing>,
    pub(crate) splices: splice::Shared,
    pub(crate) limits: Arc<Limits>,
    pub(crate) rendezvous: Arc<dyn Rendezvous>,
    activity: ActivityLog,
    threads: DataThreads,
    /// The way to other edges; absent for an edge that is alone.
    pub(crate) internal: Option<Internal>,
    pub(crate) other_owners: Option<RemoteOwners>,
    pub(crate) forwards: Arc<Forwards>,
    pub(crate) passing: Passing,
    pub(crate) ways: Ways,
    announcements: Mutex<Announcements>,
}

/// What an edge is made of.
#[expect(missing_debug_implementations, reason = "parts on their way into an edge are never shown")]
pub struct EdgeParts {
    /// How it treats its streams.
    pub settings: EdgeSettings,
    /// Its name, life and internal address.
    pub owner: Owner,
    /// Ticket keys and deny list.
    pub secrets: Secrets,
    /// The process that it lives in.
    pub lifecycle: Lifecycle,
    /// Where its metrics are registered.
    pub metrics: Metrics,
    /// Where streams are announced and ended.
    pub rendezvous: Arc<dyn Rendezvous>,
    /// Where ends are recorded.
    pub activity: ActivityLog,
    /// Where joined streams run.
    pub threads: DataThreads,
    /// The way to other edges; absent for an edge that is alone.
    pub internal: Option<Internal>,
    /// What becomes of connections that are for other edges.
    pub passing: Passing,
}

/// A stream whose legs are both there.
struct Joined {
    place: Place,
    _counted: Counted,
}

/// How long a call to end a stream waits for its legs to be told.
const END_LIMIT: Duration = Duration::from_secs(8);

/// How long the rendezvous store may take for one announcement, off the path of the legs.
const STORE_LIMIT: Duration = Duration::from_secs(5);

/// How often, after the grace period, streams are looked for that began in the meantime.
const DRAIN_ROUNDS: usize = 3;

/// How many streams are announced again in one call.
const RESTORED_AT_ONCE: usize = 100;

const MIB: usize = 1024 * 1024;

const SWEEP: Duration = Duration::from_millis(250);

impl Edge {
    /// Puts an edge together and starts its housekeeping.
    pub fn start(parts: EdgeParts) -> Arc<Self> {
        parts.metrics.info(
            "midspan_edge_info",
            "Always 1; the edge's name and the incarnation that tickets for it must name.",
            &[("edge", &parts.owner.name), ("incarnation", &parts.owner.incarnation.to_string())],
        );
        let edge = Arc::new(Self {
            splices: splice::Shared::new(parts.settings.max_buffered_mib * MIB, &parts.metrics),
            limits: Arc::new(Limits {
                ping: parts.settings.leg_ping,
                silence: parts.settings.leg_silence,
                idle: parts.settings.idle_limit,
                stall: parts.settings.stall_limit,
                close: parts.settings.close_limit,
            }),
            settings: parts.settings,
            owner: parts.owner,
            secrets: parts.secrets,
            metrics: EdgeMetrics::new(&parts.metrics),
            lifecycle: parts.lifecycle,
            pairing: Arc::new(Pairing::new(clock::now())),
            rendezvous: parts.rendezvous,
            activity: parts.activity,
            threads: parts.threads,
            other_owners: parts.internal.clone().map(|internal| RemoteOwners::new(Arc::new(internal))),
            internal: parts.internal,
            forwards: Arc::default(),
            passing: parts.passing,
            ways: Ways::default(),
            announcements: Mutex::default(),
        });
        let span = info_span!("edge", edge = edge.owner.name);
        edge.lifecycle.spawn(span.clone(), Arc::clone(&edge).sweep());
        edge.lifecycle.spawn(span.clone(), Arc::clone(&edge).keep_lease());
        edge.lifecycle.spawn(span.clone(), Arc::clone(&edge).watch_deny_list());
        if edge.passing.domain.is_some() {
            edge.lifecycle.spawn(span.clone(), Arc::clone(&edge).watch_ways());
        }
        edge.lifecycle.spawn(span, Arc::clone(&edge).watch_stop());
        edge
    }

    /// Lets the streams of a closing process end by themselves for `grace`, then ends what is left.
    pub async fn drain(&self, grace: Duration) {
        let over = async {
            // Legs that are still being told of their end count as well.
            while self.pairing.counts() != (0, 0)
                || self.metrics.open_legs() > 0
                || !self.forwards.is_empty()
                || self.metrics.passed_now.get() > 0
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if timeout(grace, over).await.is_ok() {
            return;
        }
        // Expected legs are taken to the last, so ends may have to be told more than once.
        for _ in 0..DRAIN_ROUNDS {
            let left = self.pairing.live();
            if left.is_empty() && self.forwards.is_empty() && self.metrics.passed_now.get() == 0 {
                return;
            }
            info!(streams = left.len(), "the grace period is over, ending what is left");
            let ends = left.iter().map(|facts| self.end_stream(facts.stream, CloseReason::Draining));
            tokio::join!(futures_util::future::join_all(ends), self.end_forwarded(), self.end_passed());
        }
    }

    /// Ends a stream, and returns once its legs have been told, or [`END_LIMIT`] is over.
    pub(crate) async fn end_stream(&self, stream: StreamId, reason: CloseReason) {
        let now = clock::now();
        let done = match self.pairing.end(stream, reason, now, now + HANDSHAKE_MAX) {
            End::BySplice(facts) => Some((facts, Milestone::Told)),
            End::Here { facts, waiting } => {
                self.report(&facts, unused(reason)).await;
                waiting.then_some((facts, Milestone::Told))
            }
            End::Already(facts) => facts.map(|facts| (facts, Milestone::Reported)),
            End::Unseen => None,
        };
        if let Some((facts, milestone)) = done {
            let _ = timeout(END_LIMIT, facts.milestones.wait_for(milestone)).await;
        }
    }

    pub(crate) fn is_denied(&self, address: &DeviceAddress, credential: &str) -> bool {
        let deny = self.secrets.deny.current();
        deny.has_device(address) || deny.has_service(credential)
    }

    /// Keeps one leg from its upgrade until both are there, or it ends.
    pub(crate) async fn run_leg(self: Arc<Self>, mut place: Place, leg: Leg) {
        match place.ready(leg, clock::now()) {
            Next::HandedOver => {}
            Next::Ended(leg, reason) => leg::dismiss(leg, reason).await,
            Next::Wait(leg, other) => {
                let stopped = self.lifecycle.stopped();
                match leg::wait(leg, other, &mut place, self.settings.leg_ping, stopped).await {
                    Waited::Joined(first, second) => self.join(place, first, second),
                    Waited::Ended(leg, reason) => {
                        leg::dismiss(leg, reason).await;
                        place.told();
                    }
                    Waited::Gone => {
                        let (facts, role) = (&place.facts, place.role);
                        info!(stream.id = %facts.stream, %role, "leg went away before the other one came");
                    }
                    Waited::Stopped(leg) => {
                        let (now, reason) = (clock::now(), CloseReason::Draining);
                        if let End::Here { facts, .. } =
                            self.pairing.end(place.facts.stream, reason, now, now)
                        {
                            self.report(&facts, unused(reason)).await;
                        }
                        leg::dismiss(leg, reason).await;
                        place.told();
                    }
                }
            }
        }
    }

    /// Gives a stream whose legs are both there a task of its own on one of the data threads, this one if it has room.
    fn join(self: Arc<Self>, place: Place, first: Leg, second: Leg) {
        let facts = &place.facts;
        debug!(stream.id = %facts.stream, device.id = %facts.address, stream.name = %facts.name, "stream joined");
        let joined = Joined { _counted: Counted::new(&self.metrics.joined), place };
        let here = Handle::current();
        let announced = Arc::clone(&self).announce(Arc::clone(&joined.place.facts));
        self.lifecycle.spawn_on(&here, announced);
        let (service, device) = match first.role {
            Role::Service => (first, second),
            Role::Device => (second, first),
        };
        let edge = Arc::clone(&self);
        let (runtime, seat) = edge.threads.seat();
        if runtime.id() == here.id() {
            return self.start_stream(joined, service, device, seat);
        }
        edge.lifecycle.spawn_on(runtime, async move { self.start_stream(joined, service, device, seat) });
    }

    /// Spawns a stream afresh on this thread: a task keeps the size of all that it ever held.
    fn start_stream(self: Arc<Self>, joined: Joined, service: Leg, device: Leg, seat: Seat) {
        let (lifecycle, here) = (self.lifecycle.clone(), Handle::current());
        let (service, device) = match (service.settle(), device.settle()) {
            (Ok(service), Ok(device)) => (service, device),
            (Err(error), _) | (_, Err(error)) => {
                return lifecycle.spawn_on(&here, async move { self.break_off(joined, &error).await });
            }
        };
        let ((service, early_service, service_counted), (device, early_device, device_counted)) =
            (service, device);
        let (splices, limits) = (self.splices.clone(), Arc::clone(&self.limits));
        let left = joined.place.facts.credential_expires.plus(LEEWAY).since(clock::unix());
        let expiry = clock::now().checked_add(left);
        let stream = Splice::new(service, device, [early_service, early_device], splices, limits, expiry);
        lifecycle.spawn_on(&here, self.run_stream(joined, stream, ([service_counted, device_counted], seat)));
    }

    async fn announce(self: Arc<Self>, facts: Arc<StreamFacts>) {
        let joined = StreamState::Joined { joined: clock::unix() };
        let known = match timeout(STORE_LIMIT, self.rendezvous.advance_stream(facts.stream, joined)).await {
            // The store has forgotten it during its handshake; or it knows better, and then this changes nothing.
            Ok(Ok(None)) if self.announcements().unknown(clock::now()) => {
                self.restore(&[Arc::clone(&facts)]).await
            }
            Ok(Ok(_)) => true,
            Ok(Err(error)) => {
                warn!(stream.id = %facts.stream, %error, "a stream could not be announced yet");
                false
            }
            Err(_) => {
                warn!(stream.id = %facts.stream, "a stream could not be announced in time");
                false
            }
        };
        if !known {
            self.announcements().failed();
        }
        facts.milestones.reach(Milestone::Announced);
    }

    fn announcements(&self) -> MutexGuard<'_, Announcements> {
        self.announcements.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces joined streams again, to a store that may have forgotten them. Whether it knows them now.
    async fn restore(&self, streams: &[Arc<StreamFacts>]) -> bool {
        for some in streams.chunks(RESTORED_AT_ONCE) {
            let records: Vec<_> = some.iter().map(|facts| self.record(facts)).collect();
            match timeout(STORE_LIMIT, self.rendezvous.restore_streams(&records)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    warn!(%error, "streams could not be announced again");
                    return false;
                }
                Err(_) => {
                    warn!("streams could not be announced again in time");
                    return false;
                }
            }
        }
        true
    }

    /// The record of a joined stream, as far as it is known here: its first leg came soon after it was asked for.
    fn record(&self, facts: &StreamFacts) -> StreamRecord {
        StreamRecord {
            version: record::VERSION,
            stream: facts.stream,
            address: facts.address.clone(),
            name: facts.name.clone(),
            credential: facts.credential.to_string(),
            owner: self.owner.clone(),
            created: facts.first_leg,
            expires: facts.first_leg.plus(HANDSHAKE_MAX),
            state: StreamState::Joined { joined: facts.first_leg },
        }
    }

    #[expect(
        clippy::manual_async_fn,
        reason = "there is one for each stream, and an async fn keeps its arguments twice"
    )]
    fn run_stream(
        self: Arc<Self>,
        joined: Joined,
        mut stream: Splice<Connection>,
        held: ([Counted; 2], Seat),
    ) -> impl Future<Output = ()> + Send {
        async move {
            if self.lifecycle.stopped().is_cancelled() {
                let (stream, now) = (joined.place.facts.stream, clock::now());
                self.pairing.end(stream, CloseReason::Draining, now, now);
            }
            let ending = stream.run(pin!(poll_fn(|cx| joined.place.poll_ended(cx)))).await;
            Box::pin(self.conclude(joined, stream, ending, held)).await;
        }
    }

    /// The end is known and its room free at once; that the legs hear of it may take a while.
    async fn conclude(
        self: Arc<Self>,
        joined: Joined,
        stream: Splice<Connection>,
        ending: Ending,
        held: ([Counted; 2], Seat),
    ) {
        let Joined { place, _counted: counted } = joined;
        let reason = place.conclude(ending.reason());
        let (bytes_to_device, bytes_to_service) = stream.payload();
        let end = StreamEnd { reason, ended: clock::unix(), bytes_to_device, bytes_to_service };
        drop(counted);
        let report = async {
            announced(&place.facts).await;
            self.report(&place.facts, end).await;
        };
        tokio::join!(stream.finish(ending), report);
        drop(held);
        place.told();
    }

    /// Ends a stream whose connections cannot be used.
    async fn break_off(self: Arc<Self>, joined: Joined, error: &std::io::Error) {
        error!(stream.id = %joined.place.facts.stream, %error, "the legs of a stream cannot be used");
        let reason = joined.place.conclude(CloseReason::RelayFailed);
        announced(&joined.place.facts).await;
        self.report(&joined.place.facts, unused(reason)).await;
        joined.place.told();
    }

    /// Logs, counts and records the end of a stream. To be called once for each.
    async fn report(&self, facts: &StreamFacts, end: StreamEnd) {
        let row = end.reason.row();
        self.metrics.ended(end.reason);
        macro_rules! line {
            ($level:ident) => {
                $level!(
                    stream.id = %facts.stream, device.id = %facts.address, stream.name = %facts.name,
                    trace.id = facts.trace.trace_id(), credential = facts.credential, reason = row.label, fault = ?row.side,
                    bytes_to_device = end.bytes_to_device, bytes_to_service = end.bytes_to_service,
                    "stream ended: {}", row.text
                )
            };
        }
        match row.level {
            Level::Info => line!(info),
            Level::Warn => line!(warn),
            Level::Error => line!(error),
        }
        let record = self.advance(facts.stream, StreamState::Ended(end.clone())).await;
        let took = match &record {
            Some(record) => end.ended.since(record.created),
            None => clock::unix().since(facts.first_leg),
        };
        let subject = Subject {
            stream: Some(facts.stream),
            address: &facts.address,
            name: Some(&facts.name),
            credential: &facts.credential,
        };
        self.activity.end(&subject, &end, took);
        facts.milestones.reach(Milestone::Reported);
    }

    async fn advance(&self, stream: StreamId, next: StreamState) -> Option<StreamRecord> {
        match timeout(STORE_LIMIT, self.rendezvous.advance_stream(stream, next)).await {
            Ok(Ok(record)) => record,
            Ok(Err(error)) => {
                warn!(stream.id = %stream, %error, "a stream could not be announced");
                None
            }
            Err(_) => {
                warn!(stream.id = %stream, "a stream could not be announced in time");
                None
            }
        }
    }

    async fn sweep(self: Arc<Self>) {
        while !self.stopped_within(SWEEP).await {
            for (facts, reason) in self.pairing.sweep(clock::now()) {
                self.report(&facts, unused(reason)).await;
            }
            let (half_open, _) = self.pairing.counts();
            self.metrics.half_open.set(i64::try_from(half_open).unwrap_or(i64::MAX));
        }
    }

    async fn keep_lease(self: Arc<Self>) {
        loop {
            let (half_open, joined) = self.pairing.counts();
            let has_room = half_open + joined < self.settings.max_streams;
            let accepts = has_room && !self.lifecycle.draining().is_cancelled();
            let load = (half_open + joined) as u64;
            let lease = Lease {
                role: ServerRole::Edge,
                owner: self.owner.clone(),
                accepts,
                load,
                passed: self.passing.address.clone(),
            };
            match timeout(STORE_LIMIT, self.rendezvous.renew(&lease)).await {
                Ok(Ok(renewal)) => {
                    let owed = self.announcements().renewed(renewal, clock::now());
                    if owed {
                        // One that fails in the meantime is for the next time.
                        self.announcements().restored();
                        if !self.restore(&self.pairing.joined()).await {
                            self.announcements().failed();
                        }
                    }
                }
                Ok(Err(error)) => warn!(%error, "the edge's lease could not be renewed"),
                Err(_) => warn!("the edge's lease could not be renewed in time"),
            }
            tokio::select! {
                stopped = self.stopped_within(Timing::default().renewal) => if stopped { break },
                // Said at once, so that nothing new is placed here. Only once: the next round waits as usual.
                () = self.lifecycle.draining().cancelled(), if accepts => {}
            }
        }
        // Nobody would miss it for long: it expires.
        let _ = timeout(STORE_LIMIT, self.rendezvous.withdraw(ServerRole::Edge, &self.owner)).await;
    }

    async fn watch_deny_list(self: Arc<Self>) {
        let mut deny = self.secrets.deny.clone();
        loop {
            let list = tokio::select! {
                list = deny.changed() => list,
                () = self.lifecycle.stopped().cancelled() => return,
            };
            let denied = |facts: &&Arc<StreamFacts>| {
                list.has_device(&facts.address) || list.has_service(&facts.credential)
            };
            let live = self.pairing.live();
            let ends =
                live.iter().filter(denied).map(|facts| self.end_stream(facts.stream, CloseReason::Revoked));
            futures_util::future::join_all(ends).await;
        }
    }

    /// Ends everything at once when the process stops. A stream that is joined later sees for itself that it has.
    async fn watch_stop(self: Arc<Self>) {
        self.lifecycle.stopped().cancelled().await;
        let live = self.pairing.live();
        let ends = live.iter().map(|facts| self.end_stream(facts.stream, CloseReason::Draining));
        futures_util::future::join_all(ends).await;
    }

    async fn stopped_within(&self, time: Duration) -> bool {
        timeout(time, self.lifecycle.stopped().cancelled()).await.is_ok()
    }
}

#[async_trait]
impl Owners for Edge {
    async fn end(
        &self,
        owner: &Owner,
        stream: StreamId,
        reason: CloseReason,
    ) -> Result<(), OwnerUnreachable> {
        if owner != &self.owner {
            return Err(OwnerUnreachable);
        }
        self.end_stream(stream, reason).await;
        Ok(())
    }
}

impl std::fmt::Debug for Edge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Edge").field("owner", &self.owner).finish_non_exhaustive()
    }
}

/// Waits until the store knows that a stream is joined, so that it hears of the end after that; not for ever.
async fn announced(facts: &StreamFacts) {
    let _ = timeout(STORE_LIMIT, facts.milestones.wait_for(Milestone::Announced)).await;
}

fn unused(reason: CloseReason) -> StreamEnd {
    StreamEnd::unused(reason, clock::unix())
}
