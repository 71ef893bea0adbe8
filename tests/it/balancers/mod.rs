//! The relay behind a real haproxy and a real nginx, as docs/balancers.md configures them.

mod balancer;
mod rolling;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use http::Method;
use rustls::pki_types::ServerName;
use secrecy::ExposeSecret as _;
use testkit::{
    Answer, DeviceLink, Flags, Fleet, Joined, Leg, ServiceApi, Target, eventually, trusting, within,
};
use tokio::{net::TcpSocket, time::timeout};
use tokio_rustls::TlsConnector;

use self::balancer::{Balancer, DOCUMENTED, Kind};

/// The balancer's time-out for quiet connections, in place of the one in the document, and how long connections are to outlive it.
const QUIET: &str = "4s";
const OUTLIVE: Duration = Duration::from_secs(9);

/// A client of its own address, to be told from the balancer.
const CLIENT: &str = "127.0.0.2:0";

/// A relay behind a balancer, as its clients see it.
struct Site {
    balancer: Balancer,
    fleet: Fleet,
    control: Target,
    edge: Target,
}

#[tokio::test]
async fn links_and_streams_outlive_the_time_out_of_haproxy() {
    Box::pin(outlives(Kind::HaproxyHttp)).await;
}

#[tokio::test]
async fn links_and_streams_outlive_the_time_out_of_haproxy_below_tls() {
    Box::pin(outlives(Kind::HaproxyTcp)).await;
}

#[tokio::test]
async fn links_and_streams_outlive_the_time_out_of_nginx() {
    Box::pin(outlives(Kind::NginxHttp)).await;
}

#[tokio::test]
async fn links_and_streams_outlive_the_time_out_of_nginx_below_tls() {
    Box::pin(outlives(Kind::NginxTcp)).await;
}

async fn outlives(kind: Kind) {
    let often =
        Flags { control: &["--link-ping", "200ms"], edge: &["--leg-ping", "200ms"], ..Flags::default() };
    let Some(site) = Site::start(kind, QUIET, often).await else { return };
    let mut link = site.device().await;
    let Joined { mut service, mut device, .. } = site.join(&mut link).await;
    let (link_stands, service_quiet, device_quiet) = tokio::join!(
        link.is_quiet_for(OUTLIVE),
        is_quiet(&mut service, OUTLIVE),
        is_quiet(&mut device, OUTLIVE)
    );
    assert!(link_stands && service_quiet && device_quiet, "{link_stands}, {service_quiet}, {device_quiet}");
    carries(&mut service, &mut device).await;
    let Joined { mut service, mut device, .. } = site.join(&mut link).await;
    carries(&mut service, &mut device).await;
}

#[tokio::test]
async fn haproxy_cuts_what_is_quiet_for_longer_than_its_time_out() {
    cuts(Kind::HaproxyHttp).await;
}

#[tokio::test]
async fn haproxy_cuts_what_is_quiet_for_longer_than_its_time_out_below_tls() {
    cuts(Kind::HaproxyTcp).await;
}

#[tokio::test]
async fn nginx_cuts_what_is_quiet_for_longer_than_its_time_out() {
    cuts(Kind::NginxHttp).await;
}

#[tokio::test]
async fn nginx_cuts_what_is_quiet_for_longer_than_its_time_out_below_tls() {
    cuts(Kind::NginxTcp).await;
}

/// The time-out is in force: with the relay's own pings, which come later, nothing outlives it.
async fn cuts(kind: Kind) {
    let Some(site) = Site::start(kind, QUIET, Flags::default()).await else { return };
    let mut link = site.device().await;
    let Joined { mut service, mut device, .. } = site.join(&mut link).await;
    let (bye, (), ()) = tokio::join!(link.ended(), ends(&mut service), ends(&mut device));
    assert_eq!(bye.goodbye, None);
}

#[tokio::test]
async fn the_address_of_a_client_reaches_the_log_through_haproxy() {
    logs_the_client(Kind::HaproxyHttp, &["--forwarded-from", "127.0.0.1/32"]).await;
}

#[tokio::test]
async fn the_address_of_a_client_reaches_the_log_through_haproxy_below_tls() {
    logs_the_client(Kind::HaproxyTcp, &[]).await;
}

#[tokio::test]
async fn the_address_of_a_client_reaches_the_log_through_nginx() {
    logs_the_client(Kind::NginxHttp, &["--forwarded-from", "127.0.0.1/32"]).await;
}

#[tokio::test]
async fn the_address_of_a_client_reaches_the_log_through_nginx_below_tls() {
    logs_the_client(Kind::NginxTcp, &[]).await;
}

/// A client that says it is somebody else is not believed.
async fn logs_the_client(kind: Kind, all: &[&str]) {
    let Some(site) = Site::start(kind, DOCUMENTED, Flags { all, ..Flags::default() }).await else { return };
    let refused = site.request_from(CLIENT.parse().unwrap(), "/v1/devices/nobody").await;
    refused.problem(401, "unauthorized");
    eventually("the client's address in a log", || async {
        let log: String = site.fleet.controls.iter().map(testkit::Member::log).collect();
        let lines: Vec<_> = log.lines().filter(|line| line.contains("/v1/devices/nobody")).collect();
        assert!(!lines.iter().any(|line| line.contains("192.0.2.1")), "{lines:?}");
        lines.iter().any(|line| line.contains("\"client.address\":\"127.0.0.2"))
    })
    .await;
}

impl Site {
    /// Two control replicas and two edges behind a balancer, or `None` where it cannot be had.
    async fn start(kind: Kind, quiet: &'static str, flags: Flags<'_>) -> Option<Self> {
        if !kind.is_installed() {
            return None;
        }
        let passed = ["--proxy-protocol-from", "127.0.0.0/8"];
        let streams = ["--edge-url", "https://streams.localhost"];
        let (mut all, mut control) = (flags.all.to_vec(), flags.control.to_vec());
        if !kind.ends_tls() {
            all.extend(passed);
            control.extend(streams);
        }
        let fleet = Fleet::with_flags(2, 2, Flags { all: &all, control: &control, ..flags }).await;
        let balancer = Balancer::start(kind, &fleet, quiet).await;
        let target = |host: &str| Target {
            address: balancer.address(),
            authority: host.to_owned(),
            tls: trusting(&fleet.ca_file()),
        };
        let (control, edge) =
            (target("localhost"), target(if kind.ends_tls() { "localhost" } else { "streams.localhost" }));
        Some(Self { balancer, fleet, control, edge })
    }

    async fn device(&self) -> DeviceLink {
        DeviceLink::connect(&self.control, &self.fleet.device_connection("dev1")).await
    }

    async fn join(&self, link: &mut DeviceLink) -> Joined {
        let service = ServiceApi::new(self.control.clone(), self.fleet.service_connection());
        let (answer, invitation) = tokio::join!(service.open("dev1"), async {
            let invitation = link.next_request().await;
            link.accept(invitation.request).await;
            invitation
        });
        let grant = answer.grant();
        let (service, device) = tokio::join!(
            Leg::open(&self.edge, &grant.url, grant.ticket.expose_secret()),
            Leg::open(&self.edge, &invitation.url, invitation.ticket.expose_secret())
        );
        Joined { id: grant.stream, service, device }
    }

    /// Asks from an address of this machine, with a header in which somebody might claim another one.
    async fn request_from(&self, from: SocketAddr, path: &str) -> Answer {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(from).unwrap();
        let tcp = within("a TCP connection", socket.connect(self.control.address)).await.unwrap();
        let name = ServerName::try_from(self.control.host().to_owned()).unwrap();
        let handshake = TlsConnector::from(Arc::clone(&self.control.tls)).connect(name, tcp);
        let io = within("a TLS handshake", handshake).await.unwrap();
        let claim = [("x-forwarded-for", "192.0.2.1")];
        Target::request_over(io, self.control.build(Method::GET, path, &claim, b"")).await.unwrap()
    }
}

/// Whether nothing but pings comes for this long.
async fn is_quiet(leg: &mut Leg, time: Duration) -> bool {
    let something = async {
        loop {
            match leg.socket.next().await {
                Some(Ok(message)) if message.is_ping() => {}
                _ => return,
            }
        }
    };
    timeout(time, something).await.is_err()
}

/// Waits until a leg is gone.
async fn ends(leg: &mut Leg) {
    within("the end of a leg", async { while let Some(Ok(_)) = leg.socket.next().await {} }).await;
}

async fn carries(service: &mut Leg, device: &mut Leg) {
    service.send_text("there").await;
    assert_eq!(device.next_text().await, "there");
    device.send_text("and back").await;
    assert_eq!(service.next_text().await, "and back");
}
