//! Connections that are passed on below TLS.

use std::net::SocketAddr;

use futures_util::StreamExt as _;
use midspan_core::{
    id::Incarnation,
    key::Key,
    passed,
    proxy::{self, Addresses},
    ticket::TicketKeys,
    time::UnixTime,
};
use secrecy::ExposeSecret as _;
use testkit::{Fleet, Handshake, Leg, Target, eventually, now, within};
use tokio::{io::AsyncReadExt as _, net::TcpStream};

use super::{
    HEADER_FAILURES, PASSED, PASSED_TOTAL, beside, carries, forwarded, knows_others, legs, tcp_from, tls_over,
};

/// An address that no client here has.
const INVENTED: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7)), 4711);

fn from_invented() -> Addresses {
    Addresses { client: INVENTED, server: INVENTED }
}

fn seal(time: UnixTime, keys: &TicketKeys) -> Vec<u8> {
    passed::seal(from_invented(), Incarnation::from_random(1), time, keys)
}

/// A handshake whose owner is this edge.
async fn handshake_of(fleet: &Fleet, owner: usize) -> Handshake {
    let mut link = fleet.device("dev1", 0).await;
    loop {
        let handshake = fleet.handshake(0, "dev1", &mut link).await;
        if fleet.owner(handshake.grant.stream).await == owner {
            return handshake;
        }
    }
}

#[tokio::test]
async fn an_edge_that_has_gone_is_not_waited_for_and_the_client_hears_why() {
    let mut fleet = Fleet::with_names(2, &[]).await;
    knows_others(&fleet, 1).await;
    let handshake = handshake_of(&fleet, 0).await;
    fleet.edges[0].kill();
    let grant = &handshake.grant;
    let target = fleet.edges[1].target_for(&grant.url);
    let refused = Leg::try_open(&target, &grant.url, grant.ticket.expose_secret(), &[]).await;
    refused.expect_err("there is nobody to join it").problem(410, "owner_gone");
    fleet.edges[1].counts(PASSED_TOTAL, &[("result", "unreachable")], 1).await;
    // Its next life has other ports, and gets its connections there.
    fleet.edges[0].restart().await;
    knows_others(&fleet, 1).await;
    let refused = Leg::try_open(&target, &grant.url, grant.ticket.expose_secret(), &[]).await;
    refused.expect_err("there is nobody to join it").problem(410, "owner_gone");
    eventually("the new life answers itself", async || fleet.edges[0].log().contains("owner_gone")).await;
}

#[tokio::test]
async fn a_stranger_cannot_say_whose_connection_it_brings() {
    let fleet = Fleet::with_names(1, &["--header-limit", "2s"]).await;
    let edge = &fleet.edges[0];
    let named = edge.target_for("wss://edge-0.streams.example");
    let target = Target { address: edge.passed_address().await, ..named };
    let other_keys = TicketKeys::new(&Key::from_bytes(vec![9; 32]).unwrap(), None).unwrap();
    let mut altered = seal(now(), &Fleet::ticket_keys());
    altered[19] ^= 1;
    let old = UnixTime(now().0 - 60);
    let forged = [
        proxy::write(from_invented(), &[]),
        b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\r\n".to_vec(),
        seal(now(), &other_keys),
        seal(old, &Fleet::ticket_keys()),
        altered,
    ];
    let malformed = [Vec::new(), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), vec![0; 600]];
    let counts = [("forged", forged.as_slice()), ("malformed", malformed.as_slice())];
    for (cause, headers) in counts {
        for header in headers {
            let tcp = tcp_from([127, 0, 0, 3], &target).await;
            assert!(
                tls_over(tcp, &target, header, 4096).await.is_err(),
                "{cause} header was taken: {header:?}"
            );
        }
        edge.counts(HEADER_FAILURES, &[("cause", cause)], i64::try_from(headers.len()).unwrap()).await;
    }
    // Half a header, and nothing more.
    let mut tcp = tcp_from([127, 0, 0, 3], &target).await;
    tokio::io::AsyncWriteExt::write_all(&mut tcp, &seal(now(), &Fleet::ticket_keys())[..40]).await.unwrap();
    let end = within("the end of a connection that says nothing", tcp.read(&mut [0; 16])).await;
    assert!(!matches!(end, Ok(1..)), "{end:?}");
    edge.counts(HEADER_FAILURES, &[("cause", "timeout")], 1).await;
    edge.counts("midspan_listener_connections", &[("listener", "passed")], 0).await;
    assert!(!edge.log().contains("192.0.2.7"), "an invented address was believed");
}

#[tokio::test]
async fn legs_at_the_wrong_edge_are_passed_on_below_tls_and_the_owner_knows_their_clients() {
    let fleet = Fleet::with_names(2, &[]).await;
    knows_others(&fleet, 0).await;
    knows_others(&fleet, 1).await;
    for owner in [0, 1] {
        let wrong = beside(&fleet, owner);
        let before = fleet.edges[wrong].metrics().await.count(PASSED_TOTAL, &[("result", "ended")]);
        let handshake = handshake_of(&fleet, owner).await;
        let (mut service, mut device) = legs(&fleet, &handshake, [wrong, wrong]).await;
        let address = |leg: &Leg| leg.socket.get_ref().get_ref().0.local_addr().unwrap().to_string();
        let clients = [address(&service), address(&device)];
        carries(&mut service, &mut device).await;
        fleet.edges[wrong].counts(PASSED, &[], 2).await;
        let there = fleet.edges[owner].metrics().await;
        assert_eq!(there.count("midspan_listener_connections", &[("listener", "passed")]), 2);
        assert_eq!((forwarded(&fleet, 0), forwarded(&fleet, 1)), (0, 0));
        let log = fleet.edges[owner].log();
        // The line about the join has the client of the leg that came first.
        assert!(clients.iter().any(|client| log.contains(client)), "the owner does not know {clients:?}");
        device.close(1000, "").await;
        tokio::join!(service.closed(), device.closed());
        fleet.edges[wrong].counts(PASSED, &[], 0).await;
        fleet.edges[wrong].counts(PASSED_TOTAL, &[("result", "ended")], before + 2).await;
        assert!(fleet.edges[wrong].metrics().await.count("midspan_edge_passed_bytes_total", &[]) > 4_000_000);
        fleet.edges[owner].counts("midspan_listener_connections", &[("listener", "passed")], 0).await;
    }
}

#[tokio::test]
async fn a_connection_that_was_passed_on_is_not_passed_again() {
    let fleet = Fleet::with_names(2, &[]).await;
    knows_others(&fleet, 0).await;
    let handshake = handshake_of(&fleet, 1).await;
    let grant = &handshake.grant;
    // It comes to the first edge as if a third one had passed it on, and asks for the second one. In pieces, too.
    let passed_before = fleet.edges[0].metrics().await.count(PASSED_TOTAL, &[]);
    let target =
        Target { address: fleet.edges[0].passed_address().await, ..fleet.edges[0].target_for(&grant.url) };
    let tcp = tcp_from([127, 0, 0, 1], &target).await;
    let io = tls_over(tcp, &target, &seal(now(), &Fleet::ticket_keys()), 1).await.unwrap();
    let bearer = format!("Bearer {}", grant.ticket.expose_secret());
    let path = &grant.url["wss://edge-1.streams.example".len()..];
    let upgraded = target.upgrade_over(io, path, &[("authorization", &bearer)]).await.unwrap().unwrap();
    let mut service = Leg::from_upgraded(upgraded).await;
    let device = fleet.edges[1].target_for(&grant.url);
    let invitation = &handshake.invitation;
    let mut device = Leg::open(&device, &invitation.url, invitation.ticket.expose_secret()).await;
    carries(&mut service, &mut device).await;
    // It took the hop from there, and the owner was told the client that the header names.
    assert_eq!(forwarded(&fleet, 0), 1);
    assert_eq!(fleet.edges[0].metrics().await.count(PASSED_TOTAL, &[]), passed_before);
    assert_eq!(fleet.edges[0].metrics().await.count(PASSED, &[]), 0);
    eventually("the log shows it", async || fleet.edges[1].log().contains(&INVENTED.to_string())).await;
}

#[tokio::test]
async fn an_edge_that_does_not_take_connections_is_given_two_seconds_and_then_the_hop_is_taken() {
    // A port whose queue is full: who connects there hears nothing.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let deaf = socket.listen(1).unwrap();
    let address = deaf.local_addr().unwrap();
    let mut queued = Vec::new();
    let full = async {
        let short = std::time::Duration::from_millis(300);
        while let Ok(connected) = tokio::time::timeout(short, TcpStream::connect(address)).await {
            queued.push(connected.unwrap());
        }
    };
    within("a full queue", full).await;
    let fleet = Fleet::with_names(2, &["--passed-address", &address.to_string()]).await;
    let handshake = handshake_of(&fleet, 0).await;
    let unreachable = [("result", "unreachable")];
    eventually("the deaf port is tried", || async {
        drop(fleet.edges[1].target_for(&handshake.grant.url).connect().await);
        fleet.edges[1].metrics().await.count(PASSED_TOTAL, &unreachable) > 0
    })
    .await;
    let (mut service, mut device) = legs(&fleet, &handshake, [1, 0]).await;
    carries(&mut service, &mut device).await;
    assert_eq!(forwarded(&fleet, 1), 1);
}

#[tokio::test]
async fn passed_connections_share_the_places_of_the_others_at_both_ends() {
    let fleet = Fleet::with_names(2, &["--max-connections", "4"]).await;
    knows_others(&fleet, 1).await;
    let handshake = handshake_of(&fleet, 0).await;
    let (mut service, mut device) = legs(&fleet, &handshake, [1, 1]).await;
    let full = [("limit", "connections")];
    for edge in &fleet.edges {
        let _others = [edge.target.connect().await, edge.target.connect().await];
        let refused = edge.target.try_connect().await;
        assert!(refused.is_err(), "{}: a fifth connection was taken", edge.name);
        edge.counts("midspan_listener_refused_connections_total", &full, 1).await;
    }
    carries(&mut service, &mut device).await;
}

#[tokio::test]
async fn an_owner_that_dies_takes_its_passed_connections_along() {
    let mut fleet = Fleet::with_names(2, &[]).await;
    knows_others(&fleet, 1).await;
    let handshake = handshake_of(&fleet, 0).await;
    let (mut service, mut device) = legs(&fleet, &handshake, [1, 1]).await;
    carries(&mut service, &mut device).await;
    fleet.edges[0].kill();
    for leg in [&mut service, &mut device] {
        let end = within("the end of a leg", leg.socket.next()).await;
        assert!(!matches!(end, Some(Ok(_))), "{end:?}");
    }
    drop((service, device));
    fleet.edges[1].counts(PASSED, &[], 0).await;
    fleet.edges[1].counts("midspan_listener_connections", &[("listener", "public")], 0).await;
}

#[tokio::test]
async fn an_edge_that_drains_passes_on_until_the_grace_time_is_over() {
    let mut fleet = Fleet::with_names(2, &["--drain-grace", "3s", "--drain-delay", "1s"]).await;
    knows_others(&fleet, 1).await;
    let early = handshake_of(&fleet, 0).await;
    let late = handshake_of(&fleet, 0).await;
    let (mut service, mut device) = legs(&fleet, &early, [1, 0]).await;
    fleet.edges[1].terminate();
    // It still takes connections, and what was there flows.
    let (mut late_service, mut late_device) = legs(&fleet, &late, [0, 1]).await;
    carries(&mut late_service, &mut late_device).await;
    carries(&mut service, &mut device).await;
    for leg in [&mut service, &mut device, &mut late_service, &mut late_device] {
        leg.ends(1012, "draining").await;
    }
    assert!(fleet.edges[1].wait_exit().await.success());
}

#[tokio::test]
async fn an_edge_that_drains_is_not_held_up_by_connections_that_end() {
    let mut fleet = Fleet::with_names(2, &["--drain-grace", "60s"]).await;
    knows_others(&fleet, 1).await;
    let handshake = handshake_of(&fleet, 0).await;
    let (mut service, mut device) = legs(&fleet, &handshake, [1, 1]).await;
    fleet.edges[1].terminate();
    carries(&mut service, &mut device).await;
    service.close(1000, "").await;
    tokio::join!(service.closed(), device.closed());
    assert!(fleet.edges[1].wait_exit().await.success());
}
