//! The HTTP API: what it takes, what it refuses, what it lists.

use std::collections::BTreeSet;

use http::Method;
use midspan_core::api::{DevicePage, Endpoints, StreamPage};
use serde_json::{Value, json};
use testkit::{Relay, ServiceApi, until};

#[tokio::test]
async fn endpoints_are_listed() {
    let relay = Relay::start().await;
    let answer = relay.service().get("/v1/endpoints").await;
    assert_eq!(answer.headers["content-type"], "application/json");
    let endpoints: Endpoints = serde_json::from_value(answer.expect(200).json()).unwrap();
    assert_eq!(endpoints.streaming_endpoints, [relay.url()]);
}

#[tokio::test]
async fn every_answer_has_a_request_id_that_is_in_the_log() {
    let relay = Relay::start().await;
    let service = relay.service();
    for path in ["/v1/endpoints", "/v1/nothing", "/v1/streams/0123456789abcdef0123456789abcdef"] {
        let answer = service.get(path).await;
        let id = answer.headers["x-request-id"].to_str().unwrap().to_owned();
        until("the request id is in the log", || async { relay.log().contains(&id).then_some(()) }).await;
    }
}

#[tokio::test]
async fn stream_names_are_checked() {
    let relay = Relay::start().await;
    let service = relay.service();
    let names = ["", "a/b", "a%2Fb", "🦀", "a b", "..", &"n".repeat(1024), &"n".repeat(129)];
    for name in names {
        let problem = service.open_with("dev1", json!({ "name": name })).await.problem(400, "bad_request");
        assert!(problem.detail.contains("stream name"), "{name:?}: {}", problem.detail);
    }
    let body = json!({ "name": "n".repeat(128), "connect_timeout_seconds": 0 });
    service.open_with("dev1", body).await.problem(404, "device_offline");
    relay.assert_quiet().await;
}

#[tokio::test]
async fn bodies_are_checked() {
    let relay = Relay::start().await;
    let service = relay.service();
    let many = vec!["x"; 17];
    let bodies = [
        ("no JSON", "{".to_owned()),
        ("no body", String::new()),
        ("no object", "[]".to_owned()),
        ("no name", "{}".to_owned()),
        ("an unknown field", json!({ "name": "a", "timeout": 5 }).to_string()),
        ("a negative time", json!({ "name": "a", "connect_timeout_seconds": -1 }).to_string()),
        ("too many capabilities", json!({ "name": "a", "capabilities": many }).to_string()),
        ("no capability", json!({ "name": "a", "capabilities": ["Half Close"] }).to_string()),
        ("too much metadata", json!({ "name": "a", "metadata": { "k": "v".repeat(2048) } }).to_string()),
        ("something behind", r#"{"name":"a"} {"name":"b"}"#.to_owned()),
        ("not UTF-8", "\u{fffd}".to_owned()),
    ];
    for (what, body) in bodies {
        let body = if what == "not UTF-8" { b"{\"name\":\"\xff\"}" } else { body.as_bytes() };
        let problem = service.post("/v1/devices/dev1/streams", body).await.problem(400, "bad_request");
        assert!(!problem.retry, "{what}");
        if what == "an unknown field" {
            assert!(problem.detail.contains("timeout"), "which field is it? {}", problem.detail);
        }
    }
    let long = json!({ "name": "a", "metadata": { "k": "v".repeat(17 * 1024) } }).to_string();
    service.post("/v1/devices/dev1/streams", long.as_bytes()).await.problem(413, "body_too_large");
    relay.assert_quiet().await;
}

#[tokio::test]
async fn the_body_must_be_announced_as_json() {
    let relay = Relay::start().await;
    let service = relay.service();
    let body = json!({ "name": "test", "connect_timeout_seconds": 0 }).to_string();
    let send = async |headers: &[(&str, &str)]| {
        service.send(Method::POST, "/v1/devices/dev1/streams", headers, body.as_bytes()).await
    };
    send(&[]).await.problem(415, "not_json");
    for wrong in ["text/plain", "application/x-www-form-urlencoded", "application/jsonp"] {
        send(&[("content-type", wrong)]).await.problem(415, "not_json");
    }
    for right in ["application/json", "application/json; charset=utf-8", "Application/JSON"] {
        send(&[("content-type", right)]).await.problem(404, "device_offline");
    }
}

#[tokio::test]
async fn paths_and_methods_are_checked() {
    let relay = Relay::start().await;
    let service = relay.service();
    for path in
        ["/", "/v1", "/v1/", "/v2/endpoints", "/v1/devices/dev1/nothing", "/metrics", "/v1/endpoints/x"]
    {
        service.get(path).await.problem(404, "not_found");
    }
    for (method, path) in [
        (Method::GET, "/v1/devices/dev1/streams"),
        (Method::POST, "/v1/endpoints"),
        (Method::PUT, "/v1/streams"),
        (Method::DELETE, "/v1/devices/dev1"),
        (Method::POST, "/v1/devices/dev1/link"),
    ] {
        let answer = service.send(method.clone(), path, &[], b"").await;
        answer.problem(405, "method_not_allowed");
        assert!(
            answer.headers.contains_key("allow"),
            "{method} {path}: RFC 9110, section 15.5.6 asks for Allow"
        );
    }
    relay.assert_quiet().await;
}

#[tokio::test]
async fn ids_in_paths_are_checked_and_decoded() {
    let relay = Relay::start().await;
    let service = relay.service();
    for path in ["/v1/devices/a%2Fb", "/v1/devices/%F0%9F%A6%80", "/v1/devices/a%20b", "/v1/streams/xyz"] {
        let answer = service.get(path).await;
        assert!([400, 404].contains(&answer.status), "{path}: {}", answer.text());
    }
    // All of the characters that a device may have.
    let odd = "A-b.c%d_e*f?g!h(i)j,k:l=m@n$o'";
    let mut link = relay.device(odd).await;
    let handshake = relay.handshake(odd, &mut link).await;
    assert_eq!(service.stream(handshake.grant.stream).await.address.to_string(), odd);
    let (mut one, mut two) = (relay.service_leg(&handshake).await, relay.device_leg(&handshake).await);
    one.send_text("odd").await;
    assert_eq!(two.next_text().await, "odd");
}

#[tokio::test]
async fn a_device_says_whether_it_is_connected() {
    let relay = Relay::start().await;
    let service = relay.service();
    let status = async || service.get("/v1/devices/dev7").await.expect(200).json();
    assert_eq!(status().await, json!({ "device": "dev7", "connected": false, "registered": false }));
    let link = relay.device("dev7").await;
    let connected = status().await;
    assert_eq!(
        (&connected["connected"], connected["connected_since"].is_string()),
        (&Value::Bool(true), true)
    );
    link.close().await;
    until("the device is offline", || async { (status().await["connected"] == false).then_some(()) }).await;
    // A module is its own.
    let _module = relay.device("dev7/m").await;
    assert_eq!(status().await["connected"], false);
    let module = service.get("/v1/devices/dev7/modules/m").await.expect(200).json();
    assert_eq!((&module["module"], &module["connected"]), (&json!("m"), &json!(true)));
}

#[tokio::test]
async fn devices_are_listed_page_by_page() {
    let relay = Relay::start().await;
    let mut links = Vec::new();
    for number in 0..7 {
        links.push(relay.device(&format!("list-{number}")).await);
    }
    links.push(relay.device("list-0/m").await);
    let service = relay.service();
    let mut seen = Vec::new();
    let mut after = String::new();
    for _ in 0..20 {
        let page = service.get(&format!("/v1/devices?limit=3{after}")).await;
        let page: DevicePage = serde_json::from_value(page.expect(200).json()).unwrap();
        assert!(page.items.len() <= 3);
        seen.extend(
            page.items.into_iter().filter(|item| item.connected).map(|item| item.address.to_string()),
        );
        match page.next {
            Some(next) => after = format!("&after={}", percent(&next)),
            None => break,
        }
    }
    let expected: BTreeSet<_> =
        (0..7).map(|number| format!("list-{number}")).chain(["list-0/m".to_owned()]).collect();
    assert_eq!(seen.iter().cloned().collect::<BTreeSet<_>>(), expected);
    assert_eq!(seen.len(), expected.len(), "a device stands twice: {seen:?}");
    check_limits(&service, "/v1/devices").await;
}

#[tokio::test]
async fn streams_are_listed_page_by_page_until_they_are_over() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let service = relay.service();
    let mut expected = BTreeSet::new();
    for _ in 0..5 {
        expected.insert(relay.handshake("dev1", &mut link).await.grant.stream);
    }
    let list = async || {
        let (mut seen, mut after) = (Vec::new(), String::new());
        for _ in 0..20 {
            let page = service.get(&format!("/v1/streams?limit=2{after}")).await;
            let page: StreamPage = serde_json::from_value(page.expect(200).json()).unwrap();
            assert!(page.items.len() <= 2);
            seen.extend(page.items.iter().map(|record| record.stream));
            match page.next {
                Some(next) => after = format!("&after={}", percent(&next)),
                None => break,
            }
        }
        assert_eq!(seen.len(), seen.iter().collect::<BTreeSet<_>>().len(), "a stream stands twice");
        seen.into_iter().collect::<BTreeSet<_>>()
    };
    assert_eq!(list().await, expected);
    let ended = expected.pop_first().unwrap();
    assert_eq!(service.delete(&format!("/v1/streams/{ended}")).await.status, 204);
    assert_eq!(list().await, expected);
    // It is remembered for a while.
    service.ended(ended, "deleted").await;
    check_limits(&service, "/v1/streams").await;
}

#[tokio::test]
async fn an_end_is_asked_for_as_often_as_one_likes() {
    let relay = Relay::start().await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    let stream = relay.handshake("dev1", &mut link).await.grant.stream;
    let path = format!("/v1/streams/{stream}");
    let answers = futures_util::future::join_all((0..8).map(|_| service.delete(&path))).await;
    assert!(answers.iter().all(|answer| answer.status == 204), "{answers:?}");
    service.ended(stream, "deleted").await;
    assert_eq!(service.delete(&path).await.status, 204);
    until("the records", || async { (relay.activity().len() >= 2).then_some(()) }).await;
    let ends = relay.activity().iter().filter(|record| record["resultType"] == "deleted").count();
    assert_eq!(ends, 1, "the end is recorded more than once: {:?}", relay.activity());
}

async fn check_limits(service: &ServiceApi, path: &str) {
    for query in ["limit=0", "limit=1001", "limit=x", "limit=-1", "after=%FF"] {
        service.get(&format!("{path}?{query}")).await.problem(400, "bad_request");
    }
    service.get(&format!("{path}?limit=1000")).await.expect(200);
}

fn percent(text: &str) -> String {
    text.bytes().fold(String::new(), |text, byte| text + &format!("%{byte:02X}"))
}
