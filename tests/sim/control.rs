//! A control replica: the real links, view and search, with the network and the store of the simulation around them.

use std::{
    cell::{Cell, RefCell},
    future::{Future, pending},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use midspan_control::{
    device::links::{Held, InviteError, Links, Order, Question, Registration},
    handshake::search::{Search, Step, Times, verdict},
    view::{Presence, View},
};
use midspan_core::{
    api::{HANDSHAKE_MAX, Timeouts, answer_by},
    capability::Capabilities,
    close::CloseReason,
    id::{DeviceAddress, RequestId, Role, StreamId},
    internal::Outcome,
    link::{FromDevice, GoodbyeReason, Invitation, Metadata},
    problem::{Problem, ProblemKind},
    record::{self, StreamEnd, StreamRecord, StreamState},
    ticket::{Owner, Ticket},
    time::UnixTime,
    trace::TraceParent,
};
use midspan_platform::{
    internal::CallError,
    rendezvous::{
        CreateError, Ends, Lease, LinkRecord, LinkUp, Rendezvous as _, ServerRole, StoreError, StreamLimits,
    },
};
use secrecy::SecretString;

use crate::{
    executor::Life,
    network::{End, Host},
    store::SimClient,
    world::{HANDSHAKE, Process, Rule, World, device},
};

/// How long the store may take for one step.
const STORE_LIMIT: Duration = Duration::from_secs(3);

/// How much longer a call may take than the device whose answer it brings.
const CALL_SLACK: Duration = Duration::from_secs(1);

/// How long news of a link may take, and an owner to end a stream.
const NEWS_LIMIT: Duration = Duration::from_secs(2);
const END_LIMIT: Duration = Duration::from_secs(10);

/// How long a link that was told to go may take.
const FAREWELL: Duration = Duration::from_secs(5);
const MOVE_LIMIT: Duration = Duration::from_secs(10);

const LIMITS: StreamLimits = StreamLimits { per_device: 1000, per_service: 1000, per_relay: 1000 };

/// What a replica and a device tell each other over a link.
pub(crate) enum LinkMessage {
    Ask(Invitation),
    Goodbye(GoodbyeReason),
    Answer(FromDevice),
}

/// What a service hears.
pub(crate) struct Grant {
    pub(crate) stream: StreamId,
    pub(crate) ticket: SecretString,
}

pub(crate) struct Control {
    pub(crate) world: Rc<World>,
    pub(crate) life: Life,
    pub(crate) host: Host,
    pub(crate) replica: Owner,
    skew: i64,
    pub(crate) links: Links,
    view: RefCell<Arc<View>>,
    store: Arc<SimClient>,
    renewed: Cell<bool>,
    forgotten: Cell<bool>,
    ended_links: RefCell<Ends<(DeviceAddress, Option<u64>)>>,
    draining: Cell<bool>,
}

struct Attempt {
    control: Rc<Control>,
    address: DeviceAddress,
    stream: StreamId,
    expires: UnixTime,
    owner: Option<Owner>,
    asked: bool,
    started: Instant,
}

/// Why a link ends.
enum Ended {
    Gone,
    Goodbye(GoodbyeReason),
    Moved,
}

impl Control {
    pub(crate) fn start(world: &Rc<World>, host: Host, replica: Owner, skew: i64) -> Rc<Self> {
        let control = Rc::new(Self {
            world: Rc::clone(world),
            life: world.sim.life(),
            host,
            replica,
            skew,
            links: Links::default(),
            view: RefCell::new(Arc::new(View::empty(world.sim.now()))),
            store: world.store.client(),
            renewed: Cell::new(false),
            forgotten: Cell::new(false),
            ended_links: RefCell::default(),
            draining: Cell::new(false),
        });
        world.sim.say(|| format!("{} starts as {}", control.replica.name, control.replica.incarnation));
        world.listen(Process::Control(Rc::clone(&control)), host);
        control.spawn(Rc::clone(&control).keep_lease());
        control.spawn(Rc::clone(&control).announce_links());
        control.spawn(Rc::clone(&control).sweep());
        control.spawn(Rc::clone(&control).tell_untold());
        control
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.world.sim.spawn(self.life, task);
    }

    fn unix(&self) -> UnixTime {
        self.world.sim.unix(self.skew)
    }

    fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    async fn look(&self) -> Result<Arc<View>, Problem> {
        let (edges, replicas) = tokio::join!(
            biased;
            self.ask(self.store.leases(ServerRole::Edge)),
            self.ask(self.store.leases(ServerRole::Control))
        );
        let (edges, replicas) = (edges.map_err(away)?, replicas.map_err(away)?);
        let view = Arc::new(View::new(edges, replicas, self.world.sim.now(), &self.view()));
        *self.view.borrow_mut() = Arc::clone(&view);
        Ok(view)
    }

    /// Whether this replica can be sent new devices and services.
    pub(crate) fn accepts(&self) -> bool {
        !self.draining.get()
    }

    /// Asks a device for a stream. `None` when the service gives up before there is an answer.
    pub(crate) async fn open_stream(
        self: Rc<Self>,
        service: u64,
        number: usize,
        connect_seconds: u64,
        patience: Option<Duration>,
    ) -> Option<Result<Grant, Problem>> {
        let sim = &self.world.sim;
        let stream = StreamId::from_random(sim.bits());
        sim.say(|| format!("service {service} asks {} for dev{number}: {stream}", self.replica.name));
        let mut attempt = Attempt {
            address: device(number),
            stream,
            expires: self.unix().plus(HANDSHAKE),
            owner: None,
            asked: false,
            started: sim.now(),
            control: Rc::clone(&self),
        };
        let run = attempt.run(service, number, connect_seconds);
        let result = match patience {
            Some(patience) => sim.timeout(patience, run).await,
            None => Some(run.await),
        };
        let took = sim.now() - attempt.started;
        // The last look, the last question and the record may each take their time.
        if took > answer_by(HANDSHAKE) + STORE_LIMIT * 2 + CALL_SLACK {
            self.world.broken(Rule::HandshakeEnds, || format!("{stream} was answered after {took:?}"));
        }
        let reason = match &result {
            Some(Ok(_)) => return result,
            Some(Err(problem)) => problem.close_reason().unwrap_or(CloseReason::RelayFailed),
            None => CloseReason::ServiceGaveUp,
        };
        let ended = attempt.end(reason);
        if result.is_some() {
            ended.await;
        } else {
            self.spawn(ended);
        }
        result
    }

    /// Asks a device over its link here.
    async fn put(&self, question: &mut Question, address: &DeviceAddress, invitation: Invitation) -> Outcome {
        let within = Duration::from_millis(invitation.answer_within_ms).min(HANDSHAKE_MAX);
        let gone = match self.links.invite(address, invitation) {
            Ok(gone) => gone,
            Err(InviteError::Offline) => return Outcome::NoLink,
            Err(InviteError::QueueFull) => return Outcome::QueueFull,
        };
        tokio::select! {
            biased;
            answer = question.answer() => answer.unwrap_or(Outcome::NoLink),
            () = gone.cancelled() => Outcome::NoLink,
            () = self.world.sim.sleep(within) => Outcome::Silent,
        }
    }

    async fn put_elsewhere(
        &self,
        replica: &Owner,
        address: DeviceAddress,
        invitation: Invitation,
    ) -> Result<Outcome, CallError> {
        let within = Duration::from_millis(invitation.answer_within_ms) + CALL_SLACK;
        let call = self.world.call(self.host, ServerRole::Control, replica, within, move |process| {
            Box::pin(async move {
                let Process::Control(there) = process else { return Outcome::Unknown };
                let mut asked = there.links.ask(invitation.request, &address);
                there.put(&mut asked, &address, invitation).await
            })
        });
        call.await
    }

    fn tell_others(self: &Rc<Self>, address: &DeviceAddress, up: LinkUp) {
        let waiting = up.waiting.into_iter().map(|replica| (replica, None));
        let older = up.replaced.map(|older| (older.replica, Some(up.generation)));
        for (replica, generation) in waiting.chain(older).filter(|(replica, _)| *replica != self.replica) {
            let (control, address) = (Rc::clone(self), address.clone());
            self.spawn(async move {
                let world = &control.world;
                let told =
                    world.call(control.host, ServerRole::Control, &replica, NEWS_LIMIT, move |process| {
                        Box::pin(async move {
                            if let Process::Control(there) = process {
                                match generation {
                                    Some(generation) => there.links.replaced_elsewhere(&address, generation),
                                    None => there.links.online_elsewhere(&address),
                                }
                            }
                        })
                    });
                let _ = told.await;
            });
        }
    }

    /// A device's link, from its upgrade to its end.
    pub(crate) async fn run_link(self: Rc<Self>, number: usize, end: End<LinkMessage>) {
        let address = device(number);
        let mut registration = self.announce_link(&address).await;
        let ended = self.serve_link(&mut registration, &end).await;
        match ended {
            Ended::Gone => registration.withdraw(),
            Ended::Goodbye(reason) => {
                registration.withdraw();
                end.send(LinkMessage::Goodbye(reason));
                let answers_count =
                    matches!(reason, GoodbyeReason::Draining | GoodbyeReason::CredentialExpired);
                self.farewell(&registration, &end, answers_count).await;
            }
            Ended::Moved => {
                registration.unlist();
                self.farewell(&registration, &end, true).await;
                registration.withdraw();
            }
        }
        let generation = registration.generation();
        drop(registration);
        drop(end);
        self.link_down(address, generation).await;
    }

    async fn announce_link(self: &Rc<Self>, address: &DeviceAddress) -> Registration {
        let _turn = self.links.turn(address).lock().await;
        let held = Held::new(self.world.sim.unix_milliseconds(self.skew));
        let registration = self.links.register(address, held);
        let forgets = self.ended_links.borrow().forgets();
        let up = if self.renewed.get() {
            self.ask(self.store.link_up(address, &self.replica)).await.ok()
        } else {
            None
        };
        registration.set_generation(up.as_ref().map(|up| up.generation));
        self.world.sim.say(|| format!("{address} has a link to {}: {up:?}", self.replica.name));
        if let Some(up) = up {
            self.announced(forgets);
            self.tell_others(address, up);
        }
        registration
    }

    async fn serve_link(&self, registration: &mut Registration, end: &End<LinkMessage>) -> Ended {
        let sim = &self.world.sim;
        let mut move_by = None;
        loop {
            let moved = async {
                match move_by {
                    Some(at) => sim.sleep_until(at).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased;
                order = registration.next_order() => match order {
                    Order::Goodbye(GoodbyeReason::Replaced) if move_by.is_some() => return Ended::Moved,
                    Order::Goodbye(reason) => return Ended::Goodbye(reason),
                    Order::Move => {
                        move_by = Some(sim.micros() + u64::try_from(MOVE_LIMIT.as_micros()).unwrap());
                        end.send(LinkMessage::Goodbye(GoodbyeReason::Draining));
                    }
                    Order::Ask(invitation) => end.send(LinkMessage::Ask(invitation)),
                },
                () = moved => return Ended::Moved,
                message = end.receive() => match message {
                    Some(LinkMessage::Answer(answer)) => drop(registration.answer(answer)),
                    Some(_) => {}
                    None => return Ended::Gone,
                }
            }
        }
    }

    /// Answers that are owed still count; then the connection ends.
    async fn farewell(&self, registration: &Registration, end: &End<LinkMessage>, answers_count: bool) {
        let sim = &self.world.sim;
        let farewell = async {
            while answers_count && registration.owes_answers() {
                match sim.timeout(Duration::from_millis(100), end.receive()).await {
                    Some(Some(LinkMessage::Answer(answer))) => drop(registration.answer(answer)),
                    Some(None) => return,
                    Some(Some(_)) | None => {}
                }
            }
        };
        let _ = sim.timeout(FAREWELL, farewell).await;
    }

    async fn link_down(&self, address: DeviceAddress, generation: Option<u64>) {
        let forgets = self.ended_links.borrow().forgets();
        let told = self.renewed.get() && self.take_down(&address, generation).await.is_ok();
        self.world.sim.say(|| {
            format!("{} takes link {generation:?} of {address} down; told: {told}", self.replica.name)
        });
        let (mut ended, end) = (self.ended_links.borrow_mut(), (address, generation));
        if told {
            ended.told(end, forgets, self.world.sim.now());
        } else {
            ended.failed(end);
        }
    }

    fn announced(&self, forgets: u64) {
        if self.ended_links.borrow().forgets() != forgets {
            self.forgotten.set(true);
        }
    }

    async fn take_down(&self, address: &DeviceAddress, generation: Option<u64>) -> Result<(), StoreError> {
        let generation = if generation.is_some() {
            generation
        } else {
            let _turn = self.links.turn(address).lock().await;
            let recorded =
                if self.links.has(address) { None } else { self.ask(self.store.link(address)).await? };
            let here = recorded.filter(|link| link.replica.incarnation == self.replica.incarnation);
            here.map(|link| link.generation)
        };
        match generation {
            Some(generation) => self.ask(self.store.link_down(address, &self.replica, generation)).await,
            None => Ok(()),
        }
    }

    async fn announce(&self, stream: StreamId, next: StreamState) {
        let told = self.ask(self.store.advance_stream(stream, next.clone())).await;
        if told.is_err() && matches!(next, StreamState::Ended(_)) {
            self.store.keep_untold(stream, next);
        }
    }

    async fn keep_lease(self: Rc<Self>) {
        loop {
            let accepts = !self.draining.get();
            let lease = Lease {
                passed: None,
                role: ServerRole::Control,
                owner: self.replica.clone(),
                accepts,
                load: self.links.count() as u64,
            };
            let renewed = self.world.renew(self.host, &self.store, &lease, STORE_LIMIT).await;
            self.renewed.set(renewed.is_some());
            if let Some(renewal) = renewed {
                if renewal.forgotten {
                    self.forgotten.set(true);
                }
                self.ended_links.borrow_mut().renewed(renewal.forgotten, self.world.sim.now());
                let _ = self.look().await;
            }
            let renewal = self.world.sim.now() + self.world.timing.renewal;
            while self.world.sim.now() < renewal && !(accepts && self.draining.get()) {
                self.world.sim.sleep(Duration::from_millis(500)).await;
            }
        }
    }

    async fn announce_links(self: Rc<Self>) {
        loop {
            self.world.sim.sleep(self.world.timing.renewal).await;
            if !self.renewed.get() {
                continue;
            }
            let mut late = self.links.unannounced();
            late.sort_by(|(a, _), (b, _)| a.cmp(b));
            for (address, held) in late {
                if self.announce_late(&address, held).await.is_err() {
                    break;
                }
            }
            if self.forgotten.replace(false) && self.announce_again().await.is_err() {
                self.forgotten.set(true);
            }
            let ended = self.ended_links.borrow_mut().take(usize::MAX);
            for (address, generation) in ended {
                self.link_down(address, generation).await;
            }
        }
    }

    async fn announce_late(self: &Rc<Self>, address: &DeviceAddress, held: Held) -> Result<(), StoreError> {
        let _turn = self.links.turn(address).lock().await;
        if !self.links.holds(address, held) {
            return Ok(());
        }
        let forgets = self.ended_links.borrow().forgets();
        let up = self.ask(self.store.link_up_late(address, &self.replica, held.generation)).await;
        self.world.sim.say(|| format!("{} announces {address} late: {up:?}", self.replica.name));
        match up? {
            Some(up) => {
                self.announced(forgets);
                if !self.links.announced_late(address, held, up.generation) {
                    self.link_down(address.clone(), Some(up.generation)).await;
                }
                self.tell_others(address, up);
            }
            None => self.links.dismiss(address, held, GoodbyeReason::Draining),
        }
        Ok(())
    }

    async fn announce_again(&self) -> Result<(), StoreError> {
        let mut links = self.links.announced();
        links.sort_by(|(a, _), (b, _)| a.cmp(b));
        let record = |(address, held): &(DeviceAddress, Held)| {
            let replica = self.replica.clone();
            (address.clone(), LinkRecord { replica, generation: held.generation, since: held.since })
        };
        let records: Vec<_> = links.iter().map(record).collect();
        let newer = self.ask(self.store.restore_links(&records)).await;
        self.world.sim.say(|| format!("{} announces its links again: {newer:?}", self.replica.name));
        for (address, held) in links.iter().filter(|(address, held)| !self.links.holds(address, *held)) {
            self.link_down(address.clone(), Some(held.generation)).await;
        }
        let newer = newer?;
        for (address, held) in links.iter().filter(|(address, _)| newer.contains(address)) {
            self.links.dismiss(address, *held, GoodbyeReason::Draining);
        }
        Ok(())
    }

    async fn sweep(self: Rc<Self>) {
        loop {
            self.world.sim.sleep(Duration::from_secs(1)).await;
            if let Ok(ended) = self.ask(self.store.expire()).await {
                for record in ended {
                    self.world.sim.say(|| format!("the store ends {}: {:?}", record.stream, record.state));
                }
            }
        }
    }

    async fn tell_untold(self: Rc<Self>) {
        loop {
            self.world.sim.sleep(Duration::from_millis(500)).await;
            if self.store.has_untold() {
                let store = Arc::clone(&self.store);
                let told = async move {
                    store.tell_untold();
                    Ok::<(), StoreError>(())
                };
                let _ = self.ask(told).await;
            }
        }
    }

    /// Lets its devices go, and ends. Not one of its own tasks.
    pub(crate) async fn drain(self: Rc<Self>) {
        let sim = self.world.sim.clone();
        sim.say(|| format!("{} drains", self.replica.name));
        self.draining.set(true);
        let _ = self.look().await;
        if !self.view().loads_beside(&self.replica).is_empty() {
            let moved = async {
                while self.links.count() > 0 {
                    self.links.let_go(usize::MAX);
                    sim.sleep(Duration::from_millis(100)).await;
                }
            };
            let _ = sim.timeout(Duration::from_secs(4), moved).await;
        }
        self.links.dismiss_all(GoodbyeReason::Draining);
        sim.sleep(Duration::from_secs(6)).await;
        let _ = self.ask(self.store.withdraw(ServerRole::Control, &self.replica)).await;
        sim.say(|| format!("{} has drained", self.replica.name));
        self.world.kill(&Process::Control(Rc::clone(&self)));
    }

    async fn ask<T, E: From<StoreError>>(&self, step: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let asked = self.world.sim.timeout(STORE_LIMIT, self.world.ask_store(self.host, step)).await;
        let late = || StoreError::new(midspan_platform::rendezvous::StoreFailure::TimedOut, "");
        asked.unwrap_or_else(|| Err(late().into()))
    }
}

impl Attempt {
    async fn run(&mut self, service: u64, number: usize, connect_seconds: u64) -> Result<Grant, Problem> {
        let control = Rc::clone(&self.control);
        let timeouts = Timeouts::clamp(HANDSHAKE, Some(connect_seconds), Some(5));
        let (owner, link) = self.record(service, number).await?;
        let ticket = Ticket {
            stream: self.stream,
            role: Role::Service,
            owner: owner.clone(),
            address: self.address.clone(),
            name: "ssh".parse().unwrap(),
            credential: "support".to_owned(),
            credential_expires: UnixTime::LAST,
            expires: self.expires,
            trace: TraceParent::new(1, 1),
        };
        self.ask(&ticket, link, timeouts).await?;
        if control.view().presence(ServerRole::Edge, &owner, control.world.sim.now()) == Presence::Gone {
            return Err(Problem::from_close(CloseReason::EdgeLost));
        }
        let (announcer, stream) = (Rc::clone(&control), self.stream);
        control.spawn(async move { announcer.announce(stream, StreamState::Accepted).await });
        Ok(Grant { stream, ticket: control.world.keys.sign(&ticket).unwrap() })
    }

    async fn record(&mut self, service: u64, number: usize) -> Result<(Owner, Option<LinkRecord>), Problem> {
        let control = &self.control;
        let owner = match control.view().owner_of(self.stream) {
            Some(owner) => owner,
            None => control
                .look()
                .await?
                .owner_of(self.stream)
                .ok_or_else(|| Problem::new(ProblemKind::Unavailable, "no edge"))?,
        };
        let record = StreamRecord {
            version: record::VERSION,
            stream: self.stream,
            address: self.address.clone(),
            name: "ssh".parse().unwrap(),
            credential: "support".to_owned(),
            owner: owner.clone(),
            created: control.unix(),
            expires: self.expires,
            state: StreamState::Requested,
        };
        control.world.created(self.stream, &owner, service, number);
        let link = match control.ask(control.store.create_stream(record, LIMITS)).await {
            Ok(link) => link,
            Err(CreateError::Limit(limit)) => return Err(limit.into()),
            Err(CreateError::Store(error)) => return Err(away(error)),
        };
        self.owner = Some(owner.clone());
        Ok((owner, link))
    }

    async fn ask(
        &mut self,
        service_ticket: &Ticket,
        link: Option<LinkRecord>,
        timeouts: Timeouts,
    ) -> Result<Capabilities, Problem> {
        let control = Rc::clone(&self.control);
        let sim = control.world.sim.clone();
        let ticket = Ticket { role: Role::Device, ..service_ticket.clone() };
        let ticket = control.world.keys.sign(&ticket).unwrap();
        let mut arrivals = control.links.arrivals(&self.address);
        let mut question = control.links.ask(RequestId::from_random(sim.bits()), &self.address);
        let times = Times {
            connect: self.started + timeouts.connect,
            response: timeouts.response,
            last: self.started + answer_by(HANDSHAKE),
        };
        let mut search = Search::new(control.replica.clone(), self.address.clone(), link, times);
        loop {
            let step = search.next(control.links.held(&self.address), &control.view(), sim.now());
            self.asked = search.has_asked();
            let (link, outcome) = match step {
                Step::LookAround => {
                    control.look().await?;
                    continue;
                }
                Step::Find(wait) => {
                    let waiting = control.store.await_link(&self.address, &control.replica, wait);
                    search.found(control.ask(waiting).await.map_err(away)?);
                    continue;
                }
                Step::Wait(at_most) => {
                    tokio::select! {
                        biased;
                        answer = question.answer() => return verdict(answer.unwrap_or(Outcome::Unknown)),
                        () = arrivals.next() => {}
                        () = sim.sleep(at_most) => {}
                    }
                    search.waited();
                    continue;
                }
                Step::AskHere(within) => {
                    let invitation = self.invitation(question.request, &ticket, within);
                    (None, Ok(control.put(&mut question, &self.address, invitation).await))
                }
                Step::AskThere(link, within) => {
                    control.links.replaced_elsewhere(&self.address, link.generation);
                    let invitation = self.invitation(question.request, &ticket, within);
                    let outcome = tokio::select! {
                        biased;
                        answer = question.answer() => Ok(answer.unwrap_or(Outcome::Unknown)),
                        outcome = control.put_elsewhere(&link.replica, self.address.clone(), invitation) => outcome,
                        () = arrivals.next_here() => continue,
                    };
                    (Some(link), outcome)
                }
                Step::GiveUp(problem) => return Err(*problem),
            };
            sim.say(|| format!("{} asked for {}: {outcome:?}", control.replica.name, self.stream));
            if let Some(answer) = search.heard(link, outcome, sim.now()) {
                return answer;
            }
            sim.sleep(Duration::ZERO).await;
        }
    }

    fn invitation(&self, request: RequestId, ticket: &SecretString, within: Duration) -> Invitation {
        Invitation {
            request,
            stream: self.stream,
            name: "ssh".parse().unwrap(),
            url: String::new(),
            ticket: ticket.clone(),
            expires: self.expires,
            answer_within_ms: u64::try_from(within.as_millis()).unwrap(),
            capabilities: Capabilities::none(),
            metadata: Metadata::default(),
            traceparent: TraceParent::new(1, 1),
        }
    }

    /// Ends a stream that did not come about.
    async fn end(mut self, reason: CloseReason) {
        let Some(owner) = self.owner.take() else { return };
        let (control, stream) = (&self.control, self.stream);
        control.world.sim.say(|| format!("{} gives {stream} up: {reason}", control.replica.name));
        if self.asked {
            let end = control.world.call(control.host, ServerRole::Edge, &owner, END_LIMIT, move |process| {
                Box::pin(async move {
                    if let Process::Edge(edge) = process {
                        edge.end_stream(stream, reason).await;
                    }
                })
            });
            let _ = end.await;
        }
        let end = StreamState::Ended(StreamEnd::unused(reason, control.unix()));
        control.announce(stream, end).await;
    }
}

fn away(_: StoreError) -> Problem {
    Problem::new(ProblemKind::Unavailable, "the relay's store does not answer; try again")
}
