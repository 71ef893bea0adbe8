//! What a store knows, as a value: the time comes in with each step.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    time::{Duration, Instant},
};

use midspan_core::{
    close::CloseReason,
    id::{DeviceAddress, Incarnation, StreamId},
    record::{StreamEnd, StreamRecord, StreamState},
    ticket::Owner,
    time::UnixTime,
};

use super::{
    CreateError, Lease, Leases, LinkRecord, LinkUp, Renewal, ServerRole, StreamLimits, Timing,
    settling::Settling,
};

/// The records of a store in memory. What each step does is said at `Rendezvous`; none of them waits or fails.
#[derive(Debug, Clone, Default)]
pub struct Records {
    timing: Timing,
    streams: BTreeMap<StreamId, Stream>,
    /// Streams that ended and were not known, and until when they are remembered: nobody brings them up again.
    ended_unknown: BTreeMap<StreamId, Instant>,
    count_by_device: HashMap<DeviceAddress, u64>,
    count_by_service: HashMap<String, u64>,
    lease_by_owner: BTreeMap<(ServerRole, Incarnation), (Lease, Instant)>,
    settling: Settling,
    links: BTreeMap<DeviceAddress, LinkRecord>,
    waiting_by_device: HashMap<DeviceAddress, Vec<(Owner, Instant)>>,
    last_generation: u64,
}

/// What time it is, by the clock that never goes back and by the one on the wall.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// For what takes so long.
    pub now: Instant,
    /// Milliseconds since 1970-01-01 UTC.
    pub unix_milliseconds: u64,
}

#[derive(Debug, Clone)]
struct Stream {
    record: StreamRecord,
    /// When a handshake is over, or an ended stream forgotten; nothing for a joined one.
    due: Instant,
}

impl Moment {
    fn unix(self) -> UnixTime {
        UnixTime(self.unix_milliseconds / 1000)
    }
}

impl Records {
    /// Nothing is known yet.
    pub fn new(timing: Timing) -> Self {
        Self { timing, ..Self::default() }
    }

    /// The records of a process that is alone: nobody can have been there before it, so nobody is waited for.
    pub(super) fn alone(timing: Timing, now: Instant) -> Self {
        Self { settling: Settling::over(now), ..Self::new(timing) }
    }

    /// Records a new stream.
    pub fn create_stream(
        &mut self,
        record: StreamRecord,
        limits: StreamLimits,
        at: Moment,
    ) -> Result<Option<LinkRecord>, CreateError> {
        if self.count_by_device.get(&record.address).is_some_and(|count| *count >= limits.per_device) {
            return Err(CreateError::device_limit(&record, limits));
        }
        if self.count_by_service.get(&record.credential).is_some_and(|count| *count >= limits.per_service) {
            return Err(CreateError::service_limit(&record, limits));
        }
        if self.count_by_service.values().sum::<u64>() >= limits.per_relay {
            return Err(CreateError::relay_limit(limits));
        }
        let link = self.links.get(&record.address).cloned();
        let due = at.now + self.timing.given_up_after(&record);
        self.insert(record, due);
        Ok(link)
    }

    /// Moves a stream on.
    pub fn advance_stream(
        &mut self,
        stream: StreamId,
        next: StreamState,
        at: Moment,
    ) -> Option<StreamRecord> {
        let forget = at.now + self.timing.remember;
        let Some(stream) = self.streams.get_mut(&stream) else {
            if matches!(next, StreamState::Ended(_)) {
                self.ended_unknown.insert(stream, forget);
            }
            return None;
        };
        let was_ended = stream.record.is_ended();
        if !stream.record.advance(next) || was_ended {
            return None;
        }
        let record = stream.record.clone();
        if record.is_ended() {
            stream.due = forget;
            take_one(&mut self.count_by_device, &record.address);
            take_one(&mut self.count_by_service, &record.credential);
        }
        Some(record)
    }

    /// One stream.
    pub fn stream(&self, stream: StreamId) -> Option<StreamRecord> {
        self.streams.get(&stream).map(|stream| stream.record.clone())
    }

    /// A page of the streams that are not over.
    pub fn streams(&self, after: Option<StreamId>, limit: usize) -> Vec<StreamRecord> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let behind = self.streams.range((from, Bound::Unbounded)).map(|(_, stream)| &stream.record);
        behind.filter(|record| !record.is_ended()).take(limit).cloned().collect()
    }

    /// Takes streams up that may have been forgotten.
    pub fn restore_streams(&mut self, streams: &[StreamRecord], at: Moment) {
        for record in streams {
            if self.streams.get(&record.stream).is_some_and(|known| known.record.is_thought_lost()) {
                self.streams.remove(&record.stream);
            }
            if self.streams.contains_key(&record.stream) {
                self.advance_stream(record.stream, record.state.clone(), at);
            } else if !record.is_ended() && !self.ended_unknown.contains_key(&record.stream) {
                self.insert(record.clone(), at.now + self.timing.given_up_after(record));
            }
        }
    }

    /// Ends what nobody else has ended.
    pub fn expire(&mut self, at: Moment) -> Vec<StreamRecord> {
        let now = at.now;
        let settled = self.settling.is_over_since(&self.timing, now, self.timing.lease);
        let lost = |role, owner: &Owner| {
            let lease = self.lease_by_owner.get(&(role, owner.incarnation));
            settled && lease.is_none_or(|(_, renewed)| now.duration_since(*renewed) > self.timing.lease)
        };
        let reason = |stream: &Stream| match stream.record.state {
            StreamState::Ended(_) => None,
            _ if lost(ServerRole::Edge, &stream.record.owner) => Some(CloseReason::EdgeLost),
            StreamState::Joined { .. } => None,
            StreamState::Requested | StreamState::Accepted => {
                // Who has joined it may only not have come round yet.
                (settled && now > stream.due).then_some(CloseReason::BothLegsMissing)
            }
        };
        let over: Vec<_> =
            self.streams.iter().filter_map(|(id, stream)| Some((*id, reason(stream)?))).collect();
        let gone = self.links.iter().filter(|(_, link)| lost(ServerRole::Control, &link.replica));
        let gone: Vec<_> = gone.map(|(device, _)| device.clone()).collect();
        let ended = over.into_iter().filter_map(|(stream, reason)| {
            self.advance_stream(stream, StreamState::Ended(StreamEnd::unused(reason, at.unix())), at)
        });
        let ended = ended.collect();
        self.streams.retain(|_, stream| !stream.record.is_ended() || now < stream.due);
        self.ended_unknown.retain(|_, until| now < *until);
        self.links.retain(|device, _| !gone.contains(device));
        self.waiting_by_device.retain(|_, waiting| waiting.iter().any(|(_, until)| now < *until));
        let kept = self.timing.lease * 10;
        self.lease_by_owner.retain(|_, (_, renewed)| now.duration_since(*renewed) <= kept);
        ended
    }

    /// Renews a lease.
    pub fn renew(&mut self, lease: &Lease, at: Moment) -> Renewal {
        self.settling.renewed(&self.timing, at.now);
        let key = (lease.role, lease.owner.incarnation);
        let before = self.lease_by_owner.insert(key, (lease.clone(), at.now));
        let lapsed = before.is_some_and(|(_, renewed)| self.is_over(renewed, at.now));
        Renewal { forgotten: lapsed }
    }

    /// Takes a lease back.
    pub fn withdraw(&mut self, role: ServerRole, owner: &Owner) {
        self.lease_by_owner.remove(&(role, owner.incarnation));
    }

    /// The leases of a role.
    pub fn leases(&self, role: ServerRole, at: Moment) -> Leases {
        let alive = self
            .lease_by_owner
            .values()
            .filter(|(lease, renewed)| lease.role == role && !self.is_over(*renewed, at.now));
        let mut alive: Vec<_> = alive.collect();
        alive.sort_by_key(|&(lease, renewed)| (&lease.owner.name, *renewed));
        let alive = alive.into_iter().map(|(lease, _)| lease.clone()).collect();
        Leases { alive, settled: self.settling.is_over(&self.timing, at.now) }
    }

    /// Takes up a device's new link.
    pub fn link_up(&mut self, device: &DeviceAddress, replica: &Owner, at: Moment) -> LinkUp {
        // Generations also grow over restarts, as long as the clock does.
        let generation = (self.last_generation + 1).max(at.unix_milliseconds);
        self.last_generation = generation;
        let link = LinkRecord { replica: replica.clone(), generation, since: at.unix() };
        let replaced = self.links.insert(device.clone(), link);
        let waiting = self.waiting_by_device.get(device).into_iter().flatten();
        let waiting =
            waiting.filter(|(_, until)| at.now < *until).map(|(replica, _)| replica.clone()).collect();
        LinkUp { generation, replaced, waiting }
    }

    /// Takes up a link that began while the store could not be told.
    pub fn link_up_late(
        &mut self,
        device: &DeviceAddress,
        replica: &Owner,
        assumed: u64,
        at: Moment,
    ) -> Option<LinkUp> {
        let known = self.links.get(device);
        let is_outdated = known.is_some_and(|known| {
            known.generation > assumed && known.replica.incarnation != replica.incarnation
        });
        (!is_outdated).then(|| self.link_up(device, replica, at))
    }

    /// Forgets a link, unless there is a newer one, or one to another replica.
    pub fn link_down(&mut self, device: &DeviceAddress, replica: &Owner, generation: u64) {
        let gone = |link: &LinkRecord| {
            link.replica.incarnation == replica.incarnation && link.generation <= generation
        };
        if self.links.get(device).is_some_and(gone) {
            self.links.remove(device);
        }
    }

    /// The link of a device.
    pub fn link(&self, device: &DeviceAddress) -> Option<LinkRecord> {
        self.links.get(device).cloned()
    }

    /// Registers who waits for a device, and looks for its link.
    pub fn await_link(
        &mut self,
        device: &DeviceAddress,
        replica: &Owner,
        wait: Duration,
        at: Moment,
    ) -> Option<LinkRecord> {
        let now = at.now;
        let waiting = self.waiting_by_device.entry(device.clone()).or_default();
        let earlier = waiting.iter().find(|(known, _)| known == replica).map(|(_, until)| *until);
        waiting.retain(|(known, until)| known != replica && now < *until);
        waiting.push((replica.clone(), earlier.unwrap_or(now).max(now + wait)));
        self.link(device)
    }

    /// A page of the linked devices.
    pub fn links(&self, after: Option<&DeviceAddress>, limit: usize) -> Vec<(DeviceAddress, LinkRecord)> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let links = self.links.range::<DeviceAddress, _>((from, Bound::Unbounded));
        links.take(limit).map(|(device, link)| (device.clone(), link.clone())).collect()
    }

    /// Takes links up that may have been forgotten.
    pub fn restore_links(&mut self, links: &[(DeviceAddress, LinkRecord)]) -> Vec<DeviceAddress> {
        let mut outdated = Vec::new();
        for (device, link) in links {
            self.last_generation = self.last_generation.max(link.generation);
            match self.links.get(device) {
                Some(known) if known.generation > link.generation => outdated.push(device.clone()),
                _ => drop(self.links.insert(device.clone(), link.clone())),
            }
        }
        outdated
    }

    fn insert(&mut self, record: StreamRecord, due: Instant) {
        *self.count_by_device.entry(record.address.clone()).or_default() += 1;
        *self.count_by_service.entry(record.credential.clone()).or_default() += 1;
        self.streams.insert(record.stream, Stream { record, due });
    }

    fn is_over(&self, renewed: Instant, now: Instant) -> bool {
        now.duration_since(renewed) > self.timing.lease
    }
}

fn take_one<Name: std::hash::Hash + Eq>(counts: &mut HashMap<Name, u64>, name: &Name) {
    if let Some(count) = counts.get_mut(name) {
        *count -= 1;
        if *count == 0 {
            counts.remove(name);
        }
    }
}
