//! Where the processes of one relay meet: records of streams, device links, and edges.

mod memory;

use async_trait::async_trait;
use midspan_core::{
    id::{DeviceAddress, StreamId},
    limit::LimitReached,
    record::{StreamRecord, StreamState},
    ticket::Owner,
    time::UnixTime,
};
use thiserror::Error;

pub use memory::MemoryRendezvous;

/// The store does not answer. The caller answers 503 and the service may try again.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the rendezvous store does not answer: {0}")]
pub struct StoreError(pub String);

/// Why a stream was not recorded.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CreateError {
    /// The device or the service has as many streams as it may have.
    #[error("{0}")]
    Limit(LimitReached),
    /// The store does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How many streams may exist at a time, half-open ones included.
#[derive(Debug, Clone, Copy)]
pub struct StreamLimits {
    /// Of one device or module.
    pub per_device: u64,
    /// Of one service credential.
    pub per_service: u64,
}

/// An edge, as it announces itself every second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeLease {
    /// Name, life and internal address.
    pub owner: Owner,
    /// Whether new streams may be placed here: neither draining nor full.
    pub takes_streams: bool,
}

/// A device's link, as it is seen from outside the replica that holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkRecord {
    /// Grows with every link of the device; the highest one is the device's.
    pub generation: u64,
    /// Since when.
    pub since: UnixTime,
}

/// The records that all processes of one relay share.
///
/// Memory is the store of a single process. Every implementation passes the suite in `tests/it/rendezvous.rs`.
#[async_trait]
pub trait Rendezvous: Send + Sync {
    /// Records a new stream, unless a limit is reached.
    async fn create_stream(&self, record: StreamRecord, limits: StreamLimits) -> Result<(), CreateError>;

    /// Moves a stream on. Gives the record when that changed it; steps back are ignored.
    async fn advance_stream(
        &self,
        stream: StreamId,
        next: StreamState,
    ) -> Result<Option<StreamRecord>, StoreError>;

    /// One stream, also for some minutes after its end.
    async fn stream(&self, stream: StreamId) -> Result<Option<StreamRecord>, StoreError>;

    /// Up to `limit` streams that are not over, in the order of their ids, starting behind `after`.
    async fn streams(&self, after: Option<StreamId>, limit: usize) -> Result<Vec<StreamRecord>, StoreError>;

    /// Ends handshakes that nobody has ended in time, forgets what ended long ago, and gives the former.
    async fn expire(&self, now: UnixTime) -> Result<Vec<StreamRecord>, StoreError>;

    /// Announces an edge, or that it is still there.
    async fn renew_edge(&self, lease: EdgeLease, now: UnixTime) -> Result<(), StoreError>;

    /// The edges whose leases are alive.
    async fn edges(&self, now: UnixTime) -> Result<Vec<EdgeLease>, StoreError>;

    /// A device has a new link. Gives its generation, higher than all before.
    async fn link_up(&self, device: &DeviceAddress, now: UnixTime) -> Result<u64, StoreError>;

    /// The link of this generation is gone. A newer one is left alone.
    async fn link_down(&self, device: &DeviceAddress, generation: u64) -> Result<(), StoreError>;

    /// The link of a device.
    async fn link(&self, device: &DeviceAddress) -> Result<Option<LinkRecord>, StoreError>;

    /// Up to `limit` linked devices, in the order of their addresses, starting behind `after`.
    async fn links(
        &self,
        after: Option<&DeviceAddress>,
        limit: usize,
    ) -> Result<Vec<(DeviceAddress, LinkRecord)>, StoreError>;
}

/// How long an edge's lease lives without being renewed, in seconds.
pub const LEASE_SECONDS: u64 = 5;

/// How long an ended stream is remembered, in seconds.
pub const REMEMBER_SECONDS: u64 = 300;

/// How long after a handshake's time the store waits for its owner to end it, in seconds.
pub const EXPIRY_SLACK_SECONDS: u64 = 2;
