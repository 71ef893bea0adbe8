//! Limits: on streams, on requests, on connections, on time. Each says which it is.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use midspan_core::limit::LimitName;
use secrecy::ExposeSecret as _;
use serde_json::json;
use testkit::{DeviceLink, Leg, Relay, eventually, now, within};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_tungstenite::tungstenite::Message;

#[tokio::test]
async fn streams_per_device_are_limited() {
    let relay = Relay::with(&["--limit-streams-per-device", "2"]).await;
    let (mut link, mut other) = (relay.device("dev1").await, relay.device("dev2").await);
    let mut stream = relay.join(&mut link).await;
    // Half-open ones count too.
    relay.handshake("dev1", &mut link).await;
    let limit = relay.service().open("dev1").await.problem(429, "limit_reached").limit.expect("no limit");
    assert_eq!(
        (limit.name, limit.value, limit.scope.as_str()),
        (LimitName::StreamsPerDevice, 2, "device dev1")
    );
    assert!(limit.retry_after_seconds >= 1);
    // Another device has its own.
    relay.handshake("dev2", &mut other).await;
    // An end gives the place back.
    stream.service.close(1000, "").await;
    stream.device.closed().await;
    relay.service().ended(stream.id, "service_closed").await;
    relay.handshake("dev1", &mut link).await;
}

#[tokio::test]
async fn streams_per_service_are_limited() {
    let relay = Relay::with(&["--limit-streams-per-service", "2"]).await;
    let (mut one, mut two) = (relay.device("dev1").await, relay.device("dev2").await);
    relay.handshake("dev1", &mut one).await;
    let last = relay.handshake("dev2", &mut two).await.grant.stream;
    let limit = relay.service().open("dev1").await.problem(429, "limit_reached").limit.expect("no limit");
    assert_eq!((limit.name, limit.value), (LimitName::StreamsPerService, 2));
    assert!(limit.scope.starts_with("service "), "{}", limit.scope);
    assert_eq!(relay.service().delete(&format!("/v1/streams/{last}")).await.status, 204);
    relay.handshake("dev1", &mut one).await;
}

#[tokio::test]
async fn a_request_that_failed_gives_its_place_back() {
    let relay = Relay::with(&["--limit-streams-per-device", "1", "--limit-streams-per-service", "1"]).await;
    let service = relay.service();
    for _ in 0..3 {
        let body = json!({ "name": "test", "connect_timeout_seconds": 0 });
        service.open_with("dev1", body).await.problem(404, "device_offline");
    }
    let mut link = relay.device("dev1").await;
    for _ in 0..3 {
        let (answer, ()) = tokio::join!(service.open("dev1"), async {
            let request = link.next_request().await.request;
            link.reject(request, "no").await;
        });
        answer.problem(409, "device_rejected");
    }
    relay.handshake("dev1", &mut link).await;
}

#[tokio::test]
async fn initiations_per_second_are_limited() {
    let relay = Relay::with(&["--limit-initiations-per-second", "3"]).await;
    let service = relay.service();
    let offline = || service.open_with("dev1", json!({ "name": "test", "connect_timeout_seconds": 0 }));
    let mut refused = None;
    for _ in 0..50 {
        let answer = offline().await;
        if answer.status == 429 {
            refused = Some(answer.problem(429, "limit_reached").limit.expect("no limit"));
            break;
        }
        answer.problem(404, "device_offline");
    }
    let limit = refused.expect("the limit was never reached");
    assert_eq!((limit.name, limit.value), (LimitName::InitiationsPerSecond, 3));
    assert!(limit.scope.starts_with("service "), "{}", limit.scope);
    // It says when to come back, and keeps its word.
    sleep(Duration::from_secs(limit.retry_after_seconds)).await;
    offline().await.problem(404, "device_offline");
}

#[tokio::test]
async fn requests_that_wait_are_limited() {
    let relay = Relay::with(&["--limit-waiting-initiations", "1"]).await;
    let service = relay.service();
    let second = async {
        relay.counts("midspan_control_waiting_initiations", &[], 1).await;
        service.open("dev1").await.problem(429, "limit_reached").limit.expect("no limit")
    };
    let limit = tokio::select! {
        limit = second => limit,
        answer = service.open("dev1") => panic!("nobody answered, but there is {answer:?}"),
    };
    assert_eq!((limit.name, limit.value), (LimitName::WaitingInitiations, 1));
    assert!(limit.scope.starts_with("this relay"), "{}", limit.scope);
    relay.assert_quiet().await;
}

#[tokio::test]
async fn device_links_are_limited() {
    let relay = Relay::with(&["--limit-device-links", "1"]).await;
    let link = relay.device("dev1").await;
    let token = relay.device_connection("dev2").sign(now().plus(Duration::from_secs(60)));
    let headers = [("authorization", token.expose_secret())];
    let connect = || DeviceLink::try_connect(relay.target(), "/v1/devices/dev2/link", &headers);
    let limit = connect().await.unwrap_err().problem(429, "limit_reached").limit.expect("no limit");
    assert_eq!((limit.name, limit.value), (LimitName::DeviceLinks, 1));
    link.close().await;
    relay.counts("midspan_control_device_links", &[], 0).await;
    connect().await.unwrap().close().await;
    relay.assert_quiet().await;
}

#[tokio::test]
async fn streams_of_an_edge_are_limited() {
    let relay = Relay::with(&["--max-streams", "1"]).await;
    let mut link = relay.device("dev1").await;
    let (one, two) = (relay.handshake("dev1", &mut link).await, relay.handshake("dev1", &mut link).await);
    let _leg = relay.device_leg(&one).await;
    let (url, ticket) = (&two.invitation.url, two.invitation.ticket.expose_secret());
    Leg::try_open(relay.target(), url, ticket, &[]).await.unwrap_err().problem(503, "unavailable");
    // The stream that is there already gets its other leg.
    relay.service_leg(&one).await;
}

#[tokio::test]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let relay = Relay::start().await;
    let mut slow = relay.target().connect().await;
    let request = format!(
        "POST /v1/devices/dev1/streams HTTP/1.1\r\nHost: {}\r\nAuthorization: {}\r\n\
         Content-Type: application/json\r\nContent-Length: 20\r\n\r\n{{\"name\":",
        relay.target().authority,
        relay.service().authorization(),
    );
    slow.write_all(request.as_bytes()).await.unwrap();
    slow.flush().await.unwrap();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(2 * testkit::DEADLINE, slow.read_buf(&mut answer)).await;
    assert!(matches!(read, Ok(Ok(1..))), "{read:?}");
    assert!(answer.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&answer));
    drop(slow);
    relay.assert_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_half_open_streams_leave_nothing_behind() {
    const STREAMS: usize = 1000;
    const AT_ONCE: usize = 50;
    let limits = [
        "--limit-streams-per-device",
        "2000",
        "--limit-initiations-per-second",
        "100000",
        "--handshake-limit",
        "30s",
    ];
    let relay = Relay::with(&limits).await;
    let mut link = relay.device("dev1").await;
    let before = (relay.tasks().await, relay.open_files());
    // At so many at a time, the device is asked faster than it answers.
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut asking = JoinSet::new();
    for _ in 0..STREAMS {
        let (service, turns) = (relay.service(), Arc::clone(&turns));
        asking.spawn(async move {
            let _turn = turns.acquire().await.unwrap();
            service.open_with("dev1", json!({ "name": "test", "connect_timeout_seconds": 0 })).await.grant()
        });
    }
    let mut invitations = HashMap::new();
    for _ in 0..STREAMS {
        let invitation = link.next_request().await;
        link.accept(invitation.request).await;
        invitations.insert(invitation.stream, invitation);
    }
    // One leg for each: the service's for one half of them, the device's for the other.
    let mut opening = JoinSet::new();
    for (number, grant) in asking.join_all().await.into_iter().enumerate() {
        let invitation = invitations.remove(&grant.stream).expect("a grant that the device knows nothing of");
        let (target, turns) = (relay.target().clone(), Arc::clone(&turns));
        opening.spawn(async move {
            let _turn = turns.acquire().await.unwrap();
            match number % 2 {
                0 => {
                    (Leg::open(&target, &grant.url, grant.ticket.expose_secret()).await, "device_leg_missing")
                }
                _ => {
                    let ticket = invitation.ticket.expose_secret();
                    (Leg::open(&target, &invitation.url, ticket).await, "service_leg_missing")
                }
            }
        });
    }
    let legs = opening.join_all().await;
    relay.counts("midspan_edge_streams", &[("state", "half_open")], 1000).await;
    assert_eq!(relay.metrics().await.count("midspan_edge_legs", &[]), 1000);

    let mut ends = JoinSet::new();
    for (mut leg, reason) in legs {
        ends.spawn(async move {
            let told = async {
                loop {
                    match leg.socket.next().await {
                        Some(Ok(Message::Ping(_))) => {}
                        Some(Ok(Message::Close(Some(frame)))) => return frame,
                        other => panic!("expected a close frame: {other:?}"),
                    }
                }
            };
            let told =
                tokio::time::timeout(Duration::from_secs(90), told).await.expect("not told of the end");
            assert_eq!(u16::from(told.code), 1013, "{told:?}");
            assert!(told.reason.starts_with(&format!("{reason}: ")), "{told:?}");
        });
    }
    ends.join_all().await;
    relay.assert_quiet().await;
    for reason in ["device_leg_missing", "service_leg_missing"] {
        relay.counts("midspan_edge_stream_ends_total", &[("reason", reason)], 500).await;
    }
    eventually("no stream is listed", || async {
        relay.service().get("/v1/streams").await.expect(200).json()["items"].as_array().unwrap().is_empty()
    })
    .await;
    relay.shrinks_to(before).await;
}

#[tokio::test]
async fn strangers_are_limited_and_do_not_keep_others_out() {
    let relay = Relay::with(&["--max-unauthenticated", "5", "--header-limit", "30s"]).await;
    let mut link = relay.device("dev1").await;
    let mut stream = relay.join(&mut link).await;
    let mut strangers = Vec::new();
    for _ in 0..5 {
        strangers.push(relay.target().tcp().await);
    }
    relay.counts("midspan_listener_connections", &[("listener", "public")], 8).await;
    let mut one_too_many = relay.target().tcp().await;
    let refused = within("the connection is closed", one_too_many.read(&mut [0; 1])).await;
    assert!(matches!(refused, Ok(0) | Err(_)), "{refused:?}");
    relay.counts("midspan_listener_refused_connections_total", &[("limit", "unauthenticated")], 1).await;
    // Who has shown who they are is not touched.
    stream.service.send_text("still here").await;
    assert_eq!(stream.device.next_text().await, "still here");
    // And there is room again as soon as a stranger leaves.
    drop(strangers);
    eventually("there is room again", || async { relay.target().try_connect().await.is_ok() }).await;
    relay.handshake("dev1", &mut link).await;
}

#[tokio::test]
async fn connections_are_limited() {
    let relay = Relay::with(&["--max-connections", "2"]).await;
    let _link = relay.device("dev1").await;
    let _other = relay.device("dev2").await;
    let mut refused = relay.target().tcp().await;
    let read = within("the connection is closed", refused.read(&mut [0; 1])).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    relay.counts("midspan_listener_refused_connections_total", &[("limit", "connections")], 1).await;
}

#[tokio::test]
async fn a_header_that_comes_byte_by_byte_is_cut() {
    let relay = Relay::with(&["--header-limit", "3s"]).await;
    let cut = async |path: &str| {
        let mut slow = relay.target().connect().await;
        let start = Instant::now();
        slow.write_all(upgrade_head(&relay, path).as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        loop {
            assert!(start.elapsed() < testkit::DEADLINE, "the relay waits for ever");
            if slow.write_all(b"x").await.is_err() || slow.flush().await.is_err() {
                break;
            }
            let read = tokio::time::timeout(Duration::from_secs(1), slow.read_buf(&mut answer)).await;
            if matches!(read, Ok(Ok(0) | Err(_))) {
                break;
            }
        }
        // Without a word: there is no request yet to answer.
        assert_eq!(String::from_utf8_lossy(&answer), "", "{path}");
        assert!(start.elapsed() >= Duration::from_millis(2900), "{path}: cut before its time");
    };
    tokio::join!(cut("/bridges/0123456789abcdef0123456789abcdef/service"), cut("/v1/devices/dev1/link"));
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_cut() {
    let relay = Relay::with(&["--header-limit", "1s"]).await;
    let (mut no_tls, mut no_request) = (relay.target().tcp().await, relay.target().connect().await);
    let mut answer = Vec::new();
    let read = within("the end of a connection without TLS", no_tls.read_to_end(&mut answer)).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    let _ = within("the end of a connection without a request", no_request.read_to_end(&mut answer)).await;
    drop((no_tls, no_request));
    relay.counts("midspan_listener_tls_failures_total", &[("cause", "timeout")], 1).await;
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_header_that_is_too_long_is_refused() {
    let relay = Relay::start().await;
    for path in ["/bridges/0123456789abcdef0123456789abcdef/service", "/v1/devices/dev1/link"] {
        for length in [20 << 10, 1 << 20] {
            let head = upgrade_head(&relay, path);
            let request = [head.as_bytes(), &vec![b'x'; length], b"\r\n\r\n"].concat();
            let answer = exchange(&relay, &request).await;
            assert_refused(&answer, "431 Request Header Fields Too Large");
        }
    }
    relay.assert_quiet().await;
}

#[tokio::test]
async fn garbage_instead_of_http_is_refused() {
    let relay = Relay::start().await;
    for garbage in [
        &b"SSH-2.0-OpenSSH_9.9\r\n"[..],
        &[0; 100],
        b"GET /v1/endpoints\r\n\r\n",
        b"G\xffT / HTTP/1.1\r\n\r\n",
    ] {
        assert_refused(&exchange(&relay, garbage).await, "400 Bad Request");
    }
    relay.assert_quiet().await;
}

#[tokio::test]
async fn garbage_instead_of_tls_is_cut() {
    let relay = Relay::start().await;
    for garbage in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0; 100], b"SSH-2.0-OpenSSH_9.9\r\n"] {
        let mut stream = relay.target().tcp().await;
        stream.write_all(garbage).await.unwrap();
        let mut answer = Vec::new();
        // An alert may come; then the connection ends.
        let _ = within("the end of the connection", stream.read_to_end(&mut answer)).await;
        assert!(!answer.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&answer));
    }
    relay.counts("midspan_listener_tls_failures_total", &[("cause", "protocol")], 3).await;
    relay.assert_quiet().await;
}

/// The header of an upgrade, up to and into one field more that is still open.
fn upgrade_head(relay: &Relay, path: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nX-Long: ",
        relay.target().authority
    )
}

/// Sends bytes over TLS, as far as they are taken, and gives all that comes back until the connection ends.
async fn exchange(relay: &Relay, request: &[u8]) -> String {
    let (mut read, mut write) = tokio::io::split(relay.target().connect().await);
    let writing = async {
        // The relay need not take all of it.
        let _ = write.write_all(request).await;
        let _ = write.flush().await;
    };
    let reading = async {
        let mut answer = Vec::new();
        let _ = read.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    within("the answer", async { tokio::join!(writing, reading) }).await.1
}

/// Checks that the HTTP parser refused: a status, an empty body, and nothing after it.
#[track_caller]
fn assert_refused(answer: &str, status: &str) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    assert_eq!(head.lines().next(), Some(format!("HTTP/1.1 {status}").as_str()));
    assert!(head.lines().any(|line| line.eq_ignore_ascii_case("content-length: 0")), "{head}");
    assert_eq!(body, "");
}
