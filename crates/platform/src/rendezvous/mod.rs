//! Where the processes of one relay meet: records of streams, device links, and leases.
//!
//! A store has a clock of its own, by which leases and handshakes expire: the processes' clocks need not agree. It may
//! forget all or some of what it was told (a restart, a failover). It says so when a lease is renewed, and whoever holds
//! streams or links announces them again: the processes hold the truth, and the store only brings it together.

mod ends;
mod memory;
mod metrics;
mod records;
mod redis;
mod seen;
mod settling;

use std::time::Duration;

use async_trait::async_trait;
use midspan_core::{
    api::HANDSHAKE_MAX,
    id::{DeviceAddress, StreamId},
    limit::{LimitName, LimitReached},
    record::{StreamEnd, StreamRecord, StreamState},
    ticket::Owner,
    time::UnixTime,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use ends::Ends;
pub use memory::MemoryRendezvous;
pub use metrics::StoreMetrics;
pub use records::{Moment, Records};
pub use redis::{RedisRendezvous, RedisSettings, RedisUrl};
pub use seen::{Look, Seen};

/// The store does not do what it was asked. The caller answers 503 and the service may try again.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the rendezvous store does not answer ({}): {detail}", failure.label())]
pub struct StoreError {
    /// How it failed.
    pub failure: StoreFailure,
    detail: String,
}

/// How a store failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreFailure {
    /// There is no connection to it.
    Unreachable,
    /// It took too long.
    TimedOut,
    /// It is a replica, or has become one.
    ReadOnly,
    /// It has no memory left.
    Full,
    /// It does not take the user or the password, or the user may not do this.
    Refused,
    /// Anything else.
    Other,
}

/// Why a stream was not recorded.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CreateError {
    /// The device, the service or the relay has as many streams as it may have.
    #[error("{0}")]
    Limit(LimitReached),
    /// The store does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl StoreError {
    /// A failure, with words about it.
    pub fn new(failure: StoreFailure, detail: impl Into<String>) -> Self {
        Self { failure, detail: detail.into() }
    }
}

impl StoreFailure {
    /// Every one there is.
    pub const ALL: [Self; 6] =
        [Self::Unreachable, Self::TimedOut, Self::ReadOnly, Self::Full, Self::Refused, Self::Other];

    /// The failure in logs and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::TimedOut => "timed_out",
            Self::ReadOnly => "read_only",
            Self::Full => "full",
            Self::Refused => "refused",
            Self::Other => "other",
        }
    }
}

impl CreateError {
    fn device_limit(record: &StreamRecord, limits: StreamLimits) -> Self {
        let scope = format!("device {}", record.address);
        Self::limit(LimitName::StreamsPerDevice, limits.per_device, scope)
    }

    fn service_limit(record: &StreamRecord, limits: StreamLimits) -> Self {
        let scope = format!("service {}", record.credential);
        Self::limit(LimitName::StreamsPerService, limits.per_service, scope)
    }

    fn relay_limit(limits: StreamLimits) -> Self {
        Self::limit(LimitName::StreamsPerRelay, limits.per_relay, "this relay".to_owned())
    }

    fn limit(name: LimitName, value: u64, scope: String) -> Self {
        // Streams end when they end: there is no better guess than soon.
        Self::Limit(LimitReached { name, value, scope, retry_after_seconds: 1 })
    }
}

/// How many streams may exist at a time, half-open ones included.
#[derive(Debug, Clone, Copy)]
pub struct StreamLimits {
    /// Of one device or module.
    pub per_device: u64,
    /// Of one service credential.
    pub per_service: u64,
    /// Of all of them.
    pub per_relay: u64,
}

/// What a process of the relay does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServerRole {
    /// It serves the API and holds device links.
    Control,
    /// It joins the legs of streams.
    Edge,
}

/// A process of the relay, as it announces itself every [`Timing::renewal`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// What it does.
    pub role: ServerRole,
    /// Name, life and internal address.
    pub owner: Owner,
    /// Whether new streams, or links, may be placed here: neither draining nor full.
    pub accepts: bool,
    /// How many streams an edge has, half-open ones included, or how many device links a control replica holds.
    pub load: u64,
    /// Where an edge takes connections that other edges pass on below TLS, `host:port`; none, if it does not or is of an
    /// earlier release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passed: Option<String>,
}

/// Who is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leases {
    /// The leases that are alive, in the order of their owners' names. Of several lives of one name the last to renew is the
    /// last one: the others have most likely been killed.
    pub alive: Vec<Lease>,
    /// Whether a lease that is missing here means that its owner is gone.
    ///
    /// Not so for two renewals after a time in which the store could not be reached, or had forgotten: the owners of missing
    /// leases may only not have come round yet.
    pub settled: bool,
}

/// What the renewal of a lease brought to light.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renewal {
    /// The store may have forgotten since the last renewal, or had taken this process for lost: what is held is to be
    /// announced again, with [`Rendezvous::restore_streams`] and [`Rendezvous::restore_links`], until that succeeds.
    pub forgotten: bool,
}

/// A device's link, as it is seen from outside the replica that holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkRecord {
    /// The control replica that holds it. When its lease is gone, so is the link.
    pub replica: Owner,
    /// Grows with every link of the device; the highest one is the device's.
    pub generation: u64,
    /// Since when.
    pub since: UnixTime,
}

/// What comes of a device's new link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkUp {
    /// Higher than all before.
    pub generation: u64,
    /// The link that it takes the place of, which its replica may have to be told.
    pub replaced: Option<LinkRecord>,
    /// The replicas that wait for this device.
    pub waiting: Vec<Owner>,
}

/// The times that a store lives by.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// How long a lease lives without being renewed.
    pub lease: Duration,
    /// How often leases are renewed.
    pub renewal: Duration,
    /// How long an ended stream is remembered.
    pub remember: Duration,
    /// How long after a handshake's time the store waits for others to end it.
    pub slack: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(5),
            renewal: Duration::from_secs(1),
            remember: Duration::from_secs(300),
            slack: Duration::from_secs(2),
        }
    }
}

impl Timing {
    /// How long after its beginning the handshake of `record` is given up: by the store's clock, not by the one that
    /// the record was made by.
    fn given_up_after(&self, record: &StreamRecord) -> Duration {
        record.expires.since(record.created).min(HANDSHAKE_MAX) + self.slack
    }
}

/// The records that all processes of one relay share.
///
/// Memory is the store of a single process. Every implementation passes the suite in `tests/it/rendezvous`.
#[async_trait]
pub trait Rendezvous: Send + Sync {
    /// Records a new stream, unless a limit is reached. Gives the link of its device, when there is one.
    async fn create_stream(
        &self,
        record: StreamRecord,
        limits: StreamLimits,
    ) -> Result<Option<LinkRecord>, CreateError>;

    /// Moves a stream on. Gives the record when that changed it; steps back are ignored. So are steps out of an end, but for the
    /// true end of a stream whose edge was thought lost: it is kept, and gives nothing.
    ///
    /// An end that could not be told is told again as soon as the store can be reached: who hears the error records the
    /// end, and need not come back.
    async fn advance_stream(
        &self,
        stream: StreamId,
        next: StreamState,
    ) -> Result<Option<StreamRecord>, StoreError>;

    /// Ends a stream that nobody else may know to be over, with [`Rendezvous::advance_stream`]. What could not be told at once
    /// comes back from [`Rendezvous::expire`] when that changed the stream: so its end is recorded once.
    async fn delete_stream(
        &self,
        stream: StreamId,
        end: StreamEnd,
    ) -> Result<Option<StreamRecord>, StoreError> {
        self.advance_stream(stream, StreamState::Ended(end)).await
    }

    /// One stream, also for some minutes after its end.
    async fn stream(&self, stream: StreamId) -> Result<Option<StreamRecord>, StoreError>;

    /// Up to `limit` streams that are not over, in the order of their ids, starting behind `after`.
    async fn streams(&self, after: Option<StreamId>, limit: usize) -> Result<Vec<StreamRecord>, StoreError>;

    /// Announces streams again that a store may have forgotten, as they stand now.
    ///
    /// What the store knows better stays as it is, but for the end of a stream whose edge it had thought lost. Limits do
    /// not hold here: these streams are there.
    async fn restore_streams(&self, streams: &[StreamRecord]) -> Result<(), StoreError>;

    /// Ends handshakes that nobody has ended in time and streams whose edge is gone, and gives those that it ended; and those
    /// whose deletion could not be told at once and has been since.
    ///
    /// Also forgets what ended long ago and the links of replicas that are gone. To be called every second or so by
    /// every control replica; each end is given to one of them.
    async fn expire(&self) -> Result<Vec<StreamRecord>, StoreError>;

    /// Announces a process, or that it is still there.
    async fn renew(&self, lease: &Lease) -> Result<Renewal, StoreError>;

    /// Takes back the lease of a process that ends in good order.
    async fn withdraw(&self, role: ServerRole, owner: &Owner) -> Result<(), StoreError>;

    /// The processes of a role.
    async fn leases(&self, role: ServerRole) -> Result<Leases, StoreError>;

    /// A device has a new link, which `replica` holds.
    async fn link_up(&self, device: &DeviceAddress, replica: &Owner) -> Result<LinkUp, StoreError>;

    /// A device has a link, which `replica` holds, and which began while the store could not be told, or whose announcement
    /// was not answered. Nothing, when another replica's link is newer than `assumed`, the generation that it would have had.
    async fn link_up_late(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        assumed: u64,
    ) -> Result<Option<LinkUp>, StoreError>;

    /// The device's links to this replica up to this generation are gone. A newer one is left alone, and one to another replica.
    async fn link_down(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        generation: u64,
    ) -> Result<(), StoreError>;

    /// The link of a device.
    async fn link(&self, device: &DeviceAddress) -> Result<Option<LinkRecord>, StoreError>;

    /// Registers that `replica` waits for a device, for the time `wait`, and then looks whether its link is there
    /// already: none is missed in between.
    ///
    /// A store that forgets forgets this as well; who waits longer asks again every few seconds.
    async fn await_link(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        wait: Duration,
    ) -> Result<Option<LinkRecord>, StoreError>;

    /// Up to `limit` linked devices, in the order of their addresses, starting behind `after`.
    async fn links(
        &self,
        after: Option<&DeviceAddress>,
        limit: usize,
    ) -> Result<Vec<(DeviceAddress, LinkRecord)>, StoreError>;

    /// Announces links again that a store may have forgotten. Gives the devices that have a newer link by now.
    async fn restore_links(
        &self,
        links: &[(DeviceAddress, LinkRecord)],
    ) -> Result<Vec<DeviceAddress>, StoreError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_of_neighbouring_releases_are_read() {
        let earlier = r#"{"role":"edge","owner":{"name":"edge-0","incarnation":"0123456789ab4def8123456789abcdef","address":"e:8445"},
            "accepts":true,"load":3}"#;
        let lease: Lease = serde_json::from_str(earlier).unwrap();
        assert_eq!(lease.passed, None);
        // Without the new field it reads as ever; with it, an earlier release skips it.
        let mut written = serde_json::to_value(&lease).unwrap();
        assert_eq!(written, serde_json::from_str::<serde_json::Value>(earlier).unwrap());
        written["passed"] = "e:8447".into();
        written["later"] = 1.into();
        let lease: Lease = serde_json::from_value(written).unwrap();
        assert_eq!(lease.passed.as_deref(), Some("e:8447"));
    }
}
