//! However a stream ends: the other end hears of it, after all that was sent before, and the records tell of it.

use std::{cell::Cell, time::Duration};

use midspan_core::{close::CloseReason, record::StreamState};
use serde_json::Value;
use testkit::{Dial, Frame, Incoming, Joined, Leg, Opener, Random, Relay, Script, pattern, until};
use tokio::{
    io::AsyncWriteExt as _,
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_tungstenite::tungstenite::Message;

#[tokio::test]
async fn code_and_text_of_a_close_are_passed_on() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let longest = "x".repeat(123);
    for (code, text) in [(1000, "done"), (1001, ""), (3000, "registered"), (4999, longest.as_str())] {
        let mut stream = relay.join(&mut link).await;
        let (from, to) = ends(&mut stream, code % 2 == 0);
        from.close(code, text).await;
        assert_eq!(to.closed().await, (code, text.to_owned()));
        // The relay answers the close frame.
        assert_eq!(from.closed().await, (code, text.to_owned()));
    }
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_close_without_a_code_is_passed_on_without_one() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let mut stream = relay.join(&mut link).await;
    stream.service.send(Message::Close(None)).await;
    assert_eq!(stream.device.closed().await, (1005, String::new()));
}

#[tokio::test]
async fn all_that_was_sent_before_the_close_arrives_before_it() {
    // Of 1 MiB each.
    const PIECES: usize = 64;
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    for service_sends in [true, false] {
        let mut stream = relay.join(&mut link).await;
        let (from, to) = ends(&mut stream, service_sends);
        let piece = pattern(1024 * 1024);
        let closed = Cell::new(false);
        let sending = async {
            for _ in 0..PIECES {
                from.send_binary(piece.clone()).await;
            }
            from.close(4321, "that was all").await;
            closed.set(true);
        };
        let receiving = async {
            // Long enough for the writer to fill everything on the way.
            sleep(Duration::from_secs(1)).await;
            assert!(!closed.get(), "the buffers on the way hold all of it: send more");
            for _ in 0..PIECES {
                assert!(to.next_binary().await == piece, "a message was changed");
            }
            to.closed().await
        };
        let ((), close) = tokio::join!(sending, receiving);
        assert_eq!(close, (4321, "that was all".to_owned()));
    }
    relay.assert_quiet().await;
}

#[tokio::test]
async fn all_of_it_arrives_however_late_the_reader_is_and_whatever_it_sends_meanwhile() {
    // All of it fits into the kernels' buffers, so that the relay has nothing left to write long before it is read.
    const MESSAGES: u64 = 20;
    let secure = Relay::start().await;
    let open = Relay::with(&["--insecure-plaintext"]).await;
    let mut streams = JoinSet::new();
    // From when on the reader sends: all the time, or once it was silent for a while.
    for (relay, tls) in [(&secure, true), (&open, false)] {
        let dial = Dial { target: relay.target().clone(), tls, buffers: None };
        for silent in [0, 6500] {
            let mut opener = Opener::connect(relay, &dial, &format!("late-{silent}")).await;
            streams.spawn(async move {
                let (service, device) = opener.open().await;
                let messages = Script::even(1, 60_000);
                let (mut answers, mut service) = service.split(Script::even(2, 0));
                let (mut reader, mut device) = device.split(messages.clone());
                let mut random = Random::new(3);
                for message in messages.take(usize::try_from(MESSAGES).unwrap()) {
                    service.message(&message, &mut random).await.unwrap();
                }
                service.close(Some((1000, "that was all")), &mut random).await.unwrap();
                let all = Incoming::Close(Some((1000, "that was all".to_owned())));
                assert_eq!(answers.next().await, all);

                sleep(Duration::from_millis(silent)).await;
                let begin = Instant::now() + Duration::from_millis(8000 - silent);
                while Instant::now() < begin {
                    device.control(9, b"still here", &mut random).await.unwrap();
                    sleep(Duration::from_millis(50)).await;
                }
                let close = loop {
                    match reader.next().await {
                        Incoming::Data(_) | Incoming::Pong(_) => {}
                        other @ (Incoming::Ping(_) | Incoming::Close(_)) => break other,
                    }
                };
                assert_eq!(close, all);
                assert_eq!(reader.received(), (MESSAGES, 0));
                device.close(Some((1000, "")), &mut random).await.unwrap();
                reader.ended().await;
            });
        }
    }
    streams.join_all().await;
    secure.assert_quiet().await;
    open.assert_quiet().await;
}

#[tokio::test]
async fn an_end_that_never_answers_the_close_is_not_waited_for_for_ever() {
    let relay = Relay::with(&["--close-limit", "200ms"]).await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let mut service = relay.service_leg(&handshake).await;
    let mut device = relay.raw_device_leg(&handshake).await;
    service.send_binary("read by nobody").await;
    service.close(1000, "").await;
    service.closed().await;
    let talking = async {
        while device.io.write_all(&Frame::ping(b"still here").bytes()).await.is_ok() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::join!(talking, relay.assert_quiet());
}

#[tokio::test]
async fn who_sends_closes_and_is_gone_is_still_heard() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let mut service = relay.raw_service_leg(&handshake).await;
    let mut device = relay.device_leg(&handshake).await;
    service.send(&Frame::binary(&pattern(300_000))).await;
    service.send(&Frame::close(1000, "bye")).await;
    service.io.shutdown().await.unwrap();
    assert!(device.next_binary().await == pattern(300_000));
    assert_eq!(device.closed().await, (1000, "bye".to_owned()));
    relay.service().ended(handshake.grant.stream, "service_closed").await;
}

#[tokio::test]
async fn a_connection_that_is_reset_is_told_at_once() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let Joined { service, mut device, .. } = relay.join(&mut link).await;
    service.abort();
    device.ends(1011, "service_lost").await;
    let Joined { mut service, device, .. } = relay.join(&mut link).await;
    device.abort();
    service.ends(1011, "device_lost").await;
    drop(service);
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_connection_that_ends_without_a_close_frame_is_lost() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    // With TLS's own goodbye, without it, and in the middle of a frame.
    for half_a_frame in [true, false] {
        for clean in [true, false] {
            let handshake = relay.handshake("dev1", &mut link).await;
            let mut service = relay.raw_service_leg(&handshake).await;
            let mut device = relay.device_leg(&handshake).await;
            if half_a_frame {
                service.send_bytes(&Frame::binary(&pattern(1000)).bytes()[..500]).await;
            }
            if clean {
                service.io.shutdown().await.unwrap();
            } else {
                drop(service);
            }
            device.ends(1011, "service_lost").await;
        }
    }
    relay.assert_quiet().await;
}

#[tokio::test]
async fn both_may_close_at_the_same_time() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    for _ in 0..20 {
        let mut stream = relay.join(&mut link).await;
        tokio::join!(stream.service.close(4001, "service"), stream.device.close(4002, "device"));
        let (to_service, to_device) = tokio::join!(stream.service.closed(), stream.device.closed());
        // Each hears the other's close, or the answer to its own.
        let possible = [(4001, "service".to_owned()), (4002, "device".to_owned())];
        assert!(
            possible.contains(&to_service) && possible.contains(&to_device),
            "{to_service:?} {to_device:?}"
        );
        let reason = relay.service().end_of(stream.id).await.reason;
        assert!(matches!(reason, CloseReason::ServiceClosed | CloseReason::DeviceClosed), "{reason}");
    }
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_deleted_stream_tells_both_ends() {
    let relay = Relay::start().await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    let mut stream = relay.join(&mut link).await;
    let path = format!("/v1/streams/{}", stream.id);
    let (answer, (), ()) = tokio::join!(
        service.delete(&path),
        stream.service.ends(1001, "deleted"),
        stream.device.ends(1001, "deleted")
    );
    assert_eq!((answer.status, answer.body.len()), (204, 0));
    service.ended(stream.id, "deleted").await;
    drop(stream);
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_half_open_stream_can_be_deleted_too() {
    let relay = Relay::start().await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    let handshake = relay.handshake("dev1", &mut link).await;
    let mut device = relay.device_leg(&handshake).await;
    let path = format!("/v1/streams/{}", handshake.grant.stream);
    let (answer, ()) = tokio::join!(service.delete(&path), device.ends(1001, "deleted"));
    assert_eq!(answer.status, 204);
    service.delete("/v1/streams/0123456789abcdef0123456789abcdef").await.problem(404, "stream_unknown");
    drop(device);
    relay.assert_quiet().await;
}

#[tokio::test]
async fn the_record_of_a_stream_says_how_it_went() {
    let relay = Relay::start().await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    let mut stream = relay.join(&mut link).await;
    let record = until("the record says joined", || async {
        let record = service.stream(stream.id).await;
        matches!(record.state, StreamState::Joined { .. }).then_some(record)
    })
    .await;
    assert_eq!((record.address.to_string(), record.name.as_str()), ("dev1".to_owned(), "test"));
    let midspan_core::connection_string::Identity::Service(policy) = &relay.service_connection().identity
    else {
        panic!("not a service")
    };
    assert_eq!(&record.credential, policy);

    stream.service.send_binary(vec![0; 10]).await;
    stream.device.next_binary().await;
    stream.device.send_binary(vec![0; 70_000]).await;
    stream.service.next_binary().await;
    stream.device.close(1000, "").await;
    stream.service.closed().await;
    let end = service.end_of(stream.id).await;
    assert_eq!(
        (end.reason, end.bytes_to_device, end.bytes_to_service),
        (CloseReason::DeviceClosed, 10, 70_000)
    );

    let property = |record: &Value, name: &str| -> Value {
        let properties: Value = serde_json::from_str(record["properties"].as_str().unwrap()).unwrap();
        properties.get(name).unwrap_or_else(|| panic!("no {name} in {properties}")).clone()
    };
    let records = until("the activity log has two records", || async {
        let records = relay.activity();
        (records.len() >= 2).then_some(records)
    })
    .await;
    let [initiation, end] = records.as_slice() else { panic!("{records:?}") };
    for record in [initiation, end] {
        assert_eq!(record["category"], "DeviceStreams");
        for field in ["time", "operationName", "resultType", "level", "durationMs"] {
            assert!(!record[field].is_null(), "no {field} in {record}");
        }
        assert_eq!(property(record, "deviceId"), "dev1");
    }
    assert_ne!(initiation["operationName"], end["operationName"]);
    assert_eq!(property(end, "bytesToDevice"), "10");
    assert_eq!(property(end, "bytesToService"), "70000");
}

#[tokio::test]
async fn initiations_that_fail_are_recorded_too() {
    let relay = Relay::start().await;
    let body = serde_json::json!({ "name": "ssh", "connect_timeout_seconds": 0 });
    relay.service().open_with("dev1/camera", body).await.problem(404, "device_offline");
    let record = until("the record", || async { relay.activity().into_iter().next() }).await;
    assert_eq!(
        (&record["category"], &record["resultType"]),
        (&"DeviceStreams".into(), &"device_offline".into())
    );
    let properties: Value = serde_json::from_str(record["properties"].as_str().unwrap()).unwrap();
    let expected =
        [("deviceId", "dev1"), ("moduleId", "camera"), ("requestName", "ssh"), ("statusCode", "404")];
    for (name, value) in expected {
        assert_eq!(properties[name], value, "{properties}");
    }
}

fn ends(stream: &mut Joined, service_first: bool) -> (&mut Leg, &mut Leg) {
    if service_first {
        (&mut stream.service, &mut stream.device)
    } else {
        (&mut stream.device, &mut stream.service)
    }
}
