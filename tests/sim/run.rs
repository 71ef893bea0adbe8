//! One run: who is there, what goes wrong, and what must be so in the end.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    future::Future,
    rc::Rc,
    time::Duration,
};

use midspan_core::{
    id::{Incarnation, StreamId},
    ticket::Owner,
};

use crate::{
    clients::{Device, probe, service},
    control::Control,
    edge::{Edge, sorted},
    executor::{Life, Sim},
    network::Host,
    store::Health,
    world::{Process, Rule, STORE, Sabotage, World, device},
};

/// What came of a run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The rule that was broken.
    pub(crate) broken: Option<Rule>,
    /// How it was.
    pub(crate) failure: Option<String>,
    /// The same for the same run only.
    pub(crate) trace: u64,
    pub(crate) counts: Counts,
}

/// What happened, so that one sees that something did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) granted: u64,
    pub(crate) refused: u64,
    pub(crate) joined: u64,
    pub(crate) forwarded: u64,
    /// Devices that heard that their newest link is not the newest: an older one was announced behind it.
    pub(crate) outrun: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: &Self) {
        self.granted += other.granted;
        self.refused += other.refused;
        self.joined += other.joined;
        self.forwarded += other.forwarded;
        self.outrun += other.outrun;
    }
}

/// When the last fault begins, and when all is well again.
const FAULTS: Duration = Duration::from_secs(12);
const HEALED: Duration = Duration::from_secs(14);

/// After that: until every handshake is over, and what was forgotten is told again.
const SETTLED: Duration = Duration::from_secs(26);

/// What is being told takes no longer.
const TOLD: Duration = Duration::from_secs(3);

const CONTROLS: usize = 3;
const EDGES: usize = 4;
const DEVICES: usize = 2;

const FIRST_CONTROL: Host = 1;
const FIRST_EDGE: Host = 11;
const FIRST_DEVICE: Host = 21;
const FIRST_SERVICE: Host = 31;

struct Run {
    world: Rc<World>,
    /// Who brings the faults.
    fate: Life,
    /// Which address an edge has now: a cluster gives them away again.
    addresses: RefCell<Vec<usize>>,
    skews: Vec<i64>,
}

/// What the store's lists and the processes do not agree about.
#[derive(Default)]
struct Differences {
    streams: BTreeSet<StreamId>,
    links: BTreeMap<usize, String>,
}

/// Runs `seed`.
pub(crate) fn run(seed: u64, sabotage: Sabotage, talks: bool) -> Outcome {
    let sim = Sim::new(seed, talks);
    let world = World::new(sim.clone(), sabotage);
    // Half of the tickets' leeway at the most, so that two clocks are never further apart than that.
    let skews = (0..FIRST_DEVICE).map(|_| i64::try_from(sim.below(4000)).unwrap() - 2000).collect();
    let addresses = RefCell::new((0..EDGES).collect());
    let run = Rc::new(Run { world: Rc::clone(&world), fate: sim.life(), addresses, skews });
    run.play();
    let counts = world.truth.counts.borrow().clone();
    let broken = world.truth.broken.get();
    let outcome = Outcome { broken, failure: sim.failure(), trace: sim.trace(), counts };
    world.clear();
    outcome
}

impl Run {
    fn play(self: &Rc<Self>) {
        let (world, sim) = (&self.world, &self.world.sim);
        for slot in 0..2 + sim.below(CONTROLS - 1) {
            self.start_control(slot);
        }
        for slot in 0..2 + sim.below(EDGES - 1) {
            self.start_edge(slot);
        }
        let devices: Vec<_> =
            (0..DEVICES).map(|number| Device::start(world, FIRST_DEVICE + number, number)).collect();
        if sim.chance(8) {
            let (world, device, begins) =
                (Rc::clone(world), Rc::clone(&devices[1]), sim.time(Duration::ZERO, FAULTS));
            self.later(async move {
                world.sim.sleep(begins).await;
                device.stop();
            });
        }
        for number in 0..3 + sim.below(5) {
            let (world, host, device) = (Rc::clone(world), FIRST_SERVICE + number, sim.below(DEVICES));
            let begins = sim.time(Duration::from_millis(500), FAULTS);
            self.later(async move {
                world.sim.sleep(begins).await;
                service(world, host, number as u64, device).await;
            });
        }
        for _ in 0..sim.below(7) {
            let (run, begins) = (Rc::clone(self), sim.time(Duration::ZERO, FAULTS));
            self.later(async move {
                run.world.sim.sleep(begins).await;
                run.fault().await;
            });
        }
        sim.run_for(HEALED);
        sim.say(|| "all is well again".to_owned());
        world.network.heal();
        world.store.set_health(Health::Well);
        world.slowness.set(Duration::ZERO);
        sim.run_for(SETTLED);
        for slot in 0..EDGES {
            if sim.chance(50) {
                self.start_edge(slot);
            }
        }
        sim.run_for(TOLD);
        self.check_handshakes();
        let before = self.differences();
        for (number, device) in devices.iter().enumerate() {
            let (host, number) = (FIRST_SERVICE + number, 100 + number as u64);
            self.later(probe(Rc::clone(world), host, number, Rc::clone(device)));
        }
        sim.run_for(TOLD);
        if sim.failure().is_none() {
            self.check_lists(&before);
        }
    }

    fn start_control(&self, slot: usize) {
        let owner = self.owner(format!("control-{slot}"), format!("10.0.1.{slot}:8446"));
        if self.world.process_at(&owner.address).is_none() {
            let host = FIRST_CONTROL + slot;
            Control::start(&self.world, host, owner, self.skews[host]);
        }
    }

    /// Starts an edge, unless it is there.
    fn start_edge(&self, slot: usize) {
        if self.edge(slot).is_none() {
            let other = self.world.sim.below(EDGES);
            if other != slot && self.edge(other).is_none() {
                self.addresses.borrow_mut().swap(slot, other);
            }
            let owner = self.owner(format!("edge-{slot}"), self.edge_address(slot));
            let host = FIRST_EDGE + slot;
            Edge::start(&self.world, host, owner, self.skews[host]);
        }
    }

    fn owner(&self, name: String, address: String) -> Owner {
        Owner { name, incarnation: Incarnation::from_random(self.world.sim.bits()), address }
    }

    fn edge_address(&self, slot: usize) -> String {
        format!("10.0.2.{}:8445", self.addresses.borrow()[slot])
    }

    fn edge(&self, slot: usize) -> Option<Rc<Edge>> {
        match self.world.process_at(&self.edge_address(slot)) {
            Some(Process::Edge(edge)) => Some(edge),
            Some(Process::Control(_)) | None => None,
        }
    }

    fn later(self: &Rc<Self>, future: impl Future<Output = ()> + 'static) {
        self.world.sim.spawn(self.fate, future);
    }

    /// Something goes wrong, or only otherwise.
    async fn fault(self: Rc<Self>) {
        let (world, sim) = (&self.world, &self.world.sim);
        let time =
            |least: u64, most: u64| sim.time(Duration::from_millis(least), Duration::from_millis(most));
        match sim.below(13) {
            0 | 1 => {
                let hosts = [
                    STORE,
                    FIRST_CONTROL,
                    FIRST_CONTROL + 1,
                    FIRST_EDGE,
                    FIRST_EDGE + 1,
                    FIRST_EDGE + 2,
                    FIRST_DEVICE,
                ];
                let (a, b) = (hosts[sim.below(hosts.len())], hosts[sim.below(hosts.len())]);
                let until = sim.micros() + u64::try_from(time(300, 8000).as_micros()).unwrap();
                sim.say(|| format!("hosts {a} and {b} are cut off from each other until {until} us"));
                world.network.cut(a, b, until);
            }
            2..=4 => {
                let slot = sim.below(EDGES);
                if let Some(edge) = self.edge(slot) {
                    if sim.chance(65) {
                        sim.say(|| format!("{} is killed", edge.owner.name));
                        world.kill(&Process::Edge(edge));
                    } else {
                        edge.drain(time(0, 5000)).await;
                    }
                    sim.sleep(time(0, 6000)).await;
                }
                self.start_edge(slot);
            }
            5 | 6 => {
                let slot = sim.below(CONTROLS);
                if let Some(process @ Process::Control(_)) = world.process_at(&format!("10.0.1.{slot}:8446"))
                {
                    match &process {
                        Process::Control(control) if sim.chance(35) => Rc::clone(control).drain().await,
                        Process::Control(_) | Process::Edge(_) => {
                            sim.say(|| format!("{} is killed", process.owner().name));
                            world.kill(&process);
                        }
                    }
                    sim.sleep(time(0, 4000)).await;
                }
                self.start_control(slot);
            }
            7 => self.ail(Health::Away, time(200, 9000)).await,
            8 => self.ail(Health::Mute, time(100, 6000)).await,
            9 => self.ail(Health::Still, time(100, 9000)).await,
            10 => {
                let slowness = time(100, 4000);
                sim.say(|| format!("the store takes up to {slowness:?}"));
                world.slowness.set(slowness);
                sim.sleep(time(500, 6000)).await;
                world.slowness.set(Duration::ZERO);
            }
            11 => {
                world.store.cut_off_follower();
                sim.sleep(time(50, 2500)).await;
                self.ail(Health::Away, time(0, 3000)).await;
                sim.say(|| "the store fails over, and loses the last writes".to_owned());
                world.store.fail_over();
            }
            _ => {
                sim.say(|| "the store starts again, empty".to_owned());
                world.store.empty();
            }
        }
    }

    async fn ail(&self, health: Health, time: Duration) {
        let (world, sim) = (&self.world, &self.world.sim);
        sim.say(|| format!("the store is {health:?} for {time:?}"));
        world.store.set_health(health);
        sim.sleep(time).await;
        world.store.set_health(Health::Well);
    }

    fn check_handshakes(&self) {
        for edge in self.world.edges() {
            edge.check_nothing_half_open();
        }
        if let Some(number) = self.world.truth.who_asks() {
            self.world.broken(Rule::HandshakeEnds, || format!("service {number} has no answer"));
        }
        let open = self.world.store.look(|records| {
            let live = records.streams(None, usize::MAX);
            live.into_iter().find(|record| record.state.rank() < 2)
        });
        if let Some(record) = open {
            self.world.broken(Rule::HandshakeEnds, || format!("the record of {} has no end", record.stream));
        }
    }

    fn check_lists(&self, before: &Differences) {
        let now = self.differences();
        if let Some(stream) = now.streams.intersection(&before.streams).next() {
            self.world
                .broken(Rule::Lists, || format!("{stream} is joined and in no list, or the other way round"));
        }
        if let Some((number, what)) =
            now.links.iter().find(|(number, what)| before.links.get(number) == Some(what))
        {
            self.world.broken(Rule::Lists, || format!("dev{number}: {what}"));
        }
    }

    fn differences(&self) -> Differences {
        let mut differences = Differences::default();
        let joined = self.world.edges().into_iter().flat_map(|edge| sorted(edge.pairing.joined()));
        let joined: BTreeSet<_> = joined.map(|facts| facts.stream).collect();
        let listed = self.world.store.look(|records| records.streams(None, usize::MAX));
        let listed: BTreeSet<_> = listed
            .into_iter()
            .filter(|record| record.state.rank() == 2)
            .map(|record| record.stream)
            .collect();
        differences.streams = joined.symmetric_difference(&listed).copied().collect();
        for number in 0..DEVICES {
            let listed = self.world.store.look(|records| records.link(&device(number)));
            let listed = listed.map(|link| (link.replica.incarnation, link.generation));
            let held = self.world.controls().into_iter().filter_map(|control| {
                let (held, _) = control.links.held(&device(number))?;
                Some((control.replica.incarnation, held.generation))
            });
            let newest = held.max_by_key(|(_, generation)| *generation);
            if listed != newest {
                differences
                    .links
                    .insert(number, format!("the store says {listed:?}, the replicas {newest:?}"));
            }
        }
        differences
    }
}
