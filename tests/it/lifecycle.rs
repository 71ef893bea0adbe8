//! How the server starts, drains, dies and comes back.

use std::{collections::HashSet, net::TcpListener, time::Duration};

use midspan_core::link::GoodbyeReason;
use secrecy::ExposeSecret as _;
use serde_json::Value;
use testkit::{
    DeviceLink, Handshake, Leg, Process, Relay, ServiceApi, Target, binary, eventually, now, until,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    task::JoinSet,
    time::sleep,
};

#[tokio::test]
async fn the_admin_port_says_alive_and_ready() {
    let relay = Relay::start().await;
    for path in ["/livez", "/readyz"] {
        assert_eq!(relay.admin(path).await.status, 200, "{path}");
    }
    assert!(relay.metrics().await.has("midspan_listener_connections", &[("listener", "admin")]));
    assert_eq!(relay.admin("/nothing").await.status, 404);
}

#[tokio::test]
async fn a_drain_lets_streams_go_on_for_its_grace() {
    let mut relay = Relay::with(&["--drain-delay", "1s", "--drain-grace", "2s"]).await;
    let mut link = relay.device("dev1").await;
    let mut stream = relay.join(&mut link).await;
    assert_eq!(relay.service().get("/v1/devices/dev1").await.headers.get("connection"), None);
    relay.terminate();
    eventually("not ready", || async { relay.admin("/readyz").await.status == 503 }).await;
    assert_eq!(relay.admin("/livez").await.status, 200);
    // For the delay, all is served as before, but nothing new is placed here, and no connection is kept for a next request.
    let device = relay.service().get("/v1/devices/dev1").await;
    assert_eq!(device.headers.get("connection").unwrap(), "close");
    device.expect(200);
    let problem = relay.service().open("dev1").await.problem(503, "unavailable");
    assert!(problem.retry && problem.retry_after_seconds.is_some(), "{problem:?}");

    let bye = link.ended().await;
    let goodbye = bye.goodbye.expect("no goodbye");
    assert_eq!((goodbye.reason, goodbye.come_back_seconds), (GoodbyeReason::Draining, 1));
    assert_eq!(bye.code, Some(1012));
    stream.service.send_text("within the grace").await;
    assert_eq!(stream.device.next_text().await, "within the grace");
    tokio::join!(stream.service.ends(1012, "draining"), stream.device.ends(1012, "draining"));
    drop(stream);
    let status = relay.wait_exit().await;
    assert!(status.success(), "{status}: {}", relay.log());
    assert!(
        relay.activity().iter().any(|record| record["resultType"] == "draining"),
        "{:?}",
        relay.activity()
    );
}

#[tokio::test]
async fn a_draining_relay_takes_no_new_streams() {
    let mut relay = Relay::with(&["--drain-grace", "5s"]).await;
    let mut link = relay.device("dev1").await;
    let mut stream = relay.join(&mut link).await;
    let handshake = relay.handshake("dev1", &mut link).await;
    relay.terminate();
    link.ended().await;
    let problem = relay.service().open("dev1").await.problem(503, "unavailable");
    assert!(problem.retry && problem.retry_after_seconds.is_some(), "{problem:?}");
    let token = relay.device_connection("dev1").sign(now().plus(Duration::from_secs(60)));
    let headers = [("authorization", token.expose_secret())];
    let refused = DeviceLink::try_connect(relay.target(), "/v1/devices/dev1/link", &headers).await;
    refused.unwrap_err().problem(503, "unavailable");
    // A half-open stream may still join.
    let (mut one, mut two) = (relay.service_leg(&handshake).await, relay.device_leg(&handshake).await);
    one.send_text("still joined").await;
    assert_eq!(two.next_text().await, "still joined");
    // It exits as soon as the streams are over, not only at the end of the grace.
    one.close(1000, "").await;
    two.closed().await;
    stream.device.close(1000, "").await;
    stream.service.closed().await;
    drop((one, two, stream));
    let status = relay.wait_exit().await;
    assert!(status.success(), "{status}: {}", relay.log());
}

#[tokio::test]
async fn a_request_that_waits_gets_its_answer_when_the_relay_goes() {
    let mut relay = Relay::start().await;
    let service = relay.service();
    let (answer, ()) = tokio::join!(service.open("dev1"), async {
        relay.counts("midspan_control_waiting_initiations", &[], 1).await;
        relay.terminate();
    });
    assert_eq!(answer.status, 503, "{}", answer.text());
    assert!(answer.headers.contains_key("retry-after"), "{:?}", answer.headers);
    assert!(relay.wait_exit().await.success());
}

#[tokio::test]
async fn a_second_signal_ends_the_relay_at_once() {
    let mut relay = Relay::with(&["--drain-delay", "60s", "--drain-grace", "60s"]).await;
    let mut link = relay.device("dev1").await;
    let mut stream = relay.join(&mut link).await;
    relay.terminate();
    eventually("not ready", || async { relay.admin("/readyz").await.status == 503 }).await;
    relay.terminate();
    let (status, (), ()) = tokio::join!(
        async { relay.wait_exit().await },
        stream.service.ends(1012, "draining"),
        stream.device.ends(1012, "draining")
    );
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn idle_connections_do_not_hold_up_the_end() {
    let mut relay = Relay::with(&["--header-limit", "60s"]).await;
    let (_stranger, mut kept) = (relay.target().tcp().await, relay.target().connect().await);
    let authority = &relay.target().authority;
    kept.write_all(format!("GET /v1/endpoints HTTP/1.1\r\nHost: {authority}\r\n\r\n").as_bytes())
        .await
        .unwrap();
    kept.flush().await.unwrap();
    let mut answer = Vec::new();
    kept.read_buf(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 401"), "{}", String::from_utf8_lossy(&answer));
    let start = tokio::time::Instant::now();
    relay.terminate();
    assert!(relay.wait_exit().await.success());
    assert!(start.elapsed() < Duration::from_secs(6), "it took {:?}", start.elapsed());
}

#[tokio::test]
async fn streams_that_end_in_every_way_leave_nothing_behind() {
    let relay = Relay::with(&["--limit-initiations-per-second", "10000", "--handshake-limit", "5s"]).await;
    let mut link = relay.device("dev1").await;
    let mut streams = HashSet::new();
    // One round first, so that what is made once is there.
    for round in 0..2 {
        let before = (relay.tasks().await, relay.open_files());
        let mut work = JoinSet::new();
        for number in 0..if round == 0 { 8 } else { 160 } {
            let handshake = relay.handshake("dev1", &mut link).await;
            let (target, api) = (relay.target().clone(), relay.service());
            streams.insert(handshake.grant.stream.to_string());
            work.spawn(async move { end_somehow(number, &target, &api, &handshake).await });
            while work.len() >= 16 {
                work.join_next().await.unwrap().unwrap();
            }
        }
        work.join_all().await;
        relay.assert_quiet().await;
        if round > 0 {
            relay.shrinks_to(before).await;
        }
    }
    let ends = relay.metrics().await.count("midspan_edge_stream_ends_total", &[]);
    assert_eq!(ends, 168 - 168 / 8, "each stream with a leg ends once");

    // For each stream, the activity log has one record of how it began and one of how it ended.
    assert_eq!(streams.len(), 168);
    eventually("the activity log is whole", || async { relay.activity().len() >= 2 * 168 }).await;
    let records: Vec<_> = relay.activity().iter().map(operation).collect();
    assert_eq!(records.len(), 2 * 168);
    for name in ["invoke", "end"] {
        let told: HashSet<_> = records.iter().filter(|(operation, _)| operation == name).collect();
        assert_eq!(told.len(), 168, "{name}: a stream is missing, and another one there twice");
        assert!(told.iter().all(|(_, stream)| streams.contains(stream)), "{name}: a stream that is none");
    }
}

/// What an activity record is about: the operation, and the stream's id.
fn operation(record: &Value) -> (String, String) {
    let text = |value: &Value| value.as_str().unwrap_or_else(|| panic!("no text in {record}")).to_owned();
    let properties: Value = serde_json::from_str(&text(&record["properties"])).unwrap();
    (text(&record["operationName"]), text(&properties["streamId"]))
}

async fn end_somehow(number: usize, target: &Target, api: &ServiceApi, handshake: &Handshake) {
    let Handshake { grant, invitation } = handshake;
    if number % 8 == 7 {
        return;
    }
    let mut service = Leg::open(target, &grant.url, grant.ticket.expose_secret()).await;
    if number % 8 == 6 {
        return;
    }
    let mut device = Leg::open(target, &invitation.url, invitation.ticket.expose_secret()).await;
    service.send_binary(vec![1; 10_000]).await;
    device.send_binary(vec![2; 10_000]).await;
    match number % 8 {
        0 => service.close(1000, "").await,
        1 => device.close(4000, "device").await,
        2 => service.abort(),
        3 => device.abort(),
        4 => assert_eq!(api.delete(&format!("/v1/streams/{}", grant.stream)).await.status, 204),
        _ => drop((service, device)),
    }
}

#[tokio::test]
async fn interrupt_is_like_terminate() {
    let mut relay = Relay::start().await;
    relay.process().interrupt();
    let status = relay.wait_exit().await;
    assert!(status.success(), "{status}: {}", relay.log());
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (listen, admin) in [(address.as_str(), "127.0.0.1:0"), ("127.0.0.1:0", address.as_str())] {
        let data = tempfile::tempdir().unwrap();
        let mut command = binary("midspand");
        command.args(["dev", "--listen", listen, "--admin-listen", admin, "--data-dir"]).arg(data.path());
        let mut process = Process::spawn(command);
        let status = process.wait_exit().await;
        assert!(!status.success());
        assert!(process.stderr().contains(&address), "{}", process.stderr());
    }
}

#[tokio::test]
async fn a_relay_that_was_killed_comes_back_with_the_same_keys() {
    let mut relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let before = relay.connection_string("dev1");
    relay.kill();
    assert_eq!(link.ended().await.code, None);
    relay.restart().await;
    assert_eq!(relay.connection_string("dev1"), before);
    // The old life's tickets say that it is over.
    let grant = &handshake.grant;
    let refused = Leg::try_open(relay.target(), &grant.url, grant.ticket.expose_secret(), &[]).await;
    refused.unwrap_err().problem(410, "owner_gone");
    let mut link = relay.device("dev1").await;
    relay.join(&mut link).await;
}

#[tokio::test]
async fn an_unknown_setting_is_an_error() {
    let data = tempfile::tempdir().unwrap();
    for (name, refused) in [
        ("MIDSPAN_LOG_LEVLE", true),
        ("MIDSPAN_SERVICE_HOST", false),
        ("MIDSPAN_SERVICE_PORT", false),
        ("MIDSPAN_SERVICE_PORT_HTTPS", false),
        ("MIDSPAN_PORT", false),
        ("MIDSPAN_PORT_8443_TCP_ADDR", false),
        ("MIDSPAN_CONTROL_SERVICE_HOST", false),
    ] {
        let mut command = binary("midspand");
        command.args(["dev", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--data-dir"]);
        command.arg(data.path()).args(["--log-format", "json"]).env(name, "1");
        let mut process = Process::spawn(command);
        if refused {
            let status = process.wait_exit().await;
            assert!(!status.success());
            assert!(process.stderr().contains(name), "{}", process.stderr());
        } else {
            until(name, || async { process.stderr().contains("\"listening\"").then_some(()) }).await;
        }
    }
}

#[tokio::test]
async fn settings_come_from_the_environment_too() {
    let data = tempfile::tempdir().unwrap();
    let mut command = binary("midspand");
    command.arg("dev").env("MIDSPAN_DATA_DIR", data.path()).env("MIDSPAN_LOG_FORMAT", "json");
    command.env("MIDSPAN_LISTEN", "127.0.0.1:0").env("MIDSPAN_ADMIN_LISTEN", "127.0.0.1:0");
    let process = Process::spawn(command);
    until("it listens", || async { process.stderr().contains("\"listening\"").then_some(()) }).await;
    assert!(data.path().join("service.connection").exists());
}

#[tokio::test]
async fn settings_that_make_no_sense_are_errors() {
    for (arguments, named) in [
        (["dev", "--handshake-limit", "61s"], "handshake-limit"),
        (["dev", "--leg-ping", "soon"], "leg-ping"),
        (["dev", "--no-such-flag", "1"], "no-such-flag"),
    ] {
        let data = tempfile::tempdir().unwrap();
        let mut command = binary("midspand");
        command.args(arguments).args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
        command.arg("--data-dir").arg(data.path());
        let mut process = Process::spawn(command);
        let status = process.wait_exit().await;
        assert!(!status.success(), "{arguments:?} was taken");
        assert!(process.stderr().contains(named), "{arguments:?}: {}", process.stderr());
    }
}

#[tokio::test]
async fn secrets_never_reach_the_log() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let (mut service, mut device) = (relay.service_leg(&handshake).await, relay.device_leg(&handshake).await);
    service.send_text("payload-that-nobody-logs").await;
    device.next_text().await;
    let grant = &handshake.grant;
    let twice = Leg::try_open(relay.target(), &grant.url, grant.ticket.expose_secret(), &[]);
    twice.await.unwrap_err().problem(409, "leg_taken");
    let api = relay.service();
    api.authorized(&format!("{}x", api.authorization()))
        .get("/v1/endpoints")
        .await
        .problem(401, "unauthorized");
    service.close(1000, "").await;
    device.closed().await;
    api.ended(handshake.grant.stream, "service_closed").await;
    sleep(Duration::from_millis(200)).await;

    let signature = |text: &str| text.split("sig=").nth(1).unwrap().split('&').next().unwrap().to_owned();
    let signed_part = |ticket: &str| ticket.rsplit('.').next().unwrap().to_owned();
    let file = |name: &str| std::fs::read_to_string(relay.path(name)).unwrap();
    let secrets = [
        ("the service's ticket", signed_part(handshake.grant.ticket.expose_secret())),
        ("the device's ticket", signed_part(handshake.invitation.ticket.expose_secret())),
        ("the service's signature", signature(api.authorization())),
        ("the service's key", relay.service_connection().key.to_base64().expose_secret().to_owned()),
        ("the group key", relay.group_key().to_base64().expose_secret().to_owned()),
        ("the device's key", relay.device_connection("dev1").key.to_base64().expose_secret().to_owned()),
        ("the ticket key", file("ticket.key").trim().to_owned()),
        ("the TLS key", file("server.key").lines().nth(1).unwrap().to_owned()),
        ("the payload", "payload-that-nobody-logs".to_owned()),
    ];
    let log = relay.log();
    assert!(log.contains(&handshake.grant.stream.to_string()), "the log is not about this stream");
    let activity = file("activity.jsonl");
    let metrics = relay.admin("/metrics").await.text();
    for (what, secret) in secrets {
        assert!(secret.len() > 10);
        assert!(!log.contains(&secret), "{what} is in the log");
        assert!(!activity.contains(&secret), "{what} is in the activity log");
        assert!(!metrics.contains(&secret), "{what} is in the metrics");
    }
}

#[tokio::test]
async fn the_files_with_secrets_are_for_their_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let relay = Relay::start().await;
    for name in ["service.connection", "dev1.connection", "credentials.json", "ticket.key", "server.key"] {
        let mode = std::fs::metadata(relay.path(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{name} has mode {mode:o}");
    }
}

#[tokio::test]
async fn both_roles_start_on_their_own() {
    // The development relay has made all the files that they need.
    let relay = Relay::start().await;
    let path = |name: &str| relay.path(name).to_str().unwrap().to_owned();
    for role in ["control", "edge"] {
        let mut command = binary("midspand");
        command.args([
            role,
            "--listen",
            "127.0.0.1:0",
            "--admin-listen",
            "127.0.0.1:0",
            "--log-format",
            "json",
        ]);
        command.args(["--tls-certificate", &path("server.pem"), "--tls-key", &path("server.key")]);
        command.args(["--ticket-key-file", &path("ticket.key")]);
        command.args(["--deny-file", &path("deny.json")]);
        if role == "control" {
            command.args(["--credentials-file", &path("credentials.json"), "--public-host", "relay.example"]);
            command.args(["--edge-url", "https://edge.example"]);
        }
        let mut process = Process::spawn(command);
        let admin = testkit::listening(&process, "admin").await;
        for check in ["/livez", "/readyz"] {
            eventually(check, || async { testkit::admin(admin, check).await.status == 200 }).await;
        }
        process.terminate();
        let status = process.wait_exit().await;
        assert!(status.success(), "{role}: {status}: {}", process.stderr());
    }
}
