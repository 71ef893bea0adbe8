use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{TryStreamExt as _, stream};
use midspan_core::{
    credential::Credentials,
    id::DeviceAddress,
    link::GoodbyeReason,
    owner_name::EdgeUrl,
    problem::Problem,
    record::{StreamRecord, StreamState},
    ticket::Owner,
};
use midspan_platform::{
    activity::{ActivityLog, Subject},
    clock,
    internal::Calls,
    kubernetes::Pods,
    lifecycle::Lifecycle,
    metrics::Metrics,
    owners::Owners,
    rendezvous::{Ends, Lease, LinkRecord, Rendezvous, ServerRole, StoreError, Timing},
    secrets::Secrets,
    watched::Watched,
};
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, timeout, timeout_at},
};
use tracing::{info, info_span, warn};

use crate::{
    ControlSettings,
    api::in_time,
    balance,
    device::{Held, Links},
    metrics::ControlMetrics,
    rates::Rates,
    view::View,
};

/// The control plane of one process.
pub struct Control {
    pub(crate) settings: ControlSettings,
    /// The host names that credentials may name.
    pub(crate) hosts: Vec<String>,
    pub(crate) replica: Owner,
    pub(crate) edge_url: EdgeUrl,
    pub(crate) credentials: Watched<Credentials>,
    pub(crate) secrets: Secrets,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) metrics: ControlMetrics,
    pub(crate) rendezvous: Arc<dyn Rendezvous>,
    pub(crate) owners: Arc<dyn Owners>,
    pub(crate) calls: Arc<dyn Calls>,
    pub(crate) activity: ActivityLog,
    pub(crate) links: Links,
    pub(crate) rates: Rates,
    pub(crate) waiting: Arc<Semaphore>,
    view: watch::Sender<Arc<View>>,
    timing: Timing,
    /// Whether the last renewal of the lease was answered.
    renewed: AtomicBool,
    /// Whether the store has to be told of all links again.
    forgotten: AtomicBool,
    /// Ends of links that the store could not be told of, or may have forgotten.
    ended_links: Mutex<Ends<(DeviceAddress, Option<u64>)>>,
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
    /// The public base URL of the edges.
    pub edge_url: EdgeUrl,
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
    /// The times that the store lives by.
    pub timing: Timing,
    /// How owners of streams are reached.
    pub owners: Arc<dyn Owners>,
    /// How other replicas are reached.
    pub calls: Arc<dyn Calls>,
    /// Which edges Kubernetes calls ready.
    pub pods: Watched<Pods>,
    /// Where initiations are recorded.
    pub activity: ActivityLog,
}

/// How long the rendezvous store may take for one step.
pub(crate) const STORE_LIMIT: Duration = Duration::from_secs(3);

const SWEEP: Duration = Duration::from_secs(1);

/// How long a sweep may take. The store limits each of its steps itself; what a sweep has ended is recorded by nobody else, so it
/// is given up only when something hangs.
const SWEEP_LIMIT: Duration = Duration::from_secs(60);

/// How long links and waiting requests have to end when the process closes.
const FAREWELL: Duration = Duration::from_secs(6);

/// How often a replica that ends looks whom to tell to go.
const TELL: Duration = Duration::from_millis(100);

/// How many links the store is told of at a time.
const BATCH: usize = 500;

/// How many links are announced late at the same time.
const LATE_AT_ONCE: usize = 64;

/// The pause between two batches, so that the store is not kept from everything else.
const BATCH_PAUSE: Duration = Duration::from_millis(20);

impl Control {
    /// Puts a control plane together and starts its housekeeping.
    pub fn start(parts: ControlParts) -> Arc<Self> {
        let control = Arc::new(Self {
            hosts: parts.hosts,
            replica: parts.replica,
            edge_url: parts.edge_url,
            credentials: parts.credentials,
            secrets: parts.secrets,
            metrics: ControlMetrics::new(&parts.metrics),
            lifecycle: parts.lifecycle,
            rendezvous: parts.rendezvous,
            owners: parts.owners,
            calls: parts.calls,
            activity: parts.activity,
            links: Links::default(),
            rates: Rates::new(parts.settings.limit_initiations_per_second),
            waiting: Arc::new(Semaphore::new(parts.settings.limit_waiting_initiations)),
            settings: parts.settings,
            view: watch::Sender::new(Arc::new(View::empty(clock::now()))),
            timing: parts.timing,
            // A link is announced behind the first lease: the store takes down those of replicas that it does not know.
            renewed: AtomicBool::new(false),
            forgotten: AtomicBool::new(false),
            ended_links: Mutex::default(),
        });
        control.lifecycle.spawn(info_span!("sweep"), Arc::clone(&control).sweep());
        control.lifecycle.spawn(info_span!("lease"), Arc::clone(&control).keep_lease());
        control.lifecycle.spawn(info_span!("announce"), Arc::clone(&control).announce_links());
        control.lifecycle.spawn(info_span!("deny_list"), Arc::clone(&control).watch_deny_list());
        control.lifecycle.spawn(info_span!("pods"), Arc::clone(&control).watch_pods(parts.pods));
        control
    }

    /// Lets all devices of a closing process go, and waits until they and the requests under way are gone.
    ///
    /// Where another replica can take them, devices are told to open a link there, a few at a time; their links here live
    /// until they have, for up to `grace`.
    pub async fn drain(&self, grace: Duration) {
        let end = Instant::now() + grace;
        let view = self.look().await.unwrap_or_else(|_| self.view());
        if !view.loads_beside(&self.replica).is_empty() {
            let spread = Instant::now() + balance::spread(self.links.count(), grace);
            let moved = async {
                while self.metrics.device_links.get() > 0 {
                    let left = spread.saturating_duration_since(Instant::now());
                    self.links.let_go(balance::to_tell(self.links.staying(), left, TELL));
                    tokio::time::sleep(TELL).await;
                }
            };
            if timeout_at(end, moved).await.is_err() {
                info!(links = self.metrics.device_links.get(), "links left at the end of the grace time");
            }
        }
        self.links.dismiss_all(GoodbyeReason::Draining);
        let gone = async {
            while self.metrics.device_links.get() > 0 || self.metrics.waiting_initiations.get() > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if timeout(FAREWELL, gone).await.is_err() {
            info!(links = self.metrics.device_links.get(), "links left after the goodbye");
        }
    }

    /// The processes of the relay, as they were seen a moment ago.
    pub(crate) fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// Looks who is there now: before anybody is said to be absent.
    pub(crate) async fn look(&self) -> Result<Arc<View>, Problem> {
        let leases = |role| in_time(self.rendezvous.leases(role));
        let (edges, replicas) = tokio::join!(leases(ServerRole::Edge), leases(ServerRole::Control));
        let (edges, replicas) = (edges?, replicas?);
        self.view.send_modify(|view| *view = Arc::new(View::new(edges, replicas, clock::now(), view)));
        Ok(self.view())
    }

    /// Whether it is worth while to ask the store for something that can wait.
    pub(crate) fn store_answers(&self) -> bool {
        self.renewed.load(Ordering::Relaxed)
    }

    /// Tells the store that a link has ended, now or once it answers.
    pub(crate) async fn link_down(&self, address: DeviceAddress, generation: Option<u64>) {
        let forgets = self.ended_links().forgets();
        let told = async { self.store_answers() && self.take_down(&address, generation).await.is_ok() };
        let told = timeout(STORE_LIMIT, told).await.unwrap_or(false);
        let (mut ended, end) = (self.ended_links(), (address, generation));
        if told {
            ended.told(end, forgets, clock::now());
        } else if !ended.failed(end) {
            warn!("too many links have ended that the store has not heard of; the oldest is left out");
        }
    }

    /// How often the store may have forgotten so far.
    pub(crate) fn forgets(&self) -> u64 {
        self.ended_links().forgets()
    }

    /// A link was announced, which began when the store had forgotten so often. The server of before may have been told.
    pub(crate) fn announced(&self, forgets: u64) {
        if self.forgets() != forgets {
            self.forgotten.store(true, Ordering::Relaxed);
        }
    }

    fn ended_links(&self) -> MutexGuard<'_, Ends<(DeviceAddress, Option<u64>)>> {
        self.ended_links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes down the link of this generation; without one, what the store may have recorded although its answer was lost.
    async fn take_down(&self, address: &DeviceAddress, generation: Option<u64>) -> Result<(), StoreError> {
        let generation = if generation.is_some() {
            generation
        } else {
            let _turn = self.links.turn(address).lock().await;
            // The announcement of a newer one takes its place.
            let recorded = if self.links.has(address) { None } else { self.rendezvous.link(address).await? };
            let here = recorded.filter(|link| link.replica.incarnation == self.replica.incarnation);
            here.map(|link| link.generation)
        };
        match generation {
            Some(generation) => self.rendezvous.link_down(address, &self.replica, generation).await,
            None => Ok(()),
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
            match timeout(SWEEP_LIMIT, self.rendezvous.expire()).await {
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
            let lease = Lease { role, owner, accepts, load: count as u64, passed: None };
            let renewed = timeout(STORE_LIMIT, self.rendezvous.renew(&lease)).await;
            self.renewed.store(matches!(renewed, Ok(Ok(_))), Ordering::Relaxed);
            match renewed {
                Ok(Ok(renewal)) => {
                    // What is announced from here on is known to the store that answers now; what was before, is announced again.
                    self.ended_links().renewed(renewal.forgotten, clock::now());
                    if renewal.forgotten {
                        self.forgotten.store(true, Ordering::Relaxed);
                    }
                    // Where it fails, the view of before stays.
                    let _ = self.look().await;
                }
                Ok(Err(error)) => warn!(%error, "the replica's lease could not be renewed"),
                Err(_) => warn!("the replica's lease could not be renewed in time"),
            }
            if !draining.is_cancelled() {
                self.shed();
            }
            tokio::select! {
                waited = timeout(self.timing.renewal, stopped.cancelled()) => if waited.is_ok() { break },
                // Said at once, so that no device is sent here. Only once: the next round waits as usual.
                () = draining.cancelled(), if accepts => {}
            }
        }
        // Nobody would miss it for long: it expires.
        let _ = timeout(STORE_LIMIT, self.rendezvous.withdraw(ServerRole::Control, &self.replica)).await;
    }

    /// Lets some links go when there are far more here than elsewhere.
    fn shed(&self) {
        let view = self.view();
        if view.is_settled(clock::now()) {
            let own = self.links.staying() as u64;
            let count = self.links.let_go(balance::to_let_go(own, &view.loads_beside(&self.replica)));
            if count > 0 {
                info!(count, own, "links told to move to other replicas");
            }
        }
    }

    /// Tells the store of the links that it has not heard of, or has forgotten.
    async fn announce_links(self: Arc<Self>) {
        while timeout(self.timing.renewal, self.lifecycle.stopped().cancelled()).await.is_err() {
            if !self.store_answers() {
                continue;
            }
            let unannounced = stream::iter(self.links.unannounced().into_iter().map(Ok));
            let announce = |(address, held)| self.announce_late(address, held);
            // What fails is tried again in the next round.
            let _ = unannounced.try_for_each_concurrent(LATE_AT_ONCE, announce).await;
            if self.forgotten.swap(false, Ordering::Relaxed) && self.announce_again().await.is_err() {
                self.forgotten.store(true, Ordering::Relaxed);
            }
            let ended = self.ended_links().take(usize::MAX);
            for (address, generation) in ended {
                self.link_down(address, generation).await;
            }
        }
    }

    /// Announces a link that the store has not heard of, or has not said so.
    async fn announce_late(&self, address: DeviceAddress, held: Held) -> Result<(), Problem> {
        let _turn = self.links.turn(&address).lock().await;
        if !self.links.holds(&address, held) {
            return Ok(());
        }
        let forgets = self.forgets();
        match in_time(self.rendezvous.link_up_late(&address, &self.replica, held.generation)).await? {
            Some(up) => {
                if !self.links.announced_late(&address, held, up.generation) {
                    self.link_down(address.clone(), Some(up.generation)).await;
                }
                self.announced(forgets);
                self.tell_others(&address, up);
            }
            // Should this be the device's newest link after all, it comes back at once.
            None => self.links.dismiss(&address, held, GoodbyeReason::Draining),
        }
        Ok(())
    }

    /// Tells a store that has forgotten of the links that it had been told of.
    async fn announce_again(&self) -> Result<(), Problem> {
        let links = self.links.announced();
        info!(links = links.len(), "links are announced again");
        for batch in links.chunks(BATCH) {
            let record = |(address, held): &(DeviceAddress, Held)| {
                let replica = self.replica.clone();
                (address.clone(), LinkRecord { replica, generation: held.generation, since: held.since })
            };
            let records: Vec<_> = batch.iter().map(record).collect();
            let restored = in_time(self.rendezvous.restore_links(&records)).await;
            // Also where no answer came: it may have been done behind the end of a link.
            for (address, held) in batch.iter().filter(|(address, held)| !self.links.holds(address, *held)) {
                self.link_down(address.clone(), Some(held.generation)).await;
            }
            let newer = restored?;
            for (address, held) in batch.iter().filter(|(address, _)| newer.contains(address)) {
                // Likewise.
                self.links.dismiss(address, *held, GoodbyeReason::Draining);
            }
            tokio::time::sleep(BATCH_PAUSE).await;
        }
        Ok(())
    }

    async fn watch_pods(self: Arc<Self>, mut pods: Watched<Pods>) {
        let (mut views, mut overruled) = (self.view.subscribe(), false);
        loop {
            tokio::select! {
                pods = pods.changed() => self.view.send_modify(|view| *view = Arc::new(view.with_pods(pods))),
                _ = views.changed() => {}
                () = self.lifecycle.stopped().cancelled() => return,
            }
            let edges = views.borrow_and_update().overruled();
            if (edges > 0) != overruled {
                overruled = edges > 0;
                if overruled {
                    warn!(edges, "Kubernetes calls none of the edges ready: their leases alone decide");
                } else {
                    info!("edges are ready again, as Kubernetes says");
                }
            }
        }
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
            .field("edge_url", &self.edge_url.to_string())
            .finish_non_exhaustive()
    }
}
