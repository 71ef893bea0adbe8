//! An edge: the real pairing, admission and announcements, with the network and the store of the simulation around them.

use std::{
    cell::{Cell, RefCell},
    future::{Future, pending, poll_fn},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use midspan_core::{
    admission::{Entrance, Way, admit, way},
    api::HANDSHAKE_MAX,
    close::CloseReason,
    id::{Role, StreamId},
    path::LegPath,
    problem::{Problem, ProblemKind},
    record::{self, StreamEnd, StreamRecord, StreamState},
    ticket::{Owner, Ticket},
    time::UnixTime,
};
use midspan_edge::{
    announcements::Announcements,
    milestones::Milestone,
    pairing::{End as PairingEnd, Next, Pairing, Place, StreamFacts},
};
use midspan_platform::rendezvous::{Lease, Rendezvous as _, ServerRole, StoreError};

use crate::{
    executor::Life,
    network::{End, Host, Through, delay},
    store::SimClient,
    world::{InUse, Process, Rule, Sabotage, Who, World},
};

/// How long the store may take for one announcement.
const STORE_LIMIT: Duration = Duration::from_secs(5);

/// How long a call to end a stream waits for its legs to be told.
const END_LIMIT: Duration = Duration::from_secs(8);

const SWEEP: Duration = Duration::from_millis(250);

/// How often a waiting leg is looked at.
const LOOK: Duration = Duration::from_millis(250);

const MAX_STREAMS: usize = 1000;

/// What one end of a leg tells the other.
#[derive(Debug)]
pub(crate) enum LegMessage {
    /// The stream ends, in good order.
    Close,
}

/// A leg at its owner.
pub(crate) struct Leg {
    pub(crate) who: Who,
    pub(crate) role: Role,
    pub(crate) end: End<LegMessage>,
    /// Until the leg goes.
    _in_use: InUse,
}

pub(crate) struct Edge {
    pub(crate) world: Rc<World>,
    pub(crate) life: Life,
    pub(crate) host: Host,
    pub(crate) owner: Owner,
    skew: i64,
    pub(crate) pairing: Arc<Pairing<Leg>>,
    announcements: RefCell<Announcements>,
    store: Arc<SimClient>,
    draining: Cell<bool>,
}

impl Edge {
    #[expect(
        clippy::arc_with_non_send_sync,
        reason = "the pairing wants an Arc, and the simulation's legs have one thread"
    )]
    pub(crate) fn start(world: &Rc<World>, host: Host, owner: Owner, skew: i64) -> Rc<Self> {
        let edge = Rc::new(Self {
            world: Rc::clone(world),
            life: world.sim.life(),
            host,
            owner,
            skew,
            pairing: Arc::new(Pairing::new(world.sim.now())),
            announcements: RefCell::default(),
            store: world.store.client(),
            draining: Cell::new(false),
        });
        world.sim.say(|| {
            format!("{} starts at {} as {}", edge.owner.name, edge.owner.address, edge.owner.incarnation)
        });
        world.listen(Process::Edge(Rc::clone(&edge)), host);
        edge.spawn(Rc::clone(&edge).keep_lease());
        edge.spawn(Rc::clone(&edge).tell_untold());
        if world.sabotage != Sabotage::Deadline {
            edge.spawn(Rc::clone(&edge).sweep());
        }
        edge
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.world.sim.spawn(self.life, task);
    }

    fn unix(&self) -> UnixTime {
        self.world.sim.unix(self.skew)
    }

    /// Takes a leg, or takes it to its owner. The caller hears when its WebSocket is open.
    pub(crate) fn open(
        self: Rc<Self>,
        who: Who,
        path: LegPath,
        text: String,
        entrance: Entrance,
        end: End<LegMessage>,
    ) -> Pin<Box<dyn Future<Output = Result<(), Problem>>>> {
        Box::pin(async move {
            let ticket = admit(&self.world.keys, &text, path, self.unix())?;
            match self.way(&ticket, entrance) {
                Way::Here => self.take(who, &ticket, end),
                Way::ToOwner => {
                    let (through, owner) = (end.through(), ticket.owner.clone());
                    self.forward(who, path, text, owner, end).await?;
                    // Until this edge ends.
                    self.spawn(async move {
                        let _through: Through<LegMessage> = through;
                        pending::<()>().await;
                    });
                    Ok(())
                }
                Way::Nowhere => Err(Problem::new(ProblemKind::OwnerGone, "")),
            }
        })
    }

    /// The real decision, or less than that.
    fn way(&self, ticket: &Ticket, entrance: Entrance) -> Way {
        match self.world.sabotage {
            Sabotage::Ownership => Way::Here,
            Sabotage::Incarnation => {
                let here = Owner { incarnation: ticket.owner.incarnation, ..self.owner.clone() };
                way(&ticket.owner, &here, entrance)
            }
            Sabotage::None | Sabotage::Deadline | Sabotage::Restore => {
                way(&ticket.owner, &self.owner, entrance)
            }
        }
    }

    fn take(self: &Rc<Self>, who: Who, ticket: &Ticket, end: End<LegMessage>) -> Result<(), Problem> {
        let (now, unix) = (self.world.sim.now(), self.unix());
        let place = self.pairing.take(ticket, now, unix, MAX_STREAMS)?;
        let in_use = self.world.taken(&self.owner, ticket.stream, ticket.role);
        let leg = Leg { who, role: ticket.role, end, _in_use: in_use };
        let edge = Rc::clone(self);
        // Its WebSocket opens once the answer has been written.
        let opens = delay(&self.world.sim);
        self.spawn(async move {
            edge.world.sim.sleep(opens).await;
            edge.run_leg(place, leg).await;
        });
        Ok(())
    }

    async fn forward(
        &self,
        who: Who,
        path: LegPath,
        text: String,
        owner: Owner,
        end: End<LegMessage>,
    ) -> Result<(), Problem> {
        let world = &self.world;
        let unreachable = || Problem::new(ProblemKind::Unavailable, "");
        let opened = async {
            let host = world.host_of(&owner.address);
            if world.sim.timeout(Duration::from_secs(2), world.trip(self.host, host)).await != Some(true) {
                return Err(unreachable());
            }
            // Whoever answers there: its certificate proves that it is an edge, and it looks at the ticket itself.
            let there = match world.process_at(&owner.address) {
                Some(Process::Edge(there)) => Ok(there),
                Some(Process::Control(_)) => Err(unreachable()),
                None => Err(Problem::new(ProblemKind::OwnerGone, "")),
            };
            let opened = match there {
                Ok(there) => there.open(who, path, text, Entrance::Internal, end).await,
                Err(problem) => Err(problem),
            };
            if world.trip(host, self.host).await { opened } else { Err(unreachable()) }
        };
        world.truth.counts.borrow_mut().forwarded += 1;
        world.sim.timeout(Duration::from_secs(5), opened).await.unwrap_or_else(|| Err(unreachable()))
    }

    async fn run_leg(self: Rc<Self>, mut place: Place<Leg>, leg: Leg) {
        let sim = &self.world.sim;
        let (mut leg, mut other) = match place.ready(leg, sim.now()) {
            Next::HandedOver => return,
            Next::Ended(leg, _) => return leg.end.send(LegMessage::Close),
            Next::Wait(leg, other) => (leg, other),
        };
        let (first, second) = loop {
            tokio::select! {
                biased;
                handed_over = &mut other => match handed_over {
                    Ok(other) => break (leg, other),
                    Err(_) => return leg.end.send(LegMessage::Close),
                },
                _ = place.ended() => {
                    leg.end.send(LegMessage::Close);
                    place.told();
                    return;
                }
                () = sim.sleep(LOOK) => {}
            }
            if leg.end.is_over() {
                if place.leave() {
                    return;
                }
                match other.await {
                    Ok(other) => break (leg, other),
                    Err(_) => return,
                }
            }
        };
        let (service, device) = match first.role {
            Role::Service => (first, second),
            Role::Device => (second, first),
        };
        leg = service;
        self.run_stream(place, leg, device).await;
    }

    async fn run_stream(self: Rc<Self>, place: Place<Leg>, service: Leg, device: Leg) {
        self.world.joined(&self.owner, place.facts.stream, [service.who, device.who]);
        self.spawn(Rc::clone(&self).announce(Arc::clone(&place.facts)));
        let ended = |message: Option<LegMessage>, role| match message {
            Some(LegMessage::Close) => CloseReason::closed_by(role),
            None => CloseReason::lost(role),
        };
        let reason = tokio::select! {
            biased;
            reason = poll_fn(|cx| place.poll_ended(cx)) => reason,
            message = service.end.receive() => ended(message, Role::Service),
            message = device.end.receive() => ended(message, Role::Device),
        };
        let reason = place.conclude(reason);
        for leg in [&service, &device] {
            leg.end.send(LegMessage::Close);
        }
        drop((service, device));
        let announced = place.facts.milestones.wait_for(Milestone::Announced);
        let _ = self.world.sim.timeout(STORE_LIMIT, announced).await;
        self.report(&place.facts, reason).await;
        place.told();
    }

    async fn announce(self: Rc<Self>, facts: Arc<StreamFacts>) {
        let joined = StreamState::Joined { joined: self.unix() };
        let known = match self.ask(self.store.advance_stream(facts.stream, joined)).await {
            Some(Ok(None)) if self.announcements.borrow().unknown(self.world.sim.now()) => {
                self.restore(&[Arc::clone(&facts)]).await
            }
            Some(Ok(_)) => true,
            Some(Err(_)) | None => false,
        };
        if !known {
            self.announcements.borrow_mut().failed();
        }
        facts.milestones.reach(Milestone::Announced);
    }

    async fn restore(&self, streams: &[Arc<StreamFacts>]) -> bool {
        if self.world.sabotage == Sabotage::Restore {
            return true;
        }
        let records: Vec<_> = streams.iter().map(|facts| self.record(facts)).collect();
        matches!(self.ask(self.store.restore_streams(&records)).await, Some(Ok(())))
    }

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

    async fn report(&self, facts: &StreamFacts, reason: CloseReason) {
        self.world.sim.say(|| format!("{} ends {}: {reason}", self.owner.name, facts.stream));
        let end = StreamState::Ended(StreamEnd::unused(reason, self.unix()));
        let told = self.ask(self.store.advance_stream(facts.stream, end.clone())).await;
        if !matches!(told, Some(Ok(_))) {
            self.store.keep_untold(facts.stream, end);
        }
        facts.milestones.reach(Milestone::Reported);
    }

    /// Ends a stream, and returns once its legs have been told.
    pub(crate) async fn end_stream(&self, stream: StreamId, reason: CloseReason) {
        let now = self.world.sim.now();
        let done = match self.pairing.end(stream, reason, now, now + HANDSHAKE_MAX) {
            PairingEnd::BySplice(facts) => Some((facts, Milestone::Told)),
            PairingEnd::Here { facts, waiting } => {
                self.report(&facts, reason).await;
                waiting.then_some((facts, Milestone::Told))
            }
            PairingEnd::Already(facts) => facts.map(|facts| (facts, Milestone::Reported)),
            PairingEnd::Unseen => None,
        };
        if let Some((facts, milestone)) = done {
            let _ = self.world.sim.timeout(END_LIMIT, facts.milestones.wait_for(milestone)).await;
        }
    }

    async fn sweep(self: Rc<Self>) {
        loop {
            self.world.sim.sleep(SWEEP).await;
            let mut late = self.pairing.sweep(self.world.sim.now());
            late.sort_by_key(|(facts, _)| facts.stream);
            for (facts, reason) in late {
                self.report(&facts, reason).await;
            }
        }
    }

    async fn keep_lease(self: Rc<Self>) {
        loop {
            let (half_open, joined) = self.pairing.counts();
            let (load, accepts) = (half_open + joined, !self.draining.get());
            let (role, owner) = (ServerRole::Edge, self.owner.clone());
            let lease = Lease { role, owner, accepts, load: load as u64, passed: None };
            if let Some(renewal) = self.world.renew(self.host, &self.store, &lease, STORE_LIMIT).await {
                let owed = self.announcements.borrow_mut().renewed(renewal, self.world.sim.now());
                if owed {
                    self.announcements.borrow_mut().restored();
                    if !self.restore(&sorted(self.pairing.joined())).await {
                        self.announcements.borrow_mut().failed();
                    }
                }
            }
            let renewal = self.world.sim.now() + self.world.timing.renewal;
            while self.world.sim.now() < renewal && !(accepts && self.draining.get()) {
                self.world.sim.sleep(Duration::from_millis(500)).await;
            }
        }
    }

    async fn tell_untold(self: Rc<Self>) {
        loop {
            self.world.sim.sleep(Duration::from_millis(500)).await;
            if self.store.has_untold() {
                let store = Arc::clone(&self.store);
                let _ = self
                    .ask(async move {
                        store.tell_untold();
                        Ok::<(), StoreError>(())
                    })
                    .await;
            }
        }
    }

    /// Ends what it has, within `grace`, and then itself. Not one of its own tasks.
    pub(crate) async fn drain(self: Rc<Self>, grace: Duration) {
        let sim = self.world.sim.clone();
        sim.say(|| format!("{} drains", self.owner.name));
        self.draining.set(true);
        let idle = async {
            while self.pairing.counts() != (0, 0) {
                sim.sleep(Duration::from_millis(100)).await;
            }
        };
        if sim.timeout(grace, idle).await.is_none() {
            for facts in sorted(self.pairing.live()) {
                let edge = Rc::clone(&self);
                self.spawn(async move { edge.end_stream(facts.stream, CloseReason::Draining).await });
            }
            sim.sleep(Duration::from_secs(1)).await;
        }
        let _ = self.ask(self.store.withdraw(ServerRole::Edge, &self.owner)).await;
        sim.say(|| format!("{} has drained", self.owner.name));
        self.world.kill(&Process::Edge(Rc::clone(&self)));
    }

    /// Looks whether something is left that should be over.
    pub(crate) fn check_nothing_half_open(&self) {
        let (half_open, _) = self.pairing.counts();
        if half_open > 0 {
            self.world.broken(Rule::HandshakeEnds, || {
                format!("{} has {half_open} half-open streams", self.owner.name)
            });
        }
    }

    async fn ask<T>(
        &self,
        step: impl Future<Output = Result<T, StoreError>>,
    ) -> Option<Result<T, StoreError>> {
        self.world.sim.timeout(STORE_LIMIT, self.world.ask_store(self.host, step)).await
    }
}

/// In an order that does not depend on a hash map's.
pub(crate) fn sorted(mut facts: Vec<Arc<StreamFacts>>) -> Vec<Arc<StreamFacts>> {
    facts.sort_by_key(|facts| facts.stream);
    facts
}
