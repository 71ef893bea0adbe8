//! The ways of a leg to the edge that owns its stream: by its name, below TLS, or by a hop; and who its client is.

mod hello;
mod passed;
mod proxies;

use std::{net::IpAddr, sync::Arc};

use rustls::pki_types::ServerName;
use secrecy::ExposeSecret as _;
use sha2::{Digest as _, Sha256};
use testkit::{Fleet, Handshake, Io, Leg, Target, eventually, pattern, within};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpSocket, TcpStream},
};
use tokio_rustls::TlsConnector;

const PASSED: &str = "midspan_edge_passed_connections";
const PASSED_TOTAL: &str = "midspan_edge_passed_connections_total";
const HEADER_FAILURES: &str = "midspan_listener_proxy_header_failures_total";
const TLS_FAILURES: &str = "midspan_listener_tls_failures_total";

/// Opens both legs of a stream at edges of the test's choice, by the name that the relay gave: service, device.
async fn legs(fleet: &Fleet, handshake: &Handshake, [service, device]: [usize; 2]) -> (Leg, Leg) {
    let (grant, invitation) = (&handshake.grant, &handshake.invitation);
    let service = fleet.edges[service].target_for(&grant.url);
    let device = fleet.edges[device].target_for(&invitation.url);
    tokio::join!(
        Leg::open(&service, &grant.url, grant.ticket.expose_secret()),
        Leg::open(&device, &invitation.url, invitation.ticket.expose_secret())
    )
}

/// Sends a megabyte each way, and compares what arrives by its hash.
async fn carries(service: &mut Leg, device: &mut Leg) {
    let data = pattern(1_000_000);
    let (received, ()) = tokio::join!(device.next_binary(), service.send_binary(data.clone()));
    assert_eq!(Sha256::digest(received), Sha256::digest(&data));
    let (received, ()) = tokio::join!(service.next_binary(), device.send_binary(data.clone()));
    assert_eq!(Sha256::digest(received), Sha256::digest(&data));
}

/// How many legs an edge has forwarded by a hop.
fn forwarded(fleet: &Fleet, edge: usize) -> usize {
    fleet.edges[edge].log().matches("\"leg forwarded\"").count()
}

/// Another edge than this one, of at least two.
fn beside(fleet: &Fleet, edge: usize) -> usize {
    (edge + 1) % fleet.edges.len()
}

/// Waits until an edge knows another one: what is for that one is passed on, and not taken.
async fn knows_others(fleet: &Fleet, edge: usize) {
    let other = format!("wss://edge-{}.streams.example", beside(fleet, edge));
    let (edge, target) = (&fleet.edges[edge], fleet.edges[edge].target_for(&other));
    eventually("an edge passes on what is for another one", || async {
        let connection = target.connect().await;
        let passed = edge.metrics().await.count(PASSED, &[]) == 1;
        drop(connection);
        edge.counts("midspan_listener_connections", &[("listener", "public")], 0).await;
        passed
    })
    .await;
}

/// A TCP connection from an address of the loopback network.
async fn tcp_from(source: [u8; 4], target: &Target) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((IpAddr::from(source), 0).into()).unwrap();
    let tcp = within("a TCP connection", socket.connect(target.address)).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    tcp
}

/// A TLS connection over `tcp`, with `first` sent before it, `step` bytes at a time.
async fn tls_over(mut tcp: TcpStream, target: &Target, first: &[u8], step: usize) -> std::io::Result<Io> {
    for piece in first.chunks(step) {
        tcp.write_all(piece).await?;
        tokio::task::yield_now().await;
    }
    let name = ServerName::try_from(target.host().to_owned()).unwrap();
    let handshake = Box::pin(TlsConnector::from(Arc::clone(&target.tls)).connect(name, tcp));
    within("a TLS handshake", handshake).await
}

#[tokio::test]
async fn a_leg_that_asks_for_its_owner_arrives_there_without_a_hop() {
    let fleet = Fleet::with_names(2, &[]).await;
    let mut link = fleet.device("dev1", 0).await;
    for _ in 0..4 {
        let handshake = fleet.handshake(0, "dev1", &mut link).await;
        let owner = fleet.owner(handshake.grant.stream).await;
        let base = format!("wss://edge-{owner}.streams.example/bridges/");
        assert!(handshake.grant.url.starts_with(&base), "{}", handshake.grant.url);
        assert!(handshake.invitation.url.starts_with(&base), "{}", handshake.invitation.url);
        let (mut service, mut device) = legs(&fleet, &handshake, [owner, owner]).await;
        carries(&mut service, &mut device).await;
    }
    for edge in 0..2 {
        assert_eq!(forwarded(&fleet, edge), 0);
        fleet.edges[edge].counts(PASSED_TOTAL, &[], 0).await;
        fleet.edges[edge].counts(PASSED, &[], 0).await;
    }
    let endpoints = fleet.service(0).get("/v1/endpoints").await.expect(200).json();
    let both = ["https://edge-0.streams.example", "https://edge-1.streams.example"];
    assert_eq!(endpoints["streamingEndpoints"], serde_json::json!(both));
}

#[tokio::test]
async fn a_leg_that_asks_for_nobody_known_takes_the_hop() {
    let fleet = Fleet::with_names(2, &[]).await;
    let mut link = fleet.device("dev1", 0).await;
    let mut hops = 0;
    for name in ["localhost", "edge-7.streams.example"] {
        let handshake = fleet.handshake(0, "dev1", &mut link).await;
        let grant = &handshake.grant;
        let owner = fleet.owner(grant.stream).await;
        let wrong = &fleet.edges[beside(&fleet, owner)];
        let target = Target { authority: name.to_owned(), ..wrong.target.clone() };
        let mut service = Leg::open(&target, &grant.url, grant.ticket.expose_secret()).await;
        let invitation = &handshake.invitation;
        let target = fleet.edges[owner].target_for(&invitation.url);
        let mut device = Leg::open(&target, &invitation.url, invitation.ticket.expose_secret()).await;
        carries(&mut service, &mut device).await;
        hops += 1;
        assert_eq!(forwarded(&fleet, 0) + forwarded(&fleet, 1), hops);
        wrong.counts(PASSED, &[], 0).await;
    }
    for edge in &fleet.edges {
        edge.counts(PASSED_TOTAL, &[], 0).await;
    }
}

#[tokio::test]
async fn names_that_cannot_stand_in_a_public_name_are_told_at_once() {
    let cases: [(&[&str], &str); 5] = [
        (&["edge", "--edge-name", "Edge_1", "--owner-domain", "streams.example"], "\"Edge_1\""),
        (&["edge", "--owner-domain", "Streams.example"], "--owner-domain"),
        (&["edge", "--passed-address", "edge-0:8447"], "--passed-listen"),
        (&["edge", "--passed-listen", "0.0.0.0:0"], "--passed-address is missing"),
        (&["control", "--edge-url", "https://x-{owner}.streams.example"], "{owner}"),
    ];
    for (arguments, words) in cases {
        let mut command = testkit::binary("midspand");
        command.args(arguments).args(["--listen", "127.0.0.1:0"]);
        let mut process = testkit::Process::spawn(command);
        assert!(!process.wait_exit().await.success(), "{arguments:?} were taken");
        assert!(process.stderr().contains(words), "{arguments:?}: {}", process.stderr());
    }
}

#[tokio::test]
async fn an_edge_that_the_url_cannot_name_gives_a_clear_error() {
    let relay =
        testkit::Relay::with(&["--edge-url", "https://{owner}.streams.example", "--edge-name", "Edge_0"])
            .await;
    let _link = relay.device("dev1").await;
    let problem = relay.service().open("dev1").await.problem(500, "internal");
    assert!(problem.detail.contains("Edge_0"), "{}", problem.detail);
    eventually("the log names the flag", async || relay.log().contains("--edge-url")).await;
}
