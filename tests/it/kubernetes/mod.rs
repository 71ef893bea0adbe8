//! What Kubernetes says of the edges, from an API server that behaves and from one that does not.

mod relay;

use std::time::Duration;

use midspan_platform::{
    kubernetes::{KubernetesMetrics, KubernetesSettings, KubernetesTiming, Pods},
    lifecycle::Lifecycle,
    metrics::Metrics,
    watched::Watched,
};
use testkit::{ApiServer, Mood, conditions, eventually, until, within};
use tokio::time::Instant;

/// A watch as the control plane has it, only faster.
struct Watching {
    pods: Watched<Pods>,
    metrics: Metrics,
    lifecycle: Lifecycle,
}

const TIMING: KubernetesTiming = KubernetesTiming {
    watch: Duration::from_secs(1),
    answer: Duration::from_secs(3),
    between_requests: Duration::from_millis(20),
    patience: Duration::from_millis(1000),
    proof: Duration::from_millis(100),
};

impl Watching {
    async fn start(server: &ApiServer) -> Self {
        let settings = KubernetesSettings {
            kubernetes_edges_service: Some(server.service().to_owned()),
            kubernetes_namespace: None,
            kubernetes_api: server.url().parse().unwrap(),
            kubernetes_account_dir: server.account(),
        };
        let (metrics, lifecycle) = (Metrics::new(), Lifecycle::new());
        let pods = settings.start(TIMING, KubernetesMetrics::new(&metrics), &lifecycle).await.unwrap();
        Self { pods, metrics, lifecycle }
    }

    /// The same, once the first view is there.
    async fn begun(server: &ApiServer) -> Self {
        let watching = Self::start(server).await;
        watching.is_current(true).await;
        watching
    }

    /// Waits until the view is current, or is not: only a current one refuses who is not in it.
    async fn is_current(&self, current: bool) {
        let what = if current { "a current view" } else { "a view that is out of date" };
        eventually(what, || async { self.pods.current().may_take("nobody") != current }).await;
        let expected = i64::from(current);
        eventually("the gauge says so", || async {
            self.count("midspan_kubernetes_current", &[]) == expected
        })
        .await;
    }

    /// Waits until the edges that may take streams are these, of `edge-0` to `edge-3`.
    async fn takes(&self, expected: &[&str]) {
        let what = format!("streams go to {expected:?}");
        eventually(&what, || async {
            let pods = self.pods.current();
            let edges = ["edge-0", "edge-1", "edge-2", "edge-3"].into_iter();
            edges.filter(|edge| pods.may_take(edge)).eq(expected.iter().copied())
        })
        .await;
    }

    /// Waits until failures of a kind were counted.
    async fn fails(&self, failure: &str) {
        let name = "midspan_kubernetes_failures_total";
        let what = format!("a failure: {failure}");
        eventually(&what, || async { self.count(name, &[("failure", failure)]) > 0 }).await;
    }

    fn failures(&self) -> i64 {
        self.count("midspan_kubernetes_failures_total", &[])
    }

    fn count(&self, name: &str, labels: &[(&str, &str)]) -> i64 {
        testkit::Metrics::parse(&self.metrics.render()).count(name, labels)
    }

    async fn stop(self) {
        self.lifecycle.stopped().cancel();
        within("the end of the watch", self.lifecycle.finished()).await;
    }
}

#[tokio::test]
async fn pods_come_become_ready_and_go() {
    let server = ApiServer::start().await;
    let (ready, starting, leaving) =
        (conditions(true, false), conditions(false, false), conditions(false, true));
    server.put("a", &[("edge-0", ready.clone())]);
    let watching = Watching::begun(&server).await;
    watching.takes(&["edge-0"]).await;
    server.put("b", &[("edge-1", starting.clone()), ("edge-2", ready.clone())]);
    watching.takes(&["edge-0", "edge-2"]).await;
    server.put("b", &[("edge-1", ready.clone()), ("edge-2", ready.clone())]);
    watching.takes(&["edge-0", "edge-1", "edge-2"]).await;
    server.put("a", &[("edge-0", leaving.clone())]);
    watching.takes(&["edge-1", "edge-2"]).await;
    server.put("a", &[]);
    watching.takes(&["edge-1", "edge-2"]).await;
    // A pod in two slices, as with two families of addresses, leaves with the first that says so.
    server.put("c", &[("edge-2", leaving)]);
    watching.takes(&["edge-1"]).await;
    server.delete("c");
    watching.takes(&["edge-1", "edge-2"]).await;
    server.delete("b");
    watching.takes(&[]).await;
    assert_eq!(watching.failures(), 0);
    // Nothing was asked for but what the role allows.
    for asked in server.asked() {
        let slices = "GET /apis/discovery.k8s.io/v1/namespaces/relay/endpointslices?";
        assert!(asked.what.starts_with(slices), "{}", asked.what);
    }
    watching.stop().await;
}

#[tokio::test]
async fn a_watch_goes_on_where_the_last_one_ended_or_broke() {
    let server = ApiServer::start().await;
    server.put("a", &[("edge-0", conditions(true, false))]);
    let watching = Watching::begun(&server).await;
    let lists = || server.asked().iter().filter(|asked| !asked.what.contains("watch=true")).count();
    // Watches here end after a second, so some end by themselves.
    for round in 0..6 {
        server.cut();
        server.put("a", &[("edge-0", conditions(round % 2 == 1, false))]);
        watching.takes(if round % 2 == 1 { &["edge-0"] } else { &[] }).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!((lists(), watching.failures()), (1, 0));
    watching.stop().await;
}

#[tokio::test]
async fn whatever_the_server_does_the_last_view_holds_until_it_is_out_of_date_and_is_right_again_later() {
    let cases = [
        (Mood::Away, "unreachable"),
        (Mood::Silent, "timed_out"),
        (Mood::Answers(401), "refused"),
        (Mood::Answers(403), "refused"),
        (Mood::Answers(410), "gone"),
        (Mood::Answers(429), "throttled"),
        (Mood::Answers(500), "server_error"),
        (Mood::Answers(503), "server_error"),
        (Mood::AnswersWatches(403), "refused"),
        (Mood::AnswersWatches(410), "gone"),
        (Mood::AnswersWatches(500), "server_error"),
        (Mood::GoneEvents, "gone"),
        (Mood::Nonsense, "unreadable"),
        (Mood::Endless, "unreadable"),
    ];
    let mut all = tokio::task::JoinSet::new();
    for (mood, failure) in cases {
        all.spawn(async move {
            let server = ApiServer::start().await;
            let (ready, leaving) = (conditions(true, false), conditions(false, true));
            server.put("a", &[("edge-0", ready.clone()), ("edge-1", leaving.clone())]);
            server.put("b", &[("edge-2", conditions(false, false))]);
            let watching = Watching::begun(&server).await;
            watching.takes(&["edge-0"]).await;
            server.set_mood(mood);
            server.cut();
            watching.fails(failure).await;
            // Out of date: who was not ready and who was not there may be by now; who was leaving has left.
            watching.is_current(false).await;
            watching.takes(&["edge-0", "edge-2", "edge-3"]).await;
            server.put("a", &[("edge-0", leaving), ("edge-3", ready)]);
            server.delete("b");
            server.set_mood(Mood::Well);
            // It is not tried all the time.
            let patient = Duration::from_secs(40);
            let back = async {
                while watching.pods.current().may_take("nobody") {
                    tokio::time::sleep(TIMING.proof).await;
                }
            };
            assert!(tokio::time::timeout(patient, back).await.is_ok(), "{mood:?}");
            watching.takes(&["edge-3"]).await;
            watching.stop().await;
        });
    }
    while let Some(case) = all.join_next().await {
        case.unwrap();
    }
}

#[tokio::test]
async fn a_token_that_has_expired_is_read_again() {
    let server = ApiServer::start().await;
    server.put("a", &[("edge-0", conditions(true, false))]);
    let watching = Watching::begun(&server).await;
    server.take_token("second");
    watching.fails("refused").await;
    watching.is_current(false).await;
    server.put("a", &[("edge-1", conditions(true, false))]);
    server.give_token("second");
    watching.is_current(true).await;
    watching.takes(&["edge-1"]).await;
    watching.stop().await;
}

#[tokio::test]
async fn an_old_answer_does_not_last() {
    let server = ApiServer::start().await;
    server.put("a", &[("edge-0", conditions(true, false)), ("edge-1", conditions(true, false))]);
    let watching = Watching::begun(&server).await;
    server.remember();
    server.put("a", &[("edge-0", conditions(false, true)), ("edge-1", conditions(true, false))]);
    watching.takes(&["edge-1"]).await;
    // The replica of the API server that answers now is behind: it refuses what is newer, and lists what was.
    server.set_mood(Mood::Stale);
    server.cut();
    watching.takes(&["edge-0", "edge-1"]).await;
    server.set_mood(Mood::Well);
    watching.takes(&["edge-1"]).await;
    watching.stop().await;
}

#[tokio::test]
async fn a_server_that_is_not_there_at_the_start_comes_later() {
    let server = ApiServer::start().await;
    server.set_mood(Mood::Away);
    server.put("a", &[("edge-0", conditions(true, false))]);
    let watching = Watching::start(&server).await;
    watching.fails("unreachable").await;
    watching.takes(&["edge-0", "edge-1", "edge-2", "edge-3"]).await;
    server.set_mood(Mood::Well);
    watching.is_current(true).await;
    watching.takes(&["edge-0"]).await;
    watching.stop().await;
}

#[tokio::test]
async fn nobody_but_the_clusters_own_server_is_believed() {
    let (server, other) = (ApiServer::start().await, ApiServer::start().await);
    std::fs::copy(other.account().join("ca.crt"), server.account().join("ca.crt")).unwrap();
    let watching = Watching::start(&server).await;
    watching.fails("unreachable").await;
    assert!(server.asked().is_empty(), "a token went to a stranger");
    watching.stop().await;
}

#[tokio::test]
async fn a_server_is_not_asked_more_often_than_it_bears() {
    let server = ApiServer::start().await;
    let watching = Watching::begun(&server).await;
    server.set_mood(Mood::ShortWatches);
    server.cut();
    let begin = (Instant::now(), server.asked().len());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let asked = server.asked().len() - begin.1;
    let most = begin.0.elapsed().as_millis() / TIMING.between_requests.as_millis() + 2;
    assert!(asked > 1 && asked as u128 <= most, "{asked} requests, at most {most}");
    // Who is told to come back later does.
    server.set_mood(Mood::Answers(429));
    watching.fails("throttled").await;
    let refused = server.asked().last().unwrap().at;
    server.set_mood(Mood::Well);
    let next =
        until("another request", || async { server.asked().into_iter().find(|asked| asked.at > refused) })
            .await;
    assert!(next.at - refused >= Duration::from_secs(1), "asked again after {:?}", next.at - refused);
    watching.stop().await;
}

#[tokio::test]
async fn a_service_account_that_is_not_there_is_an_error_of_the_start() {
    let server = ApiServer::start().await;
    std::fs::remove_file(server.account().join("token")).unwrap();
    let settings = KubernetesSettings {
        kubernetes_edges_service: Some(server.service().to_owned()),
        kubernetes_namespace: None,
        kubernetes_api: server.url().parse().unwrap(),
        kubernetes_account_dir: server.account(),
    };
    let metrics = KubernetesMetrics::new(&Metrics::new());
    let error = settings.start(TIMING, metrics, &Lifecycle::new()).await.unwrap_err();
    assert!(format!("{error:#}").contains("token"), "{error:#}");
}
