//! Devices and services.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    time::Duration,
};

use midspan_core::{
    admission::Entrance,
    capability::Capabilities,
    close::CloseReason,
    id::{RequestId, Role, StreamId},
    link::{FromDevice, GoodbyeReason, Invitation},
    path::LegPath,
    problem::{Problem, ProblemKind},
};
use secrecy::{ExposeSecret as _, SecretString};

use crate::{
    control::{Grant, LinkMessage},
    edge::LegMessage,
    executor::Life,
    network::{End, Host, connect},
    world::{Process, Rule, Who, World},
};

/// A device, which keeps a link to the relay.
pub(crate) struct Device {
    world: Rc<World>,
    life: Life,
    host: Host,
    number: usize,
    /// Counts its links; the last one is the one that it means.
    links: Cell<u64>,
    /// Since when its newest link stands, where it does.
    pub(crate) standing: Cell<Option<u64>>,
    answers: RefCell<BTreeMap<RequestId, bool>>,
    /// Whether it takes each stream at once from here on.
    pub(crate) willing: Cell<bool>,
}

impl Device {
    pub(crate) fn start(world: &Rc<World>, host: Host, number: usize) -> Rc<Self> {
        let device = Rc::new(Self {
            world: Rc::clone(world),
            life: world.sim.life(),
            host,
            number,
            links: Cell::new(0),
            standing: Cell::new(None),
            answers: RefCell::default(),
            willing: Cell::new(false),
        });
        world.sim.spawn(device.life, Rc::clone(&device).keep_linked());
        device
    }

    /// Switches it off.
    pub(crate) fn stop(&self) {
        self.world.sim.say(|| format!("dev{} is switched off", self.number));
        self.world.sim.end(self.life);
        self.standing.set(None);
    }

    async fn keep_linked(self: Rc<Self>) {
        let sim = &self.world.sim;
        loop {
            let link = self.links.get() + 1;
            self.links.set(link);
            let stay_away = match self.dial().await {
                Some(end) => {
                    self.standing.set(Some(sim.micros()));
                    let stay_away = self.serve(&end, link).await;
                    self.standing.set(None);
                    if stay_away == Some(GoodbyeReason::Draining) {
                        // The old link lives on until the relay closes it.
                        let device = Rc::clone(&self);
                        sim.spawn(self.life, async move {
                            _ = device.serve(&end, link).await;
                        });
                        continue;
                    }
                    stay_away
                }
                None => None,
            };
            if stay_away == Some(GoodbyeReason::Replaced) {
                sim.say(|| format!("dev{} was told that its newest link is replaced", self.number));
                self.world.truth.counts.borrow_mut().outrun += 1;
            }
            sim.sleep(sim.time(Duration::from_millis(200), Duration::from_millis(1500))).await;
        }
    }

    /// Opens a link to a replica that the balancer picks.
    async fn dial(&self) -> Option<End<LinkMessage>> {
        let world = &self.world;
        let controls: Vec<_> = world.controls().into_iter().filter(|control| control.accepts()).collect();
        let control = controls.get(world.sim.below(controls.len().max(1)))?;
        let reached = world.sim.timeout(Duration::from_secs(2), world.trip(self.host, control.host)).await;
        let address = control.replica.address.clone();
        let there = world.process_at(&address).filter(|process| process.life() == control.life);
        let (Some(true), Some(Process::Control(control))) = (reached, there) else { return None };
        let (here, there) = connect(world, [self.host, control.host]);
        world.sim.spawn(control.life, Rc::clone(&control).run_link(self.number, there));
        Some(here)
    }

    /// Serves a link to its end; gives the relay's reason, if there is one.
    async fn serve(self: &Rc<Self>, end: &End<LinkMessage>, link: u64) -> Option<GoodbyeReason> {
        loop {
            match end.receive().await {
                Some(LinkMessage::Ask(invitation)) => {
                    if let Some(answer) = self.answer(&invitation) {
                        self.world.sim.sleep(self.pause()).await;
                        end.send(LinkMessage::Answer(answer));
                    }
                }
                Some(LinkMessage::Goodbye(reason)) => {
                    return (link == self.links.get()).then_some(reason);
                }
                Some(LinkMessage::Answer(_)) => {}
                None => return None,
            }
        }
    }

    fn pause(&self) -> Duration {
        let longest = if self.world.sim.chance(10) { 4000 } else { 20 };
        self.world.sim.time(Duration::ZERO, Duration::from_millis(longest))
    }

    /// The same question has the same answer. One that is accepted brings a leg, or two.
    fn answer(self: &Rc<Self>, invitation: &Invitation) -> Option<FromDevice> {
        let sim = &self.world.sim;
        let request = invitation.request;
        let known = self.answers.borrow().get(&request).copied();
        let willing = self.willing.get();
        if known.is_none() && !willing && sim.chance(5) {
            return None;
        }
        let accepts = known.unwrap_or_else(|| willing || sim.chance(92));
        self.answers.borrow_mut().insert(request, accepts);
        if !accepts {
            return Some(FromDevice::Reject { request, reason: String::new() });
        }
        if known.is_none() {
            for _ in 0..dials(&self.world) {
                let (device, stream, ticket) =
                    (Rc::clone(self), invitation.stream, invitation.ticket.clone());
                let begins = self.pause();
                sim.spawn(self.life, async move {
                    device.world.sim.sleep(begins).await;
                    let leg = Dial {
                        who: Who::Device(device.number),
                        host: device.host,
                        stream,
                        role: Role::Device,
                    };
                    leg.run(&device.world, &ticket).await;
                });
            }
        }
        Some(FromDevice::Accept { request, capabilities: Capabilities::none() })
    }
}

/// How often a leg is dialled: now and then a client is not sure whether it has.
fn dials(world: &World) -> usize {
    if world.sim.chance(15) { 2 } else { 1 }
}

/// A leg as its client sees it.
struct Dial {
    who: Who,
    host: Host,
    stream: StreamId,
    role: Role,
}

impl Dial {
    /// Opens the leg, keeps it for a while, and closes it.
    async fn run(&self, world: &Rc<World>, ticket: &SecretString) {
        let sim = &world.sim;
        for _ in 0..4 {
            match self.open(world, ticket).await {
                Ok(end) => {
                    // Some streams last to the end of the run.
                    let lasts = self.stream.as_u128().is_multiple_of(3);
                    let stays = if lasts {
                        Duration::from_secs(600)
                    } else {
                        sim.time(Duration::ZERO, Duration::from_secs(20))
                    };
                    match sim.timeout(stays, end.receive()).await {
                        None if sim.chance(70) => {
                            end.send(LegMessage::Close);
                            let _ = sim.timeout(Duration::from_secs(5), end.receive()).await;
                            return;
                        }
                        // Its network is gone; sometimes it thinks that it was never there.
                        None | Some(None) if sim.chance(50) => drop(end),
                        _ => return,
                    }
                }
                Err(problem) => {
                    sim.say(|| {
                        format!("the {} leg of {} is refused: {}", self.role, self.stream, problem.title)
                    });
                    if problem.status != 503 {
                        return;
                    }
                }
            }
            sim.sleep(sim.time(Duration::from_millis(50), Duration::from_secs(1))).await;
        }
    }

    async fn open(&self, world: &Rc<World>, ticket: &SecretString) -> Result<End<LegMessage>, Problem> {
        let broken = || Problem::new(ProblemKind::Unavailable, "the connection broke");
        let opened = async {
            let edges = world.edges();
            let edge = edges.get(world.sim.below(edges.len().max(1))).ok_or_else(broken)?;
            if !world.trip(self.host, edge.host).await {
                return Err(broken());
            }
            let there = world.process_at(&edge.owner.address);
            let Some(Process::Edge(edge)) = there.filter(|there| there.life() == edge.life) else {
                return Err(broken());
            };
            let (here, there) = connect(world, [self.host, edge.host]);
            let path = LegPath { stream: self.stream, role: self.role };
            let (answer, host) = (tokio::sync::oneshot::channel(), edge.host);
            let text = ticket.expose_secret().to_owned();
            let (life, who) = (edge.life, self.who);
            world.sim.spawn(life, async move {
                let opened = edge.open(who, path, text, Entrance::Public, there).await;
                drop(answer.0.send(opened));
            });
            answer.1.await.unwrap_or_else(|_| Err(broken()))?;
            if world.trip(host, self.host).await { Ok(here) } else { Err(broken()) }
        };
        let opened = world.sim.timeout(Duration::from_secs(8), opened).await;
        opened.unwrap_or_else(|| Err(broken()))
    }
}

/// One service that wants one stream.
pub(crate) async fn service(world: Rc<World>, host: Host, number: u64, device: usize) {
    let patience = world.sim.chance(8).then(|| world.sim.time(Duration::ZERO, Duration::from_secs(6)));
    let connect_seconds = world.sim.below(11) as u64;
    let Some(Ok(grant)) = ask(&world, host, number, device, connect_seconds, patience).await else { return };
    if world.sim.chance(5) {
        return;
    }
    let dial = || async {
        let leg = Dial { who: Who::Service(number), host, stream: grant.stream, role: Role::Service };
        world.sim.sleep(world.sim.time(Duration::ZERO, Duration::from_millis(100))).await;
        leg.run(&world, &grant.ticket).await;
    };
    match dials(&world) {
        1 => dial().await,
        _ => drop(tokio::join!(biased; dial(), dial())),
    }
}

/// Asks any replica for a stream. `None` when there is no answer because the replica has ended, or nobody waits for it.
pub(crate) async fn ask(
    world: &Rc<World>,
    host: Host,
    number: u64,
    device: usize,
    connect_seconds: u64,
    patience: Option<Duration>,
) -> Option<Result<Grant, Problem>> {
    let controls: Vec<_> = world.controls().into_iter().filter(|control| control.accepts()).collect();
    let control = Rc::clone(controls.get(world.sim.below(controls.len().max(1)))?);
    if !world.trip(host, control.host).await {
        return None;
    }
    let there = world.process_at(&control.replica.address);
    there.filter(|there| there.life() == control.life)?;
    let (tell, told) = tokio::sync::oneshot::channel();
    let (life, asked) = (control.life, world.truth.asked(number));
    world.sim.spawn(life, async move {
        // Goes with the process.
        let _asked = asked;
        drop(tell.send(control.open_stream(number, device, connect_seconds, patience).await));
    });
    let answer = told.await.ok().flatten()?;
    let mut counts = world.truth.counts.borrow_mut();
    match &answer {
        Ok(_) => counts.granted += 1,
        Err(_) => counts.refused += 1,
    }
    Some(answer)
}

/// Whether a device with a link is found, from any replica.
pub(crate) async fn probe(world: Rc<World>, host: Host, number: u64, device: Rc<Device>) {
    let standing = device.standing.get();
    device.willing.set(true);
    let answer = ask(&world, host, number, device.number, 0, None).await;
    let settled = |since: u64| since + 3_000_000 < world.sim.micros() && device.standing.get() == Some(since);
    if let (Some(since), Some(Err(problem))) = (standing, answer)
        && settled(since)
    {
        let offline = problem.close_reason() == Some(CloseReason::DeviceOffline);
        world.broken(Rule::Online, || {
            format!(
                "dev{} has a link, and is told to be {}: {}",
                device.number,
                if offline { "offline" } else { "unreachable" },
                problem.title
            )
        });
    }
}
