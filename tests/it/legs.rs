//! The upgrade of a leg, its signs of life, and how it holds back who sends too fast.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use http::Method;
use secrecy::ExposeSecret as _;
use testkit::{Frame, Handshake, Leg, Relay, pattern, within};
use tokio::{
    io::AsyncWriteExt as _,
    time::{Instant, sleep, timeout},
};
use tokio_tungstenite::tungstenite::Message;

#[tokio::test]
async fn the_first_subprotocol_is_echoed_and_none_when_none_is_offered() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let offers = [("sec-websocket-protocol", "chat.v2, chat.v1")];
    let service =
        Leg::try_open(relay.target(), &handshake.grant.url, ticket(&handshake), &offers).await.unwrap();
    assert_eq!(service.headers["sec-websocket-protocol"], "chat.v2");
    let device = relay.device_leg(&handshake).await;
    assert!(!device.headers.contains_key("sec-websocket-protocol"), "{:?}", device.headers);
}

#[tokio::test]
async fn compression_is_declined() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let offers = [("sec-websocket-extensions", "permessage-deflate; client_max_window_bits")];
    let mut service =
        Leg::try_open(relay.target(), &handshake.grant.url, ticket(&handshake), &offers).await.unwrap();
    assert!(!service.headers.contains_key("sec-websocket-extensions"), "{:?}", service.headers);
    let mut device = relay.device_leg(&handshake).await;
    service.send_text("plain").await;
    assert_eq!(device.next_text().await, "plain");
}

#[tokio::test]
async fn a_leg_needs_a_websocket() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let url = &handshake.grant.url;
    let path = &url[url.find("/bridges").unwrap()..];
    let bearer = format!("Bearer {}", ticket(&handshake));
    let key = ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
    let version = ("sec-websocket-version", "13");
    let upgrade = ("upgrade", "websocket");
    let connection = ("connection", "Upgrade");
    let incomplete: [&[(&str, &str)]; 5] = [
        &[],
        &[connection, upgrade, version],
        &[connection, upgrade, key],
        &[upgrade, version, key],
        &[connection, upgrade, key, ("sec-websocket-version", "8")],
    ];
    for headers in incomplete {
        let headers = [&[("authorization", bearer.as_str())], headers].concat();
        let answer = relay.target().request(relay.target().build(Method::GET, path, &headers, b"")).await;
        answer.problem(426, "upgrade_required");
        // RFC 9110, section 15.5.22, and RFC 6455, section 4.4.
        assert_eq!(answer.headers["upgrade"], "websocket", "{headers:?}");
        assert_eq!(answer.headers["sec-websocket-version"], "13", "{headers:?}");
    }
    let headers = [("authorization", bearer.as_str())];
    let answer = relay.target().request(relay.target().build(Method::POST, path, &headers, b"")).await;
    answer.problem(405, "method_not_allowed");
    // None of that has used the ticket.
    relay.service_leg(&handshake).await;
}

#[tokio::test]
async fn a_leg_without_a_ticket_is_refused() {
    let relay = Relay::start().await;
    let id = "0123456789abcdef0123456789abcdef";
    for (path, headers) in [
        (format!("/bridges/{id}/device"), vec![]),
        (format!("/bridges/{id}/service"), vec![("authorization", "Basic dXNlcjpwYXNz")]),
    ] {
        let answer = relay.target().upgrade(&path, &headers).await.unwrap_err();
        answer.problem(401, "ticket_invalid");
    }
    for path in [format!("/bridges/{id}/nobody"), format!("/bridges/{id}"), "/bridges/x/device".to_owned()] {
        let answer = relay.target().upgrade(&path, &[]).await.unwrap_err();
        answer.problem(404, "not_found");
    }
    relay.assert_quiet().await;
}

#[tokio::test]
async fn what_comes_along_with_the_upgrade_is_not_lost() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let url = &handshake.grant.url;
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        &url[url.find("/bridges").unwrap()..],
        relay.target().authority,
        ticket(&handshake),
    );
    let mut service = relay.target().connect().await;
    let frames = [Frame::text(b"in the same packet").bytes(), Frame::close(1000, "bye").bytes()].concat();
    service.write_all(&[request.as_bytes(), &frames].concat()).await.unwrap();
    service.flush().await.unwrap();
    let mut device = relay.device_leg(&handshake).await;
    assert_eq!(device.next_text().await, "in the same packet");
    assert_eq!(device.closed().await, (1000, "bye".to_owned()));
}

#[tokio::test]
async fn what_the_first_leg_sends_waits_for_the_second() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let mut service = relay.service_leg(&handshake).await;
    let before = relay.resident_kib();
    let piece = pattern(256 * 1024);
    let sending = async {
        for _ in 0..64 {
            service.socket.send(Message::binary(piece.clone())).await.unwrap();
        }
        service.close(1000, "that was all").await;
    };
    let receiving = async {
        // Long enough for the writer to fill everything on the way.
        sleep(Duration::from_secs(1)).await;
        let grown = relay.resident_kib().saturating_sub(before);
        assert!(grown < 8 * 1024, "the relay grew by {grown} KiB");
        let mut device = relay.device_leg(&handshake).await;
        for _ in 0..64 {
            assert!(device.next_binary().await == piece, "a message was changed");
        }
        device.closed().await
    };
    let ((), close) = tokio::join!(sending, receiving);
    assert_eq!(close, (1000, "that was all".to_owned()));
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_the_writer_back_and_nothing_else() {
    let relay = Relay::with(&["--leg-ping", "200ms", "--leg-silence", "1s"]).await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let mut device = relay.device_leg(&handshake).await;
    let service = relay.service_leg(&handshake).await;
    let before = relay.resident_kib();

    let (mut sink, mut source) = service.socket.split();
    let piece = pattern(256 * 1024);
    let mut sent = 0;
    // Writes until nothing more is taken, and three times the silence limit longer. Reads meanwhile, and so answers pings.
    let stalled = async {
        let mut last = Instant::now();
        while last.elapsed() < Duration::from_secs(3) {
            if timeout(Duration::from_millis(500), sink.feed(Message::binary(piece.clone()))).await.is_ok() {
                sent += 1;
                last = Instant::now();
            }
            assert!(sent < 1000, "the writer is not held back");
        }
    };
    tokio::select! {
        () = stalled => {}
        message = source.next() => panic!("the service was told something: {message:?}"),
    }
    assert!(sent > 0);
    let grown = relay.resident_kib().saturating_sub(before);
    assert!(grown < 16 * 1024, "the relay grew by {grown} KiB");

    // Now the device reads, and all is there.
    let closing = async {
        sink.send(Message::Close(None)).await.unwrap();
    };
    let reading = async {
        for index in 0..sent {
            assert!(device.next_binary().await == piece, "message {index} of {sent} was changed");
        }
        device.next().await
    };
    let ((), end) = tokio::join!(closing, reading);
    assert_eq!(end, Message::Close(None));
}

#[tokio::test]
async fn a_reader_that_never_reads_again_is_cut() {
    let relay = Relay::with(&["--stall-limit", "1s"]).await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let device = relay.raw_device_leg(&handshake).await;
    let mut service = relay.service_leg(&handshake).await;
    let piece = pattern(256 * 1024);
    let flood = async { while service.socket.send(Message::binary(piece.clone())).await.is_ok() {} };
    // It does not listen to the relay's farewell, and is cut off after a while.
    timeout(3 * testkit::DEADLINE, flood).await.expect("the flood goes on");
    relay.service().ended(handshake.grant.stream, "device_stalled").await;
    drop((service, device));
    relay.assert_quiet().await;
}

#[tokio::test]
async fn who_was_not_stalled_hears_of_it() {
    let relay = Relay::with(&["--stall-limit", "1s"]).await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let service = relay.raw_service_leg(&handshake).await;
    let device = relay.device_leg(&handshake).await;
    let piece = pattern(256 * 1024);
    let (mut sink, mut source) = device.socket.split();
    let writing = async { while sink.send(Message::binary(piece.clone())).await.is_ok() {} };
    let reading = async {
        match within("the close frame", source.next()).await {
            Some(Ok(Message::Close(Some(frame)))) => frame,
            other => panic!("expected a close frame: {other:?}"),
        }
    };
    let frame = tokio::select! {
        biased;
        frame = reading => frame,
        () = async { writing.await; sleep(testkit::DEADLINE).await } => panic!("cut without a close frame"),
    };
    assert_eq!(u16::from(frame.code), 1008, "{frame:?}");
    assert!(frame.reason.starts_with("service_stalled: "), "{frame:?}");
    drop(service);
}

#[tokio::test]
async fn a_leg_that_answers_no_ping_is_cut() {
    let relay = Relay::with(&["--leg-ping", "200ms", "--leg-silence", "1s"]).await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let mut device = relay.raw_device_leg(&handshake).await;
    let mut service = relay.service_leg(&handshake).await;
    assert_eq!(device.next().await.map(|frame| frame.opcode), Some(9), "the relay pings");
    tokio::join!(service.ends(1011, "device_unresponsive"), device.ends(1011, "device_unresponsive"));
    drop((service, device));
    relay.assert_quiet().await;
}

#[tokio::test]
async fn signs_of_life_keep_a_leg() {
    let relay = Relay::with(&["--leg-ping", "200ms", "--leg-silence", "1s"]).await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let (mut device, mut service) =
        (relay.raw_device_leg(&handshake).await, relay.raw_service_leg(&handshake).await);
    // One answers pings, the other sends data; neither is idle for the limit.
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        let ping = device.next().await.unwrap();
        if ping.opcode == 9 {
            device.send(&Frame::new(10, &ping.payload)).await;
        }
        service.send(&Frame::binary(b"tick")).await;
    }
    device.send(&Frame::text(b"still there")).await;
    assert_eq!(service.next_message().await, (1, b"still there".to_vec()));
}

#[tokio::test]
async fn a_leg_that_waits_is_not_read_and_so_not_missed() {
    let relay = Relay::with(&["--leg-ping", "100ms", "--leg-silence", "500ms"]).await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let mut device = relay.device_leg(&handshake).await;
    // What it sends waits in the network's buffers, its pongs behind it.
    device.send_text("early").await;
    timeout(Duration::from_secs(2), device.next()).await.unwrap_err();
    let mut service = relay.service_leg(&handshake).await;
    assert_eq!(service.next_text().await, "early");
}

#[tokio::test]
async fn a_stream_on_which_nothing_is_sent_ends() {
    let relay = Relay::with(&["--idle-limit", "1s", "--leg-ping", "200ms"]).await;
    let mut link = relay.device("dev1").await;
    let mut stream = relay.join(&mut link).await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        stream.service.send_text("tick").await;
        stream.device.next_text().await;
        sleep(Duration::from_millis(100)).await;
    }
    // Pings are no payload.
    tokio::join!(stream.service.ends(1001, "idle"), stream.device.ends(1001, "idle"));
    drop(stream);
    relay.assert_quiet().await;
}

fn ticket(handshake: &Handshake) -> &str {
    handshake.grant.ticket.expose_secret()
}
