//! A rendezvous store that can be made to fail: the records of the store in memory, on any clock.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use midspan_core::{
    id::{DeviceAddress, Incarnation, StreamId},
    record::{StreamRecord, StreamState},
    ticket::Owner,
};
use midspan_platform::rendezvous::{
    CreateError, Ends, Lease, Leases, LinkRecord, LinkUp, Look, Moment, Records, Rendezvous, Renewal, Seen,
    ServerRole, StoreError, StoreFailure, StreamLimits, Timing,
};

/// The server.
pub(crate) struct SimStore {
    timing: Timing,
    clock: Box<dyn Fn() -> Moment + Send + Sync>,
    state: Mutex<State>,
}

struct State {
    records: Records,
    /// What a follower knows that is cut off from its master.
    follower: Option<Records>,
    /// Changes when another server answers, or the same one comes back empty.
    server: u64,
    health: Health,
    /// What it was asked while it stood still.
    asked: Vec<Step>,
}

type Step = Box<dyn FnOnce(&mut Records, Moment) + Send>;

/// How the server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    /// Well.
    Well,
    /// Nothing reaches it.
    Away,
    /// It does what it is asked, and its answers are lost.
    Mute,
    /// It does what it is asked when it is well again, and nobody waits for the answers that long.
    Still,
}

/// The server as one process sees it.
pub(crate) struct SimClient {
    store: Arc<SimStore>,
    seen_by_incarnation: Mutex<HashMap<Incarnation, Seen>>,
    ends: Mutex<Ends<(StreamId, StreamState)>>,
}

impl SimStore {
    /// An empty store that goes by `clock`.
    pub(crate) fn new(timing: Timing, clock: impl Fn() -> Moment + Send + Sync + 'static) -> Arc<Self> {
        let (records, health) = (Records::new(timing), Health::Well);
        let state = State { records, follower: None, server: 1, health, asked: Vec::new() };
        Arc::new(Self { timing, clock: Box::new(clock), state: Mutex::new(state) })
    }

    /// The way to it of one process.
    pub(crate) fn client(self: &Arc<Self>) -> Arc<SimClient> {
        let store = Arc::clone(self);
        Arc::new(SimClient { store, seen_by_incarnation: Mutex::default(), ends: Mutex::default() })
    }

    pub(crate) fn set_health(&self, health: Health) {
        let mut state = self.state();
        state.health = health;
        if health == Health::Well {
            let now = (self.clock)();
            for step in std::mem::take(&mut state.asked) {
                step(&mut state.records, now);
            }
        }
    }

    /// From here on, what is written is lost at the next failover.
    pub(crate) fn cut_off_follower(&self) {
        let mut state = self.state();
        state.follower = Some(state.records.clone());
    }

    /// The follower takes over.
    pub(crate) fn fail_over(&self) {
        let mut state = self.state();
        if let Some(records) = state.follower.take() {
            state.asked.clear();
            state.records = records;
            state.server += 1;
        }
    }

    /// It starts again, and knows nothing.
    pub(crate) fn empty(&self) {
        let mut state = self.state();
        state.records = Records::new(self.timing);
        state.follower = None;
        state.asked.clear();
        state.server += 1;
    }

    /// What it knows, for those who look from outside.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Records) -> T) -> T {
        look(&self.state().records)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl SimClient {
    /// Tells the ends that could not be told. The real client does so twice a second.
    pub(crate) fn tell_untold(&self) {
        let untold = self.ends().take(usize::MAX);
        for (stream, end) in untold {
            let _ = self.advance(stream, end);
        }
    }

    pub(crate) fn has_untold(&self) -> bool {
        !self.ends().is_empty()
    }

    /// Keeps an end that did not reach the server.
    pub(crate) fn keep_untold(&self, stream: StreamId, end: StreamState) {
        self.ends().failed((stream, end));
    }

    /// A renewal sets out.
    pub(crate) fn renews(&self, lease: &Lease) -> Instant {
        let began = (self.store.clock)().now;
        self.seen_by_incarnation().entry(lease.owner.incarnation).or_default().renews(began);
        began
    }

    /// What the server does, and answers.
    pub(crate) fn take_renewal(&self, lease: &Lease) -> Result<Look, StoreError> {
        let lease = lease.clone();
        let renewal = self.ask(move |records, now| records.renew(&lease, now))?;
        let server = self.store.state().server.to_string().into();
        Ok(Look { server: Some(server), lapsed: renewal.forgotten, ..Look::default() })
    }

    /// The answer has come.
    pub(crate) fn renewed(&self, lease: &Lease, look: Look, began: Instant) -> Renewal {
        let now = (self.store.clock)().now;
        let mut seen_by_incarnation = self.seen_by_incarnation();
        let seen = seen_by_incarnation.entry(lease.owner.incarnation).or_default();
        let forgotten = seen.renewed(look, self.store.timing.lease, began, now);
        self.ends().renewed(forgotten, now);
        Renewal { forgotten }
    }

    fn seen_by_incarnation(&self) -> MutexGuard<'_, HashMap<Incarnation, Seen>> {
        self.seen_by_incarnation.lock().unwrap()
    }

    fn ends(&self) -> MutexGuard<'_, Ends<(StreamId, StreamState)>> {
        self.ends.lock().unwrap()
    }

    fn advance(&self, stream: StreamId, next: StreamState) -> Result<Option<StreamRecord>, StoreError> {
        let state = next.clone();
        let result = self.ask(move |records, now| records.advance_stream(stream, state, now));
        if matches!(next, StreamState::Ended(_)) {
            match result {
                Ok(_) => {
                    let mut ends = self.ends();
                    let forgets = ends.forgets();
                    ends.told((stream, next), forgets, (self.store.clock)().now);
                }
                Err(_) => self.keep_untold(stream, next),
            }
        }
        result
    }

    fn ask<T>(&self, step: impl FnOnce(&mut Records, Moment) -> T + Send + 'static) -> Result<T, StoreError> {
        let mut state = self.store.state();
        match state.health {
            Health::Away => return Err(StoreError::new(StoreFailure::Unreachable, "it is away")),
            Health::Still => {
                state.asked.push(Box::new(move |records, now| drop(step(records, now))));
                return Err(StoreError::new(StoreFailure::TimedOut, "it stands still"));
            }
            Health::Well | Health::Mute => {}
        }
        let answer = step(&mut state.records, (self.store.clock)());
        match state.health {
            Health::Mute => Err(StoreError::new(StoreFailure::TimedOut, "its answer is lost")),
            Health::Well | Health::Away | Health::Still => Ok(answer),
        }
    }
}

#[async_trait]
impl Rendezvous for SimClient {
    async fn create_stream(
        &self,
        record: StreamRecord,
        limits: StreamLimits,
    ) -> Result<Option<LinkRecord>, CreateError> {
        self.ask(move |records, now| records.create_stream(record, limits, now))?
    }

    async fn advance_stream(
        &self,
        stream: StreamId,
        next: StreamState,
    ) -> Result<Option<StreamRecord>, StoreError> {
        self.advance(stream, next)
    }

    async fn stream(&self, stream: StreamId) -> Result<Option<StreamRecord>, StoreError> {
        self.ask(move |records, _| records.stream(stream))
    }

    async fn streams(&self, after: Option<StreamId>, limit: usize) -> Result<Vec<StreamRecord>, StoreError> {
        self.ask(move |records, _| records.streams(after, limit))
    }

    async fn restore_streams(&self, streams: &[StreamRecord]) -> Result<(), StoreError> {
        let streams = streams.to_vec();
        self.ask(move |records, now| records.restore_streams(&streams, now))
    }

    async fn expire(&self) -> Result<Vec<StreamRecord>, StoreError> {
        self.ask(Records::expire)
    }

    async fn renew(&self, lease: &Lease) -> Result<Renewal, StoreError> {
        let began = self.renews(lease);
        let look = self.take_renewal(lease)?;
        Ok(self.renewed(lease, look, began))
    }

    async fn withdraw(&self, role: ServerRole, owner: &Owner) -> Result<(), StoreError> {
        let owner = owner.clone();
        self.ask(move |records, _| records.withdraw(role, &owner))
    }

    async fn leases(&self, role: ServerRole) -> Result<Leases, StoreError> {
        self.ask(move |records, now| records.leases(role, now))
    }

    async fn link_up(&self, device: &DeviceAddress, replica: &Owner) -> Result<LinkUp, StoreError> {
        let (device, replica) = (device.clone(), replica.clone());
        self.ask(move |records, now| records.link_up(&device, &replica, now))
    }

    async fn link_up_late(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        assumed: u64,
    ) -> Result<Option<LinkUp>, StoreError> {
        let (device, replica) = (device.clone(), replica.clone());
        self.ask(move |records, now| records.link_up_late(&device, &replica, assumed, now))
    }

    async fn link_down(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        generation: u64,
    ) -> Result<(), StoreError> {
        let (device, replica) = (device.clone(), replica.clone());
        self.ask(move |records, _| records.link_down(&device, &replica, generation))
    }

    async fn link(&self, device: &DeviceAddress) -> Result<Option<LinkRecord>, StoreError> {
        let device = device.clone();
        self.ask(move |records, _| records.link(&device))
    }

    async fn await_link(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        wait: Duration,
    ) -> Result<Option<LinkRecord>, StoreError> {
        let (device, replica) = (device.clone(), replica.clone());
        self.ask(move |records, now| records.await_link(&device, &replica, wait, now))
    }

    async fn links(
        &self,
        after: Option<&DeviceAddress>,
        limit: usize,
    ) -> Result<Vec<(DeviceAddress, LinkRecord)>, StoreError> {
        let after = after.cloned();
        self.ask(move |records, _| records.links(after.as_ref(), limit))
    }

    async fn restore_links(
        &self,
        links: &[(DeviceAddress, LinkRecord)],
    ) -> Result<Vec<DeviceAddress>, StoreError> {
        let links = links.to_vec();
        self.ask(move |records, _| records.restore_links(&links))
    }
}
