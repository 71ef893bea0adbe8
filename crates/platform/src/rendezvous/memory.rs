//! The rendezvous store of a single process.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use midspan_core::{
    close::CloseReason,
    id::{DeviceAddress, StreamId},
    limit::{LimitName, LimitReached},
    record::{StreamEnd, StreamRecord, StreamState},
    time::UnixTime,
};

use super::{
    CreateError, EXPIRY_SLACK_SECONDS, EdgeLease, LEASE_SECONDS, LinkRecord, REMEMBER_SECONDS, Rendezvous,
    StoreError, StreamLimits,
};

/// Records in the memory of one process; they end with it.
#[derive(Debug, Default)]
pub struct MemoryRendezvous {
    records: Mutex<Records>,
}

#[derive(Debug, Default)]
struct Records {
    streams: BTreeMap<StreamId, StreamRecord>,
    count_by_device: HashMap<DeviceAddress, u64>,
    count_by_service: HashMap<String, u64>,
    edge_by_name: BTreeMap<String, (EdgeLease, UnixTime)>,
    links: BTreeMap<DeviceAddress, LinkRecord>,
    last_generation: u64,
}

impl MemoryRendezvous {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Rendezvous for MemoryRendezvous {
    async fn create_stream(&self, record: StreamRecord, limits: StreamLimits) -> Result<(), CreateError> {
        let mut records = self.records();
        let of_device = records.count_by_device.get(&record.address).copied().unwrap_or_default();
        let of_service = records.count_by_service.get(&record.credential).copied().unwrap_or_default();
        let reached = |name, value, scope| {
            // Streams end when they end: there is no better guess than soon.
            Err(CreateError::Limit(LimitReached { name, value, scope, retry_after_seconds: 1 }))
        };
        if of_device >= limits.per_device {
            let scope = format!("device {}", record.address);
            return reached(LimitName::StreamsPerDevice, limits.per_device, scope);
        }
        if of_service >= limits.per_service {
            let scope = format!("service {}", record.credential);
            return reached(LimitName::StreamsPerService, limits.per_service, scope);
        }
        records.count_by_device.insert(record.address.clone(), of_device + 1);
        records.count_by_service.insert(record.credential.clone(), of_service + 1);
        records.streams.insert(record.stream, record);
        Ok(())
    }

    async fn advance_stream(
        &self,
        stream: StreamId,
        next: StreamState,
    ) -> Result<Option<StreamRecord>, StoreError> {
        Ok(self.records().advance(stream, next))
    }

    async fn stream(&self, stream: StreamId) -> Result<Option<StreamRecord>, StoreError> {
        Ok(self.records().streams.get(&stream).cloned())
    }

    async fn streams(&self, after: Option<StreamId>, limit: usize) -> Result<Vec<StreamRecord>, StoreError> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let records = self.records();
        let live = records.streams.range((from, Bound::Unbounded)).filter(|(_, record)| !record.is_ended());
        Ok(live.take(limit).map(|(_, record)| record.clone()).collect())
    }

    async fn expire(&self, now: UnixTime) -> Result<Vec<StreamRecord>, StoreError> {
        let mut records = self.records();
        let late = |record: &&StreamRecord| {
            let open = matches!(record.state, StreamState::Requested | StreamState::Accepted);
            open && now.since(record.expires).as_secs() > EXPIRY_SLACK_SECONDS
        };
        let late: Vec<_> = records.streams.values().filter(late).map(|record| record.stream).collect();
        let end = StreamState::Ended(StreamEnd::unused(CloseReason::BothLegsMissing, now));
        let ended = late.into_iter().filter_map(|stream| records.advance(stream, end.clone())).collect();
        records.streams.retain(|_, record| match &record.state {
            StreamState::Ended(end) => now.since(end.ended).as_secs() < REMEMBER_SECONDS,
            StreamState::Requested | StreamState::Accepted | StreamState::Joined { .. } => true,
        });
        Ok(ended)
    }

    async fn renew_edge(&self, lease: EdgeLease, now: UnixTime) -> Result<(), StoreError> {
        self.records().edge_by_name.insert(lease.owner.name.clone(), (lease, now));
        Ok(())
    }

    async fn edges(&self, now: UnixTime) -> Result<Vec<EdgeLease>, StoreError> {
        let records = self.records();
        let alive = records.edge_by_name.values().filter(|(_, at)| now.since(*at).as_secs() <= LEASE_SECONDS);
        Ok(alive.map(|(lease, _)| lease.clone()).collect())
    }

    async fn link_up(&self, device: &DeviceAddress, now: UnixTime) -> Result<u64, StoreError> {
        let mut records = self.records();
        // Generations also grow over restarts, as long as the clock does.
        let generation = (records.last_generation + 1).max(now.0);
        records.last_generation = generation;
        records.links.insert(device.clone(), LinkRecord { generation, since: now });
        Ok(generation)
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
}

impl Records {
    fn advance(&mut self, stream: StreamId, next: StreamState) -> Option<StreamRecord> {
        let record = self.streams.get_mut(&stream)?;
        if !record.advance(next) {
            return None;
        }
        let record = record.clone();
        if record.is_ended() {
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
