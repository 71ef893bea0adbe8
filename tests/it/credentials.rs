//! Who may connect, what they may reach, and how that ends.

use std::time::Duration;

use http::Method;
use midspan_core::{
    connection_string::{ConnectionString, Identity},
    key::Key,
    link::{GoodbyeReason, ToDevice},
    sas::SasToken,
    time::UnixTime,
};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use testkit::{Answer, DeviceLink, Relay, ServiceApi, eventually, now};

#[tokio::test]
async fn a_service_must_show_who_it_is() {
    let relay = Relay::start().await;
    let service = relay.service();
    let host = relay.target().host().to_owned();
    let connection = relay.service_connection();
    let Identity::Service(policy) = &connection.identity else { panic!("not a service") };
    let (good, wrong) = (&connection.key, &Key::from_bytes(vec![7; 32]).unwrap());
    let later = now().plus(Duration::from_secs(60));

    let refused =
        async |service: ServiceApi| service.get("/v1/endpoints").await.problem(401, "unauthorized").detail;
    refused(service.authorized("Bearer abc")).await;
    refused(service.authorized("SharedAccessSignature sr=x")).await;
    let wrong_key = refused(service.signed(&host, policy, wrong, later)).await;
    let no_policy = refused(service.signed(&host, "nobody", good, later)).await;
    assert_eq!(wrong_key, no_policy, "the answer tells which policies exist");
    refused(service.signed("other.example", policy, good, later)).await;
    // A device's own signature is none of a service.
    let device = relay.device_connection("dev1").sign(later);
    refused(service.authorized(device.expose_secret())).await;
    service.get("/v1/endpoints").await.expect(200);

    for (reason, count) in [("malformed", 2), ("wrong_key", 1), ("wrong_audience", 1)] {
        relay.counts("midspan_control_auth_failures_total", &[("reason", reason)], count).await;
    }
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_request_without_a_credential_says_what_to_send() {
    let relay = Relay::start().await;
    let answer = relay.target().request(relay.target().build(Method::GET, "/v1/endpoints", &[], b"")).await;
    let problem = answer.problem(401, "unauthorized");
    assert!(problem.detail.contains("Authorization: SharedAccessSignature"), "{}", problem.detail);
    assert!(answer.headers.contains_key("www-authenticate"), "RFC 9110, section 11.6.1 asks for it");
}

#[tokio::test]
async fn an_expired_credential_is_told_how_late_it_is() {
    let relay = Relay::start().await;
    let connection = relay.service_connection();
    let Identity::Service(policy) = &connection.identity else { panic!("not a service") };
    let ten_minutes_ago = UnixTime(now().0 - 600);
    let service = relay.service().signed(relay.target().host(), policy, &connection.key, ten_minutes_ago);
    assert_late(&service.open("dev1").await);
    let device = relay.device_connection("dev1").sign(ten_minutes_ago);
    assert_late(&link_refusal(&relay, "dev1", device.expose_secret()).await);
}

#[tokio::test]
async fn a_device_must_show_that_it_is_this_device() {
    let relay = Relay::start().await;
    let host = relay.target().host();
    let later = now().plus(Duration::from_secs(60));
    let key = relay.device_connection("dev1").key;
    let wrong = Key::from_bytes(vec![7; 32]).unwrap();
    let sign = |resource: &str, key: &Key| SasToken::sign(&format!("{host}/{resource}"), key, later, None);
    let tokens = [
        sign("devices/dev1", &wrong),
        // The other device's own, and ours for the other.
        relay.device_connection("dev2").sign(later),
        sign("devices/dev2", &key),
        sign("devices/dev1/modules/m", &key),
        sign("", &key),
        SasToken::sign("other.example/devices/dev1", &key, later, None),
        // A service is no device.
        relay.service_connection().sign(later),
    ];
    for token in tokens {
        link_refusal(&relay, "dev1", token.expose_secret()).await.problem(401, "unauthorized");
    }
    let missing =
        relay.target().upgrade("/v1/devices/dev1/link", &[("sec-websocket-protocol", "midspan.link.v1")]);
    missing.await.unwrap_err().problem(401, "unauthorized");
    let good = sign("devices/dev1", &key);
    connect(&relay, "dev1", good.expose_secret()).await.unwrap().close().await;
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_service_reaches_what_its_scope_names() {
    let relay = Relay::with(&["--reload-interval", "200ms"]).await;
    let scope = json!({ "allow": ["open", "list"], "devices": ["lamp"], "device_prefixes": ["truck-"] });
    let service = add_service(&relay, "fleet", scope).await;
    for reached in ["lamp", "lamp/module", "truck-7"] {
        service.open_with(reached, no_wait()).await.problem(404, "device_offline");
    }
    for beyond in ["dev1", "lamp2", "Truck-7", "dev1/lamp"] {
        let problem = service.open_with(beyond, no_wait()).await.problem(403, "not_allowed");
        assert!(!problem.retry);
        let address: midspan_core::id::DeviceAddress = beyond.parse().unwrap();
        service.get(&format!("/v1/{}", address.path())).await.problem(403, "not_allowed");
    }
}

#[tokio::test]
async fn a_service_does_what_its_permissions_name() {
    let relay = Relay::with(&["--reload-interval", "200ms"]).await;
    let mut link = relay.device("dev1").await;
    let stream = relay.handshake("dev1", &mut link).await.grant.stream;
    let path = format!("/v1/streams/{stream}");

    let opener = add_service(&relay, "opener", json!({ "allow": ["open"], "every_device": true })).await;
    for listing in ["/v1/devices", "/v1/devices/dev1", "/v1/streams", &path] {
        let problem = opener.get(listing).await.problem(403, "not_allowed");
        assert!(problem.detail.contains("list"), "which permission is it? {}", problem.detail);
    }
    opener.delete(&path).await.problem(403, "not_allowed");

    let lister = add_service(&relay, "lister", json!({ "allow": ["list"], "every_device": true })).await;
    lister.open("dev1").await.problem(403, "not_allowed");
    lister.delete(&path).await.problem(403, "not_allowed");
    lister.get(&path).await.expect(200);

    let closer = add_service(&relay, "closer", json!({ "allow": ["close"], "devices": ["dev2"] })).await;
    let answer = closer.delete(&path).await;
    assert!([403, 404].contains(&answer.status), "a stream beyond the scope was closed: {}", answer.text());
    let closer = add_service(&relay, "closer2", json!({ "allow": ["close"], "devices": ["dev1"] })).await;
    assert_eq!(closer.delete(&path).await.status, 204);
}

#[tokio::test]
async fn lists_show_what_the_credential_reaches() {
    let relay = Relay::with(&["--reload-interval", "200ms"]).await;
    let mut streams = Vec::new();
    let mut links = Vec::new();
    for device in ["dev1", "truck-1", "truck-2", "truck-2/radio", "van-1"] {
        let mut link = relay.device(device).await;
        streams.push(relay.handshake(device, &mut link).await.grant.stream);
        links.push(link);
    }
    let scope = json!({ "allow": ["list"], "device_prefixes": ["truck-"] });
    let trucks = add_service(&relay, "trucks", scope).await;
    let list = async |path: &str, field: &str| -> Vec<String> {
        let (mut items, mut after) = (Vec::new(), String::new());
        for _ in 0..10 {
            let page = trucks.get(&format!("{path}?limit=1{after}")).await.expect(200).json();
            items.extend(
                page["items"].as_array().unwrap().iter().map(|item| item[field].as_str().unwrap().to_owned()),
            );
            match page["next"].as_str() {
                Some(next) => after = format!("&after={}", next.replace('/', "%2F")),
                None => break,
            }
        }
        items.sort();
        items
    };
    assert_eq!(list("/v1/devices", "device").await, ["truck-1", "truck-2", "truck-2"]);
    let mut expected: Vec<_> = streams[1..4].iter().map(ToString::to_string).collect();
    expected.sort();
    assert_eq!(list("/v1/streams", "stream").await, expected);
    let answer = trucks.get(&format!("/v1/streams/{}", streams[0])).await;
    assert!([403, 404].contains(&answer.status), "a stream beyond the scope is shown: {}", answer.text());
}

#[tokio::test]
async fn a_signature_can_be_narrowed_to_one_device() {
    let relay = Relay::start().await;
    let connection = relay.service_connection();
    let Identity::Service(policy) = &connection.identity else { panic!("not a service") };
    let resource = format!("{}/devices/dev1", relay.target().host());
    let narrow =
        relay.service().signed(&resource, policy, &connection.key, now().plus(Duration::from_secs(60)));
    narrow.open_with("dev1", no_wait()).await.problem(404, "device_offline");
    narrow.open_with("dev1/m", no_wait()).await.problem(404, "device_offline");
    narrow.open_with("dev2", no_wait()).await.problem(403, "not_allowed");
    narrow.open_with("dev11", no_wait()).await.problem(403, "not_allowed");
}

#[tokio::test]
async fn a_registered_device_has_its_own_keys() {
    let relay = Relay::with(&["--reload-interval", "200ms"]).await;
    let key = Key::from_bytes(vec![9; 32]).unwrap();
    change_credentials(&relay, |credentials| {
        credentials["devices"] = json!([{ "id": "dev9", "keys": [key.to_base64().expose_secret()] }]);
    });
    let own = ConnectionString { key, ..relay.device_connection("dev9") };
    let later = now().plus(Duration::from_secs(60));
    eventually("the registered key is taken", || async {
        match connect(&relay, "dev9", own.sign(later).expose_secret()).await {
            Ok(link) => {
                link.close().await;
                true
            }
            Err(answer) => {
                answer.problem(401, "unauthorized");
                false
            }
        }
    })
    .await;
    // The key out of the group key is that of an unregistered device only.
    let derived = relay.device_connection("dev9").sign(later);
    link_refusal(&relay, "dev9", derived.expose_secret()).await.problem(401, "unauthorized");
}

#[tokio::test]
async fn without_a_group_key_an_unregistered_device_is_unknown() {
    let relay = Relay::with(&["--reload-interval", "200ms"]).await;
    change_credentials(&relay, |credentials| credentials["group_keys"] = json!([]));
    let service = relay.service();
    eventually("the group key is gone", || async {
        let answer = service.open_with("nobody", no_wait()).await;
        assert_eq!(answer.status, 404);
        answer.json()["type"] == "urn:midspan:problem:device_unknown"
    })
    .await;
    let problem = service.open_with("nobody", no_wait()).await.problem(404, "device_unknown");
    assert!(!problem.retry, "it will not come");
}

#[tokio::test]
async fn a_refusal_does_not_tell_which_devices_are_registered() {
    let relay = Relay::with(&["--reload-interval", "200ms"]).await;
    let key = Key::from_bytes(vec![9; 32]).unwrap();
    change_credentials(&relay, |credentials| {
        credentials["group_keys"] = json!([]);
        credentials["devices"] = json!([{ "id": "dev9", "keys": [key.to_base64().expose_secret()] }]);
    });
    let later = now().plus(Duration::from_secs(60));
    let token = |device: &str, key: Key| {
        let host = relay.service_connection().host.clone();
        let identity = Identity::Device(device.parse().unwrap());
        ConnectionString { host, identity, key }.sign(later)
    };
    eventually("the registered key is taken", || async {
        connect(&relay, "dev9", token("dev9", key.clone()).expose_secret()).await.is_ok()
    })
    .await;
    let refused = async |device: &str, of: &str| {
        let wrong = token(of, Key::from_bytes(vec![7; 32]).unwrap());
        let problem = link_refusal(&relay, device, wrong.expose_secret()).await.problem(401, "unauthorized");
        (problem.title, problem.detail.replace(device, "DEVICE").replace(of, "OTHER"), problem.retry)
    };
    assert_eq!(refused("dev9", "dev9").await, refused("nobody", "nobody").await, "a wrong key");
    assert_eq!(refused("dev9", "dev8").await, refused("nobody", "dev8").await, "another device's signature");
}

#[tokio::test]
async fn a_revoked_device_loses_its_link_and_its_streams() {
    let relay = Relay::with(&["--reload-interval", "200ms"]).await;
    let (mut link, mut other) = (relay.device("dev1").await, relay.device("dev2").await);
    let mut stream = relay.join(&mut link).await;
    relay.replace("deny.json", r#"{"devices":["dev1"]}"#);
    let (bye, (), ()) =
        tokio::join!(link.ended(), stream.service.ends(1008, "revoked"), stream.device.ends(1008, "revoked"));
    let goodbye = bye.goodbye.expect("no goodbye");
    assert_eq!((goodbye.reason, goodbye.come_back_seconds), (GoodbyeReason::Revoked, 300));
    assert_eq!(bye.code, Some(1008));
    let token = relay.device_connection("dev1").sign(now().plus(Duration::from_secs(60)));
    let problem = link_refusal(&relay, "dev1", token.expose_secret()).await.problem(401, "unauthorized");
    assert!(problem.detail.contains("revoked"), "{}", problem.detail);
    // Nobody else is concerned.
    relay.handshake("dev2", &mut other).await;
    relay.service().ended(stream.id, "revoked").await;
    relay.counts("midspan_control_auth_failures_total", &[("reason", "revoked")], 1).await;
}

#[tokio::test]
async fn a_revoked_service_loses_its_streams() {
    let relay = Relay::with(&["--reload-interval", "200ms"]).await;
    let mut link = relay.device("dev1").await;
    let mut stream = relay.join(&mut link).await;
    let Identity::Service(policy) = &relay.service_connection().identity else { panic!("not a service") };
    relay.replace("deny.json", &json!({ "services": [policy] }).to_string());
    tokio::join!(stream.service.ends(1008, "revoked"), stream.device.ends(1008, "revoked"));
    let problem = relay.service().get("/v1/endpoints").await.problem(401, "unauthorized");
    assert!(problem.detail.contains("revoked"), "{}", problem.detail);
    assert!(link.is_quiet_for(Duration::from_millis(300)).await, "the device's link is not the service's");
}

#[tokio::test]
async fn a_broken_file_changes_nothing_and_is_reported() {
    let relay = Relay::with(&["--reload-interval", "200ms"]).await;
    for name in ["deny.json", "credentials.json", "ticket.key"] {
        relay.replace(name, "{ this is not JSON");
        eventually("the log names the file", || async {
            relay.log_records().iter().any(|record| {
                matches!(record["level"].as_str(), Some("WARN" | "ERROR"))
                    && record.to_string().contains(name)
            })
        })
        .await;
    }
    relay.service().get("/v1/endpoints").await.expect(200);
    assert_eq!(relay.admin("/readyz").await.status, 200);
}

#[tokio::test]
async fn a_link_ends_with_its_credential() {
    let relay = Relay::start().await;
    let expires = now().plus(Duration::from_secs(2));
    let token = relay.device_connection("dev1").sign(expires);
    let link = connect(&relay, "dev1", token.expose_secret()).await.unwrap();
    let ToDevice::Welcome { expires: told, .. } = link.welcome else { panic!("not welcome") };
    assert_eq!(told, expires);
    let bye = link.ended().await;
    assert_eq!(bye.goodbye.map(|goodbye| goodbye.reason), Some(GoodbyeReason::CredentialExpired));
    assert_eq!(bye.code, Some(1008));
    assert!(now() >= expires, "cut too early");
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_stream_ends_with_the_services_credential() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let connection = relay.service_connection();
    let Identity::Service(policy) = &connection.identity else { panic!("not a service") };
    let expires = now().plus(Duration::from_secs(3));
    let service = relay.service().signed(relay.target().host(), policy, &connection.key, expires);
    let handshake = relay.handshake_by(&service, "dev1", &mut link, json!({ "name": "test" })).await;
    let (mut service, mut device) = (relay.service_leg(&handshake).await, relay.device_leg(&handshake).await);
    service.send_text("while it lasts").await;
    assert_eq!(device.next_text().await, "while it lasts");
    tokio::join!(service.ends(1008, "credential_expired"), device.ends(1008, "credential_expired"));
    assert!(now() >= expires, "cut too early");
    relay.service().ended(handshake.grant.stream, "credential_expired").await;
}

fn no_wait() -> Value {
    json!({ "name": "test", "connect_timeout_seconds": 0 })
}

fn assert_late(answer: &Answer) {
    let detail = answer.problem(401, "unauthorized").detail;
    let seconds = detail.split(' ').find_map(|word| word.parse::<u64>().ok());
    let seconds = seconds.unwrap_or_else(|| panic!("it does not say how late: {detail}"));
    assert!((600..660).contains(&seconds), "{detail}");
    assert!(detail.contains("relay's clock"), "{detail}");
}

fn change_credentials(relay: &Relay, change: impl FnOnce(&mut Value)) {
    let text = std::fs::read_to_string(relay.path("credentials.json")).unwrap();
    let mut credentials = serde_json::from_str(&text).unwrap();
    change(&mut credentials);
    relay.replace("credentials.json", &credentials.to_string());
}

/// Adds a service, and waits until the relay knows it.
async fn add_service(relay: &Relay, name: &str, mut entry: Value) -> ServiceApi {
    let key = Key::from_bytes(vec![5; 32]).unwrap();
    entry["keys"] = json!([key.to_base64().expose_secret()]);
    change_credentials(relay, |credentials| credentials["services"][name] = entry);
    let identity = Identity::Service(name.to_owned());
    let host = relay.service_connection().host.clone();
    let service = ServiceApi::new(relay.target().clone(), &ConnectionString { host, identity, key });
    eventually("the new service is known", || async { service.get("/v1/endpoints").await.status == 200 })
        .await;
    service
}

async fn connect(relay: &Relay, device: &str, token: &str) -> Result<DeviceLink, Answer> {
    let path = format!("/v1/devices/{device}/link");
    DeviceLink::try_connect(relay.target(), &path, &[("authorization", token)]).await
}

async fn link_refusal(relay: &Relay, device: &str, token: &str) -> Answer {
    connect(relay, device, token).await.expect_err("the token was taken")
}
