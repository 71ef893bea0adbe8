use std::{sync::Arc, time::Duration};

use midspan_core::{
    credential::Credentials,
    link::GoodbyeReason,
    record::{StreamRecord, StreamState},
    ticket::Owner,
};
use midspan_platform::{
    activity::{ActivityLog, Subject},
    lifecycle::Lifecycle,
    metrics::Metrics,
    owners::Owners,
    rendezvous::{Lease, Rendezvous, ServerRole, Timing},
    secrets::Secrets,
    watched::Watched,
};
use tokio::{sync::Semaphore, time::timeout};
use tracing::{info, info_span, warn};

use crate::{ControlSettings, device::Links, metrics::ControlMetrics, rates::Rates};

/// The control plane of one process.
pub struct Control {
    pub(crate) settings: ControlSettings,
    /// The host names that credentials may name.
    pub(crate) hosts: Vec<String>,
    pub(crate) replica: Owner,
    /// The public base URL of the edge, without a slash at its end.
    pub(crate) edge_url: String,
    pub(crate) credentials: Watched<Credentials>,
    pub(crate) secrets: Secrets,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) metrics: ControlMetrics,
    pub(crate) rendezvous: Arc<dyn Rendezvous>,
    pub(crate) owners: Arc<dyn Owners>,
    pub(crate) activity: ActivityLog,
    pub(crate) links: Links,
    pub(crate) rates: Rates,
    pub(crate) waiting: Arc<Semaphore>,
}

/// What a control plane is made of.
#[expect(missing_debug_implementations, reason = "parts on their way into a control plane are never shown")]
pub struct ControlParts {
    /// How it treats devices and services.
    pub settings: ControlSettings,
    /// The host names that credentials may name.
    pub hosts: Vec<String>,
    /// Its name, life and internal address.
    pub replica: Owner,
    /// The public base URL of the edge.
    pub edge_url: String,
    /// Keys of devices and services.
    pub credentials: Watched<Credentials>,
    /// Ticket keys and deny list.
    pub secrets: Secrets,
    /// The process that it lives in.
    pub lifecycle: Lifecycle,
    /// Where its metrics are registered.
    pub metrics: Metrics,
    /// Where streams, links and edges are recorded.
    pub rendezvous: Arc<dyn Rendezvous>,
    /// How owners of streams are reached.
    pub owners: Arc<dyn Owners>,
    /// Where initiations are recorded.
    pub activity: ActivityLog,
}

/// How long the rendezvous store may take for one step.
pub(crate) const STORE_LIMIT: Duration = Duration::from_secs(5);

const SWEEP: Duration = Duration::from_secs(1);

/// How long links and waiting requests have to end when the process closes.
const FAREWELL: Duration = Duration::from_secs(6);

impl Control {
    /// Puts a control plane together and starts its housekeeping.
    pub fn start(parts: ControlParts) -> Arc<Self> {
        let control = Arc::new(Self {
            hosts: parts.hosts,
            replica: parts.replica,
            edge_url: parts.edge_url.trim_end_matches('/').to_owned(),
            credentials: parts.credentials,
            secrets: parts.secrets,
            metrics: ControlMetrics::new(&parts.metrics),
            lifecycle: parts.lifecycle,
            rendezvous: parts.rendezvous,
            owners: parts.owners,
            activity: parts.activity,
            links: Links::default(),
            rates: Rates::new(parts.settings.limit_initiations_per_second),
            waiting: Arc::new(Semaphore::new(parts.settings.limit_waiting_initiations)),
            settings: parts.settings,
        });
        control.lifecycle.spawn(info_span!("sweep"), Arc::clone(&control).sweep());
        control.lifecycle.spawn(info_span!("lease"), Arc::clone(&control).keep_lease());
        control.lifecycle.spawn(info_span!("deny_list"), Arc::clone(&control).watch_deny_list());
        control
    }

    /// Says goodbye to all devices of a closing process, and waits until they and the requests under way are gone.
    pub async fn drain(&self) {
        self.links.dismiss_all(GoodbyeReason::Draining);
        let gone = async {
            while self.links.count() > 0 || self.metrics.waiting_initiations.get() > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if timeout(FAREWELL, gone).await.is_err() {
            info!(links = self.links.count(), "links left after the goodbye");
        }
    }

    /// Writes the activity record of a stream that ended without its owner knowing of it.
    pub(crate) fn record_end(&self, record: &StreamRecord) {
        let StreamState::Ended(end) = &record.state else { return };
        let subject = Subject {
            stream: Some(record.stream),
            address: &record.address,
            name: Some(&record.name),
            credential: &record.credential,
        };
        info!(stream.id = %record.stream, reason = %end.reason, "stream ended: {}", end.reason.row().text);
        self.metrics.ended(end.reason);
        self.activity.end(&subject, end, end.ended.since(record.created));
    }

    async fn sweep(self: Arc<Self>) {
        while timeout(SWEEP, self.lifecycle.stopped().cancelled()).await.is_err() {
            match timeout(STORE_LIMIT, self.rendezvous.expire()).await {
                Ok(Ok(late)) => late.iter().for_each(|record| self.record_end(record)),
                Ok(Err(error)) => warn!(%error, "late streams could not be ended"),
                Err(_) => warn!("late streams could not be ended in time"),
            }
        }
    }

    async fn keep_lease(self: Arc<Self>) {
        let (stopped, draining) = (self.lifecycle.stopped(), self.lifecycle.draining());
        loop {
            let count = self.links.count();
            let accepts = count < self.settings.limit_device_links && !draining.is_cancelled();
            let (role, owner) = (ServerRole::Control, self.replica.clone());
            let lease = Lease { role, owner, accepts, load: count as u64 };
            match timeout(STORE_LIMIT, self.rendezvous.renew(&lease)).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => warn!(%error, "the replica's lease could not be renewed"),
                Err(_) => warn!("the replica's lease could not be renewed in time"),
            }
            tokio::select! {
                waited = timeout(Timing::default().renewal, stopped.cancelled()) => if waited.is_ok() { break },
                // Said at once, so that no device is sent here. Only once: the next round waits as usual.
                () = draining.cancelled(), if accepts => {}
            }
        }
        // Nobody would miss it for long: it expires.
        let _ = timeout(STORE_LIMIT, self.rendezvous.withdraw(ServerRole::Control, &self.replica)).await;
    }

    async fn watch_deny_list(self: Arc<Self>) {
        let mut deny = self.secrets.deny.clone();
        loop {
            tokio::select! {
                list = deny.changed() => self.links.dismiss_denied(&list),
                () = self.lifecycle.stopped().cancelled() => return,
            }
        }
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("hosts", &self.hosts)
            .field("edge_url", &self.edge_url)
            .finish_non_exhaustive()
    }
}
