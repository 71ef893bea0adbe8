//! What all parts of one run share, and what is true in it.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    future::Future,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt as _;
use midspan_core::{
    id::{DeviceAddress, Incarnation, Role, StreamId},
    key::Key,
    ticket::{Owner, TicketKeys},
};
use midspan_platform::rendezvous::{Lease, Renewal, ServerRole, StoreError, StoreFailure, Timing};

use crate::{
    control::Control,
    edge::Edge,
    executor::{Life, Sim},
    network::{Host, Network, delay},
    run::Counts,
    store::{SimClient, SimStore},
};

/// From the request for a stream until its legs are joined.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(15);

/// The host of the store.
pub(crate) const STORE: Host = 0;

/// One run.
pub(crate) struct World {
    pub(crate) sim: Sim,
    pub(crate) network: Network,
    pub(crate) store: Arc<SimStore>,
    pub(crate) keys: TicketKeys,
    pub(crate) timing: Timing,
    pub(crate) sabotage: Sabotage,
    /// How much longer the store takes now.
    pub(crate) slowness: Cell<Duration>,
    pub(crate) truth: Truth,
    processes: RefCell<BTreeMap<String, Process>>,
    hosts: RefCell<BTreeMap<String, Host>>,
}

/// What is taken out, to show that it is missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sabotage {
    /// Nothing.
    None,
    /// An edge takes each leg with a good ticket.
    Ownership,
    /// An edge takes the legs of an earlier life.
    Incarnation,
    /// An edge never ends a handshake.
    Deadline,
    /// An edge does not announce its streams again.
    Restore,
}

/// A rule that holds in every run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// No two edges join one stream, and none joins it twice.
    OneOwner,
    /// A ticket is in use once at a time.
    TicketOnce,
    /// A leg is taken by the life of an edge that its ticket names.
    NamedOwner,
    /// A joined stream's legs are those of its service and its device.
    RightLegs,
    /// Every handshake ends in its time, with an answer.
    HandshakeEnds,
    /// The lists say what is.
    Lists,
    /// A device with a link is not told to be offline.
    Online,
}

/// A process of the relay.
#[derive(Clone)]
pub(crate) enum Process {
    Control(Rc<Control>),
    Edge(Rc<Edge>),
}

/// What is so, whoever knows of it.
#[derive(Default)]
pub(crate) struct Truth {
    streams: RefCell<BTreeMap<StreamId, Story>>,
    pub(crate) counts: RefCell<Counts>,
    /// The rule that was broken.
    pub(crate) broken: Cell<Option<Rule>>,
    /// Who waits for an answer.
    asking: Rc<RefCell<BTreeSet<u64>>>,
}

/// A service that waits for an answer, until it is dropped.
pub(crate) struct Asked {
    asking: Rc<RefCell<BTreeSet<u64>>>,
    number: u64,
}

struct Story {
    owner: Incarnation,
    service: u64,
    device: usize,
    joined: Option<Incarnation>,
    in_use: [u32; 2],
}

/// Somebody's leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Service(u64),
    Device(usize),
}

/// A ticket in use, until it is dropped.
pub(crate) struct InUse {
    world: Rc<World>,
    stream: StreamId,
    role: Role,
}

impl Truth {
    pub(crate) fn asked(&self, number: u64) -> Asked {
        self.asking.borrow_mut().insert(number);
        Asked { asking: Rc::clone(&self.asking), number }
    }

    pub(crate) fn who_asks(&self) -> Option<u64> {
        self.asking.borrow().first().copied()
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.asking.borrow_mut().remove(&self.number);
    }
}

impl Process {
    pub(crate) fn role(&self) -> ServerRole {
        match self {
            Self::Control(_) => ServerRole::Control,
            Self::Edge(_) => ServerRole::Edge,
        }
    }

    pub(crate) fn owner(&self) -> &Owner {
        match self {
            Self::Control(control) => &control.replica,
            Self::Edge(edge) => &edge.owner,
        }
    }

    pub(crate) fn life(&self) -> Life {
        match self {
            Self::Control(control) => control.life,
            Self::Edge(edge) => edge.life,
        }
    }
}

impl World {
    pub(crate) fn new(sim: Sim, sabotage: Sabotage) -> Rc<Self> {
        let timing = Timing::default();
        let store = SimStore::new(timing, sim.clock());
        let keys = TicketKeys::new(&Key::from_bytes(vec![7; 32]).unwrap(), None).unwrap();
        Rc::new(Self {
            sim,
            network: Network::default(),
            store,
            keys,
            timing,
            sabotage,
            slowness: Cell::default(),
            truth: Truth::default(),
            processes: RefCell::default(),
            hosts: RefCell::default(),
        })
    }

    /// A rule is broken. Where something was taken out, only the rule counts that is to miss it.
    pub(crate) fn broken(&self, rule: Rule, what: impl FnOnce() -> String) {
        let missed = match self.sabotage {
            Sabotage::None => true,
            Sabotage::Ownership => rule == Rule::OneOwner,
            Sabotage::Incarnation => rule == Rule::NamedOwner,
            Sabotage::Deadline => rule == Rule::HandshakeEnds,
            Sabotage::Restore => rule == Rule::Lists,
        };
        if missed && self.truth.broken.get().is_none() {
            self.truth.broken.set(Some(rule));
            self.sim.fail(|| format!("{rule:?}: {}", what()));
        }
    }

    /// A process listens at its address.
    pub(crate) fn listen(&self, process: Process, host: Host) {
        let address = process.owner().address.clone();
        self.hosts.borrow_mut().insert(address.clone(), host);
        self.processes.borrow_mut().insert(address, process);
    }

    /// A process ends, and with it all that it did.
    pub(crate) fn kill(&self, process: &Process) {
        let address = &process.owner().address;
        // Another life may have begun there.
        let listens = self.process_at(address).is_some_and(|there| there.life() == process.life());
        let ended = listens.then(|| self.processes.borrow_mut().remove(address));
        self.sim.end(process.life());
        drop(ended);
    }

    /// Ends everything, so that nothing is left of the run.
    pub(crate) fn clear(&self) {
        self.sim.clear();
        let processes = self.processes.take();
        drop(processes);
    }

    pub(crate) fn process_at(&self, address: &str) -> Option<Process> {
        self.processes.borrow().get(address).cloned()
    }

    pub(crate) fn host_of(&self, address: &str) -> Host {
        self.hosts.borrow().get(address).copied().unwrap_or_default()
    }

    pub(crate) fn controls(&self) -> Vec<Rc<Control>> {
        let processes = self.processes.borrow();
        let controls = processes.values().filter_map(|process| match process {
            Process::Control(control) => Some(Rc::clone(control)),
            Process::Edge(_) => None,
        });
        controls.collect()
    }

    pub(crate) fn edges(&self) -> Vec<Rc<Edge>> {
        let processes = self.processes.borrow();
        let edges = processes.values().filter_map(|process| match process {
            Process::Control(_) => None,
            Process::Edge(edge) => Some(Rc::clone(edge)),
        });
        edges.collect()
    }

    /// One step of the store, as `host` asks for it. Nothing was done when it did not get there.
    pub(crate) async fn ask_store<T, E: From<StoreError>>(
        &self,
        host: Host,
        step: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        if !self.trip(host, STORE).await {
            return Err(StoreError::new(StoreFailure::Unreachable, "cut off").into());
        }
        let slowness = self.slowness.get();
        if !slowness.is_zero() {
            self.sim.sleep(self.sim.time(Duration::ZERO, slowness)).await;
        }
        let answer = step.now_or_never().unwrap();
        self.sim.sleep(delay(&self.sim)).await;
        answer
    }

    /// Renews a lease; nothing when no answer comes in time. What came of it is seen where the answer arrives, not before.
    pub(crate) async fn renew(
        &self,
        host: Host,
        store: &SimClient,
        lease: &Lease,
        limit: Duration,
    ) -> Option<Renewal> {
        let began = store.renews(lease);
        let step = async { store.take_renewal(lease) };
        let look = self.sim.timeout(limit, self.ask_store(host, step)).await?.ok()?;
        Some(store.renewed(lease, look, began))
    }

    /// A stream is asked for.
    pub(crate) fn created(&self, stream: StreamId, owner: &Owner, service: u64, device: usize) {
        let story = Story { owner: owner.incarnation, service, device, joined: None, in_use: [0; 2] };
        self.truth.streams.borrow_mut().insert(stream, story);
    }

    /// An edge has taken a leg.
    pub(crate) fn taken(self: &Rc<Self>, edge: &Owner, stream: StreamId, role: Role) -> InUse {
        let mut streams = self.truth.streams.borrow_mut();
        let story = streams.get_mut(&stream).unwrap();
        let in_use = &mut story.in_use[role as usize];
        *in_use += 1;
        if *in_use > 1 {
            self.broken(Rule::TicketOnce, || {
                format!("the {role} ticket of {stream} is in use {in_use} times")
            });
        }
        if story.owner != edge.incarnation {
            self.broken(Rule::NamedOwner, || {
                format!("{} took a leg of {stream}, which it does not own", edge.name)
            });
        }
        InUse { world: Rc::clone(self), stream, role }
    }

    /// An edge has joined a stream.
    pub(crate) fn joined(&self, edge: &Owner, stream: StreamId, legs: [Who; 2]) {
        let mut streams = self.truth.streams.borrow_mut();
        let story = streams.get_mut(&stream).unwrap();
        if legs != [Who::Service(story.service), Who::Device(story.device)] {
            self.broken(Rule::RightLegs, || format!("{stream} has the legs {legs:?}"));
        }
        if let Some(other) = story.joined.replace(edge.incarnation) {
            self.broken(Rule::OneOwner, || {
                format!("{stream} was joined by {other}, and now by {} {}", edge.name, edge.incarnation)
            });
        }
        self.truth.counts.borrow_mut().joined += 1;
        self.sim.say(|| format!("{} joins {stream}", edge.name));
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if let Some(story) = self.world.truth.streams.borrow_mut().get_mut(&self.stream) {
            story.in_use[self.role as usize] -= 1;
        }
    }
}

/// The address of the device with this number.
pub(crate) fn device(number: usize) -> DeviceAddress {
    format!("dev{number}").parse().unwrap()
}
