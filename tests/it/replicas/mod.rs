//! Several control replicas as one relay: wherever a device is linked, whichever replica a service asks, whatever breaks.
//!
//! All run in one process whose clock stands still while anybody has something to do, so that seconds cost nothing and times
//! are exact.

mod fleet;
mod relay;

use std::time::Duration;

use http::Method;
use midspan_core::link::GoodbyeReason;
use serde_json::json;
use tokio::time::{Instant, sleep};

use self::relay::{Fault, Relay};

#[tokio::test(start_paused = true)]
async fn a_device_is_asked_over_the_link_of_another_replica() {
    let relay = Relay::start().await;
    let (a, b) = (relay.replica("a").await, relay.replica("b").await);
    let mut device = b.device("dev1").await;
    assert!(a.is_connected().await && b.is_connected().await);

    relay.mesh.calls();
    relay.store.trips();
    let (answer, trips) = tokio::join!(a.open(), async {
        let invitation = device.next_request().await;
        let trips = relay.store.trips();
        device.accept(invitation.request).await;
        trips
    });
    answer.grant();
    assert_eq!(trips, 1, "one trip to the store until the device is asked");
    assert_eq!(relay.mesh.calls(), ["a -> b /internal/v1/invitations"]);

    let (answer, ()) = tokio::join!(a.open(), async {
        let invitation = device.next_request().await;
        device.reject(invitation.request, "not today").await;
    });
    assert_eq!(answer.problem(409, "device_rejected").device_reason.as_deref(), Some("not today"));
    let (answer, _) = tokio::join!(a.open(), device.next_request());
    answer.problem(504, "device_silent");
    assert_eq!(a.count("midspan_control_asked_elsewhere_total"), 3);
    assert_eq!(b.count("midspan_control_asked_elsewhere_total"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_hangs_up_is_not_waited_for_elsewhere() {
    let relay = Relay::start().await;
    let (a, b) = (relay.replica("a").await, relay.replica("b").await);
    let mut device = b.device("dev1").await;
    let invitation = tokio::select! {
        answer = a.open() => panic!("nobody answered, but there is {answer:?}"),
        invitation = device.next_request() => invitation,
    };
    sleep(Duration::from_millis(10)).await;
    device.accept(invitation.request).await;
    sleep(Duration::from_millis(10)).await;
    assert_eq!(b.count("midspan_control_unexpected_answers_total"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_device_that_comes_online_elsewhere_is_found_at_once() {
    let relay = Relay::start().await;
    let (a, c) = (relay.replica("a").await, relay.replica("c").await);
    let (answer, came) = tokio::join!(a.open(), async {
        sleep(Duration::from_millis(500)).await;
        let came = Instant::now();
        let mut device = c.device("dev1").await;
        device.accept_next().await;
        came
    });
    answer.grant();
    assert_eq!(came.elapsed(), Duration::ZERO, "nothing was waited for but the device");
}

#[tokio::test(start_paused = true)]
async fn a_device_on_a_replica_that_has_just_come_is_found() {
    let relay = Relay::start().await;
    let a = relay.replica("a").await;
    let c = relay.replica_at_once("c").await;
    let mut device = c.device("dev1").await;
    let nothing = json!({ "name": "test", "connect_timeout_seconds": 0 });
    let (answer, _) = tokio::join!(a.open_with(&nothing), device.accept_next());
    answer.grant();
}

#[tokio::test(start_paused = true)]
async fn a_device_that_comes_online_is_found_also_when_the_news_are_lost() {
    let relay = Relay::start().await;
    let (a, c) = (relay.replica("a").await, relay.replica("c").await);
    relay.mesh.break_calls("a", Fault::Unreachable);
    let (answer, ()) = tokio::join!(a.open(), async {
        sleep(Duration::from_millis(500)).await;
        c.device("dev1").await.accept_next().await;
    });
    answer.grant();
}

#[tokio::test(start_paused = true)]
async fn a_newer_link_replaces_the_older_one_on_another_replica() {
    let relay = Relay::start().await;
    let (a, b, c) = (relay.replica("a").await, relay.replica("b").await, relay.replica("c").await);
    let mut older = b.device("dev1").await;
    let mut newer = c.device("dev1").await;
    assert_eq!(older.next_goodbye().await.reason, GoodbyeReason::Replaced);
    assert_eq!(older.closed().await, Some(1008));
    for replica in [&a, &b, &c] {
        let (answer, _) = tokio::join!(replica.open(), newer.accept_next());
        answer.grant();
    }
}

#[tokio::test(start_paused = true)]
async fn a_link_whose_replacement_nobody_told_of_is_not_asked() {
    let relay = Relay::start().await;
    let (b, c) = (relay.replica("b").await, relay.replica("c").await);
    let mut older = b.device("dev1").await;
    relay.mesh.break_calls("b", Fault::Unreachable);
    let mut newer = c.device("dev1").await;
    let (answer, _) = tokio::join!(b.open(), newer.accept_next());
    answer.grant();
    // Whoever sees both knows which one is older.
    assert_eq!(older.next_goodbye().await.reason, GoodbyeReason::Replaced);
}

#[tokio::test(start_paused = true)]
async fn a_device_is_asked_again_when_the_replica_of_its_link_dies() {
    let relay = Relay::start().await;
    let (a, b, c) = (relay.replica("a").await, relay.replica("b").await, relay.replica("c").await);
    let mut device = b.device("dev1").await;
    let (answer, ()) = tokio::join!(a.open(), async {
        let first = device.next_request().await;
        b.kill(&relay);
        drop(device);
        sleep(Duration::from_secs(1)).await;
        let second = c.device("dev1").await.accept_next().await;
        assert_eq!(first.request, second.request, "it is the same request");
    });
    answer.grant();
}

#[tokio::test(start_paused = true)]
async fn a_dead_replica_has_no_devices() {
    let relay = Relay::start().await;
    let (a, b) = (relay.replica("a").await, relay.replica("b").await);
    let mut device = b.device("dev1").await;
    let (answer, ()) = tokio::join!(a.open(), async {
        device.next_request().await;
        b.kill(&relay);
    });
    let problem = answer.problem(503, "invitation_failed");
    assert!(problem.retry, "the device may be back at once");
    sleep(Duration::from_secs(3)).await;
    assert!(!a.is_connected().await);
    a.open_with(&json!({ "name": "test", "connect_timeout_seconds": 0 }))
        .await
        .problem(404, "device_offline");
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_cannot_be_reached_is_no_silent_device() {
    let relay = Relay::start().await;
    let (a, b) = (relay.replica("a").await, relay.replica("b").await);
    let _device = b.device("dev1").await;
    relay.mesh.break_calls("b", Fault::Unreachable);
    let asked = Instant::now();
    a.open().await.problem(503, "invitation_failed");
    assert!(asked.elapsed() <= Duration::from_secs(5), "{:?}", asked.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_lost_on_the_way_is_asked_for_again() {
    let relay = Relay::start().await;
    let (a, b) = (relay.replica("a").await, relay.replica("b").await);
    let mut device = b.device("dev1").await;
    relay.mesh.break_calls("b", Fault::LosesAnswer);
    let (answer, (first, second)) =
        tokio::join!(a.open(), async { (device.accept_next().await, device.accept_next().await) });
    assert_eq!(first.request, second.request);
    assert_eq!(answer.grant().stream, first.stream);
}

#[tokio::test(start_paused = true)]
async fn an_answer_over_a_new_link_counts_only_where_somebody_waits() {
    let relay = Relay::start().await;
    let (a, b, c) = (relay.replica("a").await, relay.replica("b").await, relay.replica("c").await);
    let mut first = b.device("dev1").await;
    // Nobody waits at c yet: the answer is dropped, and the device asked once more.
    let (answer, _second) = tokio::join!(a.open(), async {
        let request = first.next_request().await.request;
        relay.mesh.break_calls("b", Fault::Unreachable);
        let mut second = c.device("dev1").await;
        second.accept(request).await;
        sleep(Duration::from_millis(10)).await;
        assert_eq!(c.count("midspan_control_unexpected_answers_total"), 1);
        drop(first);
        assert_eq!(second.accept_next().await.request, request);
        second
    });
    answer.grant();
}

#[tokio::test(start_paused = true)]
async fn an_answer_over_a_new_link_to_the_replica_that_asks_counts() {
    let relay = Relay::start().await;
    let (a, b) = (relay.replica("a").await, relay.replica("b").await);
    let mut first = b.device("dev1").await;
    let (answer, _second) = tokio::join!(a.open(), async {
        let request = first.next_request().await.request;
        let mut second = a.device("dev1").await;
        second.accept(request).await;
        second
    });
    answer.grant();
}

#[tokio::test(start_paused = true)]
async fn links_are_announced_again_to_a_store_that_forgot_them() {
    let relay = Relay::start().await;
    let (a, b) = (relay.replica("a").await, relay.replica("b").await);
    let mut device = b.device("dev1").await;
    relay.store.forget();
    let nothing = json!({ "name": "test", "connect_timeout_seconds": 0 });
    a.open_with(&nothing).await.problem(503, "unavailable");
    let forgot = Instant::now();
    let (answer, _) = tokio::join!(a.open(), device.accept_next());
    answer.grant();
    sleep(Duration::from_secs(5).saturating_sub(forgot.elapsed())).await;
    assert!(a.is_connected().await);
    // A link that ended in between is not brought back.
    relay.store.forget();
    drop(device);
    sleep(Duration::from_secs(5)).await;
    assert!(!a.is_connected().await);
}

#[tokio::test(start_paused = true)]
async fn an_older_link_that_is_announced_again_gives_way_to_the_newer_one() {
    let relay = Relay::start().await;
    let (b, c) = (relay.replica("b").await, relay.replica("c").await);
    let mut older = b.device("dev1").await;
    relay.mesh.break_calls("b", Fault::Unreachable);
    let mut newer = c.device("dev1").await;
    relay.store.forget();
    sleep(Duration::from_secs(3)).await;
    for replica in [&b, &c] {
        let (answer, _) = tokio::join!(replica.open(), newer.accept_next());
        answer.grant();
    }
    older.next_goodbye().await;
}

#[tokio::test(start_paused = true)]
async fn while_the_store_is_away_links_stay_and_new_ones_are_announced_later() {
    let relay = Relay::start().await;
    let (a, b) = (relay.replica("a").await, relay.replica("b").await);
    relay.store.set_away(true);
    sleep(Duration::from_secs(1)).await;
    let mut device = b.device("dev1").await;
    let asked = Instant::now();
    let problem = b.open().await.problem(503, "unavailable");
    assert!(problem.retry_after_seconds.is_some());
    assert_eq!(asked.elapsed(), Duration::ZERO);
    a.request(Method::GET, "/v1/devices/dev1", "").await.problem(503, "unavailable");
    sleep(Duration::from_secs(30)).await;
    relay.store.set_away(false);
    sleep(Duration::from_secs(5)).await;
    let (answer, _) = tokio::join!(a.open(), device.accept_next());
    answer.grant();

    // An end that could not be told is told later, too.
    relay.store.set_away(true);
    drop(device);
    sleep(Duration::from_secs(1)).await;
    relay.store.set_away(false);
    sleep(Duration::from_secs(5)).await;
    assert!(!a.is_connected().await);
}

#[tokio::test(start_paused = true)]
async fn a_device_is_never_offline_while_its_replica_drains() {
    let relay = Relay::start().await;
    let (a, b, c) = (relay.replica("a").await, relay.replica("b").await, relay.replica("c").await);
    let mut old = b.device("dev1").await;
    let nothing = json!({ "name": "test", "connect_timeout_seconds": 0 });
    let story = async {
        let goodbye = old.next_goodbye().await;
        assert_eq!((goodbye.reason, goodbye.come_back_seconds), (GoodbyeReason::Draining, 1));
        // It is still asked over the old link, and what it owes there is waited for.
        let (answer, _) = tokio::join!(a.open_with(&nothing), old.accept_next());
        answer.grant();
        let (answer, new) = tokio::join!(a.open_with(&nothing), async {
            let request = old.next_request().await.request;
            let new = c.device("dev1").await;
            sleep(Duration::from_secs(1)).await;
            old.accept(request).await;
            assert_eq!(old.closed().await, Some(1012));
            new
        });
        answer.grant();
        new
    };
    let begin = Instant::now();
    let ((), mut new) = tokio::join!(b.drain(Duration::from_secs(30)), story);
    assert!(begin.elapsed() < Duration::from_secs(10), "it ends with its last link: {:?}", begin.elapsed());
    let (answer, _) = tokio::join!(a.open_with(&nothing), new.accept_next());
    answer.grant();
    assert!(a.is_connected().await);
}

#[tokio::test(start_paused = true)]
async fn links_that_go_nowhere_are_cut_at_the_end_of_the_grace_time() {
    let relay = Relay::start().await;
    let (a, b) = (relay.replica("a").await, relay.replica("b").await);
    let mut device = b.device("dev1").await;
    let begin = Instant::now();
    tokio::join!(b.drain(Duration::from_secs(8)), async {
        device.next_goodbye().await;
        assert_eq!(device.closed().await, Some(1012));
    });
    assert!(begin.elapsed() >= Duration::from_secs(8), "{:?}", begin.elapsed());
    assert!(!a.is_connected().await);
}

#[tokio::test(start_paused = true)]
async fn a_replica_with_far_more_links_lets_some_go() {
    let relay = Relay::start().await;
    let (a, b) = (relay.replica("a").await, relay.replica("b").await);
    let mut devices = Vec::new();
    for number in 0..60 {
        let name = format!("dev{number}");
        devices.push((a.device(&name).await, name));
    }
    let mut moved = 0;
    for _ in 0..30 {
        sleep(Duration::from_secs(1)).await;
        let before = moved;
        for (device, name) in &mut devices {
            if device.is_told_to_move().await {
                moved += 1;
                *device = b.device(name).await;
            }
        }
        assert!(moved - before <= 2, "{} at once", moved - before);
    }
    // The mean is 30; a quarter more, and 16, may stay.
    assert!((7..=9).contains(&moved), "{moved} links were let go");
    assert_eq!(a.count("midspan_control_device_links"), 60 - moved);
}

#[tokio::test(start_paused = true)]
async fn a_stream_whose_edge_is_lost_is_not_granted() {
    let relay = Relay::start().await;
    let (a, b) = (relay.replica("a").await, relay.replica("b").await);
    let mut device = b.device("dev1").await;
    let (answer, invitation) = tokio::join!(a.open(), async {
        let invitation = device.next_request().await;
        relay.lose_edge().await;
        device.accept(invitation.request).await;
        invitation
    });
    answer.problem(503, "edge_lost");
    let record = a.request(Method::GET, &format!("/v1/streams/{}", invitation.stream), "").await.record();
    assert!(record.is_ended());
}
