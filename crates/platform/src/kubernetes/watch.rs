use std::{collections::BTreeMap, error::Error, pin::pin, string::FromUtf8Error, sync::Arc};

use futures_util::StreamExt as _;
use http_body_util::LengthLimitError;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{
    Api,
    runtime::{
        utils::Backoff as _,
        watcher::{self, DefaultBackoff, Event, watcher},
    },
};
use tokio::{
    sync::watch::Sender,
    time::{Duration, Instant, sleep_until},
};
use tracing::{debug, info, warn};

use super::{
    KubernetesMetrics, KubernetesTiming,
    client::TimedOut,
    pods::{Pod, Pods, Slices, TooMany},
    trust::{Standing, Trust},
};
use crate::clock;

/// Follows the slices of one Service until it is dropped.
pub(super) struct Watch {
    api: Api<EndpointSlice>,
    config: watcher::Config,
    slices: Slices,
    trust: Trust,
    metrics: KubernetesMetrics,
    pods: Sender<Arc<Pods>>,
    /// What went wrong last.
    error: String,
}

/// How a request to the API server failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// There is no connection, or it broke.
    Unreachable,
    /// The answer took too long.
    TimedOut,
    /// The token is not good, or gives no right to this.
    Refused,
    /// The server no longer knows what came after the last event.
    Gone,
    /// Too many requests, of whomever.
    Throttled,
    /// The server says that it is its fault.
    ServerError,
    /// What the server said makes no sense, or is too much.
    Unreadable,
}

/// The longest text of a server that is logged.
const TEXT_MAX: usize = 300;

/// Twice the least wait between two tries.
const LEAST_WAIT: Duration = Duration::from_millis(800);

impl Watch {
    pub(super) fn new(
        api: Api<EndpointSlice>,
        service: &str,
        timing: KubernetesTiming,
        trust: Trust,
        metrics: KubernetesMetrics,
        pods: Sender<Arc<Pods>>,
    ) -> Self {
        let seconds = u32::try_from(timing.watch.as_secs()).unwrap_or(u32::MAX);
        let config = watcher::Config::default()
            .labels(&format!("kubernetes.io/service-name={service}"))
            .timeout(seconds.max(1));
        let error = "no answer yet".to_owned();
        Self { api, config, slices: Slices::default(), trust, metrics, pods, error }
    }

    /// Lists and watches. After whatever went wrong it begins anew with a list: kube's watcher alone would go on behind an
    /// event that it could not read, and ask for ever for what is gone.
    pub(super) async fn run(mut self) {
        let mut backoff = DefaultBackoff::default();
        loop {
            let (failure, error) = self.follow().await;
            self.metrics.failures.with_label_values(&[failure.label()]).inc();
            debug!(failure = failure.label(), error, "EndpointSlices: begun anew");
            self.error = error;
            if self.trust.failed(clock::now()) {
                backoff.reset();
            }
            // From 0.4 s to 30 s, of which half is random.
            let again = Instant::now() + backoff.next().unwrap_or_default().max(LEAST_WAIT) / 2;
            while let Some(turn) = self.next_turn().filter(|turn| *turn < again) {
                sleep_until(turn).await;
                self.turn();
            }
            sleep_until(again).await;
        }
    }

    /// Takes in events until something goes wrong.
    async fn follow(&mut self) -> (Failure, String) {
        let mut events = pin!(watcher(self.api.clone(), self.config.clone()));
        loop {
            let turn = self.next_turn();
            let event = tokio::select! {
                event = events.next() => event,
                () = sleep_until(turn.unwrap_or_else(Instant::now)), if turn.is_some() => {
                    self.turn();
                    continue;
                }
            };
            match event {
                Some(Ok(event)) => {
                    if let Err(error) = self.take(event) {
                        return (Failure::Unreadable, error.to_string());
                    }
                }
                Some(Err(error)) => return failure(&error),
                None => return (Failure::Unreadable, "the watch has ended".to_owned()),
            }
        }
    }

    fn take(&mut self, event: Event<EndpointSlice>) -> Result<(), TooMany> {
        let is_list = matches!(event, Event::InitDone);
        if self.slices.apply(event)? {
            let named = self.slices.pods();
            self.pods.send_if_modified(|pods| {
                let changed = pods.named != named;
                if changed {
                    tell(&pods.named, &named);
                    *pods = Arc::new(Pods { named, current: pods.current });
                }
                changed
            });
        }
        if is_list {
            self.trust.listed(clock::now());
        }
        Ok(())
    }

    fn next_turn(&self) -> Option<Instant> {
        self.trust.next_turn().map(Instant::from_std)
    }

    /// Says so when the view has become current or out of date.
    fn turn(&mut self) {
        let Some(standing) = self.trust.turn(clock::now()) else { return };
        let current = standing == Standing::Current;
        self.metrics.current.set(current.into());
        self.pods.send_modify(|pods| *pods = Arc::new(Pods { named: pods.named.clone(), current }));
        let pods = self.pods.borrow().named.len();
        if current {
            info!(pods, "EndpointSlices are watched: edges that are not ready get no new streams");
        } else {
            warn!(
                error = self.error,
                pods,
                "EndpointSlices cannot be watched: leases decide, and only edges known to be terminating get no new streams"
            );
        }
    }
}

/// Logs what has changed.
fn tell(before: &BTreeMap<String, Pod>, now: &BTreeMap<String, Pod>) {
    for (name, pod) in now.iter().filter(|(name, pod)| before.get(*name) != Some(*pod)) {
        let Pod { address, zone, ready, terminating } = pod;
        let zone = zone.as_deref().unwrap_or_default();
        debug!(edge = name, address, zone, ready, terminating, "an edge's pod has changed");
    }
    for name in before.keys().filter(|name| !now.contains_key(*name)) {
        debug!(edge = name, "an edge's pod has gone");
    }
}

fn causes<'error>(
    error: &'error (dyn Error + 'static),
) -> impl Iterator<Item = &'error (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

fn failure(error: &watcher::Error) -> (Failure, String) {
    let failure = match error {
        watcher::Error::WatchError(status) => Failure::of_status(status.code),
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => Failure::of(error),
        watcher::Error::NoResourceVersion => Failure::Unreadable,
    };
    let mut text = error.to_string();
    for cause in causes(error).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    // What a server says may be long.
    text.truncate(text.floor_char_boundary(TEXT_MAX));
    (failure, text)
}

impl Failure {
    pub(super) const ALL: [Self; 7] = [
        Self::Unreachable,
        Self::TimedOut,
        Self::Refused,
        Self::Gone,
        Self::Throttled,
        Self::ServerError,
        Self::Unreadable,
    ];

    /// The failure in metrics and logs.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::TimedOut => "timed_out",
            Self::Refused => "refused",
            Self::Gone => "gone",
            Self::Throttled => "throttled",
            Self::ServerError => "server_error",
            Self::Unreadable => "unreadable",
        }
    }

    fn of(error: &kube::Error) -> Self {
        if let kube::Error::Api(status) = error {
            return Self::of_status(status.code);
        }
        for cause in causes(error) {
            if cause.is::<TimedOut>() {
                return Self::TimedOut;
            }
            if cause.is::<serde_json::Error>()
                || cause.is::<FromUtf8Error>()
                || cause.is::<LengthLimitError>()
            {
                return Self::Unreadable;
            }
        }
        Self::Unreachable
    }

    fn of_status(code: u16) -> Self {
        match code {
            401 | 403 => Self::Refused,
            410 => Self::Gone,
            429 => Self::Throttled,
            500.. => Self::ServerError,
            _ => Self::Unreadable,
        }
    }
}
