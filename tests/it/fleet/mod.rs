//! Many processes around a Redis are one relay.

mod load;

use futures_util::StreamExt as _;
use secrecy::ExposeSecret as _;
use sha2::{Digest as _, Sha256};
use testkit::{Fleet, Handshake, Leg, eventually, pattern, until, within};

/// Sends some bytes each way, and compares what arrives by its hash.
async fn carries(service: &mut Leg, device: &mut Leg) {
    let data = pattern(100_000);
    service.send_binary(data.clone()).await;
    assert_eq!(Sha256::digest(device.next_binary().await), Sha256::digest(&data));
    device.send_binary(data.clone()).await;
    assert_eq!(Sha256::digest(service.next_binary().await), Sha256::digest(&data));
}

#[tokio::test]
async fn the_legs_of_a_stream_meet_wherever_they_arrive() {
    let fleet = Fleet::start(1, 3).await;
    let mut link = fleet.device("dev1", 0).await;
    let mut forwarded = 0;
    for (n, at) in [[0, 0], [0, 1], [1, 2], [2, 0], [1, 1], [2, 2]].into_iter().enumerate() {
        let handshake = fleet.handshake(0, "dev1", &mut link).await;
        let owner = fleet.owner(handshake.grant.stream).await;
        forwarded += at.iter().filter(|&&edge| edge != owner).count();
        let (mut service, mut device) = fleet.legs(&handshake, at).await;
        carries(&mut service, &mut device).await;
        if n % 2 == 0 {
            service.close(1000, "").await;
        } else {
            device.close(1000, "").await;
        }
        let (_, _) = tokio::join!(service.closed(), device.closed());
    }
    // As many legs came to the wrong edge as were passed on, and nothing is left.
    let mut total = 0;
    for edge in &fleet.edges {
        for role in ["service", "device"] {
            edge.counts("midspan_edge_forwarded_legs", &[("role", role)], 0).await;
        }
        edge.counts("midspan_edge_legs", &[], 0).await;
        total += edge.log().matches("\"leg forwarded\"").count();
    }
    assert_eq!(total, forwarded);
    assert!(forwarded > 0);
}

#[tokio::test]
async fn a_stream_is_ended_at_its_owner_from_outside() {
    let fleet = Fleet::start(1, 2).await;
    let mut link = fleet.device("dev1", 0).await;
    let handshake = fleet.handshake(0, "dev1", &mut link).await;
    // One of the legs comes through the other edge.
    let (mut service, mut device) = fleet.legs(&handshake, [0, 1]).await;
    carries(&mut service, &mut device).await;
    fleet.service(0).delete(&format!("/v1/streams/{}", handshake.grant.stream)).await.expect(204);
    tokio::join!(service.ends(1001, "deleted"), device.ends(1001, "deleted"));
    fleet.service(0).ended(handshake.grant.stream, "deleted").await;
}

#[tokio::test]
async fn the_streams_of_an_edge_that_dies_end_with_a_record_and_others_flow_on() {
    let mut fleet = Fleet::start(1, 2).await;
    let mut link = fleet.device("dev1", 0).await;
    // Some of each edge, all legs where they belong.
    let mut streams: Vec<(usize, Handshake, Leg, Leg)> = Vec::new();
    while !(0..2).all(|edge| streams.iter().filter(|(owner, ..)| *owner == edge).count() >= 2) {
        let handshake = fleet.handshake(0, "dev1", &mut link).await;
        let owner = fleet.owner(handshake.grant.stream).await;
        let (service, device) = fleet.legs(&handshake, [owner, owner]).await;
        streams.push((owner, handshake, service, device));
    }
    fleet.edges[0].kill();
    for (owner, handshake, service, device) in &mut streams {
        if *owner == 1 {
            carries(service, device).await;
            continue;
        }
        for leg in [service, device] {
            let end = within("the end of a leg", leg.socket.next()).await;
            assert!(!matches!(end, Some(Ok(_))), "{end:?}");
        }
        fleet.service(0).ended(handshake.grant.stream, "edge_lost").await;
    }
    let lost = |record: &serde_json::Value| record["resultType"] == "edge_lost";
    let of_first = streams.iter().filter(|(owner, ..)| *owner == 0).count();
    eventually("each end is recorded", || async {
        fleet.activity().iter().filter(|record| lost(record)).count() == of_first
    })
    .await;
    // New ones are placed where they can be joined, once the replica has looked who is there, and under the old name once it is
    // back.
    within("four streams in a row of the edge that is left", async {
        let mut in_a_row = 0;
        while in_a_row < 4 {
            let handshake = fleet.handshake(0, "dev1", &mut link).await;
            in_a_row = if fleet.owner(handshake.grant.stream).await == 1 { in_a_row + 1 } else { 0 };
        }
    })
    .await;
    fleet.edges[0].restart().await;
    until("a stream of the edge that came back", || async {
        let mut link = fleet.device("dev2", 0).await;
        let handshake = fleet.handshake(0, "dev2", &mut link).await;
        (fleet.owner(handshake.grant.stream).await == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_ticket_of_an_edge_that_has_gone_is_refused_at_once_everywhere() {
    let mut fleet = Fleet::start(1, 2).await;
    let mut link = fleet.device("dev1", 0).await;
    let handshake = loop {
        let handshake = fleet.handshake(0, "dev1", &mut link).await;
        if fleet.owner(handshake.grant.stream).await == 0 {
            break handshake;
        }
    };
    let leg = async |fleet: &Fleet, edge: usize| {
        let grant = &handshake.grant;
        let opened = Leg::try_open(&fleet.edges[edge].target, &grant.url, grant.ticket.expose_secret(), &[]);
        opened.await.expect_err("there is nobody to join it")
    };
    fleet.edges[0].kill();
    leg(&fleet, 1).await.problem(410, "owner_gone");
    fleet.edges[0].restart().await;
    leg(&fleet, 0).await.problem(410, "owner_gone");
    // It has other ports now; on Kubernetes the same address may be another's.
    leg(&fleet, 1).await.problem(410, "owner_gone");
}

#[tokio::test]
async fn an_edge_that_drains_ends_what_it_owns_and_what_it_passes_on_with_1012() {
    let mut fleet = Fleet::with(1, 2, &["--drain-grace", "1s"]).await;
    let mut link = fleet.device("dev1", 0).await;
    let mut streams: Vec<(usize, Leg, Leg)> = Vec::new();
    while !(0..2).all(|edge| streams.iter().any(|(owner, ..)| *owner == edge)) {
        let handshake = fleet.handshake(0, "dev1", &mut link).await;
        let owner = fleet.owner(handshake.grant.stream).await;
        // Each has one leg at each edge.
        let (service, device) = fleet.legs(&handshake, [0, 1]).await;
        streams.push((owner, service, device));
    }
    fleet.edges[0].terminate();
    for (_, service, device) in &mut streams {
        tokio::join!(service.ends(1012, "draining"), device.ends(1012, "draining"));
    }
    assert!(fleet.edges[0].wait_exit().await.success());
    // What is placed from now on is placed on the other one.
    let handshake = fleet.handshake(0, "dev1", &mut link).await;
    let (mut service, mut device) = fleet.legs(&handshake, [1, 1]).await;
    carries(&mut service, &mut device).await;
}

#[tokio::test]
async fn streams_flow_and_legs_join_without_the_store_and_new_ones_come_about_once_it_is_back() {
    let mut fleet = Fleet::start(1, 2).await;
    let mut link = fleet.device("dev1", 0).await;
    let handshake = fleet.handshake(0, "dev1", &mut link).await;
    let (mut service, mut device) = fleet.legs(&handshake, [0, 1]).await;
    let later = fleet.handshake(0, "dev1", &mut link).await;
    fleet.redis.kill();
    carries(&mut service, &mut device).await;
    let (mut late_service, mut late_device) = fleet.legs(&later, [1, 0]).await;
    carries(&mut late_service, &mut late_device).await;
    let refused = fleet.service(0).open("dev1").await;
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.headers.contains_key("retry-after"), "{refused:?}");
    fleet.redis.restart();
    // Everything is announced again: the list has both streams, and new ones come about.
    eventually("both streams are in the list again", || async {
        let answer = fleet.service(0).get("/v1/streams").await;
        answer.status == 200 && answer.json()["items"].as_array().is_some_and(|streams| streams.len() == 2)
    })
    .await;
    within("a new stream", async {
        let service = fleet.service(0);
        loop {
            let accept = async {
                loop {
                    let invitation = link.next_request().await;
                    link.accept(invitation.request).await;
                }
            };
            let answer = tokio::select! {
                answer = service.open("dev1") => answer,
                () = accept => unreachable!("it goes on for ever"),
            };
            if answer.status == 201 {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    })
    .await;
    carries(&mut service, &mut device).await;
}
