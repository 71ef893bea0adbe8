//! From the request for a stream to its two legs, and everything that can go wrong on the way.

use std::time::Duration;

use midspan_core::{api::StreamPage, capability::Capabilities, id::RequestId, link::GoodbyeReason};
use secrecy::ExposeSecret as _;
use serde_json::json;
use testkit::{Bye, Leg, Relay};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_tungstenite::tungstenite::Message;

#[tokio::test]
async fn a_stream_is_opened_and_carries_bytes_both_ways() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let mut stream = relay.join(&mut link).await;
    stream.service.send_text("hello").await;
    assert_eq!(stream.device.next_text().await, "hello");
    stream.device.send_binary("world").await;
    assert_eq!(stream.service.next_binary().await, "world");

    let metrics = relay.metrics().await;
    assert_eq!(metrics.count("midspan_edge_streams", &[("state", "joined")]), 1);
    assert_eq!(metrics.count("midspan_edge_legs", &[("role", "device")]), 1);
    assert_eq!(metrics.count("midspan_edge_legs", &[("role", "service")]), 1);
    assert_eq!(metrics.count("midspan_control_device_links", &[]), 1);

    stream.service.close(1000, "").await;
    assert_eq!(stream.device.closed().await, (1000, String::new()));
    drop(stream);
    relay.assert_quiet().await;
    assert_eq!(
        relay.metrics().await.count("midspan_edge_stream_ends_total", &[("reason", "service_closed")]),
        1
    );
}

#[tokio::test]
async fn a_stream_that_goes_well_is_worth_no_warning() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let mut stream = relay.join(&mut link).await;
    stream.device.close(1000, "").await;
    tokio::join!(stream.service.closed(), stream.device.closed());
    relay.service().ended(stream.id, "device_closed").await;
    link.close().await;
    relay.counts("midspan_control_device_links", &[], 0).await;
    let records = relay.log_records();
    let loud = records.iter().find(|record| matches!(record["level"].as_str(), Some("WARN" | "ERROR")));
    assert_eq!(loud, None);
}

#[tokio::test]
async fn answers_find_their_requests_in_any_order() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let mut asking = JoinSet::new();
    for number in 0..50_u32 {
        let service = relay.service();
        asking.spawn(async move {
            let name = format!("stream-{number}");
            let answer = service.open_with("dev1", json!({ "name": name })).await;
            if number.is_multiple_of(3) {
                let problem = answer.problem(409, "device_rejected");
                assert_eq!(problem.device_reason, Some(name));
                None
            } else {
                Some((name, answer.grant().stream))
            }
        });
    }
    let mut requests = Vec::new();
    for _ in 0..50 {
        requests.push(link.next_request().await);
    }
    for request in requests.iter().rev() {
        let name = request.name.as_str();
        let number: u32 = name.trim_start_matches("stream-").parse().unwrap();
        if number.is_multiple_of(3) {
            link.reject(request.request, name).await;
        } else {
            link.accept(request.request).await;
        }
    }
    let granted = asking.join_all().await.into_iter().flatten().collect::<Vec<_>>();
    assert_eq!(granted.len(), 33);
    for (name, stream) in granted {
        let request = requests.iter().find(|request| request.stream == stream).unwrap();
        assert_eq!(request.name.as_str(), name);
    }
}

#[tokio::test]
async fn a_trace_that_cannot_be_read_is_replaced() {
    let relay = Relay::start().await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    let headers = [("content-type", "application/json"), ("traceparent", "nonsense")];
    let (answer, invitation) = tokio::join!(
        service.send(http::Method::POST, "/v1/devices/dev1/streams", &headers, br#"{"name":"test"}"#),
        async {
            let invitation = link.next_request().await;
            link.accept(invitation.request).await;
            invitation
        }
    );
    let trace = |text: String| text.split('-').nth(1).unwrap().to_owned();
    assert_eq!(trace(answer.grant().traceparent.to_string()), trace(invitation.traceparent.to_string()));
}

#[tokio::test]
async fn urls_name_the_relay_and_the_stream() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let stream = handshake.grant.stream;
    let base = relay.url().replace("https://", "wss://");
    assert_eq!(handshake.grant.url, format!("{base}/bridges/{stream}/service"));
    assert_eq!(handshake.invitation.url, format!("{base}/bridges/{stream}/device"));
    assert_eq!(handshake.grant.expires, handshake.invitation.expires);
    let record = relay.service().stream(stream).await;
    assert_eq!(record.expires.since(record.created), Duration::from_secs(60));
    // The tickets are made within the second after.
    let end = handshake.grant.expires.0;
    assert!(
        (record.expires.0..=record.expires.0 + 1).contains(&end),
        "{} {}",
        handshake.grant.expires,
        record.expires
    );
}

#[tokio::test]
async fn a_module_is_reached_by_its_own_name() {
    let relay = Relay::start().await;
    let (mut device, mut module) = (relay.device("dev1").await, relay.device("dev1/camera").await);
    let handshake = relay.handshake("dev1/camera", &mut module).await;
    let (mut service, mut leg) = (relay.service_leg(&handshake).await, relay.device_leg(&handshake).await);
    service.send_text("for the camera").await;
    assert_eq!(leg.next_text().await, "for the camera");
    assert!(device.is_quiet_for(Duration::from_millis(200)).await, "the device was asked for its module");
}

#[tokio::test]
async fn what_one_end_states_the_other_hears() {
    let relay = Relay::start().await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    let body =
        json!({ "name": "ssh", "capabilities": ["half-close", "other"], "metadata": { "who": "alice" } });
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let headers = [("content-type", "application/json"), ("traceparent", trace)];
    let body = body.to_string();
    let (answer, invitation) = tokio::join!(
        service.send(http::Method::POST, "/v1/devices/dev1/streams", &headers, body.as_bytes()),
        async {
            let invitation = link.next_request().await;
            let answer = json!({
                "type": "accept", "request": invitation.request, "capabilities": ["half-close"], "later": 1
            });
            link.send(&answer).await;
            invitation
        }
    );
    let grant = answer.grant();
    assert_eq!(invitation.name.as_str(), "ssh");
    assert_eq!(invitation.capabilities.to_string(), "half-close,other");
    assert_eq!(invitation.metadata.iter().collect::<Vec<_>>(), [("who", "alice")]);
    assert_eq!(grant.capabilities, Capabilities::of_this_client());
    // The trace is the service's on both sides.
    for traceparent in [invitation.traceparent.to_string(), grant.traceparent.to_string()] {
        assert_eq!(traceparent.split('-').nth(1), trace.split('-').nth(1));
    }
}

#[tokio::test]
async fn time_outs_are_clamped_and_the_answer_says_so() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let body = json!({ "name": "test", "connect_timeout_seconds": 60, "response_timeout_seconds": 60 });
    let grant = relay.handshake_with("dev1", &mut link, body).await.grant;
    assert_eq!((grant.connect_timeout_seconds, grant.response_timeout_seconds), (49, 1));
    let grant = relay.handshake_with("dev1", &mut link, json!({ "name": "test" })).await.grant;
    assert_eq!((grant.connect_timeout_seconds, grant.response_timeout_seconds), (10, 20));
}

#[tokio::test]
async fn a_device_that_is_offline_is_a_404() {
    let relay = Relay::start().await;
    let body = json!({ "name": "test", "connect_timeout_seconds": 0 });
    let problem = relay.service().open_with("dev1", body).await.problem(404, "device_offline");
    assert!(problem.retry, "it may come online");
    relay.assert_quiet().await;
    relay.counts("midspan_control_initiations_total", &[("result", "device_offline")], 1).await;
}

#[tokio::test]
async fn a_device_may_come_online_while_it_is_waited_for() {
    let relay = Relay::start().await;
    let service = relay.service();
    let (answer, ()) = tokio::join!(service.open("dev1"), async {
        relay.counts("midspan_control_waiting_initiations", &[], 1).await;
        let mut link = relay.device("dev1").await;
        let invitation = link.next_request().await;
        link.accept(invitation.request).await;
    });
    answer.grant();
}

#[tokio::test]
async fn a_device_that_comes_too_late_hears_nothing() {
    let relay = Relay::start().await;
    let body = json!({ "name": "test", "connect_timeout_seconds": 1 });
    relay.service().open_with("dev1", body).await.problem(404, "device_offline");
    let mut link = relay.device("dev1").await;
    assert!(
        link.is_quiet_for(Duration::from_millis(300)).await,
        "the device heard of a request that was over"
    );
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_silent_device_is_a_504_and_its_leg_is_told() {
    let relay = Relay::start().await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    let body = json!({ "name": "test", "response_timeout_seconds": 1 });
    let (answer, (invitation, mut leg)) = tokio::join!(service.open_with("dev1", body), async {
        let invitation = link.next_request().await;
        assert!((1..=1000).contains(&invitation.answer_within_ms), "{}", invitation.answer_within_ms);
        let leg = Leg::open(relay.target(), &invitation.url, invitation.ticket.expose_secret()).await;
        (invitation, leg)
    });
    answer.problem(504, "device_silent");
    leg.ends(1013, "device_silent").await;

    // An answer after the end is counted, and does no harm.
    link.accept(invitation.request).await;
    relay.counts("midspan_control_unexpected_answers_total", &[], 1).await;
    relay.handshake("dev1", &mut link).await;
    service.ended(invitation.stream, "device_silent").await;
}

#[tokio::test]
async fn a_rejection_reaches_the_service_with_its_reason() {
    let relay = Relay::start().await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    let (answer, ()) = tokio::join!(service.open("dev1"), async {
        let invitation = link.next_request().await;
        link.reject(invitation.request, "no such service here: test").await;
    });
    let problem = answer.problem(409, "device_rejected");
    assert_eq!(problem.device_reason.as_deref(), Some("no such service here: test"));
    assert!(problem.detail.contains("no such service here: test"), "{}", problem.detail);
    assert!(!problem.retry);
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_long_reason_is_cut_at_the_end_of_a_character() {
    let relay = Relay::start().await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    let reason = format!("x{}", "é".repeat(5 * 1024));
    let (answer, ()) = tokio::join!(service.open("dev1"), async {
        let invitation = link.next_request().await;
        link.reject(invitation.request, &reason).await;
    });
    let problem = answer.problem(409, "device_rejected");
    // 1,024 bytes would end in the middle of an é.
    assert_eq!(problem.device_reason.as_deref(), Some(&reason[..1023]));
}

#[tokio::test]
async fn only_the_first_answer_counts() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    link.reject(handshake.invitation.request, "changed my mind").await;
    relay.counts("midspan_control_unexpected_answers_total", &[], 1).await;
    let (mut service, mut device) = (relay.service_leg(&handshake).await, relay.device_leg(&handshake).await);
    service.send_text("still there").await;
    assert_eq!(device.next_text().await, "still there");
}

#[tokio::test]
async fn an_answer_to_nothing_is_ignored() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    link.accept(RequestId::from_random(1)).await;
    link.reject(RequestId::from_random(2), "no").await;
    link.send(&json!({ "type": "of_a_later_version", "x": 1 })).await;
    relay.counts("midspan_control_unexpected_answers_total", &[], 2).await;
    relay.handshake("dev1", &mut link).await;
}

#[tokio::test]
async fn nonsense_on_the_link_ends_it() {
    let relay = Relay::start().await;
    let messages = [
        Message::text("not json"),
        Message::text(r#"{"type":"accept"}"#),
        Message::text(r#"["accept"]"#),
        Message::binary("bytes"),
        Message::text(json!({ "type": "later", "padding": "x".repeat(65 * 1024) }).to_string()),
    ];
    for message in messages {
        let mut link = relay.device("dev1").await;
        link.send_frame(message.clone()).await;
        let Bye { goodbye, code } = link.ended().await;
        assert_eq!(goodbye.map(|goodbye| goodbye.reason), Some(GoodbyeReason::BadMessage), "{message:?}");
        assert_eq!(code, Some(1007), "{message:?}");
    }
    relay.assert_quiet().await;
}

#[tokio::test]
async fn the_leg_may_overtake_the_answer() {
    let relay = Relay::start().await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    let (answer, mut device) = tokio::join!(service.open("dev1"), async {
        let invitation = link.next_request().await;
        let mut leg = Leg::open(relay.target(), &invitation.url, invitation.ticket.expose_secret()).await;
        leg.send_text("sent before anybody accepted").await;
        relay.counts("midspan_edge_legs", &[("role", "device")], 1).await;
        link.accept(invitation.request).await;
        leg
    });
    let grant = answer.grant();
    let mut service = Leg::open(relay.target(), &grant.url, grant.ticket.expose_secret()).await;
    assert_eq!(service.next_text().await, "sent before anybody accepted");
    service.close(1000, "").await;
    device.closed().await;
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_device_that_loses_its_link_is_asked_again() {
    let relay = Relay::start().await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    let (answer, (first, second)) = tokio::join!(service.open("dev1"), async {
        let first = link.next_request().await.request;
        let mut newer = relay.device("dev1").await;
        let second = newer.next_request().await;
        newer.accept(second.request).await;
        (first, second.request)
    });
    answer.grant();
    assert_eq!(first, second, "it is the same request");
}

#[tokio::test]
async fn a_device_that_vanishes_after_accepting_is_missed_at_the_handshakes_end() {
    let relay = Relay::with(&["--handshake-limit", "2s"]).await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    drop(link);
    relay.service_leg(&handshake).await.ends(1013, "device_leg_missing").await;
    relay.assert_quiet().await;
    assert_eq!(relay.metrics().await.count("midspan_control_device_links", &[]), 0);
}

#[tokio::test]
async fn a_service_that_hangs_up_gives_the_stream_up() {
    let relay = Relay::start().await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    let asking = service.open("dev1");
    let device = async {
        let invitation = link.next_request().await;
        let leg = Leg::open(relay.target(), &invitation.url, invitation.ticket.expose_secret()).await;
        (invitation, leg)
    };
    let (invitation, mut leg) = tokio::select! {
        answer = asking => panic!("nobody answered, but there is {answer:?}"),
        // Here the request is dropped, and its connection with it.
        both = device => both,
    };
    leg.ends(1001, "service_gave_up").await;
    let listed: StreamPage =
        serde_json::from_value(service.get("/v1/streams").await.expect(200).json()).unwrap();
    assert!(listed.items.is_empty(), "{listed:?}");
    service.ended(invitation.stream, "service_gave_up").await;
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_leg_that_stays_alone_is_told_at_the_handshakes_end() {
    let relay = Relay::with(&["--handshake-limit", "2s"]).await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    let only_service = relay.handshake("dev1", &mut link).await;
    let only_device = relay.handshake("dev1", &mut link).await;
    let neither = relay.handshake("dev1", &mut link).await;
    let (mut service_leg, mut device_leg) =
        (relay.service_leg(&only_service).await, relay.device_leg(&only_device).await);
    service_leg.send_text("nobody reads this").await;
    relay.counts("midspan_edge_streams", &[("state", "half_open")], 2).await;
    tokio::join!(service_leg.ends(1013, "device_leg_missing"), device_leg.ends(1013, "service_leg_missing"));
    for (handshake, reason) in [
        (only_service, "device_leg_missing"),
        (only_device, "service_leg_missing"),
        (neither, "both_legs_missing"),
    ] {
        service.ended(handshake.grant.stream, reason).await;
    }
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_leg_that_waits_and_goes_away_leaves_nothing_behind() {
    let relay = Relay::with(&["--handshake-limit", "3s"]).await;
    let mut link = relay.device("dev1").await;
    for role in ["device", "service"] {
        let handshake = relay.handshake("dev1", &mut link).await;
        let mut leg = match role {
            "device" => relay.device_leg(&handshake).await,
            _ => relay.service_leg(&handshake).await,
        };
        leg.send_text("nobody reads this").await;
        relay.counts("midspan_edge_legs", &[("role", role)], 1).await;
        drop(leg);
        // The relay does not read from a leg that waits, and notices all the same.
        relay.counts("midspan_edge_legs", &[("role", role)], 0).await;
        assert!(!relay.service().stream(handshake.grant.stream).await.is_ended(), "{role}: not given time");
        relay.service().ended(handshake.grant.stream, "both_legs_missing").await;
        relay.assert_quiet().await;
    }
    relay.counts("midspan_edge_stream_ends_total", &[("reason", "both_legs_missing")], 2).await;
}

#[tokio::test]
async fn a_newer_link_of_a_device_replaces_the_older_one() {
    let relay = Relay::start().await;
    let older = relay.device("dev1").await;
    let mut newer = relay.device("dev1").await;
    let Bye { goodbye, code } = older.ended().await;
    let goodbye = goodbye.expect("no goodbye");
    assert_eq!((goodbye.reason, goodbye.come_back_seconds), (GoodbyeReason::Replaced, 300));
    assert_eq!(code, Some(1008));
    relay.handshake("dev1", &mut newer).await;
    relay.counts("midspan_control_device_links", &[], 1).await;
}

#[tokio::test]
async fn a_link_needs_its_subprotocol() {
    let relay = Relay::start().await;
    let connection = relay.device_connection("dev1");
    let authorization = connection.sign(testkit::now().plus(Duration::from_secs(60)));
    let headers = [("authorization", authorization.expose_secret())];
    let refusal = relay.target().upgrade("/v1/devices/dev1/link", &headers).await.unwrap_err();
    refusal.problem(426, "upgrade_required");
    let path = "/v1/devices/dev1/link";
    let plain = relay.target().request(relay.target().build(http::Method::GET, path, &headers, b"")).await;
    plain.problem(426, "upgrade_required");
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_device_that_is_silent_on_its_link_is_given_up() {
    let relay = Relay::with(&["--link-ping", "200ms", "--link-silence", "1s"]).await;
    // A link that nobody reads answers no ping.
    let silent = relay.device("dev1").await;
    let mut alive = relay.device("dev2").await;
    timeout(Duration::from_secs(2), alive.next()).await.unwrap_err();
    relay.counts("midspan_control_device_links", &[], 1).await;
    drop(silent);
    sleep(Duration::from_millis(100)).await;
    relay.handshake("dev2", &mut alive).await;
}
