//! Balancers and proxies in front: whose word is taken, and whose is not.

use std::net::SocketAddr;

use midspan_core::proxy::{self, Addresses};
use testkit::{Relay, Target, until, within};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{HEADER_FAILURES, TLS_FAILURES, tcp_from, tls_over};

const CLIENT: &str = "192.0.2.7:4711";

fn header() -> Vec<u8> {
    let client: SocketAddr = CLIENT.parse().unwrap();
    proxy::write(Addresses { client, server: SocketAddr::from(([198, 51, 100, 1], 443)) }, &[0x20, 0, 1, 7])
}

/// The address that the relay has seen in a request of this path, which is logged.
async fn seen(relay: &Relay, path: &str) -> String {
    until("the request in the log", || async {
        let records = relay.log_records().into_iter().map(|record| record.to_string());
        let line = records.filter(|line| line.contains(path)).find(|line| line.contains("client.address"))?;
        let (_, rest) = line.split_once("\"client.address\":\"")?;
        Some(rest[..rest.find('"')?].to_owned())
    })
    .await
}

/// Sends a request over a connection that begins with `first`, and gives the address that the relay has seen.
async fn asked(relay: &Relay, source: [u8; 4], first: &[u8], path: &str, headers: &[(&str, &str)]) -> String {
    let target = relay.target();
    let io = tls_over(tcp_from(source, target).await, target, first, 1).await.unwrap();
    let request = target.build(http::Method::GET, path, headers, b"");
    Target::request_over(io, request).await.unwrap();
    seen(relay, path).await
}

#[tokio::test]
async fn a_balancer_must_say_whose_connection_it_brings() {
    let relay = Relay::with(&["--proxy-protocol-from", "127.0.0.1,10.0.0.0/8", "--header-limit", "1s"]).await;
    let target = relay.target();
    for first in [&b""[..], b"PROXY TCP4 192.0.2.7 198.51.100.1 x 443\r\n", b"GET / HTTP/1.1\r\n\r\n"] {
        let tcp = tcp_from([127, 0, 0, 1], target).await;
        assert!(tls_over(tcp, target, first, 4096).await.is_err(), "{first:?}");
    }
    relay.counts(HEADER_FAILURES, &[("cause", "malformed")], 3).await;
    let mut silent = tcp_from([127, 0, 0, 1], target).await;
    silent.write_all(b"PROXY TCP4 192").await.unwrap();
    let end = within("the end of a connection without a header", silent.read(&mut [0; 8])).await;
    assert!(!matches!(end, Ok(1..)), "{end:?}");
    relay.counts(HEADER_FAILURES, &[("cause", "timeout")], 1).await;
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_balancer_is_believed_and_nobody_else() {
    let relay = Relay::with(&["--proxy-protocol-from", "127.0.0.1/32"]).await;
    let balancer = [127, 0, 0, 1];
    assert_eq!(asked(&relay, balancer, &header(), "/v1/devices/a", &[]).await, CLIENT);
    let line = b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 443\r\n";
    assert_eq!(asked(&relay, balancer, line, "/v1/devices/b", &[]).await, "[2001:db8::7]:4711");
    // A connection of its own.
    let own = asked(&relay, balancer, b"PROXY UNKNOWN\r\n", "/v1/devices/c", &[]).await;
    assert!(own.starts_with("127.0.0.1:"), "{own}");
    // From elsewhere a header is not read, and no TLS either.
    let tcp = tcp_from([127, 0, 0, 2], relay.target()).await;
    assert!(tls_over(tcp, relay.target(), &header(), 4096).await.is_err());
    relay.counts(TLS_FAILURES, &[("cause", "protocol")], 1).await;
    let direct = asked(&relay, [127, 0, 0, 2], b"", "/v1/devices/d", &[]).await;
    assert!(direct.starts_with("127.0.0.2:"), "{direct}");
    assert_eq!(relay.metrics().await.count(HEADER_FAILURES, &[]), 0);
}

#[tokio::test]
async fn a_proxy_is_believed_and_what_clients_write_is_not() {
    let relay = Relay::with(&["--forwarded-from", "127.0.0.1/32,10.0.0.0/8"]).await;
    let (proxy, stranger) = ([127, 0, 0, 1], [127, 0, 0, 2]);
    let ask =
        async |source, path: &str, headers: &[(&str, &str)]| asked(&relay, source, b"", path, headers).await;
    let chain = [("x-forwarded-for", "198.51.100.9"), ("x-forwarded-for", "192.0.2.7, 10.0.0.3")];
    assert_eq!(ask(proxy, "/v1/devices/a", &chain).await, "192.0.2.7");
    assert!(ask(stranger, "/v1/devices/b", &chain).await.starts_with("127.0.0.2:"));
    // The other header is not the proxy's word.
    let other = [("forwarded", "for=198.51.100.9")];
    assert!(ask(proxy, "/v1/devices/c", &other).await.starts_with("127.0.0.1"));
}

#[tokio::test]
async fn a_proxy_may_speak_rfc_7239_and_stand_behind_a_balancer() {
    let relay = Relay::with(&[
        "--proxy-protocol-from",
        "127.0.0.1",
        "--forwarded-from",
        "192.0.2.0/24",
        "--forwarded-header",
        "forwarded",
    ])
    .await;
    let headers = [("forwarded", "for=203.0.113.5;proto=https"), ("x-forwarded-for", "198.51.100.9")];
    assert_eq!(asked(&relay, [127, 0, 0, 1], &header(), "/v1/devices/a", &headers).await, "203.0.113.5");
}
