//! The command itself.

use std::{process::Stdio, time::Duration};

use futures_util::{SinkExt as _, StreamExt as _};
use midspan_client::{Clock as _, SystemClock};
use midspan_core::time::UnixTime;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    time::{Instant, timeout},
};
use tokio_tungstenite::tungstenite::Message as Frame;

use crate::{
    relay::{Incoming, Relay, link_message},
    within,
};

#[tokio::test]
async fn standard_output_ends_while_standard_input_goes_on() {
    let relay = Relay::start().await;
    let mut child = midspan(&relay, SERVICE, &["connect", "--stdio", "dev1"]);
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    within(10, async {
        relay.grant().await;
        let mut leg = relay.accept().await;
        leg.socket.send(Frame::binary("banner")).await.unwrap();
        leg.socket.send(Frame::binary("")).await.unwrap();
        let mut banner = String::new();
        output.read_to_string(&mut banner).await.unwrap();
        assert_eq!(banner, "banner");
        input.write_all(b"late").await.unwrap();
        drop(input);
        assert_eq!(next_data(&mut leg).await, Frame::binary("late"));
        assert_eq!(next_data(&mut leg).await, Frame::binary(""));
        assert!(next_data(&mut leg).await.is_close());
        while let Some(Ok(_)) = leg.socket.next().await {}
        assert_eq!(child.wait().await.unwrap().code(), Some(0));
    })
    .await;
}

#[tokio::test]
async fn a_cut_and_a_refusal_have_their_codes_and_one_line() {
    let relay = Relay::start().await;
    within(10, async {
        let mut child = midspan(&relay, SERVICE, &["connect", "--stdio", "dev1"]);
        relay.grant().await;
        drop(relay.accept().await);
        assert_eq!(child.wait().await.unwrap().code(), Some(10));

        let child = midspan(&relay, SERVICE, &["connect", "--stdio", "dev1"]);
        relay.refuse(404, "device_offline").await;
        let ended = child.wait_with_output().await.unwrap();
        assert_eq!(ended.status.code(), Some(5));
        assert_eq!(
            String::from_utf8(ended.stderr).unwrap(),
            "midspan: device dev1 is not connected to the relay; start 'midspan device' there, or wait with --connect-timeout\n"
        );
    })
    .await;
}

#[tokio::test]
async fn a_relay_that_has_no_room_is_asked_again_when_it_says_soon() {
    let relay = Relay::start().await;
    within(20, async {
        let mut child = midspan(&relay, SERVICE, &["connect", "--stdio", "dev1"]);
        let mut output = child.stdout.take().unwrap();
        relay.refuse_for(1, 503, "unavailable").await;
        let begin = Instant::now();
        relay.grant().await;
        assert!(begin.elapsed() > Duration::from_millis(900), "{:?}", begin.elapsed());
        let mut leg = relay.accept().await;
        leg.socket.send(Frame::binary("banner")).await.unwrap();
        let mut banner = [0; 6];
        output.read_exact(&mut banner).await.unwrap();
        assert_eq!(&banner, b"banner");

        let mut child = midspan(&relay, SERVICE, &["connect", "dev1", "web", "-L", "0"]);
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let line = lines.next_line().await.unwrap().unwrap();
        let mut local = TcpStream::connect(line.strip_prefix("listening on ").unwrap()).await.unwrap();
        relay.refuse_for(1, 429, "limit_reached").await;
        relay.grant().await;
        let mut leg = relay.accept().await;
        local.write_all(b"question").await.unwrap();
        assert_eq!(next_data(&mut leg).await, Frame::binary("question"));
    })
    .await;
}

#[tokio::test]
async fn a_relay_that_has_no_room_for_long_is_a_failure_at_once() {
    let relay = Relay::start().await;
    for (status, name, code) in [(503, "unavailable", 9), (429, "limit_reached", 8)] {
        within(10, async {
            let mut child = midspan(&relay, SERVICE, &["connect", "--stdio", "dev1"]);
            relay.refuse_for(60, status, name).await;
            assert_eq!(child.wait().await.unwrap().code(), Some(code), "{name}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_clock_that_is_wrong_is_named_in_the_log() {
    let relay = Relay::start().await;
    for (seconds, words) in [(600, "behind"), (-600, "ahead of"), (0, "")] {
        let mut child = midspan(&relay, "DeviceId=dev1", &["device", "--allow", "ssh=127.0.0.1:22"]);
        within(10, async {
            let mut welcome = link_message("welcome");
            let now = SystemClock.unix_now().0.checked_add_signed(seconds).unwrap();
            let time = |at| json!(UnixTime(at));
            (welcome["now"], welcome["expires"]) = (time(now), time(now + 3600));
            let mut link = relay.welcome(&welcome).await;
            // Whoever answers has read the welcome.
            link.tell(&relay.invitation("telnet", 1)).await;
            assert_eq!(link.hear().await["type"], "reject");
            terminate(&child).await;
            while let Some(Ok(_)) = link.socket.next().await {}
            let mut log = String::new();
            child.stderr.take().unwrap().read_to_string(&mut log).await.unwrap();
            let found = log.lines().find(|line| line.contains("clock"));
            let Some(warning) = found.filter(|_| seconds != 0) else {
                assert_eq!((found, seconds), (None, 0), "{log}");
                return;
            };
            assert!(
                warning.contains("WARN") && warning.contains(&format!(" {words} the relay's")),
                "{warning}"
            );
            // A second or two may pass on the way.
            assert!((597..=603).any(|off| warning.contains(&format!(" {off} s "))), "{warning}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_listener_says_where_and_makes_streams() {
    let relay = Relay::start().await;
    let mut child = midspan(&relay, SERVICE, &["connect", "dev1", "web", "-L", "0"]);
    within(10, async {
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let line = lines.next_line().await.unwrap().unwrap();
        let address = line.strip_prefix("listening on ").unwrap();
        let mut local = TcpStream::connect(address).await.unwrap();
        assert!(relay.grant().await.contains(r#""name":"web""#));
        let mut leg = relay.accept().await;
        local.write_all(b"question").await.unwrap();
        assert_eq!(next_data(&mut leg).await, Frame::binary("question"));

        // A refused stream closes its own connection only.
        let mut refused = TcpStream::connect(address).await.unwrap();
        relay.refuse(409, "device_rejected").await;
        assert!(refused.read_u8().await.is_err());
        leg.socket.send(Frame::binary("answer")).await.unwrap();
        let mut answer = [0; 6];
        local.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"answer");
        terminate(&child).await;
        assert_eq!(child.wait().await.unwrap().code(), Some(0));
    })
    .await;
}

#[tokio::test]
async fn a_device_dials_first_and_stops_in_good_order() {
    let relay = Relay::start().await;
    let target = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let offer = format!("ssh={}", target.local_addr().unwrap());
    let broken = format!("broken={gone}");
    let mut child = midspan(&relay, "DeviceId=dev1", &["device", "--allow", &offer, "--allow", &broken]);
    within(15, async {
        let mut link = relay.link(3600).await;
        link.tell(&relay.invitation("broken", 1)).await;
        assert_eq!(link.hear().await["reason"], format!("cannot reach {gone}: connection refused"));
        link.tell(&relay.invitation("ssh", 2)).await;
        let (mut local, _) = target.accept().await.unwrap();
        assert_eq!(link.hear().await["type"], "accept");
        let mut leg = relay.accept().await;

        terminate(&child).await;
        while let Some(Ok(_)) = link.socket.next().await {}
        assert!(
            timeout(Duration::from_millis(300), child.wait()).await.is_err(),
            "the stream was not waited for"
        );
        local.write_all(b"still here").await.unwrap();
        assert_eq!(next_data(&mut leg).await, Frame::binary("still here"));
        leg.socket.close(None).await.unwrap();
        drop(local);
        while let Some(Ok(_)) = leg.socket.next().await {}
        assert_eq!(child.wait().await.unwrap().code(), Some(0));
    })
    .await;
}

#[tokio::test]
async fn echo_measures() {
    let relay = Relay::start().await;
    let child = midspan(&relay, SERVICE, &["echo", "dev1", "--count", "2", "--size", "5", "-o", "json"]);
    within(10, async {
        relay.grant().await;
        let mut leg = relay.accept().await;
        for _ in 0..2 {
            let message = next_data(&mut leg).await;
            assert_eq!(message.len(), 5);
            leg.socket.send(message).await.unwrap();
        }
        while let Some(Ok(_)) = leg.socket.next().await {}
        let ended = child.wait_with_output().await.unwrap();
        assert_eq!(ended.status.code(), Some(0));
        let report: serde_json::Value = serde_json::from_slice(&ended.stdout).unwrap();
        assert_eq!(report["round_trips_ms"].as_array().unwrap().len(), 2);
    })
    .await;
}

const SERVICE: &str = "SharedAccessKeyName=support";

fn midspan(relay: &Relay, identity: &str, arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_midspan"))
        .arg("--insecure-plaintext")
        .args(arguments)
        .env("MIDSPAN_CONNECTION_STRING", relay.connection_text(identity))
        .env("NO_PROXY", "127.0.0.1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

async fn terminate(child: &Child) {
    let id = child.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
}

async fn next_data(leg: &mut Incoming) -> Frame {
    loop {
        let frame = leg.socket.next().await.unwrap().unwrap();
        if !frame.is_ping() && !frame.is_pong() {
            return frame;
        }
    }
}
