//! What is passed from leg to leg, frame by frame, and what is not.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use testkit::{Frame, RawLeg, Relay, pattern};
use tokio::io::AsyncWriteExt as _;
use tokio_tungstenite::tungstenite::Message;

#[tokio::test]
async fn messages_keep_their_type_their_boundaries_and_their_order() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let mut stream = relay.join(&mut link).await;
    let sizes = [0, 1, 125, 126, 127, 4096, 65_535, 65_536, 65_537, 0, 300_000];
    let messages = sizes.map(pattern).into_iter().enumerate().map(|(index, bytes)| match index % 2 {
        0 => Message::binary(bytes),
        _ => Message::text(bytes.iter().map(|byte| char::from(byte & 0x7f)).collect::<String>()),
    });
    let messages: Vec<_> = messages.collect();
    for message in &messages {
        stream.service.send(message.clone()).await;
        assert_eq!(&stream.device.next().await, message);
    }
    // The same the other way, all at once.
    let (mut sending, mut receiving) = (stream.device, stream.service);
    let ((), ()) = tokio::join!(
        async {
            for message in &messages {
                sending.send(message.clone()).await;
            }
        },
        async {
            for message in &messages {
                assert_eq!(&receiving.next().await, message);
            }
        }
    );
}

#[tokio::test]
async fn text_is_passed_on_as_it_is() {
    let (_relay, mut service, mut device) = raw_pair().await;
    // Not UTF-8: the relay does not look.
    service.send(&Frame::text(b"\xff\xfe\x00caf\xe9")).await;
    assert_eq!(device.next_message().await, (1, b"\xff\xfe\x00caf\xe9".to_vec()));
}

#[tokio::test]
async fn frames_of_64_kib_stay_whole() {
    let (_relay, mut service, mut device) = raw_pair().await;
    for length in [0, 1, 65_536] {
        let payload = pattern(length);
        service.send(&Frame::binary(&payload)).await;
        let frame = device.next_but_pings().await;
        assert_eq!((frame.fin, frame.opcode, frame.payload.len()), (true, 2, length));
        assert!(frame.payload == payload, "the payload was changed");
    }
}

#[tokio::test]
async fn fragments_may_have_pings_between_them() {
    let (_relay, mut service, mut device) = raw_pair().await;
    service.send(&Frame::text(b"one ").unfinished()).await;
    service.send(&Frame::ping(b"are you there?")).await;
    assert_eq!(service.next_but_pings().await, pong(b"are you there?"));
    service.send(&Frame::continuation(b"two ").unfinished()).await;
    service.send(&Frame::continuation(b"").unfinished()).await;
    service.send(&Frame::continuation(b"three")).await;
    assert_eq!(device.next_message().await, (1, b"one two three".to_vec()));
}

#[tokio::test]
async fn pings_are_answered_and_not_passed_on() {
    let (_relay, mut service, mut device) = raw_pair().await;
    let long = [7; 125];
    for payload in [&b""[..], b"x", &long] {
        service.send(&Frame::ping(payload)).await;
        assert_eq!(service.next().await, Some(pong(payload)));
    }
    service.send(&Frame::new(10, b"a pong that nobody asked for")).await;
    service.send(&Frame::binary(b"after the pings")).await;
    assert_eq!(device.next().await, Some(Frame::binary(b"after the pings").unmasked()));
}

#[tokio::test]
async fn frames_arrive_whatever_pieces_they_travel_in() {
    let (_relay, mut service, mut device) = raw_pair().await;
    let payload = pattern(300);
    for byte in [Frame::binary(&payload).bytes(), Frame::text(b"hello").bytes()].concat() {
        service.send_bytes(&[byte]).await;
    }
    assert_eq!(device.next_message().await, (2, payload));
    assert_eq!(device.next_message().await, (1, b"hello".to_vec()));
}

#[tokio::test]
async fn every_offence_against_the_frame_protocol_ends_the_stream() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let close_with_half_a_code = Frame::new(8, &[3]);
    let long_form = [0x82, 0xfe, 0x00, 0x05, 0, 0, 0, 0, 1, 2, 3, 4, 5];
    let offences = [
        ("an unmasked frame", Frame::binary(b"x").unmasked().bytes()),
        ("the first reserved bit", Frame::binary(b"x").reserved(4).bytes()),
        ("the last reserved bit", Frame::text(b"x").reserved(1).bytes()),
        ("an oversized ping", Frame::ping(&[0; 126]).bytes()),
        ("an oversized close frame", Frame::close(1000, &"x".repeat(124)).bytes()),
        ("a ping in fragments", Frame::ping(b"x").unfinished().bytes()),
        ("an unknown opcode", Frame::new(3, b"x").bytes()),
        ("an unknown control opcode", Frame::new(11, b"x").bytes()),
        ("a continuation of nothing", Frame::continuation(b"x").bytes()),
        (
            "a message in a message",
            [Frame::text(b"x").unfinished().bytes(), Frame::text(b"y").bytes()].concat(),
        ),
        ("a length that is not the shortest", long_form.to_vec()),
        ("half a close code", close_with_half_a_code.bytes()),
        ("a close code that must not be sent", Frame::close(1006, "").bytes()),
        ("a close text that is not UTF-8", Frame::new(8, b"\x03\xe8\xff").bytes()),
    ];
    for (index, (what, bytes)) in offences.into_iter().enumerate() {
        let handshake = relay.handshake("dev1", &mut link).await;
        let (service, device) =
            (relay.raw_service_leg(&handshake).await, relay.raw_device_leg(&handshake).await);
        // Either role may be the one.
        let (role, mut offender, mut peer) =
            if index % 2 == 0 { ("service", service, device) } else { ("device", device, service) };
        offender.send(&Frame::binary(b"before")).await;
        offender.send_bytes(&bytes).await;
        assert_eq!(peer.next_but_pings().await.payload, b"before", "{what}");
        let reason = format!("{role}_protocol");
        eprintln!("{what}");
        // For what is not UTF-8 there is a code of its own.
        let code = if what.ends_with("not UTF-8") { 1007 } else { 1002 };
        offender.ends(code, &reason).await;
        if what == "a message in a message" {
            // What was sent of the message is passed on; the stream ends in the middle of it.
            let part = peer.next_but_pings().await;
            assert!(!part.fin && part.payload == b"x", "{part:?}");
        }
        peer.ends(1011, &reason).await;
    }
    relay.assert_quiet().await;
    let metrics = relay.metrics().await;
    let ends = |reason| metrics.count("midspan_edge_stream_ends_total", &[("reason", reason)]);
    assert_eq!((ends("service_protocol"), ends("device_protocol")), (7, 7));
}

#[tokio::test]
async fn a_message_of_64_mib_needs_no_memory() {
    const LENGTH: usize = 64 << 20;
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let mut stream = relay.join(&mut link).await;
    let before = relay.resident_kib();
    let message = pattern(LENGTH);
    let sent = message.clone();
    let mut most = 0;
    let receiving = async {
        let mut socket = stream.device.socket;
        let mut next = std::pin::pin!(socket.next());
        loop {
            tokio::select! {
                received = &mut next => return received.unwrap().unwrap().into_data(),
                () = tokio::time::sleep(Duration::from_millis(20)) => {
                    most = most.max(relay.resident_kib());
                }
            }
        }
    };
    let (sending, received) = tokio::join!(stream.service.socket.send(Message::binary(sent)), receiving);
    sending.unwrap();
    assert!(received == message, "the message was changed");
    assert!(most > 0, "the memory was never looked at");
    assert!(most < before + 16 * 1024, "the relay grew from {before} KiB to {most} KiB");
}

#[tokio::test]
async fn a_flood_of_pings_whose_answers_nobody_reads_needs_no_memory() {
    let (relay, service, _device) = raw_pair().await;
    let before = relay.resident_kib();
    let flood = Frame::ping(&[7; 125]).bytes().repeat(1000);
    let mut io = service.io;
    let mut sent = 0;
    // Until the relay takes no more.
    while let Ok(written) = tokio::time::timeout(Duration::from_secs(1), io.write_all(&flood)).await {
        written.unwrap();
        sent += flood.len();
        assert!(sent < 256 << 20, "the relay takes pings for ever");
    }
    assert!(sent > 0);
    let grown = relay.resident_kib().saturating_sub(before);
    assert!(grown < 16 * 1024, "the relay grew by {grown} KiB");
}

#[tokio::test]
async fn a_hundred_thousand_small_messages_arrive_in_order() {
    const MESSAGES: u32 = 100_000;
    let (_relay, mut service, mut device) = raw_pair().await;
    let bytes: Vec<_> =
        (0..MESSAGES).flat_map(|number| Frame::binary(&number.to_be_bytes()).bytes()).collect();
    let sending = service.send_bytes(&bytes);
    let receiving = async {
        for number in 0..MESSAGES {
            let frame = device.next_but_pings().await;
            assert_eq!(frame.payload, number.to_be_bytes());
        }
    };
    tokio::join!(sending, receiving);
}

fn pong(payload: &[u8]) -> Frame {
    Frame::new(10, payload).unmasked()
}

async fn raw_pair() -> (Relay, RawLeg, RawLeg) {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let (service, device) = (relay.raw_service_leg(&handshake).await, relay.raw_device_leg(&handshake).await);
    link.close().await;
    (relay, service, device)
}
