//! Many processes around a Redis are one relay.

use sha2::{Digest as _, Sha256};
use testkit::{Fleet, Leg, pattern};

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
