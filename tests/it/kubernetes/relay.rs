//! A whole relay whose control plane asks Kubernetes.

use std::time::Duration;

use serde_json::Value;
use testkit::{ApiServer, DeviceLink, Fleet, Mood, conditions, eventually};

/// Two edges and a control plane that asks `server`, which calls both ready.
async fn fleet(server: &ApiServer) -> (Fleet, DeviceLink) {
    say(server, [conditions(true, false), conditions(true, false)]);
    let mut fleet = Fleet::start(0, 2).await;
    let flags = server.flags();
    fleet.add_control(&flags.each_ref().map(String::as_str)).await;
    logged(&fleet, "EndpointSlices are watched", 1).await;
    let link = fleet.device("dev1", 0).await;
    // Both have been seen, and take streams.
    while owners(&fleet, &mut fleet.device("dev2", 0).await, "dev2", 8).await.len() < 2 {}
    (fleet, link)
}

fn say(server: &ApiServer, pods: [Value; 2]) {
    let [first, second] = pods;
    server.put("edges-abc", &[("edge-0", first), ("edge-1", second)]);
}

/// Waits until the control plane has logged something so many times: longer than for most things, since a server that was
/// away is not asked again at once.
async fn logged(fleet: &Fleet, what: &str, times: usize) {
    let logged = async {
        while fleet.controls[0].log().matches(what).count() < times {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(60), logged).await.is_ok(), "not logged: {what}");
}

/// Opens streams whose legs meet and carry bytes, and gives the edges that own them.
async fn owners(fleet: &Fleet, link: &mut DeviceLink, device: &str, count: usize) -> Vec<usize> {
    let mut owners = Vec::new();
    for _ in 0..count {
        let handshake = fleet.handshake(0, device, link).await;
        owners.push(fleet.owner(handshake.grant.stream).await);
    }
    owners.sort_unstable();
    owners.dedup();
    owners
}

#[tokio::test]
async fn an_edge_that_is_terminating_gets_no_new_streams_though_its_lease_accepts() {
    let server = ApiServer::start().await;
    let (mut fleet, mut link) = fleet(&server).await;
    let changes = fleet.controls[0].log().matches("an edge's pod has changed").count();
    say(&server, [conditions(false, true), conditions(true, false)]);
    logged(&fleet, "an edge's pod has changed", changes + 1).await;
    assert_eq!(owners(&fleet, &mut link, "dev1", 12).await, [1]);
    // The API server goes away: the last view holds, and streams are placed.
    server.set_mood(Mood::Away);
    assert_eq!(owners(&fleet, &mut link, "dev1", 12).await, [1]);
    // A control plane that starts meanwhile is ready, and goes by the leases.
    fleet.controls[0].terminate();
    assert!(fleet.controls[0].wait_exit().await.success());
    fleet.controls[0].restart().await;
    let mut link = fleet.device("dev1", 0).await;
    eventually("streams go to both edges", || async {
        let mut link = fleet.device("dev2", 0).await;
        owners(&fleet, &mut link, "dev2", 8).await == [0, 1]
    })
    .await;
    server.set_mood(Mood::Well);
    logged(&fleet, "EndpointSlices are watched", 1).await;
    assert_eq!(owners(&fleet, &mut link, "dev1", 12).await, [1]);
}

#[tokio::test]
async fn an_edge_that_died_without_a_word_gets_no_new_streams_once_kubernetes_knows() {
    let server = ApiServer::start().await;
    let (mut fleet, mut link) = fleet(&server).await;
    fleet.edges[0].kill();
    server.put("edges-abc", &[("edge-1", conditions(true, false))]);
    logged(&fleet, "an edge's pod has gone", 1).await;
    for _ in 0..8 {
        let handshake = fleet.handshake(0, "dev1", &mut link).await;
        let (mut service, mut device) = fleet.legs(&handshake, [1, 1]).await;
        service.send_binary(vec![7; 100]).await;
        assert_eq!(device.next_binary().await.as_ref(), [7; 100]);
    }
}

#[tokio::test]
async fn when_kubernetes_calls_no_edge_ready_leases_alone_decide() {
    let server = ApiServer::start().await;
    let (fleet, mut link) = fleet(&server).await;
    say(&server, [conditions(false, false), conditions(false, false)]);
    logged(&fleet, "Kubernetes calls none of the edges ready", 1).await;
    assert_eq!(owners(&fleet, &mut link, "dev1", 12).await, [0, 1]);
    say(&server, [conditions(false, false), conditions(true, false)]);
    logged(&fleet, "edges are ready again", 1).await;
    assert_eq!(owners(&fleet, &mut link, "dev1", 12).await, [1]);
}
