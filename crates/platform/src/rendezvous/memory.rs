//! The rendezvous store of a single process.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use midspan_core::{
    close::CloseReason,
    id::{DeviceAddress, Incarnation, StreamId},
    record::{StreamEnd, StreamRecord, StreamState},
    ticket::Owner,
};

use super::{
    CreateError, Lease, Leases, LinkRecord, LinkUp, Rendezvous, Renewal, ServerRole, StoreError,
    StreamLimits, Timing, settling::Settling,
};
use crate::clock;

/// Records in the memory of one process; they end with it.
#[derive(Debug, Default)]
pub struct MemoryRendezvous {
    timing: Timing,
    records: Mutex<Records>,
}

#[derive(Debug, Default)]
struct Records {
    streams: BTreeMap<StreamId, Stream>,
    count_by_device: HashMap<DeviceAddress, u64>,
    count_by_service: HashMap<String, u64>,
    lease_by_owner: BTreeMap<(ServerRole, Incarnation), (Lease, Instant)>,
    settling: Settling,
    links: BTreeMap<DeviceAddress, LinkRecord>,
    waiting_by_device: HashMap<DeviceAddress, Vec<(Owner, Instant)>>,
    last_generation: u64,
}

#[derive(Debug)]
struct Stream {
    record: StreamRecord,
    /// When a handshake is over, or an ended stream forgotten; nothing for a joined one.
    due: Instant,
}

impl MemoryRendezvous {
    /// An empty store.
    pub fn new(timing: Timing) -> Self {
        Self { timing, records: Mutex::default() }
    }

    /// The store of a process that is alone: nobody can have been there before it, so nobody is waited for.
    pub fn alone(timing: Timing) -> Self {
        let store = Self::new(timing);
        store.records().settling = Settling::over(clock::now());
        store
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Rendezvous for MemoryRendezvous {
    async fn create_stream(
        &self,
        record: StreamRecord,
        limits: StreamLimits,
    ) -> Result<Option<LinkRecord>, CreateError> {
        let due = clock::now() + self.timing.given_up_after(&record);
        let mut records = self.records();
        if records.count_by_device.get(&record.address).is_some_and(|count| *count >= limits.per_device) {
            return Err(CreateError::device_limit(&record, limits));
        }
        if records.count_by_service.get(&record.credential).is_some_and(|count| *count >= limits.per_service)
        {
            return Err(CreateError::service_limit(&record, limits));
        }
        if records.count_by_service.values().sum::<u64>() >= limits.per_relay {
            return Err(CreateError::relay_limit(limits));
        }
        let link = records.links.get(&record.address).cloned();
        records.insert(record, due);
        Ok(link)
    }

    async fn advance_stream(
        &self,
        stream: StreamId,
        next: StreamState,
    ) -> Result<Option<StreamRecord>, StoreError> {
        Ok(self.records().advance(stream, next, clock::now() + self.timing.remember))
    }

    async fn stream(&self, stream: StreamId) -> Result<Option<StreamRecord>, StoreError> {
        Ok(self.records().streams.get(&stream).map(|stream| stream.record.clone()))
    }

    async fn streams(&self, after: Option<StreamId>, limit: usize) -> Result<Vec<StreamRecord>, StoreError> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let records = self.records();
        let behind = records.streams.range((from, Bound::Unbounded)).map(|(_, stream)| &stream.record);
        Ok(behind.filter(|record| !record.is_ended()).take(limit).cloned().collect())
    }

    async fn restore_streams(&self, streams: &[StreamRecord]) -> Result<(), StoreError> {
        let now = clock::now();
        let mut records = self.records();
        for record in streams {
            let thought_lost = records.streams.get(&record.stream).is_some_and(|known| {
                matches!(&known.record.state, StreamState::Ended(end) if end.reason == CloseReason::EdgeLost)
            });
            if thought_lost {
                records.streams.remove(&record.stream);
            }
            if records.streams.contains_key(&record.stream) {
                records.advance(record.stream, record.state.clone(), now + self.timing.remember);
            } else if !record.is_ended() {
                records.insert(record.clone(), now + self.timing.given_up_after(record));
            }
        }
        Ok(())
    }

    async fn expire(&self) -> Result<Vec<StreamRecord>, StoreError> {
        let (now, unix) = (clock::now(), clock::unix());
        let mut records = self.records();
        let settled = records.settling.is_over_since(&self.timing, now, self.timing.lease);
        let lost = |records: &Records, role, owner: &Owner| {
            let lease = records.lease_by_owner.get(&(role, owner.incarnation));
            settled && lease.is_none_or(|(_, renewed)| now.duration_since(*renewed) > self.timing.lease)
        };
        let reason = |stream: &Stream| match stream.record.state {
            StreamState::Ended(_) => None,
            _ if lost(&records, ServerRole::Edge, &stream.record.owner) => Some(CloseReason::EdgeLost),
            StreamState::Joined { .. } => None,
            StreamState::Requested | StreamState::Accepted => {
                (now > stream.due).then_some(CloseReason::BothLegsMissing)
            }
        };
        let over: Vec<_> =
            records.streams.iter().filter_map(|(id, stream)| Some((*id, reason(stream)?))).collect();
        let gone =
            records.links.iter().filter(|(_, link)| lost(&records, ServerRole::Control, &link.replica));
        let gone: Vec<_> = gone.map(|(device, _)| device.clone()).collect();
        let forget = now + self.timing.remember;
        let ended = over.into_iter().filter_map(|(stream, reason)| {
            records.advance(stream, StreamState::Ended(StreamEnd::unused(reason, unix)), forget)
        });
        let ended = ended.collect();
        records.streams.retain(|_, stream| !stream.record.is_ended() || now < stream.due);
        records.links.retain(|device, _| !gone.contains(device));
        records.waiting_by_device.retain(|_, waiting| waiting.iter().any(|(_, until)| now < *until));
        records
            .lease_by_owner
            .retain(|_, (_, renewed)| now.duration_since(*renewed) <= self.timing.lease * 10);
        Ok(ended)
    }

    async fn renew(&self, lease: &Lease) -> Result<Renewal, StoreError> {
        let now = clock::now();
        let mut records = self.records();
        records.settling.renewed(&self.timing, now);
        let key = (lease.role, lease.owner.incarnation);
        let before = records.lease_by_owner.insert(key, (lease.clone(), now));
        let lapsed = before.is_some_and(|(_, renewed)| now.duration_since(renewed) > self.timing.lease);
        Ok(Renewal { forgotten: lapsed })
    }

    async fn withdraw(&self, role: ServerRole, owner: &Owner) -> Result<(), StoreError> {
        self.records().lease_by_owner.remove(&(role, owner.incarnation));
        Ok(())
    }

    async fn leases(&self, role: ServerRole) -> Result<Leases, StoreError> {
        let now = clock::now();
        let records = self.records();
        let alive = records.lease_by_owner.values().filter(|(lease, renewed)| {
            lease.role == role && now.duration_since(*renewed) <= self.timing.lease
        });
        let mut alive: Vec<_> = alive.map(|(lease, _)| lease.clone()).collect();
        alive.sort_by(|a, b| a.owner.name.cmp(&b.owner.name));
        Ok(Leases { alive, settled: records.settling.is_over(&self.timing, now) })
    }

    async fn link_up(&self, device: &DeviceAddress, replica: &Owner) -> Result<LinkUp, StoreError> {
        let now = clock::now();
        let mut records = self.records();
        // Generations also grow over restarts, as long as the clock does.
        let generation = (records.last_generation + 1).max(clock::unix_milliseconds());
        records.last_generation = generation;
        let link = LinkRecord { replica: replica.clone(), generation, since: clock::unix() };
        let replaced = records.links.insert(device.clone(), link);
        let waiting = records.waiting_by_device.get(device).into_iter().flatten();
        let waiting = waiting.filter(|(_, until)| now < *until).map(|(replica, _)| replica.clone()).collect();
        Ok(LinkUp { generation, replaced, waiting })
    }

    async fn link_down(&self, device: &DeviceAddress, generation: u64) -> Result<(), StoreError> {
        let mut records = self.records();
        if records.links.get(device).is_some_and(|link| link.generation == generation) {
            records.links.remove(device);
        }
        Ok(())
    }

    async fn link(&self, device: &DeviceAddress) -> Result<Option<LinkRecord>, StoreError> {
        Ok(self.records().links.get(device).cloned())
    }

    async fn await_link(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        wait: Duration,
    ) -> Result<Option<LinkRecord>, StoreError> {
        let now = clock::now();
        let mut records = self.records();
        let waiting = records.waiting_by_device.entry(device.clone()).or_default();
        let earlier = waiting.iter().find(|(known, _)| known == replica).map(|(_, until)| *until);
        waiting.retain(|(known, until)| known != replica && now < *until);
        waiting.push((replica.clone(), earlier.unwrap_or(now).max(now + wait)));
        Ok(records.links.get(device).cloned())
    }

    async fn links(
        &self,
        after: Option<&DeviceAddress>,
        limit: usize,
    ) -> Result<Vec<(DeviceAddress, LinkRecord)>, StoreError> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let records = self.records();
        let links = records.links.range::<DeviceAddress, _>((from, Bound::Unbounded));
        Ok(links.take(limit).map(|(device, link)| (device.clone(), link.clone())).collect())
    }

    async fn restore_links(
        &self,
        links: &[(DeviceAddress, LinkRecord)],
    ) -> Result<Vec<DeviceAddress>, StoreError> {
        let mut records = self.records();
        let mut outdated = Vec::new();
        for (device, link) in links {
            records.last_generation = records.last_generation.max(link.generation);
            match records.links.get(device) {
                Some(known) if known.generation > link.generation => outdated.push(device.clone()),
                _ => drop(records.links.insert(device.clone(), link.clone())),
            }
        }
        Ok(outdated)
    }
}

impl Records {
    fn insert(&mut self, record: StreamRecord, due: Instant) {
        *self.count_by_device.entry(record.address.clone()).or_default() += 1;
        *self.count_by_service.entry(record.credential.clone()).or_default() += 1;
        self.streams.insert(record.stream, Stream { record, due });
    }

    /// Moves a stream on. One that ends is forgotten at `forget`.
    fn advance(&mut self, stream: StreamId, next: StreamState, forget: Instant) -> Option<StreamRecord> {
        let stream = self.streams.get_mut(&stream)?;
        if !stream.record.advance(next) {
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
}

fn take_one<Name: std::hash::Hash + Eq>(counts: &mut HashMap<Name, u64>, name: &Name) {
    if let Some(count) = counts.get_mut(name) {
        *count -= 1;
        if *count == 0 {
            counts.remove(name);
        }
    }
}
