//! The command `midspan`: what it prints, how it ends, and that it holds on.

use std::{
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use midspan_core::{api::DeviceStatus, connection_string::ConnectionString, key::Key, record::StreamRecord};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use testkit::{Midspan, Process, Relay, binary, eventually, until, within};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::web::local_address;

#[tokio::test]
async fn standard_streams_reach_a_device() {
    let (relay, _tasks, allow) = echo_site().await;
    let _device = Midspan::device(&relay, &["--allow", &allow]).await;
    let mut connect = Midspan::service(&relay, &["connect", "--stdio", "dev1", "echo"]);
    connect.write(b"there and back");
    until("the echo", || async { (connect.stdout() == b"there and back").then_some(()) }).await;
    connect.close_stdin();
    let status = connect.wait_exit().await;
    assert_eq!(status.code(), Some(0), "{}", connect.stderr());
    assert_eq!(connect.stdout_text(), "there and back");
    relay.assert_quiet().await;
}

#[tokio::test]
async fn every_failure_has_its_exit_code() {
    let relay = Relay::with(&["--limit-streams-per-device", "1"]).await;
    let mut link = relay.device("dev1").await;
    let no_wait = ["connect", "--stdio", "--connect-timeout", "0s", "nobody", "test"];
    let no_stream = "0123456789abcdef0123456789abcdef";

    ends(Midspan::service(&relay, &["devices"]), 0, "").await;
    ends(Midspan::service(&relay, &["devices", "--no-such-flag"]), 2, "no-such-flag").await;
    ends(Midspan::service(&relay, &["connect", "dev1"]), 2, "--listen").await;
    ends(Process::spawn(Midspan::command(&relay, &["devices"])), 2, "MIDSPAN_CONNECTION_STRING").await;
    ends(with(&relay, "HostName=x;DeviceId=y", &["devices"]), 2, "SharedAccessKey").await;
    // A device's connection string is none of a service.
    ends(with(&relay, &relay.connection_string("dev1"), &["devices"]), 2, "service").await;

    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let away = ConnectionString { host: closed.to_string(), ..relay.service_connection().clone() };
    let away = away.to_text().expose_secret().to_owned();
    ends(with(&relay, &away, &["devices"]), 3, &closed.to_string()).await;

    let wrong = Key::from_bytes(vec![7; 32]).unwrap();
    let wrong = ConnectionString { key: wrong, ..relay.service_connection().clone() };
    let wrong = wrong.to_text().expose_secret().to_owned();
    ends(with(&relay, &wrong, &["devices"]), 4, "key").await;

    ends(Midspan::service(&relay, &no_wait), 5, "nobody").await;
    ends(Midspan::service(&relay, &["streams", no_stream]), 5, "stream").await;

    let connect = Midspan::service(&relay, &["connect", "--stdio", "dev1", "test"]);
    let request = link.next_request().await.request;
    link.reject(request, "not today").await;
    ends(connect, 6, "not today").await;

    let connect = ["connect", "--stdio", "--response-timeout", "1s", "dev1", "test"];
    ends(Midspan::service(&relay, &connect), 7, "dev1").await;
    link.next_request().await;

    let handshake = relay.handshake("dev1", &mut link).await;
    ends(Midspan::service(&relay, &["connect", "--stdio", "dev1", "test"]), 8, "limit").await;
    let _ = relay.service().delete(&format!("/v1/streams/{}", handshake.grant.stream)).await;

    let connect = Midspan::service(&relay, &["connect", "--stdio", "dev1", "test"]);
    let invitation = link.next_request().await;
    link.accept(invitation.request).await;
    let leg = testkit::Leg::open(relay.target(), &invitation.url, invitation.ticket.expose_secret()).await;
    relay.counts("midspan_edge_streams", &[("state", "joined")], 1).await;
    leg.abort();
    ends(connect, 10, "device_lost").await;
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_relay_that_drains_has_an_exit_code_too() {
    let relay = Relay::with(&["--drain-delay", "60s"]).await;
    let _link = relay.device("dev1").await;
    relay.terminate();
    eventually("not ready", || async { relay.admin("/readyz").await.status == 503 }).await;
    ends(Midspan::service(&relay, &["connect", "--stdio", "dev1", "test"]), 9, "try again").await;
}

#[tokio::test]
async fn json_is_for_programs() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let stream = relay.handshake("dev1", &mut link).await.grant.stream;
    let run = async |arguments: &[&str]| -> Value {
        let mut process = Midspan::service(&relay, &[&["-o", "json"], arguments].concat());
        let status = process.wait_exit().await;
        assert!(status.success(), "{arguments:?}: {}", process.stderr());
        serde_json::from_slice(&process.stdout()).unwrap()
    };
    let devices: Vec<DeviceStatus> = serde_json::from_value(run(&["devices"]).await).unwrap();
    assert!(
        devices.iter().any(|device| device.address.to_string() == "dev1" && device.connected),
        "{devices:?}"
    );
    let device: DeviceStatus = serde_json::from_value(run(&["devices", "dev1"]).await).unwrap();
    assert!(device.connected);
    let streams: Vec<StreamRecord> = serde_json::from_value(run(&["streams"]).await).unwrap();
    assert_eq!(streams.iter().map(|record| record.stream).collect::<Vec<_>>(), [stream]);
    assert_eq!(run(&["endpoints"]).await, json!([relay.url()]));
    run(&["streams", "--end", &stream.to_string()]).await;
    let ended: StreamRecord = serde_json::from_value(run(&["streams", &stream.to_string()]).await).unwrap();
    assert!(ended.is_ended());
}

#[tokio::test]
async fn a_printed_signature_opens_the_api() {
    let relay = Relay::start().await;
    let mut token = Midspan::service(&relay, &["token", "--for", "dev1"]);
    assert!(token.wait_exit().await.success());
    let service = relay.service().authorized(token.stdout_text().trim());
    service.get("/v1/devices/dev1").await.expect(200);
    service.get("/v1/devices/dev2").await.problem(403, "not_allowed");
}

#[tokio::test]
async fn an_echo_comes_back() {
    let relay = Relay::start().await;
    let device = with(&relay, &relay.connection_string("dev1"), &["echo"]);
    relay.counts("midspan_control_device_links", &[], 1).await;
    let arguments = ["-o", "json", "echo", "dev1", "--count", "5", "--size", "100000"];
    let mut echo = Midspan::service(&relay, &arguments);
    let status = echo.wait_exit().await;
    assert!(status.success(), "{}", echo.stderr());
    let report: Value = serde_json::from_slice(&echo.stdout()).unwrap();
    assert_eq!(report["round_trips_ms"].as_array().map(Vec::len), Some(5), "{report}");
    relay.assert_quiet().await;
    drop(device);
}

#[tokio::test]
async fn a_module_is_reached_as_a_device_is() {
    let relay = Relay::with(&["--device", "dev1/camera"]).await;
    let file = relay.path("dev1+camera.connection");
    let file = ["--connection-string-file", file.to_str().unwrap()];
    let _module = Process::spawn(Midspan::command(&relay, &[&file[..], &["echo"]].concat()));
    relay.counts("midspan_control_device_links", &[], 1).await;

    let mut echo = Midspan::service(&relay, &["-o", "json", "echo", "dev1/camera", "--count", "2"]);
    let status = echo.wait_exit().await;
    assert!(status.success(), "{}", echo.stderr());
    let report: Value = serde_json::from_slice(&echo.stdout()).unwrap();
    assert_eq!(report["round_trips_ms"].as_array().map(Vec::len), Some(2), "{report}");
    // The device itself is not there.
    ends(Midspan::service(&relay, &["connect", "--stdio", "--connect-timeout", "0s", "dev1"]), 5, "dev1")
        .await;

    let mut devices = Midspan::service(&relay, &["-o", "json", "devices", "dev1/camera"]);
    assert!(devices.wait_exit().await.success(), "{}", devices.stderr());
    let device: DeviceStatus = serde_json::from_slice(&devices.stdout()).unwrap();
    assert_eq!((device.address.to_string().as_str(), device.connected), ("dev1/camera", true));
    let mut devices = Midspan::service(&relay, &["devices"]);
    assert!(devices.wait_exit().await.success(), "{}", devices.stderr());
    assert!(devices.stdout_text().contains("dev1/camera"), "{}", devices.stdout_text());

    let mut token = Midspan::service(&relay, &["token", "--for", "dev1/camera"]);
    assert!(token.wait_exit().await.success(), "{}", token.stderr());
    let service = relay.service().authorized(token.stdout_text().trim());
    service.get("/v1/devices/dev1/modules/camera").await.expect(200);
    for other in ["/v1/devices/dev1", "/v1/devices/dev1/modules/other", "/v1/devices/dev2"] {
        service.get(other).await.problem(403, "not_allowed");
    }
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_target_that_is_not_allowed_or_not_there_is_a_rejection() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let relay = Relay::start().await;
    let _device = Midspan::device(&relay, &["--allow", &format!("ssh={closed}")]).await;
    ends(Midspan::service(&relay, &["connect", "--stdio", "dev1", "telnet"]), 6, "telnet").await;
    ends(Midspan::service(&relay, &["connect", "--stdio", "dev1", "ssh"]), 6, &closed.to_string()).await;
    // With a local port, the local connection is reset: it is no answer.
    let service = Midspan::service(&relay, &["connect", "dev1", "telnet", "-L", "127.0.0.1:0"]);
    let mut client = TcpStream::connect(local_address(&service).await).await.unwrap();
    let error = within("the reset", client.read(&mut [0; 1])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_stream_that_is_cut_resets_the_local_connection() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let service = Midspan::service(&relay, &["connect", "dev1", "test", "-L", "127.0.0.1:0"]);
    let mut client = TcpStream::connect(local_address(&service).await).await.unwrap();
    let invitation = link.next_request().await;
    link.accept(invitation.request).await;
    let mut device =
        testkit::Leg::open(relay.target(), &invitation.url, invitation.ticket.expose_secret()).await;
    device.send_binary("half of it").await;
    let mut buffer = [0; 10];
    within("the bytes", client.read_exact(&mut buffer)).await.unwrap();
    assert_eq!(relay.service().delete(&format!("/v1/streams/{}", invitation.stream)).await.status, 204);
    let error = within("the reset", client.read(&mut buffer)).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    service.stderr_has("deleted").await;
}

#[tokio::test]
async fn a_device_that_is_killed_is_offline_at_once() {
    let (relay, _tasks, allow) = echo_site().await;
    let mut device = Midspan::device(&relay, &["--allow", &allow]).await;
    let mut connect = Midspan::service(&relay, &["connect", "--stdio", "dev1", "echo"]);
    connect.write(b"x");
    until("the echo", || async { (connect.stdout() == b"x").then_some(()) }).await;
    device.kill();
    ends(connect, 10, "device_lost").await;
    let connect = ["connect", "--stdio", "--connect-timeout", "0s", "dev1", "echo"];
    ends(Midspan::service(&relay, &connect), 5, "not connected").await;
    relay.assert_quiet().await;
}

#[tokio::test]
async fn plaintext_is_for_those_who_ask_for_it() {
    let data = tempfile::tempdir().unwrap();
    let mut command = binary("midspand");
    command.args(["dev", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--insecure-plaintext"]);
    command.args(["--log-format", "json", "--data-dir"]).arg(data.path());
    let relay = Process::spawn(command);
    testkit::listening(&relay, "public").await;
    let file = data.path().join("service.connection");
    until("service.connection", || async { file.exists().then_some(()) }).await;
    let run = |arguments: &[&str]| {
        let mut command = binary("midspan");
        command.args(arguments).arg("--connection-string-file").arg(&file);
        Process::spawn(command)
    };
    ends(run(&["devices", "--insecure-plaintext"]), 0, "").await;
    ends(run(&["devices"]), 3, "TLS").await;
    assert!(relay.stderr().contains("without TLS"), "the relay does not warn");
}

#[tokio::test]
async fn a_device_holds_on_while_the_relay_is_gone() {
    let (mut relay, _tasks, allow) = echo_site().await;
    let mut device = Midspan::device(&relay, &["--allow", &allow]).await;
    let service = Midspan::service(&relay, &["connect", "dev1", "echo", "-L", "127.0.0.1:0"]);
    let address = local_address(&service).await;
    assert_eq!(echo(&address).await, "hello");
    relay.kill();
    relay.restart().await;
    let back = async {
        while echo(&address).await != "hello" {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(30), back).await.is_ok(), "{}", device.stderr());
    assert!(device.is_running());
}

#[tokio::test]
async fn a_device_lets_its_streams_end_before_it_stops() {
    let (relay, _tasks, allow) = echo_site().await;
    let mut device = Midspan::device(&relay, &["--allow", &allow]).await;
    let service = Midspan::service(&relay, &["connect", "dev1", "echo", "-L", "127.0.0.1:0"]);
    let mut client = TcpStream::connect(local_address(&service).await).await.unwrap();
    client.write_all(b"one").await.unwrap();
    let mut buffer = [0; 3];
    within("the echo", client.read_exact(&mut buffer)).await.unwrap();
    device.terminate();
    relay.counts("midspan_control_device_links", &[], 0).await;
    client.write_all(b"two").await.unwrap();
    within("the echo", client.read_exact(&mut buffer)).await.unwrap();
    assert_eq!(&buffer, b"two");
    assert!(device.is_running());
    drop(client);
    let status = device.wait_exit().await;
    assert_eq!(status.code(), Some(0), "{}", device.stderr());
}

#[tokio::test]
async fn the_older_of_two_with_one_identity_stays_away() {
    let (relay, _tasks, allow) = echo_site().await;
    let older = Midspan::device(&relay, &["--allow", &allow]).await;
    let mut command = Midspan::command(&relay, &["device", "--allow", &allow]);
    command.env("MIDSPAN_CONNECTION_STRING", relay.connection_string("dev1"));
    let newer = Process::spawn(command);
    older.stderr_has("another machine uses the identity").await;
    relay.counts("midspan_control_device_links", &[], 1).await;
    // No fight: the newer one is not replaced in turn.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!newer.stderr().contains("another machine"), "{}", newer.stderr());
}

#[tokio::test]
async fn proxies_of_the_environment_are_used() {
    let (relay, mut tasks, allow) = echo_site().await;
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", proxy.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    tasks.spawn(connect_proxy(proxy, Arc::clone(&asked)));
    let count = || asked.load(Ordering::SeqCst);
    let service = |arguments: &[&str], environment: &[(&str, &str)]| {
        let mut command = Midspan::command(&relay, arguments);
        command.env("MIDSPAN_CONNECTION_STRING", relay.service_connection().to_text().expose_secret());
        command.envs(environment.iter().copied());
        Process::spawn(command)
    };

    ends(service(&["devices"], &[("HTTPS_PROXY", &url)]), 0, "").await;
    assert_eq!(count(), 1);
    ends(service(&["devices"], &[("HTTPS_PROXY", &url), ("NO_PROXY", relay.target().host())]), 0, "").await;
    assert_eq!(count(), 1, "NO_PROXY does not bypass the proxy");
    ends(service(&["devices"], &[("HTTPS_PROXY", "http://127.0.0.1:9")]), 3, "127.0.0.1:9").await;

    // The link and both legs go through it too.
    let mut device = Midspan::command(&relay, &["device", "--allow", &allow]);
    device.env("MIDSPAN_CONNECTION_STRING", relay.connection_string("dev1")).env("https_proxy", &url);
    let _device = Process::spawn(device);
    relay.counts("midspan_control_device_links", &[], 1).await;
    let mut connect = service(&["connect", "--stdio", "dev1", "echo"], &[("ALL_PROXY", &url)]);
    connect.write(b"x");
    until("the echo", || async { (connect.stdout() == b"x").then_some(()) }).await;
    assert_eq!(count(), 5);
}

#[tokio::test]
async fn secrets_never_reach_the_log() {
    let (relay, _tasks, allow) = echo_site().await;
    let device = Midspan::device(&relay, &["--allow", &allow, "-vv"]).await;
    let mut connect = Midspan::service(&relay, &["-vv", "connect", "--stdio", "dev1", "echo"]);
    connect.write(b"payload-that-nobody-logs");
    until("the echo", || async { (!connect.stdout().is_empty()).then_some(()) }).await;
    connect.close_stdin();
    connect.wait_exit().await;
    let wrong = Key::from_bytes(vec![7; 32]).unwrap();
    let wrong = ConnectionString { key: wrong, ..relay.service_connection().clone() };
    let mut refused = with(&relay, wrong.to_text().expose_secret(), &["-vv", "devices"]);
    refused.wait_exit().await;

    let text = |key: &Key| key.to_base64().expose_secret().to_owned();
    let secrets = [
        ("a ticket", "eyJ".to_owned()),
        ("a signature", "sig=".to_owned()),
        ("the service's key", text(&relay.service_connection().key)),
        ("the device's key", text(&relay.device_connection("dev1").key)),
        ("the wrong key", text(&wrong.key)),
        ("the payload", "payload-that-nobody-logs".to_owned()),
    ];
    for (who, log) in
        [("device", device.stderr()), ("connect", connect.stderr()), ("refused", refused.stderr())]
    {
        assert!(who == "refused" || log.contains("DEBUG"), "{who} logs next to nothing: {log}");
        for (what, secret) in &secrets {
            let line = log.lines().find(|line| line.contains(secret.as_str()));
            assert_eq!(line, None, "{what} is in the log of {who}");
        }
    }
}

#[test]
fn completions_and_manual_pages_are_printed() {
    for (arguments, expected) in [
        (["completions", "bash"], "complete "),
        (["completions", "zsh"], "#compdef"),
        (["man", "connect"], ".TH"),
    ] {
        let output = binary("midspan").args(arguments).output().unwrap();
        assert!(output.status.success());
        assert!(String::from_utf8(output.stdout).unwrap().contains(expected), "{arguments:?}");
    }
}

/// Checks the exit code, and that the last line on standard error has `words`.
async fn ends(mut process: Process, code: i32, words: &str) {
    // Standard input stays open: nothing may hang on it.
    let status = process.wait_exit().await;
    let log = process.stderr();
    assert_eq!(status.code(), Some(code), "{log}");
    assert!(log.contains(words), "no {words:?} in {log:?}");
}

/// `midspan` with a connection string of the test's own.
fn with(relay: &Relay, connection: &str, arguments: &[&str]) -> Process {
    let mut command: Command = Midspan::command(relay, arguments);
    command.env("MIDSPAN_CONNECTION_STRING", connection);
    Process::spawn(command)
}

/// A relay, a local server that echoes, and what allows a device to reach it as `echo`.
async fn echo_site() -> (Relay, JoinSet<()>, String) {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let allow = format!("echo={}", server.local_addr().unwrap());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut connection, _)) = server.accept().await {
            connections.spawn(async move {
                let (mut read, mut write) = connection.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    (Relay::start().await, tasks, allow)
}

/// Sends `hello` through a local port, and gives what comes back.
async fn echo(address: &str) -> String {
    let exchange = async {
        let mut client = TcpStream::connect(address).await?;
        client.write_all(b"hello").await?;
        client.shutdown().await?;
        let mut answer = String::new();
        client.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(15), exchange).await;
    answer.map_or_else(
        |_| "no answer in time".to_owned(),
        |answer| answer.unwrap_or_else(|error| error.to_string()),
    )
}

/// A proxy that knows `CONNECT` only, and counts.
async fn connect_proxy(listener: TcpListener, asked: Arc<AtomicUsize>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        asked.fetch_add(1, Ordering::SeqCst);
        connections.spawn(async move {
            let mut client = BufReader::new(client);
            let (mut first, mut line) = (String::new(), String::new());
            client.read_line(&mut first).await.unwrap();
            while client.read_line(&mut line).await.unwrap() > 2 {
                line.clear();
            }
            let target =
                first.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()).unwrap().to_owned();
            let mut server = TcpStream::connect(target).await.unwrap();
            client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        });
    }
}
