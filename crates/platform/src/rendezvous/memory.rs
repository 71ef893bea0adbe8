//! The rendezvous store of a single process.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use midspan_core::{
    id::{DeviceAddress, StreamId},
    record::{StreamRecord, StreamState},
    ticket::Owner,
};

use super::{
    CreateError, Lease, Leases, LinkRecord, LinkUp, Moment, Records, Rendezvous, Renewal, ServerRole,
    StoreError, StreamLimits, Timing,
};
use crate::clock;

/// Records in the memory of one process; they end with it.
#[derive(Debug, Default)]
pub struct MemoryRendezvous {
    records: Mutex<Records>,
}

impl MemoryRendezvous {
    /// An empty store.
    pub fn new(timing: Timing) -> Self {
        Self { records: Mutex::new(Records::new(timing)) }
    }

    /// The store of a process that is alone: nobody can have been there before it, so nobody is waited for.
    pub fn alone(timing: Timing) -> Self {
        Self { records: Mutex::new(Records::alone(timing, clock::now())) }
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn now() -> Moment {
    Moment { now: clock::now(), unix_milliseconds: clock::unix_milliseconds() }
}

#[async_trait]
impl Rendezvous for MemoryRendezvous {
    async fn create_stream(
        &self,
        record: StreamRecord,
        limits: StreamLimits,
    ) -> Result<Option<LinkRecord>, CreateError> {
        self.records().create_stream(record, limits, now())
    }

    async fn advance_stream(
        &self,
        stream: StreamId,
        next: StreamState,
    ) -> Result<Option<StreamRecord>, StoreError> {
        Ok(self.records().advance_stream(stream, next, now()))
    }

    async fn stream(&self, stream: StreamId) -> Result<Option<StreamRecord>, StoreError> {
        Ok(self.records().stream(stream))
    }

    async fn streams(&self, after: Option<StreamId>, limit: usize) -> Result<Vec<StreamRecord>, StoreError> {
        Ok(self.records().streams(after, limit))
    }

    async fn restore_streams(&self, streams: &[StreamRecord]) -> Result<(), StoreError> {
        self.records().restore_streams(streams, now());
        Ok(())
    }

    async fn expire(&self) -> Result<Vec<StreamRecord>, StoreError> {
        Ok(self.records().expire(now()))
    }

    async fn renew(&self, lease: &Lease) -> Result<Renewal, StoreError> {
        Ok(self.records().renew(lease, now()))
    }

    async fn withdraw(&self, role: ServerRole, owner: &Owner) -> Result<(), StoreError> {
        self.records().withdraw(role, owner);
        Ok(())
    }

    async fn leases(&self, role: ServerRole) -> Result<Leases, StoreError> {
        Ok(self.records().leases(role, now()))
    }

    async fn link_up(&self, device: &DeviceAddress, replica: &Owner) -> Result<LinkUp, StoreError> {
        Ok(self.records().link_up(device, replica, now()))
    }

    async fn link_up_late(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        assumed: u64,
    ) -> Result<Option<LinkUp>, StoreError> {
        Ok(self.records().link_up_late(device, replica, assumed, now()))
    }

    async fn link_down(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        generation: u64,
    ) -> Result<(), StoreError> {
        self.records().link_down(device, replica, generation);
        Ok(())
    }

    async fn link(&self, device: &DeviceAddress) -> Result<Option<LinkRecord>, StoreError> {
        Ok(self.records().link(device))
    }

    async fn await_link(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        wait: Duration,
    ) -> Result<Option<LinkRecord>, StoreError> {
        Ok(self.records().await_link(device, replica, wait, now()))
    }

    async fn links(
        &self,
        after: Option<&DeviceAddress>,
        limit: usize,
    ) -> Result<Vec<(DeviceAddress, LinkRecord)>, StoreError> {
        Ok(self.records().links(after, limit))
    }

    async fn restore_links(
        &self,
        links: &[(DeviceAddress, LinkRecord)],
    ) -> Result<Vec<DeviceAddress>, StoreError> {
        Ok(self.records().restore_links(links))
    }
}
